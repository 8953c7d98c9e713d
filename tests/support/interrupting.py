"""Fits that are interrupted at a moment of the test's choice, and what must not differ afterwards."""

import os

import pytest
import torch
from helpers import build, inputs, mlp, targets
from torch import nn

SIZE, N_BATCHES, N_DATA = 5, 5, 23  # 5, 5, 5, 5, 3


class Killed(BaseException):
    """Ends a fit where nothing may catch it."""


def batches(likelihood="classification", seed=1, n=N_DATA, size=SIZE):
    x, y = inputs(n, seed=seed), targets(likelihood, n, seed=seed + 1)
    return list(zip(x.split(size), y.split(size)))


class Ending:
    """A loader that raises instead of yielding one of its batches, counted over all passes."""

    def __init__(self, data, at=None, error=OSError):
        self.data, self.at, self.error, self.yielded = data, at, error, 0

    def __iter__(self):
        for batch in self.data:
            if self.yielded == self.at:
                raise self.error("interrupted")
            self.yielded += 1
            yield batch


class Watched(nn.Module):
    """Raises at one of its calls, and tells plain passes from those that derivatives need."""

    def __init__(self, net=None, at=None, error=Killed):
        super().__init__()
        self.net = mlp() if net is None else net
        self.at, self.error, self.calls = at, error, 0
        self.plain = []  # how many inputs plain passes had, and the first number
        self.derived = []  # how many inputs the others had

    def forward(self, x):
        if self.calls == self.at:
            raise self.error("interrupted")
        self.calls += 1
        weight = next(self.net.parameters())
        tangent = torch.autograd.forward_ad.unpack_dual(weight).tangent
        derived = torch._C._functorch.is_functorch_wrapped_tensor(weight) or tangent is not None
        if isinstance(x, torch.Tensor):
            if derived or torch.is_grad_enabled():
                self.derived.append(len(x))
            else:
                self.plain.append((len(x), float(x.flatten()[0])))
        return self.net(x)


def outcome(la):
    """Return all that a fit finds: tensors, and plain values."""
    tensors = {
        **{name: getattr(la, name) for name in ("H", "loss", "mean", "prior_precision")},
        **{name: getattr(la.basis, name) for name in ("eigenvalues", "spectrum")},
        **{f"directions of {k}": v for k, v in la.basis.directions.items()},
        **{f"snapshot {i}": G for i, (_, G) in enumerate(la.snapshots)},
    }
    counts = (la.n_data, la.n_curvature, la.n_predictions, la.n_outputs)
    plain = [n for n, _ in la.snapshots], counts, la.temperature, la.fit_history_, la.basis.trace
    return tensors, plain


def assert_equal_fits(la, expected, note=""):
    """Require the same bits."""
    tensors, plain = outcome(la)
    expected_tensors, expected_plain = outcome(expected)
    assert plain == expected_plain, note
    assert tensors.keys() == expected_tensors.keys(), note
    for name, t in tensors.items():
        assert torch.equal(t, expected_tensors[name]), f"{name} {note}"


def interrupt(la, data, path, error=Killed, **options):
    """Fit with checkpoints until it is interrupted."""
    with pytest.raises(error, match="interrupted"):
        la.fit(data, checkpoint=path, **{"checkpoint_every": 1, **options})


def go_on(la, data, path, **options):
    """Fit to the end from what was left, of which nothing may stay; return the estimator."""
    la.fit(data, checkpoint=path, **{"checkpoint_every": 1, **options})
    assert os.listdir(path.parent) == []
    return la


def all_files(path, **options):
    """Leave the file of every stage."""
    la = build(model=Watched(), **options)
    la.fit(batches())
    interrupt(build(model=Watched(at=la.model.calls - 1), **options), batches(), path)
    assert {p.name for p in path.parent.iterdir()} == {path.name + s for s in ("", ".basis", ".curvature")}


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def refused(la, data, path, match, **options):
    """Require a ValueError that leaves files and estimator as they are; return what it says."""
    files, before = contents(path.parent), la.H
    assert files
    with pytest.raises(ValueError, match=match) as caught:
        la.fit(data, checkpoint=path, **{"checkpoint_every": 1, **options})
    assert contents(path.parent) == files
    assert la.H is before
    return str(caught.value)
