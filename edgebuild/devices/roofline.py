"""Time of a layer from a core's peak rate and its memory's bandwidth.

This is the roofline model of Williams, Waterman and Patterson ("Roofline: an insightful visual performance model",
CACM 52(4), 2009), with a fixed cost for each operator. The constants are assumptions about XNNPACK's kernels in
general. None is fitted to a device; a target's `latency_error` says how far off the result was where published figures
exist.
"""

from dataclasses import replace

from edgebuild.spec import Cluster, LayerFacts, Memory, Precision

# Share of the peak multiply-accumulate rate that a kernel reaches. Dense: a 6x8 GEMM tile issues 12 vector
# multiply-accumulates for each 3 to 4 vector loads, and loses some more to edges and cache misses. Depthwise: a 3x3
# kernel has no reuse in registers and loads an input and a weight vector for every multiply-accumulate, so that the one
# or two load ports bound it.
DENSE_EFFICIENCY = 0.75
DEPTHWISE_EFFICIENCY = 0.4

# Output channels are computed in whole tiles, so that 12 channels take as long as 16. Widths of XNNPACK's common NEON
# micro-kernels: f32-gemm/igemm 4x8 and 6x8, qs8-qc8w-gemm 4x16 (dot product and mlal lane).
CHANNEL_TILE: dict[Precision, int] = {"fp32": 8, "int8": 16}

# Seconds for setting up an operator and, with several threads, waking and joining them; small layers are bound by it.
OVERHEAD = 5e-6


def seconds(layer: LayerFacts, precision: Precision, cluster: Cluster, memory: Memory, threads: int) -> float:
    """Predicted seconds of one layer for a single sample on `threads` cores of a cluster.

    The cores share the bandwidth of the memory. Operators without weights cost the bytes they move.
    """
    cores = min(threads, cluster.count)
    bandwidth = min(memory.one_core * cores, memory.all_cores)
    moving = layer.bytes_moved(precision) / bandwidth
    if not layer.weighted:
        return OVERHEAD + moving
    rate = cluster.macs.int8 if precision == "int8" else cluster.macs.fp32
    efficiency = DEPTHWISE_EFFICIENCY if layer.depthwise else DENSE_EFFICIENCY
    computing = padded_macs(layer, precision) / (rate * cluster.clock.rate * cores * efficiency)
    return OVERHEAD + max(computing, moving)


def padded_macs(layer: LayerFacts, precision: Precision) -> int:
    """Multiply-accumulates of one sample with the output channels of each group rounded up to whole tiles."""
    tile = CHANNEL_TILE[precision]
    if layer.depthwise:
        return replace(layer, out_channels=-(-layer.out_channels // tile) * tile).macs
    each = layer.out_channels // layer.groups
    return replace(layer, out_channels=-(-each // tile) * tile * layer.groups).macs
