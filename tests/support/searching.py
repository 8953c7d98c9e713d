"""Over-confident networks, labels that say so, and searches by loops over calls."""

import torch
from conftest import C, make_problem
from helpers import fit_problem
from torch import Tensor
from torch.nn import functional as F

F64 = torch.float64
N_VAL = 211  # above the 200 under which a search warns


def over_confident(likelihood):
    problem = make_problem("mlp", likelihood)
    with torch.no_grad():
        problem.model[-1].weight.mul_(4)
    return problem


def validation(problem, n=N_VAL, size=53):
    """Labels from the model's own logits at a temperature, so that confidence matters; the same in all versions of torch."""
    generator = torch.Generator().manual_seed(17)
    x = 2 * torch.randn(n, 2, generator=generator, dtype=F64)
    with torch.no_grad():
        f = problem.model(x)
    if problem.likelihood == "classification":
        y = drawn((f / 2.5).softmax(-1), generator)
    else:
        y = f + 1.1 * torch.randn(n, C, generator=generator, dtype=F64)
    return list(zip(x.split(size), y.split(size)))


def drawn(p, generator):
    """A class (B,) of each row of probabilities (B, C): what torch.multinomial draws depends on its version."""
    u = torch.rand(len(p), 1, generator=generator, dtype=F64)
    return (p.cumsum(-1)[:, :-1] < u).sum(-1)


def fit(problem, **options):
    """Fit as fit_problem does, with snapshots, and a free temperature."""
    return fit_problem(problem, {"val_steps": 1}, **{"curvature_size": 2000, "temperature": None, **options})


def whole(val):
    """All batches in one."""
    return tuple(torch.cat(part) for part in zip(*val))


def outputs_and_targets(problem, val):
    x, y = whole(val)
    with torch.no_grad():
        return problem.model(x), y


def brier(p, y):
    return (p - F.one_hot(y, C)).square().sum(-1).mean()


def grid_search(la, val, **options):
    """Search the prior precision over 15 values, and return what was chosen."""
    options = {"log_prior_prec_min": -3, "log_prior_prec_max": 4, "grid_size": 15, **options}
    la.optimize_prior_precision(method="gridsearch", val_loader=val, **options)
    return la.prior_precision.item()


def by_loop(la, score, low=-3.0, high=4.0, size=15):
    """Return the prior precision of the lowest score, each from calls at that value."""
    scores = {}
    for delta in torch.logspace(low, high, size).tolist():
        la.prior_precision = delta
        scores[delta] = score()
    la.prior_precision = 1.0
    assert len(set(scores.values())) > size // 2
    return min(scores, key=scores.__getitem__)


def state(la):
    """What must be as before, as plain values."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, Tensor):
            return value.dtype, value.tolist()
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(la.state_dict())
