"""A callback for Lightning, which is imported by nothing else here and needed by nothing else."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from itertools import islice
from typing import Any

from torch import nn

from .ella import ELLALaplace
from .network.functional import unwrap
from .posterior.likelihoods import Prediction
from .tuning.result import TuningResult

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callback_class() -> Any:
    """Return the callback class of the package that is in use already, or else of one that is installed."""
    for name in sorted(_PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return import_module(name).Callback
        except ImportError:
            continue
    return object


_Callback: Any = _callback_class()


class ELLACallback(_Callback):
    """Fits a posterior when training has ended, tunes it, predicts with it, and saves it with the checkpoint.

    - At the end of ``trainer.fit`` it is fitted to the trainer's training loader, at the weights there are then, and tuned on
      the validation loader, whether these come from a datamodule or not. In a process group all ranks fit together.
    - ``trainer.predict`` returns what ``la(x)`` returns, in place of the module's own ``predict_step``.
    - ``trainer.save_checkpoint(path)`` after training saves it, as :meth:`laplace_ella.ELLALaplace.state_dict`, with the weights, and
      ``trainer.predict(..., ckpt_path=path)`` loads it. Checkpoints from within training hold none.

    Batches are ``(x, y)``, ``(x, y, weights)`` or mappings, as the loaders have them: hooks that change batches on their way
    to the device are not called in a fit.

    Parameters
    ----------
    likelihood : str
        As in :class:`laplace_ella.ELLALaplace`.
    network : str, optional
        The name of the submodule that returns logits or means, ``"net"`` for ``self.net``. By default the
        LightningModule itself, whose ``forward`` does.
    tune : mapping or None
        Arguments of :meth:`laplace_ella.ELLALaplace.optimize_hyperparameters`, beside the loader. None: nothing is tuned.
    **options
        Further arguments of :class:`laplace_ella.ELLALaplace`.

    Attributes
    ----------
    la : ELLALaplace or None
        The estimator; None before the end of training.
    result : TuningResult or None
        What tuning found.

    Raises
    ------
    ImportError
        If neither lightning nor pytorch_lightning is installed.
    """

    def __init__(
        self,
        likelihood: str = "classification",
        *,
        network: str | None = None,
        tune: Mapping[str, Any] | None = {"search": "auto"},
        **options: Any,
    ) -> None:
        if _Callback is object:
            raise ImportError(
                "ELLACallback is a callback of Lightning, which is not installed: pip install lightning"
            )
        super().__init__()
        self.likelihood, self.network, self.options = likelihood, network, options
        self.tune = None if tune is None else dict(tune)
        self.la: ELLALaplace | None = None
        self.result: TuningResult | None = None

    def fit(
        self, pl_module: nn.Module, train_loader: Iterable[Any], val_loader: Iterable[Any] | None = None
    ) -> None:
        """Fit and tune at the weights that a module has now: what the end of training does by itself.

        Parameters
        ----------
        pl_module : LightningModule
            With other weights than at the end of training, those of the best checkpoint for instance.
        train_loader : iterable
            See :meth:`laplace_ella.ELLALaplace.fit`.
        val_loader : iterable, optional
            See :meth:`laplace_ella.ELLALaplace.optimize_hyperparameters`. Without one nothing is tuned, which a warning says.

        Raises
        ------
        ValueError
            As for these two.
        """
        self.la = self.result = None
        la = self._estimator(pl_module)
        la.fit(train_loader)
        if self.tune is not None and val_loader is not None:
            self.result = la.optimize_hyperparameters(val_loader, **self.tune)
        elif self.tune is not None:
            warnings.warn(
                "There is no validation loader, so that nothing was tuned, and predictions may be the network's own. Give "
                "the trainer one, or pass tune=None to ELLACallback.",
                stacklevel=2,
            )
        self.la = la

    def _estimator(self, pl_module: nn.Module) -> ELLALaplace:
        return ELLALaplace(self._network(pl_module), self.likelihood, **self.options)

    def _network(self, pl_module: nn.Module) -> nn.Module:
        return unwrap(pl_module if self.network is None else pl_module.get_submodule(self.network))

    # ------------------------------------------------------------------ hooks

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Drop a posterior at weights that are about to change."""
        self.la = self.result = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Fit and tune."""
        train = _single(trainer.train_dataloader, trainer.num_training_batches, "training")
        val = None
        if self.tune is not None and trainer.val_dataloaders is not None:
            val = _single(trainer.val_dataloaders, trainer.num_val_batches, "validation")
        self.fit(pl_module, train, val)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the place of the module's ``predict_step``."""
        if self.la is None:
            raise RuntimeError(
                "ELLACallback has no posterior to predict with: there is one after trainer.fit(), in a checkpoint that "
                "trainer.save_checkpoint() wrote after that (pass it as ckpt_path), or by callback.fit(module, train_loader, "
                "val_loader)."
            )
        if self.la.model is not self._network(pl_module):
            raise ValueError(
                "ELLACallback has the posterior of another module than the one that is to predict. Call callback.fit(module, "
                "train_loader, val_loader), or pass the checkpoint that holds it as ckpt_path."
            )
        self.la._unchanged()
        pl_module.predict_step = self.predict_step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Prediction:
        """Return the posterior's prediction for a batch, which may hold targets too."""
        assert self.la is not None
        return self.la(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Give the module its ``predict_step`` back."""
        vars(pl_module).pop("predict_step", None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the module its ``predict_step`` back."""
        self.on_predict_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the posterior, if there is one, for the checkpoint."""
        return {} if self.la is None else {"posterior": self.la.state_dict()}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take the posterior of a checkpoint, whose weights the module has by now."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state:
            la = self._estimator(pl_module)
            la.load_state_dict(state["posterior"])
            self.la, self.result = la, None


def _single(loaders: Any, limits: Any, name: str) -> Iterable[Any]:
    """Return the trainer's only loader of a kind, cut to as many batches as the trainer reads."""
    several = isinstance(loaders, (list, tuple, dict))
    found = list(loaders.values() if isinstance(loaders, dict) else loaders) if several else [loaders]
    if len(found) != 1:
        raise ValueError(
            f"ELLACallback needs one {name} loader; the trainer has {len(found)}. Call callback.fit(module, train_loader, "
            "val_loader) after training instead, with those to use."
        )
    limit = limits[0] if isinstance(limits, list) else limits
    return found[0] if limit >= _length(found[0]) else _First(found[0], int(limit))


def _length(loader: Any) -> float:
    """Return how many batches there are; infinity where a loader does not tell."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return float("inf")


class _First:
    """The first batches of a loader."""

    def __init__(self, loader: Iterable[Any], n_batches: int) -> None:
        self.loader, self.n_batches = loader, n_batches

    def __iter__(self) -> Iterator[Any]:
        return islice(self.loader, self.n_batches)
