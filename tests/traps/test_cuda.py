"""The same results on a GPU; skipped, visibly, where there is none."""

from __future__ import annotations

import copy
from time import perf_counter

import pytest
import torch
from conftest import assert_close
from helpers import C, H, build, fitted, inputs, loader, mlp, targets, train_loader
from interrupting import Ending, go_on, interrupt
from models import Applied
from processes import Group
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:The best (prior_precision|temperature)"),
]

X = inputs(7, seed=7)


LAYERS = {
    "conv": lambda: [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(True),
        nn.Flatten(),
        nn.Linear(512, C),
    ],
    "transformer": lambda: [
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        nn.Flatten(),
        nn.Linear(24, C),
    ],
    "LSTM": lambda: [
        Applied(lambda net, x: net(x)[0][:, -1], nn.LSTM(8, 5, batch_first=True)),
        nn.Linear(5, C),
    ],
}


@pytest.mark.filterwarnings("ignore:This model cannot be differentiated for several")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("autodiff", ["forward", "double", "reverse"])
def test_a_gpu_gives_what_a_cpu_does(name, autodiff):
    shape = (23, 3, 8, 8) if name == "conv" else (23, 3, 8)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = loader(x, targets("classification"), pin_memory=False)
    model = nn.Sequential(*LAYERS[name]()).double().eval()
    cpu = fitted(model=copy.deepcopy(model), data=data, autodiff=autodiff)
    gpu = fitted(model=model.cuda(), data=data, autodiff=autodiff)
    assert_close(gpu.basis.eigenvalues, cpu.basis.eigenvalues, rtol=1e-6)
    assert_close(gpu.H, cpu.H, rtol=1e-6)
    assert_close(gpu(x), cpu(x), rtol=1e-6)
    gpu.optimize_prior_precision(method="gridsearch", val_loader=data, grid_size=3)
    assert gpu(x.cuda(), link_approx="mc").is_cuda


def test_pinned_loaders_and_moved_models():
    data = loader(inputs(), targets("classification"), pin_memory=True)
    model = mlp()
    la = fitted(model=model.cuda(), data=data)
    assert set(la.backend.engine._support) == {(torch.device("cuda", torch.cuda.current_device()), None)}
    state = la.state_dict()
    model.cpu()
    moved = fitted(model=model)
    moved.load_state_dict(state)
    assert_close(moved(X), fitted()(X), rtol=1e-6)


@pytest.mark.parametrize("residual", ["none", "isotropic", "exact"])
def test_what_was_fitted_follows_the_model_to_another_device(residual):
    la = fitted(residual=residual)
    here, evidence = la(X, link_approx="mc"), la.log_marginal_likelihood()
    la.model.cuda()
    assert torch.allclose(la(X, link_approx="mc").cpu(), here, atol=1e-8)
    assert torch.allclose(la.log_marginal_likelihood().cpu(), evidence)
    assert all(t.is_cuda for t in (la.posterior_covariance, la.sample(3), la.H))
    la.fit(train_loader(), override=False)
    la.model.cpu()
    assert la(X, link_approx="mc").device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_atomic_additions_are_not_random(dtype):
    def scattered(net, x):
        h = net[0](x)
        index = torch.arange(H * 1000, device=x.device) % H
        return net[2](torch.zeros_like(h).index_add(1, index, h.repeat(1, 1000) / 1000).tanh())

    fitted(model=Applied(scattered, mlp(dtype=dtype)).cuda(), data=train_loader(dtype=dtype), n_eigenvalues=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    la = fitted(model=mlp(dtype=torch.float32).cuda(), data=train_loader(dtype=torch.float32))
    x = X.float().cuda()
    exact, _ = la.features(x)
    with torch.autocast("cuda", dtype):
        phi, _ = la.features(x)
    assert (phi.float() - exact).norm() < 2e-2 * exact.norm()
    assert la.H.dtype == torch.float64


def test_running_out_of_memory_halves_the_chunks():
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, C)
    )
    x = torch.randn(64, 3, 64, 64)
    la = fitted(model=model.cuda(), data=loader(x[:23], targets("classification")), n_eigenvalues=5)
    expected = la(x)
    total = torch.cuda.get_device_properties(0).total_memory
    la.backend.engine.memory_budget = total  # chunks that do not fit what is left
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2**28) / total)
    try:
        with pytest.warns(UserWarning, match="ran out of memory"):
            found = la(x)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_close(found, expected, rtol=1e-3)


def test_rows_are_spilled_off_the_device(tmp_path):
    data = train_loader()
    exact = fitted(model=mlp().cuda(), data=data, n_eigenvalues=2)
    for spill in ("cpu", tmp_path):
        options = {"memory_budget": 3000, "spill": spill, "spill_dtype": torch.float32}
        la = fitted(model=mlp().cuda(), data=data, n_eigenvalues=2, **options)
        assert_close(la.H, exact.H, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("residual", ["isotropic", "exact"])
@pytest.mark.parametrize("curvature", ["exact", "mc"])
def test_everything_that_is_tuned_is_what_a_cpu_tunes(residual, curvature):
    options = {"residual": residual, "curvature": curvature, "temperature": None}
    data, search = train_loader(), ["temperature", "logit_scale", "residual_scale", "n_eigenvalues"]
    cpu = fitted(model=mlp(), data=data, **options)
    gpu = fitted(model=mlp().cuda(), data=data, **options)
    assert_close(gpu.H, cpu.H, rtol=1e-6)
    found = [la.optimize_hyperparameters(data, search) for la in (cpu, gpu)]
    assert found[1].score == pytest.approx(found[0].score, rel=1e-4)
    for la in (cpu, gpu):
        la.calibrate_novelty(data)
    for name in ("temperature", "logit_scale", "residual_scale"):
        setattr(gpu, name, getattr(cpu, name))
    if gpu.basis.rank == cpu.basis.rank:
        assert_close(gpu(X.cuda(), link_approx="mc"), cpu(X, link_approx="mc"), rtol=1e-6)
        assert_close(gpu.residual_share(X.cuda()), cpu.residual_share(X), rtol=1e-6)
    assert gpu.novelty(X.cuda()).is_cuda
    assert gpu.functional_samples(X.cuda()).is_cuda
    for one, other in zip(gpu.uncertainty(X.cuda()), cpu.uncertainty(X)):
        assert one.is_cuda
        if gpu.basis.rank == cpu.basis.rank:
            assert_close(one, other, rtol=1e-6)
    if residual != "exact":
        assert gpu.batch_bald([X], 3).indices.is_cuda


def test_fewer_directions_and_what_they_cost():
    cpu, gpu = fitted(model=mlp(), data=train_loader()), fitted(model=mlp().cuda(), data=train_loader())
    cpu.n_directions = gpu.n_directions = 2
    assert_close(gpu(X.cuda()), cpu(X), rtol=1e-6)
    plan = gpu.predict_plan(X, verbose=False)
    for price in plan.prices:
        gpu.n_directions = price.n_directions
        gpu(X)
        torch.cuda.synchronize()
        start = perf_counter()
        gpu(X)
        torch.cuda.synchronize()
        taken = perf_counter() - start
        assert taken / 3 < price.seconds < 3 * taken


def test_validation_features_are_spilled_off_the_device():
    data = train_loader()
    little, much = (
        fitted(model=mlp().cuda(), data=data, n_eigenvalues=2, memory_budget=b) for b in (3000, 10**9)
    )
    for la in (little, much):
        la.optimize_prior_precision(method="gridsearch", val_loader=data, grid_size=5)
    assert float(little.prior_precision) == float(much.prior_precision)


def test_data_come_and_go():
    found = []
    for device in ("cpu", "cuda"):
        model = mlp().to(device)
        la, other = build(model=model), build(model=model)
        la.fit(loader(inputs(), targets("classification")))
        other.fit(loader(inputs(seed=5), targets("classification", seed=6)), basis=la.basis)
        la.merge(other)
        la.forget(loader(inputs()[:7], targets("classification")[:7]))
        found.append((la.H, la.loss, la(X.to(device))))
    for cpu, gpu in zip(*found):
        assert gpu.is_cuda
        assert_close(gpu, cpu, rtol=1e-6)


@pytest.mark.parametrize("likelihood", ["bernoulli", "classification"])
def test_positions_and_binary_labels(likelihood):
    x = torch.randn(23, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shape = (23, 7, C) if likelihood == "bernoulli" else (23, 7)
    y = torch.randint(2, shape, generator=torch.Generator().manual_seed(1))
    cpu, gpu = (fitted(likelihood, m, loader(x, y)) for m in (mlp(), mlp().cuda()))
    assert_close(gpu.H, cpu.H, rtol=1e-6)
    assert_close(gpu(x[:3].cuda()), cpu(x[:3]), rtol=1e-6)


@pytest.mark.parametrize("size", [None, 11])
def test_an_interrupted_fit_goes_on(size, tmp_path):
    whole, la = (build(model=mlp().cuda(), curvature_size=size) for _ in range(2))
    data = list(train_loader())
    whole.fit(data)
    interrupt(la, Ending(data, at=2), tmp_path / "fit", error=OSError)
    go_on(la, data, tmp_path / "fit")
    assert la.H.is_cuda
    assert_close(la.H, whole.H)


@pytest.mark.parametrize("shard", [False, True])
def test_processes_that_share_a_gpu(shard, tmp_path):
    group = Group(2, tmp_path / "group")
    try:
        found = group(fit_on_gpu, shard)
    finally:
        group.kill()
    la = fitted(model=mlp().cuda(), data=list(train_loader()), temperature=None)
    for curvature, p in found:
        assert_close(curvature, la.H.cpu(), rtol=1e-6)
        assert_close(p, la(X.cuda()).cpu(), rtol=1e-6)


def fit_on_gpu(shard):
    data = TensorDataset(inputs(), targets("classification"))
    shares = DataLoader(data, 5, sampler=DistributedSampler(data, shuffle=False))
    la = fitted(model=mlp().cuda(), data=shares, temperature=None, shard_directions=shard)
    la.calibrate_novelty(shares)
    return la.H.cpu(), la(X.cuda()).cpu()
