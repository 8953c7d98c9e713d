"""The search itself: which settings of a grid are tried, whatever they are scored by."""

import math

import pytest
import torch
from helpers import C, fitted, inputs, loader, val_loader
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_ella import ELLALaplace
from laplace_ella.tuning.search import Search, decades, joint_search

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_a_search_of_three_parameters_is_no_worse_than_one_of_two():
    """From the smallest width alone it missed what needs a temperature and less noise at once, at a usual prior."""

    def loss(setting):
        if setting.prior_precision >= 100:  # too narrow to be of use
            return 5 + abs(math.log10(setting.sigma_noise))
        return 10 * abs(math.log10(setting.temperature) - 2) + 10 * abs(math.log10(setting.sigma_noise) + 1)

    grids = {
        "prior_precision": decades(-4, 4)[::-1],
        "temperature": decades(-3, 6),
        "sigma_noise": decades(-4, 2),
    }
    la = fitted("regression", temperature=None)
    start = la.optimize_hyperparameters(val_loader("regression"), {"temperature": [1.0]}, apply=False).best
    for names in (["temperature", "sigma_noise"], list(grids)):
        search = Search(loss)
        joint_search(search, start, {k: grids[k] for k in names}, lambda x, _: x)
        assert search.table[search.best] == 0


def test_noise_is_searched_finely_enough_that_no_wide_variance_stands_in_for_it():
    """With half-decade steps of sigma, a huge temperature with hardly any noise won the grid, and was refined."""
    x, y = (torch.tensor(a).float() for a in load_diabetes(return_X_y=True))
    x, y = x / x.std(0), ((y - y.mean()) / y.std())[:, None]
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    train, val = (TensorDataset(x[i], y[i]) for i in (order[:200], order[200:]))
    model = nn.Sequential(nn.Linear(10, 50), nn.Tanh(), nn.Linear(50, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(train.tensors[0]), train.tensors[1]).backward()
        optimizer.step()
    la = ELLALaplace(model, "regression", curvature_size=None)
    la.fit(DataLoader(train, batch_size=50))
    val = DataLoader(val, batch_size=50)
    found = la.optimize_hyperparameters(val, apply=False)
    fine = {"temperature": [1e-3, 1.0, 1e3, 1e6], "sigma_noise": torch.logspace(-1, 0.5, 60).tolist()}
    assert found.score <= la.optimize_hyperparameters(val, fine, apply=False).score + 1e-3


def test_noise_is_tuned_to_the_spread_of_targets_of_constant_variance():
    la, x = fitted("regression", prior_precision=1e9, temperature=1.0), inputs(300, seed=5)
    errors = 0.3 * torch.randn(300, C, dtype=torch.float64)
    la.optimize_hyperparameters(loader(x, la.model(x).detach() + errors), ["sigma_noise"])
    assert la.sigma_noise.item() == pytest.approx(errors.square().mean().sqrt().item(), rel=1e-3)


def test_a_temperature_on_the_end_of_its_range_is_said():
    la, x = fitted(temperature=None), inputs(17, seed=3)
    data = [(x, la.model(x).argmin(1))]  # labels that a wider variance always fits better
    with pytest.warns(UserWarning, match=r"best temperature, 1e\+06, lies on an edge .* falls above it"):
        la.optimize_prior_precision(method="gridsearch", val_loader=data, log_prior_prec_min=-6, grid_size=1)
