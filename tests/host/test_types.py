"""What type checkers know of the factory's results: `make types` reads this file, and pytest runs it."""

from __future__ import annotations

import pytest
from torch import nn
from typing_extensions import assert_type

import laplace_ella
from laplace_ella import ELLALaplace


def test_the_factory_gives_an_ella_with_its_own_methods() -> None:
    model = nn.Linear(2, 3)
    by_name = laplace_ella.Laplace(model, subset_of_weights="all", hessian_structure="ella")
    assert_type(by_name, ELLALaplace)
    by_position = laplace_ella.Laplace(model, "regression", "all", "ella", 0.5, n_eigenvalues=3)
    assert_type(by_position, ELLALaplace)
    for la in (by_name, by_position):
        assert isinstance(la, ELLALaplace)
        with pytest.raises(AttributeError, match="fit"):
            la.optimize_hyperparameters([(model.weight[:, :2], model.bias)])
