"""Batch norms told anew what they see: after surgery on the layers before them, their statistics are another model's.

Wu and Johnson 2021, arXiv:2105.07576 (PreciseBN): the mean and variance over a whole set of samples.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from edgebuild.lift import batch_is_free, stacked

BATCH, MOST_SAMPLES = 64, 256


def restated(model: fx.GraphModule, samples: Sequence[tuple[Tensor, ...]]) -> fx.GraphModule:
    """A copy whose batch norms have the statistics of the samples (batch size 1); the model itself without any."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    if not samples or not batch_is_free(model, samples[0]):
        return model
    result = copy.deepcopy(model)
    norms = [module for module in result.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    samples = samples[:MOST_SAMPLES]
    with torch.no_grad():
        for batch in stacked(samples, BATCH):
            result(*batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return result.eval()
