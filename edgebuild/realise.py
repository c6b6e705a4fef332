"""Carries out a plan: prune, factorize, distil, quantize, lower. What it makes is kept in the cache, by content."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from edgebuild import cache, trials
from edgebuild.analyse import analyse, check_prunable
from edgebuild.backends import BACKENDS
from edgebuild.devices import Arrays
from edgebuild.environment import versions
from edgebuild.lift import lift
from edgebuild.load import Loaded
from edgebuild.sensitivity import Sensitivity, measure, moments
from edgebuild.spec import (
    SCHEMES,
    Artifact,
    Candidate,
    Distillation,
    ModelFacts,
    Plan,
    Profile,
    Scheme,
    Technique,
    Trial,
)
from edgebuild.task import Module
from edgebuild.transforms import distil, factorize, prune, quantize
from edgebuild.verify import eager

SENSITIVITY_SAMPLES = 32
MOSTLY_LINEAR = 0.6  # of the MACs: from there on int8 ranged at run time and 4-bit groups are worth a trial
QAT_RATE = 0.3  # of the distillation's learning rate: the weights are to move by steps of their rounding
TILE = 8  # channels that XNNPACK's int8 and fp32 micro-kernels take at once, at the least, on every shipped core


@dataclass(frozen=True)
class Base:
    """A model to compress, analysed: the task's own, or its student once it has been distilled.

    The candidates' losses are calibrated by `trials`, for int8 in the `scheme` that loses less. `digest` covers the
    weights and all inputs that a realised plan depends on; `fresh` takes nothing from the cache.
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
    scheme: Scheme = "static"


@dataclass(frozen=True)
class Built:
    """An artifact, eager PyTorch's outputs for the model that it was lowered from, how training and quantizing went.

    `loss`: nats of the softened output distribution from the base's model to what was lowered, on the calibration
    samples. `losses`: what each technique added to it, in the order of the flow; of an untrained plan alone.
    """

    artifact: Artifact
    expected: tuple[Arrays, ...]
    training: str
    reused: bool
    loss: float
    losses: Mapping[Technique, float]
    quantization: str = ""
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

    def quantized(scheme: Scheme) -> Callable[[Sequence[tuple[Tensor, ...]]], nn.Module]:
        return lambda few: quantize.apply(model, inputs, few, quantizer((), scheme), logits).model

    schemes = SCHEMES if profile.artifact == "pte" and _linear_share(facts) > MOSTLY_LINEAR else SCHEMES[:1]
    ways = {scheme: quantized(scheme) for scheme in schemes}
    tried = trials.run(model, facts, found, candidates, samples, ways, logits, profile.seed)
    scheme = trials.scheme_of(tried)
    candidates = trials.rescaled(candidates, trials.of_scheme(tried, scheme))
    digest = cache.key(lifted_digest(model), inputs_digest)
    return Base(name, model, facts, found, candidates, digest, fresh, trials=tried, scheme=scheme)


def _linear_share(facts: ModelFacts) -> float:
    """The linear layers' share of the multiply-accumulates."""
    return sum(layer.macs for layer in facts.layers if layer.op == "linear") / max(1, facts.macs)


def realise(
    base: Base, plan: Plan, loaded: Loaded, profile: Profile, teacher: fx.GraphModule, progress: distil.Progress
) -> Built:
    """Build a plan's artifact, or take it from the cache. Raises TransformError, BackendError or TaskError."""
    name = cache.key(base.digest, _settings(plan, profile))
    kept = None if base.fresh else _read(name)
    if kept is not None:
        return kept
    inputs, samples = loaded.task.example_inputs, loaded.samples[:SENSITIVITY_SAMPLES]
    logits = loaded.task.outputs == "logits"
    backend = BACKENDS[profile.artifact]
    model, training = base.model, base.training
    losses: dict[Technique, float] = {}
    for technique, changed in compress(base, plan, inputs):
        model = changed
        if not plan.distil:
            losses[technique] = trials.distance(base.model, model, samples, logits) - sum(losses.values())
    if plan.distil:
        settings = replace(profile.distillation, steps=plan.distil_steps)
        trained, how = train(model, teacher, loaded, settings, profile.seed, progress)
        model, training = trained, f"{training}; {how}".lstrip("; ")
    lowered: nn.Module = model
    quantization = ""
    if plan.precision == "int8":
        quantized = _quantized(model, plan, loaded, profile, teacher, progress)
        lowered, quantization = quantized.model, quantized.how
    loss = trials.distance(base.model, lowered, samples, logits)
    if plan.precision == "int8" and not plan.distil and not plan.qat_steps:
        losses["quantize"] = loss - sum(losses.values())
    artifact = backend.lower(lowered, inputs)
    built = Built(artifact, tuple(eager(lowered, samples)), training, False, loss, losses, quantization, lowered)
    _write(name, built)
    return built


def _quantized(
    model: fx.GraphModule,
    plan: Plan,
    loaded: Loaded,
    profile: Profile,
    teacher: fx.GraphModule,
    progress: distil.Progress,
) -> quantize.Quantized:
    inputs, logits = loaded.task.example_inputs, loaded.task.outputs == "logits"
    quantizer = BACKENDS[profile.artifact].quantizer(_kept(plan), plan.scheme)
    if not plan.qat_steps:
        return quantize.apply(model, inputs, loaded.samples, quantizer, logits)
    shown, held = quantize.split(loaded.samples)
    settings = replace(
        profile.distillation, steps=plan.qat_steps, learning_rate=QAT_RATE * profile.distillation.learning_rate
    )
    return quantize.finish(
        model,
        teacher,
        inputs,
        shown,
        held,
        quantizer,
        logits,
        lambda fake: train(fake, teacher, replace(loaded, samples=tuple(shown)), settings, profile.seed, progress),
    )


def _kept(plan: Plan) -> tuple[str, ...]:
    """The layers that stay fp32, a factorized one by the names of its factors."""
    factors = [f"{form.layer}.{i}" for form in plan.forms if form.layer in plan.keep_fp32 for i in range(3)]
    return (*plan.keep_fp32, *factors)


def compress(
    base: Base, plan: Plan, inputs: tuple[Tensor, ...]
) -> Iterator[tuple[Literal["prune", "factorize"], fx.GraphModule]]:
    """The model once pruned, then factorized as well; lifted again, so that the factors are layers of their own."""
    model = base.model
    if plan.widths:
        model = prune.apply(model, inputs, base.facts, base.sensitivity, plan.widths)
        if not plan.forms:
            model = lift(model, inputs)
        yield "prune", model
    if plan.forms:
        seen = prune.moments_after(base.facts, base.sensitivity, plan.widths)
        yield "factorize", lift(factorize.apply(model, inputs, plan.forms, seen), inputs)


def train(
    model: Module,
    teacher: fx.GraphModule,
    loaded: Loaded,
    settings: Distillation,
    seed: int,
    progress: distil.Progress,
) -> tuple[Module, distil.Training]:
    """Distil the teacher into a model, on the training batches or, where there are none, the calibration inputs."""
    batches: Callable[[], Any] = loaded.task.train or (lambda: calibration_batches(loaded))
    labelled = loaded.task.labelled and loaded.task.train is not None
    logits = loaded.task.outputs == "logits"
    trained, how = distil.apply(model, teacher, batches, settings, labelled, logits, seed, progress)
    assert isinstance(trained, type(model))
    return trained, how


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
    about = {
        "facts": json.dumps(facts),
        "training": built.training,
        "quantization": built.quantization,
        "losses": losses,
    }
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
        return Built(
            artifact, expected, metadata["training"], True, losses.pop("total"), losses, metadata["quantization"]
        )
    except (SafetensorError, KeyError, ValueError, TypeError):
        return None  # damaged: it is made again
