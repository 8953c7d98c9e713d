"""After Ctrl-C, and after any error: the model, torch and the next call are as if the call had not been made."""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import GeneratorType
from typing import Any

import pytest
import torch
from anywhere import Interrupting, ctrl_c, free, points
from helpers import C, D, H, build, fitted, inputs, targets
from interrupting import Ending
from torch import Tensor, nn
from untouched import Untouched, process_flags

from laplace_ella.network import interrupts
from laplace_ella.network.memory import Chunks, OutOfMemory, attempt, with_smaller_chunks
from laplace_ella.network.module_state import ModuleState
from laplace_ella.network.safety import LOCK, safely
from laplace_ella.posterior.residual import kernels

pytestmark = pytest.mark.filterwarnings("ignore:fit.. was interrupted")

# In these modules every line is tried: they are what changes things, and restores them.
CRITICAL = (
    "laplace_ella.network.safety",
    "laplace_ella.network.interrupts",
    "laplace_ella.network.module_state",
    "torch.nn.utils.stateless",
    "contextlib",
)
X, DATA = inputs(6), [(inputs(8), targets("classification", 8))]


class Storing(nn.Module):
    """Keeps tensors of its forward pass, has buffers, and parts in different modes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(D, H), nn.BatchNorm1d(H), nn.Linear(H, C)
        self.dropout = nn.Dropout(0.5)
        self.hidden: Tensor | None = None
        self.scale = torch.ones(())
        self.called: Callable[[], Any] = lambda: None
        self.double().train()
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.called()
        self.scale = x.abs().max()
        self.hidden = self.norm(self.first(x)).tanh()
        return self.last(self.dropout(self.hidden))


def new(model: nn.Module, data: Any = DATA, **options: Any) -> Any:
    la = build(model=model, subsample_size=6, n_eigenvalues=3, **options)
    la.fit(data)
    return la


def loaded() -> Iterator[Any]:
    for batch in DATA:
        x, y = batch
        yield x, y


CALLS: dict[str, Callable[[Any], Any]] = {
    "forward": lambda la: la.backend.engine.forward(X),
    "last layer": lambda la: la.backend.engine.last_layer_norms(X),
    "prediction": lambda la: la(X),
    "prediction with a graph": lambda la: la(X.clone().requires_grad_()),
    "gradient rows": lambda la: kernels(la.backend.engine, X),
    "fit": lambda la: new(la.model, loaded()),
}


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Python can only report, as nobody is there to catch it."""
    found: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: found.append(unraisable.object))
    return found


def check(la: Any, name: str, lost: list[Any], most: int, lines: tuple[str, ...], interrupt: Any) -> None:
    """Interrupt a call at many points, looking at what it leaves while the traceback is still there."""
    untouched = Untouched(la.model)
    CALLS[name](la)  # torch loads some of its parts at their first use
    numbers = points(lambda: CALLS[name](la), lines)
    for number in random.Random(name).sample(numbers[:-1], min(most, len(numbers) - 1)):
        interrupting, raised = Interrupting(number, lines, interrupt), None
        try:
            with interrupting.on():
                CALLS[name](la)
        except KeyboardInterrupt as error:
            raised = error
        assert interrupting.where
        untouched.check(interrupting.where)
        assert free(), interrupting.where
        # Closing a generator that nobody needs any more starts at no function: the tool sees one, signals do not.
        assert raised or any(isinstance(one, GeneratorType) for one in lost), interrupting.where
        lost.clear()
    expected = new(Storing(), enable_backprop=la.enable_backprop)
    assert torch.equal(la(X), expected(X)), "predictions go on"
    la.fit(DATA)
    assert torch.equal(la.H, expected.H), "and fits"


ANYWHERE = {"forward": 150, "last layer": 100, "prediction": 150, "prediction with a graph": 60}
ANYWHERE |= {"gradient rows": 60, "fit": 20}
AT_LINES = {"forward": 1000, "prediction": 150, "fit": 20}
TRIED = [*((name, (), most) for name, most in ANYWHERE.items())]
TRIED += [(name, CRITICAL, most) for name, most in AT_LINES.items()]


@pytest.mark.parametrize(("name", "lines", "most"), TRIED)
def test_ctrl_c_anywhere_leaves_all_as_it_was(name, lines, most, lost):
    la = new(Storing(), enable_backprop=name == "prediction with a graph")
    check(la, name, lost, most, lines, ctrl_c)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("name", "most"), [("prediction", 100), ("gradient rows", 30), ("fit", 40)])
def test_an_interrupt_at_any_line_of_model_or_loader_leaves_all_as_it_was(name, most, lost):
    check(new(Storing()), name, lost, most, (__name__,), interrupt)


@pytest.mark.parametrize("at", [0, 1])
def test_ctrl_c_before_a_first_fit_leaves_an_unfitted_estimator(at):
    """While the first batch is read, or the second."""
    la = build(model=Storing())
    with pytest.raises(KeyboardInterrupt):
        la.fit(Ending(DATA * 2, at, KeyboardInterrupt))
    assert (la.H, la.temperature) == (None, 1.0)
    with pytest.raises(AttributeError, match="fit"):
        la(X)
    la.fit(DATA)
    assert torch.equal(la.H, fitted(model=Storing(), data=DATA).H)


def steps(n_signals: int, done: list[int]) -> None:
    """Do three chunks of work, in the first of which the signal comes."""

    def work(chunks: Chunks) -> None:
        for _ in range(n_signals if not done else 0):
            ctrl_c()
        done.append(1)

    for _ in range(3):
        with_smaller_chunks(work, Chunks(1, 1), torch.device("cpu"), lambda chunks: 0)


@pytest.mark.parametrize(("n_signals", "n_done"), [(0, 3), (1, 1), (2, 0)])
def test_ctrl_c_waits_for_a_chunk_and_a_second_one_does_not(n_signals, n_done):
    done: list[int] = []
    before = process_flags()
    with pytest.raises(KeyboardInterrupt) if n_signals else nullcontext():
        safely(Storing(), lambda: steps(n_signals, done))
    assert len(done) == n_done
    assert process_flags() == before
    assert safely(Storing(), lambda: 3) == 3, "nothing waits any more"


def test_an_error_does_not_hide_ctrl_c():
    def work() -> None:
        ctrl_c()
        raise ValueError("of the model")

    with pytest.raises(KeyboardInterrupt) as raised:
        safely(Storing(), work)
    assert str(raised.value.__context__) == "of the model"


@pytest.mark.parametrize("nested", [False, True])
def test_a_handler_of_the_programs_own_is_called_at_the_end(nested):
    seen, model = [], Storing()

    def work() -> int:
        ctrl_c()
        assert not seen
        return 3

    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append((number, frame is None)))
    try:
        assert safely(model, (lambda: safely(model, work)) if nested else work) == 3
        assert seen == [(signal.SIGINT, False)]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert safely(model, lambda: ctrl_c() or 4) == 4
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def raising(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("kind", [KeyboardInterrupt, TimeoutError, OutOfMemory])
def test_an_attempt_that_is_cut_off_says_nothing_of_the_model(kind):
    with pytest.raises(kind):
        attempt(lambda: raising(kind()))
    error = RuntimeError("of the model")
    assert attempt(lambda: raising(error)) == (None, error)
    assert attempt(lambda: 3) == (3, None)


@pytest.mark.parametrize("number", range(1, 12, 2))
def test_a_time_out_during_probing_ends_the_fit(number):
    model = Storing()
    calls = iter(range(1, 1000))
    model.called = lambda: raising(TimeoutError()) if next(calls) == number else None
    with pytest.raises(TimeoutError):
        new(model)


def test_what_cannot_be_restored_keeps_nobody_waiting(monkeypatch):
    before = process_flags()
    monkeypatch.setattr(ModuleState, "restore", lambda state: raising(ValueError("cannot be restored")))
    with pytest.raises(ValueError, match="cannot be restored"):
        safely(Storing(), lambda: None)
    assert free()
    assert process_flags() == before


@pytest.mark.parametrize("nested", [False, True])
def test_the_lock_is_held_as_often_as_before(nested):
    model = Storing()
    with LOCK:
        with pytest.raises(KeyboardInterrupt):
            safely(model, lambda: safely(model, interrupt) if nested else interrupt())
        assert LOCK._is_owned()
        assert not free()
    assert free()


def change_everything(model: Storing) -> None:
    """Do to a module what a forward pass, or one that was cut short, may do."""
    first = model.first
    first._parameters["weight"] = first.weight.detach().clone()  # what functional_call puts there
    first._parameters["new"] = nn.Parameter(torch.ones(2))
    del first._parameters["bias"]
    model.norm._buffers["running_mean"] = torch.zeros(H)
    model.norm.register_buffer("mask", torch.ones(3))
    model.dropout.train()
    model.hidden, model.other = torch.ones(2), torch.ones(3)
    del model.scale
    model.kept["x"], model.count = torch.ones(2), 3
    model.listed.append(torch.ones(2))
    torch.set_grad_enabled(not torch.is_grad_enabled())
    torch.backends.cuda.enable_flash_sdp(True)
    torch.set_autocast_cache_enabled(True)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("enable_backprop", [False, True])
def test_what_an_action_changes_is_restored(inference, enable_backprop):
    model = Storing()
    model.kept, model.listed, model.count = {}, [], 0
    users = model.last.register_forward_hook(lambda *_: None)
    untouched = Untouched(model)

    def action() -> None:
        assert not any(m.training for m in model.modules())
        assert torch.is_grad_enabled() == enable_backprop
        assert not torch.is_inference_mode_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.mha.get_fastpath_enabled()
        assert not torch.is_autocast_cache_enabled()
        change_everything(model)

    with torch.inference_mode(inference):
        before = process_flags()
        safely(model, action, enable_backprop)
        assert process_flags() == before
    untouched.check()
    assert (model.hidden, model.kept, model.listed, hasattr(model, "other")) == (None, {}, [], False)
    assert model.count == 3, "a count may go on"
    assert users.id in model.last._forward_hooks


def test_modes_that_are_properties():
    """As those of TorchScript's modules are."""
    modes = {}

    class Elsewhere(nn.Module):
        training = property(lambda m: modes.get("now", True), lambda m, value: modes.update(now=value))

    model = Elsewhere().train()
    state = ModuleState([model])
    state.evaluate()
    assert not model.training
    state.restore()
    assert model.training


def test_hooks_of_the_users_stay_though_a_forward_pass_added_them():
    model = Storing()
    handles: list[Any] = []
    model.called = lambda: handles.append(model.last.register_forward_hook(lambda *_: None))
    build(model=model).backend.engine.forward(X)
    assert [h.id for h in handles] == list(model.last._forward_hooks)


def test_modes_of_the_callers_stay_entered():
    with torch.device("cpu"), torch.autograd.forward_ad.dual_level(), torch.enable_grad():
        before = process_flags()
        safely(Storing(), lambda: None)
        assert process_flags() == before


def test_a_ctrl_c_that_was_raised_is_not_raised_again(monkeypatch):
    la = new(Storing())
    # As a second one leaves it that comes while the first is raised.
    monkeypatch.setattr(interrupts, "_waiting", [None])
    la(X)
