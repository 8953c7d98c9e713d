"""What decides whether a way to compute features is right for a model."""

import pytest
import torch
from torch import nn

from laplace_ella.network import facts
from laplace_ella.network.functional import FunctionalModel


@pytest.fixture
def reference():
    model = FunctionalModel(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    return facts.Reference.of(model, torch.randn(2, 3, generator=torch.Generator().manual_seed(0)))


def compared(reference, gap, gap_of_others, of_outputs=0.0):
    def compare(of):
        off = gap if of is reference else gap_of_others
        return [((of.products * (1 + off), of.products), (of.f * (1 + of_outputs), of.f))]

    return compare


@pytest.mark.parametrize(
    ("gaps", "holds"),
    [
        ((0.0, 1.0), True),  # others are not asked
        ((3e-3, 0.0), True),  # an input at a kink
        ((3e-3, 3e-3), False),
        ((3e-2, 0.0), False),
        ((3e-3, 0.0, 3e-3), False),  # outputs have no kinks
    ],
)
def test_only_what_is_nearly_right_is_compared_for_other_inputs(reference, gaps, holds):
    assert facts._holds(compared(reference, *gaps), reference, torch.float32) is holds


def test_other_inputs_are_others(reference):
    others = reference.of_others()
    assert not torch.equal(others.products, reference.products)
    assert torch.equal(others.x[0], reference.x[0].roll(1))
    assert all(torch.equal(a, b) for a, b in zip(others.tangents.values(), reference.tangents.values()))


def test_a_reference_is_what_gradients_of_single_inputs_give(reference):
    module = reference.model.module
    u = reference.mixed(reference.cotangents)
    for x, cotangent, products in zip(reference.x, u, reference.products):
        grads = torch.autograd.grad(module(x) @ cotangent, list(module.parameters()))
        expected = sum(v.flatten(1) @ g.flatten() for v, g in zip(reference.tangents.values(), grads))
        torch.testing.assert_close(products, expected)
