"""An interrupt is an interrupt, also where torch would tell of it by an error of its own."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading

import pytest
import torch
from helpers import build, inputs, mlp, targets
from torch import nn
from torch.autograd import forward_ad
from torch.utils.data import DataLoader, TensorDataset

from laplace_ella.network.interrupts import contained
from laplace_ella.network.memory import OutOfMemory, attempt
from laplace_ella.network.safety import LOCK, safe_autodiff


def fit(model: nn.Module):
    torch.manual_seed(3)
    data = TensorDataset(inputs(24), targets("classification", 24))
    la = build(model=model, subsample_size=12, n_eigenvalues=4, curvature_size=None)
    la.fit(DataLoader(data, batch_size=8, shuffle=True))
    return la


class Entering:
    """Interrupts just after the n-th context was entered, before its ``with`` knows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.name = 0, ""
        enter = contextlib._GeneratorContextManager.__enter__

        def entered(manager):
            value = enter(manager)
            self.left -= 1
            if self.left == 0:
                self.name = manager.gen.__qualname__
                raise KeyboardInterrupt
            return value

        monkeypatch.setattr(contextlib._GeneratorContextManager, "__enter__", entered)

    def interrupt(self, n: int) -> str:
        """Fit until then, and return the context's name, or nothing if the fit ended before."""
        self.left, self.name = n, ""
        try:
            fit(mlp())
        except KeyboardInterrupt:
            assert self.name, "the interrupt is this one"
        else:
            assert not self.name, "it is not lost"
        finally:
            self.left = 0
        gc.collect()  # the traceback, which holds contexts of Python's that were entered like that
        return self.name


@pytest.fixture
def _short_collections():
    gc.freeze()  # what is there already
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_short_collections")
@pytest.mark.filterwarnings("ignore:fit.. was interrupted")
def test_interrupts_at_every_context(monkeypatch):
    whole = fit(mlp())
    # Python says on stderr what torch does not like about contexts that are left late.
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    entering, names, n = Entering(monkeypatch), set(), 0
    while name := entering.interrupt(n := n + 1):
        names.add(name)
        assert torch._C._functorch.peek_interpreter_stack() is None, name
        assert torch._C._len_torch_function_stack() == torch._C._len_torch_dispatch_stack() == 0, name
        assert torch.is_grad_enabled(), name
    assert {"vmap_increment_nesting", "grad_increment_nesting", "jvp_increment_nesting"} <= names
    after = fit(mlp())
    assert torch.equal(after.H, whole.H), "transforms work as before"
    assert free()


def failing(error: Exception, interrupt: BaseException | None):
    try:
        if interrupt is not None:
            raise interrupt
    finally:
        raise error


def test_errors_that_follow_an_interrupt():
    with pytest.raises(KeyboardInterrupt) as raised, contained():
        failing(RuntimeError("INTERNAL ASSERT FAILED"), KeyboardInterrupt())
    assert "INTERNAL ASSERT" in str(raised.value.__cause__), "what torch said is not lost"
    with pytest.raises(RuntimeError, match="of the model"), contained():
        failing(RuntimeError("of the model"), ValueError("another"))


@pytest.mark.parametrize("wrong", [RuntimeError("of the model"), OutOfMemory("of the model")])
def test_errors_while_an_interrupt_is_handled_are_errors(wrong):
    """Whoever trains until Ctrl-C may fit a posterior where they handle it."""
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(type(wrong), match="of the model"), contained():
            failing(wrong, None)


def test_an_error_that_is_its_own_cause():
    error = ValueError("of the model")
    with pytest.raises(ValueError, match="of the model"), contained():
        raise error from error


def hiding():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise RuntimeError("torch") from ValueError("another")


def test_an_interrupt_hides_behind_a_cause():
    with pytest.raises(KeyboardInterrupt), contained():
        hiding()


def entering():
    forward_ad.enter_dual_level()
    torch.set_grad_enabled(False)
    raise KeyboardInterrupt


def test_dual_levels_are_left():
    with pytest.raises(KeyboardInterrupt), contained():
        entering()
    assert forward_ad._current_level == -1
    assert torch.is_grad_enabled()


def test_no_lock_is_left():
    """An interrupt at the first instruction of leaving skips it."""
    context = safe_autodiff(mlp())
    context.__enter__()
    assert not free()
    del context
    assert free()


def free() -> bool:
    """Say whether another thread may take its turn."""
    found = []

    def try_to() -> None:
        found.append(LOCK.acquire(blocking=False))
        if found[0]:
            LOCK.release()

    thread = threading.Thread(target=try_to)
    thread.start()
    thread.join()
    return found[0]


def test_attempts_do_not_take_an_interrupt_for_a_failure():
    with pytest.raises(KeyboardInterrupt):
        attempt(lambda: failing(RuntimeError("torch"), KeyboardInterrupt()))
    found, error = attempt(lambda: failing(RuntimeError("torch"), None))
    assert found is None
    assert str(error) == "torch"
