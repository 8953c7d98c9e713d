"""Every block of docs/swap.md runs, in its order, and warns where the page says so and nowhere else."""

import re
import warnings
from pathlib import Path

import matplotlib as mpl

import laplace_ella

mpl.use("Agg")

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/swap.md"
PACKAGE = Path(laplace_ella.__file__).parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.S | re.M)


def run(text):
    """Run the blocks of a page in one namespace; return the lines that our warnings name."""
    names = {"__name__": "swap"}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for block in BLOCK.finditer(text):
            # So that a traceback, and a warning, name the line of the page.
            above = "\n" * text.count("\n", 0, block.start(1))
            exec(compile(above + block[1], str(PAGE), "exec"), names)
    return {w.lineno for w in seen if w.filename == str(PAGE)} | {
        f"{w.filename}:{w.lineno} {w.message}" for w in seen if Path(w.filename).is_relative_to(PACKAGE)
    }


def lines(text, ending):
    """Return the lines whose comment ends so."""
    return {i for i, line in enumerate(text.splitlines(), 1) if re.search(rf"# .*\b{ending}$", line)}


def test_the_page_runs_and_warns_where_it_says_so():
    text = PAGE.read_text()
    warned = run(text)
    assert lines(text, "warns") <= warned <= lines(text, "warns?")
