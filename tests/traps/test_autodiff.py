"""What torch cannot differentiate in one way is differentiated in another, and said; wrong derivatives are refused."""

from __future__ import annotations

import pytest
import torch
from awkward import OldCube, Transformed, WrongJvp, X, check_features, fitted_with_warnings, halved_gradient
from helpers import N_TEST, C, D, H, build, fitted, inputs, mlp, train_loader
from torch import nn
from torch.nn import functional as F

from laplace_ella import NystromGGN


def distances(h):
    return torch.cdist(h, torch.eye(D, dtype=h.dtype))


def test_what_no_transform_takes_is_done_in_blocks_too():
    la, texts = fitted_with_warnings(Transformed(OldCube.apply), inputs(), memory_budget=5_000)
    assert la.backend.support(X).gradients == "loop"
    assert len(texts) == 2
    torch.testing.assert_close(la(X), fitted(model=Transformed(lambda h: h**3))(X))
    assert all(p.grad is None for p in la.model.parameters())


def test_what_a_model_supports_is_found_out_once_and_said_with_operator_and_cost():
    tries = []

    def once(h):
        tries.append(1)
        return distances(h)

    la, texts = fitted_with_warnings(Transformed(once), inputs())
    assert "cdist" in texts[0]
    assert "instead of 1 + 2 K forward passes" in texts[0] or "1 + 4 C" in texts[0]
    tries.clear()
    la.features(X)
    assert len(tries) <= N_TEST + 1  # one forward pass a row at most, and no failed attempt
    support = la.backend.support(X)
    la.load_state_dict(la.state_dict())
    with pytest.warns(UserWarning, match="forward mode"):
        assert la.backend.support(X) == support


def test_out_of_memory_is_no_reason_to_fall_back():
    def full(h):
        if h.requires_grad or torch._C._functorch.maybe_current_level() is not None:
            raise torch.cuda.OutOfMemoryError("no room")
        return h

    la = build(model=Transformed(full))
    with pytest.raises(torch.cuda.OutOfMemoryError, match="no room"):
        la.fit(train_loader())
    assert la.H is None


def test_a_mode_that_does_not_work_is_an_error():
    la = build(model=Transformed(distances), autodiff="forward")
    with pytest.raises(ValueError, match=r"autodiff='forward' cannot.*cdist"):
        la.fit(train_loader())
    assert la.H is None


@pytest.mark.filterwarnings("ignore:.*one by one")  # a row has no statistics
def test_statistics_of_the_batch_are_warned_of():
    model = nn.Sequential(
        nn.Linear(D, H), nn.BatchNorm1d(H, track_running_stats=False), nn.Linear(H, C)
    ).double()
    with pytest.warns(UserWarning, match=r"depend on the other rows of a batch: 1 "):
        NystromGGN(model, "classification").support(X)


@pytest.mark.parametrize("function", [halved_gradient, WrongJvp.apply], ids=["no_grad", "wrong jvp"])
def test_forward_and_reverse_that_disagree(function):
    la = build(model=Transformed(function))
    with pytest.raises(ValueError, match="Forward and reverse mode disagree"):
        la.fit(train_loader())
    assert la.H is None
    check_features(fitted(model=Transformed(function), autodiff="reverse"), X)
    with pytest.raises(ValueError, match="Forward and reverse mode disagree"):
        fitted(model=Transformed(function).half(), data=train_loader(dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_no_disagreement(dtype):
    model = nn.Sequential(*[m for _ in range(10) for m in (nn.Linear(D, D), nn.ReLU())], nn.Linear(D, C))
    fitted(model=model.to(dtype), data=train_loader(dtype=dtype), n_eigenvalues=1)


def test_features_keep_no_graph_of_the_weights():
    seen, model = [], mlp()
    model[1].register_forward_hook(
        lambda m, a, out: seen.append((out.requires_grad, torch.is_grad_enabled()))
    )
    with torch.enable_grad():
        la = fitted(model=model, autodiff="forward")
        seen.clear()
        phi, f = la.features(X.clone().requires_grad_())
    assert not phi.requires_grad
    assert not f.requires_grad
    assert seen
    assert not any(flag for pair in seen for flag in pair)


def test_the_warning_of_torch_is_on_afterwards():
    def unpooled(h):
        pooled, index = F.max_pool1d(h[:, None, :4], 2, return_indices=True)
        return F.pad(F.max_unpool1d(pooled, index, 2)[:, 0], (0, 1))

    fitted_with_warnings(Transformed(unpooled), inputs())
    with pytest.warns(UserWarning, match="performance drop"):
        torch.func.vmap(unpooled)(torch.randn(2, 3, D))
