"""Random configurations against a dense oracle: a minute of them, or as many as LAPLACE_ELLA_FUZZ says.

What fails prints the line that repeats it alone; ``python tests/fuzz.py --help`` for more.
"""

from __future__ import annotations

import os
from functools import partial

import fuzz
import fuzz_networks
import pytest
import torch

from laplace_ella import NystromGGN
from laplace_ella.nystrom import basis
from laplace_ella.posterior import gaussian as posterior
from laplace_ella.posterior import links

COUNT = int(os.environ.get("LAPLACE_ELLA_FUZZ", "120"))
SEED = int(os.environ.get("LAPLACE_ELLA_FUZZ_SEED", "0"))
TOGETHER = 10
# Of seed 0: configurations that say something of every mutant.
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
    first, again = (fuzz.draw_config(5, 3) for _ in range(2))
    assert str(first) == str(again)
    for (x, y), (x_again, y_again) in zip(first.batches, again.batches):
        assert torch.equal(y, y_again)
        assert isinstance(x, dict) or torch.equal(x, x_again)
    many = [fuzz.draw_config(0, number) for number in range(100)]
    assert {c.network.family for c in many} == set(fuzz_networks.FAMILIES)
    assert {c.dtype for c in many} == set(fuzz.TOLERANCE)
    assert {c.likelihood for c in many} == {"classification", "regression", "bernoulli", "reward_modeling"}
    assert {c.options.get("residual") for c in many} == {None, "none", "isotropic", "exact"}
    assert {c.options.get("autodiff") for c in many} == {None, "auto", "forward", "double", "reverse"}
    assert {len(c.parts) for c in many} == {1, 2}
    assert any(c.spills for c in many)
    assert any(c.network.positions for c in many)


def _scaled(function, factor):
    return lambda *args, **kwargs: function(*args, **kwargs) * factor


MUTANTS = {
    "G": (NystromGGN, "curvature", lambda f: _scaled(f, 1.01)),
    "scale of the posterior": (posterior, "posterior_scale", lambda f: _scaled(f, 1.01)),
    "probit": (links, "probit", lambda f: lambda outputs, link: link(outputs.mean)),
    "eigenvectors": (basis, "_leading_eigenpairs", lambda f: lambda *a: (f(*a)[0], f(*a)[1].flip(0))),
    "whitening": (posterior, "whiten", lambda f: lambda phi, scale: f(phi, scale.mT)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_equation_is_noticed(monkeypatch, name):
    place, attribute, mutant = MUTANTS[name]
    monkeypatch.setattr(place, attribute, mutant(getattr(place, attribute)))
    with pytest.raises(AssertionError, match=r"python tests/fuzz\.py --seed 0 --only \d+"):
        list(map(partial(fuzz.run, 0), TRIED))
