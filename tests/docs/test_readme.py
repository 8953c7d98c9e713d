"""The README's complete example runs, and its cost table is what the benchmark wrote."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_ten_lines_run():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    names = {}
    exec(compile(blocks[1], "README.md", "exec"), names)
    probs = names["probs"]
    assert probs.shape == (397, 10)
    torch.testing.assert_close(probs.sum(-1), torch.ones(397))
    assert (probs.argmax(-1) == names["y"][1400:]).double().mean() > 0.8
    assert "retained trace" in repr(names["la"])


@pytest.fixture
def report(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module("report")


def test_the_cost_table_is_the_benchmarks(report):
    assert report.cost_table(report.read(ROOT / "benchmarks/results")) in README


def test_the_tables_on_performance_are_the_benchmarks(report):
    page = (ROOT / "docs/performance.md").read_text()
    assert report.with_tables(page, report.read(ROOT / "benchmarks/results")) == page


@pytest.mark.parametrize(
    ("page", "script"),
    [
        ("evidence", "quality_report"),
        ("regression", "regression_report"),
        ("ablations", "ablation_report"),
        ("robustness", "shift_report"),
        ("paper", "paper_report"),
        ("scaling", "scaling_report"),
        ("../README", "readme_report"),
    ],
)
def test_the_tables_are_the_benchmarks(report, page, script):
    module = importlib.import_module(script)
    text = (ROOT / f"docs/{page}.md").read_text()
    found = module.read(ROOT / "benchmarks/results")
    assert report.with_tables(text, found, module.TABLES, f"{script}.py") == text


def test_the_model_of_scaling_is_that_of_the_measurement(report):
    module = importlib.import_module("scaling_model")
    found = importlib.import_module("scaling_report").read(ROOT / "benchmarks/results")
    links = module.Links(**found["model"]["links"])
    assert json.loads(json.dumps(module.modelled(found["measured"], links))) == found["model"]
