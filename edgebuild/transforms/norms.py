"""Batch norms told anew what they see, as after surgery on the layers before them their statistics are another model's.

Wu and Johnson 2021, arXiv:2105.07576 (PreciseBN): the mean and variance over a whole set of samples. And batch norms
that are folded into the convolutions before them.
"""

import copy
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

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


def folded(model: nn.Module) -> nn.Module:
    """A copy in eval mode with each batch norm folded into the convolution before it: the same outputs, sooner.

    A model that is not lifted stays as it is.
    """
    if not isinstance(model, fx.GraphModule):
        return model
    result = copy.deepcopy(model).eval()
    calls = Counter(node.target for node in result.graph.nodes)
    for node in list(result.graph.nodes):
        norm = result.get_submodule(node.target) if node.op == "call_module" else None
        before = node.args[0] if node.args else None
        if not isinstance(norm, nn.BatchNorm2d) or not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        conv = result.get_submodule(str(before.target))
        if isinstance(conv, nn.Conv2d) and len(before.users) == 1 and calls[before.target] == 1:
            result.set_submodule(str(before.target), fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(before)
            result.graph.erase_node(node)
    result.recompile()
    return result
