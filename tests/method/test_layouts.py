"""Outputs as networks give them: channels second or last, none, inside objects, mappings and tuples; some of the positions."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import oracle
import pytest
import torch
from conftest import assert_close
from models import Applied, Pixels
from torch import nn
from torch.nn import functional as F

from laplace_ella import ELLALaplace
from laplace_ella.data.hashing import POSITION, uniforms
from laplace_ella.data.landmarks import BottomK, draw_outputs
from laplace_ella.fitting.curvature import Part, drawn_positions
from laplace_ella.nystrom.basis import identity_basis

F64 = torch.float64
N, B, C, H, W, K, M = 7, 5, 3, 2, 5, 5, 11
L, T = H * W, 1.3
LIKELIHOODS = ("classification", "regression", "bernoulli")


def generator(seed):
    return torch.Generator().manual_seed(seed)


X, X_TEST = (torch.randn(n, 2, H, W, dtype=F64, generator=generator(n)) for n in (N, B))
Y = torch.randint(C, (N, H, W), generator=generator(2))


def pixels() -> nn.Module:
    torch.manual_seed(0)
    return Pixels().double().eval()


def second(net) -> nn.Module:
    """Outputs (B, C, H, W) of a network with channels last."""
    return Applied(lambda net, x: net(x).movedim(-1, 1), net)


def targets(likelihood, channels_second=False):
    if likelihood == "classification":
        return Y
    shape = (N, C, H, W) if channels_second else (N, H, W, C)
    values = torch.randn(N, H, W, C, dtype=F64, generator=generator(3))
    values = values if likelihood == "regression" else (values > 0).double()
    return values.movedim(-1, 1) if channels_second else values.reshape(shape)


def fit(model, y, likelihood="classification", data=None, full=True, **options) -> ELLALaplace:
    la = ELLALaplace(
        model, likelihood, **{"temperature": T, "n_eigenvalues": K, "subsample_size": M, **options}
    )
    basis = identity_basis(la.backend.engine.function.weights()) if full else None
    la.fit(list(zip(X.split(3), y.split(3))) if data is None else data, basis=basis)
    return la


def flat(tensor):
    """What has channels in axis 1 as rows of positions."""
    return tensor.movedim(1, -1).flatten(0, -2)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_channels_second_are_channels_last(likelihood):
    last = fit(pixels(), targets(likelihood), likelihood)
    la = fit(second(pixels()), targets(likelihood, True), likelihood, channel_axis=1)
    assert_close(la.H, last.H)
    assert_close(la.loss, last.loss)
    assert (la.n_outputs, la.n_predictions) == (C, N * L)
    found, expected = la(X_TEST), last(X_TEST)
    if likelihood == "regression":
        (mean, cov), (mean_rows, cov_rows) = found, expected
        assert mean.shape == (B, C, H, W)
        assert cov.shape == (B, C, C, H, W)
        assert_close(cov.movedim((1, 2), (-2, -1)).flatten(0, 2), cov_rows)
        assert la(X_TEST, diagonal_output=True)[1].shape == (B, C, H, W)
        found, expected = mean, mean_rows
    assert found.shape == la.model(X_TEST).shape
    assert_close(flat(found), expected)
    for name, axes in (("uncertainty", la.uncertainty(X_TEST).total), ("share", la.residual_share(X_TEST))):
        rows = getattr(last, "residual_share" if name == "share" else "uncertainty")(X_TEST)
        rows = rows if name == "share" else rows.total
        assert axes.shape[0] == B
        assert_close(axes.flatten() if rows.ndim == 1 else flat(axes), rows)
    for draw in (la.functional_samples, la.predictive_samples):
        assert draw(X_TEST, n_samples=2).shape == (2, B, C, H, W)
    assert la(X_TEST, "nn", link_approx="mc", n_samples=3)[0].shape[-2:] == (H, W)


def test_the_posterior_is_exact_linearised_laplace():
    la, model = fit(second(pixels()), Y), second(pixels())
    J = oracle.jacobian(Applied(lambda net, x: net(x).movedim(1, -1).flatten(1), model), X)
    f = model(X).detach()
    G = oracle.curvature(J.unflatten(1, (L, C)).flatten(0, 1), flat(f), "classification")
    assert_close(la.H, G)
    assert_close(la.loss, F.cross_entropy(f, Y, reduction="sum"))  # torch's own reading
    J_test = oracle.jacobian(Applied(lambda net, x: net(x).movedim(1, -1).flatten(1), model), X_TEST)
    cov = oracle.covariance(J_test.unflatten(1, (L, C)).flatten(0, 1), la.posterior_precision)
    assert_close(flat(la(X_TEST)), oracle.probit(flat(model(X_TEST).detach()), cov))


def test_targets_say_where_the_channels_are():
    la = fit(second(pixels()), Y, full=False)
    assert "channel_axis=1" in repr(la)
    assert la.channel_axis is None  # what was asked for
    named = fit(second(pixels()), Y, full=False, channel_axis=1)
    assert_close(la.H, named.H)
    assert_close(la(X_TEST), named(X_TEST))
    one_hot = fit(second(pixels()), F.one_hot(Y, C).movedim(-1, 1).double(), full=False)
    assert_close(one_hot.loss, la.loss)
    again = fit(pixels(), Y, full=False)
    assert again(X_TEST).shape == (B * L, C)  # rows, as nothing else was said
    named_last = fit(pixels(), Y, full=False, channel_axis=-1)
    assert_close(named_last(X_TEST).flatten(0, -2), again(X_TEST))
    assert named_last(X_TEST).shape == (B, H, W, C)


def square(n):
    """A linear map at each of n positions, with channels second."""
    torch.manual_seed(0)
    return nn.Conv1d(2, C, 1, dtype=F64), torch.randn(4, 2, n, dtype=F64), torch.randint(C, (4, n))


def test_two_readings_are_warned_of_and_named():
    model, x, y = square(C)
    with pytest.warns(UserWarning, match=r"two readings .*\(4, 3, 3\).*channel_axis=1"):
        ELLALaplace(model, "classification", n_eigenvalues=2).fit([(x, y)])
    losses = {}
    for axis in (1, -1):
        la = ELLALaplace(model, "classification", n_eigenvalues=2, channel_axis=axis)
        la.fit([(x, y)])  # without a warning
        losses[axis] = float(la.loss)
    f = model(x).detach()
    assert losses[1] == pytest.approx(float(F.cross_entropy(f, y, reduction="sum")))
    assert losses[-1] == pytest.approx(float(F.cross_entropy(f.mT, y, reduction="sum")))


def test_targets_that_fit_no_reading_are_refused():
    model, x, y = square(5)
    for axis in (None, 1, -1):
        la = ELLALaplace(model, "classification", n_eigenvalues=2, channel_axis=axis)
        with pytest.raises(ValueError, match=r"batch 0: .*channel_axis=1 reads outputs \(batch, classes"):
            la.fit([(x, y[:, :-1])])
    for wrong in (0, 2, True, 1.0, "1"):
        with pytest.raises(ValueError, match="channel_axis must be 1"):
            ELLALaplace(model, "classification", channel_axis=wrong)


def test_states_and_copies_know_the_axis():
    la = fit(second(pixels()), Y, full=False, curvature_positions=4)
    expected = la(X_TEST)
    for directions in ("full", "landmarks"):
        other = ELLALaplace(second(pixels()), "classification")
        other.load_state_dict(la.state_dict(directions=directions))
        assert_close(other(X_TEST), expected)
        assert other.curvature_positions == 4
    assert_close(copy.deepcopy(la)(X_TEST), expected)
    assert_close(copy.copy(la)(X_TEST), expected)
    wrong = ELLALaplace(second(pixels()), "classification", channel_axis=-1)
    with pytest.raises(
        ValueError, match="outputs with channel_axis=1, and this estimator has channel_axis=-1"
    ):
        wrong.load_state_dict(la.state_dict())
    la.fit([(X[:, :, :1, :C], torch.zeros(N, 1, C, dtype=torch.long))], override=False)
    assert la.n_data == 2 * N


class Mapped(dict):
    """A mapping with more than the outputs."""


WAYS = {
    "logits": lambda f: SimpleNamespace(logits=f, loss=None),
    "out": lambda f: Mapped(aux=f + 1, out=f),
    "only": lambda f: {"anything": f},
    "tuple": lambda f: (f, [f + 1]),
    "with_loss": lambda f: (f.sum(), f, f + 1),
}


@pytest.mark.parametrize("way", WAYS)
def test_outputs_inside_objects_mappings_and_tuples(way):
    plain = fit(second(pixels()), Y, full=False)
    la = fit(Applied(lambda net, x: WAYS[way](net(x)), second(pixels())), Y, full=False)
    assert_close(la.H, plain.H)
    assert_close(la(X_TEST), plain(X_TEST))


def test_outputs_that_cannot_be_read_are_refused():
    for wrong in (lambda f: {"a": f, "b": f}, lambda f: [], lambda f: "text", lambda f: f.sum()):
        with pytest.raises(ValueError, match="must return a tensor of shape"):
            fit(Applied(lambda net, x, wrong=wrong: wrong(net(x)), second(pixels())), Y)


@pytest.mark.parametrize("likelihood", ["bernoulli", "regression"])
def test_outputs_without_channels(likelihood):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x, new = torch.randn(N, 2, dtype=F64), torch.randn(B, 2, dtype=F64)
    y = (x[:, 0] > 0).double()
    bare, usual = Applied(lambda net, x: net(x).squeeze(-1), net), net
    la, expected = (
        fit(m, y, likelihood, [(x, t)], full=False, subsample_size=5)
        for m, t in ((bare, y), (usual, y[:, None]))
    )
    assert_close(la.H, expected.H)
    assert_close(la.loss, expected.loss)
    found, rows = la(new), expected(new)
    if likelihood == "regression":
        assert_close(found[1], rows[1].flatten())
        found, rows = found[0], rows[0]
    assert found.shape == (B,)
    assert_close(found, rows[:, 0])
    assert la.functional_samples(new, n_samples=2).shape == (2, B)
    assert la(new[:1], diagonal_output=True)[0].shape in ((), (1,))


def test_the_last_layer_is_found_with_channels_second():
    net = nn.Sequential(nn.Conv2d(2, 7, 3, padding=1), nn.Tanh(), nn.Conv2d(7, C, 1)).double()
    la = fit(net, Y, full=False, variance="last_layer")
    z = net[:2](X_TEST)
    variance = T * (1 + z.square().sum(1))
    logits = net(X_TEST) / (1 + torch.pi / 8 * variance[:, None]).sqrt()
    assert_close(la(X_TEST), logits.softmax(1).detach())


# ---------------------------------------------------------------------- some of the positions


def picked(la, n, weights=None):
    """G of positions that are drawn as documented: those of the smallest keys, among those that count."""
    phi, f = la.features(X)
    w = torch.ones(N, L, dtype=F64) if weights is None else weights
    keys = uniforms(la.seed, POSITION, torch.arange(N), L).masked_fill(w == 0, 2)
    G = 0
    for i in range(N):
        chosen = keys[i].argsort()[:n]
        counted = int((w[i] > 0).sum())
        for j in chosen.tolist():
            row = slice(i * L + j, i * L + j + 1)
            share = w[i, j] * counted / min(n, counted) if counted else 0
            G = G + share * oracle.curvature(phi[row], f[row], "classification")
    return G


@pytest.mark.parametrize("size", [None, 2000])
@pytest.mark.parametrize("masked", [False, True])
def test_sampled_positions_stand_for_all(size, masked):
    y = Y.masked_fill(torch.rand(N, H, W, generator=generator(4)) < 0.5, -100) if masked else Y
    weights = (y != -100).double().flatten(1)
    for axis, model in ((1, second(pixels())), (-1, pixels())):
        la = fit(model, y, channel_axis=axis, curvature_positions=4, curvature_size=size)
        assert_close(la.H, picked(la, 4, weights))
        assert not la._posterior.fit.exact
    full = fit(pixels(), y, curvature_positions=L, curvature_size=size)
    assert_close(full.H, fit(pixels(), y).H)


def test_every_position_is_drawn_as_often():
    """The mean of the weights over seeds is the weight of each position, so that G has no bias."""
    weights = torch.tensor([[1.0, 0, 2, 1, 1, 3, 0], [1, 1, 1, 1, 1, 1, 1.0]], dtype=F64)
    part, total, n = Part("", torch.arange(2), None, weights=weights), torch.zeros(2, 7, dtype=F64), 4000
    for seed in range(n):
        drawn, found = drawn_positions(part, 7, 3, seed)
        total.scatter_add_(1, drawn, found)
    assert_close(total / n, weights, rtol=0, atol=0.25)
    assert_close((total / n).mean(), weights.mean(), rtol=0.02)


@pytest.mark.filterwarnings("ignore:curvature='mc' estimates G")
def test_sampled_labels_at_sampled_positions():
    la = fit(second(pixels()), Y, curvature_positions=4, curvature="mc", curvature_samples=2000)
    assert_close(la.H, picked(la, 4), rtol=0.1, atol=0.05)


def test_inputs_with_positions_may_be_mappings():
    model = Applied(lambda net, batch: net(batch["x"]), second(pixels()))
    data = [{"x": x, "labels": y} for x, y in zip(X.split(3), Y.split(3))]
    la = fit(model, Y, data=data, dict_key_x="x", curvature_positions=4)
    assert_close(la.H, fit(second(pixels()), Y, curvature_positions=4).H)


def test_predictions_in_parts_are_predictions():
    la = fit(second(pixels()), Y, full=False)
    tight = fit(second(pixels()), Y, full=False, memory_budget=30_000)
    for link in ("probit", "mc"):
        assert_close(tight(X_TEST, link_approx=link), la(X_TEST, link_approx=link))
    assert_close(tight.uncertainty(X_TEST).epistemic, la.uncertainty(X_TEST).epistemic)


def test_landmarks_are_drawn_from_millions_of_pairs():
    sample = BottomK(5)
    sample.offer(torch.arange(3), torch.arange(3), None, lambda i: (X[i : i + 1], 3_000_000))
    landmarks = draw_outputs(sample, 0)
    assert len(landmarks) == 5
    assert int(landmarks.outputs.max()) < 3_000_000
    again = draw_outputs(sample, 0)
    assert torch.equal(landmarks.outputs, again.outputs)
