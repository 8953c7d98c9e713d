"""Layers and wrappers of every kind, each resisting in its way: features against plain backward passes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from awkward import OldCube
from helpers import C, DictModel, build, dict_batches, loader, reference_features, targets
from models import N_INPUTS, Applied, Checkpointed, Residual
from torch import Tensor, nn
from torch.nn import functional as F
from untouched import Untouched

from laplace_ella.network.features import FEATURES as WAYS

# Checkpoints call it in older versions of torch.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast:FutureWarning")

N_TRAIN, N_TEST, M, K = 7, 3, 5, 2
STEPS, WIDTH, PIXELS, CHANNELS = 3, 4, 5, 2

# Parts of the warnings: what falls back, features or landmark gradients; and what batches slowly.
FEATURES, ROWS, SLICES = "forward mode", "one by one", "slice by slice"


def of_shape(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


vectors, sequences = of_shape(WIDTH), of_shape(STEPS, WIDTH)
images = of_shape(CHANNELS, PIXELS, PIXELS)


def tokens(n: int) -> Tensor:
    return torch.randint(11, (n, STEPS))


def mapping(n: int) -> dict[str, Tensor]:
    batch = dict_batches(n=n, batch_size=n)[0]
    return {k: batch[k] for k in ("input_ids", "attention_mask")}


class Pooled(nn.Module):
    """A layer, the mean of its output over all axes between batch and width, and a linear head."""

    def __init__(self, layer: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(width, C)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        out = out[0] if isinstance(out, tuple) else out
        return self.head(out.flatten(1, -2).mean(1) if out.ndim > 2 else out)


def with_head(*layers: nn.Module, width: int = WIDTH) -> nn.Module:
    return Pooled(nn.Sequential(*layers), width)


def convolutional(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(CHANNELS, 4, 2), *layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(C))


def with_statistics(model: nn.Module) -> nn.Module:
    """Give running means and variances values that are not 0 and 1."""
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().forward(x, x, x)


def scaled_dot_product(mask: Tensor | None = None) -> nn.Module:
    def attention(qkv: nn.Module, x: Tensor) -> Tensor:
        q, k, v = qkv(x)[:, None].chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, mask)[:, 0]

    return Pooled(Applied(attention, nn.Linear(WIDTH, 3 * WIDTH)))


TRIANGLE = torch.ones(STEPS, STEPS).tril().bool()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 7, batch_first=True)
    return Pooled(nn.TransformerEncoder(layer, 2))


def spatial_transformer() -> nn.Module:
    """Moves its input by an affine map that it computes from it."""

    def moved(net: nn.Module, x: Tensor) -> Tensor:
        theta = net[0](x.flatten(1)).reshape(-1, 2, 3).tanh()
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return net[1](F.grid_sample(x, grid, align_corners=False).flatten(1))

    return Applied(moved, nn.Sequential(*(nn.Linear(CHANNELS * PIXELS**2, n) for n in (6, C))))


def pooled_channels_last() -> nn.Module:
    """Pool to one pixel: in this memory format that operator has no batching rule."""
    layers = [nn.Conv2d(CHANNELS, 4, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, C)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def distances(p: float) -> nn.Module:
    """Distances to learned centres; ``p`` = 2 multiplies matrices, others have kernels of their own."""
    centres = Applied(lambda net, x: torch.cdist(x, net.weight, p=p), nn.Linear(WIDTH, WIDTH, bias=False))
    return with_head(nn.Linear(WIDTH, WIDTH), centres)


def masked(net: nn.Module, batch: dict[str, Tensor]) -> Any:
    """Branch on the values of the mask, as Hugging Face's models do."""
    mask = batch["attention_mask"]
    return net({**batch, "attention_mask": torch.ones_like(mask)} if bool(mask.all()) else batch)


def sparse_product() -> nn.Module:
    def product(net: nn.Module, x: Tensor) -> Tensor:
        return torch.sparse.mm(torch.eye(WIDTH).double().to_sparse(), net(x).T).T

    return with_head(Applied(product, nn.Linear(WIDTH, WIDTH)))


def two_names() -> nn.Module:
    layers = nn.ModuleDict({"first": nn.Linear(WIDTH, WIDTH)})
    layers["alias"] = layers["first"]
    return with_head(Applied(lambda net, x: net["alias"](net["first"](x).tanh()), layers))


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))
    return with_head(layer, nn.Tanh())


def new_weight_norm() -> nn.Module:
    return with_head(nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh())


class _Cube(OldCube):
    """New style, reverse mode only, without a rule for batches."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


class _CubeBatched(_Cube):
    generate_vmap_rule = True


class _CubeForward(_Cube):
    jvp = staticmethod(_Cube.backward)  # the derivative is the same both ways


class _CubeForwardBatched(_CubeForward):
    generate_vmap_rule = True


def custom(function: type[torch.autograd.Function]) -> Callable[[], nn.Module]:
    return lambda: with_head(
        nn.Linear(WIDTH, WIDTH), Applied(lambda net, x: function.apply(x), nn.Identity())
    )


def without_checkpoints(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    twin.use_reentrant = None
    return twin


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, C))


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and what is expected of it."""

    name: str
    make_model: Callable[[], nn.Module]
    make_input: Callable[[int], Any] = vectors
    fallbacks: tuple[str, ...] | None = ()  # parts of the warnings; None: as the version of torch has it
    training: bool = False  # the model's mode when it is fitted and called
    oracle: Callable[[nn.Module], nn.Module] = lambda model: model  # what plain backward passes differentiate

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make_model().double()
        if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
            model(self.make_input(2))
        return with_statistics(model).train(self.training)


INSTANCE_NORM = partial(nn.InstanceNorm2d, 4, affine=True, track_running_stats=True)
BOTH = (FEATURES, ROWS)
CASES = [
    # attention
    Case("multi-head attention", lambda: Pooled(SelfAttention(WIDTH, 2, batch_first=True)), sequences),
    Case("transformer encoder, training", encoder, sequences, training=True),
    Case("scaled dot product", scaled_dot_product, sequences),
    Case("scaled dot product, mask", lambda: scaled_dot_product(TRIANGLE), sequences),
    # recurrent layers
    Case("LSTM", lambda: Pooled(nn.LSTM(WIDTH, 5, batch_first=True), 5), sequences, (ROWS,)),
    Case("GRU", lambda: Pooled(nn.GRU(WIDTH, 5, batch_first=True), 5), sequences, (ROWS,)),
    # operators that lack a rule
    Case("data-dependent mask", lambda: Applied(masked, DictModel()), mapping, (ROWS,)),
    Case("sparse product", sparse_product, fallbacks=None),
    Case("embedding bag", lambda: Pooled(nn.EmbeddingBag(11, WIDTH)), tokens, (FEATURES,)),
    Case("grid sample", spatial_transformer, images, None),
    Case("cdist", lambda: distances(2.0), vectors, (FEATURES,)),
    Case("cdist, p = 1.5", lambda: distances(1.5), vectors, (FEATURES,)),
    Case("pooling, channels last", pooled_channels_last, images, None),
    # parametrisations
    Case("weight norm, hooks", old_weight_norm, vectors, (FEATURES,)),
    Case("weight norm", new_weight_norm, vectors, (FEATURES,)),
    # normalisation and dropout
    Case("group norm", lambda: convolutional(nn.GroupNorm(2, 4)), images),
    Case("layer norm", lambda: with_head(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)), sequences),
    Case("instance norm, statistics", lambda: convolutional(INSTANCE_NORM()), images, training=True),
    Case("batch norm 1d", lambda: with_head(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))),
    Case("batch norm 2d, training", lambda: convolutional(nn.BatchNorm2d(4)), images, training=True),
    Case("dropout", lambda: with_head(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)), training=True),
    # others
    Case("transposed convolution", lambda: convolutional(nn.Tanh(), nn.ConvTranspose2d(4, 3, 2, 2)), images),
    Case("in-place residual", Residual, of_shape(N_INPUTS)),
    Case("module with two names", two_names),
    Case("mapping in, logits out", DictModel, mapping),
    # custom functions
    Case("function, no rules", custom(_Cube), vectors, BOTH),
    Case("function, batches", custom(_CubeBatched), vectors, (FEATURES,)),
    Case("function, jvp", custom(_CubeForward), vectors, BOTH),
    Case("function, jvp and batches", custom(_CubeForwardBatched), vectors),
    Case("function, old style", custom(OldCube), vectors, BOTH),
    # wrappers
    Case("checkpoint", lambda: Checkpointed(False, WIDTH), vectors, None),
    Case("re-entrant", lambda: Checkpointed(True, WIDTH), vectors, BOTH, oracle=without_checkpoints),
    Case("compiled", lambda: torch.compile(mlp(), backend="eager"), oracle=lambda model: model._orig_mod),
    # On a machine with a GPU, DataParallel moves the model there at once.
    Case("data parallel", lambda: nn.DataParallel(mlp()).cpu(), oracle=lambda model: model.module),
]


def batches(x: Any) -> Any:
    """Labelled batches of 4 rows."""
    y = targets("classification", N_TRAIN)
    if isinstance(x, Tensor):
        return loader(x, y, batch_size=4)
    columns = [{**x, "labels": y}[k].split(4) for k in (*x, "labels")]
    return [dict(zip((*x, "labels"), values)) for values in zip(*columns)]


def check_fallbacks(case: Case, support: Any, messages: list[Warning | str]) -> None:
    """Require one warning for each thing that fell back, no other, and those of the table."""
    assert support.features in WAYS
    assert support.gradients in {"vmap", "loop"}
    fell_back = {FEATURES: support.features != "forward", ROWS: support.gradients == "loop"}
    if case.fallbacks is not None:
        assert fell_back == {part: part in case.fallbacks for part in fell_back}, support
    slow = [m for m in messages if SLICES in str(m)]
    assert len(slow) <= 2, slow  # features, and landmark gradients
    assert len(messages) - len(slow) == sum(fell_back.values()), messages
    for part, expected in fell_back.items():
        assert sum(part in str(m) for m in messages) == expected, messages


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_architecture(case: Case) -> None:
    model = case.model()
    untouched = Untouched(model)
    data, x = batches(case.make_input(N_TRAIN)), case.make_input(N_TEST)
    la = build(model=model, subsample_size=M, n_eigenvalues=K)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always", UserWarning)
        # Re-entrant checkpoints say so in plain forward passes too.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad", UserWarning)
        la.fit(data)
        phi, f = la.features(x)
        probs = la(x, link_approx="mc")
    untouched.check()
    assert probs.shape == (N_TEST, C)
    assert probs.isfinite().all()
    expected_phi, expected_f = reference_features(case.oracle(model), la.basis, x)
    torch.testing.assert_close(f, expected_f)
    torch.testing.assert_close(phi, expected_phi)
    assert phi.abs().max() > 0
    check_fallbacks(case, la.backend.support(x), [w.message for w in record])
