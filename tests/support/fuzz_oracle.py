"""A dense oracle: the Jacobian by ``torch.autograd.grad`` row by row on a float64 copy of the model.

Nothing here comes from the package. The rest of the equations are those of ``oracle.py``.
"""

import copy

import torch
from torch import Tensor

F64 = torch.float64


def mapped(function, value):
    """Apply a function to the tensors of nested containers, which are copied."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {k: mapped(function, v) for k, v in value.items()}
    return tuple(mapped(function, v) for v in value) if isinstance(value, tuple) else value


class Dense:
    """A model in float64 and evaluation mode, one input at a time."""

    def __init__(self, model):
        self.model = copy.deepcopy(model).double().eval()
        self.weights = [p for p in self.model.parameters() if p.requires_grad]

    def jacobian(self, x, n):
        """Return J (B L, C, P), f (B L, C), and L of each input."""
        jacobians, outputs = [], []
        for i in range(n):
            row = mapped(lambda t, i=i: t[i : i + 1] if t.ndim and len(t) == n else t, x)
            out = self.model(mapped(lambda t: t.to(F64) if t.is_floating_point() else t, row))
            f = getattr(out, "logits", out)
            f = f.reshape(-1, f.shape[-1])
            jacobians.append(torch.stack([self.gradient(v) for v in f.flatten()]).reshape(*f.shape, -1))
            outputs.append(f.detach())
        return torch.cat(jacobians), torch.cat(outputs), [len(f) for f in outputs]

    def gradient(self, value):
        found = torch.autograd.grad(value, self.weights, retain_graph=True, allow_unused=True)
        return torch.cat(
            [(p * 0 if g is None else g).flatten() for g, p in zip(found, self.weights)]
        ).detach()

    def theta(self):
        return torch.cat([p.detach().flatten() for p in self.weights])

    def prior(self, precision):
        r"""Return the diagonal (P,) of :math:`\Delta`, of one value, one a weight tensor, or one a weight."""
        delta, sizes = torch.as_tensor(precision, dtype=F64).flatten(), [p.numel() for p in self.weights]
        if len(delta) == len(sizes) > 1:
            return delta.repeat_interleave(torch.tensor(sizes))
        return delta.expand(sum(sizes))


def close(name, actual, expected, tolerance, scale=0.0):
    """Compare up to ``tolerance`` times the largest expected value, or ``scale``."""
    a, e = (torch.as_tensor(v, dtype=F64).detach() for v in (actual, expected))
    assert a.shape == e.shape, f"{name}: shape {tuple(a.shape)}, expected {tuple(e.shape)}"
    if e.numel():
        assert bool(a.isfinite().all()), f"{name}: not finite"
        error, largest = float((a - e).abs().max()), max(float(e.abs().max()), scale)
        assert error <= tolerance * largest + 1e-12, (
            f"{name}: off by {error:.3e}, the largest is {largest:.3e}"
        )
