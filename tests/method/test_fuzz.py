"""Random configurations against a dense oracle: a minute of them, or as many as LAPLACE_ELLA_FUZZ says.

What fails prints the line that repeats it alone; ``python tests/support/fuzz.py --help`` for more.
"""

from __future__ import annotations

import os
from functools import partial

import fuzz
import fuzz_networks
import pytest
import torch
from fuzz_configs import TOLERANCE, draw_config

from laplace_ella import ELLALaplace

COUNT = int(os.environ.get("LAPLACE_ELLA_FUZZ", "120"))
SEED = int(os.environ.get("LAPLACE_ELLA_FUZZ_SEED", "0"))
TOGETHER = 10
# Of seed 0: configurations that say something of every answer.
TRIED = range(12)


@pytest.mark.parametrize("start", range(0, COUNT, TOGETHER))
def test_random_configurations_agree_with_a_dense_oracle(start):
    found, failures = [], []
    for number in range(start, min(start + TOGETHER, COUNT)):
        try:
            found.append(fuzz.run(SEED, number))
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, "\n\n".join(["disagreements:", *failures])
    assert found.count("agrees") >= len(found) / 2, found


def test_configurations_are_repeatable_and_of_every_kind():
    first, again = (draw_config(5, 3) for _ in range(2))
    assert str(first) == str(again)
    for (x, y), (x_again, y_again) in zip(first.batches, again.batches):
        assert torch.equal(y, y_again)
        assert isinstance(x, dict) or torch.equal(x, x_again)
    many = [draw_config(0, number) for number in range(100)]
    assert {c.network.family for c in many} == set(fuzz_networks.FAMILIES)
    assert {c.dtype for c in many} == set(TOLERANCE)
    assert {c.likelihood for c in many} == {"classification", "regression", "bernoulli", "reward_modeling"}
    assert {c.options.get("residual") for c in many} == {None, "none", "isotropic", "exact"}
    assert {c.options.get("autodiff") for c in many} == {None, "auto", "forward", "double", "reverse"}
    assert {len(c.parts) for c in many} == {1, 2}
    assert any(c.spills for c in many)
    assert any(c.network.positions for c in many)


def scaled(value):
    return tuple(map(scaled, value)) if isinstance(value, tuple) else value * 1.01


# What an estimator answers, all of which the oracle must see a wrong number in.
WRONG = ["H", "loss", "features", "functional_variance", "log_marginal_likelihood", "__call__"]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_number_is_noticed(monkeypatch, name):
    answer = getattr(ELLALaplace, name, None)
    if callable(answer):
        monkeypatch.setattr(ELLALaplace, name, lambda *args, **options: scaled(answer(*args, **options)))
    else:
        fitted = fuzz.fitted

        def altered(*args):
            la = fitted(*args)
            setattr(la, name, scaled(getattr(la, name)))
            return la

        monkeypatch.setattr(fuzz, "fitted", altered)
    with pytest.raises(AssertionError, match=r"python tests/support/fuzz\.py --seed 0 --only \d+"):
        list(map(partial(fuzz.run, 0), TRIED))
