"""A plan's model before any training: pruned, then factorized. Where that cuts deep, also the model half way to it."""

from collections.abc import Iterator
from dataclasses import replace
from math import ceil, sqrt
from typing import Literal

import torch
from torch import fx

from edgebuild.base import SENSITIVITY_SAMPLES, Base
from edgebuild.divergence import distance
from edgebuild.lift import lift
from edgebuild.load import Loaded
from edgebuild.spec import Hints, Plan, Width
from edgebuild.training.objective import Hint
from edgebuild.transforms import factorize, norms, prune


def compress(base: Base, plan: Plan, loaded: Loaded) -> Iterator[tuple[Literal["prune", "factorize"], fx.GraphModule]]:
    """The model once pruned, then factorized as well; lifted again, so that the factors are layers of their own."""
    model, inputs = base.model, loaded.task.example_inputs
    if plan.widths:
        model = prune.apply(model, inputs, base.facts, base.sensitivity, plan.widths)
        if not plan.forms:
            model = lift(model, inputs)
        yield "prune", _normed(base, model, loaded)
    if plan.forms:
        seen = prune.moments_after(base.facts, base.sensitivity, plan.widths)
        model = lift(factorize.apply(model, inputs, plan.forms, seen), inputs)
        yield "factorize", _normed(base, model, loaded)


def _normed(base: Base, model: fx.GraphModule, loaded: Loaded) -> fx.GraphModule:
    """The model with its norms restated, where that brings it closer to the base's."""
    samples, logits = loaded.samples[:SENSITIVITY_SAMPLES], loaded.task.outputs == "logits"
    restated = norms.restated(model, loaded.samples)
    if restated is model:
        return model
    return min((restated, model), key=lambda m: distance(base.model, m, samples, logits))


def halfway(plan: Plan) -> tuple[Plan, Plan]:
    """A cut in two: the plan of a model whose widths lie half way (by their ratio) and that is not factorized, and
    the plan that makes of it what the whole plan does."""
    between = {w.group: ceil(sqrt(w.channels * w.of)) for w in plan.widths}
    first = tuple(Width(w.group, between[w.group], w.of) for w in plan.widths)
    second = tuple(Width(w.group, w.channels, between[w.group]) for w in plan.widths)
    return replace(plan, widths=first, forms=()), replace(plan, widths=second)


def hints_of(base: Base, plan: Plan, which: Hints) -> tuple[Hint, ...]:
    """The features that the plan's model shares with its original, one for each channel group that is read.

    "vectors": of those that a layer reads as one vector of a sample, as a classifier does.
    """
    if which == "none":
        return ()
    kept = prune.kept_inputs(base.facts, base.sensitivity, plan.widths)
    factorized = {form.layer for form in plan.forms}
    found = {}
    for group in base.facts.groups:
        readers = [base.facts.layer(name) for name in prune.readers(group, base.facts)]
        for layer in [r for r in readers if which == "all" or r.in_elements == r.in_channels][:1]:
            channels = kept.get(layer.name, torch.arange(layer.in_channels))
            read = f"{layer.name}.0" if layer.name in factorized else layer.name
            found[layer.name] = Hint(layer.name, read, channels)
    return tuple(found.values())


def through(first: tuple[Hint, ...], second: tuple[Hint, ...]) -> tuple[Hint, ...]:
    """The hints of a model that was cut twice: by `second` from a model that was cut by `first` from its original."""
    channels = {hint.layer: hint.channels for hint in first}
    return tuple(replace(hint, channels=channels[hint.layer][hint.channels]) for hint in second)
