r"""Checks of what users pass, made once, before any work.

Messages say what is wrong, what is allowed, what was passed, and what to do.
"""

from __future__ import annotations

import math
import reprlib
import warnings
from collections.abc import Hashable, Iterable, Mapping
from itertools import chain
from numbers import Integral, Number, Real
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .batches import (
    Input,
    Nested,
    Raw,
    check_tensors,
    is_finite,
    leaves,
    name_of,
    raw_size,
    single_row,
)
from .landmarks import Landmarks

# Of the prior precisions that single precision holds, with room for products.
LARGEST_LOGARITHM = 87.0
LINKS = ("probit", "mc", "bridge", "bridge_norm")
CURVATURES = ("exact", "mc")


def shown(value: Any) -> str:
    """Write what was passed for people: in a few words, whatever it is."""
    kind = type(value).__name__
    if isinstance(value, (Tensor, np.ndarray)):
        return f"a {kind} of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, type):
        return f"the class {value.__name__} itself (make an instance)"
    if isinstance(value, (list, tuple, set, dict)):
        return reprlib.repr(value) if all(map(_is_short, value)) else f"a {kind} of length {len(value)}"
    return reprlib.repr(value) if _is_short(value) else f"an object of type {kind}"


def _is_short(value: Any) -> bool:
    return value is None or isinstance(value, (Number, str, bytes, torch.dtype))


def check_module(model: Any) -> None:
    """Require a module."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, the trained network; got {shown(model)}.")


def check_weights(model: Any) -> None:
    """Require a module whose weights have values."""
    check_module(model)
    for name, values in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(values) or values.is_meta:
            raise ValueError(
                f"model must have values for all its weights and buffers; {name!r} has none, as it is "
                f"{'lazy: run the model once' if is_lazy(values) else 'on the meta device: load the weights'} first."
            )


def check_model(model: Any) -> None:
    """Require a module whose weights have values, at least one of which requires grad."""
    check_weights(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "The model has no parameter that requires grad, so there is no weight to be uncertain about. "
            "Call requires_grad_(True) on the parameters to include before the estimator is built; for serving, they may "
            "be frozen again right after that."
        )
    of_complex = [repr(k) for k, p in model.named_parameters() if p.requires_grad and p.is_complex()]
    if of_complex:
        raise ValueError(
            f"The model has complex weights, for which there is no real Gaussian posterior: {', '.join(of_complex)}. Freeze "
            "them with requires_grad_(False), or keep real and imaginary parts as weights of their own."
        )


def check_whole(model: nn.Module) -> None:
    """Refuse weights that are spread over processes."""
    sharded = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    if sharded or any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise ValueError(
            "The model's weights are sharded over processes (FSDP, DTensor), where forward-mode AD has no rules; "
            "every process must hold them whole. Use DistributedDataParallel, or gather the weights into a plain "
            "copy of the module first."
        )


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Require one of a few strings."""
    allowed = list(allowed)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}; got {shown(value)}.")


def check_flag(name: str, value: Any) -> bool:
    """Return True or False, which 1 and 0 are too."""
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, Integral) and value in (0, 1)):
        return bool(value)
    raise ValueError(f"{name} must be True or False; got {shown(value)}.")


def check_key(name: str, value: Any) -> None:
    """Require what can be a key of a mapping."""
    if value is None or not isinstance(value, Hashable):
        raise ValueError(f"{name} must be a key of mapping batches, a str; got {shown(value)}.")


def check_options(name: str, value: Any) -> dict[str, Any]:
    """Return keyword arguments as a dict of its own."""
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(k, str) for k in value)):
        raise ValueError(f"{name} must be a dict of keyword arguments, or None; got {shown(value)}.")
    return dict(value or {})


def check_loader(name: str, loader: Any) -> None:
    """Require an iterable that may yield batches; nothing is asked of it."""
    kind = type(loader)
    iterable = hasattr(kind, "__iter__") or hasattr(kind, "__getitem__")
    if not iterable or isinstance(loader, (str, bytes, Mapping, type)):
        raise ValueError(
            f"{name} must be an iterable of batches, a DataLoader for instance; got {shown(loader)}. A single batch "
            "goes into a list."
        )


def check_given(name: str, value: Any, reason: str) -> None:
    """Require an argument that is optional elsewhere."""
    if value is None:
        raise ValueError(f"{reason}: pass {name}=...; got None.")


def check_some(n: int, loader: str) -> None:
    """Require data."""
    if not n:
        raise ValueError(
            f"The {loader} yielded no data; at least one input is needed. A generator that was read before is empty: "
            "pass a fresh one."
        )


def check_size(name: str, value: Any, optional: bool = True) -> int | None:
    """Return a positive integer as an int; or None, if it is optional."""
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        alternative = " or None" if optional else ""
        raise ValueError(f"{name} must be a positive integer{alternative}; got {shown(value)}.")
    return int(value)


def check_count(name: str, value: Any) -> int:
    """Return an integer from 0 on as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 0:
        raise ValueError(f"{name} must be an integer, 0 or more; got {shown(value)}.")
    return int(value)


def check_budget(value: Any) -> int | float | None:
    """Return a positive number of bytes as an int, a share in (0, 1] as a float; or None."""
    if value is None:
        return None
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1:
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Integral) and 0 < float(value) <= 1:
        return float(value)
    raise ValueError(
        "memory_budget must be a positive number of bytes (an int), a share of the free memory in (0, 1] "
        f"(a float), or None; got {shown(value)}."
    )


SPILL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_spill(spill: Any, dtype: Any) -> str | None:
    """Return the folder rows are spilled to; None for CPU memory, or no spilling."""
    if dtype not in SPILL_DTYPES:
        raise ValueError(f"spill_dtype must be one of {[str(d) for d in SPILL_DTYPES]}; got {shown(dtype)}.")
    if spill is None or spill == "cpu":
        return None
    if not isinstance(spill, (str, PathLike)) or not Path(spill).is_dir():
        raise ValueError(f"spill must be 'cpu', an existing folder, or None; got {shown(spill)}.")
    return str(spill)


def check_seed(value: Any) -> int:
    """Return an integer that fits a generator's seed as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2^63 - 1; got {shown(value)}.")
    return int(value)


def number(name: str, value: Any, what: str = "a finite number") -> float:
    """Return a finite real number as a float."""
    if isinstance(value, Tensor) and value.numel() == 1 and _has_real_values(value):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be {what}; got {shown(value)}.")
    return float(value)


def positive_number(name: str, value: Any) -> float:
    """Return a positive finite number as a float."""
    what = "a positive finite number"
    if number(name, value, what) <= 0:
        raise ValueError(f"{name} must be {what}; got {shown(value)}.")
    return float(value)


def _has_real_values(value: Tensor) -> bool:
    return not (value.is_meta or value.is_complex() or value.dtype == torch.bool)


def check_positive(name: str, value: Any) -> None:
    """Require a positive finite number, or a tensor of them."""
    if not isinstance(value, Tensor):
        positive_number(name, value)
    elif not _has_real_values(value):
        raise ValueError(f"{name} must hold real numbers; got {shown(value)} on {value.device}.")
    elif not bool((value.detach().isfinite() & (value.detach() > 0)).all()):
        raise ValueError(f"{name} must be positive and finite in every entry; got {value.detach()}.")


def check_prior_precision(name: str, value: Any, n_layers: int, n_params: int) -> None:
    """Require a positive number, or a tensor of 1, L or P of them."""
    if isinstance(value, Tensor):
        fits = value.ndim < 2 and value.numel() in (1, n_layers, n_params)
    else:
        fits = isinstance(value, Real)
    if not fits:
        raise ValueError(
            f"{name} must be a positive number, or a tensor of 1, of {n_layers} (one per weight tensor that requires "
            f"grad) or of {n_params} values (one per weight); got {shown(value)}."
        )
    check_positive(name, value)


def check_prior_mean(value: Any, n_params: int) -> None:
    """Require a finite number, or a tensor of 1 or P of them."""
    what = f"a finite number, or a tensor of 1 or of {n_params} finite values (one per weight)"
    if not isinstance(value, Tensor):
        number("prior_mean", value, what)
    elif value.ndim > 1 or value.numel() not in (1, n_params) or not _has_real_values(value):
        raise ValueError(f"prior_mean must be {what}; got {shown(value)} on {value.device}.")
    elif not value.isfinite().all():
        raise ValueError(f"prior_mean must be finite in every entry; got {value}.")


def check_noise(value: Any) -> None:
    """Require a positive number, or a tensor of one."""
    check_scalar("sigma_noise", value)
    check_positive("sigma_noise", value)


def check_scalar(name: str, value: Any) -> None:
    """Require a number, or a tensor () or (1,)."""
    if isinstance(value, Tensor) and (value.numel() != 1 or value.ndim > 1):
        raise ValueError(f"{name} must be a number or a tensor of one; got shape {tuple(value.shape)}.")


def check_generator(generator: Any, device: torch.device | None = None) -> None:
    """Require a generator (on a device), or None."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator, or None; got {shown(generator)}.")
    if device is not None and generator.device != device:
        raise ValueError(f"generator must be on the model's device, {device}; it is on {generator.device}.")


def check_prediction(
    pred_type: Any,
    link_approx: Any,
    n_samples: Any,
    generator: torch.Generator | None,
    device: torch.device | None,
) -> str:
    """Check the options of a prediction, and return the predictive: "glm" or "nn"."""
    check_choice("pred_type", pred_type, ("glm", "nn", "gp"))
    check_choice("link_approx", link_approx, LINKS)
    check_size("n_samples", n_samples, optional=False)
    if pred_type == "nn" and link_approx != "mc":
        raise ValueError(
            f"pred_type='nn' averages over samples: link_approx must be 'mc'; got {link_approx!r}."
        )
    check_generator(generator, device)
    return "nn" if pred_type == "nn" else "glm"


def check_link(likelihood: str, link_approx: str) -> None:
    """Require a link that the likelihood has."""
    if likelihood == "bernoulli" and link_approx.startswith("bridge"):
        raise ValueError(
            f"link_approx={link_approx!r} makes probabilities that sum to one over the classes, which those of "
            "likelihood='bernoulli' do not. Use 'probit' or 'mc'."
        )


def check_loss(loss: Any) -> None:
    """Require a callable (a metric is one), or None."""
    if loss is not None and (not callable(loss) or isinstance(loss, type)):
        got = loss.__name__ + " itself: make an instance" if isinstance(loss, type) else type(loss).__name__
        raise ValueError(f"loss must be a torchmetrics.Metric or a callable; got {got}.")
    if getattr(loss, "higher_is_better", None) is True:
        raise ValueError(
            f"loss is minimised, and {type(loss).__name__} is better when higher. Pass a callable that negates it, "
            "as lambda p, y: -metric(p, y)."
        )
    if isinstance(loss, (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss)):
        warnings.warn(
            f"loss receives probabilities, and {type(loss).__name__} expects logits. Leave loss out for the NLL, or "
            "pass a callable of (probabilities, targets).",
            stacklevel=3,
        )


def check_interval(low: Any, high: Any, base: Any, size: int, is_searched: bool) -> list[float]:
    """Return exponents of a grid, in ascending order if it is searched, and their base, as floats."""
    ends = [number("log_prior_prec_min", low), number("log_prior_prec_max", high)]
    if positive_number("log_prior_prec_base", base) == 1:
        raise ValueError("log_prior_prec_base must be a positive finite number other than 1; got 1.")
    if is_searched and size > 1 and not ends[0] < ends[1]:
        raise ValueError(
            f"log_prior_prec_min must be smaller than log_prior_prec_max; got {low} and {high}. Exchange them."
        )
    for name, end in zip(("log_prior_prec_min", "log_prior_prec_max"), ends):
        if abs(end * math.log(base)) > LARGEST_LOGARITHM:
            raise ValueError(
                f"{name} must be the exponent of a number that single precision holds; got {base} to the power of {end}."
            )
    return [*ends, float(base)]


def check_has_noise(likelihood: str) -> None:
    """Require a likelihood with observation noise."""
    if likelihood != "regression":
        raise ValueError(
            f"sigma_noise can be changed for regression only; the likelihood is {likelihood!r}. Leave it out."
        )


def as_prior(value: Any) -> Any:
    """Return a sequence of numbers as a tensor, and anything else as it is."""
    if (
        isinstance(value, (list, tuple, np.ndarray))
        and len(value)
        and all(isinstance(v, Real) for v in value)
    ):
        return torch.as_tensor(value, dtype=torch.float64, device="cpu")
    return value


def by_name(name: str, value: Any) -> dict[str, Any]:
    """Return a list of names, or a mapping by them, as a dict."""
    if isinstance(value, str):
        raise ValueError(f"{name} must be a list of names; got {value!r}. Write [{value!r}].")
    if not isinstance(value, Iterable):
        raise ValueError(f"{name} must be a list of names, or a mapping with such keys; got {shown(value)}.")
    names = list(value)
    if not all(isinstance(v, str) for v in names):
        raise ValueError(f"{name} must be a list of names, or a mapping with such keys; got {shown(names)}.")
    return dict(value) if isinstance(value, Mapping) else dict.fromkeys(names)


def check_search(
    given: Mapping[str, Any],
    allowed: Iterable[str],
    likelihood: str,
    temperature_fixed: bool,
    residual: str,
    temperature: float,
) -> None:
    """Require parameters that exist, and that this estimator has."""
    if not given:
        raise ValueError(
            f"search must name at least one parameter of {list(allowed)}; got none. A temperature that was given "
            "as a number is fixed: set la.temperature = None to free it."
        )
    for name in given:
        check_choice("A parameter to search", name, allowed)
    reasons = {
        "temperature": temperature_fixed
        and f"the temperature was fixed at {temperature:.4g}; set la.temperature = None to free it",
        "logit_scale": likelihood not in ("classification", "bernoulli")
        and f"likelihood={likelihood!r} has no logits to scale",
        "sigma_noise": likelihood != "regression" and f"likelihood={likelihood!r} has no observation noise",
        "residual_scale": residual == "none" and "residual='none' has no residual variance",
    }
    for name, reason in reasons.items():
        if name in given and reason:
            raise ValueError(f"{name} cannot be searched: {reason}. Leave it out of search.")


def check_values(name: str, values: Any, allowed: list[int] | None) -> list[Any]:
    """Require values of a parameter: positive numbers, or some of those that are allowed."""
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ValueError(f"The values of {name} to search must be a sequence, or None; got {shown(values)}.")
    values = list(values)
    if not values:
        raise ValueError(
            f"The values of {name} to search are empty; give at least one, or None for the default."
        )
    if allowed is None:
        return [positive_number(f"A value of {name}", v) for v in values]
    wrong = [v for v in values if v not in allowed]
    if wrong:
        raise ValueError(
            f"The values of {name} must be among {allowed}; got {wrong}. Fit again for more than this fit has."
        )
    return [int(v) for v in values]


def check_rank(value: Any) -> int | float | None:
    """Return a positive number of directions as an int, a share of the trace in (0, 1) as a float; or None."""
    if isinstance(value, Real) and not isinstance(value, (Integral, bool)) and 0 < float(value) < 1:
        return float(value)
    try:
        return check_size("n_eigenvalues", value)
    except ValueError:
        raise ValueError(
            "n_eigenvalues must be a positive integer, a share of the Gram matrix's trace in (0, 1), or None; "
            f"got {shown(value)}."
        ) from None


def check_residual(residual: str, prior_precision: Any, enable_backprop: bool) -> None:
    """Require what the residual variance needs: a scalar prior, and no graph if it is exact."""
    if residual != "none" and isinstance(prior_precision, Tensor) and prior_precision.numel() != 1:
        raise ValueError(
            f"residual={residual!r} needs a scalar prior_precision, as the part of J J^T outside the span is known "
            f"without its weights; got {prior_precision.numel()} values. Use residual='none', or one value."
        )
    if residual == "exact" and enable_backprop:
        raise ValueError(
            "residual='exact' computes rows of the Jacobian without a graph and does not work with "
            "enable_backprop=True. Use residual='isotropic'."
        )


def check_process_group(group: Any) -> None:
    """Require "default", a process group that this process is in, or None."""
    if group is None or (isinstance(group, str) and group == "default"):
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            "process_group must be 'default' (torch.distributed's group, if one is initialised), a "
            "torch.distributed.ProcessGroup that this process is in, or None (this process alone); "
            f"got {type(group).__name__} {group!r}."
        )


def check_sharding(sharded: Any, prior_precision: Any, n_params: int, enable_backprop: bool) -> None:
    """Require what directions that are spread over ranks need: no graph, and no prior for every weight."""
    if check_flag("shard_directions", sharded) and enable_backprop:
        raise ValueError(
            "shard_directions=True sends features between processes, which no graph crosses, and does not work with "
            "enable_backprop=True. Leave one of them out."
        )
    if sharded and isinstance(prior_precision, Tensor) and 1 < n_params == prior_precision.numel():
        raise ValueError(
            "shard_directions=True needs one prior precision, or one per weight tensor, as no process has all directions; "
            f"got one for each of {n_params} weights."
        )


def check_features(phi: Any, rank: int, device: torch.device) -> None:
    """Require features (B, C, K) on the model's device."""
    if not isinstance(phi, Tensor) or phi.ndim != 3 or phi.shape[-1] != rank:
        got = tuple(phi.shape) if isinstance(phi, Tensor) else type(phi).__name__
        raise ValueError(
            f"Js must be the features (batch, outputs, {rank}) that backend.jacobians(x) returns, with "
            f"K = {rank} columns instead of one per weight; got {got}."
        )
    if phi.device != device:
        raise ValueError(f"Js must be on the model's device, {device}; it is on {phi.device}.")


class NamingShape:
    """Adds to an error of the model what it was given, as torch speaks of some product inside."""

    # No generator, whose end may swallow an interrupt.
    def __init__(self, x: Raw | Input) -> None:
        self.x = x

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, Exception) or not hasattr(error, "add_note"):  # Python 3.10 has no notes
            return
        x = self.x.container() if isinstance(self.x, Nested) else self.x
        entries = [(name_of(p), v) for p, v in leaves(x)] if isinstance(x, Mapping) else [("x", x)]
        shapes = [f"{name} of shape {tuple(v.shape)}" for name, v in entries if isinstance(v, Tensor)]
        note = f"The inputs were {', '.join(shapes) or shown(x)}."
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)


class NonFiniteSamplesError(ValueError):
    """Outputs at sampled weights that are NaN or infinite."""


def check_variance_samples(likelihood: str, n_samples: int) -> None:
    """Require two samples where a variance is estimated from them."""
    if likelihood == "regression" and n_samples < 2:
        raise ValueError(f"A variance needs n_samples of at least 2 with pred_type='nn'; got {n_samples}.")


def check_finite_samples(samples: Tensor) -> None:
    """Require outputs at sampled weights without NaN or infinity."""
    if not samples.isfinite().all():
        raise NonFiniteSamplesError(
            "The outputs at sampled weights hold NaN or infinite values. The posterior is too wide for the "
            "'nn' predictive: raise the prior precision, lower the temperature, or use pred_type='glm'."
        )


def check_finite_input(x: Raw | Input) -> None:
    """Require inputs, a tensor with a batch axis or a mapping, without NaN or infinity."""
    if not isinstance(x, (Tensor, Mapping, Nested)) or (isinstance(x, Tensor) and not x.ndim):
        raise ValueError(
            f"x must be a tensor whose first axis is the batch, or a mapping of tensors; got {shown(x)}."
        )
    if not isinstance(x, Nested):
        check_tensors(x, "The inputs")
    if not is_finite(x):
        raise ValueError(
            "The inputs hold NaN or infinite values; they must be finite. Clean or drop them first."
        )


def check_finite_features(phi: Tensor, f: Tensor, name: str) -> None:
    """Require features and outputs without NaN or infinity, naming the batch."""
    if not (phi.isfinite().all() and f.isfinite().all()):
        raise ValueError(
            f"The features or outputs for {name} hold NaN or infinite values; they must be finite. "
            "A square root or a norm at zero has no finite derivative: check the model there."
        )


def check_landmarks(landmarks: Any, dict_key_x: str) -> tuple[Raw, Tensor]:
    """Require a pair of M finite inputs and a LongTensor (M,), and return it."""
    valid = isinstance(landmarks, (tuple, list)) and len(landmarks) == 2
    if not valid or not isinstance(landmarks[0], (Tensor, Mapping)) or not isinstance(landmarks[1], Tensor):
        raise ValueError(
            "landmarks must be a pair (inputs, outputs): one batch of M inputs, and a LongTensor (M,) with "
            f"the output coordinate of each; got {shown(landmarks)}."
        )
    inputs, outputs = landmarks
    if outputs.dtype != torch.int64 or outputs.ndim != 1 or not len(outputs):
        raise ValueError(
            f"The outputs of landmarks must be a LongTensor of shape (M,); got shape {tuple(outputs.shape)}, {outputs.dtype}."
        )
    check_tensors(inputs, "The inputs of landmarks")
    size = raw_size(inputs, dict_key_x, len(outputs))
    if size != len(outputs):
        raise ValueError(f"landmarks must hold as many inputs as outputs; got {size} and {len(outputs)}.")
    if not is_finite(inputs):
        raise ValueError("The inputs of landmarks hold NaN or infinite values; they must be finite.")
    return inputs, outputs


def check_coordinates(outputs: Tensor, n_outputs: int) -> None:
    """Require output coordinates that exist."""
    if int(outputs.min()) < 0 or int(outputs.max()) >= n_outputs:
        raise ValueError(
            f"The outputs of landmarks must lie in 0..{n_outputs - 1}; got {int(outputs.min())}..{int(outputs.max())}."
        )


def check_total(n_total: int | None, n_read: int) -> None:
    """Require a total number of inputs that is no less than those read."""
    if n_total is not None and n_total < n_read:
        raise ValueError(
            f"n_total must be at least the number of inputs read, {n_read}; got {n_total}. It is the size of the data "
            "that the loader shows a sample of."
        )


def explicit_landmarks(given: tuple[Input, Tensor]) -> Landmarks:
    """Turn a checked pair into landmarks."""
    inputs, outputs = given
    return Landmarks([single_row(inputs, i) for i in range(len(outputs))], outputs.cpu())
