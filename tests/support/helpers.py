"""Data, estimators and references that many tests share; the models are in models.py."""

import torch
from laplace import FullLaplace
from laplace.curvature import GGNInterface
from models import C, D, DictModel, H, RewardModel, mlp
from torch.distributions import Normal
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import laplace_ella
from laplace_ella.fitting.checkpoint import digest_of_state

__all__ = ["C", "D", "DictModel", "H", "RewardModel", "mlp"]

# Distinct primes, so that a swapped axis cannot pass.
N, M, K, N_TEST = 23, 13, 2, 11


def inputs(n=N, seed=1, dtype=torch.float64):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def targets(likelihood, n=N, n_outputs=C, seed=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    if likelihood == "regression":
        return torch.randn(n, n_outputs, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(n_outputs, (n,), generator=generator)


def loader(x, y, batch_size=7, **kwargs):
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, **kwargs)


def train_loader(likelihood="classification", dtype=torch.float64, **kwargs):
    return loader(inputs(dtype=dtype), targets(likelihood, dtype=dtype), **kwargs)


def val_loader(likelihood="classification", dtype=torch.float64):
    x = inputs(17, seed=3, dtype=dtype)
    return loader(x, targets(likelihood, 17, seed=4, dtype=dtype), batch_size=5)


def build(likelihood="classification", model=None, **kwargs):
    kwargs = {"subsample_size": M, "n_eigenvalues": 5, "temperature": 1.0, **kwargs}
    model = mlp() if model is None else model
    return laplace_ella.Laplace(model, likelihood, "all", "ella", **kwargs)


def fitted(likelihood="classification", model=None, data=None, **kwargs):
    la = build(likelihood, model, **kwargs)
    la.fit(train_loader(likelihood) if data is None else data)
    return la


def edited(state, **entries):
    """A saved state with other entries, as if it had been saved with them."""
    state = {**state, **entries}
    return {**state, "digest": digest_of_state(state)}


def fit_problem(problem, arguments=None, batch=5, **options):
    """Fit a problem of conftest with its landmarks and 5 directions, by default to all inputs."""
    options = problem.options(**{"n_eigenvalues": 5, "curvature_size": None, **options})
    la = laplace_ella.ELLALaplace(problem.model, **options)
    la.fit(problem.loader(batch), **{"landmarks": problem.landmarks, **(arguments or {})})
    return la


def full_laplace(problem, **options):
    """Fit laplace-torch's exact estimator to a problem of conftest."""
    full = FullLaplace(problem.model, backend=GGNInterface, **problem.options(**options))
    full.fit(loader(problem.x, problem.y, 5))
    return full


def directions(la):
    """V (P, K)."""
    return torch.cat([v.flatten(1) for v in la.basis.directions.values()], 1).T


def reward_batches(n=N, dtype=torch.float64):
    x = torch.randn(n, 2, D, generator=torch.Generator().manual_seed(5), dtype=dtype)
    return loader(x, targets("classification", n, 2))


def dict_batches(key_x="input_ids", key_y="labels", n=N, batch_size=7):
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(11, (n, 5), generator=generator)
    mask = (torch.arange(5) < torch.randint(2, 6, (n, 1), generator=generator)).long()
    parts = zip(*(t.split(batch_size) for t in (tokens, mask, targets("classification", n))))
    return [{key_x: a, "attention_mask": b, key_y: c} for a, b, c in parts]


def reference_features(model, basis, x):
    """J(x) V from one plain backward pass per row and output, in evaluation mode."""
    flags = [(m, m.training) for m in model.modules()]
    model.eval()
    names, weights = zip(*((k, p) for k, p in model.named_parameters() if p.requires_grad))
    with torch.enable_grad():
        out = model(x)
        f = getattr(out, "logits", out)
        phi = f.new_zeros(f.numel(), basis.rank)
        for row, value in zip(phi, f.flatten()):
            grads = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
            for name, g in zip(names, grads):
                if g is not None:
                    row += torch.tensordot(basis.directions[name], g, g.ndim)
    for m, training in flags:
        m.training = training
    return phi.reshape(*f.shape, -1).detach(), f.detach()


def moments(la, x, **options):
    """Mean and covariance of the linearised outputs, of every likelihood: what laplace-torch's own code calls."""
    return la._glm_predictive_distribution(x, **options)


def as_tuple(prediction):
    return prediction if isinstance(prediction, tuple) else (prediction,)


def assert_same(left, right):
    """Require bitwise equal predictions."""
    for a, b in zip(as_tuple(left), as_tuple(right), strict=True):
        assert torch.equal(a, b)


class Snapshot:
    """What must be as before: a fitted estimator's predictions, state and settings."""

    def __init__(self, la, x, **options):
        self.la, self.x, self.options = la, x, options
        self.prediction = la(x, **options)
        self.values = self._values()

    def _values(self):
        la = self.la
        tensors = (
            la.H,
            la.loss,
            la.mean,
            la.prior_precision,
            la.prior_mean,
            la.sigma_noise,
            la.basis.eigenvalues,
        )
        counts = (la.n_data, la.n_outputs, la.subsample_size, la.n_eigenvalues, la.seed)
        set_to = (la.temperature, la.temperature_fixed, la.logit_scale, la.residual, la.residual_scale)
        return [torch.as_tensor(t).clone() for t in tensors], (*counts, *set_to)

    def check(self):
        tensors, plain = self._values()
        assert plain == self.values[1]
        for a, b in zip(tensors, self.values[0], strict=True):
            assert torch.equal(a, b)
        assert_same(self.la(self.x, **self.options), self.prediction)


def nll_of_calls(la, val, **options):
    """Mean NLL of an input."""
    total, count = 0.0, 0
    for x, y in val:
        if la.likelihood == "classification":
            total += F.nll_loss(la(x, **options).log(), y, reduction="sum").item()
        else:
            mean, cov = la(x)
            std = (cov.diagonal(dim1=1, dim2=2) + la.sigma_noise**2).sqrt()
            total -= Normal(mean, std).log_prob(y).sum().item()
        count += len(y)
    return total / count
