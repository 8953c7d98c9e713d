"""docs/api.md shows everything public once, and nothing that does not exist."""

import pkgutil
import re
from pathlib import Path

import laplace_ella
from laplace_ella.ella import ELLALaplace

SHOWN = re.findall(r"^::: (\S+)$", (Path(__file__).parents[2] / "docs/api.md").read_text(), re.M)


def public_members():
    """Return the names of what the package adds to laplace-torch's estimator, or does in another way."""
    ours = [c for c in ELLALaplace.__mro__ if c.__module__.startswith("laplace_ella.")]
    return {n for c in ours for n, v in vars(c).items() if not n.startswith("_") and not isinstance(v, str)}


def test_everything_public_is_shown_once_exists_and_is_documented():
    assert all(pkgutil.resolve_name(path).__doc__ for path in SHOWN)
    assert {f"laplace_ella.{name}" for name in laplace_ella.__all__} <= set(SHOWN)
    assert public_members() - {path.rpartition(".")[2] for path in SHOWN} == set()
    assert len(SHOWN) == len(set(SHOWN))
