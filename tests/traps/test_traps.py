"""One test for each trap met in practice: forward-mode AD, the host, the user's model and process."""

from __future__ import annotations

import configparser
import importlib.metadata
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import laplace
import pytest
import torch
from helpers import (
    N_TEST,
    C,
    D,
    DictModel,
    H,
    K,
    M,
    N,
    Snapshot,
    as_tuple,
    assert_same,
    build,
    dict_batches,
    fitted,
    inputs,
    loader,
    mlp,
    reference_features,
    targets,
    train_loader,
    val_loader,
)
from laplace.curvature import AsdlGGN, BackPackGGN, GGNInterface
from laplace.utils import RunningNLLMetric
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from untouched import Untouched

from laplace_ella import ELLALaplace, NystromGGN, ReverseNystromGGN

# Networks of a few weights on random labels often have their optimum on an edge of the grid;
# test_hyperparameter_search.py tests what is said of it.
pytestmark = pytest.mark.filterwarnings("ignore:The best (prior_precision|temperature), ")


X = inputs(N_TEST, seed=7)
BACKENDS = [NystromGGN, ReverseNystromGGN]
T_STEPS, WIDTH = 3, 4  # length and width of the sequences below


def sequences(n=N, seed=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, T_STEPS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


class OnSequences(nn.Module):
    """A layer on sequences, and a linear head on the mean of what it returns."""

    def __init__(self, make, width=WIDTH, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.layer = make().to(dtype)
        self.head = nn.Linear(width, C).to(dtype)

    def forward(self, x):
        out = self.layer(x)
        return self.head((out[0] if isinstance(out, tuple) else out).mean(1))


class Attention(nn.Module):
    """Fused scaled-dot-product attention, called directly."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)[:, 0]


def check_features(la, x, **tolerance):
    phi, f = la.features(x)
    expected_phi, expected_f = reference_features(la.model, la.basis, x)
    torch.testing.assert_close(f, expected_f, **tolerance)
    torch.testing.assert_close(phi, expected_phi, **tolerance)
    assert phi.abs().max() > 0


def fitted_on_sequences(make, backend=None, width=WIDTH, training=False, dtype=torch.float64, **kwargs):
    model = OnSequences(make, width, dtype).train(training)
    data = loader(sequences(dtype=dtype), targets("classification"))
    return fitted(model=model, data=data, backend=backend, **kwargs)


# ------------------------------------------------------------------ forward-mode AD


@pytest.mark.parametrize("backend", BACKENDS)
def test_1_fused_attention(backend):
    la = fitted_on_sequences(Attention, backend)
    check_features(la, sequences(N_TEST, 12))
    assert la(sequences(N_TEST, 12), "nn", link_approx="mc").shape == (N_TEST, C)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_2_the_fast_path_of_transformer_layers(backend, training, grad):
    def make():
        return nn.TransformerEncoderLayer(WIDTH, 2, 7, dropout=0.5, batch_first=True)

    with torch.set_grad_enabled(grad):
        la = fitted_on_sequences(make, backend, training=training)
        check_features(la, sequences(N_TEST, 12))


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layers", [1, 2])
def test_3_recurrent_layers(layer, dtype, layers):
    with pytest.warns(UserWarning, match="one by one"):
        la = fitted_on_sequences(
            lambda: layer(WIDTH, 7, layers, batch_first=True), width=7, dtype=dtype, n_eigenvalues=3
        )
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {}
    check_features(la, sequences(N_TEST, 12, dtype), **tolerance)


def fitted_with_warnings(model, x, twin=None, **kwargs):
    """Fit, compare features with those of a twin, and return the estimator with the texts of its warnings."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        # Checkpoints say that they have nothing to do where gradients are off.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        warnings.filterwarnings("ignore", "`torch.(cpu.amp.autocast|jit)")
        la = fitted(model=model, data=loader(x, targets("classification", len(x))), **kwargs)
        la(x)
        phi, f = la.features(x[:3])
    expected_phi, expected_f = reference_features(twin or model, la.basis, x[:3])
    torch.testing.assert_close(f, expected_f)
    torch.testing.assert_close(phi, expected_phi)
    assert phi.abs().max() > 0
    return la, [str(w.message) for w in record]


class Transformed(nn.Module):
    """A linear map, a function, and a linear head."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(D, D), nn.Linear(D, C)
        self.function = function
        self.double()

    def forward(self, x):
        return self.head(self.function(self.first(x)))


def sampled(h):
    """Read an image at places that depend on the weights."""
    image = torch.arange(9, dtype=h.dtype).view(1, 1, 3, 3).expand(len(h), -1, -1, -1)
    grid = h[:, None, :4].tanh().reshape(-1, 1, 2, 2)
    return F.pad(F.grid_sample(image, grid, align_corners=False).flatten(1), (0, D - 2))


def bagged(h):
    table = torch.cat([h.mean(0, keepdim=True).T, h[:, :1].mean().expand(D, 1)])
    return h * F.embedding_bag(torch.tensor([[0, 1]]), table, mode="sum")


def distances(h):
    return torch.cdist(h, torch.eye(D, dtype=h.dtype))


def normed(h):
    weight = torch._weight_norm(h[:, :, None], h.new_ones(len(h), 1, 1))
    return weight[..., 0]


@pytest.mark.parametrize(
    "function", [sampled, normed, distances], ids=["grid_sample", "weight_norm", "cdist"]
)
def test_4_operators_without_a_forward_rule(function):
    la, texts = fitted_with_warnings(Transformed(function), inputs())
    found = la.backend.support(X)
    fell_back = [found.features != "forward", found.rows == "loop"]  # later versions of torch may add rules
    texts = [text for text in texts if "slice by slice" not in text]
    assert len(texts) == sum(fell_back)
    assert any("forward mode" in text for text in texts) == fell_back[0]


def test_4_the_warning_names_operator_and_cost():
    _, texts = fitted_with_warnings(Transformed(distances), inputs())
    assert "cdist" in texts[0]
    assert "instead of 1 + 2 K forward passes" in texts[0] or "1 + 4 C" in texts[0]


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0].cos() * grad


@pytest.mark.parametrize(
    "function",
    [OldStyle.apply, lambda h: checkpoint(torch.sin, h, use_reentrant=True)],
    ids=["old-style function", "re-entrant checkpoint"],
)
@pytest.mark.parametrize("memory_budget", [None, 5_000], ids=["rows", "blocks"])
@pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast:FutureWarning")  # of checkpoints in torch 2.4
def test_5_what_no_transform_takes(function, memory_budget):
    model = Transformed(function)
    la, texts = fitted_with_warnings(model, inputs(), Transformed(torch.sin), memory_budget=memory_budget)
    assert la.backend.support(X).rows == "loop"
    assert len(texts) == 2
    torch.testing.assert_close(la(X), fitted(model=Transformed(torch.sin))(X))
    assert all(p.grad is None for p in model.parameters())


def test_6_what_a_model_supports_is_found_out_once():
    tries = []

    def once(h):
        tries.append(1)
        return distances(h)

    la, texts = fitted_with_warnings(Transformed(once), inputs())
    assert len(texts) >= 1
    tries.clear()
    la.features(X)
    assert len(tries) <= N_TEST + 1  # one forward pass a row at most, and no failed attempt
    support = la.backend.support(X)
    la.load_state_dict(la.state_dict())
    with pytest.warns(UserWarning, match="forward mode"):
        assert la.backend.support(X) == support


def test_6_out_of_memory_is_no_reason_to_fall_back():
    def full(h):
        if h.requires_grad or torch._C._functorch.maybe_current_level() is not None:
            raise torch.cuda.OutOfMemoryError("no room")
        return h

    la = build(model=Transformed(full))
    with pytest.raises(torch.cuda.OutOfMemoryError, match="no room"):
        la.fit(train_loader())
    assert la.H is None


@pytest.mark.parametrize("mode", ["forward", "double", "reverse"])
def test_6_the_mode_can_be_named(mode):
    la = fitted(autodiff=mode)
    assert la.backend.support(X).features == mode
    check_features(la, X)
    with pytest.raises(ValueError, match="autodiff must be one of"):
        build(autodiff="sideways")


def test_6_a_mode_that_does_not_work_is_an_error():
    la = build(model=Transformed(distances), autodiff="forward")
    with pytest.raises(ValueError, match=r"autodiff='forward' cannot.*cdist"):
        la.fit(train_loader())
    assert la.H is None


@pytest.mark.parametrize("autodiff", ["forward", "double", "reverse"])
def test_a_module_with_two_names_is_one_module(autodiff):
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.head = nn.Linear(D, D).double(), nn.Linear(D, C).double()
            self.alias = self.first
            self.layers = nn.ModuleList([self.first, self.head])

        def forward(self, x):
            return self.head(self.alias(self.first(x).tanh()).tanh())

    model = Aliased()
    before = list(model.parameters())
    la = fitted(model=model, autodiff=autodiff)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert model.alias is model.first
    assert len(la.basis.directions) == 4
    check_features(la, X)


def test_tensors_that_are_no_parameters_get_no_gradient():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(WIDTH, 5, batch_first=True), nn.Linear(5, C)
            self.hidden = [nn.Linear(5, 5).double(), torch.ones(5, dtype=torch.float64, requires_grad=True)]
            self.double()

        def forward(self, x):
            return self.head(self.hidden[0](self.lstm(x)[0].mean(1)) * self.hidden[1])

    model = Hidden()
    with pytest.warns(UserWarning, match="one by one"):
        la = fitted(model=model, data=loader(sequences(), targets("classification")))
    la(sequences(3))
    assert model.hidden[1].grad is None
    assert model.hidden[0].weight.grad is None


@pytest.mark.filterwarnings("ignore:.*one by one")  # a row has no statistics
def test_statistics_of_the_batch_are_warned_of():
    model = nn.Sequential(
        nn.Linear(D, H), nn.BatchNorm1d(H, track_running_stats=False), nn.Linear(H, C)
    ).double()
    with pytest.warns(UserWarning, match=r"depend on the other rows of a batch: 1 "):
        NystromGGN(model, "classification").support(X)


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients(layer):
    class Sparse(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = layer(11, WIDTH, sparse=sparse), nn.Linear(WIDTH, C)
            self.double()

        def forward(self, x):
            h = self.table(x)
            return self.head(h.mean(1) if h.ndim == 3 else h)

    fitted_with_warnings(Sparse(True), torch.randint(11, (N, T_STEPS)), twin=Sparse(False))


@pytest.mark.parametrize("link", ["probit", "mc", "bridge", "bridge_norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_10_links_keep_their_precision_under_autocast(link, dtype):
    la = fitted(
        model=mlp(dtype=torch.float32),
        data=train_loader(dtype=torch.float32),
        prior_precision=1e-4,
        temperature=1e4,
    )
    x = X.float()
    exact = la(x, link_approx=link)
    with torch.autocast("cpu", dtype):
        found = la(x, link_approx=link)
    assert (found.float() - exact).abs().max() < 3e-2


def test_10_what_is_supported_under_autocast_is_found_out_there():
    la = fitted(model=mlp(dtype=torch.float32), data=train_loader(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        la(X.float())
    assert len(la.backend.engine._support) == 2


def test_threads_may_fit_and_load_while_others_predict():
    model = mlp()
    la, other = fitted(model=model), build(model=model)
    state = la.state_dict()

    def work(i):
        if i % 4 == 0:
            other.fit(train_loader())
        elif i % 4 == 1:
            build(model=model).load_state_dict(state)
        else:
            return la(X)
        return None

    expected = la(X)
    with ThreadPoolExecutor(4) as pool:
        found = [p for p in pool.map(work, range(32)) if p is not None]
    assert len(found) == 16
    assert all(torch.equal(p, expected) for p in found)


def test_sparse_intermediates():
    fitted_with_warnings(
        Transformed(lambda h: torch.sparse.mm(torch.eye(D).double().to_sparse(), h.T).T), inputs()
    )


def halved_gradient(h):
    with torch.no_grad():
        kept = h / 2
    return h / 2 + kept


class WrongJvp(OldStyle):
    """Drops tangents, as a compiled module may."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def jvp(ctx, tangent):
        return torch.zeros_like(tangent)

    generate_vmap_rule = True


@pytest.mark.parametrize("function", [halved_gradient, WrongJvp.apply], ids=["no_grad", "wrong jvp"])
def test_7_forward_and_reverse_that_disagree(function):
    la = build(model=Transformed(function))
    with pytest.raises(ValueError, match="Forward and reverse mode disagree"):
        la.fit(train_loader())
    assert la.H is None
    trusted = fitted(model=Transformed(function), autodiff="reverse")
    check_features(trusted, X)
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(ValueError, match="Forward and reverse mode disagree"):
            fitted(model=Transformed(function).to(dtype), data=train_loader(dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_7_rounding_is_no_disagreement(dtype):
    model = nn.Sequential(*[m for _ in range(10) for m in (nn.Linear(D, D), nn.ReLU())], nn.Linear(D, C))
    fitted(model=model.to(dtype), data=train_loader(dtype=dtype), n_eigenvalues=1)


def test_8_features_keep_no_graph_of_the_weights():
    seen = []
    model = mlp()
    model[1].register_forward_hook(
        lambda m, a, out: seen.append((out.requires_grad, torch.is_grad_enabled()))
    )
    with torch.enable_grad():
        la = fitted(model=model)
        seen.clear()
        phi, f = la.features(X.clone().requires_grad_())
    assert not phi.requires_grad
    assert not f.requires_grad
    assert seen
    assert not any(flag for pair in seen for flag in pair)


def test_9_wrappers_are_taken_off():
    plain = fitted()
    for wrapped in (torch.compile(mlp()), nn.DataParallel(mlp()), nn.DataParallel(torch.compile(mlp()))):
        la = fitted(model=wrapped)
        assert list(la.basis.directions) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert torch.equal(la(X), plain(X))
        la.load_state_dict(plain.state_dict())  # of the bare model


@pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="torch before 2.6 cannot run it eagerly"
)
def test_9_compiled_parts_run_eagerly():
    model = mlp()
    model[0] = torch.compile(model[0])
    torch.testing.assert_close(fitted(model=model)(X), fitted()(X))


def test_10_autocast():
    la = fitted(model=mlp(dtype=torch.float32), data=train_loader(dtype=torch.float32))
    x = X.float()
    exact, _ = la.features(x)
    with torch.autocast("cpu", torch.bfloat16):
        phi, _ = la.features(x)
        again = fitted(
            model=mlp(dtype=torch.float32), data=train_loader(dtype=torch.float32), n_eigenvalues=3
        )
    assert phi.dtype == torch.bfloat16
    assert (phi.float() - exact).norm() < 2e-2 * exact.norm()
    assert again.H.dtype == torch.float64
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("n", [1, 2, N_TEST])
def test_11_chunks_of_directions_that_do_not_divide_their_number(chunk_size, n):
    expected, la = fitted(), fitted(chunk_size=chunk_size)
    for a, b in zip(la.features(X[:n]), expected.features(X[:n]), strict=True):
        torch.testing.assert_close(a, b)


class Masked(DictModel):
    """Branches on the values of the mask, as Hugging Face's attention masks do."""

    def forward(self, batch):
        if bool(batch["attention_mask"].all()):
            batch = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
        return super().forward(batch)


def test_12_data_dependent_masks():
    with pytest.warns(UserWarning, match="one by one") as record:
        la = fitted(model=Masked(), data=dict_batches())
    assert len(record) == 1
    check_features(la, dict_batches(n=N_TEST, batch_size=N_TEST)[0])


def test_12_features_never_batch_over_the_inputs():
    model = Masked()
    plain = DictModel()
    la = fitted(model=plain, data=dict_batches())
    batch = dict_batches()[0]
    with pytest.warns(UserWarning, match="one by one"):  # of landmark gradients
        phi, f = NystromGGN(model, "classification").features(batch, la.basis)
    expected_phi, expected_f = reference_features(plain, la.basis, batch)
    torch.testing.assert_close(phi, expected_phi)
    torch.testing.assert_close(f, expected_f)


def unpooled(h):
    pooled, index = F.max_pool1d(h[:, None, :4], 2, return_indices=True)
    return F.pad(F.max_unpool1d(pooled, index, 2)[:, 0], (0, 1))


def test_13_operators_without_a_batching_rule_warn_once():
    la, texts = fitted_with_warnings(Transformed(unpooled), inputs())
    assert la.backend.support(X).features == "forward"
    assert all("no batching rule" in text and "max_unpool" in text for text in texts)
    assert len(texts) in (1, 2)  # features, and landmark gradients where they need the same


def test_13_the_warning_of_torch_is_on_afterwards():
    fitted_with_warnings(Transformed(unpooled), inputs())
    with pytest.warns(UserWarning, match="performance drop"):
        torch.func.vmap(unpooled)(torch.randn(2, 3, D))


def batch_norm_net():
    torch.manual_seed(0)
    layers = [nn.Linear(D, H), nn.BatchNorm1d(H), nn.Tanh(), nn.Dropout(0.5), nn.Linear(H, C)]
    model = nn.Sequential(*layers).double()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("backend", [NystromGGN, ReverseNystromGGN, BackPackGGN, AsdlGGN])
def test_14_train_mode_changes_neither_results_nor_buffers(backend):
    evaluated, trained = (
        fitted(model=batch_norm_net().eval()),
        fitted(model=batch_norm_net().train(), backend=backend),
    )
    torch.testing.assert_close(trained(X), evaluated(X), rtol=1e-8, atol=1e-10)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    left, right = (
        e(X, "nn", link_approx="mc", generator=g) for e, g in zip((trained, evaluated), generators)
    )
    torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)
    for name, buffer in batch_norm_net().named_buffers():
        assert torch.equal(dict(trained.model.named_buffers())[name], buffer), name
    assert all(m.training for m in trained.model.modules())


class Ticking(nn.Module):
    """Counts its calls in a buffer, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("ticks", torch.zeros(()))

    def forward(self, x):
        self.ticks += 1
        return self.net(x)


@pytest.mark.parametrize("backend", [NystromGGN, ReverseNystromGGN, BackPackGGN, AsdlGGN])
def test_14_buffers_written_in_evaluation_mode_are_left_alone(backend):
    la = fitted(model=Ticking(), backend=backend)
    torch.testing.assert_close(la(X), fitted()(X), rtol=1e-8, atol=1e-10)
    la(X, "nn", link_approx="mc", n_samples=3)
    la.optimize_prior_precision(method="gridsearch", val_loader=val_loader(), grid_size=3)
    assert la.model.ticks.item() == 0


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("backend", BACKENDS)
def test_15_predicting_in_inference_mode(likelihood, context, backend):
    la = fitted(likelihood, backend=backend)
    with context():
        x = X.clone()
        inside = la(x)
        samples = la.predictive_samples(x, "nn", 3, generator=torch.Generator().manual_seed(0))
    assert_same(inside, la(x))
    assert torch.equal(samples, la.predictive_samples(x, "nn", 3, generator=torch.Generator().manual_seed(0)))


def test_15_what_inference_mode_caches_can_be_differentiated_later():
    la = fitted("regression", enable_backprop=True)
    with torch.inference_mode():
        inside = la(X)
    x = X.clone().requires_grad_()
    _, cov = la(x)
    torch.testing.assert_close(cov.detach(), inside[1])
    cov.sum().backward()
    assert x.grad.abs().max() > 0


def test_15_fitting_in_inference_mode():
    la = build("regression", enable_backprop=True)
    with torch.inference_mode():
        la.fit(train_loader("regression"))
    torch.testing.assert_close(la.H, fitted("regression").H)
    delta, sigma = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    la.log_marginal_likelihood(delta, sigma).backward()
    assert delta.grad.abs().item() > 0
    assert sigma.grad.abs().item() > 0
    x = X.clone().requires_grad_()
    la(x)[1].sum().backward()
    assert x.grad.abs().max() > 0


def test_15_tuning_in_inference_mode():
    la, other = fitted(temperature=200.0), fitted(temperature=200.0)
    with torch.inference_mode():
        la.optimize_prior_precision(method="gridsearch", val_loader=val_loader(), grid_size=5)
    other.optimize_prior_precision(method="gridsearch", val_loader=val_loader(), grid_size=5)
    assert la.prior_precision.item() == other.prior_precision.item()


def conv_net(memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 5, 2), nn.Flatten(), nn.Linear(20, C)
    )
    return model.double().to(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("memory_budget", [None, 20_000], ids=["rows", "blocks"])
def test_16_directions_have_the_strides_and_dtype_of_their_weights(memory_format, memory_budget):
    x = torch.randn(N, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    la = fitted(
        model=conv_net(memory_format),
        data=loader(x, targets("classification")),
        memory_budget=memory_budget,
    )
    for name, p in la.model.named_parameters():
        v = la.basis.directions[name]
        assert v.shape == (5, *p.shape)
        assert v[0].stride() == p.stride(), name
        assert v.dtype == p.dtype
    check_features(la, x[:3])


def test_16_a_transposed_weight():
    model = mlp()
    model[0].weight = nn.Parameter(model[0].weight.detach().T.contiguous().T)
    la = fitted(model=model)
    assert la.basis.directions["0.weight"][0].stride() == (1, H)
    torch.testing.assert_close(la(X), fitted()(X))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)]
)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_17_low_precision(dtype, tolerance, likelihood):
    la = fitted(likelihood, mlp(dtype=dtype), train_loader(likelihood, dtype), n_eigenvalues=5)
    # The same rounded weights and inputs in double precision.
    exact = fitted(
        likelihood, mlp(dtype=dtype).double(), [(x.double(), y) for x, y in train_loader(likelihood, dtype)]
    )
    assert la.basis.rank == 5
    assert la.H.dtype == la.basis.eigenvalues.dtype == torch.float64
    x = X.to(dtype)
    for got, expected in zip(as_tuple(la(x)), as_tuple(exact(x.double())), strict=True):
        assert got.dtype == dtype
        assert (got.double() - expected).norm() < tolerance * expected.norm()


def test_18_wrapped_and_sharded_models():
    assert type(fitted(model=nn.DataParallel(mlp())).model) is nn.Sequential

    class FullyShardedDataParallel(nn.Sequential):
        pass

    sharded = mlp()
    sharded[0].weight.device_mesh = "cpu:0"  # what a DTensor has
    for model in (FullyShardedDataParallel(*mlp()), sharded):
        with pytest.raises(ValueError, match="sharded over processes"):
            build(model=model)


class Tied(nn.Module):
    """Uses one weight at two places."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)
        self.second.weight = self.first.weight
        self.double()

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).tanh())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_budget", [None, 20_000], ids=["rows", "blocks"])
def test_19_tied_weights_are_one_weight(backend, memory_budget):
    la = fitted(model=Tied(), backend=backend, memory_budget=memory_budget)
    n_params = sum(p.numel() for p in la.model.parameters())
    assert sorted(la.basis.directions) == [
        "first.bias",
        "first.weight",
        "head.bias",
        "head.weight",
        "second.bias",
    ]
    assert la.sample(2).shape == (2, n_params)
    check_features(la, X)
    fixed = fitted(model=Tied(), prior_precision=torch.linspace(1, 2, n_params))
    assert fixed.prior_precision_diag.shape == (n_params,)


@pytest.mark.parametrize("backend", [BackPackGGN, AsdlGGN])
def test_19_libraries_that_do_not_know_of_tied_weights_are_not_trusted(backend):
    with pytest.raises(ValueError, match=r"first\.weight|second\.weight"):
        fitted(model=Tied(), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_19_frozen_weights_have_no_directions(backend):
    model = mlp()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    la = fitted(model=model, backend=backend)
    assert list(la.basis.directions) == ["0.bias", "2.weight"]
    assert la.sample(2).shape == (2, H + C * H)
    check_features(la, X)
    before = model[0].weight.clone()
    assert la(X, "nn", link_approx="mc").shape == (N_TEST, C)
    assert torch.equal(model[0].weight, before)


def test_19_backpack_refuses_frozen_weights_as_in_the_host():
    model = mlp()
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"BackPACK|switched off"):
        build(model=model, backend=BackPackGGN)


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(D, C, bias=False).double()

    def forward(self, x):
        f = self.net(x)
        return f + f.square().sum(-1, keepdim=True).sqrt()


def test_20_a_root_at_zero_is_named():
    x = inputs()
    x[9] = 0
    landmarks = (inputs(M, seed=20), torch.arange(M) % C)
    la = build(model=Norm())
    with pytest.raises(ValueError, match=r"training inputs \["):
        la.fit(loader(x, targets("classification")), landmarks=landmarks)
    with pytest.raises(ValueError, match="landmarks"):
        la.fit(train_loader(), landmarks=(torch.zeros(1, D, dtype=torch.float64), torch.tensor([0])))
    assert la.H is None


# ------------------------------------------------------------------ the host


@pytest.mark.parametrize("link", ["probit", "mc", "bridge", "bridge_norm"])
@pytest.mark.parametrize("rank", [1, K])
def test_host_1_fewer_directions_than_outputs(link, rank):
    la = fitted(n_eigenvalues=rank, temperature=50.0)
    p = la(X, link_approx=link)
    assert rank < C
    torch.testing.assert_close(p.sum(-1), torch.ones(N_TEST, dtype=torch.float64))
    assert la.predictive_samples(X, n_samples=7).isfinite().all()


class SubclassWithKey(ELLALaplace):
    _key = ("all", "ella-of-the-trap-tests")


def test_host_2_a_subclass_with_its_own_key_leaves_the_parent_in_place():
    assert type(laplace.Laplace(mlp(), "classification", "all", "ella-of-the-trap-tests")) is SubclassWithKey
    assert type(laplace.Laplace(mlp(), "classification", "all", "ella")) is ELLALaplace


@pytest.mark.parametrize("link", ["bridge", "bridge_norm"])
def test_host_3_bridge_links_edit_nothing_in_place(link):
    la = fitted(temperature=200.0)
    first = la(X, link_approx=link)
    assert torch.equal(first, la(X, link_approx=link))
    # The tuning keeps features: were they edited, later settings would be scored wrongly.
    grid, scores = torch.logspace(-1, 3, 7).tolist(), []
    for delta in grid:
        la.prior_precision = delta
        scores.append(
            sum(F.nll_loss(la(x, link_approx=link).log(), y, reduction="sum") for x, y in val_loader())
        )
    options = {"log_prior_prec_min": -1, "log_prior_prec_max": 3, "grid_size": 7, "link_approx": link}
    la.optimize_prior_precision(method="gridsearch", val_loader=val_loader(), **options)
    assert la.prior_precision.item() == grid[int(torch.stack(scores).argmin())]


def test_host_4_the_constructor_of_the_host_assigns_through_our_setters():
    la = build("regression", prior_precision=2.0, sigma_noise=0.5, temperature=3.0)
    assert la.H is None
    assert (la.prior_precision.item(), la.sigma_noise.item(), la.temperature) == (2.0, 0.5, 3.0)
    assert la.mean is la.prior_mean


def test_host_5_members_of_the_host_live_in_the_span():
    la = fitted("regression", prior_precision=torch.linspace(1, 2, 66), sigma_noise=0.5)
    V = torch.cat([v.flatten(1) for v in la.basis.directions.values()], 1).T
    projected = V.T @ (la.prior_precision_diag[:, None] * V)
    A = la.H / 0.25 + projected
    torch.testing.assert_close(la.posterior_precision, A)
    torch.testing.assert_close(la.log_det_prior_precision, projected.logdet())
    torch.testing.assert_close(la.log_det_posterior_precision, A.logdet())
    draws = la.sample(20_000, torch.Generator().manual_seed(0)) - la.mean
    torch.testing.assert_close(draws @ V @ V.T, draws)
    found = (draws @ V).T.cov()
    assert (found - A.inverse()).norm() < 0.05 * A.inverse().norm()


def test_host_6_marglik_warns_once_that_the_temperature_stays():
    la = fitted(temperature=None)
    with pytest.warns(UserWarning, match="temperature") as caught:
        la.optimize_prior_precision(n_steps=2)
    assert len(caught) == 1


def test_host_6_marglik_does_not_reset_a_temperature_that_was_tuned():
    la = fitted(temperature=None)
    x = inputs(31, seed=9) * 3
    other = fitted(temperature=1e3)
    la.optimize_prior_precision(method="gridsearch", val_loader=loader(x, other(x)), grid_size=3)
    tuned = la.temperature
    with pytest.warns(UserWarning, match=r"temperature") as caught:
        la.optimize_prior_precision(n_steps=2)
    assert la.temperature == tuned
    assert "stays 1" not in str(caught[0].message)


def test_host_6_the_default_loss_of_regression_depends_on_the_prior():
    la = fitted("regression", temperature=30.0, prior_precision=7.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a tie would warn
        la.optimize_prior_precision(method="gridsearch", val_loader=val_loader("regression"))
    assert la.prior_precision.item() != 7.7


def test_host_6_a_loss_that_ties_leaves_the_setting_and_says_so():
    la = fitted("regression", prior_precision=7.7, temperature=None)
    with pytest.warns(UserWarning, match="same for every setting") as caught:
        la.optimize_prior_precision(
            method="gridsearch",
            val_loader=val_loader("regression"),
            loss=lambda mean, cov, y: (mean - y).square().mean(),
            grid_size=3,
        )
    assert len(caught) == 1
    assert la.prior_precision.item() == pytest.approx(7.7)
    assert la.temperature == 1.0


def test_host_7_the_default_grid_reaches_large_priors():
    torch.manual_seed(0)
    la = fitted(model=nn.Linear(D, C).double(), temperature=1e9)
    x = inputs(31, seed=9) * 300
    la.prior_precision = 2e5
    y = la(x)
    la.prior_precision = 1.0
    la.optimize_prior_precision(method="gridsearch", val_loader=loader(x, y))
    assert la.prior_precision.item() == pytest.approx(2e5, rel=0.15)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_host_9_mappings_and_logits_without_gradients(context):
    la = fitted(model=DictModel(), data=dict_batches())
    with context():
        batch = dict_batches()[0]
        p = la(batch)
    torch.testing.assert_close(p, la(batch))


def test_host_10_a_metric_is_reset_between_values():
    la = fitted(temperature=200.0)
    metric = RunningNLLMetric()
    metric.update(torch.full((3, C), 1 / C), torch.zeros(3, dtype=torch.long))
    options = {"log_prior_prec_min": -2, "log_prior_prec_max": 3, "grid_size": 17}
    la.optimize_prior_precision(method="gridsearch", val_loader=val_loader(), loss=metric, **options)
    chosen = la.prior_precision.item()
    scores = {}
    for delta in torch.logspace(-2, 3, 17).tolist():
        la.prior_precision = delta
        scores[delta] = sum(F.nll_loss(la(x).log(), y, reduction="sum").item() for x, y in val_loader())
    assert chosen == min(scores, key=scores.get)


def test_host_11_the_exact_ggn_of_the_host_agrees_to_rounding():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rank may be lower than P
        la = fitted(subsample_size=N * C, n_eigenvalues=66)
    full = laplace.Laplace(mlp(), "classification", "all", "full", backend=GGNInterface)
    full.fit(train_loader())
    x, _ = next(iter(train_loader()))
    # On the training inputs the span holds every gradient involved.
    torch.testing.assert_close(la(x), full(x), rtol=1e-9, atol=1e-11)


def test_host_12_outputs_with_logits_can_be_fitted():
    class Plain(DictModel):
        def forward(self, batch):
            return super().forward(batch).logits

    la, plain = fitted(model=DictModel(), data=dict_batches()), fitted(model=Plain(), data=dict_batches())
    assert torch.equal(la.H, plain.H)


def test_host_13_asdl_is_the_right_package():
    import asdl.core

    assert callable(asdl.core.extend)
    owners = importlib.metadata.packages_distributions()["asdl"]
    assert "asdfghjkl" in owners
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    required = setup["options"]["install_requires"].split()
    assert "asdfghjkl" in required
    assert "asdl" not in required


def test_importing_the_package_switches_nothing():
    code = (
        "import warnings; warnings.simplefilter('ignore');"
        "import torch, laplace, sys; sys.path.insert(0, sys.argv[1]);"
        "state = lambda: (torch.get_default_dtype(), torch.is_grad_enabled(), torch.backends.mkldnn.enabled,"
        "torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled(),"
        "torch.initial_seed(), torch.get_rng_state().sum().item());"
        "torch.manual_seed(3); before = state(); import laplace_ella; assert state() == before"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------ the user's model and process


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
    "gridsearch": grid_search,
    "gridsearch nn": lambda la: grid_search(la, pred_type="nn"),
    "state_dict": lambda la: la.load_state_dict(la.state_dict()),
}


@pytest.mark.parametrize("name", WORK)
def test_the_model_and_the_process_are_untouched(name):
    la = mixed()
    untouched = Untouched(la.model)
    WORK[name](la)
    untouched.check()


def test_the_evidence_loop_leaves_the_model_untouched():
    la = mixed()
    untouched = Untouched(la.model)
    with pytest.warns(UserWarning, match="temperature"):
        la.optimize_prior_precision(n_steps=3)
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


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_an_error_of_the_loss_comes_through_and_changes_nothing(pred_type):
    la = mixed()
    before, untouched = Snapshot(la, SEQUENCES), Untouched(la.model)
    scored = []

    def loss(p, y):
        scored.append(p)
        if len(scored) == 3:
            raise LossError
        return F.nll_loss(p.log(), y)

    with pytest.raises(LossError):
        grid_search(la, pred_type=pred_type, loss=loss)
    untouched.check()
    before.check()


def test_an_interrupt_changes_nothing():
    la = mixed()
    before, untouched = Snapshot(la, SEQUENCES), Untouched(la.model)

    def loss(p, y):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grid_search(la, loss=loss)
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
