"""The link that a setting was tuned for is that of calls which name none."""

import copy
import pickle

import pytest
import torch
from conftest import assert_close
from helpers import build, fitted, inputs, train_loader, val_loader

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
X = inputs(7, seed=7)
GRID = {"method": "gridsearch", "val_loader": val_loader(), "grid_size": 3}


def tuned(link="mc"):
    la = fitted(temperature=None)
    la.optimize_hyperparameters(val_loader(), {"temperature": [500.0]}, link_approx=link)
    return la


@pytest.mark.parametrize("link", ["mc", "bridge", "probit"])
def test_calls_use_the_link_that_tuning_was_for_and_others_if_asked(link):
    la = tuned(link)
    assert la.link_approx == link
    assert torch.equal(la(X), la(X, link_approx=link))
    assert torch.equal(la.predictive(X), la(X))
    assert not torch.equal(la(X, link_approx="bridge_norm"), la(X))
    assert f"link_approx={link!r}" in repr(la)


def test_it_is_probit_before_tuning_and_assigned_or_given_up_by_hand():
    la = fitted()
    assert la.link_approx is None
    assert torch.equal(la(X), la(X, link_approx="probit"))
    la.link_approx = "mc"
    assert torch.equal(la(X), la(X, link_approx="mc"))
    la.link_approx = None
    assert torch.equal(la(X), la(X, link_approx="probit"))
    with pytest.raises(ValueError, match="link_approx"):
        la.link_approx = "nonsense"
    with pytest.raises(ValueError, match="sum to one"):
        build("bernoulli", link_approx="bridge")


def test_grid_search_and_early_stopping_are_for_links_too_and_apply_false_for_none():
    la = fitted(temperature=None)
    la.optimize_hyperparameters(val_loader(), ["temperature"], apply=False)
    assert la.link_approx is None
    la.optimize_prior_precision(**GRID, link_approx="bridge", n_samples=9)
    assert la.link_approx == "bridge"
    la = build(temperature=None)
    la.fit(train_loader(), val_loader=val_loader(), link_approx="mc")
    assert la.link_approx == "mc"


def test_copies_states_and_clones_keep_it():
    la = tuned()
    state = fitted()
    state.load_state_dict(la.state_dict())
    for each in (copy.deepcopy(la), pickle.loads(pickle.dumps(la)), state):
        assert each.link_approx == "mc"
        assert torch.equal(each(X), la(X))
    assert type(la)(**la.get_params()).link_approx == "mc"


def test_sampled_weights_have_one_link_only():
    la, draws = fitted(), [torch.Generator().manual_seed(0) for _ in range(2)]
    named = la(X, "nn", link_approx="mc", n_samples=5, generator=draws[0])
    assert_close(la(X, "nn", n_samples=5, generator=draws[1]), named)


def test_a_regression_has_none():
    la = fitted("regression", temperature=None)
    la.optimize_hyperparameters(val_loader("regression"), ["temperature"])
    assert la.link_approx is None
