"""The gallery names every example, quotes what the scripts say, and has their figures."""

import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest

ROOT = Path(__file__).parents[2]
GALLERY = (ROOT / "docs/gallery.md").read_text()
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
# A section is what follows a heading of the second level.
SECTIONS = [part for part in re.split(r"^## ", GALLERY, flags=re.M)[1:] if "examples/" in part]


def squeezed(text):
    return re.sub(r"\s+", " ", text).strip()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_example_is_in_the_gallery_and_in_make_examples(script):
    assert f"examples/{script.name}" in GALLERY
    target = (ROOT / "Makefile").read_text().split("\nexamples:")[1].split("\n\n")[0]
    assert f"examples/{script.name}" in target, "add it to the target `examples`, in its quick mode"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda text: text.splitlines()[0])
def test_quoted_code_is_that_of_the_script(section):
    script = ROOT / re.search(r"examples/\w+\.py", section)[0]
    quotes = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    assert quotes
    for quote in quotes:
        assert squeezed(quote) in squeezed(script.read_text()), f"not in {script.name}:\n{quote}"


def test_every_section_is_one_example():
    named = {re.search(r"examples/(\w+\.py)", section)[1] for section in SECTIONS}
    assert len(named) == len(SECTIONS) == len(SCRIPTS)


def test_figures_exist_and_are_small():
    figures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", GALLERY)
    assert len(figures) == len(SCRIPTS) - 1, "one each; that of several processes has none"
    for figure in figures:
        size = (ROOT / "docs" / figure).stat().st_size
        assert size < 150_000, f"{figure} has {size} bytes"


def rows_of_active_learning():
    """Return the table of what to label next, from the JSON that the example wrote."""
    found = json.loads((ROOT / "docs/images/gallery/active_learning.json").read_text())
    curves = {k: [seed["accuracy"] for seed in seeds] for k, seeds in found["curves"].items()}
    shown = [found["labels"].index(n) for n in (40, 60, 80, 100)]
    best = [mean(accuracy) for accuracy in curves["BatchBALD"]]
    for name, seeds in curves.items():
        cells = [f"{mean(accuracy[i] for accuracy in seeds):.3f}" for i in shown]
        ahead = [b - mean(accuracy) for b, accuracy in zip(best, seeds)]
        lead = f"{mean(ahead):+.3f} ± {stdev(ahead) / len(ahead) ** 0.5:.3f}" if any(ahead) else ""
        yield " | ".join([f"| {name}", *cells, f"{mean(map(mean, seeds)):.3f}", f"{lead} |"])


def test_the_table_of_active_learning_is_what_was_measured():
    head = "| chosen | 40 labels | 60 | 80 | 100 | mean of the curve | BatchBALD is ahead by |\n|---|---|---|---|---|---|---|\n"
    assert head + "\n".join(rows_of_active_learning()) in GALLERY
