"""Whatever interrupts a call, and wherever: the model, torch and the next call are as if it had not been made."""

from __future__ import annotations

import contextlib
import ctypes
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import GeneratorType
from typing import Any

import pytest
import torch
from anywhere import Interrupting, ctrl_c, free, module_state, points, process_state
from helpers import C, D, H, build, inputs, targets
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from laplace_ella.network import module_state as states
from laplace_ella.network.caches import Containers
from laplace_ella.network.interrupts import completed, interrupt_behind
from laplace_ella.network.memory import attempt
from laplace_ella.network.module_state import ModuleState, Watch
from laplace_ella.network.safety import LOCK, safe_autodiff, safely

# In these modules every line is tried: they are what exchanges, enters, leaves and restores.
CRITICAL = (
    "laplace_ella.network.safety",
    "laplace_ella.network.interrupts",
    "laplace_ella.network.module_state",
    "torch.nn.utils.stateless",
    "torch.nn.utils._named_member_accessor",
    "torch._functorch",
    "torch.autograd.forward_ad",
    "torch.autograd.grad_mode",
    "torch.overrides",
    "torch.utils._python_dispatch",
    "contextlib",
)


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


X, DATA = inputs(6), [(inputs(8), targets("classification", 8))]


def new(model: nn.Module, **options: Any) -> Any:
    la = build(model=model, subsample_size=6, n_eigenvalues=3, curvature_size=None, **options)
    la.fit(DATA)
    return la


def gradient_rows(la: Any) -> Any:
    return la.backend.output_grams(X)


CALLS: dict[str, Callable[[Any], Any]] = {
    "forward": lambda la: la.backend.forward(X),
    "last layer": lambda la: la.backend.last_layer_norms(X),
    "prediction": lambda la: la(X),
    "prediction with a graph": lambda la: la(X.clone().requires_grad_()),
    "gradient rows": gradient_rows,
    "fit": lambda la: new(la.model),
}


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What Python can only report, as nobody is there to catch it."""
    found: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: found.append(unraisable.object))
    yield found
    found.clear()


def interrupted(call: Callable[[], Any], interrupting: Interrupting, kind: type[BaseException]) -> bool:
    """Interrupt a call, and check what it leaves while its traceback is still there; False if it was over before."""
    try:
        with interrupting.on():
            call()
    except kind:
        if not interrupting.where:
            raise
        return True
    return False


def check_everywhere(
    la: Any,
    call: Callable[[], Any],
    numbers: list[int],
    lost: list[Any],
    lines: tuple[str, ...] = (),
    interrupt: Callable[[], Any] = ctrl_c,
    kind: type[BaseException] = KeyboardInterrupt,
) -> None:
    before = process_state(), module_state(la.model)
    for number in numbers:
        interrupting = Interrupting(number, lines, interrupt)
        raised = interrupted(call, interrupting, kind)
        assert process_state() == before[0], interrupting.where
        assert module_state(la.model) == before[1], interrupting.where
        assert free(), interrupting.where
        if interrupting.where and not raised:
            # Closing a generator that nobody needs any more starts at no function: the tool sees one, signals do not.
            assert any(isinstance(one, GeneratorType) for one in lost), interrupting.where
        lost.clear()


@pytest.mark.filterwarnings("ignore:fit.. was interrupted")
@pytest.mark.parametrize(
    ("name", "lines", "most"),
    [
        ("forward", (), 300),
        ("forward", CRITICAL, 1000),
        ("last layer", (), 150),
        ("prediction", (), 150),
        ("prediction", CRITICAL, 150),
        ("prediction with a graph", (), 60),
        ("gradient rows", (), 80),
        ("gradient rows", CRITICAL, 80),
        ("fit", (), 20),
        ("fit", CRITICAL, 20),
    ],
)
def test_an_interrupt_anywhere_leaves_all_as_it_was(name, lines, most, lost):
    model = Storing()
    la = new(model, enable_backprop=name == "prediction with a graph")

    def call() -> Any:
        return CALLS[name](la)

    call()  # torch loads some of its parts at their first use
    numbers = range(1, len(points(call, lines)) + 1)
    chosen = random.Random(name).sample(numbers, min(most, len(numbers)))
    check_everywhere(la, call, chosen, lost, lines)
    expected = new(Storing())
    assert torch.equal(la(X), expected(X)), "predictions go on"
    la.fit(DATA)
    assert torch.equal(la.H, expected.H), "and fits"
    assert torch.equal(la(X), expected(X))


def late(*_: Any) -> None:
    raise TimeoutError("too late")


@pytest.fixture
def _time_out() -> Iterator[None]:
    """A program of the user's that gives calls a limit of time."""
    before = signal.signal(signal.SIGALRM, late)
    yield
    signal.signal(signal.SIGALRM, before)


def alarm() -> None:
    signal.raise_signal(signal.SIGALRM)


@pytest.mark.usefixtures("_time_out")
@pytest.mark.parametrize("name", ["prediction", "fit"])
def test_time_outs_anywhere_are_not_taken_for_errors_of_the_model(name, lost):
    la = new(Storing())

    def call() -> Any:
        return CALLS[name](la)

    numbers = random.Random(name).sample(range(1, len(points(call)) + 1), 20)
    check_everywhere(la, call, numbers, lost, interrupt=alarm, kind=TimeoutError)


@pytest.mark.usefixtures("_time_out")
def test_an_attempt_that_times_out_says_nothing_of_the_model():
    with pytest.raises(TimeoutError):
        attempt(alarm)
    error = TimeoutError("of the model")
    assert attempt(lambda: raising(error, again=True)) == (None, error)


@pytest.mark.usefixtures("_time_out")
@pytest.mark.parametrize("number", range(1, 12))
def test_a_time_out_during_probing_ends_the_fit(number):
    model = Storing()
    calls = iter(range(1, 1000))
    model.called = lambda: alarm() if next(calls) == number else None
    with pytest.raises(TimeoutError):
        new(model)


@pytest.mark.filterwarnings("ignore:fit.. was interrupted")
@pytest.mark.parametrize("number", [1, 2, 3, 5, 8, 13, 17])
def test_a_signal_inside_the_model(number):
    model = Storing()
    before, calls = (process_state(), module_state(model)), iter(range(1, 1000))
    model.called = lambda: ctrl_c() if next(calls) == number else None
    with pytest.raises(KeyboardInterrupt):
        new(model)
    assert (process_state(), module_state(model)) == before
    model.called = lambda: None
    assert torch.equal(new(model)(X), new(Storing())(X))


class Armed:
    """Raises KeyboardInterrupt at a timer's signal, only while told to."""

    def __init__(self) -> None:
        self.on = False

    def handle(self, *_: Any) -> None:
        if self.on:
            self.on = False
            raise KeyboardInterrupt


def test_timers(lost):
    la, armed, rng = new(Storing()), Armed(), random.Random(0)
    before = process_state(), module_state(la.model)
    previous = signal.signal(signal.SIGALRM, armed.handle)
    try:
        for _ in range(60):
            with contextlib.suppress(KeyboardInterrupt):
                armed.on = True
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 8e-3))
                for _ in range(8):
                    la(X)
                armed.on = False
            armed.on = False
            assert (process_state(), module_state(la.model)) == before
            assert free()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert torch.equal(la(X), new(Storing())(X))


def test_an_exception_set_from_outside_in_another_thread():
    model, raised = Storing(), []
    la = new(model)
    before = module_state(model)

    def interrupt() -> None:
        kind = ctypes.py_object(KeyboardInterrupt)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), kind)

    def work() -> None:
        model.called = interrupt
        try:
            la(X)
        except KeyboardInterrupt as error:
            raised.append((error, process_state()))

    thread = threading.Thread(target=work)
    expected = process_state()
    thread.start()
    thread.join()
    model.called = lambda: None
    assert raised[0][1] == expected
    assert module_state(model) == before
    assert LOCK.acquire(blocking=False)
    LOCK.release()


# ---------------------------------------------------------------------------- what is noted and restored


def test_a_step_is_run_until_it_came_to_its_end():
    left = [KeyboardInterrupt("first"), TimeoutError("second")]
    done = []

    def step() -> None:
        if left:
            raise left.pop(0)
        done.append(True)

    with pytest.raises(KeyboardInterrupt, match="first"):
        completed(step)
    assert done == [True]


def test_a_step_that_always_fails_is_given_up():
    def step() -> None:
        raise ValueError("always")

    with pytest.raises(ValueError, match="always"):
        completed(step)


def test_the_lock_is_free_though_something_cannot_be_restored(monkeypatch):
    def fail(self: ModuleState) -> None:
        raise ValueError("cannot be restored")

    model = Storing()
    with monkeypatch.context() as patch:
        patch.setattr(states.ModuleState, "restore", fail)
        with pytest.raises(ValueError, match="cannot be restored"):
            safely(model, lambda: None)
    assert free()


@pytest.mark.parametrize("nested", [False, True])
def test_the_lock_is_held_as_often_as_before(nested):
    model = Storing()
    with LOCK:
        with pytest.raises(KeyboardInterrupt):
            safely(model, lambda: safely(model, ctrl_c) if nested else ctrl_c())
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
    first.register_forward_hook(Watch([]))


def test_what_is_noted_of_a_module_is_restored():
    model = Storing()
    model.count = 0
    users = model.last.register_forward_hook(lambda *_: None)
    before, parameters = module_state(model), dict(model.named_parameters())
    state, containers = ModuleState(model.modules()), Containers(model.modules())
    state.evaluate()
    assert not any(m.training for m in model.modules())
    change_everything(model)
    model.count = 3
    state.restore()
    containers.restore()
    assert module_state(model) == before
    after = dict(model.named_parameters())
    assert all(after[k] is p for k, p in parameters.items())
    assert (model.hidden, model.count, hasattr(model, "other")) == (None, 3, False), "a count may go on"
    assert users.id in model.last._forward_hooks
    state.restore()
    containers.restore()
    assert module_state(model) == before


class Delegating(nn.Module):
    """Has its mode from its part, as compiled modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Dropout()

    @property
    def training(self) -> bool:
        return self.__dict__["_modules"]["part"].training

    @training.setter
    def training(self, value: bool) -> None:
        if "part" in self.__dict__.get("_modules", {}):
            self.part.training = value


def test_modes_that_are_properties():
    model = Delegating().train()
    state = ModuleState(model.modules())
    state.evaluate()
    assert not model.training
    state.restore()
    assert model.training
    assert model.part.training


def test_hooks_of_the_users_stay_though_a_forward_pass_added_them():
    model = Storing()
    handles: list[Any] = []
    model.called = lambda: handles.append(model.last.register_forward_hook(lambda *_: None))
    la = build(model=model)
    la.backend.forward(X)
    assert [h.id for h in handles] == list(model.last._forward_hooks)


class Dispatching(TorchDispatchMode):
    """Changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def enter_everything() -> None:
    """Leave everything of torch's half entered."""
    torch._C._functorch._vmap_increment_nesting(3, "error")
    torch._C._functorch._grad_increment_nesting()
    torch._functorch.eager_transforms.enter_jvp_nesting()
    torch._C._enter_dual_level()  # without what Python keeps of it
    if torch.__version__ >= "2.5":  # torch 2.4 crashes when dispatch modes are taken off their stack
        Dispatching().__enter__()
    torch.device("cpu").__enter__()  # overrides functions
    torch.backends.cuda.enable_flash_sdp(True)
    torch.set_autocast_cache_enabled(True)
    torch._C._functorch._set_vmap_fallback_enabled(False)
    torch._C._set_fwd_grad_enabled(False)
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("enable_backprop", [False, True])
def test_what_is_noted_of_torch_is_restored(inference, enable_backprop):
    model = Storing()
    with torch.inference_mode(inference):
        before = process_state()
        safely(model, enter_everything, enable_backprop)
        assert process_state() == before
        with safe_autodiff(model, enable_backprop):
            enter_everything()
        assert process_state() == before
    assert torch.equal(torch.func.vmap(torch.sin)(X), X.sin())
    assert not _python_dispatch._is_in_torch_dispatch_mode, "torch.compile would compile nothing"
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(forward_ad.make_dual(X, X).sin()).tangent is not None


def test_modes_of_the_callers_stay_entered():
    model = Storing()
    with torch.device("cpu"), forward_ad.dual_level(), torch.enable_grad():
        before = torch._C._len_torch_function_stack(), forward_ad._current_level, torch.is_grad_enabled()
        safely(model, lambda: None)
        assert before == (
            torch._C._len_torch_function_stack(),
            forward_ad._current_level,
            torch.is_grad_enabled(),
        )


# ---------------------------------------------------------------------------- what is an interrupt


def raising(error: BaseException, after: BaseException | None = None, again: bool = False) -> BaseException:
    """Raise an error, after another, and return it with its traceback, or let it through."""
    try:
        try:
            if after is not None:
                raise after
        finally:
            raise error
    except BaseException as raised:
        if again:
            raise
        return raised


@pytest.mark.parametrize(
    "interrupt", [KeyboardInterrupt(), SystemExit(3), type("Stop", (BaseException,), {})()]
)
def test_what_is_no_error_is_an_interrupt(interrupt):
    error = raising(RuntimeError("INTERNAL ASSERT FAILED"), interrupt)
    assert interrupt_behind(error, None) is interrupt
    assert interrupt_behind(error, interrupt) is None, "the caller deals with that one"
    with pytest.raises(type(interrupt)) as raised:
        safely(Storing(), lambda: (_ for _ in ()).throw(error))
    assert raised.value is interrupt


@pytest.mark.usefixtures("_time_out")
def test_errors_that_the_model_makes_of_a_time_out_come_through():
    def give_up() -> None:
        try:
            alarm()
        except TimeoutError as error:
            raise LookupError("the model's own") from error

    with pytest.raises(LookupError):
        safely(Storing(), give_up)
    with pytest.raises(LookupError):
        attempt(give_up)
