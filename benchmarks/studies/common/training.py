"""Training of the networks whose weights are not published."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int, rate: float) -> nn.Module:
    """Minimise the cross-entropy with Adam, in batches of 128, by a learning rate that rises and falls once."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    batches = -(-len(y) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(y), generator=generator).to(y.device).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()
