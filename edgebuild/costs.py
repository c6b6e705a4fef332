"""The cost model: what a choice will weigh, how long it will run, how much memory it will take."""

from collections.abc import Sequence
from functools import cache

from edgebuild.devices import DEVICES
from edgebuild.space import Limit, Resource
from edgebuild.spec import BudgetKind, LayerFacts, Precision, Profile, Target

# What an XNNPACK program needs beside its weights, read off .pte files of known models.
FILE_BYTES = 8_000
NODE_BYTES: dict[Precision, int] = {"fp32": 150, "int8": 810}  # int8 operators carry their quantization along
# Resident memory of a loaded program that has no weights: the delegate's bookkeeping.
RUNTIME_BYTES = 40_000
PLANNED = ("size", "latency", "latency_p95", "latency_p99", "throughput", "peak_memory")


Factors = dict[tuple[str, str], float]  # measured / predicted, by (kind of budget, target)


def limits(profile: Profile, targets: Sequence[Target], factors: Factors) -> tuple[Limit, ...]:
    """The budgets that a plan can be made for, each with its cost; `factors` corrects them by what was measured."""
    found = []
    for budget in profile.budgets:
        if budget.kind not in PLANNED:
            continue
        bound = 1 / budget.bound if budget.kind == "throughput" else budget.bound
        for target in targets if budget.kind != "size" else targets[:1]:
            found.append(limit(budget.kind, target, bound, profile, factors))
    return tuple(found)


def limit(kind: BudgetKind, target: Target, bound: float, profile: Profile, factors: Factors) -> Limit:
    """A bound on what a kind of budget costs on a target; a throughput is bounded by its inverse, in seconds."""
    name = "" if kind == "size" else target.name
    return Limit(kind, name, bound, resource(kind, target, profile.threads), factors.get((kind, name), 1.0))


def resource(kind: BudgetKind, target: Target | None, threads: int) -> Resource:
    """What a kind of budget is counted in; every kind but "size" and "peak_memory" needs a target."""
    if kind == "size":
        return Resource(layer_size, FILE_BYTES)
    if kind == "peak_memory":  # the file, and the weights as the kernels pack them
        return Resource(
            lambda layer, precision: 2 * layer_size(layer, precision), FILE_BYTES + RUNTIME_BYTES, live=True
        )
    assert target is not None
    return Resource(lambda layer, precision: layer_latency(layer, precision, target, threads))


@cache
def layer_size(layer: LayerFacts, precision: Precision) -> float:
    """Bytes that a layer adds to the artifact."""
    if not layer.weighted:
        return NODE_BYTES[precision]
    width, scales = (1, 4 * layer.out_channels) if precision == "int8" else (4, 0)
    return NODE_BYTES[precision] + width * layer.weights + scales + (4 * layer.out_channels if layer.bias else 0)


@cache
def layer_latency(layer: LayerFacts, precision: Precision, target: Target, threads: int) -> float:
    """Seconds of a layer on a target, by the target's device."""
    return DEVICES[target.device].layer_latency(layer, precision, target, threads)


def warm_up(targets: Sequence[Target], threads: int) -> None:
    """Let each target's device measure what its predictions rest on, if it must; a second call costs nothing."""
    for target in targets:
        layer_latency(LayerFacts("probe", "linear", 8, 8), "fp32", target, threads)
