r"""Methods compared on validation data that they were not tuned on, by cross-validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .methods import FEWEST, Tuned
from .metrics import metrics, reliability

# Fewer validation inputs leave the optimum to chance (docs/tuning.md).
ENOUGH_INPUTS = 200
# Methods whose losses differ by less than this share of them are as good, however small the standard error.
EQUAL = 1e-4


@dataclass(frozen=True)
class HeldOutScore:
    """What a method reaches on validation data that it was not tuned on.

    Each fifth of the data is predicted with what was tuned on the others.

    Attributes
    ----------
    score : float
        The loss; by default the mean NLL of an input (or position).
    difference : float
        ``score`` minus that of ELLA; with ``"auto"``, minus the smallest: positive if that is better.
    standard_error : float
        The standard error of the difference, paired input by input; fold by fold with a loss of the user's.
    metrics : dict of float
        Of probabilities the NLL, the Brier score, and two calibration errors, ECE with 15 bins of equal width and
        adaptive ECE with bins of equal size; for regression NLL, RMSE, and the coverage of central intervals.
    reliability : tuple of (float, float, float)
        Points of a reliability diagram: predicted, observed, share of the data.
    """

    score: float
    difference: float
    standard_error: float
    metrics: dict[str, float]
    reliability: tuple[tuple[float, float, float], ...]


def judged(methods: Mapping[str, Tuned], reference: str) -> dict[str, HeldOutScore]:
    """Return what methods reach on data held out, beside one of them; nothing where there are too few data."""
    of_reference = methods[reference].held_out
    found = {}
    for name, method in methods.items():
        own = method.held_out
        if own is not None and of_reference is not None:
            difference, error = own.minus(of_reference)
            found[name] = HeldOutScore(own.score, difference, error, metrics(own.rows), reliability(own.rows))
    return found


def few_inputs(n_inputs: int) -> tuple[str, ...]:
    """Say that validation data are few, if they are."""
    if n_inputs >= ENOUGH_INPUTS:
        return ()
    few = f"with fewer than {ENOUGH_INPUTS} the tuned values are to a large part chance"
    return (f"Only {n_inputs} validation inputs: {few}. Use more.",)


def remarks(
    held_out: Mapping[str, HeldOutScore], n_inputs: int, equals_map: bool, of_values: Sequence[str]
) -> tuple[str, ...]:
    """Say what a user should know before relying on the best setting of ELLA."""
    notes = [*filter(None, of_values), *few_inputs(n_inputs)]
    if n_inputs < FEWEST:
        notes.append(
            f"Whether simpler methods are as good is not said, as that takes {FEWEST} validation inputs or more: scores on "
            "the data that methods were tuned on favour those with the most numbers."
        )
    if equals_map:
        notes.append(
            "The predictions are those of MAP to 3 digits: nothing is gained over the network itself on these data."
        )
    return (*notes, *_verdicts(held_out))


def _verdicts(held_out: Mapping[str, HeldOutScore]) -> list[str]:
    better, as_good = [], []
    for name, found in held_out.items():
        if name == "ELLA":
            continue
        rounding = EQUAL * abs(found.score)
        if found.difference < -2 * found.standard_error - rounding:
            better.append(f"{name} (by {-found.difference:.4f} +- {found.standard_error:.4f})")
        elif found.difference <= found.standard_error + rounding:
            as_good.append(name)
    notes = []
    if better:
        notes.append(
            f"Simpler methods are better on data held out: {', '.join(better)}. Use one of them, or search more parameters."
        )
    if as_good:
        notes.append(
            f"Simpler methods are as good within the standard error on data held out: {', '.join(as_good)}. If "
            "calibration is all you need, use one of them."
        )
    return notes
