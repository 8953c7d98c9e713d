"""Write the examples as notebooks, and run them.

A notebook has the script's docstring as its text, each function in a cell of its own, and what ``main`` does, paragraph
by paragraph, at the end: the scripts are what is maintained.

    python examples/notebooks/convert.py            # writes examples/notebooks/*.ipynb, without outputs
    python examples/notebooks/convert.py --run      # runs them as they are with --quick, and keeps nothing
"""

from __future__ import annotations

import argparse
import ast
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent

import nbformat
from nbformat import NotebookNode, v4

FOLDER = Path(__file__).parent
# Several processes need torchrun.
SCRIPTS = [path for path in sorted(FOLDER.parent.glob("*.py")) if path.stem != "distributed"]
SETUP = "import sys\n\nsys.path.insert(0, '..')  # the examples import functions from each other"
# What a notebook has no use for, and what it has instead.
REPLACED = {
    "parser.parse_args()": "parser.parse_args([])",
    "Path(__file__).parent": "Path()",
    '\nmpl.use("Agg")\n\n': "",
    "from __future__ import annotations\n": "",
}


def notebook_of(script: Path) -> NotebookNode:
    """Return the notebook of one script, without outputs."""
    source = script.read_text()
    *before, main, _ = ast.parse(source).body
    assert isinstance(main, ast.FunctionDef), f"{script.name} does not end with main and its call"
    lines = source.splitlines()
    docstring, *before = before
    cells = [v4.new_markdown_cell(text_of(docstring.value.value, script)), v4.new_code_cell(SETUP)]
    cells += code_cells(parts(before, lines))
    cells += [v4.new_markdown_cell(f"## {ast.get_docstring(main)}")]
    cells += code_cells(paragraphs(main, lines))
    if figures := re.findall(r'args\.out / "(\w+\.png)"', source):
        show = "    display.display(display.Image(args.out / name))"
        shown = f"from IPython import display\n\nfor name in {figures}:\n{show}"
        cells.append(v4.new_code_cell(shown))
    for place, cell in enumerate(cells):
        cell["id"] = f"{script.stem}-{place}"[-64:]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def text_of(docstring: str, script: Path) -> str:
    """Return the docstring as Markdown: its first line as the title, its commands as code."""
    title, _, rest = docstring.strip().partition("\n")
    source = f"Made from [{script.name}](../{script.name}), which takes `--quick` too."
    return f"# {title.rstrip('.')}\n{rest.rstrip().replace('``', '`')}\n\n{source}"


def parts(body: list[ast.stmt], lines: list[str]) -> Iterator[str]:
    """Yield each function and class by itself, and what stands between two of them together."""
    start = body[0].lineno - 1
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            yield "\n".join(lines[start:first])
            yield "\n".join(lines[first : node.end_lineno])
            start = node.end_lineno
    yield "\n".join(lines[start : body[-1].end_lineno])


def paragraphs(main: ast.FunctionDef, lines: list[str]) -> Iterator[str]:
    """Yield what ``main`` does, cut where a blank line stands between two of its statements."""
    body = main.body[1:]
    start = body[0].lineno - 1
    for node, following in zip(body, [*body[1:], None]):
        gap = lines[node.end_lineno : following.lineno - 1] if following else [""]
        if following is None or "" in gap:
            yield dedent("\n".join(lines[start : node.end_lineno]))
            start = node.end_lineno


def code_cells(texts: Iterator[str]) -> list[NotebookNode]:
    """Return code as a notebook wants it, without what is blank."""
    cells = []
    for text in texts:
        for old, new in REPLACED.items():
            text = text.replace(old, new)
        if text.strip():
            cells.append(v4.new_code_cell(text.strip("\n")))
    return cells


def run(notebook: NotebookNode) -> None:
    """Execute a notebook as with ``--quick``, in a process of its own; raises what a cell raises."""
    from nbclient import NotebookClient

    if any('"--quick"' in cell["source"] for cell in notebook.cells):  # else it is quick as it is
        for cell in notebook.cells:
            cell["source"] = cell["source"].replace("parse_args([])", "parse_args(['--quick'])")
    where = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=600, resources=where, extra_arguments=["--log-level=ERROR"]).execute()


def main() -> None:
    """Write all notebooks, or run them, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="run them in their quick mode, and write nothing")
    parser.add_argument("names", nargs="*", help="some examples only")
    args = parser.parse_args()
    notebooks = {s.stem: notebook_of(s) for s in SCRIPTS if s.stem in args.names or not args.names}
    if not args.run:
        for name, notebook in notebooks.items():
            nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        return
    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        for name, _ in zip(notebooks, pool.map(run, notebooks.values())):
            print(f"{name}.ipynb ran: {time.perf_counter() - start:.0f} s after the start")


if __name__ == "__main__":
    main()
