"""What a search returns, notes and warns of."""

import dataclasses
import re
import warnings
from functools import partial

import matplotlib as mpl
import pytest
import torchmetrics
from helpers import C, Snapshot, build, fitted, inputs, val_loader
from matplotlib import pyplot
from matplotlib.figure import Figure
from searching import N_VAL, fit, over_confident, validation
from torch import nn

mpl.use("Agg")
X = inputs(7, seed=7)

quiet = pytest.mark.filterwarnings("ignore::UserWarning")


free = partial(fitted, temperature=None)


def searched(la, val, **options):
    """The result, and the messages of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = la.optimize_hyperparameters(val, **{"link_approx": "probit", **options})
    assert isinstance(result.notes, tuple)
    assert all(isinstance(note, str) for note in result.notes)
    return result, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("n", [N_VAL, 23])
def test_the_result_is_frozen_and_its_summary_names_every_method_and_its_score(likelihood, n):
    p = over_confident(likelihood)
    result, messages = searched(fit(p), validation(p, n))
    assert sum("200" in m for m in messages) == (n < 200)
    text = result.summary()
    numbers = [float(t) for t in re.findall(r"-?\d+\.\d+", text)]
    assert str(n) in text
    for name, entry in {"": result, **result.baselines}.items():
        assert name in text
        assert any(abs(v - entry.score) < 5e-3 for v in numbers), name
    for frozen, name in ((result, "score"), (result.best, "temperature"), (result.baselines["MAP"], "score")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, 0.0)
    assert isinstance(result.table, tuple)
    figure = result.plot()
    assert isinstance(figure, Figure)
    assert len(figure.axes) >= 2  # one for each parameter searched
    pyplot.close(figure)
    with pytest.raises(TypeError, match="argument"):
        result.plot(3)


def test_simpler_methods_as_good_or_better_are_named_and_an_optimum_on_an_edge_is_noted():
    p = over_confident("classification")
    _, messages = searched(fit(p), validation(p), search=["temperature"])
    assert any("on data held out" in m and "temperature scaling" in m for m in messages)
    _, messages = searched(fit(p), validation(p), search={"temperature": [1e-9]})
    assert any("MAP" in m for m in messages)
    la = free(logit_scale=30.0)
    val = [(x, la.model(x).argmin(-1)) for x in inputs(60, seed=3).split(20)]
    notes = searched(la, val, search={"temperature": [1e-3]})[0].notes
    assert any("are better" in note and "MAP" in note for note in notes)
    assert not any("as good" in note and "MAP" in note for note in notes)
    notes = searched(free(logit_scale=5.0), val_loader(), search={"logit_scale": [5.0, 10.0]})[0].notes
    assert any("edge" in note and "below" in note for note in notes)


def test_warnings_name_the_users_line():
    calls = iter(range(10**6))

    def broken_now_and_then(p, y):
        return float("nan") if next(calls) % 7 == 3 else -p.gather(1, y[:, None]).log().mean()

    la, state = free(), fitted().state_dict()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"method": "gridsearch", "val_loader": val_loader(), "grid_size": 11}
        la.optimize_prior_precision(loss=broken_now_and_then, **options)
        la.optimize_hyperparameters(val_loader(), loss=broken_now_and_then)
        build(enable_backprop=True).load_state_dict(state)
    assert len(caught) >= 3
    assert {w.filename for w in caught} == {__file__}


class HigherIsBetter(torchmetrics.classification.MulticlassAccuracy):
    """Accuracy."""


MISLEADING = {
    "better when higher": lambda: HigherIsBetter(num_classes=C),
    "instance": lambda: nn.MSELoss,
    "metric": lambda: "nll",
}


@quiet
@pytest.mark.parametrize("tune", ["optimize_prior_precision", "optimize_hyperparameters"])
def test_losses_that_would_mislead_are_named(tune):
    la = free()
    before = Snapshot(la, X)
    options = {"method": "gridsearch", "grid_size": 3} if tune == "optimize_prior_precision" else {}
    for match, make in MISLEADING.items():
        with pytest.raises(ValueError, match=match):
            getattr(la, tune)(val_loader=val_loader(), loss=make(), **options)
    before.check()
    with pytest.warns(UserWarning, match="receives probabilities") as caught:
        getattr(la, tune)(val_loader=val_loader(), loss=nn.CrossEntropyLoss(), **options)
    assert {w.filename for w in caught} == {__file__}


@quiet
def test_the_representation_names_what_was_tuned():
    la = free(residual="isotropic", curvature="mc", logit_scale=0.5)
    for part in ("logit_scale=0.5", "residual='isotropic'", "curvature='mc'", "n=23"):
        assert part in repr(la)
