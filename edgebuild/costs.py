"""The cost model: what a choice will weigh, how long it will run, how much memory it will take."""

from collections.abc import Sequence
from functools import cache

from edgebuild import arena, footprint
from edgebuild import cache as store
from edgebuild.devices import DEVICES
from edgebuild.footprint import ArtifactKind
from edgebuild.plan import Choice
from edgebuild.space import Limit, Phase, Resource
from edgebuild.spec import PRECISIONS, BudgetKind, LayerFacts, ModelFacts, Precision, Profile, Scheme, Target

PLANNED = ("size", "latency", "latency_p95", "latency_p99", "throughput", "peak_memory", "sram", "flash")


Factors = dict[tuple[str, str], float]  # measured / predicted, by (kind of budget, target)


def limits(
    profile: Profile, targets: Sequence[Target], facts: ModelFacts, factors: Factors, scheme: Scheme = "static"
) -> tuple[Limit, ...]:
    """The budgets that a plan can be made for, each with its cost; `factors` corrects them by what was measured."""
    found = []
    for budget in profile.budgets:
        if budget.kind not in PLANNED:
            continue
        bound = 1 / budget.bound if budget.kind == "throughput" else budget.bound
        for target in targets if budget.kind != "size" else targets[:1]:
            found.append(limit(budget.kind, target, bound, profile, facts, factors, scheme))
    return tuple(found)


def limit(
    kind: BudgetKind,
    target: Target,
    bound: float,
    profile: Profile,
    facts: ModelFacts,
    factors: Factors,
    scheme: Scheme = "static",
) -> Limit:
    """A bound on what a kind of budget costs on a target; a throughput is bounded by its inverse, in seconds."""
    name = "" if kind == "size" else target.name
    cost = {
        "size": lambda: size(facts, profile.artifact, scheme),
        "peak_memory": lambda: peak_memory(facts, profile.artifact),
    }
    if target.microcontroller:
        cost = {
            "size": lambda: arena.flash(facts, target),
            "flash": lambda: arena.flash(facts, target),
            "sram": lambda: arena.sram(facts, target),
            "peak_memory": lambda: arena.sram(facts, target),
        }
    resource = cost.get(kind, lambda: latency(target, profile.threads))()
    return Limit(kind, name, bound, resource, factors.get((kind, name), 1.0))


def size(facts: ModelFacts, artifact: ArtifactKind = "pte", scheme: Scheme = "static") -> Resource:
    """Bytes of the artifact: the empty file and the sum over the layers. A `.pte` takes a few hundred bytes less.

    Of all costs this is the one that a scheme changes: time and memory are taken to be those of static int8.
    """
    return Resource(
        lambda layer, precision: footprint.layer_bytes(layer, precision, artifact, scheme), _file(facts, artifact)
    )


def peak_memory(facts: ModelFacts, artifact: ArtifactKind = "pte") -> Resource:
    """Bytes at the worst moment, above an empty runtime.

    Loading holds the file and what is made of it, running what is kept, the convolutions' pointers and the activations
    of each step.
    """
    return Resource(
        footprint.kept_bytes,
        footprint.EMPTY_PROGRAM + Choice(facts, "fp32").input_bytes(),
        (
            Phase(
                lambda layer, precision: footprint.loading_bytes(layer, precision, artifact),
                footprint.EMPTY_LOADING + _file(facts, artifact),
            ),
            Phase(lambda layer, _: footprint.pointer_bytes(layer), live=True),
        ),
    )


def _file(facts: ModelFacts, artifact: ArtifactKind) -> int:
    return footprint.file_bytes(any(layer.op == "conv2d" for layer in facts.layers), artifact)


def latency(target: Target, threads: int) -> Resource:
    """Seconds of an inference on a target: the call itself and the sum over the layers."""
    call = DEVICES[target.device].call_latency(target, threads)
    return Resource(lambda layer, precision: layer_latency(layer, precision, target, threads), call)


@cache
def layer_latency(layer: LayerFacts, precision: Precision, target: Target, threads: int) -> float:
    """Seconds of a layer on a target, by the target's device."""
    return DEVICES[target.device].layer_latency(layer, precision, target, threads)


def warm_up(targets: Sequence[Target], threads: int, facts: ModelFacts) -> None:
    """Let each target's device find what its predictions of a model rest on, if it must; a second call costs little."""
    layers = [step for precision in PRECISIONS for step in Choice(facts, precision).layers()]
    for target in targets:
        device = DEVICES[target.device]
        # alone: another build would take the same minute for the same, and disturb the host's timing
        with store.locked("costs", store.key(repr(target), str(threads))[:16]):
            device.layer_latencies(layers, target, threads)
            device.call_latency(target, threads)
