"""What users of the package's modules may add from outside: a likelihood, a link."""

from functools import partial

import pytest
import torch
from helpers import C, build, fitted, inputs, loader, mlp

from laplace_ella.data.landmarks import uniform
from laplace_ella.posterior.likelihoods import LIKELIHOODS, Likelihood
from laplace_ella.posterior.links import LINKS, Link

X = inputs(7, seed=7)


class Exponential(Likelihood):
    """Waiting times, the logarithms of whose means are the outputs."""

    name = "exponential"

    def targets(self, y, f):
        if y.shape != f.shape or bool((y < 0).any()):
            raise ValueError(f"Times must be numbers of at least 0 in the shape {tuple(f.shape)}.")
        return y.to(f)

    def loss(self, f, y):
        return (f + y * (-f).exp()).double().sum()

    def curvature_root(self, phi, f):
        return phi.flatten(0, 1)

    def nll(self, prediction, y, noise_variance):
        mean, y = prediction.double(), y.double()
        return (mean.log() + y / mean).sum(-1)

    def inverse_link(self, f):
        return f.exp()


@pytest.fixture
def times(monkeypatch):
    monkeypatch.setitem(LIKELIHOODS, "exponential", Exponential())
    y = -mlp()(inputs()).exp().detach() * torch.rand(23, C, generator=torch.Generator().manual_seed(0)).log()
    return loader(inputs(), y)


@pytest.mark.filterwarnings(
    "ignore:.*settings were skipped", "ignore:Only 23 validation inputs", "ignore:The best "
)
def test_a_likelihood_is_one_class(times):
    la = build("exponential", subsample_size=40, n_eigenvalues=30, temperature=None)
    la.fit(times)
    phi, _ = la.features(inputs())
    expected = torch.einsum("bck,bcl->kl", phi, phi)
    torch.testing.assert_close(la.H, expected)
    means = la(X, link_approx="mc")
    assert bool((means > la.features(X)[1].exp().mul(0.5)).all())
    la.optimize_prior_precision(method="gridsearch", val_loader=times, link_approx="mc", grid_size=3)
    result = la.optimize_hyperparameters(times)
    assert set(result.baselines) >= {"MAP", "constant variance"}
    assert torch.isfinite(la.log_marginal_likelihood())


def test_what_a_likelihood_refuses_names_the_batch(times):
    with pytest.raises(ValueError, match=r"batch 0.*Times must be"):
        build("exponential").fit(loader(inputs(), -torch.ones(23, C)))


def test_a_likelihood_says_what_is_not_for_it(times):
    with pytest.raises(ValueError, match="balanced=True needs classes; exponential has none"):
        build("exponential").fit(times, balanced=True)
    with pytest.raises(ValueError, match=r"(?i)sigma.noise.*regression"):
        build("exponential", sigma_noise=2.0)
    la = build("exponential")
    la.fit(times)
    with pytest.raises(ValueError, match="sum to one over the classes"):
        la(X, link_approx="bridge")


def test_a_likelihood_says_how_its_uncertainty_splits(times, monkeypatch):
    la = build("exponential")
    la.fit(times)
    with pytest.raises(
        NotImplementedError, match=r"'exponential'.*log_probabilities\(\), or uncertainty\(\)"
    ):
        la.uncertainty(X)
    with pytest.raises(ValueError, match=r"'exponential' has no finite set"):
        la.batch_bald([X], 2)

    def uncertainty(self, outputs, samples, noise_variance):
        """The variance of a time: the mean of its squared mean, and the variance of its mean."""
        means = torch.cat(list(samples)).exp()
        return means.square().mean(0), means.var(0, correction=0)

    monkeypatch.setattr(Exponential, "uncertainty", uncertainty)
    found = la.uncertainty(X, 64)
    mean = la(X, link_approx="mc", n_samples=64)
    torch.testing.assert_close(found.aleatoric - found.epistemic, mean.square())


def test_a_link_is_one_function(monkeypatch):
    def of_the_mean(outputs, likelihood, noise):
        return likelihood.inverse_link(outputs.mean)

    monkeypatch.setitem(LINKS, "mean", Link(of_the_mean))
    la = fitted()
    torch.testing.assert_close(la(X, link_approx="mean"), la.features(X)[1].softmax(-1))
    la.fit(
        loader(inputs(), torch.randint(C, (23,))),
        val_loader=loader(X, torch.arange(7) % C),
        link_approx="mean",
    )
    assert la.fit_history_["val_nll"]


def test_a_landmark_scheme_is_one_function():
    def longest(batch, seed):
        return -batch.x.norm(dim=1), None

    la = build(subsample_size=5, n_eigenvalues=3)
    la.fit(loader(inputs(), torch.arange(23) % C), landmarks=longest)
    chosen = torch.cat(list(la.basis.landmarks.inputs)).norm(dim=1)
    assert chosen.sort().values.tolist() == inputs().norm(dim=1).sort().values[-5:].tolist()
    with pytest.raises(ValueError, match="landmarks= is a scheme"):
        la.fit(loader(inputs(), torch.arange(23) % C), landmarks=longest, balanced=True)


def test_a_landmark_scheme_without_a_name_is_refused_where_fits_are_compared(tmp_path):
    data, scheme = loader(inputs(), torch.arange(23) % C), partial(uniform)
    build(subsample_size=5, n_eigenvalues=3).fit(data, landmarks=scheme)
    with pytest.raises(ValueError, match="must be a function with a name"):
        build().fit(data, landmarks=scheme, checkpoint=tmp_path / "fit")
