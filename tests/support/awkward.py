"""Models that some way of differentiating fails on, and checks of their features."""

from __future__ import annotations

import warnings

import torch
from helpers import N_TEST, C, D, H, N, fitted, inputs, loader, reference_features, targets
from torch import nn
from torch.nn import functional as F

from laplace_ella import NystromGGN, ReverseNystromGGN

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


def batch_norm_net():
    torch.manual_seed(0)
    layers = [nn.Linear(D, H), nn.BatchNorm1d(H), nn.Tanh(), nn.Dropout(0.5), nn.Linear(H, C)]
    model = nn.Sequential(*layers).double()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model
