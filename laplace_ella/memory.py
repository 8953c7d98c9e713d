r"""How much memory there is, and how much of it rows and activations may take."""

from __future__ import annotations

import psutil
import torch

# Share of the free memory that a fit may plan with, when the user names no budget.
DEFAULT_SHARE = 0.25


def default_budget(device: torch.device) -> int:
    """Return a quarter of the free memory of a device, in bytes; on CPU, of the available RAM."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    return int(DEFAULT_SHARE * free)
