"""What benchmarks put into tables, and what they refuse to add to a file."""

import importlib
import sys
from pathlib import Path

import pytest


@pytest.fixture
def of_benchmarks(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    return importlib.import_module


def seed(nll, **more):
    methods = {name: {"nll": nll} for name in ("MAP", "temperature scaling")}
    return {"methods": methods | more, "novelty": {}, "times": {}}


def test_numbers_measured_otherwise_are_not_added(of_benchmarks):
    run = of_benchmarks("run")
    alike = dict.fromkeys(run.SAME_IN_A_FILE, "one")
    run.require_same_settings({**alike, "commit": "a"}, {**alike, "commit": "b"})
    with pytest.raises(SystemExit, match=r"measured with threads one; this run has threads two\. Nothing"):
        run.require_same_settings(alike, {**alike, "threads": "two"})
    with pytest.raises(SystemExit, match="with torch None"):
        run.require_same_settings({k: v for k, v in alike.items() if k != "torch"}, alike)


def test_costs_are_said_to_be_from_where_they_were_measured_last(of_benchmarks):
    costs = {
        "environment": {"commit": "first"},
        "added": [
            {"commit": "second", "only": ["costs-a", "costs-b"]},
            {"commit": "third", "only": ["costs-b"]},
        ],
        "results": [{"group": group} for group in ("costs-c", "costs-b", "costs-a", "tuning")],
    }
    where = of_benchmarks("cost_tables").where({"a": "A", "b": "B", "c": "C", "d": "D"}, costs)
    assert where.splitlines()[0] == "|  | A | B | C |"
    assert "| commit | second | third | first |" in where


def test_costs_that_were_not_measured(of_benchmarks):
    tables = of_benchmarks("cost_tables")
    assert tables.where({"a": "A"}, None) == tables.NOTHING
    assert tables.where({"a": "A"}, {"environment": {}, "results": [{"group": "tuning"}]}) == tables.NOTHING
    assert tables.costs_of_methods("a", {"results": []}) == tables.NOTHING


def test_searches_cost_what_a_hundred_values_do(of_benchmarks):
    stages = {"fit": {"value": 3.0}, "grid search": {"value": 4.0, "candidates": 2}}
    cell = of_benchmarks("cost_tables").stage_cell
    assert [cell(stages, stage) for stage in ("fit", "grid search", "joint search")] == ["3", "200", ""]


def test_notes_are_said_once(of_benchmarks):
    single = of_benchmarks("quality_report")._single
    assert single(["Edge.  Better: x.", "Edge.", "Better: x.", "Edge."]) == ["Edge.", "Better: x."]
    assert single(["Edge. And more.", "Edge."]) == ["Edge. And more.", "Edge."], "says more"
    assert single([]) == []


def test_methods_join_a_seed_of_the_same_network(of_benchmarks):
    add = of_benchmarks("quality").add
    before = seed(0.5, KFAC={"nll": 0.4}) | {"novelty": {"energy": 1, "ELLA novelty": 2}}
    more = seed(0.50001, KFAC={"nll": 0.3}, ELLA={"nll": 0.2}) | {"novelty": {"energy": 3, "ELLA novelty": 4}}
    add(before, more)
    assert {name: row["nll"] for name, row in before["methods"].items()} == {
        "MAP": 0.5,
        "temperature scaling": 0.5,
        "KFAC": 0.3,
        "ELLA": 0.2,
    }
    assert before["novelty"] == {"energy": 1, "ELLA novelty": 4}


def test_methods_of_another_network_are_refused(of_benchmarks):
    before = seed(0.5)
    with pytest.raises(SystemExit, match=r"was 0\.50000 and is 0\.60000: these are other networks"):
        of_benchmarks("quality").add(before, seed(0.6, ELLA={"nll": 0.2}))
    assert before == seed(0.5)
