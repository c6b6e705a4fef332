"""The cost model: what a choice will weigh, how long it will run, how much memory it will take."""

from collections.abc import Callable, Sequence
from functools import cache

from edgebuild.devices import DEVICES
from edgebuild.plan import Choice, Limit
from edgebuild.spec import Budget, LayerFacts, Precision, Profile, Target

# What an XNNPACK program needs beside its weights, read off .pte files of known models.
FILE_BYTES = 8_000
NODE_BYTES: dict[Precision, int] = {"fp32": 150, "int8": 810}  # int8 operators carry their quantization along
# Resident memory of a loaded program that has no weights: the delegate's bookkeeping.
RUNTIME_BYTES = 40_000
PLANNED = ("size", "latency", "latency_p95", "latency_p99", "throughput", "peak_memory")


def limits(profile: Profile, targets: Sequence[Target], factors: dict[tuple[str, str], float]) -> tuple[Limit, ...]:
    """The budgets that a plan can be made for, each with its cost; `factors` corrects them by what was measured."""
    found = []
    for budget in profile.budgets:
        if budget.kind not in PLANNED:
            continue
        for target in targets if budget.kind != "size" else targets[:1]:
            name = "" if budget.kind == "size" else target.name
            factor = factors.get((budget.kind, name), 1.0)
            bound = 1 / budget.bound if budget.kind == "throughput" else budget.bound
            found.append(Limit(budget.kind, name, bound, _cost(budget, target, profile.threads), factor))
    return tuple(found)


def _cost(budget: Budget, target: Target, threads: int) -> Callable[[Choice], float]:
    if budget.kind == "size":
        return size
    if budget.kind == "peak_memory":
        return peak_memory
    return lambda choice: latency(choice, target, threads)


def size(choice: Choice) -> float:
    """Bytes of the artifact: weights, biases, per-channel scales, a fixed share for each operator."""
    return FILE_BYTES + sum(layer_size(layer, precision) for layer, precision in choice.layers())


@cache
def layer_size(layer: LayerFacts, precision: Precision) -> float:
    """Bytes that a layer adds to the artifact."""
    if not layer.weighted:
        return NODE_BYTES[precision]
    width, scales = (1, 4 * layer.out_channels) if precision == "int8" else (4, 0)
    return NODE_BYTES[precision] + width * layer.weights + scales + (4 * layer.out_channels if layer.bias else 0)


def latency(choice: Choice, target: Target, threads: int) -> float:
    """Seconds of an inference on a target: the call itself and the sum over the layers."""
    layers = sum(layer_latency(layer, precision, target, threads) for layer, precision in choice.layers())
    return DEVICES[target.device].call_latency(target, threads) + layers


@cache
def layer_latency(layer: LayerFacts, precision: Precision, target: Target, threads: int) -> float:
    """Seconds of a layer on a target, by the target's device."""
    return DEVICES[target.device].layer_latency(layer, precision, target, threads)


def peak_memory(choice: Choice) -> float:
    """Bytes at the worst moment: the file, the weights as the kernels pack them, the live activations."""
    element = 1 if choice.precision == "int8" else 4
    weights = sum(layer_size(layer, precision) for layer, precision in choice.layers())
    return RUNTIME_BYTES + size(choice) + weights + element * choice.live_elements()


def warm_up(targets: Sequence[Target], threads: int) -> None:
    """Let each target's device measure what its predictions rest on, if it must; a second call costs nothing."""
    for target in targets:
        layer_latency(LayerFacts("probe", "linear", 8, 8), "fp32", target, threads)
