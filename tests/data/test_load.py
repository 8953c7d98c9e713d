"""Many fits and predictions in one process, and many threads at once: nothing is left behind, nothing changes."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import pytest
import torch
from conftest import ConvNet, Residual
from helpers import C, D, assert_same, build, fitted, inputs, loader, mlp, targets
from parts import QUIET
from torch import nn

import laplace_ella
from laplace_ella.posterior.links import quasi_normal

N_FITS, N_PREDICTIONS = 30, 200
N_THREADS = 8

pytestmark = QUIET


def encoder():
    """A transformer layer over short sequences, with outputs at every position."""
    return nn.Sequential(nn.TransformerEncoderLayer(6, 2, 5, 0.1, batch_first=True), nn.Linear(6, C))


MODELS = {
    "mlp": (lambda: mlp(dtype=torch.float32), (D,)),
    "batchnorm": (ConvNet, (2, 3, 3)),
    "residual_inplace": (Residual, (2,)),
    "encoder": (encoder, (5, 6)),
}
FITS = (
    {},
    {"curvature_size": None},
    {"curvature": "mc", "n_eigenvalues": 3},
    {"memory_budget": 2**14},
    {"n_eigenvalues": 0.9, "residual": "isotropic"},
)
LINKS = ("probit", "mc", "bridge", "bridge_norm")
BATCHES = (7, 1, 11, 3)


def batches(name, likelihood, seed):
    shape = MODELS[name][1]
    x = torch.randn(23, *shape, generator=torch.Generator().manual_seed(seed))
    positions = shape[:1] if name == "encoder" else ()
    y = torch.randint(C, (23, *positions), generator=torch.Generator().manual_seed(seed + 1))
    if likelihood != "classification":
        y = nn.functional.one_hot(y, C).float()
    return loader(x, y, 3 + seed % 5)


def one_fit(model, name, i):
    likelihood = ("classification", "regression", "bernoulli")[i % 3]
    options = {"subsample_size": 9, "n_eigenvalues": 4, "temperature": None, **FITS[i % len(FITS)]}
    la = laplace_ella.ELLALaplace(model, likelihood, **options)
    data = batches(name, likelihood, i)
    la.fit(data, val_loader=data if i % 2 else None)
    if i % 3 == 0:
        la.optimize_prior_precision(method="gridsearch", val_loader=data, grid_size=3)
    if i % 4 == 1:
        la.optimize_hyperparameters(data, ["temperature"], n_samples=8)
    la.fit(data, override=False)
    return la


def one_prediction(la, name, i):
    x = torch.randn(BATCHES[i % len(BATCHES)], *MODELS[name][1], generator=torch.Generator().manual_seed(i))
    generator = torch.Generator().manual_seed(i)
    if i % 6 == 4:
        return la.functional_samples(x, n_samples=5, generator=generator)
    if i % 6 == 5:
        return la(x, "nn", link_approx="mc", n_samples=3, generator=generator)
    links = LINKS[:2] if la.likelihood == "bernoulli" else LINKS
    return la(x, link_approx=links[i % len(links)])


def held(models):
    """Count what a process holds, but for the points of Monte-Carlo links, of which the latest eight sets stay."""
    quasi_normal.cache_clear()
    gc.collect()
    modules = [m for model in models for m in model.modules()]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "tensors": sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()),
        "hooks": sum(len(getattr(m, kind)) for m in modules for kind in hooks),
        "threads": threading.active_count(),
        **{kind: len(glob(f"/proc/self/{kind}/*")) for kind in ("fd", "task")},
        "training": [m.training for m in modules],
        "attributes": [sorted(vars(m)) for m in modules],
        "grad": [p.grad is None and p.requires_grad and p.is_leaf for m in modules for p in m.parameters()],
        "switches": [torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()],
    }


def test_many_fits_and_predictions_leave_nothing_behind():
    torch.manual_seed(0)
    models = {name: make() for name, (make, _) in MODELS.items()}
    for i, model in enumerate(models.values()):
        model.train(i % 2 == 0)
    weights = [t.clone() for m in models.values() for t in (*m.parameters(), *m.buffers())]
    names = list(models)
    for i, name in enumerate(names):  # what is loaded at the first use
        one_prediction(one_fit(models[name], name, i), name, i)
    before = held(models.values())
    estimators = {}
    for i in range(N_FITS):
        name = names[i % len(names)]
        estimators[name] = one_fit(models[name], name, i)
        for j in range(i * N_PREDICTIONS // N_FITS, (i + 1) * N_PREDICTIONS // N_FITS):
            which = names[j % (i + 1) % len(names)]
            out = one_prediction(estimators[which], which, j)
            assert all(t.isfinite().all() for t in (out if isinstance(out, tuple) else (out,)))
    assert j == N_PREDICTIONS - 1
    del estimators, out
    after = held(models.values())
    assert after == before
    now = [t for m in models.values() for t in (*m.parameters(), *m.buffers())]
    assert all(torch.equal(a, b) for a, b in zip(weights, now, strict=True))


def test_a_fit_that_fails_leaves_nothing_behind():
    model = mlp()
    la = fitted(model=model)
    x, y = inputs(), targets("classification")
    broken = [(x[:7], y[:7]), (x[:7] * torch.nan, y[:7])]

    def failures():
        for data in (broken, [], [(x, y + C)]):
            with pytest.raises(ValueError, match=r"."):
                la.fit(data)
            with pytest.raises(ValueError, match=r"."):
                build(model=model).fit(data)

    failures()
    before = held([model])
    for _ in range(20):
        failures()
    assert held([model]) == before


def calls(la, x, i):
    generator = torch.Generator().manual_seed(i)
    return [
        lambda: la(x),
        lambda: la(x, link_approx="mc"),
        lambda: la(x, link_approx="mc", generator=generator),
        lambda: la.features(x),
        lambda: la(x, "nn", link_approx="mc", n_samples=3, generator=generator),
        lambda: la.functional_samples(x, n_samples=5, generator=generator),
    ]


def test_threads_that_fit_and_predict_at_once_get_what_one_thread_gets():
    model = mlp()
    states = [fitted("classification", model), fitted("regression", model, residual="isotropic")]
    x, barrier = inputs(61, seed=8), threading.Barrier(N_THREADS)

    def work(thread, estimators, wait=lambda: None):
        found = []
        wait()
        for i in range(thread, thread + 12):
            made = calls(estimators[i % 2], x[i : i + 9], i)
            found.append(made[(thread + 3 * i) % len(made)]())
        la = fitted(model=model, seed=thread, curvature_size=(None, 11)[thread % 2])
        return [*found, (la.H, la.basis.eigenvalues, la(x[:9]))]

    expected = [work(i, states) for i in range(N_THREADS)]
    restored = [build(la.likelihood, model, residual=la.residual) for la in states]
    for la, state in zip(restored, states):  # threads meet at what is computed at the first call too
        la.load_state_dict(state.state_dict())
    with ThreadPoolExecutor(N_THREADS) as pool:
        futures = [pool.submit(work, i, restored, lambda: barrier.wait(60)) for i in range(N_THREADS)]
        for future, one in zip(futures, expected, strict=True):
            for a, b in zip(future.result(), one, strict=True):
                assert_same(a, b)
