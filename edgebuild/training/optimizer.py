"""The optimizer, its learning rate and the schedule, from the model alone."""

from typing import Any

import torch
from torch import nn

# Peak rates. Behind batch norms 0.05 does best of 0.02 to 0.1, for plain and for factorized convolutions
# (docs/compression.md); where there is attention or no batch norm, steps of SGD are too large for some layers and too
# small for others.
SGD_RATE, ADAMW_RATE = 0.05, 1e-3
WARM_UP = 0.05  # of the steps
WEIGHT_DECAY = {"SGD": 5e-4, "AdamW": 1e-2}


def make(model: nn.Module, rate: float) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer and its name, at its peak learning rate; `rate` 0 takes the usual one.

    Biases and norms are not decayed (He et al. 2018, arXiv:1812.01187).
    """
    trained = [p for p in model.parameters() if p.is_floating_point()]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1]},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        rate = rate or SGD_RATE
        decay = WEIGHT_DECAY["SGD"]
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, weight_decay=decay), "SGD"
    rate = rate or ADAMW_RATE
    return torch.optim.AdamW(groups, lr=rate, weight_decay=WEIGHT_DECAY["AdamW"]), "AdamW"


def share_of_rate(step: int, steps: int) -> float:
    """The learning rate at a step by its peak: a linear warm-up, then a line down to 0 (Defazio 2023, 2310.07831)."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / (warm + 1)
    return 1 - (step - warm) / max(1, steps - warm)
