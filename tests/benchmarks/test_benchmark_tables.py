"""What benchmarks put into tables, and what they refuse to add to a file."""

import re
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.studies.common import tables
from benchmarks.studies.quality import costs
from benchmarks.studies.quality.run import add


def seed(nll, **more):
    methods = {name: {"nll": nll} for name in ("MAP", "temperature scaling")}
    return {"methods": methods | more, "novelty": {}, "times": {}}


def test_numbers_measured_otherwise_are_not_added():
    alike = dict.fromkeys(run.SAME_IN_A_FILE, "one")
    run.require_same_settings({**alike, "commit": "a"}, {**alike, "commit": "b"})
    with pytest.raises(SystemExit, match=r"measured with threads one; this run has threads two\. Nothing"):
        run.require_same_settings(alike, {**alike, "threads": "two"})
    with pytest.raises(SystemExit, match="with torch None"):
        run.require_same_settings({k: v for k, v in alike.items() if k != "torch"}, alike)


def test_costs_are_said_to_be_from_where_they_were_measured_last():
    added = [{"commit": "second", "only": ["costs-a", "costs-b"]}, {"commit": "third", "only": ["costs-b"]}]
    results = [{"group": group} for group in ("costs-c", "costs-b", "costs-a", "tuning")]
    found = {"environment": {"commit": "first"}, "added": added, "results": results}
    where = costs.where({"a": "A", "b": "B", "c": "C", "d": "D"}, found)
    assert where.splitlines()[0] == "|  | A | B | C |"
    assert "| commit | second | third | first |" in where
    assert costs.where({"a": "A"}, None) == costs.NOTHING
    assert costs.where({"a": "A"}, {"environment": {}, "results": [{"group": "tuning"}]}) == costs.NOTHING
    assert costs.costs_of_methods("a", {"results": []}) == costs.NOTHING


def test_searches_cost_what_a_hundred_values_do():
    stages = {"fit": {"value": 3.0}, "grid search": {"value": 4.0, "candidates": 2}}
    cells = [costs.stage_cell(stages, stage) for stage in ("fit", "grid search", "joint search")]
    assert cells == ["3", "200", ""]


def test_notes_are_said_once():
    assert tables._single(["Edge.  Better: x.", "Edge.", "Better: x.", "Edge."]) == ["Edge.", "Better: x."]
    assert tables._single(["Edge. And more.", "Edge."]) == ["Edge. And more.", "Edge."], "says more"
    assert tables._single([]) == []


def test_methods_join_a_seed_of_the_same_network_alone():
    before = seed(0.5, KFAC={"nll": 0.4}) | {"novelty": {"energy": 1, "ELLA novelty": 2}}
    more = seed(0.50001, KFAC={"nll": 0.3}, ELLA={"nll": 0.2}) | {"novelty": {"energy": 3, "ELLA novelty": 4}}
    add(before, more)
    found = {name: row["nll"] for name, row in before["methods"].items()}
    assert found == {"MAP": 0.5, "temperature scaling": 0.5, "KFAC": 0.3, "ELLA": 0.2}
    assert before["novelty"] == {"energy": 1, "ELLA novelty": 4}
    with pytest.raises(SystemExit, match=r"was 0\.50000 and is 0\.60000: these are other networks"):
        add(before, seed(0.6, ELLA={"nll": 0.7}))
    assert before["methods"]["ELLA"]["nll"] == 0.2


def test_studies_use_public_names():
    folder = Path(run.__file__).parent / "studies"
    inner = re.compile(r"(from|import) laplace_ella\.|laplace_ella\._|benchmarks import inside")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*.py") if inner.search(path.read_text())}
    assert found == {"ablations/cost.py", "scaling/run.py"}, "these measure the steps of a fit, by inside.py"
