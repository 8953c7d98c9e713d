"""What must stay as it is: signatures, states and their files, and the numbers of six small models.

The folder ``unchanged`` holds what was found once, and these tests compare with it:

- ``surface.json``: signatures, attributes of a fitted estimator, and the entries of its state. More may come; none may go.
- ``format_*.pt``: saved states, of format 3 by version 0.1.0. ``checkpoints.json``: what they gave where they were saved.
- ``MODEL.json``: numbers of the models of ``unchanged_models``. Of arrays with more than 8 entries there are
  the largest entry, the norm, and three projections on fixed random vectors of norm 1.

Numbers are compared relative to the largest entry, to 1e-12 except for those in ``TOLERANCES``. They do not depend on
the number of threads, and with other instructions of the processor most differ by less than 1e-13. Numbers whose names
start with "seeded" depend on torch's random streams, and are left out where these streams have changed.

After a change that is meant::

    PYTHONPATH=tests/support python tests/host/test_unchanged.py --write

writes the files again, and .pt files that are not there.
"""

import inspect
import json
import math
import random
import re
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import unchanged_models as models
import unchanged_numbers as numbers
from torch import Tensor

import laplace_ella
from laplace_ella import ELLALaplace, NystromGGN

FOLDER = Path(__file__).parent / "unchanged"
STORED = ("full", "half", "landmarks")
STATES = ("format_3_full", *(f"format_4_{stored}" for stored in STORED), "format_5_full")
TOLERANCE = 1e-12
# Where float32 normals are rounded otherwise (by processors without AVX2), the random tangents of the isotropic
# residual and of residual_share() are others by 1e-7; the largest difference found was 5e-7.
WITH_OTHER_TANGENTS = 1e-5
# What else may be off by more, and by how much. L-BFGS stops where a simpler method's loss is flat, which rounding moves
# (by 3e-9 between AVX2 and AVX512); its score is compared to 1e-12, and differences of scores are of smaller numbers.
TOLERANCES = {r"baseline .* values$": 1e-7, r"baseline .* error$": 1e-8, r"baseline .* difference$": 1e-10}


@cache
def _directions(n):
    """Return three vectors (3, n) of norm 1 that depend on n alone."""
    draw = random.Random(n)
    found = torch.tensor([2 * draw.random() - 1 for _ in range(3 * n)], dtype=torch.float64).reshape(3, n)
    return found / found.norm(dim=1, keepdim=True)


def packed(value):
    """Turn a value into what JSON holds; a large tensor into its largest entry, norm and projections."""
    if not isinstance(value, Tensor):
        return [packed(v) for v in value] if isinstance(value, (list, tuple)) else value
    flat = value.detach().reshape(-1).double()
    kind = layout(value)
    if len(flat) > 8:
        flat = torch.cat([flat.abs().max()[None], flat.norm()[None], (_directions(len(flat)) * flat).sum(1)])
    return {kind: flat.tolist()}


def difference(actual, expected):
    """Return by how much packed values differ, relative to the largest entry; infinity if they are of other kinds."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        (kind, values), (found, others) = *expected.items(), *actual.items()
        if kind != found or len(values) != len(others):
            return math.inf
        # The norm of a large tensor is larger than its largest entry.
        large = math.prod(json.loads(kind[kind.index("[") :])) > 8
        largest = max(map(abs, values[:1] if large else values), default=0.0)
        return max((abs(a - b) for a, b in zip(others, values)), default=0.0) / (largest or 1.0)
    if isinstance(expected, list) and isinstance(actual, list) and len(actual) == len(expected):
        return max((difference(a, b) for a, b in zip(actual, expected)), default=0.0)
    if type(expected) is float and type(actual) is float and math.isfinite(expected):
        return abs(actual - expected) / (abs(expected) or 1.0)
    return 0.0 if type(actual) is type(expected) and actual == expected else math.inf


def tolerance(name, same_tangents=True):
    own = [TOLERANCE, *(t for part, t in TOLERANCES.items() if re.search(part, name))]
    fitted_only = name.startswith(("fit ", "evidence ", "backends "))
    return max(own if same_tangents or fitted_only else [*own, WITH_OTHER_TANGENTS])


def complaints(actual, expected):
    """Say which numbers are missing, new or different."""
    found = [f"{name}: missing" for name in expected.keys() - actual.keys()]
    found += [f"{name}: not known" for name in actual.keys() - expected.keys()]
    same_tangents = tangents() == read("streams")["tangents"]
    for name in expected.keys() & actual.keys():
        off = difference(actual[name], expected[name])
        if not off <= tolerance(name, same_tangents):
            found.append(f"{name}: off by {off:.1e}: {actual[name]}, expected {expected[name]}")
    return sorted(found)


def read(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def streams():
    """Return the beginnings of the random streams that samples and the Monte-Carlo link depend on."""
    shapes = (5, 7), (3,)
    normal, few = (torch.randn(s, generator=numbers.generator(), dtype=torch.float64) for s in shapes)
    seed = torch.randint(2**31, (), generator=numbers.generator())
    points = torch.quasirandom.SobolEngine(5, scramble=True, seed=3).draw(8, dtype=torch.float64)
    return [packed(normal), packed(few), int(seed), packed(points[1:])]


def tangents():
    return torch.randn(40, generator=numbers.generator(), dtype=torch.float32).tolist()


def signature(value):
    """Return names, kinds and defaults of the parameters of a callable."""
    try:
        own = inspect.signature(value)
    except ValueError:  # of a class of C
        return "callable"
    plain, empty = (type(None), bool, int, float, str, tuple, torch.dtype), inspect.Parameter.empty
    parameters = []
    for p in own.parameters.values():
        shown = p.default is empty or isinstance(p.default, plain)
        parameters.append(p.replace(annotation=empty, default=p.default if shown else ...))
    return str(own.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def described(owner, name):
    value = inspect.getattr_static(owner, name)
    if isinstance(value, property):
        return "attribute that can be assigned" if value.fset else "attribute"
    kind = {classmethod: "classmethod ", staticmethod: "staticmethod "}.get(type(value), "")
    return kind + signature(getattr(owner, name)) if callable(getattr(owner, name)) else "attribute"


def own_names(owner):
    """Return the public names of a class that the package defines."""
    classes = [c for c in owner.__mro__ if c.__module__.startswith("laplace_ella")]
    return sorted({n for c in classes for n in vars(c) if n == "__call__" or not n.startswith("_")})


@cache
def fitted():
    return models.small_fitted()


@cache
def public_types():
    """Return all classes that public names and public calls give."""
    la, val = fitted(), [(models.uniform(85, 9, 2), models.integers(86, 3, 9))]
    with models.quiet():
        result = la.optimize_hyperparameters(val, ["logit_scale"], n_samples=8, apply=False)
    baseline = next(b for b in result.baselines.values() if b is not None)
    stage, error = la.plan(val, verbose=False).stages[0], la.approximation_error(models.uniform(84, 3, 2))
    found = [getattr(laplace_ella, name) for name in laplace_ella.__all__]
    found += [type(v) for v in (result, result.best, baseline, stage, error)]
    return {c.__name__: c for c in found if isinstance(c, type)}


# The methods of backends that are for users and for laplace-torch; docs/api.md shows the former.
OF_BACKENDS = ("support", "features", "jacobians", "full")


def surface():
    """Return every public callable and attribute, with its signature."""
    found = {name: signature(getattr(laplace_ella, name)) for name in laplace_ella.__all__}
    for name, owner in public_types().items():
        found[name] = signature(owner)
        names = OF_BACKENDS if issubclass(owner, NystromGGN) else own_names(owner)
        found |= {f"{name}.{n}": described(owner, n) for n in names}
    return found


def public_attributes(value):
    return sorted(name for name in dir(value) if not name.startswith("_"))


def host_attributes():
    """Return the public names that laplace-torch defines, which differ from version to version."""
    hosts = [c for c in ELLALaplace.__mro__ if c.__module__.startswith("laplace.")]
    return sorted({name for c in hosts for name in vars(c) if not name.startswith("_")})


def layout(value):
    """Return types and shapes of a state."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, dict):
        return {k: layout(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(layout, value)]
    return type(value).__name__


def everything_about_the_surface():
    return {
        "signatures": surface(),
        "attributes": public_attributes(fitted()),
        "attributes of laplace-torch": host_attributes(),
        "format": fitted().state_dict()["format"],
        **{f"state {stored}": layout(fitted().state_dict(directions=stored)) for stored in STORED},
    }


def numbers_of_state(name):
    la = models.small()
    la.load_state_dict(torch.load(FOLDER / f"{name}.pt", weights_only=True))
    return numbers.of_small(la)


def test_signatures():
    now, before = surface(), read("surface")["signatures"]
    gone = sorted(before.keys() - now.keys())
    assert not gone, f"no longer there: {gone}"
    # What could only be read may be assigned now.
    changed = {
        name: f"{now[name]}, was {what}"
        for name, what in before.items()
        if now[name] != what and (what, now[name]) != ("attribute", "attribute that can be assigned")
    }
    assert not changed, "\n".join(f"{name}{what}" for name, what in changed.items())


def test_attributes_of_a_fitted_estimator():
    before = read("surface")
    of_host = set(before["attributes of laplace-torch"]) - set(host_attributes())
    gone = set(before["attributes"]) - of_host - set(public_attributes(fitted()))
    assert not gone, f"no longer there: {sorted(gone)}"


@pytest.mark.parametrize("stored", STORED)
def test_states_have_the_same_entries(stored):
    state, before = fitted().state_dict(directions=stored), read("surface")
    assert state["format"] == before["format"]
    assert layout(state) == before[f"state {stored}"]


@pytest.mark.parametrize("name", STATES)
def test_saved_states_load(name):
    compare_numbers(numbers_of_state(name), read("checkpoints")[name])


@pytest.mark.parametrize("case", models.CASES, ids=lambda c: c.name)
def test_numbers(case):
    compare_numbers(numbers.numbers_of(case), read(case.name))


def compare_numbers(values, expected):
    actual = {k: packed(v) for k, v in values.items()}
    if difference(streams(), read("streams")["streams"]) >= 1e-14:
        assert version("torch") != read("streams")["torch"], "the streams of this version were others"
        both = actual, expected
        actual, expected = ({k: v for k, v in d.items() if not k.startswith("seeded")} for d in both)
    found = complaints(actual, expected)
    assert not found, f"{len(found)} of {len(expected)} numbers\n" + "\n".join(found)


def write_json(name, values):
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in values.items()]
    (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def write():
    """Save a state in each way, and what an estimator that loads it gives; states that are there stay as they are."""
    known = read("checkpoints")
    for name in STATES:
        path, state = FOLDER / f"{name}.pt", fitted().state_dict(directions=name.split("_")[-1])
        if not path.exists():
            assert name.startswith(f"format_{state['format']}"), "this version writes another format"
            torch.save(state, path)
            known[name] = {k: packed(v) for k, v in numbers_of_state(name).items()}
    write_json("checkpoints", known)
    write_json("surface", everything_about_the_surface())
    write_json("streams", {"torch": version("torch"), "streams": streams(), "tangents": tangents()})
    for case in models.CASES:
        write_json(case.name, {k: packed(v) for k, v in numbers.numbers_of(case).items()})


if __name__ == "__main__":
    torch.manual_seed(12345)  # on which nothing may depend
    {"--write": write}[sys.argv[1]]()
