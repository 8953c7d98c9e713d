"""A fitted estimator as a module, for code that takes modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .data.batches import Raw
from .posterior.likelihoods import Prediction


class PredictiveModule(nn.Module):
    """What :meth:`laplace_ella.ELLALaplace.as_module` returns: a module whose forward pass is a call of an estimator.

    - ``train()`` and ``eval()`` make no difference to predictions: the network predicts in evaluation mode, and its own flags are
      put back afterwards.
    - ``to(device)`` moves the network, and the posterior follows at the next call. In another dtype than that of the fit it is
      refused.
    - ``state_dict()`` holds the network's weights under ``model.`` and the posterior, as the estimator's own
      :meth:`laplace_ella.ELLALaplace.state_dict`, under ``posterior._extra_state``. It loads with ``weights_only=True``, into
      a module of an estimator that was built alike, fitted or not.
    - ``copy.deepcopy`` and ``pickle`` take network and posterior along, so that worker processes may have it.
    - Gradients reach inputs if the estimator has ``enable_backprop``, and never the weights.
    - ``torch.compile`` leaves it as it is. ``torch.export`` and ``torch.jit`` refuse it: features are derivatives of the network,
      taken by exchanging its weights, and no graph of operators on its inputs.

    Attributes
    ----------
    model : torch.nn.Module
        The network, shared with the estimator.
    """

    def __init__(self, estimator: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.model = estimator.model
        self.posterior = _Posterior(estimator)  # after the model, as modules are loaded in this order
        self.options = options
        self.training = self.model.training

    @torch.compiler.disable
    def forward(self, x: Raw | None = None, /, **entries: Tensor) -> Prediction:
        """Predict, as the estimator does with the arguments that :meth:`laplace_ella.ELLALaplace.as_module` was given.

        Parameters
        ----------
        x : Tensor or mapping
            B inputs.
        **entries : Tensor
            In place of ``x``: the entries of a mapping of inputs, by name.

        Returns
        -------
        Tensor (B, C), or pair of Tensor
            As a call of the estimator.

        Raises
        ------
        AttributeError
            If the estimator is not fitted, and no state was loaded.
        ValueError
            As for a call; or if there is no input, or a mapping beside one.
        RuntimeError
            Under ``torch.export`` and ``torch.jit.trace``.
        """
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            raise RuntimeError(_NO_GRAPH)
        if (x is None) == (not entries):
            raise ValueError(
                "A forward pass takes one input, a tensor or a mapping, or else the entries of a mapping by name; got "
                f"{'neither' if x is None else f'an input and the names {sorted(entries)}'}."
            )
        return self.posterior.estimator(entries if x is None else x, **self.options)


_NO_GRAPH = (
    "A posterior's predictions cannot be traced or exported: they are made of derivatives of the network, taken by exchanging its "
    "weights, and are no graph of operators on its inputs. Export the network by itself, and serve the posterior from Python."
)


class _Posterior(nn.Module):
    """The estimator's state as that of a module without weights of its own."""

    def __init__(self, estimator: Any) -> None:
        super().__init__()
        self.estimator = estimator

    def get_extra_state(self) -> dict[str, Any]:
        """Return the estimator's state."""
        return self.estimator.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Give the estimator a state; the network has its weights by now."""
        self.estimator.load_state_dict(state)
