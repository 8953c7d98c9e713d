"""Ways to choose landmarks: at random, by the gradients of a pool of candidates, and by clusters of last-layer features.

Each is a function of the candidates, and what it returns goes to ``fit(..., landmarks=)`` as a pair of inputs and outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import one_hot

from benchmarks.studies.common.baselines import outputs

Pair = tuple[Tensor, Tensor]
BLOCK = 400  # gradients held at once, twice


@dataclass(frozen=True)
class Candidates:
    """Training inputs in a random order, with a random output of each; the gradients of the first ``pool`` may be used."""

    model: nn.Module
    x: Tensor
    y: Tensor
    outputs: Tensor
    pool: int

    @classmethod
    def drawn(cls, model: nn.Module, data: Pair, n_outputs: int, pool: int, seed: int) -> Candidates:
        x, y = data
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(y), generator=generator)
        return cls(model, x[order], y[order], torch.randint(n_outputs, y.shape, generator=generator), pool)

    @cached_property
    def kernel(self) -> Tensor:
        """Gram matrix (pool, pool) of the pool's gradients."""
        return kernel(self.model, self.x[: self.pool], self.outputs[: self.pool])

    @cached_property
    def hidden(self) -> Tensor:
        """What enters the last layer (N, D), of all candidates."""
        return outputs(self.model, self.x).z

    def chosen(self, indices: Tensor) -> Pair:
        return self.x[indices], self.outputs[indices]


def rows(model: nn.Module, x: Tensor, of: Tensor) -> Tensor:
    """Return the gradients (B, P) of one output of each input."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def output(w: dict[str, Tensor], row: Tensor, unit: Tensor) -> Tensor:
        return functional_call(model, w, (row[None],))[0] @ unit

    with torch.no_grad():
        f = model(x)
    units = one_hot(of, f.shape[1]).to(f)
    found = vmap(grad(output), (None, 0, 0))(weights, x, units)
    return torch.cat([part.flatten(1) for part in found.values()], 1)


def kernel(model: nn.Module, x: Tensor, of: Tensor, block: int = BLOCK) -> Tensor:
    """Return the Gram matrix of gradients, float64: two blocks of rows are held, and made again for every other."""
    found = torch.empty(len(x), len(x), dtype=torch.float64)
    places = torch.arange(len(x)).split(block)
    for i, a in enumerate(places):
        left = rows(model, x[a], of[a])
        for b in places[: i + 1]:
            right = left if b is a else rows(model, x[b], of[b])
            found[a[:, None], b] = (left @ right.T).double()
            found[b[:, None], a] = found[a[:, None], b].T
    return found


# ------------------------------------------------------------- schemes: M indices of candidates

Scheme = Callable[[Candidates, int, torch.Generator], Tensor]


def uniform(candidates: Candidates, m: int, generator: torch.Generator) -> Tensor:
    """Return the first, as the order is random."""
    return torch.arange(m)


def balanced(candidates: Candidates, m: int, generator: torch.Generator) -> Tensor:
    """Return the first of every class, then the second of every class, and so on."""
    place = one_hot(candidates.y).cumsum(0).gather(1, candidates.y[:, None])[:, 0]
    return place.argsort(stable=True)[:m]


def pivoted(candidates: Candidates, m: int, generator: torch.Generator) -> Tensor:
    """Return the pivots of a Cholesky factorisation: of the largest gradients outside the span of those chosen."""
    return pivots(candidates.kernel, m, lambda left: int(left.argmax()))


def randomly_pivoted(candidates: Candidates, m: int, generator: torch.Generator) -> Tensor:
    """Return pivots drawn in proportion to squared norms outside the span of those chosen.

    Source: Chen, Epperly, Tropp, Webber (2024), randomly pivoted Cholesky.
    """
    return pivots(candidates.kernel, m, lambda left: int(torch.multinomial(left, 1, generator=generator)))


def pivots(gram: Tensor, m: int, choose: Callable[[Tensor], int]) -> Tensor:
    """Return M pivots of a partial Cholesky factorisation; fewer, if the rank is lower."""
    left, factor, found = gram.diagonal().clone(), gram.new_zeros(m, len(gram)), []
    negligible = 10 * len(gram) * torch.finfo(gram.dtype).eps * float(left.max())
    while len(found) < m and float(left.max()) > negligible:
        i, pivot = len(found), choose(left)
        factor[i] = (gram[pivot] - factor[:i, pivot] @ factor[:i]) / left[pivot].sqrt()
        left = (left - factor[i].square()).clamp_min(0)
        left[pivot] = 0
        found.append(pivot)
    return torch.tensor(found)


def leverage(candidates: Candidates, m: int, generator: torch.Generator) -> Tensor:
    """Draw in proportion to ridge leverage scores of a quarter of M directions, without replacement."""
    return torch.multinomial(leverage_scores(candidates.kernel, m // 4), m, generator=generator)


def leverage_scores(gram: Tensor, rank: int) -> Tensor:
    """Return the diagonal of G (G + l I)^-1, where l is the trace beyond the rank, over the rank.

    Source: Musco and Musco (2017), Recursive sampling for the Nystrom method, definition 2.
    """
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    ridge = values[: len(values) - rank].sum() / rank
    return vectors.square() @ (values / (values + ridge))


def clustered(candidates: Candidates, m: int, generator: torch.Generator) -> Tensor:
    """Return the inputs nearest to the centres of M clusters of last-layer features.

    Source: Zhang, Tsang, Kwok (2008), Improved Nystrom low-rank approximation, with inputs in place of centres.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    hidden = candidates.hidden.float().numpy()
    seed = int(torch.randint(2**31, (), generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer inputs that differ than clusters
        distances = torch.from_numpy(KMeans(m, n_init=1, random_state=seed).fit_transform(hidden))
    found: list[int] = []
    for of_centre in distances.T:
        of_centre[found] = torch.inf  # each input once
        found.append(int(of_centre.argmin()))
    return torch.tensor(found)


SCHEMES: dict[str, Scheme] = {
    "uniform": uniform,
    "balanced": balanced,
    "pivoted Cholesky": pivoted,
    "pivoted Cholesky, random": randomly_pivoted,
    "leverage": leverage,
    "k-means": clustered,
}
