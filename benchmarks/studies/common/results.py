"""Where studies keep their JSON, and how reports read it and write pages from it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.report import with_tables

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"
IMAGES = DOCS / "images"
COSTS = ROOT / "benchmarks" / "results"  # of benchmarks.run and the like

Found = dict[str, Any]


def results(study: str) -> Path:
    return ROOT / "benchmarks" / "studies" / study / "results"


def read(study: str, names: Iterable[str], prefix: str = "") -> Found:
    """Return the JSON of what was run, by name; what was not run is missing."""
    paths = {name: results(study) / f"{prefix}{name}.json" for name in names}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def save(path: Path | None, found: Found) -> None:
    """Write JSON, if it is to be written."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {os.path.relpath(path)}", flush=True)


def run_seeds(
    found: Found,
    n_seeds: int,
    run: Callable[[int], Found],
    scores: Callable[[Found], Found],
    path: Path | None,
) -> None:
    """Run all seeds; print the scores of each, and write."""
    start = time.perf_counter()
    for seed in range(n_seeds):
        found["seeds"].append(run(seed))
        found["environment"]["seconds"] = round(time.perf_counter() - start)
        print(text_of(f"seed {seed}", scores(found["seeds"][-1])), flush=True)
        save(path, found)


def text_of(title: str, scores: Found) -> str:
    """Return the scores of each method, numbers by their names, as text."""
    lines = [f"{title:60}" + "".join(f"{key[:9]:>10}" for key in next(iter(scores.values())))]
    return "\n".join(
        lines + [f"{name:60}" + "".join(f"{v:10.4g}" for v in row.values()) for name, row in scores.items()]
    )


def chosen(methods: Found, *keys: str) -> Found:
    """Return some of the scores of each method."""
    return {name: {key: row[key] for key in keys} for name, row in methods.items()}


def write_page(page: Path, script: str, found: Any, tables: dict[str, Callable[[Any], str]]) -> None:
    """Write a page's tables anew; ``script``, such as "quality/report.py", stands in their markers."""
    page.write_text(with_tables(page.read_text(), found, tables, f"studies/{script}"))
    print(f"{page.name}: {len(tables)} tables written")
