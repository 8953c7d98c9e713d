"""What torch cannot differentiate in one way is differentiated in another, and said."""

from __future__ import annotations

import pytest
import torch
from awkward import (
    BACKENDS,
    T_STEPS,
    WIDTH,
    Attention,
    Transformed,
    X,
    check_features,
    fitted_on_sequences,
    fitted_with_warnings,
    sequences,
)
from helpers import (
    N_TEST,
    C,
    D,
    DictModel,
    H,
    N,
    build,
    dict_batches,
    fitted,
    inputs,
    loader,
    mlp,
    reference_features,
    targets,
    train_loader,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from laplace_ella import NystromGGN


@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_attention(backend):
    la = fitted_on_sequences(Attention, backend)
    check_features(la, sequences(N_TEST, 12))
    assert la(sequences(N_TEST, 12), "nn", link_approx="mc").shape == (N_TEST, C)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_fast_path_of_transformer_layers(backend, training, grad):
    def make():
        return nn.TransformerEncoderLayer(WIDTH, 2, 7, dropout=0.5, batch_first=True)

    with torch.set_grad_enabled(grad):
        la = fitted_on_sequences(make, backend, training=training)
        check_features(la, sequences(N_TEST, 12))


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layers", [1, 2])
def test_recurrent_layers(layer, dtype, layers):
    with pytest.warns(UserWarning, match="one by one"):
        la = fitted_on_sequences(
            lambda: layer(WIDTH, 7, layers, batch_first=True), width=7, dtype=dtype, n_eigenvalues=3
        )
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {}
    check_features(la, sequences(N_TEST, 12, dtype), **tolerance)


def sampled(h):
    """Read an image at places that depend on the weights."""
    image = torch.arange(9, dtype=h.dtype).view(1, 1, 3, 3).expand(len(h), -1, -1, -1)
    grid = h[:, None, :4].tanh().reshape(-1, 1, 2, 2)
    return F.pad(F.grid_sample(image, grid, align_corners=False).flatten(1), (0, D - 2))


def distances(h):
    return torch.cdist(h, torch.eye(D, dtype=h.dtype))


def normed(h):
    weight = torch._weight_norm(h[:, :, None], h.new_ones(len(h), 1, 1))
    return weight[..., 0]


@pytest.mark.parametrize(
    "function", [sampled, normed, distances], ids=["grid_sample", "weight_norm", "cdist"]
)
def test_operators_without_a_forward_rule(function):
    la, texts = fitted_with_warnings(Transformed(function), inputs())
    found = la.backend.support(X)
    fell_back = [found.features != "forward", found.rows == "loop"]  # later versions of torch may add rules
    texts = [text for text in texts if "slice by slice" not in text]
    assert len(texts) == sum(fell_back)
    assert any("forward mode" in text for text in texts) == fell_back[0]


def test_the_warning_names_operator_and_cost():
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
def test_what_no_transform_takes(function, memory_budget):
    model = Transformed(function)
    la, texts = fitted_with_warnings(model, inputs(), Transformed(torch.sin), memory_budget=memory_budget)
    assert la.backend.support(X).rows == "loop"
    assert len(texts) == 2
    torch.testing.assert_close(la(X), fitted(model=Transformed(torch.sin))(X))
    assert all(p.grad is None for p in model.parameters())


def test_what_a_model_supports_is_found_out_once():
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


def test_out_of_memory_is_no_reason_to_fall_back():
    def full(h):
        if h.requires_grad or torch._C._functorch.maybe_current_level() is not None:
            raise torch.cuda.OutOfMemoryError("no room")
        return h

    la = build(model=Transformed(full))
    with pytest.raises(torch.cuda.OutOfMemoryError, match="no room"):
        la.fit(train_loader())
    assert la.H is None


@pytest.mark.parametrize("mode", ["forward", "double", "reverse"])
def test_the_mode_can_be_named(mode):
    la = fitted(autodiff=mode)
    assert la.backend.support(X).features == mode
    check_features(la, X)
    with pytest.raises(ValueError, match="autodiff must be one of"):
        build(autodiff="sideways")


def test_a_mode_that_does_not_work_is_an_error():
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
def test_forward_and_reverse_that_disagree(function):
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
def test_rounding_is_no_disagreement(dtype):
    model = nn.Sequential(*[m for _ in range(10) for m in (nn.Linear(D, D), nn.ReLU())], nn.Linear(D, C))
    fitted(model=model.to(dtype), data=train_loader(dtype=dtype), n_eigenvalues=1)


def test_features_keep_no_graph_of_the_weights():
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


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("n", [1, 2, N_TEST])
def test_chunks_of_directions_that_do_not_divide_their_number(chunk_size, n):
    expected, la = fitted(), fitted(chunk_size=chunk_size)
    for a, b in zip(la.features(X[:n]), expected.features(X[:n]), strict=True):
        torch.testing.assert_close(a, b)


class Masked(DictModel):
    """Branches on the values of the mask, as Hugging Face's attention masks do."""

    def forward(self, batch):
        if bool(batch["attention_mask"].all()):
            batch = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
        return super().forward(batch)


def test_data_dependent_masks():
    with pytest.warns(UserWarning, match="one by one") as record:
        la = fitted(model=Masked(), data=dict_batches())
    assert len(record) == 1
    check_features(la, dict_batches(n=N_TEST, batch_size=N_TEST)[0])


def test_features_never_batch_over_the_inputs():
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


def test_operators_without_a_batching_rule_warn_once():
    la, texts = fitted_with_warnings(Transformed(unpooled), inputs())
    assert la.backend.support(X).features == "forward"
    assert all("no batching rule" in text and "max_unpool" in text for text in texts)
    assert len(texts) in (1, 2)  # features, and landmark gradients where they need the same


def test_the_warning_of_torch_is_on_afterwards():
    fitted_with_warnings(Transformed(unpooled), inputs())
    with pytest.warns(UserWarning, match="performance drop"):
        torch.func.vmap(unpooled)(torch.randn(2, 3, D))
