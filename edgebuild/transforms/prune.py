"""Structured pruning over channel groups: the least important channels of each group are cut out for good."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, fx

from edgebuild.analyse import cut
from edgebuild.errors import TransformError
from edgebuild.lift import outputs_of
from edgebuild.sensitivity import Sensitivity, loss
from edgebuild.spec import Candidate, ChannelGroup, ModelFacts, Width

SMALLEST_SHARE = 8  # no group is cut below 1/8 of its channels
LEVELS = 10


def widths(channels: int, tile: int) -> tuple[int, ...]:
    """Channel counts worth trying below `channels`, falling: multiples of the kernel tile, or of 4 in narrow groups."""
    step = tile if channels >= 4 * tile else 4
    smallest = max(step, channels // SMALLEST_SHARE)
    counts = [c for c in range(step, channels, step) if c >= smallest]
    if len(counts) > LEVELS:
        counts = sorted({counts[round(i)] for i in np.linspace(0, len(counts) - 1, LEVELS)})
    return tuple(reversed(counts))


def candidates(facts: ModelFacts, sensitivity: Sensitivity, tile: int) -> tuple[Candidate, ...]:
    """For each group every width below its own, with the loss of cutting its least important channels."""
    found = []
    for group in facts.groups:
        order = _least_important_first(group, sensitivity)
        gates = sensitivity.gates[group.name]
        for width in widths(group.channels, tile):
            dropped = order[: group.channels - width]
            found.append(Candidate(Width(group.name, width, group.channels), float(loss(gates[:, dropped].sum(1)))))
    return tuple(_rising(found))


def apply(
    model: fx.GraphModule,
    inputs: tuple[Tensor, ...],
    facts: ModelFacts,
    sensitivity: Sensitivity,
    chosen: Sequence[Width],
) -> fx.GraphModule:
    """A pruned copy of the model. Raises TransformError where a width does not fit the model or an invariant breaks."""
    drop = {}
    for width in chosen:
        group = next((group for group in facts.groups if group.name == width.group), None)
        if group is None or group.channels != width.of or not 0 < width.channels <= width.of:
            have = f"{group.channels} channels" if group else "no such channel group"
            raise TransformError(
                f"the plan keeps {width.channels} of {width.of} channels of {width.group!r}, which has {have}"
            )
        if width.channels < width.of:
            drop[group.name] = _least_important_first(group, sensitivity)[: width.of - width.channels].tolist()
    pruned = cut(model, inputs, drop)
    _check(pruned, inputs, facts, chosen)
    return pruned


def _least_important_first(group: ChannelGroup, sensitivity: Sensitivity) -> np.ndarray:
    return np.argsort(sensitivity.channel_scores(group.name), kind="stable")


def _rising(found: list[Candidate]) -> list[Candidate]:
    """The loss of a narrower group is never below that of a wider one, however the samples fell."""
    result: list[Candidate] = []
    for candidate in found:
        before = result[-1] if result else None
        same = before is not None and before.choice.group == candidate.choice.group  # type: ignore[union-attr]
        floor = before.loss if before is not None and same else 0.0
        result.append(Candidate(candidate.choice, max(candidate.loss, floor)))
    return result


def _check(pruned: fx.GraphModule, inputs: tuple[Tensor, ...], facts: ModelFacts, chosen: Sequence[Width]) -> None:
    for width in chosen:
        for name in (n for n in facts.group(width.group).outputs if facts.layer(n).weighted):
            found = pruned.get_submodule(name).weight.shape[0]  # type: ignore[index]
            if found != width.channels:
                raise TransformError(f"layer {name!r} has {found} channels after pruning, not {width.channels}")
    with torch.no_grad():
        for y in outputs_of(pruned(*inputs)):
            if not torch.isfinite(y).all():
                raise TransformError("the pruned model's outputs are not finite")
