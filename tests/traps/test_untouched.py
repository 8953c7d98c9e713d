"""The user's model and process are as before every call, whatever fails in it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from awkward import WIDTH, OnSequences, X, batch_norm_net, sequences
from helpers import N_TEST, C, N, Snapshot, fitted, loader, mlp, targets, train_loader, val_loader
from laplace.curvature import AsdlGGN, BackPackGGN
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from untouched import Untouched

from laplace_ella import NystromGGN, ReverseNystromGGN

# Networks of a few weights on random labels often have their optimum on an edge of the grid;
# test_hyperparameter_search.py tests what is said of it.
pytestmark = pytest.mark.filterwarnings("ignore:The best (prior_precision|temperature), ")


class Mixed(nn.Module):
    """Attention, BatchNorm, dropout and a frozen weight, in mixed train and evaluation mode.

    Raises an error of its own at the call numbered ``fail_at``.
    """

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
            raise ModelError(f"call {self.calls}")
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.dropout(self.norm(x.mean(1))))


class ModelError(Exception):
    pass


class LoaderError(Exception):
    pass


class LossError(Exception):
    pass


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
    "features": lambda la: la.features(SEQUENCES),
    "glm": lambda la: la(SEQUENCES),
    "mc": lambda la: la(SEQUENCES, link_approx="mc"),
    "nn": lambda la: la(SEQUENCES, "nn", link_approx="mc", n_samples=3),
    "sample": lambda la: la.sample(3),
    "functional_samples": lambda la: la.functional_samples(SEQUENCES),
    "nn samples": lambda la: la.predictive_samples(SEQUENCES, "nn", 3),
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


def test_a_recurrent_model_and_the_process_are_untouched():
    model = OnSequences(lambda: nn.LSTM(WIDTH, 7, batch_first=True), 7)
    untouched = Untouched(model)
    with pytest.warns(UserWarning, match="one by one"):
        la = fitted(model=model, data=sequence_loader(), n_eigenvalues=3)
    la(SEQUENCES)
    la(SEQUENCES, "nn", link_approx="mc", n_samples=3)
    with pytest.raises(RuntimeError):
        la(SEQUENCES[..., :2])
    untouched.check()


@pytest.mark.parametrize("backend", [NystromGGN, ReverseNystromGGN, BackPackGGN, AsdlGGN])
def test_every_backend_leaves_the_model_untouched(backend):
    model = batch_norm_net()
    model[1].eval()
    untouched = Untouched(model)
    la = fitted(model=model, backend=backend)
    la(X)
    untouched.check()


@pytest.mark.parametrize("name", ["fit", "glm", "nn", "gridsearch"])
@pytest.mark.parametrize("turn_on", [False, True])
def test_switches_that_the_user_set_are_kept(name, turn_on):
    la = mixed()
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    try:
        torch.backends.mha.set_fastpath_enabled(turn_on)
        torch.backends.mkldnn.enabled = turn_on
        kernels = (
            [SDPBackend.FLASH_ATTENTION] if turn_on else [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]
        )
        with sdpa_kernel(kernels), torch.set_grad_enabled(turn_on):
            untouched = Untouched(la.model)
            WORK[name](la)
            untouched.check()
    finally:
        torch.backends.mha.set_fastpath_enabled(before[0])
        torch.backends.mkldnn.enabled = before[1]


def calls_of(name):
    la = mixed()
    la.model.calls = 0
    WORK[name](la)
    return la.model.calls


@pytest.mark.parametrize(
    "name",
    ["fit", "fit in blocks", "fit streamed", "add", "glm", "nn", "nn samples", "gridsearch", "gridsearch nn"],
)
def test_an_error_of_the_model_comes_through_and_changes_nothing(name):
    total = calls_of(name)
    assert total
    la = mixed()
    before = Snapshot(la, SEQUENCES)
    # After the first pass it is tried what the model supports; what fails there is not used.
    for fail_at in sorted({1, total // 2, total - 1, total} & set(range(1, total + 1))):
        untouched = Untouched(la.model)
        la.model.calls, la.model.fail_at = 0, fail_at
        with pytest.raises(ModelError, match=f"call {fail_at}"):
            WORK[name](la)
        la.model.fail_at = None
        untouched.check()
        before.check()


@pytest.mark.parametrize("backend", [BackPackGGN, AsdlGGN])
def test_an_error_inside_a_library_comes_through_and_changes_nothing(backend):
    class Failing(nn.Sequential):
        fail = False

        def forward(self, x):
            if self.fail and torch.is_grad_enabled():
                raise ModelError
            return super().forward(x)

    model = Failing(*mlp())
    la = fitted(model=model, backend=backend)
    before, untouched = Snapshot(la, X), Untouched(model)
    Failing.fail = True
    with pytest.raises(ModelError):
        la.fit(train_loader())
    Failing.fail = False
    untouched.check()
    before.check()


class Breaking:
    """A loader that breaks off, in the n-th pass over it."""

    def __init__(self, in_pass=1):
        self.remaining = in_pass

    def __iter__(self):
        self.remaining -= 1
        for i, batch in enumerate(sequence_loader()):
            if i == 2 and self.remaining == 0:
                raise LoaderError
            yield batch


def test_an_error_of_the_loader_comes_through_and_changes_nothing():
    for curvature_size, in_pass in ((2000, 1), (None, 1), (None, 2)):
        la = mixed(curvature_size=curvature_size)
        before, untouched = Snapshot(la, SEQUENCES), Untouched(la.model)
        with pytest.raises(LoaderError):
            la.fit(Breaking(in_pass))
        untouched.check()
        before.check()
    with pytest.raises(LoaderError):
        la.optimize_prior_precision(method="gridsearch", val_loader=Breaking())
    untouched.check()
    before.check()


@pytest.mark.parametrize("error", [LossError, KeyboardInterrupt])
@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_an_error_of_the_loss_comes_through_and_changes_nothing(pred_type, error):
    la = mixed()
    before, untouched = Snapshot(la, SEQUENCES), Untouched(la.model)
    scored = []

    def loss(p, y):
        scored.append(p)
        if len(scored) == 3:
            raise error
        return F.nll_loss(p.log(), y)

    with pytest.raises(error):
        grid_search(la, pred_type=pred_type, loss=loss)
    untouched.check()
    before.check()


def test_threads_predict_what_one_thread_does():
    la = mixed()
    untouched = Untouched(la.model)
    blocks = [sequences(5, seed) for seed in range(20, 36)]

    def predict(i):
        if i % 3 == 2:
            return la(
                blocks[i], "nn", link_approx="mc", n_samples=3, generator=torch.Generator().manual_seed(i)
            )
        return la(blocks[i], link_approx=("probit", "mc")[i % 2])

    expected = [predict(i) for i in range(len(blocks))]
    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(predict, range(len(blocks))))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    untouched.check()


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


def test_two_estimators_of_one_model_do_not_share_state():
    model = mlp()
    first = fitted(model=model)
    before = first(X)
    second = fitted(model=model, seed=5, n_eigenvalues=3, prior_precision=9.0)
    second(X)
    assert torch.equal(first(X), before)


def test_the_random_state_of_torch_is_left_alone():
    la = fitted()
    train, val = list(train_loader()), list(val_loader())
    before = torch.get_rng_state()
    for link in ("probit", "mc", "bridge"):
        la(X, link_approx=link)
    la.optimize_prior_precision(method="gridsearch", val_loader=val, grid_size=3, link_approx="mc")
    la.fit(train)
    la.sample(3, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
