"""Carries out a plan and holds what came of it against the budgets: outputs, score, measurements, verdicts."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from edgebuild import backends, cache, judge, verify
from edgebuild.base import Base, lifted_digest
from edgebuild.built import Built
from edgebuild.clock import Clock
from edgebuild.devices import DEVICES, Arrays, as_file, timing
from edgebuild.environment import versions
from edgebuild.errors import DeviceError
from edgebuild.load import Loaded
from edgebuild.plan import Choice
from edgebuild.propose import Planner, Proposal
from edgebuild.realise import realise
from edgebuild.spec import (
    PER_TARGET,
    Accuracy,
    Artifact,
    Finding,
    Measurement,
    Parity,
    Plan,
    Profile,
    Target,
    Verdict,
)
from edgebuild.training.teacher import Teacher

HOST = Target(name="host", title="The machine that builds", device="host", status="measured")
PARITY_SAMPLES = 32


@dataclass(frozen=True)
class Attempt:
    """A realised plan and all that was found of it. A `draft` was not trained, though its plan asks for it.

    `outputs`: the artifact's own for each sample, on each target that could run it.
    """

    base: Base
    proposal: Proposal
    draft: bool
    built: Built
    measurements: tuple[Measurement, ...]
    parity: tuple[Parity, ...]
    accuracy: Accuracy | None
    verdicts: tuple[Verdict, ...]
    findings: tuple[Finding, ...]
    outputs: Mapping[str, list[Arrays]]

    @property
    def plan(self) -> Plan:
        """The plan as it was carried out: with the steps that were made, where it asked for as many as fit."""
        if self.draft:
            return self.proposal.draft
        plan = self.proposal.plan
        return replace(plan, distil_steps=plan.distil_steps or self.built.steps) if plan.distil else plan

    @property
    def failed(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.status == "fail"]

    @property
    def outcome(self) -> str:
        return judge.outcome(self.verdicts, self.parity)

    @property
    def rank(self) -> tuple[bool, int, float]:
        """Better attempts rank lower: drafts last, by outcome, then by how far the broken budgets are missed."""
        missed = sum(-(verdict.margin or 0.0) for verdict in self.failed)
        return self.draft, ["met", "inconclusive", "broken"].index(self.outcome), missed


@dataclass(frozen=True)
class Original:
    """The model as it came: lifted, its score, and its fp32 artifact with no technique applied."""

    model: fx.GraphModule
    score: tuple[float, int] | None
    built: Built
    measurements: tuple[Measurement, ...]


def take_original(base: Base, loaded: Loaded, profile: Profile, targets: Sequence[Target], clock: Clock) -> Original:
    """Score the model as it came, and lower and measure it in fp32: what everything else is held against.

    A microcontroller's backend takes int8 alone: there the fp32 artifact is the host's, and nothing is measured of it.
    """
    with clock.stage("evaluate", "scoring the original"):
        score = _score(base, loaded, clock) if loaded.task.evaluate is not None else None
    with clock.stage("lower", "lowering the original in fp32"):
        backend = base.backend if base.backend.on_host else backends.HOST
        plain = replace(base, backend=backend)
        built = realise(plain, Plan(precision="fp32"), loaded, profile, base.model, clock.training)
        if built.reused:
            clock.reuse("the original's fp32 artifact")
    layers = Choice(base.facts, "fp32").layers()
    measurements: list[Measurement] = []
    with artifact_file(built.artifact) as artifact, clock.stage("measure", "measuring the original"):
        for target in _runners(base, targets) if base.backend.on_host else ():
            inputs = [verify.to_arrays(sample) for sample in loaded.samples[:PARITY_SAMPLES]]
            try:
                measurements += DEVICES[target.device].measure(artifact, target, profile.threads, inputs, layers)
            except DeviceError as error:
                clock.tell(f"the original cannot be measured on {target.name}: {error}")
    return Original(base.model, score, built, tuple(measurements))


def _score(base: Base, loaded: Loaded, clock: Clock) -> tuple[float, int]:
    """The original's score.

    The task's `evaluate` runs, as nobody but itself knows what it depends on; the model's outputs are kept by what it
    is given, and recalled.
    """
    known = "" if base.fresh else cache.key("outputs", lifted_digest(base.model), repr(sorted(versions().items())))
    model = Teacher(base.model, known)

    def predict(*inputs: Tensor) -> Any:
        outputs = model(inputs).outputs
        return outputs[0] if len(outputs) == 1 else outputs

    score = verify.score(loaded, predict)
    if model.recalled:
        batches = model.recalled + model.computed
        clock.reuse(f"the original's outputs for {model.recalled} of the {batches} batches that it is scored on")
    return score


def carry_out(
    planner: Planner, proposed: Proposal, original: Original, loaded: Loaded, clock: Clock, draft: bool
) -> Attempt:
    """Build a plan and hold it against the budgets; a draft is neither trained nor scored.

    What was trained is timed until that decides its budgets, or for timing.LONGEST: its time is worth those seconds.
    """
    base, profile, targets = planner.base, planner.profile, planner.targets
    plan, inputs = proposed.draft if draft else proposed.plan, loaded.task.example_inputs
    words = f"{'drafting' if draft else 'building'}: {', '.join(plan.techniques) or 'no technique'}"
    with clock.stage("distil" if plan.distil else "lower", words):
        built = realise(base, plan, loaded, profile, original.model, clock.training)
        if built.reused:
            clock.reuse(f"the artifact of a plan ({', '.join(plan.techniques) or 'no technique'})")
    layers = proposed.choice.layers()
    samples = loaded.samples[: len(built.expected)]
    logits = loaded.task.outputs == "logits"
    least = judge.LEAST_SQNR_DB[plan.precision]
    runners = _runners(base, targets)
    scorer = runners[0].name
    measurements: list[Measurement] = []
    parity: list[Parity] = []
    findings = [Finding("fallback", scorer, f"not delegated: {operator}") for operator in built.artifact.fallen_back]
    accuracy = None
    outputs: dict[str, list[Arrays]] = {}
    with artifact_file(built.artifact) as artifact:
        for target in runners:
            device = DEVICES[target.device]
            try:
                with (
                    clock.stage("verify", f"comparing outputs on {target.name}"),
                    device.load(artifact, target, profile.threads) as session,
                ):
                    outputs[target.name] = verify.run(session, samples)
                    if target.name == scorer and original.score is not None and not draft:
                        score = verify.score(loaded, verify.predictor(session))
                        accuracy = verify.accuracy(loaded.task.metric, original.score, score, _how(base))
                with clock.stage("measure", f"measuring on {target.name}"):
                    arrays = [verify.to_arrays(sample) for sample in samples]
                    decides = plan.distil and target in targets
                    enough = judge.Runs(profile.budgets).enough if decides else timing.once
                    measurements += device.measure(artifact, target, profile.threads, arrays, layers, enough)
            except DeviceError as error:
                findings.append(Finding("skipped", target.name, f"the artifact could not be run: {error}"))
                continue
            parity.append(
                judge.parity(outputs[target.name], built.expected, target.name, "eager, as lowered", least, logits)
            )
    if scorer in outputs:
        original_outputs = verify.eager(original.model, samples)
        parity.append(judge.parity(outputs[scorer], original_outputs, scorer, "the original model", -1e9, logits))
        for name in outputs:
            if name != scorer:
                reference = "the host's outputs" if scorer == HOST.name else f"the outputs of {scorer}"
                parity.append(judge.parity(outputs[name], outputs[scorer], name, reference, least, logits))
    if any(not row.ok for row in parity):
        findings.append(_diverging(base, built, loaded, runners[0], inputs, least))
    measurements.append(Measurement("", "min_delegated", built.artifact.share_delegated, "counted"))
    verdicts = _verdicts(planner, proposed, built, measurements, accuracy, draft)
    findings += _estimates(measurements)
    return Attempt(
        base, proposed, draft, built, tuple(measurements), tuple(parity), accuracy, verdicts, tuple(findings), outputs
    )


def _verdicts(
    planner: Planner,
    proposed: Proposal,
    built: Built,
    measurements: Sequence[Measurement],
    accuracy: Accuracy | None,
    draft: bool,
) -> tuple[Verdict, ...]:
    found = {(m.quantity, m.target): m for m in measurements}
    found["size", ""] = Measurement("", "size", len(built.artifact.data), "counted")
    verdicts = []
    for budget in planner.profile.budgets:
        if budget.kind == "accuracy_drop":
            reason = "a draft is not trained" if draft else "the task has no evaluate()"
            verdicts.append(judge.accuracy_verdict(budget, accuracy, reason))
            continue
        for name in [target.name for target in planner.targets] if budget.kind in PER_TARGET else [""]:
            predicted = proposed.predicted.get((budget.kind, name))
            if predicted and budget.kind == "throughput":
                predicted = 1 / predicted
            verdicts.append(judge.verdict(budget, name, predicted, found.get((budget.kind, name))))
    return tuple(verdicts)


def _estimates(measurements: Sequence[Measurement]) -> list[Finding]:
    return [
        Finding("estimated", m.target, f"the latency is {m.method} (+-{m.error:.0%}), not measured: {m.detail}")
        for m in measurements
        if m.method in ("estimated", "simulated") and m.quantity == "latency"
    ]


def _diverging(base: Base, built: Built, loaded: Loaded, target: Target, inputs: tuple, least: float) -> Finding:
    """Name the first layer whose lowered outputs differ from eager's."""
    if not isinstance(built.lowered, fx.GraphModule):
        return Finding(
            "note", "parity", "the artifact came from the cache; build with --rebuild to name the first diverging layer"
        )

    def outputs(artifact: Artifact, sample: tuple) -> Arrays:
        with artifact_file(artifact) as file, DEVICES[target.device].load(file, target, 1) as session:
            return session.run(verify.to_arrays(sample))

    lower = base.backend.lower
    name = verify.first_divergence(built.lowered, inputs, loaded.samples[0], lower, outputs, least)
    return Finding("note", "parity", f"the outputs differ from eager's, first after layer {name}")


# ------------------------------------------------------------------------------------------------------ helpers


def _runners(base: Base, targets: Sequence[Target]) -> list[Target]:
    """The targets that run the artifact, and first the one that scores it.

    That is the host whatever the targets are where it runs the same kernels' library, else the gating target itself.
    """
    if not base.backend.on_host:
        return list(targets)
    return [HOST, *(target for target in targets if target.device != "host")]


def _how(base: Base) -> str:
    """What is to be said of a score that was not taken from the target's own kernels."""
    if base.backend.on_host:
        return ""
    return "The program itself was run, by reference operators: no hardware and no simulator of it is at hand."


def artifact_file(artifact: Artifact) -> AbstractContextManager[Path]:
    """The artifact as a file, for as long as the block lasts."""
    return as_file(artifact.data, artifact.suffix, artifact.graphs)
