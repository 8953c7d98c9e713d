"""The README's complete example runs, and tables are what benchmarks and studies wrote."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import report

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


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_the_tables_of_costs_are_the_benchmarks(page):
    found, text = report.read(ROOT / "benchmarks/results"), page.read_text()
    assert report.with_tables(text, found, report.PAGES[page]) == text


STUDIES = ["quality", "regression", "ablations", "shift", "paper", "scaling"]


@pytest.mark.parametrize("script", ["quality.readme", *(f"{study}.report" for study in STUDIES)])
def test_the_tables_are_the_studies(script):
    study = importlib.import_module(f"benchmarks.studies.{script}")
    page = study.PAGE.read_text()
    script = f"studies/{script.replace('.', '/')}.py"
    assert report.with_tables(page, study.read(), study.TABLES, script) == page


def test_the_model_of_scaling_is_that_of_the_measurement():
    from benchmarks.studies.scaling import model
    from benchmarks.studies.scaling.report import read

    found = read()
    links = model.Links(**found["model"]["links"])
    assert json.loads(json.dumps(model.modelled(found["measured"], links))) == found["model"]


@pytest.mark.parametrize("study", STUDIES)
def test_studies_say_how_they_are_started(study, monkeypatch, capsys):
    from benchmarks.studies.common.start import start

    monkeypatch.setattr(sys, "argv", ["", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        start(f"benchmarks.studies.{study}")
    assert f"python -m benchmarks.studies.{study} run" in capsys.readouterr().out
