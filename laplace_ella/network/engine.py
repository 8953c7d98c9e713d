r"""One model and how it is differentiated: what is found out about it and remembered, and what computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import copy
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..data.batches import (
    Input,
    NamingShape,
    Nested,
    Raw,
    batch_size,
    detached,
    doubled,
    inputs_between,
    signature,
)
from ..data.packing import unpacked
from .calling import Calling
from .calls import DivergedError
from .choice import Choice, allowed, without_record
from .contraction import ContractedModel, contracted_cotangents
from .cutting import Cutting
from .derived import DerivedModel, writes_of
from .facts import InputFacts, find_facts, layers_of
from .features import AUTODIFF, FEATURES, Features, Way
from .functional import FunctionalModel, Weights, first_weight, last_layer_norms, setting_of
from .gradients import RowEngine
from .memory import (
    Chunks,
    budget_bytes,
    free_memory,
    let_malloc_adapt,
    with_smaller_chunks,
)
from .outputs import Axes
from .probing import Support, probe
from .pulling import pulled_cotangents
from .safety import safely

__all__ = ["AUTODIFF", "Engine"]


class Engine:
    """Computes features of one model, having found out what it supports and how large it is.

    Parameters
    ----------
    module : torch.nn.Module
    autodiff : str
        "auto", or the name of a way in :data:`laplace_ella.network.features.FEATURES`.
    chunk_size, memory_budget, compiled, dict_key_x, dict_key_y
        As in :class:`laplace_ella.NystromGGN`.
    row_engine : callable, optional
        Computes the gradients of landmarks. Default: torch.func, or a loop where that fails.
    spill : optional
        Where gradient rows go that do not fit the budget; see :class:`laplace_ella.nystrom.gram.Spill`.
    channel_axis : int, optional
        1 or -1, where the outputs have their channels. None: last, as nobody knows better yet; see :meth:`along`.
    """

    def __init__(
        self,
        module: nn.Module,
        autodiff: str = "auto",
        chunk_size: int | None = None,
        memory_budget: int | float | None = None,
        compiled: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        row_engine: RowEngine | None = None,
        spill: Any = None,
        channel_axis: int | None = None,
    ) -> None:
        self.module, self.autodiff = module, autodiff
        self.chunk_size, self.memory_budget, self.compiled = chunk_size, memory_budget, compiled
        self.row_engine, self.spill = row_engine, spill
        self._example: Input | None = None  # an input, for the types of its containers
        self.channel_axis = channel_axis
        self.function = FunctionalModel(module, channel_axis=channel_axis, calling=Calling(dict_key_y))
        self.cutting = Cutting(self.function, dict_key_x)
        let_malloc_adapt()
        self._support: dict[Any, Support] = {}
        self._facts: dict[Any, InputFacts] = {}
        self._layers: dict[Any, ContractedModel | None] = {}
        self._choices: dict[Any, tuple[str, Chunks]] = {}
        self._smaller: dict[Any, Chunks] = {}  # with which a device ran out of memory no more
        self._free: dict[torch.device, int] = {}
        self._along = {channel_axis: self}
        self._sizes: dict[Any, tuple[int, int]] = {}
        self._said: set[str] = set()
        # Of the first of some directions: what ways make of them.
        self._prepared: Any = WeakTensorKeyDictionary()

    # A copy finds out by itself what is of this module or process; weights and how inputs are read do not change.
    def __getstate__(self) -> Any:
        of_model = self.module, self.autodiff, self.chunk_size, self.memory_budget, self.compiled
        keys = self.cutting.dict_key_x, self.function.calling.dict_key_y
        more = *keys, self.row_engine, self.spill, self.channel_axis
        return (*of_model, *more), self.function.names, self.cutting.knowledge(), self._example

    def __setstate__(self, state: Any) -> None:
        arguments, names, knowledge, example = state
        self.__init__(*arguments)  # type: ignore[misc]
        self.function.names = names  # the model may be frozen by now
        self.cutting.learn(knowledge)
        self._example = example

    def along(self, channel_axis: int | None) -> Engine:
        """Return the engine of the same model for outputs with their channels on an axis, always the same one.

        Another engine, so that calls for a fit to outputs read in one way, and a new fit that reads them in another, do not meet.
        """
        if channel_axis not in self._along:
            arguments, *more = self.__getstate__()
            new = type(self).__new__(type(self))
            new.__setstate__(((*arguments[:-1], channel_axis), *more))
            new.function.knows_backward_only = self.function.knows_backward_only
            self._along[channel_axis], new._along, new._free = new, self._along, self._free
        return self._along[channel_axis]

    def eager(self) -> Engine:
        """Return the engine, or one that compiles nothing: that takes minutes a shape."""
        if not self.compiled:
            return self
        new = copy(self)
        new.compiled = False
        return new

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return first_weight(self.module).device

    def forget(self) -> None:
        """Find everything out again at the next use, the model having changed."""
        for engine in list(self._along.values()):
            engine._forget()

    def _forget(self) -> None:
        of_inputs = self._facts, self._layers, self._choices, self._smaller, self._sizes
        for of_model in (*of_inputs, self._support, self._free, self._prepared):
            of_model.clear()
        self.cutting.forget()

    def drop_prepared(self) -> None:
        """Free what ways have made of directions, which come again where they are used again."""
        # A new dictionary, as another thread may be using the old one.
        self._prepared = WeakTensorKeyDictionary()

    # ------------------------------------------------------------------ safe from outside, with inputs as they come

    def inputs(self, x: Raw | Input, size: int | None = None) -> Input:
        """Say which tensors of an input are cut into rows; see :class:`laplace_ella.network.cutting.Cutting`.

        Parameters
        ----------
        x : Tensor or mapping
        size : int, optional
            How many inputs there are, if that is known.

        Raises
        ------
        Exception
            Whatever the model raises.
        ValueError
            If the model does not treat the rows of the input one by one.
        """
        with NamingShape(x):
            x = self.cutting(x, size)
        if isinstance(x, Nested) and self._example is None:
            self._example = inputs_between(x, 0, 1)
        return x

    def restored(self, x: Any) -> Input:
        """Give an input that was packed as plain types containers of the types that inputs have here."""
        return unpacked(x, self._example)

    def forward(self, x: Raw | Input, **model_kwargs: Any) -> Tensor:
        """Return the model's outputs (B, ..., C), in evaluation mode and without a graph."""
        return safely(self.module, lambda: self.function.own_outputs(self.to_model(x), **model_kwargs))

    def forward_at(
        self, offsets: Weights, x: Raw | Input, enable_backprop: bool = False, **model_kwargs: Any
    ) -> Tensor:
        """Return the outputs (S, B, C) at the weights plus each of S offsets (S, *shape)."""
        n_samples = next(iter(offsets.values())).shape[0]

        def compute() -> Tensor:
            entered, weights = self.to_model(x), self.function.weights()
            near = ({k: v[s] for k, v in offsets.items()} for s in range(n_samples))
            found = (self.function.outputs_near(weights, o, entered, **model_kwargs) for o in near)
            return torch.stack([f.flatten(0, -2) for f in found])

        return safely(self.module, compute, enable_backprop)

    def push(self, x: Raw | Input, tangents: Weights, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Push S tangents (S, *shape) forward: J g (B, C, S), and f (B, C)."""
        return safely(self.module, lambda: self.features(self.to_model(x), tangents), enable_backprop)

    def axes(self, x: Raw | Input) -> Axes:
        """Return the axes that the network's outputs for ``x`` have."""
        x = self.to_model(x)
        return self.facts(x).axes if batch_size(x) else self.axes_of(self.forward(x))

    def axes_of(self, f: Tensor) -> Axes:
        """Return the axes that the network's outputs have, given outputs (B, ..., C) of :meth:`forward`."""
        return self.function.axes_of(f)

    def last_layer_norms(self, x: Raw | Input, enable_backprop: bool = False) -> Tensor | None:
        """Return the squared norms (B,) of what the last layer takes; None without such a layer."""
        return safely(self.module, lambda: last_layer_norms(self.function, self.to_model(x)), enable_backprop)

    def bounded(self, x: Raw | Input, width: int) -> Iterator[Input]:
        """Cut a batch into parts with ``width`` float64 numbers for each output in a quarter of the memory budget."""
        x = self.inputs(x)
        size = batch_size(x)
        per_input = 8 * width * self.facts(self.to_model(x)).n_coordinates
        step = max(1, self.budget() // 4 // per_input)
        for start in range(0, size, step):
            yield x if step >= size else inputs_between(x, start, start + step)

    # ------------------------------------------------------------------ what was found out

    def to_model(self, x: Raw | Input) -> Input:
        """Cut an input into rows, and move it to the model; see :class:`laplace_ella.network.cutting.Cutting`."""
        return self.cutting.to_model(x, self.device)

    def budget(self) -> int:
        """Return the bytes that gradient rows and activations may take.

        The free memory is looked up once, so that equal calls are cut into equal chunks.
        """
        return budget_bytes(self.memory_budget, self.free())

    def free(self) -> int:
        """Return the free memory that the budget is made of."""
        found = self._free.get(self.device)  # which another thread may forget
        if found is None:
            self._free[self.device] = found = free_memory(self.device)
        return found

    def assume_free(self, n_bytes: int) -> None:
        """Cut calls as if so many bytes were free: into the chunks of an earlier process."""
        self._free[self.device] = n_bytes

    def row_count(self) -> int:
        """Return P."""
        return self._row_sizes()[0]

    def row_size(self) -> int:
        """Return the bytes of one gradient row."""
        return self._row_sizes()[1]

    def _row_sizes(self) -> tuple[int, int]:
        setting = setting_of(self.module)
        if setting not in self._sizes:
            own = self.function.own_weights().values()
            self._sizes[setting] = sum(w.numel() for w in own), sum(w.numel() * w.element_size() for w in own)
        return self._sizes[setting]

    def support_for(self, x: Raw | Input) -> Support:
        """Say what the model supports, given an input as it comes, which is only looked at if that is not known yet."""
        return self._support.get(setting_of(self.module)) or self.support(self.to_model(x))

    def support(self, x: Input) -> Support:
        """Say what the model supports; this is found out once per device, on two copies of a row of ``x``."""
        setting = setting_of(self.module)
        if setting not in self._support:
            self._support[setting] = safely(
                self.module, lambda: probe(self.function, _pair(x), self.autodiff)
            )
        return self._support[setting]

    def facts(self, x: Input) -> InputFacts:
        """Describe inputs of the shape of ``x``; this is found out once per shape."""
        kind = setting_of(self.module), signature(x)
        if kind not in self._facts:
            precision, one_by_one = self.support(x).precision, self.support(x).gradients == "loop"
            derivable = not self.compiled and any(
                FEATURES[k].forward or FEATURES[k].contracts for k in allowed(self.autodiff, self.support(x))
            )
            find = torch.no_grad()(find_facts)
            self._facts[kind] = safely(
                self.module, lambda: find(self.function, _pair(x), precision, derivable, one_by_one)
            )
        return self._facts[kind]

    def layers(self, x: Input) -> ContractedModel | None:
        """Return the model for gradients layer by layer of inputs of the shape of ``x``, if that works for them."""
        kind = setting_of(self.module), signature(x)
        if kind not in self._layers:
            facts, support, find = self.facts(x), self.support(x), torch.no_grad()(layers_of)
            one_by_one = support.gradients == "loop"
            self._layers[kind] = safely(
                self.module, lambda: find(self.function, facts, _pair(x), support.precision, one_by_one)
            )
        return self._layers[kind]

    def choice(self, x: Input) -> Choice:
        """Return what decides how features of inputs like ``x`` are computed now."""
        return Choice(
            self.function,
            self.facts(x),
            self.support(x),
            self.autodiff,
            self.chunk_size,
            self.row_count(),
            self.row_size(),
            self.budget(),
            batch_size(x),
            self.device.type == "cpu",
            torch.is_grad_enabled(),
        )

    # ------------------------------------------------------------------ inside ``safely``, with inputs as the model takes them

    def features(self, x: Input, directions: Weights) -> tuple[Tensor, Tensor]:
        r"""Compute :math:`\phi(x)` (B L, C, K) and f(x) (B L, C); inside ``safely``.

        Raises
        ------
        torch.cuda.OutOfMemoryError
            If the device has no room for one row and one direction.
        """
        rank = next(iter(directions.values())).shape[0]
        if batch_size(x) == 0 or rank == 0:  # of few directions, a rank may have none
            f = self.function.outputs(self.function.weights(), x).flatten(0, -2)
            return f.new_zeros(*f.shape, rank), f
        kind = setting_of(self.module), signature(x), rank
        mode, chunks = self._chosen(kind, x, rank)
        chunks = self._smaller.get((kind, mode), chunks)
        (phi, f), used = with_smaller_chunks(
            lambda c: self._compute(mode, x, directions, c),
            chunks,
            self.device,
            lambda c: self.choice(x).feature_bytes(mode, c),
        )
        if used != chunks:
            self._smaller[kind, mode] = used
        n_outputs = self.facts(x).n_outputs
        return phi.reshape(-1, n_outputs, rank), f.reshape(-1, n_outputs)

    def _chosen(self, kind: Any, x: Input, rank: int) -> tuple[str, Chunks]:
        """Return the way to compute features, and the chunks; once for inputs of a kind, budget and batch size."""
        key = kind, batch_size(x), torch.is_grad_enabled(), self.budget()
        if key not in self._choices:
            choice = self.choice(x)
            mode = choice.mode(rank)
            remark = choice.remark(mode)
            if remark and remark not in self._said:
                self._said.add(remark)
                warnings.warn(remark, stacklevel=2)
            self._choices[key] = mode, choice.chunks(mode, rank)
        return self._choices[key]

    def pull(self, x: Input, directions: Weights, cotangents: Tensor) -> Tensor:
        r"""Compute :math:`V^T J^T u` (B, n, K) of cotangents u (B, n, L C); inside ``safely``."""
        choice = self.choice(x)
        contraction = choice.contraction(len(next(iter(directions.values()))))
        if contraction is not None:
            with suppress(DivergedError):  # a branch or a shape that depends on the data
                return self._pull_contracted(contraction, choice, x, directions, cotangents)
        function, looped = self.function, self.support(x).gradients != "vmap"
        pulled, _ = with_smaller_chunks(
            lambda c: pulled_cotangents(function, function.weights(), directions, x, cotangents, c, looped),
            Chunks(choice.gradients_per_call(), 1),
            self.device,
            lambda c: choice.gradient_bytes(c.inputs),
        )
        return pulled

    def _pull_contracted(
        self, mode: str, choice: Choice, x: Input, directions: Weights, cotangents: Tensor
    ) -> Tensor:
        model = choice.facts.contracted
        assert model is not None
        ready, rank, n = model.ready(), len(next(iter(directions.values()))), cotangents.shape[1]
        found = self._with_prepared(FEATURES[mode], model, directions)
        chunks = choice.contraction_chunks(mode, rank, n)
        pulled, _ = with_smaller_chunks(
            lambda c: contracted_cotangents(model, ready, found, x, cotangents, c),
            chunks,
            self.device,
            lambda c: choice.feature_bytes(mode, c),
        )
        return pulled

    def _compute(self, mode: str, x: Input, directions: Weights, chunks: Chunks) -> tuple[Tensor, Tensor]:
        try:
            return self.bound(mode, x, directions)(x, chunks)
        except DivergedError:  # a branch or a shape that depends on the data
            return self._as_it_is(x, directions)

    def bound(
        self, mode: str, x: Input, directions: Weights
    ) -> Callable[[Input, Chunks], tuple[Tensor, Tensor]]:
        """Return a way to compute features of inputs like ``x``, with all that it takes but the inputs."""
        way = FEATURES[mode]
        function = self.choice(x).model_for(mode, len(next(iter(directions.values()))))
        compute = _compiled(way.compute) if self.compiled and way.directions == "several" else way.compute
        weights = function.ready() if isinstance(function, DerivedModel) else function.weights()
        return partial(compute, function, weights, self._with_prepared(way, function, directions))

    def _as_it_is(self, x: Input, directions: Weights) -> tuple[Tensor, Tensor]:
        """Compute features of the model as it is, in no way that follows a record."""
        support = self.support(x)
        mode = without_record(support) if FEATURES[support.features].contracts else support.features
        chunks = self.choice(x).chunks(mode, len(next(iter(directions.values()))))
        return FEATURES[mode].compute(self.function, self.function.weights(), directions, x, chunks)

    def _with_prepared(self, way: Way, function: FunctionalModel, directions: Weights) -> Weights:
        """Return the directions with what a way prepares of them, once for as long as their first tensor lives."""
        if way.prepare is None:
            return directions
        kept = self._prepared.setdefault(next(iter(directions.values())), {})
        derived = isinstance(function, DerivedModel)
        key = function.record.key if isinstance(function, DerivedModel) else way
        # No stamp_of(): looking at entries takes eight times as long or more, and no optimiser writes to directions.
        stamp = [v.data_ptr() for v in directions.values()], writes_of(directions.values())
        before, of_weights, made = kept.get(key, (None, None, None))
        now = function.stamp if isinstance(function, DerivedModel) else None
        if before != stamp or (derived and (of_weights is None or not of_weights.same(now))):
            made = way.prepare(function, directions)
            kept[key] = stamp, now, made
        found = {**directions, **made}
        return {k: found[k] for k in function.met} if isinstance(function, DerivedModel) else found


def _pair(x: Input) -> Input:
    """Return two copies of the first row, cut from any graph."""
    return doubled(detached(inputs_between(x, 0, 1)))


@cache
def _compiled(compute: Features) -> Features:
    """Compile a way once for all engines: that takes minutes per shape."""
    return torch.compile(compute)
