"""The user's model and process are as before every call, whatever fails in it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from awkward import WIDTH, sequences
from calls import predicted
from helpers import N_TEST, C, N, Snapshot, fitted, loader, targets
from interrupting import Ending
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from untouched import Untouched

pytestmark = pytest.mark.filterwarnings("ignore:The best (prior_precision|temperature), ")


Failure = type("Failure", (Exception,), {})


class Mixed(nn.Module):
    """Attention, BatchNorm, dropout and a frozen weight, in mixed modes; raises at the call ``fail_at``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(WIDTH, C)
        self.double()
        self.head.bias.requires_grad_(False)
        self.norm.eval()
        self.calls, self.fail_at = 0, None

    def forward(self, x):
        self.calls += 1
        if self.calls == self.fail_at:
            raise Failure(f"call {self.calls}")
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.dropout(self.norm(x.mean(1))))


SEQUENCES = sequences(N_TEST, 12)


def sequence_loader(n=N, seed=11):
    return loader(sequences(n, seed), targets("classification", n))


def mixed(**kwargs):
    return fitted(model=Mixed(), data=sequence_loader(), n_eigenvalues=3, temperature=None, **kwargs)


def grid_search(la, **kwargs):
    options = {"link_approx": "mc", "n_samples": 3, "grid_size": 3, **kwargs}
    torch.manual_seed(0)  # of the "nn" predictive
    la.optimize_prior_precision(method="gridsearch", val_loader=sequence_loader(17, 13), **options)


WORK = {
    "fit": lambda la: la.fit(sequence_loader()),
    "fit in blocks": lambda la: fitted(model=la.model, data=sequence_loader(), memory_budget=30_000),
    "fit streamed": lambda la: fitted(model=la.model, data=sequence_loader(), curvature_size=None),
    "add": lambda la: la.fit(sequence_loader(), override=False),
    "glm": lambda la: la(SEQUENCES),
    "nn": lambda la: la(SEQUENCES, "nn", link_approx="mc", n_samples=3),
    "every prediction": lambda la: predicted(la, SEQUENCES),
    "evidence": lambda la: la.log_marginal_likelihood(torch.ones(1, requires_grad=True).double()).backward(),
    "marglik": lambda la: la.optimize_prior_precision(n_steps=3),
    "gridsearch": grid_search,
    "gridsearch nn": lambda la: grid_search(la, pred_type="nn"),
    "state_dict": lambda la: la.load_state_dict(la.state_dict()),
}


@pytest.mark.filterwarnings("ignore:The evidence tunes the prior only")
@pytest.mark.parametrize("name", WORK)
def test_the_model_and_the_process_are_untouched(name):
    la = mixed()
    untouched = Untouched(la.model)
    WORK[name](la)
    untouched.check()


@pytest.mark.parametrize("name", ["fit", "glm", "nn", "gridsearch"])
@pytest.mark.parametrize("turn_on", [False, True])
def test_switches_that_the_user_set_are_kept(name, turn_on, monkeypatch):
    la = mixed()
    kernels = [SDPBackend.FLASH_ATTENTION] if turn_on else [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", turn_on)
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(turn_on)
        with sdpa_kernel(kernels), torch.set_grad_enabled(turn_on):
            untouched = Untouched(la.model)
            WORK[name](la)
            untouched.check()
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("name", ["fit", "fit in blocks", "add", "glm", "nn", "gridsearch", "gridsearch nn"])
def test_an_error_of_the_model_comes_through_and_changes_nothing(name):
    counted, la = mixed(), mixed()
    counted.model.calls = 0
    WORK[name](counted)
    total = counted.model.calls
    before = Snapshot(la, SEQUENCES)
    # What fails while it is tried what the model supports is not used.
    for fail_at in sorted({1, total // 2, total - 1, total} - {0}):
        untouched = Untouched(la.model)
        la.model.calls, la.model.fail_at = 0, fail_at
        with pytest.raises(Failure, match=f"call {fail_at}"):
            WORK[name](la)
        la.model.fail_at = None
        untouched.check()
        before.check()


@pytest.mark.parametrize(("curvature_size", "at"), [(2000, 2), (None, 2), (None, 6)])
def test_an_error_of_the_loader_comes_through_and_changes_nothing(curvature_size, at):
    la = mixed(curvature_size=curvature_size)
    before, untouched = Snapshot(la, SEQUENCES), Untouched(la.model)
    with pytest.raises(Failure):
        la.fit(Ending(list(sequence_loader()), at, Failure))
    validation = Ending(list(sequence_loader()), 2, Failure)
    with pytest.raises(Failure):
        la.optimize_prior_precision(method="gridsearch", val_loader=validation)
    untouched.check()
    before.check()


@pytest.mark.parametrize(("pred_type", "error"), [("glm", Failure), ("nn", KeyboardInterrupt)])
def test_an_error_of_the_loss_comes_through_and_changes_nothing(pred_type, error):
    la = mixed()
    before, untouched, scored = Snapshot(la, SEQUENCES), Untouched(la.model), []

    def loss(p, y):
        scored.append(p)
        if len(scored) == 3:
            raise error
        return F.nll_loss(p.log(), y)

    with pytest.raises(error):
        grid_search(la, pred_type=pred_type, loss=loss)
    untouched.check()
    before.check()


def test_threads_that_fail_do_not_disturb_those_that_do_not():
    la = mixed()
    untouched = Untouched(la.model)
    expected = la(SEQUENCES)

    def predict(i):
        if i % 2:
            with pytest.raises(AssertionError, match="embedding dimension"):
                la(SEQUENCES[..., :2])
            return expected
        return la(SEQUENCES)

    with ThreadPoolExecutor(5) as pool:
        assert all(torch.equal(p, expected) for p in pool.map(predict, range(16)))
    untouched.check()
