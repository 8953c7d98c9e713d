r"""Directions spread over ranks: every rank works on the inputs of all ranks with its own directions.

Every rank calls these functions as often as the others, with inputs of its own or none, and gets
the answer for its inputs with all K directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor

from .ranks import Ranks, dealt_back

Item = TypeVar("Item")


def for_everyone(
    ranks: Ranks, question: Any, answer: Callable[[Any], Tensor], n_directions: int, what: str
) -> Tensor | None:
    """Answer all ranks' questions with this rank's directions, and join the ranks' answers to its own question.

    Parameters
    ----------
    question : tensors and plain types, or None
        With None, this rank has no inputs, and gets None.
    answer : callable
        Question -> Tensor (..., K_rank).
    n_directions : int
        K.

    Returns
    -------
    Tensor (..., K), on the CPU
    """
    questions = ranks.gathered(question, what)
    with ranks.together(what):
        answers = [None if q is None else answer(q).detach() for q in questions]
    parts = ranks.exchanged(answers, what)
    if question is None:
        return None
    if any(part.shape[-1] != len(range(r, n_directions, ranks.size)) for r, part in enumerate(parts)):
        raise RuntimeError(
            f"Ranks that share the directions must use as many of them; this one uses {n_directions}, and another one "
            "does not. Assign n_directions on all of them."
        )
    return dealt_back(parts, n_directions)


def work_through(
    items: Iterable[Item], act: Callable[[Item | None], None], ranks: Ranks, sharing: Ranks, what: str
) -> None:
    """Let every rank act on items of its own.

    Ranks that share directions go step by step together, and act on None once they have run out; others
    meet at the end.

    Parameters
    ----------
    ranks, sharing : Ranks
        The ranks that work together, and those over which the directions of the basis are spread.
    """
    if sharing.size == 1:
        with ranks.together(what):
            for item in items:
                act(item)
        return
    iterator = iter(items)
    while True:
        with sharing.together("reading data"):
            mine = next(iterator, None)
        if not sharing.any(mine is not None, "reading data"):
            return
        with sharing.together(what):
            act(mine)
