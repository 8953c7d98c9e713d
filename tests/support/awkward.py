"""Models that some way of differentiating fails on, and checks of their features."""

import warnings

import torch
from helpers import N_TEST, C, D, H, N, fitted, inputs, loader, reference_features, targets
from torch import nn

from laplace_ella import NystromGGN, ReverseNystromGGN

X = inputs(N_TEST, seed=7)
BACKENDS = [NystromGGN, ReverseNystromGGN]
T_STEPS, WIDTH = 3, 4  # length and width of the sequences below


def sequences(n=N, seed=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, T_STEPS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def check_features(la, x, model=None):
    """Compare with plain backward passes through the model, or a copy of it."""
    phi, f = la.features(x)
    expected_phi, expected_f = reference_features(model or la.model, la.basis, x)
    torch.testing.assert_close(f, expected_f)
    torch.testing.assert_close(phi, expected_phi)
    assert phi.abs().max() > 0


def fitted_with_warnings(model, x, **kwargs):
    """Fit, check the features, and return the estimator with the texts of its warnings."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "`torch.jit")  # of dependencies that are imported now
        la = fitted(model=model, data=loader(x, targets("classification", len(x))), **kwargs)
        la(x)
        check_features(la, x[:3])
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


def halved_gradient(h):
    with torch.no_grad():
        kept = h / 2
    return h / 2 + kept


class OldCube(torch.autograd.Function):
    """Of the old style: no transform of ``torch.func`` takes it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class WrongJvp(torch.autograd.Function):
    """Scales its tangents, and not its gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0].cos() * grad

    @staticmethod
    def jvp(ctx, tangent):
        return ctx.saved_tensors[0].cos() * tangent * 1.5
