"""Carries out a plan: prune, factorize, distil, quantize, lower. What it makes is kept in the cache, by content."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from edgebuild import cache, trials
from edgebuild.analyse import analyse, check_prunable
from edgebuild.backends import BACKENDS
from edgebuild.clock import Progress
from edgebuild.devices import Arrays
from edgebuild.environment import versions
from edgebuild.lift import lift
from edgebuild.load import Loaded
from edgebuild.sensitivity import Sensitivity, measure, moments
from edgebuild.spec import Artifact, Candidate, Distillation, ModelFacts, Plan, Profile, Technique, Trial
from edgebuild.training.objective import Hint
from edgebuild.training.run import Lesson, Training
from edgebuild.transforms import distil, factorize, norms, prune, quantize
from edgebuild.verify import eager

SENSITIVITY_SAMPLES = 32
HELD_OUT = 128  # samples by which a training's weights are chosen
TILE = 8  # channels that XNNPACK's int8 and fp32 micro-kernels take at once, at the least, on every shipped core


@dataclass(frozen=True)
class Base:
    """A model to compress, analysed: the task's own, or its student once it has been distilled.

    The candidates' losses are calibrated by `trials`. `digest` covers the weights and all inputs that a realised plan
    depends on; `fresh` takes nothing from the cache.
    """

    name: str
    model: fx.GraphModule
    facts: ModelFacts
    sensitivity: Sensitivity
    candidates: tuple[Candidate, ...]
    digest: str
    fresh: bool = False
    training: str = ""
    trials: tuple[Trial, ...] = ()


@dataclass(frozen=True)
class Built:
    """An artifact, eager PyTorch's outputs for the model that it was lowered from, and how the training went.

    `loss`: nats of the softened output distribution from the base's model to what was lowered, on the calibration
    samples. `losses`: what each technique added to it, in the order of the flow; of an untrained plan alone. `steps`:
    of distillation, as they were made.
    """

    artifact: Artifact
    expected: tuple[Arrays, ...]
    training: str
    steps: int
    reused: bool
    loss: float
    losses: Mapping[Technique, float]
    lowered: nn.Module | None = field(default=None, compare=False)  # None where the artifact came from the cache

    @property
    def sha256(self) -> str:
        return cache.key(self.artifact.data)


def lifted_digest(model: fx.GraphModule) -> str:
    """SHA-256 of a model's graph and weights."""
    tensors = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in model.state_dict().items()]
    data = [t.detach().contiguous().numpy().tobytes() for t in model.state_dict().values()]
    return cache.key(str(model.graph), *tensors, *data)


def prepare(
    name: str, model: fx.GraphModule, loaded: Loaded, profile: Profile, inputs_digest: str, fresh: bool
) -> Base:
    """Analyse a lifted model and say what could be done to it."""
    inputs = loaded.task.example_inputs
    facts = analyse(model, inputs)
    techniques = profile.techniques
    facts = check_prunable(model, inputs, facts) if "prune" in techniques else facts
    samples = loaded.samples[:: max(1, len(loaded.samples) // SENSITIVITY_SAMPLES)][:SENSITIVITY_SAMPLES]
    logits = loaded.task.outputs == "logits"
    candidates: tuple[Candidate, ...] = ()
    found = Sensitivity({}, {}, {}, {})
    if {"prune", "factorize", "quantize"} & set(techniques):
        seen = moments(model, facts, loaded.samples)
        probes = factorize.probes(model, facts, seen, TILE) if "factorize" in techniques else {}
        found = measure(model, facts, samples, probes, seen, logits, profile.seed)
    if "prune" in techniques:
        candidates += prune.candidates(model, facts, found, samples, TILE, logits)
    if "factorize" in techniques:
        candidates += factorize.candidates(facts, found, TILE)
    if "quantize" in techniques:
        candidates += quantize.candidates(facts, found)
    quantizer = BACKENDS[profile.artifact].quantizer
    tried = trials.run(
        model,
        facts,
        found,
        candidates,
        samples,
        lambda few: quantize.apply(model, inputs, few, quantizer()),
        logits,
        profile.seed,
    )
    digest = cache.key(lifted_digest(model), inputs_digest)
    return Base(name, model, facts, found, trials.rescaled(candidates, tried), digest, fresh, trials=tried)


def realise(
    base: Base, plan: Plan, loaded: Loaded, profile: Profile, teacher: fx.GraphModule, progress: Progress
) -> Built:
    """Build a plan's artifact, or take it from the cache. Raises TransformError, BackendError or TaskError."""
    name = cache.key(base.digest, _settings(plan, profile))
    kept = None if base.fresh else _read(name)
    if kept is not None:
        return kept
    inputs, samples = loaded.task.example_inputs, loaded.samples[:SENSITIVITY_SAMPLES]
    logits = loaded.task.outputs == "logits"
    backend = BACKENDS[profile.artifact]
    model, training, steps = base.model, base.training, 0
    losses: dict[Technique, float] = {}
    for technique, changed in compress(base, plan, loaded):
        model = changed
        if not plan.distil:
            losses[technique] = trials.distance(base.model, model, samples, logits) - sum(losses.values())
    if plan.distil:
        settings = replace(profile.distillation, steps=plan.distil_steps)
        hints = _hints(base, plan) if base.name == "model" and settings.hint_weight else ()
        model, how = train(model, teacher, loaded, settings, profile.seed, progress, name, hints)
        training, steps = f"{training}; {how}".lstrip("; "), how.steps
    lowered: nn.Module = model
    if plan.precision == "int8":
        lowered = quantize.apply(model, inputs, loaded.samples, backend.quantizer(_kept(plan)))
    loss = trials.distance(base.model, lowered, samples, logits)
    if plan.precision == "int8" and not plan.distil:
        losses["quantize"] = loss - sum(losses.values())
    artifact = backend.lower(lowered, inputs)
    built = Built(artifact, tuple(eager(lowered, samples)), training, steps, False, loss, losses, lowered)
    _write(name, built)
    return built


def _kept(plan: Plan) -> tuple[str, ...]:
    """The layers that stay fp32, a factorized one by the names of its factors."""
    factors = [f"{form.layer}.{i}" for form in plan.forms if form.layer in plan.keep_fp32 for i in range(3)]
    return (*plan.keep_fp32, *factors)


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
    return min((restated, model), key=lambda m: trials.distance(base.model, m, samples, logits))


def _hints(base: Base, plan: Plan) -> tuple[Hint, ...]:
    """The features of every channel group that the plan's model shares with its original."""
    kept = prune.kept_inputs(base.facts, base.sensitivity, plan.widths)
    factorized = {form.layer for form in plan.forms}
    hints = []
    for group in base.facts.groups:
        readers = prune.readers(group, base.facts)
        if readers:
            name = readers[0]
            channels = kept.get(name, torch.arange(base.facts.layer(name).in_channels))
            hints.append(Hint(name, f"{name}.0" if name in factorized else name, channels))
    return tuple(hints)


def train(
    model: fx.GraphModule,
    teacher: fx.GraphModule,
    loaded: Loaded,
    settings: Distillation,
    seed: int,
    progress: Progress,
    keep: str,
    hints: tuple[Hint, ...] = (),
) -> tuple[fx.GraphModule, Training]:
    """Distil the teacher into a model, on the training batches or, where there are none, the calibration inputs.

    `keep` names the training, so that it goes on where it was killed.
    """
    lesson = Lesson(
        settings,
        labelled=loaded.task.labelled and loaded.task.train is not None,
        logits=loaded.task.outputs == "logits",
        seed=seed,
        hints=hints,
        held_out=loaded.samples[:: max(1, len(loaded.samples) // HELD_OUT)][:HELD_OUT],
        keep=keep,
        digest=lifted_digest(teacher),
    )
    trained, how = distil.apply(model, teacher, training_batches(loaded), lesson, progress)
    assert isinstance(trained, fx.GraphModule)
    return trained, how


def training_batches(loaded: Loaded) -> Callable[[], Any]:
    """What gives the batches to train on."""
    return loaded.task.train or (lambda: calibration_batches(loaded))


def calibration_batches(loaded: Loaded, size: int = 32) -> list[tuple[Tensor, ...]]:
    """The calibration samples as batches, for training without training data."""
    chunks = [loaded.samples[i : i + size] for i in range(0, len(loaded.samples), size)]
    return [tuple(torch.cat(column) for column in zip(*chunk, strict=True)) for chunk in chunks]


def _settings(plan: Plan, profile: Profile) -> str:
    settings = {
        "plan": asdict(plan.choices),
        "artifact": profile.artifact,
        "distillation": asdict(profile.distillation),
        "seed": profile.seed,
        "versions": versions(),
    }
    return json.dumps(settings, sort_keys=True, default=str)


# ------------------------------------------------------------------------------------------------------ the cache


def _write(name: str, built: Built) -> None:
    from safetensors.numpy import save

    facts = {key: value for key, value in asdict(built.artifact).items() if key != "data"}
    tensors = {"artifact": np.frombuffer(built.artifact.data, dtype=np.uint8)}
    for s, sample in enumerate(built.expected):
        tensors |= {f"{s:04}.{i}": np.ascontiguousarray(y) for i, y in enumerate(sample)}
    losses = json.dumps({"total": built.loss} | dict(built.losses))
    about = {"facts": json.dumps(facts), "training": built.training, "steps": str(built.steps), "losses": losses}
    cache.write("built", name, save(tensors, about))


def _read(name: str) -> Built | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = cache.read("built", name)
    if data is None:
        return None
    try:
        tensors = load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        facts = json.loads(metadata["facts"])
        samples: dict[str, list[np.ndarray]] = {}
        for key in sorted(key for key in tensors if key != "artifact"):
            samples.setdefault(key.partition(".")[0], []).append(tensors[key])
        facts["fallen_back"] = tuple(facts["fallen_back"])
        artifact = Artifact(data=tensors["artifact"].tobytes(), **facts)
        expected, losses = tuple(tuple(outputs) for outputs in samples.values()), json.loads(metadata["losses"])
        total, steps = losses.pop("total"), int(metadata["steps"])
        return Built(artifact, expected, metadata["training"], steps, True, total, losses)
    except (SafetensorError, KeyError, ValueError, TypeError):
        return None  # damaged: it is made again
