r"""One state at a time: a call reads the estimator as it was when the call began, and a change appears at once.

An estimator is a few dozen attributes that belong together. Another thread may fit, load, tune or assign while a
prediction runs, so a call works on a *view*, which holds the same objects as the estimator did at one moment, and
an operation that changes several attributes changes a view first, whose changes the estimator then takes over in
one step.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar

from torch import Tensor

from ..nystrom.caching import Kept, keep

Method = TypeVar("Method", bound=Callable[..., Any])

# What a fit leaves behind. These attributes are taken over together or not at all.
FIT = (
    *("_basis", "H", "snapshots", "n_curvature", "loss", "n_data", "n_predictions", "n_outputs", "mean"),
    *("_fingerprint", "_labels_sampled", "_largest_sums", "fit_history_"),
    *("_novelty_reference", "_novelty_setting"),
)
_REPLACED = (
    "Another thread has fitted, loaded or tuned this estimator meanwhile, and what was computed here belongs to the "
    "fit that it had before. The estimator is as the other thread left it. Call again."
)
# Held while attributes are copied or taken over, and never while anything else runs.
SWAP = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child finds no change half made, and a lock that somebody releases
    os.register_at_fork(before=SWAP.acquire, after_in_parent=SWAP.release, after_in_child=SWAP.release)


def of_one_moment(method: Method) -> Method:
    """Let a method read the estimator as it is when the call begins, whatever other threads assign meanwhile."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self._view(), *args, **kwargs)

    return run  # type: ignore[return-value]


class Consistent:
    """Views of an estimator, and changes that appear at once.

    A mixin: :class:`laplace_ella.ELLALaplace` supplies what is declared here.
    """

    model: Any  # torch.nn.Module
    backend: Any
    # What was computed from the attributes, with what it was computed from. Views share it, so that what a
    # prediction computes serves the next one.
    _cache: dict[str, Kept]

    @property
    def _is_view(self) -> bool:
        return "_viewed" in vars(self)

    def _view(self) -> Any:
        """Return the estimator as it is now: itself if it is a view, which no other thread changes."""
        return self if self._is_view else self._copied()

    def _copied(self) -> Any:
        view = object.__new__(type(self))
        with SWAP:
            vars(view).update(vars(self))
        vars(view)["_viewed"] = True
        return view

    @contextmanager
    def _changes(self, replaces_fit: bool = False) -> Iterator[Any]:
        """Yield a view to change. The estimator takes over what has changed in it, unless an error is raised.

        Parameters
        ----------
        replaces_fit : bool
            Whether the fit is a new one, rather than derived from the one there was.

        Raises
        ------
        RuntimeError
            If the fit was derived from one that another thread has replaced meanwhile.
        """
        view = self._copied()
        before = dict(vars(view))
        yield view
        after = vars(view)
        changed = {k: v for k, v in after.items() if k not in before or before[k] is not v}
        changed.pop("_cache", None)
        if not changed.keys().isdisjoint(FIT):
            changed.update({k: after[k] for k in FIT}, _cache={})
        self._take_over(changed, None if replaces_fit else before)

    def _take_over(self, changed: dict[str, Any], before: dict[str, Any] | None) -> None:
        own = vars(self)
        fits = "_basis" in changed
        if self._is_view or not fits:
            with SWAP:
                own.update(changed)
            return
        backend, n_outputs = self.backend, getattr(self.model, "output_size", None)
        with SWAP:
            if before is not None and any(own[k] is not before[k] for k in FIT):
                raise RuntimeError(_REPLACED)
            basis = backend.basis
            try:
                self.model.output_size = changed["n_outputs"]  # as the host does
                backend.basis = changed["_basis"]
                own.update(changed)
            except BaseException:
                backend.basis = basis
                if n_outputs is not None:
                    self.model.output_size = n_outputs
                raise

    def _check_same_basis(self, other: Consistent) -> None:
        if vars(self)["_basis"] is not vars(other)["_basis"]:
            raise RuntimeError(_REPLACED)

    def _cached(
        self, name: str, compute: Callable[[], Any], small: Iterable[Any], large: Iterable[Tensor] = ()
    ) -> Any:
        """Return what was computed before from the same values (small) and tensors (large), or compute it."""
        found = self._cache.get(name)
        if found is None or not found.is_of(small, large):
            made_of = keep(
                None, small, large
            )  # before the work: what changes meanwhile is not what it is made of
            self._cache[name] = found = replace(made_of, value=compute())
        return found.value
