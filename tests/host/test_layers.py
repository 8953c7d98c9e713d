"""Imports point downwards: between folders, and within them."""

import ast
from pathlib import Path

import pytest

import laplace_ella

PACKAGE = Path(laplace_ella.__file__).parent
# From below; a folder imports those before it, and the package's own modules import all of them.
FOLDERS = ["parallel", "data", "network", "nystrom", "posterior", "fitting", "tuning", ""]


def imports_of(path):
    """Names of the packages, and of the package's own modules, that a file imports."""
    folder = path.relative_to(PACKAGE).parts[:-1]
    foreign, own = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            foreign |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            foreign.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = [*folder[: len(folder) + 1 - node.level], *(node.module or "").split(".")]
            names = [".".join(filter(None, base))]
            own |= {n if n in NAMES else f"{n}.{a.name}".strip(".") for n in names for a in node.names}
    return foreign, own


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "__init__.py"]
NAMES = {name_of(p) for p in FILES}
MODULES = {name_of(p): imports_of(p) for p in FILES}


def test_one_module_imports_the_host():
    assert {name for name, (foreign, _) in MODULES.items() if "laplace" in foreign} == {"host"}
    assert not any("laplace_ella" in foreign for foreign, _ in MODULES.values())


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_folders_below_its_own(name):
    folder = name.rpartition(".")[0]
    allowed = FOLDERS[: FOLDERS.index(folder) + 1]
    for imported in MODULES[name][1]:
        assert imported in NAMES, imported
        assert imported.rpartition(".")[0] in allowed, f"{name} imports {imported}"


def test_fitting_and_tuning_do_not_know_each_other():
    for name, (_, own) in MODULES.items():
        if name.startswith("tuning."):
            assert not any(imported.startswith("fitting.") for imported in own), name


def test_no_modules_import_each_other_in_a_circle():
    remaining = {name: own for name, (_, own) in MODULES.items()}
    while remaining:
        free = [name for name, own in remaining.items() if not own & remaining.keys()]
        assert free, f"a circle among {sorted(remaining)}"
        for name in free:
            del remaining[name]
