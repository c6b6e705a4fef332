"""The student that edgebuild makes itself: the task's model without the residual blocks that it misses least."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf

from torch import fx

from edgebuild.analyse import analyse
from edgebuild.base import Base, prepare, spread
from edgebuild.divergence import batches, distance
from edgebuild.load import Loaded
from edgebuild.propose import Planner, propose
from edgebuild.spec import Candidate, Profile, Width
from edgebuild.transforms import shorten
from edgebuild.transforms.shorten import Shortened

CLEARLY = 0.8  # of what the whole model's plan loses: estimates of two models are not compared to the last digit
TRAINED = 0.5  # of what dropped blocks lose is counted where training follows: it is regained sooner than the rest


def shortened(model: Base, dropped: Sequence[str], loaded: Loaded, profile: Profile, inputs_digest: str) -> Base:
    """The task's model without these blocks, analysed anew. Raises TransformError where it has no such blocks."""
    samples, logits = spread(loaded.samples), loaded.task.outputs == "logits"
    short = shorten.apply(model.model, loaded.task.example_inputs, dropped)
    lost = distance(model.model, short, batches(model.model, samples), logits)
    base = prepare("shortened", short, loaded, profile, model.backend, inputs_digest, model.fresh)
    return replace(base, dropped=tuple(dropped), lost=lost)


def expected(lost: float, rest: float, profile: Profile) -> float:
    """Nats to compare plans by: what dropped blocks lost, as it counts, and what the plan for the rest loses."""
    return (TRAINED if "distil" in profile.techniques else 1.0) * lost + rest


def choose(planner: Planner, loaded: Loaded) -> tuple[Shortened, str] | None:
    """Which blocks to drop, and why; None where no plan without some is expected to lose clearly less than with all.

    `planner` is the one of the task's model, as corrected by what was measured. What a plan without some blocks loses
    is what their removal really loses, as it counts, and what the planner estimates for the rest, as if the other
    layers were as sensitive as before: enough to count blocks by, and the model that is chosen is analysed anew.
    """
    inputs, logits, profile = loaded.task.example_inputs, loaded.task.outputs == "logits", planner.profile
    proposed, _ = propose(planner, [])
    whole = proposed.total_loss if proposed else inf
    least = CLEARLY * whole
    best: Shortened | None = None
    for short in shorten.greedy(planner.base.model, inputs, spread(loaded.samples), logits):
        if expected(short.loss, 0.0, profile) >= least:  # each further drop loses more
            break
        proposed, _ = propose(_without(planner, short.model, loaded), [])
        if proposed is not None and (loss := expected(short.loss, proposed.total_loss, profile)) < least:
            best, least = short, loss
    if best is None:
        return None
    names = ", ".join(block.name for block in best.dropped)
    instead = f"{whole:.3g} nats with them" if whole < inf else "no plan that fits with them"
    return best, f"shortened: without the residual blocks {names} a loss of {least:.3g} nats is expected, {instead}"


def _without(planner: Planner, short: fx.GraphModule, loaded: Loaded) -> Planner:
    """The planner for a shortened model, with the estimates of the whole one for what is left."""
    base = planner.base
    facts = analyse(short, loaded.task.example_inputs)
    known = {group.name for group in base.facts.groups}  # others were found to have a fixed width
    facts = replace(facts, groups=tuple(group for group in facts.groups if group.name in known))
    groups = {group.name: group.channels for group in facts.groups}
    layers = {layer.name for layer in facts.layers}

    def stays(candidate: Candidate) -> bool:
        choice = candidate.choice
        return groups.get(choice.group) == choice.of if isinstance(choice, Width) else choice.layer in layers

    left = tuple(candidate for candidate in planner.candidates if stays(candidate))
    return replace(planner, base=replace(base, model=short, facts=facts), candidates=left)
