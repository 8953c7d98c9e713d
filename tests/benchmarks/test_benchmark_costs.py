"""What the benchmark of costs makes of its measurements, on numbers and on a tiny network."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from benchmarks import inside, measure, report
from benchmarks.cases import ALL_CASES, QUICK_CASES, chunks
from benchmarks.problems import Tagger, samples
from laplace_ella import NystromGGN


def test_grid_has_what_is_cut_evenly():
    assert chunks.grid(6, 20, "contraction") == [(1, 20), (2, 20), (4, 20), (6, 20)]
    assert {b for b, _ in chunks.grid(8, 20, "forward")} == {1, 2, 4, 8}
    assert {d for _, d in chunks.grid(8, 20, "forward")} == {1, 2, 3, 4, 5, 7, 10, 20}


def test_chunks_like_the_chosen_ones_are_tried_first():
    cuts = sorted(chunks.grid(8, 20, "forward"), key=lambda cut: chunks.distance((4, 10), cut))
    assert cuts[:2] == [(4, 10), (4, 7)]
    assert cuts[-1] == (1, 1)


def test_the_fastest_are_compared_with_the_chosen_one():
    seconds = {(1, 1): 5.0, (1, 2): 3.0, (2, 1): 9.0, (2, 2): 1.0, (4, 2): 2.0}
    assert chunks.contenders(seconds, (2, 1)) == [(2, 1), (2, 2), (4, 2), (1, 2)]
    assert chunks.contenders({(2, 1): 1.0}, (2, 1)) == [(2, 1)], "nothing else was tried"


def test_quick_runs_are_parts_of_long_ones():
    assert QUICK_CASES.keys() == ALL_CASES.keys()
    assert QUICK_CASES["chunks"].keys() < ALL_CASES["chunks"].keys()


def test_rounds_end_after_a_while_and_not_before_the_second(monkeypatch):
    now = iter(range(0, 10_000, 10))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(now))
    device = torch.device("cpu")
    calls = measure.interleaved({"a": lambda: None}, 9, device, clock=lambda: 0.0, within=1)
    assert len(calls["a"].seconds) == 2, "a warm-up and two rounds"
    calls = measure.interleaved({"a": lambda: None}, 9, device, clock=lambda: 0.0)
    assert len(calls["a"].seconds) == 9


@pytest.mark.parametrize(
    ("forward", "contraction", "expected"),
    [
        ({5: 10.0, 20: 40.0}, {5: 25.0, 20: 25.0}, "12"),
        ({5: 30.0, 20: 40.0}, {5: 25.0, 20: 25.0}, "below 5"),
        ({5: 10.0, 20: 20.0}, {5: 25.0, 20: 25.0}, "above 20"),
        ({5: 10.0}, {20: 25.0}, "not measured"),
    ],
)
def test_crossings_lie_on_lines_between_what_was_measured(forward, contraction, expected):
    assert report.crossing(forward, contraction) == expected


def row(group, case, value, **more):
    return measure.result(case, "", value, **more) | {"group": group}


def test_tables_of_ways_hold_the_count_and_the_choice():
    about = {"problem": "net", "C": 10, "chosen": "contraction", "predicted_crossover": None}
    values = {5: (10.0, 25.0), 20: (40.0, 26.0)}
    rows = [
        row("crossover", f"{way} {k}", value, mode=way, K=k, predicted=value + 1, **about)
        for k, pair in values.items()
        for way, value in zip(("forward", "contraction"), pair)
    ]
    runs = {"quick": {"results": rows}}
    assert "| net | 10 | 5 | **10**; 11 | 25; 26 | not measured | contraction |" in report.crossover(runs)
    assert "| net | 10 | 20 | 40; 41 | **26**; 27 | not measured | contraction |" in report.crossover(runs)
    assert "| net | 10 | never | 13 |" in report.crossings(runs)


def test_files_measured_before_there_was_a_count_are_written():
    rows = [
        row("crossover", f"{way}", value, mode=way, problem="net", C=1, K=5)
        for way, value in (("forward", 11.0), ("reverse", 6.0))
    ]
    runs = {"quick": {"results": rows}}
    assert "| net | 1 | 5 | 11 | not measured | **6** |  |" in report.crossover(runs)
    assert report.crossings(runs) == report.NOTHING


def test_tables_of_chunks_plans_and_latencies():
    failed = measure.failure("net, part", "", "stopped")
    fast = row("latency", "a", 1.5, problem="net", batch=8, method="MAP")
    slow = row("latency", "b", 30.0, problem="net", batch=8, method="ELLA")
    runs = {
        "quick_chunks": {
            "results": [row("chunks", "net", 1.1, target=1.2, chosen="8 x 20", best="4 x 20", tried="3 of 4")]
        },
        "plan": {"results": [row("plan", "fit", 1.25, planned_s=[1.0, 3.0], measured_s=[1.6])]},
        "quick_latency": {"results": [fast, slow, failed | {"group": "latency"}]},
    }
    assert "| net | 1.1; at most 1.2 | 8 x 20 | 4 x 20 | 3 of 4 |" in report.chunks(runs)
    assert "| fit | 1.25 | 2 | 1.6 |" in report.plans(runs)
    assert report.latency(runs).splitlines()[2:] == [
        "| net | 8 | 1.5 | 30 |",
        "| net, part |  | stopped |  |",
    ]
    for write in (report.chunks, report.plans, report.latency, report.crossover):
        assert write({}) == report.NOTHING


def recorded(bind, used, *args):
    compute = bind(*args)

    def run(x, chunks):
        used.append(chunks)
        return compute(x, chunks)

    return run


def test_chunks_are_overridden_and_then_chosen_again():
    torch.manual_seed(0)
    model = Tagger(3).eval()
    x = samples("tagger", 3, None)[0]
    for way in chunks.WAYS:
        backend = NystromGGN(model, "classification", autodiff=way)
        basis = inside.random_basis(backend, 4)
        expected = backend.features(x, basis)
        chosen = inside.chunks(backend, way, x, 4)
        used = []
        backend.engine.bound = partial(recorded, backend.engine.bound, used)
        found = inside.features_in_chunks(backend, way, x, basis, 2, 3)
        assert_close(found, expected)
        assert (used[0].inputs, used[0].directions) == (2, 3 if way == "forward" else 1)
        assert inside.chunks(backend, way, x, 4) == chosen


def test_counted_crossover_is_the_first_rank_at_which_contraction_is_cheaper():
    torch.manual_seed(0)
    backend = NystromGGN(Tagger(1).eval(), "regression")
    x = samples("tagger", 2, None)[0]
    k = inside.predicted_crossover(backend, x)
    lead = [
        inside.predicted(backend, x, rank, "forward") - inside.predicted(backend, x, rank, "contraction")
        for rank in (k - 1, k)
    ]
    assert lead[0] < 0 <= lead[1]
    assert inside.predicted_crossover(backend, x, most=k - 1) is None
    assert inside.mode(backend, x, k + 1) == "contraction"
