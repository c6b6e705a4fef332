"""Carries out a plan: prune, factorize, distil, quantize, lower. What it makes is kept in the cache, by content."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from math import ceil, inf
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from edgebuild import built, cache
from edgebuild.backends import Backend
from edgebuild.base import SENSITIVITY_SAMPLES, Base, lifted_digest, narrowed, spread
from edgebuild.built import Built
from edgebuild.clock import Progress
from edgebuild.compress import compress, halfway, hints_of, through
from edgebuild.divergence import distance, indifference
from edgebuild.environment import versions
from edgebuild.lift import stacked
from edgebuild.load import Loaded
from edgebuild.spec import Distillation, Plan, Profile, Seconds, Technique
from edgebuild.task import Module
from edgebuild.training.learner import Lesson
from edgebuild.training.objective import Hint
from edgebuild.training.optimizer import ADAMW_RATE
from edgebuild.training.run import Training
from edgebuild.transforms import distil, quantize
from edgebuild.verify import eager

HELD_OUT = 128  # samples by which a training's weights are chosen
FIRST = 1 / 3  # of the training, half way to a deep cut
QAT_RATE = 0.3  # of the usual learning rate: the weights are to move by steps of their rounding


def realise(
    base: Base, plan: Plan, loaded: Loaded, profile: Profile, teacher: fx.GraphModule, progress: Progress
) -> Built:
    """Build a plan's artifact, or take it from the cache. Raises TransformError, BackendError or TaskError."""
    name = cache.key(base.digest, _settings(plan, profile, base.backend), repr(_sram(base.backend, profile)))
    with cache.locked("built", name):
        kept = None if base.fresh else built.read(name)
        if kept is None:
            kept = _realised(base, plan, loaded, profile, teacher, progress)
            built.write(name, kept)
        return kept


def _realised(
    base: Base, plan: Plan, loaded: Loaded, profile: Profile, teacher: fx.GraphModule, progress: Progress
) -> Built:
    inputs, samples = loaded.task.example_inputs, loaded.samples[:SENSITIVITY_SAMPLES]
    logits = loaded.task.outputs == "logits"
    model, training, steps = base.model, base.training, 0
    losses: dict[Technique, float] = {}
    for technique, changed in compress(base, plan, loaded):
        model = changed
        if not plan.distil:
            losses[technique] = distance(base.model, model, samples, logits) - sum(losses.values())
    if plan.distil:
        model, how, steps = _distilled(model, base, plan, loaded, profile, teacher, progress)
        training = f"{training}; {how}".lstrip("; ")
    unrounded = distance(base.model, model, samples, logits)
    lowered: nn.Module = model
    loss, quantization = unrounded, ""
    if plan.precision == "int8":
        quantized = _quantized(model, base, plan, loaded, profile, teacher, progress)
        lowered, quantization = quantized.model, quantized.how
        loss = distance(base.model, lowered, samples, logits)
        if not plan.distil and not plan.qat_steps:
            losses["quantize"] = loss - sum(losses.values())
    artifact = base.backend.lower(lowered, inputs, _sram(base.backend, profile))
    expected = tuple(eager(lowered, samples))
    return Built(artifact, expected, training, steps, False, loss, unrounded, losses, quantization, lowered)


def _distilled(
    model: fx.GraphModule,
    base: Base,
    plan: Plan,
    loaded: Loaded,
    profile: Profile,
    teacher: fx.GraphModule,
    progress: Progress,
) -> tuple[fx.GraphModule, str, int]:
    """The model trained, how that went, and its steps. Plans that only round it otherwise take it from the cache.

    A cut that leaves nothing of what the model knows is made in two steps, with training in between (as Molchanov et
    al. 2017, arXiv:1611.06440, in many).
    """
    unrounded = replace(plan, precision="fp32", keep_fp32=(), scheme="static", qat_steps=0)
    settings = replace(profile.distillation, steps=plan.distil_steps)
    which = settings.hints if base.name != "student" and settings.hint_weight else "none"

    def taught(
        model: fx.GraphModule, kind: str, plan: Plan, settings: Distillation, hints: tuple[Hint, ...]
    ) -> tuple[fx.GraphModule, str, int]:
        name = cache.key(kind, base.digest, _settings(plan, profile, None))
        fresh = base.fresh and name not in base.made
        kept = trained(model, teacher, loaded, settings, profile.seed, progress, name, hints, fresh)
        base.made.add(name)
        return kept

    if not plan.widths or settings.steps == 1 or not _is_deep(base, model, loaded):
        return taught(model, "trained", unrounded, settings, hints_of(base, plan, which))
    first, rest = halfway(unrounded)
    begin = replace(settings, steps=ceil(FIRST * settings.steps), time=Seconds(FIRST * settings.time))
    *_, (_, wide) = compress(base, first, loaded)
    seen = hints_of(base, first, which)
    wide, begun, steps = taught(wide, "half way", first, begin, seen)
    between = narrowed(base, wide, loaded, profile.seed)
    *_, (_, model) = compress(between, rest, loaded)
    left = replace(settings, steps=settings.steps - begin.steps, time=Seconds(settings.time - begin.time))
    hints = through(seen, hints_of(between, rest, which))
    model, ended, more = taught(model, "trained", unrounded, left, hints)
    return model, f"half way to its widths: {begun}; at its widths: {ended}", steps + more


def _is_deep(base: Base, model: fx.GraphModule, loaded: Loaded) -> bool:
    """Whether a cut model is no better than one that answers everything alike."""
    samples, logits = spread(loaded.samples), loaded.task.outputs == "logits"
    return distance(base.model, model, samples, logits) > indifference(base.model, samples, logits) > 0


def _quantized(
    model: fx.GraphModule,
    base: Base,
    plan: Plan,
    loaded: Loaded,
    profile: Profile,
    teacher: fx.GraphModule,
    progress: Progress,
) -> quantize.Quantized:
    inputs, logits = base.backend.layout(loaded.task.example_inputs), loaded.task.outputs == "logits"
    quantizer = base.backend.quantizer(_kept(plan), plan.scheme)
    if not plan.qat_steps:
        return quantize.apply(model, inputs, loaded.samples, quantizer, logits)
    shown, held = quantize.split(loaded.samples)
    rate = QAT_RATE * (profile.distillation.learning_rate or ADAMW_RATE)
    settings = replace(profile.distillation, steps=plan.qat_steps, learning_rate=rate)
    keep = cache.key("rounded", base.digest, _settings(plan, profile, base.backend))
    return quantize.finish(
        model,
        teacher,
        inputs,
        shown,
        held,
        quantizer,
        logits,
        lambda fake: train(
            fake, teacher, replace(loaded, samples=tuple(shown)), settings, profile.seed, progress, keep
        ),
    )


def _kept(plan: Plan) -> tuple[str, ...]:
    """The layers that stay fp32, a factorized one by the names of its factors."""
    factors = [f"{form.layer}.{i}" for form in plan.forms if form.layer in plan.keep_fp32 for i in range(3)]
    return (*plan.keep_fp32, *factors)


def train(
    model: Module,
    teacher: fx.GraphModule,
    loaded: Loaded,
    settings: Distillation,
    seed: int,
    progress: Progress,
    keep: str,
    hints: tuple[Hint, ...] = (),
) -> tuple[Module, Training]:
    """Distil the teacher into a model, on the training batches or, where there are none, the calibration inputs.

    `keep` names the training, so that it goes on where it was killed.
    """
    cutmix = settings.cutmix if settings.cutmix is not None else float(loaded.task.train is None)
    lesson = Lesson(
        replace(settings, cutmix=cutmix),
        labelled=loaded.task.labelled and loaded.task.train is not None,
        logits=loaded.task.outputs == "logits",
        seed=seed,
        hints=hints,
        held_out=spread(loaded.samples, HELD_OUT),
        keep=keep,
        digest=lifted_digest(teacher),
    )
    trained, how = distil.apply(model, teacher, training_batches(loaded), lesson, progress)
    return cast(Module, trained), how


def trained(
    model: fx.GraphModule,
    teacher: fx.GraphModule,
    loaded: Loaded,
    settings: Distillation,
    seed: int,
    progress: Progress,
    keep: str,
    hints: tuple[Hint, ...],
    fresh: bool,
) -> tuple[fx.GraphModule, str, int]:
    """As `train`, or what it made before, if not `fresh`; how that went in words, and its steps."""
    with cache.locked("trained", keep):
        kept = None if fresh else built.read_trained(keep, model)
        if kept is None:
            made, how = train(model, teacher, loaded, settings, seed, progress, keep, hints)
            built.write_trained(keep, made, how)
            kept = made, str(how), how.steps
        return kept


def training_batches(loaded: Loaded) -> Callable[[], Any]:
    """What gives the batches to train on."""
    return loaded.task.train or (lambda: calibration_batches(loaded))


def calibration_batches(loaded: Loaded, size: int = 32) -> Iterator[tuple[Tensor, ...]]:
    """The calibration samples as shuffled batches, for training without training data."""
    order = torch.randperm(len(loaded.samples)).tolist()
    return stacked([loaded.samples[i] for i in order], size)


def _sram(backend: Backend, profile: Profile) -> float:
    """The bytes of SRAM that a profile allows, where the lowering can do something about them."""
    allowed = [budget.bound for budget in profile.budgets if budget.kind in ("sram", "peak_memory")]
    return min(allowed, default=inf) if backend.npu else inf


def _settings(plan: Plan, profile: Profile, backend: Backend | None) -> str:
    training = {"distillation": asdict(profile.distillation), "seed": profile.seed}
    settings = {
        "plan": asdict(plan.choices),
        "backend": repr(backend),
        "training": training if plan.distil or plan.qat_steps else None,
        "versions": versions(),
    }
    return json.dumps(settings, sort_keys=True, default=str)
