"""The cost model: what a choice will weigh, how long it will run, how much memory it will take."""

from collections.abc import Callable, Sequence
from functools import cache

from edgebuild import footprint
from edgebuild.devices import DEVICES
from edgebuild.footprint import ArtifactKind
from edgebuild.plan import Choice, Limit
from edgebuild.spec import Budget, LayerFacts, Precision, Profile, Target

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
            found.append(Limit(budget.kind, name, bound, _cost(budget, target, profile), factor))
    return tuple(found)


def _cost(budget: Budget, target: Target, profile: Profile) -> Callable[[Choice], float]:
    if budget.kind == "size":
        return lambda choice: size(choice, profile.artifact)
    if budget.kind == "peak_memory":
        return lambda choice: peak_memory(choice, profile.artifact)
    return lambda choice: latency(choice, target, profile.threads)


def size(choice: Choice, artifact: ArtifactKind = "pte") -> float:
    """Bytes of the artifact: the empty file and the sum over the layers. A `.pte` takes a few hundred bytes less."""
    return file_size(choice, artifact) + sum(layer_size(layer, q, artifact) for layer, q in choice.layers())


def file_size(choice: Choice, artifact: ArtifactKind = "pte") -> float:
    """Bytes of the artifact without layers; the same for all choices of a model."""
    return footprint.file_bytes(any(layer.op == "conv2d" for layer in choice.facts.layers), artifact)


def layer_size(layer: LayerFacts, precision: Precision, artifact: ArtifactKind = "pte") -> float:
    """Bytes that a layer adds to the artifact."""
    return footprint.layer_bytes(layer, precision, artifact)


def latency(choice: Choice, target: Target, threads: int) -> float:
    """Seconds of an inference on a target: the sum over the layers, to which the corrections add what no layer owns."""
    return sum(layer_latency(layer, precision, target, threads) for layer, precision in choice.layers())


@cache
def layer_latency(layer: LayerFacts, precision: Precision, target: Target, threads: int) -> float:
    """Seconds of a layer on a target, by the target's device."""
    return DEVICES[target.device].layer_latency(layer, precision, target, threads)


def peak_memory(choice: Choice, artifact: ArtifactKind = "pte") -> float:
    """Bytes at the worst moment, above an empty runtime."""
    return max(memory(choice, artifact))


def memory(choice: Choice, artifact: ArtifactKind = "pte") -> tuple[float, ...]:
    """Bytes in memory while loading, then while each layer of `choice.facts.layers` runs.

    Loading holds the file and what is made of it, running what is kept, the convolutions' pointers and the activations
    of that step. Each is a sum over the layers.
    """
    layers, live = choice.layers(), choice.live_bytes()
    kept = footprint.EMPTY_PROGRAM + choice.outer_bytes() + sum(footprint.kept_bytes(*layer) for layer in layers)
    loading = footprint.EMPTY_LOADING + file_size(choice, artifact)
    loading += sum(footprint.loading_bytes(layer, precision, artifact) for layer, precision in layers)
    running = sum(footprint.pointer_bytes(layer) for layer, _ in layers)
    return (kept + loading, *(kept + running + bytes_ for bytes_ in live))


def warm_up(targets: Sequence[Target], threads: int) -> None:
    """Let each target's device measure what its predictions rest on, if it must; a second call costs nothing."""
    for target in targets:
        layer_latency(LayerFacts("probe", "linear", 8, 8), "fp32", target, threads)
