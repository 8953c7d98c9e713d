"""The study of landmarks: its ways to choose against dense twins, its exact covariance, and a run from end to end."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import assert_close
from torch import nn

pytest.importorskip("sklearn", reason="the study clusters with scikit-learn")

from benchmarks.studies.ablations import error, landmarks, report_landmarks, run, schemes
from benchmarks.studies.common.all_weights import jacobians

N, D, C, H, POOL, M = 29, 5, 3, 7, 23, 6


class Net(nn.Module):
    """Ends in ``fc``, as the studies' networks do."""

    def __init__(self, n_outputs=C):
        super().__init__()
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(D, H), nn.Tanh())
        self.fc = nn.Linear(H, n_outputs)

    def forward(self, x):
        return self.fc(self.hidden(x))


@pytest.fixture
def candidates():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Net().double().eval(), torch.randn(N, D, dtype=torch.float64)
    return schemes.Candidates.drawn(model, (x, torch.arange(N) % C), C, POOL, seed=1)


def gradients(candidates):
    """Return the gradients of the pool (POOL, P), one backward pass each."""
    weights, pool = list(candidates.model.parameters()), range(candidates.pool)
    found = [candidates.model(candidates.x[i : i + 1])[0, candidates.outputs[i]] for i in pool]
    return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(f, weights)]) for f in found])


def generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("block", [POOL, 8, 1])
def test_the_kernel_is_made_in_blocks(candidates, block):
    rows = gradients(candidates)
    found = schemes.kernel(candidates.model, candidates.x[:POOL], candidates.outputs[:POOL], block)
    assert_close(found, rows @ rows.T)
    assert_close(candidates.kernel, found)


@pytest.mark.parametrize("name", schemes.SCHEMES)
def test_all_choose_m_that_differ_again_and_again(candidates, name):
    chosen = [schemes.SCHEMES[name](candidates, M, generator()) for _ in range(2)]
    assert torch.equal(*chosen)
    assert len(set(chosen[0].tolist())) == M
    assert int(chosen[0].min()) >= 0
    assert int(chosen[0].max()) < (POOL if name in report_landmarks.OF_POOL else N)
    x, outputs = candidates.chosen(chosen[0])
    assert x.shape == (M, D)
    assert outputs.dtype == torch.int64


def outside(gram, chosen):
    """Return the diagonal of the Schur complement: squared norms outside the span of those chosen."""
    if not chosen:
        return gram.diagonal()
    inside = gram[:, chosen] @ torch.linalg.solve(gram[chosen][:, chosen], gram[chosen])
    return (gram - inside).diagonal()


def test_pivots_are_the_largest_outside_the_span(candidates):
    chosen = schemes.pivoted(candidates, M, generator()).tolist()
    for i, pivot in enumerate(chosen):
        assert pivot == int(outside(candidates.kernel, chosen[:i]).argmax())


def test_random_pivots_are_drawn_in_proportion_to_what_is_outside_the_span(candidates):
    seen, gram = [], candidates.kernel
    schemes.pivots(gram, M, lambda left: seen.append(left) or (5 * len(seen)) % POOL)
    for i, left in enumerate(seen):
        assert_close(left, outside(gram, [5, 10, 15, 20, 2, 7][:i]).clamp_min(0), atol=1e-12)
    weights = torch.zeros(POOL, dtype=torch.float64)
    weights[[2, 9]] = torch.tensor([1.0, 3.0], dtype=torch.float64)
    first = [
        int(schemes.randomly_pivoted(replace_kernel(candidates, weights.diag()), 1, g)[0])
        for g in map(torch.Generator().manual_seed, range(200))
    ]
    assert set(first) == {2, 9}
    assert 0.6 < first.count(9) / 200 < 0.9


def replace_kernel(candidates, gram):
    new = replace(candidates)
    new.__dict__["kernel"] = gram
    return new


def test_no_more_pivots_than_the_rank():
    rows = torch.randn(POOL, 4, dtype=torch.float64, generator=generator())
    assert len(schemes.pivots(rows @ rows.T, M, lambda left: int(left.argmax()))) == 4


def test_leverage_scores(candidates):
    gram, rank = candidates.kernel, 5
    ridge = torch.linalg.eigvalsh(gram)[:-rank].sum() / rank
    expected = (gram @ torch.linalg.inv(gram + ridge * torch.eye(POOL, dtype=gram.dtype))).diagonal()
    assert_close(schemes.leverage_scores(gram, rank), expected)


def test_balanced_and_clustered(candidates):
    assert candidates.y[schemes.balanced(candidates, M, generator())].bincount().tolist() == [2, 2, 2]
    far = 100.0 * (torch.arange(N) % M)[:, None] + torch.rand(N, 2, generator=generator())
    new = replace(candidates)
    new.__dict__["hidden"] = far
    assert sorted((schemes.clustered(new, M, generator()) % M).tolist()) == [*range(M)]
    new.__dict__["hidden"] = far * 0
    assert len(set(schemes.clustered(new, M, generator()).tolist())) == M, "each input once"


def test_the_exact_covariance_of_few_inputs(candidates):
    """As the dense matrix over all weights says."""
    x, test_x, scale = candidates.x[:4], candidates.x[10:13], 2.5
    G = scale * error.exact_curvature(candidates.model, x)
    J = jacobians(candidates.model, test_x)[1]
    precision = G / 3.0 + 0.7 * torch.eye(len(G), dtype=G.dtype)
    found = landmarks.Dual(candidates.model, x, scale, test_x).covariance(0.7, 3.0)
    assert_close(found, J @ torch.linalg.inv(precision) @ J.mT)
    a, b = torch.randn(2, 5, 37, generator=generator())
    assert_close(landmarks.products(a, b, width=8), a.double() @ b.double().T)


@pytest.fixture
def found(monkeypatch, tmp_path):
    """What two seeds of a tiny network write."""

    def digits(quick):
        made = generator()
        sizes = {"train": 120, "validation": 40, "test": 32}
        x = {key: torch.randn(n, D, dtype=torch.float64, generator=made) for key, n in sizes.items()}
        return {key: (x[key], x[key].argmax(1)) for key in sizes}

    monkeypatch.setattr(error, "digits", digits)
    monkeypatch.setattr(error, "TinyCNN", partial(Net, 10))
    case = replace(landmarks.CASES["digits"], M=(100,), K=(20,))
    monkeypatch.setitem(landmarks.CASES, "digits", case)
    written = []
    monkeypatch.setattr(run, "save", lambda path, found: written.append(json.loads(json.dumps(found))))
    common = ["--quick", "--seeds", "2", "--threads", str(torch.get_num_threads())]
    run.main(["--part", "landmarks", "--case", "digits", *common, "--out", str(tmp_path)])
    assert [len(one["seeds"]) for one in written] == [1, 2], "written after each seed"
    return written[-1]


def test_from_end_to_end(found):
    pool, (m,) = found["counts"]["pool"], found["M"]
    for seed in found["seeds"]:
        of = {(row["scheme"], row["M"]): row for row in seed["rows"]}
        assert set(of) == {*((name, m) for name in schemes.SCHEMES), ("uniform", pool)}
        for row in of.values():
            assert 0 < row["captured"] < 1
            assert 0 < row["retained"] < 1
            assert all(0 < e < 1 for e in row["errors"]), "an ELLA covariance is within the exact one"
            assert all(0 < row["methods"][name]["nll"] < 3 for name in ("T", "T, s"))
        assert of["uniform", pool]["captured"] > of["uniform", m]["captured"], "more landmarks, a better span"
    table = report_landmarks.compared(found).splitlines()
    assert len(table) == 2 + len(schemes.SCHEMES) + 1
    assert all("±" in line for line in table[2:])
    assert [line.split(" | ")[2] for line in table[2:4]] == ["uniform", "balanced"]
    assert "exact covariance of all training images" in report_landmarks.setting(found)
    costs = report_landmarks.cost({"digits": found}).splitlines()
    assert len(costs) == 2 + len(schemes.SCHEMES)


def test_differences_are_paired_and_bold_where_they_are_not_noise():
    assert report_landmarks.difference([1.1, 2.1, 3.2], [1.0, 2.0, 3.0], ".2f") == "+0.13 ± 0.03"
    assert report_landmarks.difference([1.1, 2.1, 3.11], [1.0, 2.0, 3.0], ".2f") == "**+0.10 ± 0.00**"
    assert report_landmarks.difference([0.5], [1.0], ".2f") == "-0.50"
