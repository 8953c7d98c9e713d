r"""What a search over hyperparameters found: all scores, the best setting, and simpler methods beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..posterior.setting import PER_CLASS, SETTING_NAMES, Setting
from .baselines import Baseline
from .comparison import HeldOutScore
from .plots import draw


@dataclass(frozen=True)
class TuningResult:
    """The result of :meth:`laplace_ella.ELLALaplace.optimize_hyperparameters`.

    Attributes
    ----------
    best : Setting
        The setting that was chosen: the one with the smallest loss, or the present one where none is better.
    score : float
        Its loss on the validation data; by default the mean NLL of an input (or position).
    searched : tuple of str
        The parameters that were searched.
    table : tuple of (Setting, float)
        Every setting tried, with its loss, in this order; infinity where it failed.
    baselines : dict of Baseline or None
        Simpler methods on the same data, each tuned on them; None where not available.
    n_inputs : int
        Size of the validation data.
    loss : str
        Name of the loss.
    applied : bool
        Whether the estimator now has the best setting.
    notes : tuple of str
        What to know before using the setting.
    held_out : dict of HeldOutScore
        What each method reaches by cross-validation, on data that it was not tuned on, "ELLA" among them; empty where there
        are fewer than 50 inputs.
    chosen : str
        The method that ``best`` is of; with ``"auto"``, one of ``baselines``, which then has all methods.
    reference : str
        The method with which ``held_out`` and the summary compare others; with ``"auto"``, the one of the smallest loss.
    reason : str
        With ``"auto"``, why this method was chosen.
    variance : str
        Where the variance of the chosen method comes from, as :attr:`laplace_ella.ELLALaplace.variance` has it.
    """

    best: Setting
    score: float
    searched: tuple[str, ...]
    table: tuple[tuple[Setting, float], ...] = field(repr=False)
    baselines: dict[str, Baseline | None]
    n_inputs: int
    loss: str
    applied: bool
    notes: tuple[str, ...]
    held_out: dict[str, HeldOutScore] = field(default_factory=dict, repr=False)
    chosen: str = "ELLA"
    reference: str = "ELLA"
    reason: str = ""
    variance: str = "ella"

    def summary(self) -> str:
        """Return the comparison as tables in plain text: scores, and metrics of predictions on data held out."""
        data = f"{self.n_inputs} validation inputs"
        if self.held_out:
            data += ", by cross-validation: each fifth is predicted with what was tuned on the others"
        per_class = [k for k in PER_CLASS if getattr(self.best, k) is None]
        others = [k for k in SETTING_NAMES if k not in (*self.searched, *per_class)]
        held = ", ".join(f"{k} = {shown(getattr(self.best, k))}" for k in others)
        lines = [
            f"{self.loss} on {data} ({len(self.table)} settings)",
            self._columns("", ("held out", f"minus {self.reference}"), "in sample", "tuned"),
        ]
        if self.chosen not in self.baselines:
            found = ", ".join(f"{k} = {shown(getattr(self.best, k))}" for k in self.searched)
            lines.append(self._line(self.chosen, self.score, found))
        for name, baseline in self.baselines.items():
            if baseline is None:
                lines.append(self._columns(name, ("", "not available"), "", "not available"))
                continue
            parameters = ", ".join(f"{k} = {shown(v)}" for k, v in baseline.parameters.items())
            lines.append(self._line(name, baseline.score, parameters))
        reason = [f"Chosen: {self.chosen}. {self.reason}"] if self.reason else []
        return "\n".join([*lines, f"held fixed: {held}", *self._metrics(), *reason, *self.notes])

    def _line(self, name: str, score: float, parameters: str) -> str:
        found = self.held_out.get(name)
        columns = ("", "")
        if found is not None:
            difference = f"{found.difference:+.4f} +- {found.standard_error:.4f}"
            columns = f"{found.score:.4f}", difference if name != self.reference else ""
        return self._columns(name, columns, f"{score:.4f}", parameters)

    def _columns(self, name: str, held_out: tuple[str, str], score: str, parameters: str) -> str:
        own = f"{held_out[0]:>9}{held_out[1]:>{self._width + 8}}" if self.held_out else ""
        return f"{name:{self._width}}{own}{score:>11}  {parameters}".rstrip()

    @property
    def _width(self) -> int:
        return max(22, *(len(name) + 2 for name in self.baselines))

    def _metrics(self) -> list[str]:
        """Return a table of metrics, a line for each method, where there are any."""
        names = next((found.metrics for found in self.held_out.values()), {})
        if not names:
            return []
        rows = {
            k: "".join(f"{v:>14.4f}" for v in found.metrics.values()) for k, found in self.held_out.items()
        }
        header = f"{'held out':{self._width}}" + "".join(f"{name:>14}" for name in names)
        return [header, *(f"{name:{self._width}}{row}" for name, row in rows.items())]

    def plot(self) -> Any:
        """Draw the score against each parameter searched, the methods with their standard errors, and how reliable they are.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        ImportError
            Without matplotlib, which the extra ``plot`` installs.
        """
        return draw(self)


def shown(value: Any) -> str:
    """Return a value of a parameter in a few characters."""
    if isinstance(value, Sequence):
        return f"{min(value):.3g} to {max(value):.3g}"
    return "as it is" if value is None else f"{value:.4g}"
