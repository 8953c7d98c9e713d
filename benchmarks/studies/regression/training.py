"""The networks of this study, trained by least squares."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from benchmarks.studies.regression.data import Data

RATE = 3e-3


class MLP(nn.Module):
    """Layers with tanh, and a linear layer ``fc`` to one output."""

    def __init__(self, n_inputs: int, widths: tuple[int, ...], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Linear(n_inputs, width), nn.Tanh()]
            n_inputs = width
        self.hidden = nn.Sequential(*layers)
        self.fc = nn.Linear(n_inputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.hidden(x))


def fit_network(model: nn.Module, data: Data, epochs: int, batch: int, seed: int) -> tuple[nn.Module, int]:
    """Minimise the squared error with Adam, by a learning rate that rises and falls once.

    Returns
    -------
    the weights that were best on the rows for stopping, and the number of their epoch
    """
    (x, y), generator = data.train, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    steps = epochs * -(-len(y) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    best, found = float("inf"), (copy.deepcopy(model), 0)
    for epoch in range(1, epochs + 1):
        for chosen in torch.randperm(len(y), generator=generator).split(batch):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()
        score = _error(model, *data.stop)
        if score < best:
            best, found = score, (copy.deepcopy(model), epoch)
    return found[0].eval(), found[1]


@torch.no_grad()
def _error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float(nn.functional.mse_loss(model(x), y))
