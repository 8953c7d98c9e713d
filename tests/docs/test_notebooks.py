"""The notebooks are those of the scripts as they are."""

import ast
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples/notebooks"))

import convert  # noqa: E402 (a script's folder is no package)

SCRIPTS = convert.SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_notebook_is_that_of_the_script(script):
    written = nbformat.read(convert.FOLDER / f"{script.stem}.ipynb", as_version=4)
    nbformat.validate(written)
    assert written == convert.notebook_of(script), "run python examples/notebooks/convert.py"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_has_every_statement_of_the_script(script):
    cells = convert.notebook_of(script).cells
    found = {
        ast.unparse(node)
        for cell in cells
        if cell.cell_type == "code"
        for node in ast.parse(cell.source).body
    }
    *before, main, _ = ast.parse(script.read_text()).body
    left_out = ("from __future__", "mpl.use")
    for node in [*before[1:], *main.body[1:]]:
        text = ast.unparse(node).replace("parser.parse_args()", "parser.parse_args([])")
        text = text.replace("Path(__file__).parent", "Path()")
        assert text in found or text.startswith(left_out)


def test_a_cell_is_a_paragraph_of_main():
    source = 'def main():\n    """Do."""\n    a = 1\n    b = 2\n\n    # why\n    c = 3\n'
    assert list(convert.paragraphs(ast.parse(source).body[0], source.splitlines())) == [
        "a = 1\nb = 2",
        "\n# why\nc = 3",
    ]
