"""Plan, realise, measure, correct the cost model, again: until the measured artifact meets every budget."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from edgebuild import costs, verify
from edgebuild.backends import BACKENDS
from edgebuild.clock import Clock
from edgebuild.devices import DEVICES, Arrays
from edgebuild.errors import BackendError, DeviceError, TransformError
from edgebuild.load import Loaded
from edgebuild.plan import Choice
from edgebuild.propose import Factors, Proposal, more_training, propose, reachable_now
from edgebuild.realise import Base, Built, realise
from edgebuild.spec import (
    PER_TARGET,
    Accuracy,
    Artifact,
    Finding,
    Measurement,
    Parity,
    Plan,
    Profile,
    Reachable,
    Round,
    Target,
    Verdict,
)

HOST = Target(name="host", title="The machine that builds", device="host", status="measured")
PARITY_SAMPLES = 32
LARGEST_CORRECTION = 5.0


@dataclass(frozen=True)
class Attempt:
    """A realised plan and all that was found of it."""

    base: Base
    proposal: Proposal
    built: Built
    measurements: tuple[Measurement, ...]
    parity: tuple[Parity, ...]
    accuracy: Accuracy | None
    verdicts: tuple[Verdict, ...]
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.status == "fail"]

    @property
    def outcome(self) -> str:
        if self.failed or not all(parity.ok for parity in self.parity):
            return "broken"
        return "met" if all(verdict.status == "pass" for verdict in self.verdicts) else "inconclusive"

    @property
    def rank(self) -> tuple[int, float]:
        """Better attempts rank lower: by outcome, then by how far the broken budgets are missed."""
        missed = sum(-(verdict.margin or 0.0) for verdict in self.failed)
        return ["met", "inconclusive", "broken"].index(self.outcome), missed


@dataclass(frozen=True)
class Original:
    """The model as it came: lifted, its score, and its fp32 artifact with no technique applied."""

    model: fx.GraphModule
    score: tuple[float, int] | None
    built: Built
    measurements: tuple[Measurement, ...]


@dataclass(frozen=True)
class Found:
    """What the loop ends with; `best` is None where no plan could be built."""

    best: Attempt | None
    rounds: tuple[Round, ...]
    reachable: tuple[Reachable, ...]
    infeasible: bool
    findings: tuple[Finding, ...]


def take_original(base: Base, loaded: Loaded, profile: Profile, targets: Sequence[Target], clock: Clock) -> Original:
    """Score the model as it came, and lower and measure it in fp32: what everything else is held against."""
    with clock.stage("evaluate", "scoring the original"):
        score = verify.score(loaded, base.model) if loaded.task.evaluate is not None else None
    with clock.stage("lower", "lowering the original in fp32"):
        built = realise(base, Plan(precision="fp32"), loaded, profile, base.model, clock.training)
    layers = tuple((layer, "fp32") for layer in base.facts.layers)
    measurements: list[Measurement] = []
    with artifact_file(built.artifact) as artifact, clock.stage("measure", "measuring the original"):
        for target in _with_host(targets):
            inputs = [verify.to_arrays(sample) for sample in loaded.samples[:PARITY_SAMPLES]]
            try:
                measurements += DEVICES[target.device].measure(artifact, target, profile.threads, inputs, layers)  # type: ignore[arg-type]
            except DeviceError as error:
                clock.tell(f"the original cannot be measured on {target.name}: {error}")
    return Original(base.model, score, built, tuple(measurements))


def improve(
    bases: Iterable[Base], original: Original, loaded: Loaded, profile: Profile, targets: Sequence[Target], clock: Clock
) -> Found:
    """Try plans, least harm first, until one meets every budget or nothing is left to try."""
    attempts: list[Attempt] = []
    rounds: list[Round] = []
    findings: list[Finding] = []
    reach: tuple[Reachable, ...] = ()
    infeasible = False
    for base in bases:
        factors = _first_factors(base, original, profile, targets)
        tried: list[Proposal] = []
        infeasible = False
        for _ in range(profile.rounds):
            with clock.stage("plan", "planning"):
                proposal = _next(base, profile, targets, factors, tried, attempts)
            if proposal is None:
                infeasible = not _only_accuracy_broke(attempts[-1:])
                break
            tried.append(proposal)
            try:
                attempt = _attempt(base, proposal, original, loaded, profile, targets, clock)
            except (TransformError, BackendError) as error:
                findings.append(Finding("skipped", f"round {len(rounds) + 1}", f"the plan could not be built: {error}"))
                continue
            attempts.append(attempt)
            rounds.append(_round(len(rounds) + 1, attempt, factors))
            clock.tell(f"round {len(rounds)}: {_in_words(attempt)}")
            if attempt.outcome == "met":
                return Found(
                    attempt, tuple(rounds), reachable_now(base, profile, targets, factors), False, tuple(findings)
                )
            factors = _corrected(factors, attempt)
            if clock.elapsed > profile.time:
                findings.append(
                    Finding("limit", "time", f"the profile's time, {profile.time}, was over after round {len(rounds)}")
                )
                break
        reach = reachable_now(base, profile, targets, factors)
        if clock.elapsed > profile.time:
            break
    best = min(attempts, key=lambda attempt: attempt.rank, default=None)
    infeasible = infeasible and (best is None or best.outcome == "broken")
    return Found(best, tuple(rounds), reach, infeasible, tuple(findings))


# ------------------------------------------------------------------------------------------------------ a round


def _next(
    base: Base,
    profile: Profile,
    targets: Sequence[Target],
    factors: Factors,
    tried: Sequence[Proposal],
    attempts: Sequence[Attempt],
) -> Proposal | None:
    if tried and attempts and attempts[-1].proposal is tried[-1] and _only_accuracy_broke(attempts[-1:]):
        return more_training(tried[-1], profile)
    return propose(base, profile, targets, factors, tried)


def _only_accuracy_broke(last: Sequence[Attempt]) -> bool:
    return bool(last) and bool(last[0].failed) and all(v.kind == "accuracy_drop" for v in last[0].failed)


def _attempt(
    base: Base,
    proposal: Proposal,
    original: Original,
    loaded: Loaded,
    profile: Profile,
    targets: Sequence[Target],
    clock: Clock,
) -> Attempt:
    plan, inputs = proposal.plan, loaded.task.example_inputs
    with clock.stage("distil" if plan.distil else "lower", f"building: {', '.join(plan.techniques) or 'no technique'}"):
        built = realise(base, plan, loaded, profile, original.model, clock.training)
    layers = proposal.choice.layers()
    samples = loaded.samples[: len(built.expected)]
    logits = loaded.task.outputs == "logits"
    least = verify.LEAST_SQNR_DB[plan.precision]
    measurements: list[Measurement] = []
    parity: list[Parity] = []
    findings = [Finding("fallback", "host", f"not delegated: {operator}") for operator in built.artifact.fallen_back]
    accuracy, outputs = None, {}
    with artifact_file(built.artifact) as artifact:
        for target in _with_host(targets):
            device = DEVICES[target.device]
            try:
                with (
                    clock.stage("verify", f"comparing outputs on {target.name}"),
                    device.load(artifact, target, profile.threads) as session,
                ):
                    outputs[target.name] = verify.run(session, samples)
                    if target.device == "host" and original.score is not None:
                        accuracy = verify.accuracy(
                            loaded.task.metric, original.score, verify.score(loaded, verify.predictor(session))
                        )
                with clock.stage("measure", f"measuring on {target.name}"):
                    arrays = [verify.to_arrays(sample) for sample in samples]
                    measurements += device.measure(artifact, target, profile.threads, arrays, layers)
            except DeviceError as error:
                findings.append(Finding("skipped", target.name, f"the artifact could not be run: {error}"))
                continue
            parity.append(
                verify.parity(outputs[target.name], built.expected, target.name, "eager, as lowered", least, logits)
            )
    if "host" in outputs:
        original_outputs = verify.eager(original.model, samples)
        parity.append(verify.parity(outputs["host"], original_outputs, "host", "the original model", -1e9, logits))
        for name in outputs:
            if name != "host":
                parity.append(verify.parity(outputs[name], outputs["host"], name, "the host's outputs", least, logits))
    if any(not row.ok for row in parity):
        findings.append(_diverging(built, loaded, profile, inputs, least))
    verdicts = _verdicts(profile, targets, proposal, built, measurements, accuracy)
    findings += _estimates(measurements)
    return Attempt(base, proposal, built, tuple(measurements), tuple(parity), accuracy, verdicts, tuple(findings))


def _verdicts(
    profile: Profile,
    targets: Sequence[Target],
    proposal: Proposal,
    built: Built,
    measurements: Sequence[Measurement],
    accuracy: Accuracy | None,
) -> tuple[Verdict, ...]:
    found = {(m.quantity, m.target): m for m in measurements}
    artifact = built.artifact
    found["size", ""] = Measurement("", "size", len(artifact.data), "counted")
    found["min_delegated", ""] = Measurement("", "min_delegated", artifact.share_delegated, "counted")
    verdicts = []
    for budget in profile.budgets:
        if budget.kind == "accuracy_drop":
            verdicts.append(verify.accuracy_verdict(budget, accuracy, "the task has no evaluate()"))
            continue
        for name in [target.name for target in targets] if budget.kind in PER_TARGET else [""]:
            predicted = proposal.predicted.get((budget.kind, name))
            if predicted and budget.kind == "throughput":
                predicted = 1 / predicted
            verdicts.append(verify.verdict(budget, name, predicted, found.get((budget.kind, name))))
    return tuple(verdicts)


def _estimates(measurements: Sequence[Measurement]) -> list[Finding]:
    return [
        Finding("estimated", m.target, f"{m.quantity} is an estimate (+-{m.error:.0%}), not a measurement: {m.detail}")
        for m in measurements
        if m.method == "estimated" and m.quantity == "latency"
    ]


def _diverging(built: Built, loaded: Loaded, profile: Profile, inputs: tuple, least: float) -> Finding:
    """Name the first layer whose lowered outputs differ from eager's."""
    if not isinstance(built.lowered, fx.GraphModule):
        return Finding(
            "note", "parity", "the artifact came from the cache; build with --rebuild to name the first diverging layer"
        )
    device = DEVICES["host"]

    def outputs(artifact: Artifact, sample: tuple) -> Arrays:
        with artifact_file(artifact) as file, device.load(file, HOST, 1) as session:
            return session.run(verify.to_arrays(sample))

    lower = BACKENDS[profile.artifact].lower
    name = verify.first_divergence(built.lowered, inputs, loaded.samples[0], lower, outputs, least)
    return Finding("note", "parity", f"the outputs differ from eager's, first after layer {name}")


# --------------------------------------------------------------------------------------------------- corrections


def _first_factors(base: Base, original: Original, profile: Profile, targets: Sequence[Target]) -> Factors:
    """What the original's measurements say of the cost model."""
    if base.name != "model":
        return {}
    whole = Choice(base.facts, "fp32")
    found = {(m.quantity, m.target): m.value for m in original.measurements}
    factors: Factors = {}
    for limit in costs.limits(profile, targets, {}):
        if value := found.get((limit.kind, limit.target)):
            factors[limit.kind, limit.target] = _factor(value, limit.cost(whole), limit.kind)
    return factors


def _corrected(factors: Factors, attempt: Attempt) -> Factors:
    """The factors after an attempt: each prediction scaled to what was found."""
    corrected = dict(factors)
    for verdict in attempt.verdicts:
        key = (verdict.kind, verdict.target)
        predicted = attempt.proposal.predicted.get(key)
        if verdict.value and predicted:
            raw = predicted / factors.get(key, 1.0)
            corrected[key] = _factor(verdict.value, raw, verdict.kind)
    return corrected


def _factor(found: float, predicted: float, kind: str) -> float:
    value = 1 / found if kind == "throughput" else found
    return min(LARGEST_CORRECTION, max(1 / LARGEST_CORRECTION, value / predicted))


# ------------------------------------------------------------------------------------------------------ helpers


def _round(number: int, attempt: Attempt, factors: Factors) -> Round:
    return Round(
        number=number,
        plan=attempt.proposal.plan,
        artifact_sha256=attempt.built.sha256,
        size=len(attempt.built.artifact.data),
        verdicts=attempt.verdicts,
        training=attempt.built.training,
        corrections={
            f"{kind} {target}".strip(): round(factor, 4) for (kind, target), factor in sorted(factors.items())
        },
        met=attempt.outcome == "met",
    )


def _in_words(attempt: Attempt) -> str:
    broken = [f"{verdict.kind}{f' on {verdict.target}' if verdict.target else ''}" for verdict in attempt.failed]
    undecided = [f"{v.kind} on {v.target}" for v in attempt.verdicts if v.status == "inconclusive"]
    if attempt.outcome == "met":
        return "every budget is met"
    return (
        f"breaks {', '.join(broken)}" if broken else f"undecided: {', '.join(undecided) or 'outputs differ from eager'}"
    )


def _with_host(targets: Sequence[Target]) -> list[Target]:
    """The host scores the artifact whatever the targets are: it runs the same kernels' library."""
    return [HOST, *(target for target in targets if target.device != "host")]


@contextmanager
def artifact_file(artifact: Artifact) -> Iterator[Path]:
    """The artifact as a file, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="edgebuild-") as folder:
        path = Path(folder) / f"model{artifact.suffix}"
        path.write_bytes(artifact.data)
        yield path
