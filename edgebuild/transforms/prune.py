"""Structured pruning over channel groups: the least important channels of each group are cut out for good.

What the lost channels carried is taken from the kept ones as far as it can be: every layer that reads the group gets
the least-squares estimate of its lost inputs folded into its weights (He et al. 2017, arXiv:1707.06168, in closed form
from the second moments of the inputs).
"""

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx

from edgebuild.analyse import cut
from edgebuild.divergence import divergences
from edgebuild.errors import TransformError
from edgebuild.lift import outputs_of
from edgebuild.sensitivity import Sensitivity
from edgebuild.spec import Candidate, ChannelGroup, ModelFacts, Slot, Width

SMALLEST_SHARE = 8  # no group is cut below 1/8 of its channels
LEVELS = 10
RIDGE = 1e-2  # of the mean second moment: few samples must not be fitted to the last digit
MACS = 1e11  # to measure the candidates' losses with, in all: some seconds of one core
FEWEST_SAMPLES = 8


def widths(channels: int, tile: int, each: int = 1) -> tuple[int, ...]:
    """Channel counts worth trying below `channels`, falling: multiples of the kernel tile, or of 4 in narrow groups.

    Of heads, which are `each` channels wide, mostly any count.
    """
    step = max(1, (tile if channels * each >= 4 * tile else 4) // each)
    smallest = max(step, channels // SMALLEST_SHARE)
    counts = [c for c in range(step, channels, step) if c >= smallest]
    if len(counts) > LEVELS:
        counts = sorted({counts[round(i)] for i in np.linspace(0, len(counts) - 1, LEVELS)})
    return tuple(reversed(counts))


def candidates(
    model: fx.GraphModule,
    facts: ModelFacts,
    sensitivity: Sensitivity,
    samples: Sequence[tuple[Tensor, ...]],
    tile: int,
    logits: bool,
) -> tuple[Candidate, ...]:
    """For each group every width below its own, with the loss that cutting its least important channels really makes.

    It is measured, one group at a time: for deep cuts a second-order estimate says far too little.
    """
    chosen = [
        Width(group.name, width, group.channels)
        for group in facts.groups
        for width in widths(group.channels, tile, group.each)
    ]
    variants = (repaired(model, facts, sensitivity, [width]) for width in chosen)
    affordable = int(MACS / max(1.0, 0.5 * facts.macs * len(chosen)))
    losses = divergences(model, samples[: max(FEWEST_SAMPLES, affordable)], variants, logits)
    return tuple(_rising([Candidate(width, loss) for width, loss in zip(chosen, losses, strict=True)]))


def ranked(
    model: fx.GraphModule,
    facts: ModelFacts,
    sensitivity: Sensitivity,
    samples: Sequence[tuple[Tensor, ...]],
    logits: bool,
) -> Sensitivity:
    """The sensitivity with the ranking of each group's channels by which losing half of them really loses least.

    Channels are ranked by the loss without each (the gates), by the size of their weights, and by how badly the other
    channels make up for them.
    """
    trials = []
    for group in facts.groups:
        half = Width(group.name, max(1, group.channels // 2), group.channels)
        gates = sensitivity.channel_scores(group.name)
        trials += [
            (half, scores)
            for scores in (gates, _magnitudes(model, facts, group), _unexplained(model, facts, sensitivity, group))
        ]
    variants = (
        repaired(model, facts, replace(sensitivity, ranking={half.group: scores}), [half]) for half, scores in trials
    )
    affordable = int(MACS / max(1.0, 0.5 * facts.macs * len(trials)))
    losses = divergences(model, samples[: max(FEWEST_SAMPLES, affordable)], variants, logits)
    best: dict[str, tuple[float, np.ndarray]] = {}
    for (half, scores), lost in zip(trials, losses, strict=True):
        if half.group not in best or lost < best[half.group][0]:
            best[half.group] = lost, scores
    return replace(sensitivity, ranking={name: scores for name, (_, scores) in best.items()})


def _magnitudes(model: fx.GraphModule, facts: ModelFacts, group: ChannelGroup) -> np.ndarray:
    """The squared norm of the weights that make each channel (Li et al. 2017, arXiv:1608.08710), summed over layers."""
    total = torch.zeros(group.channels, dtype=torch.float64)
    for name, slot in group.outputs.items():
        if facts.layer(name).weighted:
            weight: Tensor = model.get_submodule(name).weight.detach().double()  # type: ignore[operator]
            norms = weight.flatten(1).square().sum(1)[slot.start : slot.start + slot.each * group.channels]
            total += norms.reshape(group.channels, slot.each).sum(1)
    return total.numpy()


def _unexplained(model: fx.GraphModule, facts: ModelFacts, sensitivity: Sensitivity, group: ChannelGroup) -> np.ndarray:
    """The squared error of the readers' outputs without each channel once the others make up for it.

    |W_c|^2 / (M^-1)_cc, summed over readers and a head's channels: the optimal brain surgeon's saliency (Hassibi and
    Stork 1993).
    """
    total = torch.zeros(group.channels, dtype=torch.float64)
    channels = group.channels * group.each
    for name in readers(group, facts):
        slot = group.inputs[name]
        each = slot.each // group.each
        weight: Tensor = model.get_submodule(name).weight.detach().double()  # type: ignore[operator]
        part = weight[:, slot.start : slot.start + each * channels]
        norms = part.reshape(len(part), channels, -1).square().sum((0, 2))
        moments = sensitivity.moments.get(name)
        if moments is not None:
            norms = norms / torch.linalg.inv(_ridged(_among(moments, slot.start, channels, each))).diagonal()
        total += norms.reshape(group.channels, group.each).sum(1)
    return total.numpy()


def _among(moments: Tensor, start: int, channels: int, each: int) -> Tensor:
    """Some channels' part of the second moments of what a layer reads, `each` inputs apiece: channels x channels."""
    span = slice(start, start + channels * each)
    return moments[span, span].reshape(channels, each, channels, each).diagonal(dim1=1, dim2=3).sum(-1)


def _ridged(moments: Tensor) -> Tensor:
    return moments + RIDGE * moments.diagonal().mean().clamp(min=1e-12) * torch.eye(len(moments), dtype=moments.dtype)


def repaired(
    model: fx.GraphModule, facts: ModelFacts, sensitivity: Sensitivity, chosen: Sequence[Width]
) -> dict[str, Tensor]:
    """The weights of the layers that read the narrowed groups: 0 for lost channels, the kept ones making up for them.

    The model with these weights computes what the pruned model does.
    """
    found: dict[str, Tensor] = {}
    for width in chosen:
        group = facts.group(width.group)
        lost = torch.as_tensor(_lost(group, sensitivity, width).copy())
        for name in readers(group, facts):
            weight = found.get(name)
            if weight is None:
                weight = model.get_submodule(name).weight.detach()  # type: ignore[operator]
            found[name] = _without(weight, group, group.inputs[name], lost, sensitivity.moments.get(name))
    return found


def _without(weight: Tensor, group: ChannelGroup, slot: Slot, lost: Tensor, moments: Tensor | None) -> Tensor:
    """A reader's weights (out, in, ...) without the group's lost channels.

    x_lost is estimated as A x_kept, A = M_lk (M_kk + ridge)^-1; W x = W_k x_k + W_l x_l is then (W_k + W_l A) x_k.
    The same A holds at each position behind a flatten; the channels of a head have nothing in common with another's.
    """
    channels, each = group.channels * group.each, slot.each // group.each
    lost = (lost[:, None] * group.each + torch.arange(group.each)).flatten()
    span = slice(slot.start, slot.start + channels * each)
    result = weight.clone()
    part = result[:, span].reshape(len(weight), channels, each, -1)  # a copy
    if moments is not None:
        among = torch.ones(channels, dtype=torch.bool)
        among[lost] = False
        kept = among.nonzero()[:, 0]
        m = _among(moments, slot.start, channels, each)
        estimate = torch.linalg.solve(_ridged(m)[kept][:, kept], m[kept][:, lost]).to(weight.dtype)  # (kept, lost)
        part[:, kept] += torch.einsum("olep,kl->okep", part[:, lost], estimate)
    part[:, lost] = 0
    result[:, span] = part.reshape(result[:, span].shape)
    return result


def moments_after(facts: ModelFacts, sensitivity: Sensitivity, chosen: Sequence[Width]) -> dict[str, Tensor]:
    """The second moments of what the layers of the pruned model read."""
    kept = kept_inputs(facts, sensitivity, chosen)
    return {name: m[kept[name]][:, kept[name]] if name in kept else m for name, m in sensitivity.moments.items()}


def kept_inputs(facts: ModelFacts, sensitivity: Sensitivity, chosen: Sequence[Width]) -> dict[str, Tensor]:
    """For each layer that reads a narrowed group, the indices of the input channels that are left."""
    lost: dict[str, list[int]] = {}
    for width in chosen:
        group = facts.group(width.group)
        for name in readers(group, facts):
            slot = group.inputs[name]
            for c in _lost(group, sensitivity, width).tolist():
                lost.setdefault(name, []).extend(range(slot.start + c * slot.each, slot.start + (c + 1) * slot.each))
    return {
        name: torch.tensor(sorted(set(range(facts.layer(name).in_channels)) - set(gone))) for name, gone in lost.items()
    }


def readers(group: ChannelGroup, facts: ModelFacts) -> list[str]:
    """The layers that mix the group's channels; a depthwise convolution and operators without weights pass them on."""
    return [name for name in group.inputs if facts.layer(name).weighted and not facts.layer(name).depthwise]


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
            drop[group.name] = _lost(group, sensitivity, width).tolist()
    whole = copy.deepcopy(model)
    for name, weight in repaired(model, facts, sensitivity, chosen).items():
        whole.get_submodule(name).weight.data = weight
    pruned = cut(whole, inputs, drop)
    _check(pruned, inputs, facts, chosen)
    return pruned


def _lost(group: ChannelGroup, sensitivity: Sensitivity, width: Width) -> np.ndarray:
    """The channels that a width cuts out: the least important ones."""
    return np.argsort(sensitivity.channel_scores(group.name), kind="stable")[: width.of - width.channels]


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
    lost: dict[str, int] = {}  # a depthwise convolution behind a concat passes on several groups
    for width in chosen:
        for name, slot in facts.group(width.group).outputs.items():
            lost[name] = lost.get(name, 0) + slot.each * (width.of - width.channels)
    for name, count in lost.items():
        if facts.layer(name).weighted:
            found, wanted = pruned.get_submodule(name).weight.shape[0], facts.layer(name).out_channels - count  # type: ignore[index]
            if found != wanted:
                raise TransformError(f"layer {name!r} has {found} channels after pruning, not {wanted}")
    with torch.no_grad():
        for y in outputs_of(pruned(*inputs)):
            if not torch.isfinite(y).all():
                raise TransformError("the pruned model's outputs are not finite")
