"""Every block of some pages runs, in its order, and warns where the page says so and nowhere else."""

import re
import warnings
from pathlib import Path

import matplotlib as mpl
import pytest

import laplace_ella

mpl.use("Agg")

ROOT = Path(__file__).parents[2]
PAGES = ("swap", "likelihoods")
PACKAGE = Path(laplace_ella.__file__).parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.S | re.M)


def run(page):
    """Run the blocks of a page in one namespace; return the lines that our warnings name."""
    text, names = page.read_text(), {"__name__": page.stem}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for block in BLOCK.finditer(text):
            # So that a traceback, and a warning, name the line of the page.
            above = "\n" * text.count("\n", 0, block.start(1))
            exec(compile(above + block[1], str(page), "exec"), names)
    return {w.lineno for w in seen if w.filename == str(page)} | {
        f"{w.filename}:{w.lineno} {w.message}" for w in seen if Path(w.filename).is_relative_to(PACKAGE)
    }


def lines(text, ending):
    """Return the lines whose comment ends so."""
    return {i for i, line in enumerate(text.splitlines(), 1) if re.search(rf"# .*\b{ending}$", line)}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_runs_and_warns_where_it_says_so(name):
    page = ROOT / f"docs/{name}.md"
    text, warned = page.read_text(), run(page)
    assert lines(text, "warns") <= warned <= lines(text, "warns?")
