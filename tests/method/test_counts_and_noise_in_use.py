"""Poisson and heteroscedastic likelihoods: tuning, files, positions, and what is refused."""

from __future__ import annotations

import pytest
import torch
from conftest import K, M, assert_close
from helpers import Snapshot, assert_same, edited, inputs, loader, mlp
from models import Applied, Sequence
from searching import by_loop, grid_search
from sklearn.base import clone
from test_counts_and_noise import CASES, NAMES, X, build, fit, generator, targets
from torch import nn

from laplace_ella import ELLALaplace
from laplace_ella.posterior.likelihoods import LIKELIHOODS

F64 = torch.float64
X_VAL = inputs(17, seed=5)


def small(name: str, n_outputs: int = 4, **options) -> ELLALaplace:
    """Fit over K directions."""
    options = {"n_eigenvalues": K, "subsample_size": M, "curvature_size": None, **options}
    la = build(name, n_outputs, **options)
    la.fit(loader(inputs(), targets(name, n_outputs)))
    return la


def val(name: str, n_outputs: int = 4):
    return loader(X_VAL, targets(name, n_outputs, 17, seed=6), 5)


def nll(la: ELLALaplace, name: str, n_outputs: int) -> float:
    """The mean NLL of the validation inputs, from moments of the outputs."""
    prediction = la._glm_predictive_distribution(X_VAL, diagonal_output=name == "poisson")
    y = targets(name, n_outputs, 17, seed=6)
    return float(LIKELIHOODS[name].nll(prediction, y.double(), 1.0).mean())


def squared(mean, spread, y):
    assert mean.shape == y.shape
    spread = spread if spread.ndim == mean.ndim else spread.diagonal(dim1=-2, dim2=-1)
    return ((y - mean).square() / spread + spread.log()).mean()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "n_outputs"), CASES)
def test_searches_find_what_loops_over_calls_find(name, n_outputs):
    la = small(name, n_outputs, temperature=40.0)
    data, y = val(name, n_outputs), targets(name, n_outputs, 17, seed=6)
    expected = by_loop(la, lambda: nll(la, name, n_outputs))
    assert grid_search(la, data) == expected
    expected = by_loop(la, lambda: float(squared(*la(X_VAL), y)))
    assert grid_search(la, data, loss=squared) == expected


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_networks_with_sampled_weights_are_searched_by_their_moments(name):
    la, y = small(name, temperature=2.0), targets(name, 4, 17, seed=6)
    options = {"pred_type": "nn", "link_approx": "mc", "n_samples": 7}
    grid = {"low": -1.0, "high": 3.0, "size": 5}
    expected = by_loop(la, lambda: float(squared(*la(X_VAL, generator=generator(), **options), y)), **grid)
    grid = {"log_prior_prec_min": -1, "log_prior_prec_max": 3, "grid_size": 5}
    assert grid_search(la, loader(X_VAL, y, 17), loss=squared, **grid, **options) == expected
    assert grid_search(la, val(name), **grid, **options) > 0


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_joint_search_has_simpler_methods_beside_it(name):
    la = small(name, temperature=None)
    result = la.optimize_hyperparameters(val(name))
    assert result.searched == ("temperature",)
    assert result.score == pytest.approx(nll(la, name, 4), rel=1e-6)
    assert set(result.baselines) == {"MAP", "constant variance", "last-layer variance"}
    f = la.features(X_VAL)[1]
    of_map = LIKELIHOODS[name].nll((f, 0 * f), targets(name, 4, 17, seed=6).double(), 1.0).mean()
    assert result.baselines["MAP"].score == pytest.approx(float(of_map), rel=1e-9)
    assert result.baselines["constant variance"].score <= result.baselines["MAP"].score + 1e-6
    with_loss = la.optimize_hyperparameters(val(name), loss=squared)
    mean, spread = LIKELIHOODS[name].conditional_moments(f)
    expected = float(squared(mean, spread, targets(name, 4, 17, seed=6)))
    assert with_loss.baselines["MAP"].score == pytest.approx(expected, rel=1e-9)
    for parameter in ("sigma_noise", "logit_scale"):
        with pytest.raises(ValueError, match=parameter):
            la.optimize_hyperparameters(val(name), [parameter])


@pytest.mark.parametrize("name", NAMES)
def test_early_stopping_and_evidence(name):
    la = build(name, 4, n_eigenvalues=K, subsample_size=M, temperature=None)
    la.fit(loader(inputs(), targets(name, 4)), val_loader=val(name))
    history = la.fit_history_
    assert min(history["val_nll"]) == pytest.approx(nll(la, name, 4), rel=1e-6)
    la.temperature = 1.0
    before = la.log_marginal_likelihood()
    la.optimize_prior_precision(method="marglik")
    assert la.log_marginal_likelihood() > before
    with pytest.raises(ValueError, match="sigma_noise"):
        la.log_marginal_likelihood(sigma_noise=torch.tensor(2.0))


@pytest.mark.parametrize("name", NAMES)
def test_states_clones_files_and_plans(name, tmp_path):
    la, data = small(name), loader(inputs(), targets(name, 4))
    torch.save(la.state_dict(), tmp_path / "la.pt")
    other = build(name, 4)
    other.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=True))
    assert_same(other(X), la(X))
    assert_close(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    with pytest.raises(ValueError, match="likelihood"):
        ELLALaplace(mlp(4), "regression").load_state_dict(la.state_dict())
    twin = clone(la)
    assert twin.likelihood == name
    twin.fit(data, checkpoint=tmp_path / "fit")
    assert_same(twin(X), la(X))
    assert twin.plan(data, verbose=False).n_params == la.n_params
    assert repr(la).startswith(f"ELLALaplace('{name}'")


@pytest.mark.parametrize("name", NAMES)
def test_data_are_added_and_taken_away(name):
    (x, y), la = (inputs(), targets(name, 4)), small(name)
    parts = [build(name, 4, curvature_size=None) for _ in range(2)]
    for part, rows in zip(parts, (slice(0, 9), slice(9, None))):
        part.fit(loader(x[rows], y[rows]), basis=la.basis)
    parts[0].merge(parts[1])
    for value in ("H", "loss"):
        assert_close(getattr(parts[0], value), getattr(la, value))
    parts[0].forget(loader(x[9:], y[9:]))
    alone = build(name, 4, curvature_size=None)
    alone.fit(loader(x[:9], y[:9]), basis=la.basis)
    for value in ("H", "loss"):
        assert_close(getattr(parts[0], value), getattr(alone, value))


def test_a_negative_loss_is_kept_where_targets_have_densities():
    model = mlp(2)
    with torch.no_grad():
        model[-1].bias.copy_(torch.tensor([0.0, -9.0]))
    y = model(inputs())[:, :1].detach()
    la = ELLALaplace(model, "heteroscedastic", curvature_size=None)
    la.fit(loader(inputs(), y))
    assert la.loss < 0
    other = ELLALaplace(model, "heteroscedastic")
    other.load_state_dict(la.state_dict())
    assert torch.equal(other.loss, la.loss)
    la.forget(loader(inputs()[:5], y[:5]))
    assert other.loss < la.loss < 0
    poisson = fit("poisson", 1)
    with pytest.raises(ValueError, match="loss must be"):
        build("poisson", 1).load_state_dict({**poisson.state_dict(), "loss": torch.tensor(-1.0, dtype=F64)})


@pytest.mark.parametrize("name", NAMES)
def test_positions_join_the_batch(name):
    net = Sequence().double().eval()
    net.head = nn.Linear(7, 4).double()
    x = torch.randn(13, 7, 2, dtype=F64)
    y = targets(name, 4, 13 * 7).unflatten(0, (13, 7))
    la = ELLALaplace(net, name, n_eigenvalues=K, subsample_size=M, curvature_size=None)
    la.fit(loader(x, y, 5))
    phi, f = la.features(x)
    assert_close(la.H, phi_information(name, phi, f))
    assert_close(la.loss, LIKELIHOODS[name].loss(f, y.flatten(0, 1).double()))
    n = 4 if name == "poisson" else 2
    mean, covariance = la(x[:2])
    assert (mean.shape, covariance.shape) == ((14, n), (14, n, n))


def phi_information(name, phi, f):
    mean, log_variance = f.chunk(2, -1)
    of_noise = torch.cat([(-log_variance).exp(), torch.full_like(mean, 0.5)], -1)
    return torch.einsum("bck,bc,bcl->kl", phi, f.exp() if name == "poisson" else of_noise, phi)


@pytest.mark.filterwarnings("ignore:curvature='mc' estimates G")
@pytest.mark.parametrize("name", NAMES)
def test_sampled_curvature_goes_to_the_exact_one(name):
    exact = small(name)
    la = build(name, 4, curvature_size=None, curvature="mc", curvature_samples=2000)
    la.fit(loader(inputs(), targets(name, 4)), basis=exact.basis)
    assert_close(la.H, exact.H, rtol=0.05)


@pytest.mark.parametrize("form", ["int", "long", "float", "double", "byte"])
def test_counts_of_any_type_give_the_same_fit(form):
    y, expected = targets("poisson", 1), fit("poisson", 1)
    for given in (getattr(y, form)(), getattr(y[:, 0], form)()):
        la = fit("poisson", 1, given)
        assert_close(la.loss, expected.loss)


REFUSED = {
    "negative": ("poisson", lambda y: -y - 1, r"batch 0.*whole numbers of at least 0; got -"),
    "fraction": ("poisson", lambda y: y + 0.5, r"batch 0.*whole numbers of at least 0; got \d\.5"),
    "nan": ("poisson", lambda y: y * float("nan"), "whole numbers of at least 0; got nan"),
    "narrow": ("poisson", lambda y: y[:, :1], r"shape of the outputs, \(7, 4\).*got \(7, 1\)"),
    "complex": ("poisson", lambda y: y + 0j, "complex"),
    "as outputs": ("heteroscedastic", lambda y: y.repeat(1, 2), r"means, \(7, 2\).*got \(7, 4\)"),
    "infinite": ("heteroscedastic", lambda y: y / 0, "finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_targets_that_do_not_fit_are_refused_and_the_fit_before_stays(case):
    name, change, message = REFUSED[case]
    la = small(name)
    before = Snapshot(la, X)
    with pytest.raises(ValueError, match=message):
        la.fit(loader(inputs(), change(targets(name, 4))))
    before.check()


def test_outputs_that_do_not_fit_are_refused():
    y = targets("poisson", 4)
    steep = Applied(lambda net, x: 100 + net(x), mlp(4))
    with pytest.raises(
        ValueError, match=r"logarithms of rates, which must lie in -80\.\.80; the model returned 9"
    ):
        ELLALaplace(steep, "poisson").fit(loader(inputs(), y))
    with pytest.raises(ValueError, match="logarithms of variances, which must lie"):
        ELLALaplace(steep, "heteroscedastic").fit(loader(inputs(), y[:, :2]))
    with pytest.raises(ValueError, match="two outputs for each target"):
        ELLALaplace(mlp(3), "heteroscedastic").fit(loader(inputs(), y[:, :1]))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_of_other_likelihoods_is_refused(name):
    with pytest.raises(ValueError, match="sigma_noise is for regression"):
        build(name, 4, sigma_noise=0.5)
    with pytest.raises(ValueError, match="logit_scale is for"):
        build(name, 4, logit_scale=2.0)
    la = small(name)
    with pytest.raises(ValueError, match="balanced"):
        la.fit(loader(inputs(), targets(name, 4)), balanced=True)
    with pytest.raises(ValueError, match="needs probabilities"):
        la.calibrate_novelty(loader(inputs(), targets(name, 4)))


@pytest.mark.parametrize("name", NAMES)
def test_extreme_variances_give_finite_predictions(name):
    la = small(name, temperature=1e6, prior_precision=1e-4)
    for options in ({}, {"diagonal_output": True}, {"joint": True}):
        mean, spread = la(X, **options)
        assert bool(mean.isfinite().all() & spread.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("residual", ["isotropic", "exact"])
def test_a_residual_widens_the_outputs(name, residual):
    la, plain = small(name, residual=residual), small(name)
    assert bool((la(X)[1].diagonal(dim1=1, dim2=2) >= plain(X)[1].diagonal(dim1=1, dim2=2)).all())


@pytest.mark.parametrize("link", ["bridge", "bridge_norm"])
@pytest.mark.parametrize("name", NAMES)
def test_links_of_class_probabilities_are_refused_wherever_one_is_named(name, link):
    la, data = small(name), val(name)
    before = Snapshot(la, X)
    uses = {
        "call": lambda: la(X, link_approx=link),
        "predictive": lambda: la.predictive(X, link_approx=link),
        "attribute": lambda: setattr(la, "link_approx", link),
        "constructor": lambda: build(name, 4, link_approx=link),
        "search": lambda: la.optimize_hyperparameters(data, ["prior_precision"], link_approx=link),
        "grid search": lambda: grid_search(la, data, link_approx=link),
        "state": lambda: la.load_state_dict(edited(la.state_dict(), link=link)),
    }
    for use in uses.values():
        with pytest.raises(ValueError, match=f"{link}.*{name}.*moments, which need no link"):
            use()
    before.check()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_chosen_among_those_there_are_and_is_saved(name):
    x, y = inputs(60, seed=5), targets(name, 4, 60, seed=6)
    la, data = small(name, temperature=None), loader(x, y, 13)
    result = la.optimize_hyperparameters(data, "auto")
    assert list(result.held_out) == ["MAP", "constant variance", "last-layer variance", "ELLA (T)"]
    assert all(found.metrics.keys() == {"NLL"} for found in result.held_out.values())
    for method, variance in (
        ("MAP", "none"),
        ("constant variance", "constant"),
        ("last-layer variance", "last_layer"),
        ("ELLA (T)", "ella"),
    ):
        result = la.optimize_hyperparameters(data, "auto", method=method)
        assert (la.variance, la.link_approx) == (variance, None)
        prediction = la._glm_predictive_distribution(x, diagonal_output=name == "poisson")
        expected = LIKELIHOODS[name].nll(prediction, y.double(), 1.0).mean()
        assert result.score == pytest.approx(float(expected), rel=1e-9)
        mean, spread = la(x, diagonal_output=True)
        found = la.uncertainty(x)
        if name == "heteroscedastic":
            assert_close(found.total, spread)
        assert_close(found.aleatoric, mean if name == "poisson" else spread - found.epistemic)
        assert bool(found.epistemic.any()) == (variance != "none")
        other = build(name, 4)
        other.load_state_dict(la.state_dict())
        assert_same(other(x), la(x))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_of_ones_own_is_of_moments_of_targets_in_every_method(name):
    x, y = inputs(60, seed=5), targets(name, 4, 60, seed=6)
    la, data = small(name, temperature=None), loader(x, y, 13)
    result = la.optimize_hyperparameters(data, "auto", method="MAP", loss=squared)
    assert result.score == pytest.approx(float(squared(*la(x), y)), rel=1e-9)
    by_fold = [float(squared(*la(x[k::5]), y[k::5])) for k in range(5)]
    assert result.held_out["MAP"].score == pytest.approx(sum(by_fold) / 5, rel=1e-9)
    assert result.held_out["MAP"].metrics == {}  # which are of outputs
    assert "Chosen: MAP" in result.summary()
