"""``n_directions``: fewer of the fitted directions are what a fit with fewer would have found, and can be raised again."""

import copy
import gc
import pickle
import warnings

import numpy as np
import pytest
import torch
import unchanged_models
import unchanged_numbers
from helpers import assert_same, build, fitted, inputs, loader, targets, train_loader
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from laplace_ella.network.engine import Engine
from laplace_ella.posterior import posterior as posteriors

X = inputs(7, seed=7)
FEWER = {"conv_batchnorm": 1}  # which is fitted with two
# Links, moments, joint moments and samples with every residual; the evidence and its gradients; and what takes longer.
PARTS = ("fit", "posterior", "predictions", "samples", "evidence")
LONGER = {"tied": "novelty", "partly_frozen": "prior_tuning"}


def relative_difference(found, expected):
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        return max(map(relative_difference, found, expected), default=0.0)
    if not isinstance(expected, (Tensor, float)):
        assert found == expected
        return 0.0
    found, expected = (torch.as_tensor(v, dtype=torch.float64).detach() for v in (found, expected))
    assert found.shape == expected.shape
    largest = expected.abs().max() if expected.numel() else 0.0
    return float((found - expected).abs().max() / largest) if largest else float(found.abs().max())


def lowered(case):
    la = case.fitted()
    la.n_directions = FEWER.get(case.name, 2)
    return la


@pytest.mark.parametrize("case", unchanged_models.CASES, ids=lambda c: c.name)
def test_everything_is_as_in_a_fit_with_as_many_directions(case):
    """Oracle: the same landmarks and curvature inputs, with ``n_eigenvalues=K'``, to 1e-10 of the largest number."""
    la, other = lowered(case), case.fitted(n_eigenvalues=FEWER.get(case.name, 2))
    for part in filter(None, [*PARTS, LONGER.get(case.name)]):
        numbers = getattr(unchanged_numbers, f"of_{part}")
        with unchanged_models.quiet():
            found, expected = (numbers(case, copy.deepcopy(e)) for e in (la, other))
        assert found.keys() == expected.keys()
        differences = {name: relative_difference(found[name], expected[name]) for name in expected}
        assert max(differences.values()) <= 1e-10, (part, differences)


@pytest.mark.parametrize("case", unchanged_models.CASES, ids=lambda c: c.name)
def test_data_can_be_added_and_forgotten(case):
    """Oracle: the sums of a fit with as many directions; and with all of them, once they are used again."""
    la, few, whole = lowered(case), case.fitted(n_eigenvalues=FEWER.get(case.name, 2)), case.fitted()
    for e in (la, few, whole):
        with unchanged_models.quiet():
            e.fit(case.batches(3, 13), override=False)
        if case.name == "tied":  # whose G is the exact one
            e.forget(case.batches(1, 41)[:2])
    assert la.n_directions == few.basis.rank
    assert relative_difference(la.H, few.H) <= 1e-10
    la.n_directions = None
    assert relative_difference(la.H, whole.H) <= 1e-10


@pytest.mark.parametrize("residual", ["none", "isotropic", "exact"])
def test_it_can_be_raised_again(residual):
    la = fitted(residual=residual)
    before, H = la(X), la.H.clone()
    for rank in (2, 4, 5, 1, None):
        la.n_directions = rank
        assert la.n_directions == (rank or 5)
        assert (
            la.features(X)[0].shape[-1]
            == la.basis.rank
            == len(la.H)
            == len(la.posterior_scale)
            == (rank or 5)
        )
    assert torch.equal(la(X), before)
    assert torch.equal(la.H, H)


def test_features_are_computed_for_the_directions_that_are_used(monkeypatch):
    la, seen, push = fitted(), [], Engine.push

    def counted(self, x, tangents, *args):
        seen.append(len(next(iter(tangents.values()))))
        return push(self, x, tangents, *args)

    monkeypatch.setattr(Engine, "push", counted)
    la.n_directions = 2
    la(X)
    la.sample(3)
    la.backend.jacobians(X)
    assert seen == [2, 2]


def test_factor_and_directions_are_made_once(monkeypatch):
    la, factors, factor = fitted(), [], posteriors.posterior_scale
    monkeypatch.setattr(posteriors, "posterior_scale", lambda A: factors.append(len(A)) or factor(A))
    la.n_directions = 2
    basis = la.basis
    for _ in range(3):
        la(X)
    assert factors == [2]
    la.temperature = 3.0
    assert la.basis is basis
    mine, theirs = la.basis.directions, la._posterior.fit.basis.directions
    assert all(mine[k].data_ptr() == theirs[k].data_ptr() for k in mine)


def test_what_was_prepared_of_directions_is_freed():
    la = fitted()
    engine = la.backend.engine
    engine._prepared[next(iter(la.basis.directions.values()))] = "of five"
    la.n_directions = 2
    assert len(engine._prepared) == 0
    engine._prepared[next(iter(la.basis.directions.values()))] = "of two"
    la.temperature = 2.0
    gc.collect()
    assert isinstance(engine._prepared, WeakTensorKeyDictionary)
    assert len(engine._prepared) == 1


def test_copies_share_directions_and_use_as_many_as_they_like():
    la = fitted(residual="isotropic")
    fast = copy.copy(la)
    before = la(X)
    fast.n_directions = 2
    of_two, basis = fast(X), fast.basis
    assert torch.equal(la(X), before)
    la.n_directions = 3
    la(X)
    assert fast.basis is basis
    assert torch.equal(fast(X), of_two)
    assert fast.basis.directions["0.weight"].data_ptr() == la.basis.directions["0.weight"].data_ptr()


@pytest.mark.parametrize("how", ["state", "half", "pickle", "deepcopy"])
def test_it_is_saved_and_can_be_raised_afterwards(how):
    la = fitted()
    whole = la(X)
    la.n_directions = 3
    if how in ("pickle", "deepcopy"):
        other = copy.deepcopy(la) if how == "deepcopy" else pickle.loads(pickle.dumps(la))
    else:
        other = build(model=la.model)
        other.load_state_dict(la.state_dict(directions="full" if how == "state" else "half"))
    assert other.n_directions == 3
    tolerance = 2e-3 if how == "half" else 1e-12
    assert relative_difference(other(X), la(X)) <= tolerance
    other.n_directions = None
    assert relative_difference(other(X), whole) <= tolerance


def test_states_say_nothing_where_all_are_used_and_then_all_are_used():
    la, other = fitted(), fitted()
    state = la.state_dict()
    assert "n_directions" not in state
    other.n_directions = 2
    other.load_state_dict(state)
    assert other.n_directions == 5
    la.n_directions = 5
    assert "n_directions" not in la.state_dict()


@pytest.mark.parametrize("value", [0, 6, True, 2.0, "2"])
def test_states_with_bad_numbers_are_refused(value):
    la = fitted()
    la.n_directions = 2
    state = la.state_dict()
    assert state["n_directions"] == 2
    with pytest.raises(ValueError, match="n_directions must be an integer from 1 to K"):
        la.load_state_dict({**state, "n_directions": value})
    with pytest.raises(ValueError, match="damaged"):
        la.load_state_dict({**state, "n_directions": 3})


@pytest.mark.parametrize("value", [0, -1, 6, True, 2.0, "2", float("nan"), [2]])
def test_bad_numbers_are_refused(value):
    la = fitted()
    la.n_directions = 3
    with pytest.raises(ValueError, match=r"n_directions must be an integer from 1 to 5.*n_eigenvalues"):
        la.n_directions = value
    assert la.n_directions == 3


def test_integers_of_numpy_are_taken():
    la = fitted()
    la.n_directions = np.int64(2)
    assert type(la.n_directions) is int


def test_there_is_none_before_a_fit():
    la = build()
    with pytest.raises(AttributeError):
        la.n_directions = 1
    with pytest.raises(AttributeError):
        _ = la.n_directions


def test_a_new_fit_uses_all_of_its_own():
    la = fitted()
    la.n_directions = 2
    assert "K=2 of 5" in repr(la)
    la.n_eigenvalues = 4
    assert la.n_directions == 2
    la.fit(train_loader())
    assert la.n_directions == 4
    assert "K=4," in repr(la)


def test_parts_are_merged_with_all_directions():
    parts = [loader(inputs(n, seed=n), targets("classification", n)) for n in (11, 13)]
    la = fitted(data=parts[0])
    other = build(model=la.model)
    other.fit(parts[1], basis=la.basis)
    both = la.H + other.H
    la.n_directions, other.n_directions = 2, 3
    la.merge(other)
    assert_same(la.H, both[:2, :2])
    la.n_directions = None
    assert_same(la.H, both)


def test_matrices_are_not_assigned_while_some_are_left_out():
    la = fitted()
    la.n_directions = 2
    with pytest.raises(ValueError, match="n_directions = None"):
        la.H = 2 * la.H
    la.H.mul_(2)  # in place, they lie in the memory of all
    assert torch.equal(la.H, la._posterior.fit.H[:2, :2])


def test_novelty_has_to_be_calibrated_again():
    la = fitted()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        la.calibrate_novelty([inputs(19, seed=9)])
    before = la.novelty(X)
    la.n_directions = 2
    with pytest.raises(ValueError, match="calibrate_novelty"):
        la.novelty(X)
    la.n_directions = 5
    assert torch.equal(la.novelty(X), before)


@pytest.mark.parametrize("variance", ["none", "constant", "last_layer"])
def test_predictions_without_features_do_not_depend_on_it(variance):
    la = fitted(variance=variance)
    before = la(X, link_approx="mc")
    la.n_directions = 2
    assert torch.equal(la(X, link_approx="mc"), before)
    other = build()
    other.load_state_dict(la.state_dict())
    assert (other.variance, other.n_directions) == (variance, 2)
    assert torch.equal(other(X, link_approx="mc"), before)
    la.variance = "ella"
    fewer = fitted()
    fewer.n_directions = 2
    assert torch.equal(la(X), fewer(X))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_search_may_raise_it_and_keeps_all_directions():
    la, val = fitted(temperature=30.0), [(X, targets("classification", 7))]
    rank = la.basis.rank
    la.n_directions = 2
    result = la.optimize_hyperparameters(val, {"n_eigenvalues": [1, rank]})
    scores = {s.n_eigenvalues: v for s, v in result.table}
    assert scores.keys() == {1, 2, rank}
    assert la.n_directions == min(scores, key=scores.__getitem__)
    la.n_directions = None
    assert la.n_directions == rank
