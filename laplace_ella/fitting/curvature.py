r"""The curvature :math:`G = \sum_i \phi_i^T \Lambda_i \phi_i`: of a part of the inputs, and summed over all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Input, at_positions, batch_size, collate, in_slices, input_digest
from ..data.hashing import POSITION, SAMPLED_LABEL, digest, uniforms
from ..data.pooling import Dealt
from ..data.stream import Batch
from ..network.checks import check_finite_features
from ..network.engine import Engine
from ..nystrom.basis import NystromBasis
from ..nystrom.jacobian import answer_others, features, pull
from ..parallel.ranks import Ranks
from ..posterior.likelihoods import Likelihood
from ..posterior.targets import weighted


@dataclass(frozen=True)
class Part:
    """Some of the curvature inputs.

    Attributes
    ----------
    name : str
        The name of the part, for messages.
    positions : LongTensor (B,)
    x : input of B rows, or None
        None: nothing to add.
    marked : bool
        Whether a snapshot is taken after it.
    weights : Tensor (B, L) or (B, 1), optional
        Of the predictions.
    """

    name: str
    positions: Tensor
    x: Input | None
    marked: bool = False
    weights: Tensor | None = None

    def digest(self) -> str:
        """Return a hash of the inputs and their weights."""
        inputs = "" if self.x is None else input_digest(self.x)
        return inputs if self.weights is None else digest(inputs, self.weights)


NOTHING = Part("", torch.zeros(0, dtype=torch.int64, device="cpu"), None)
MARK = replace(NOTHING, marked=True)


def _is_marked(step: int, every: int | None) -> bool:
    """Say whether to take a snapshot after a step: after every so many, or after 1, 2, 4, 8 ..."""
    return step % every == 0 if every else step & (step - 1) == 0


def parts_of_sample(sample: Dealt, batch: int, every: int | None) -> Iterator[Part]:
    """Cut a sample into batches, in the order of the keys, so that the first n are a random sample too.

    Snapshots are taken of the same n on every rank: after 1, 2, 4, 8 ... batches, or after every
    so many, and at the end.
    """
    n_steps = -(-sample.size // batch)
    marks = [s * batch for s in range(1, n_steps) if _is_marked(s, every)] + [sample.size]
    start = 0
    for mark in marks:
        segment = [(p, *row) for i, p, row in sample.rows if start <= i < mark]
        for a in range(0, len(segment), batch):
            some = segment[a : a + batch]
            for indices, x in collate([x for _, x, _ in some], batch):
                positions = [some[i][0] for i in indices]
                yield Part(
                    f"training inputs {sorted(positions)[:8]}",
                    torch.tensor(positions, dtype=torch.int64, device="cpu"),
                    x,
                    weights=_joined([some[i][2] for i in indices]),
                )
        yield MARK
        start = mark


def _joined(weights: list[Tensor | None]) -> Tensor | None:
    """Join the weights (1, L), (1, 1) or None of inputs of one shape."""
    if all(w is None for w in weights):
        return None
    found = [torch.ones(1, 1, dtype=torch.float64, device="cpu") if w is None else w for w in weights]
    width = max(w.shape[1] for w in found)
    return torch.cat([w.expand(1, width) for w in found])


def parts_of_stream(batches: Iterable[Batch], every: int | None) -> Iterator[Part]:
    """Take every batch of a stream, with a snapshot after 1, 2, 4, 8 ..., or every so many, and the last."""
    step, marked = 0, False
    for step, batch in enumerate(batches, start=1):
        marked = _is_marked(step, every)
        yield Part(batch.name, batch.positions, batch.x, marked, batch.weights)
    if not marked:
        yield MARK


def cut(parts: Iterable[Part], bounded: Callable[[Input], Iterable[Input]]) -> Iterator[Part]:
    """Cut parts into smaller ones."""
    for part in parts:
        if part.x is None:
            yield part
            continue
        size = batch_size(part.x)
        for i, x in in_slices(part.x, bounded):
            weights = None if part.weights is None else part.weights[i]
            marked = part.marked and i.stop == size
            yield replace(part, x=x, positions=part.positions[i], marked=marked, weights=weights)


# "exact", or estimated from labels that are sampled from the model.
CURVATURES = ("exact", "mc")


def curvature(likelihood: Likelihood, phi: Tensor, f: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Return :math:`\sum_b w_b \phi_b^T \Lambda_b \phi_b` (K, K), float64."""
    root = likelihood.curvature_root(weighted(phi.double(), weights), f.double())
    return root.T @ root


def drawn_positions(part: Part, n_positions: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw n of the L positions of each input, uniformly among those that count.

    Returns
    -------
    positions, weights : LongTensor (B, n), Tensor (B, n)
        The weights are those of the positions times the number of positions that count, over how many of these were drawn: a sum over
        the positions drawn is an unbiased estimate of the sum over all.
    """
    size = len(part.positions)
    ones = torch.ones(size, n_positions, dtype=torch.float64, device="cpu")
    weights = ones if part.weights is None else part.weights.to(ones).expand(size, n_positions)
    counted = weights > 0
    keys = (
        uniforms(seed, POSITION, part.positions, n_positions) + ~counted
    )  # those that do not count come last
    drawn = keys.topk(n, largest=False).indices
    n_counted = counted.sum(1, keepdim=True)
    share = n_counted / n_counted.clamp(1, n)
    return drawn, weights.gather(1, drawn) * share


@dataclass(frozen=True)
class Curvature:
    r"""Computes the curvature (K, K) of parts of the data, in float64.

    Attributes
    ----------
    engine : Engine
    likelihood : Likelihood
    basis : NystromBasis
        If ranks share its directions, all of them have to call, with ``part.x`` None once they have no inputs left.
    labels : int
        How many labels are sampled for each input; 0 for the exact curvature.
    seed : int
        Seeds the draws of those labels, and of positions.
    positions : int or None
        At how many of its positions each input is looked at, if it has more; None: at all.
    """

    engine: Engine
    likelihood: Likelihood
    basis: NystromBasis
    labels: int = 0
    seed: int = 0
    positions: int | None = None

    def __call__(self, part: Part) -> Tensor:
        """Return the curvature of a part, or an estimate of it.

        Raises
        ------
        ValueError
            If features are not finite.
        """
        rank, device = self.basis.rank, self.engine.device
        if part.x is None:
            if self.basis.sharded:
                answer_others(self.engine, self.basis, self.labels)
            return torch.zeros(rank, rank, dtype=torch.float64, device=device)
        part = self._at_some_positions(part, part.x)
        if self.labels:
            return self._sampled(part)
        assert part.x is not None
        phi, f = features(self.engine, self.basis, part.x)
        check_finite_features(phi, f, part.name)
        return curvature(self.likelihood, phi, f, part.weights)

    def _at_some_positions(self, part: Part, x: Input) -> Part:
        """Draw positions of each input, and give them the weights of all; a part with no more positions stays as it is."""
        if self.positions is None:
            return part
        n_positions = math.prod(self.engine.axes(x).positions)
        if n_positions <= self.positions:
            return part
        drawn, weights = drawn_positions(part, n_positions, self.positions, self.seed)
        picked = at_positions(self.engine.to_model(x), drawn.to(self.engine.device))
        return replace(part, x=picked, weights=weights)

    def _sampled(self, part: Part) -> Tensor:
        r"""Estimate the curvature from labels drawn from the model's own predictions.

        The gradients of the loss at sampled labels have the curvature as the mean of their
        outer products. Cost: about 2 + 3 forward passes for each input and label, whatever K is.
        """
        assert part.x is not None
        f = self.engine.forward(part.x)
        flat_f, n = f.flatten(0, -2), self.labels
        draws = uniforms(self.seed, SAMPLED_LABEL, part.positions, f.shape[1:].numel() * n)
        u = draws.to(f.device).reshape(len(flat_f), n, f.shape[-1])
        gradients = weighted(self.likelihood.sampled_gradients(flat_f.double(), u), part.weights)
        # (B, n, L C): positions are independent, and their gradients add up.
        cotangents = gradients.reshape(len(f), -1, n, f.shape[-1]).transpose(1, 2)
        pulled = pull(self.engine, self.basis, part.x, cotangents.flatten(2).to(f.dtype))
        check_finite_features(pulled, flat_f, part.name)
        flat_pulled = pulled.double().flatten(0, 1)
        return flat_pulled.T @ flat_pulled / n


class RunningSum:
    """A sum of curvatures (K, K), float64, with snapshots of it.

    Attributes
    ----------
    total : Tensor (K, K)
    seen : int
        How many inputs are in it.
    steps : int
        How many parts.
    marks : list of (n, Tensor (K, K))
        Snapshots.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self.total = torch.zeros(rank, rank, dtype=torch.float64, device=device)
        self.seen = self.steps = 0
        self.marks: list[tuple[int, Tensor]] = []

    def add(self, part: Part, curvature: Tensor) -> None:
        """Add the curvature (K, K) of a part."""
        n = 0 if part.x is None else batch_size(part.x)
        # At once: an interruption comes before or after.
        self.total, self.seen, self.steps = self.total + curvature, self.seen + n, self.steps + 1
        if part.marked:
            self.marks.append((self.seen, self.total))

    def snapshots(self, n_data: int, ranks: Ranks, unfinished: bool = False) -> list[tuple[int, Tensor]]:
        """Return (n, N / n times the sum over n inputs of all ranks), with n ascending.

        ``unfinished``: the last inputs have no snapshot yet.
        """
        if unfinished and (not self.marks or self.marks[-1][0] < self.seen):
            self.marks.append((self.seen, self.total))
        n_marks = ranks.greatest(len(self.marks), "the snapshots of G")
        # A rank that ran out of inputs before stays at its last.
        last = self.marks[-1] if self.marks else (0, self.total)
        marks = [*self.marks, *[last] * (n_marks - len(self.marks))]
        counts = ranks.total(torch.tensor([n for n, _ in marks], dtype=torch.int64, device="cpu")).tolist()
        # One after the other: K x K numbers each, and there may be hundreds.
        totals = (ranks.total(t) for _, t in marks)
        return [(n, t * (n_data / n)) for n, t in zip(counts, totals) if n]

    def state(self) -> dict[str, Any]:
        """Return tensors and plain types, for :meth:`restore`."""
        return {"total": self.total, "seen": self.seen, "steps": self.steps, "marks": self.marks}

    def restore(self, state: dict[str, Any]) -> None:
        """Become what a sum was."""
        device = self.total.device
        self.total, self.seen, self.steps = state["total"].to(device), state["seen"], state["steps"]
        self.marks = [(n, t.to(device)) for n, t in state["marks"]]
