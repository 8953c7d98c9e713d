r"""What a prediction costs with each number of directions: counted, and measured on the inputs at hand."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..data.batches import Input, Raw, batch_size, inputs_between
from ..data.progress import duration
from ..network.engine import Engine
from ..network.features import FEATURES
from ..network.memory import Chunks, gigabytes
from ..network.safety import safely
from ..nystrom.kernels import kernel_way
from ..posterior.links import Noise
from ..posterior.posterior import Posterior
from ..posterior.prediction import of_call
from ..posterior.setting import USUAL_RANKS
from .rehearsal import seconds_of


@dataclass(frozen=True)
class Price:
    """What a prediction costs with the leading K' directions.

    Attributes
    ----------
    n_directions : int
        K'.
    retained : float
        Share of the trace of the landmarks' Gram matrix that these retain, in (0, 1].
    mode : str
        How features are computed; a key of :data:`laplace_ella.network.features.FEATURES`.
    chunks : Chunks
        How many inputs, and how many directions, one call of the model takes.
    counted : float
        Its cost in plain forward passes of an input, for each input, by arithmetic and numbers moved.
    forwards : float
        The same as measured: ``seconds``, divided by those of a plain forward pass of the same inputs.
    seconds : float
        Measured time of the call with all inputs.
    n_bytes : int
        Memory that the call holds at its peak, beyond the model, the inputs and the directions.
    """

    n_directions: int
    retained: float
    mode: str
    chunks: Chunks
    counted: float
    forwards: float
    seconds: float
    n_bytes: int


@dataclass(frozen=True)
class PredictionPlan:
    """What predictions cost with each number of directions; ``print`` it.

    Attributes
    ----------
    prices : tuple of Price
        From one direction up to as many as the fit found.
    n_inputs, n_outputs, n_params : int
        B, C, P.
    n_directions : int
        K', how many directions the estimator uses at present.
    directions_bytes : int
        Memory that all directions of the fit take, however many are used.
    seconds : float
        Measured time of a plain forward pass of all inputs.
    residual : str
        The residual, whose cost is in the prices.
    """

    prices: tuple[Price, ...]
    n_inputs: int
    n_outputs: int
    n_params: int
    n_directions: int
    directions_bytes: int
    seconds: float
    residual: str

    def __str__(self) -> str:
        fitted = f"the {self.prices[-1].n_directions} directions {gigabytes(self.directions_bytes)}"
        about = f"ELLA with C={self.n_outputs}, P={self.n_params}, residual={self.residual!r} predicts B={self.n_inputs} inputs"
        passes = f"a plain forward pass takes {duration(self.seconds)}, {fitted}"
        head = f"{'n_directions':<14}{'trace':>7}  {'features by':<14}{'chunks':<12}{'forwards':>9}{'counted':>9}"
        head += f"{'time':>10}{'an input':>10}{'memory':>10}"
        return "\n".join([f"{about}; {passes}", head, *map(self._line, self.prices)])

    def _line(self, p: Price) -> str:
        chosen = f"{p.n_directions}{' (now)' if p.n_directions == self.n_directions else ''}"
        chunks = f"{p.chunks.inputs} x {p.chunks.directions}"
        return (
            f"{chosen:<14}{p.retained:>7.1%}  {p.mode:<14}{chunks:<12}{p.forwards:>9.3g}{p.counted:>9.3g}"
            f"{duration(p.seconds):>10}{duration(p.seconds / self.n_inputs):>10}{gigabytes(p.n_bytes):>10}"
        )


def check_priced(posterior: Posterior) -> None:
    """Require predictions whose cost depends on directions, which this process has alone.

    Raises
    ------
    ValueError
    """
    if posterior.variance != "ella":
        passes = "two forward passes" if posterior.variance == "last_layer" else "one forward pass"
        raise ValueError(
            f"predict_plan() says what directions cost, and with variance={posterior.variance!r} la(x) uses none: it takes "
            f"{passes}, whatever n_directions is. Assign la.variance = 'ella' to have ELLA's predictions priced."
        )
    if posterior.fit.basis.sharded:
        raise ValueError(
            "predict_plan() times calls of this process, and the directions are spread over several ranks, which have to take "
            "part in every call. Time la(x) on all ranks instead, with n_directions as you like it."
        )


def prediction_plan(posterior: Posterior, engine: Engine, x: Raw | Input, backprop: bool) -> PredictionPlan:
    """Measure a prediction with one direction, two, five, ten and so on, up to all of them.

    Parameters
    ----------
    posterior : Posterior
        Of a process that has all directions.
    engine : Engine
    x : inputs
        B of them, as the estimator takes them.
    backprop : bool
        Whether predictions record a graph.

    Raises
    ------
    ValueError
        If there are no inputs.
    """
    size, whole = batch_size(engine.inputs(x)), posterior.fit.basis
    if not size:
        raise ValueError("x must hold at least one input; got none.")
    per_pass = seconds_of(lambda: engine.forward(x))
    ranks = [*(k for k in USUAL_RANKS if k < whole.rank), whole.rank]
    prices = [_price(posterior, engine, x, per_pass, k, backprop) for k in ranks]
    return PredictionPlan(
        prices=tuple(prices),
        n_inputs=size,
        n_outputs=posterior.fit.n_outputs,
        n_params=engine.row_count(),
        n_directions=posterior.rank,
        directions_bytes=whole.rank * engine.row_size(),
        seconds=per_pass,
        residual=posterior.residual.name,
    )


def _price(
    posterior: Posterior, engine: Engine, x: Raw | Input, per_pass: float, rank: int, backprop: bool
) -> Price:
    at = posterior if rank == posterior.rank else posterior.using(rank)
    likelihood, noise = at.likelihood.of_calls, Noise(seed=at.seed)

    def predict(inputs: Raw | Input) -> Tensor:
        found = of_call(at, engine, inputs, likelihood, at.link_for(None), noise, enable_backprop=backprop)
        return found if isinstance(found, Tensor) else found[0]

    predict(inputs_between(engine.inputs(x), 0, 1))  # so that what is prepared once for a basis is not timed
    seconds = seconds_of(lambda: predict(x))
    # Whether a graph is recorded decides on the way.
    mode, chunks, counted, n_bytes = safely(
        engine.module, lambda: _counted(at, engine, engine.to_model(x)), backprop
    )
    return Price(rank, at.basis.retained, mode, chunks, counted, seconds / per_pass, seconds, n_bytes)


def _counted(at: Posterior, engine: Engine, x: Input) -> tuple[str, Chunks, float, int]:
    """Return the way to the features, its chunks, forward passes of an input, and bytes."""
    n_coordinates, size = engine.facts(x).n_coordinates, batch_size(x)
    mode, chunks, forwards, n_bytes = _pushed(engine, x, at.rank)
    n_tangents, n_rows = at.residual.work(at.residual_samples, n_coordinates)
    if n_tangents:
        _, _, more, at_once = _pushed(engine, x, n_tangents)
        forwards, n_bytes = forwards + more, max(n_bytes, at_once)
    if n_rows:
        way = kernel_way(engine, x)
        rows = min(size * n_rows * engine.row_size(), engine.budget() // 4)
        of_rows = rows + engine.choice(x).gradient_bytes(size * n_rows)
        forwards += way.forwards
        n_bytes = max(n_bytes, min(size, way.inputs) * way.bytes_per_input if way.layers else of_rows)
    kept = (
        8 * size * n_coordinates * (at.rank + n_tangents + at.residual.numbers_per_output(at.fit.n_outputs))
    )
    return mode, chunks, forwards, n_bytes + kept + engine.choice(x).prepared_bytes(mode, at.rank)


def _pushed(engine: Engine, x: Input, rank: int) -> tuple[str, Chunks, float, int]:
    """Return the way in which tangents are pushed, its chunks, forward passes of an input, and bytes of a call."""
    choice = engine.choice(x)
    mode = choice.mode(rank)
    chunks = choice.chunks(mode, rank)
    chunks = Chunks(min(chunks.inputs, choice.size), chunks.directions)
    at_once = rank if FEATURES[mode].directions == "all" else chunks.directions
    forwards = choice.cost(mode, rank) / choice.counts.forward
    return mode, Chunks(chunks.inputs, at_once), forwards, choice.feature_bytes(mode, chunks)
