"""Lowers chains of layers to an ExecuTorch program: what `host_rates` times. Only this part needs torch."""

import gc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import export
from torch.nn import functional

from edgebuild.spec import LayerFacts, Precision

Chain = tuple[LayerFacts, ...]


class ChainModule(nn.Module):
    """The layers of a chain, one after another; an add adds the output of the first layer."""

    def __init__(self, chain: Chain):
        super().__init__()
        self.chain = chain
        self.layers = nn.ModuleList(_layer(facts) for facts in chain if facts.weighted)

    def forward(self, x: Tensor) -> Tensor:
        layers = iter(self.layers)
        first = x = next(layers)(x)
        for facts in self.chain[1:]:
            x = next(layers)(x) if facts.weighted else x + first
        # Giving out a whole feature map would cost more than some of the layers. A mean would not be delegated.
        return functional.adaptive_avg_pool2d(x, 1) if x.ndim == 4 else x


def _layer(facts: LayerFacts) -> nn.Module:
    if facts.op == "linear":
        return nn.Linear(facts.in_channels, facts.out_channels)
    kernel, stride = facts.kernel[0], facts.stride[0]
    return nn.Conv2d(facts.in_channels, facts.out_channels, kernel, stride, kernel // 2, groups=facts.groups)


def lower(methods: Mapping[str, tuple[Chain, Precision]]) -> bytes:
    """A `.pte` with a method for each chain, delegated to XNNPACK; int8 is static and per channel."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    collecting = gc.isenabled()
    gc.disable()  # a third of the time would go into walking over graphs that live to the end anyway
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            programs = {name: _export(chain, precision) for name, (chain, precision) in methods.items()}
        edge = to_edge_transform_and_lower(
            programs,
            partitioner={name: [XnnpackPartitioner()] for name in programs},
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        return edge.to_executorch().buffer
    finally:
        if collecting:
            gc.enable()


def _export(chain: Chain, precision: Precision) -> Any:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    inputs = (torch.randn(chain[0].in_shape),)
    exported = export(ChainModule(chain).eval(), inputs)
    if precision == "fp32":
        return exported
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(exported.module(check_guards=False), quantizer)
    prepared(*inputs)
    return export(convert_pt2e(prepared), inputs)
