r"""A dense oracle: the Jacobian by ``torch.autograd.grad`` row by row on a float64 copy of the model, the rest by loops.

Nothing here comes from the package. Directions V are those that a fit found, which
:func:`residual_of_directions` says whether they are right: eigenvectors with equal
eigenvalues are unique up to a rotation, and so is nothing that is made of them.
"""

import copy
import math

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


def as_float64(value):
    return mapped(lambda t: t.to(F64) if t.is_floating_point() else t, value)


def row_of(x, i, n):
    return mapped(lambda t: t[i : i + 1] if t.ndim and len(t) == n else t, x)


class Dense:
    """A model in float64 and evaluation mode, one input at a time."""

    def __init__(self, model):
        self.model = copy.deepcopy(model).double().eval()
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.sizes = [p.numel() for p in self.weights]

    def outputs(self, row):
        """Return the outputs (L, C) of one input, with a graph."""
        out = self.model(as_float64(row))
        f = getattr(out, "logits", out)
        return f.reshape(-1, f.shape[-1])

    def jacobian(self, x, n):
        """Return J (B L, C, P), f (B L, C), and L of each input."""
        jacobians, outputs, lengths = [], [], []
        for i in range(n):
            f = self.outputs(row_of(x, i, n))
            rows = [self.gradient(value) for value in f.flatten()]
            jacobians.append(torch.stack(rows).reshape(*f.shape, -1))
            outputs.append(f.detach())
            lengths.append(len(f))
        return torch.cat(jacobians), torch.cat(outputs), lengths

    def gradient(self, value):
        found = torch.autograd.grad(value, self.weights, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, self.weights)]
        return torch.cat([g.flatten() for g in parts]).detach()

    def theta(self):
        return torch.cat([p.detach().flatten() for p in self.weights])

    def prior(self, precision):
        r"""Return the diagonal (P,) of :math:`\Delta`."""
        delta = torch.as_tensor(precision, dtype=F64).flatten()
        if len(delta) == sum(self.sizes):
            return delta
        if len(delta) == 1:
            return delta.expand(sum(self.sizes))
        return torch.cat([d.repeat(n) for d, n in zip(delta, self.sizes)])


def residual_of_directions(rows, V, eigenvalues):
    r"""Return :math:`|R^T R v_k - \lambda_k v_k| / \lambda_1` (K,): zero for eigenvectors, whichever are chosen."""
    return (rows.T @ (rows @ V) - V * eigenvalues).norm(dim=0) / eigenvalues[0]


def output_hessian(f, likelihood):
    if likelihood == "regression":
        return torch.eye(len(f), dtype=F64)
    if likelihood == "bernoulli":
        p = torch.sigmoid(f)
        return torch.diag(p * (1 - p))
    p = torch.softmax(f, 0)
    return torch.diag(p) - torch.outer(p, p)


def curvature(phi, f, likelihood):
    total = torch.zeros(phi.shape[-1], phi.shape[-1], dtype=F64)
    for phi_i, f_i in zip(phi, f):
        total += phi_i.T @ output_hessian(f_i, likelihood) @ phi_i
    return total


def loss(f, y, likelihood):
    """Return the negative log likelihood, summed; y (B L,) or (B L, C)."""
    total = torch.zeros((), dtype=F64)
    for a, b in zip(f, y):
        if likelihood == "regression":
            total += 0.5 * (a - b.to(F64)).square().sum()
        elif likelihood == "bernoulli":
            total += sum(
                torch.logaddexp(torch.zeros_like(t), t) - t * u for t, u in zip(a, b.to(F64).flatten())
            )
        elif b.ndim:
            total -= (a.log_softmax(0) * b.to(F64)).sum()
        else:
            total += torch.logsumexp(a, 0) - a[int(b)]
    return total


def evidence(
    loss_value,
    n_numbers,
    likelihood,
    A,
    projected,
    scatter,
    sigma,
    temperature,
):
    fit = -loss_value / (sigma**2 * temperature)
    if likelihood == "regression":
        fit = fit - n_numbers * math.log(sigma * math.sqrt(2 * math.pi))
    return fit - 0.5 * (torch.linalg.slogdet(A)[1] - torch.linalg.slogdet(projected)[1]) - 0.5 * scatter


def inverse_link(f, likelihood):
    return torch.sigmoid(f) if likelihood == "bernoulli" else torch.softmax(f, -1)


def probit(f, cov, likelihood):
    var = cov.diagonal(dim1=1, dim2=2)
    return inverse_link(f / torch.sqrt(1 + math.pi / 8 * var), likelihood)


def bridge(f, cov, normalize):
    """Match a Dirichlet to N(f, cov); None where a variance is too small for that to mean anything."""
    result = []
    for mean, var in zip(f, cov):
        n, one = len(mean), torch.ones(len(mean), dtype=F64)
        total = one @ var @ one
        if float(total) <= 1e-3 * float(var.trace()):
            return None
        mean = mean - var @ one * (one @ mean) / total
        corrected = var - torch.outer(var @ one, var @ one) / total
        v = corrected.diagonal()
        if float(v.min()) <= 1e-2 * float(var.diagonal().max()):
            return None
        if normalize:
            ratio = v.mean() / math.sqrt(n / 2)
            mean, v = mean / math.sqrt(ratio), v / ratio
        alpha = (1 - 2 / n + mean.exp() / n**2 * (-mean).exp().sum()) / v
        result.append(alpha / alpha.sum())
    return torch.stack(result)


def monte_carlo(f, cov, likelihood, n_samples=4000):
    generator = torch.Generator().manual_seed(0)
    result = []
    for mean, var in zip(f, cov):
        values, Q = torch.linalg.eigh(var)
        noise = torch.randn(n_samples, len(mean), dtype=F64, generator=generator)
        samples = mean + noise @ (Q * values.clamp_min(0).sqrt()).T
        result.append(inverse_link(samples, likelihood).mean(0))
    return torch.stack(result)


def close(name, actual, expected, tolerance, scale=None):
    """Compare up to ``tolerance`` times the largest expected value, or ``scale``."""
    a, e = (torch.as_tensor(v, dtype=F64).detach() for v in (actual, expected))
    assert a.shape == e.shape, f"{name}: shape {tuple(a.shape)}, expected {tuple(e.shape)}"
    if not e.numel():
        return
    assert bool(a.isfinite().all()), f"{name}: not finite"
    largest = max(float(e.abs().max()), scale or 0.0)
    error = float((a - e).abs().max())
    assert error <= tolerance * largest + 1e-12, f"{name}: off by {error:.3e}, the largest is {largest:.3e}"
