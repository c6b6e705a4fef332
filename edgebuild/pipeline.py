"""The flow: load -> analyse -> plan -> prune/factorize -> distil -> quantize -> lower -> verify -> report -> bundle."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import fx

from edgebuild import backends, bundle, cache, catalog, costs, handoff, integration, report, settings, students, upkeep
from edgebuild.attempt import Attempt, Original, take_original
from edgebuild.base import Base, lifted_digest, prepare
from edgebuild.clock import Clock, Tell
from edgebuild.devices import DEVICES
from edgebuild.environment import machine, versions
from edgebuild.handoff import Sampled
from edgebuild.lift import batch_is_free, lift
from edgebuild.load import Loaded, load
from edgebuild.loop import Found, Make, improve
from edgebuild.plan import checked, choice_of
from edgebuild.propose import Planner, Proposal, askable, fits, frontier, nearest, propose, reachable, start
from edgebuild.realise import trained, training_batches
from edgebuild.space import Limit
from edgebuild.spec import (
    Cast,
    Dropped,
    Finding,
    FrontierPoint,
    LayerFacts,
    LayerRow,
    ModelFacts,
    Plan,
    Profile,
    Reachable,
    Report,
    Solve,
    Target,
)
from edgebuild.transforms import distil, order
from edgebuild.units import Bytes


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    `student` compresses the task's student in place of its model; `rebuild` takes no artifact from the cache.
    """

    task: str
    profile: str
    output: Path
    weights: str | None = None
    calibration: str | None = None
    student: bool = False
    rebuild: bool = False
    plan: str | None = None


@dataclass(frozen=True)
class Preview:
    """What `plan` found, without building anything. `proposal` is None where the solver has no plan."""

    profile: Profile
    facts: ModelFacts
    fits_as_it_is: bool
    proposal: Proposal | None
    solve: Solve | None
    dropped: tuple[Dropped, ...]
    limits: tuple[Limit, ...]
    reachable: tuple[Reachable, ...]


def plan(request: Request, tell: Tell) -> Preview:
    """The plan that a build would start with: the models' figures alone, as nothing is lowered or measured."""
    clock = Clock(tell)
    loaded, profile, targets, base, _ = _prepared(request, clock)
    planner = Planner(base, profile, targets, {}, base.candidates)
    proposed: Proposal | None = start(planner)
    assert proposed is not None
    fitting, solve = fits(planner, proposed), None
    _, dropped = planner.points
    with clock.stage("plan", "planning"):
        if not fitting:
            proposed, solve = propose(planner, [])
        reach = reachable(planner)
        if proposed is None:
            reach = tuple(_with_nearest(planner, row, limit) for row, limit in zip(reach, planner.limits, strict=True))
    return Preview(profile, base.facts, fitting, proposed, solve, dropped, planner.limits, reach)


def _with_nearest(planner: Planner, row: Reachable, limit: Limit) -> Reachable:
    found = nearest(planner, limit)
    if found is None:
        return row
    return replace(row, nearest=askable(row.kind, found.predicted[limit.kind, limit.target]))


def build(request: Request, tell: Tell) -> Report:
    """Build a task for a profile and write the bundle; the report says how it went.

    Where no plan is feasible nothing is written. Raises EdgebuildError with the exit code of its cause.
    """
    clock = Clock(tell)
    bundle.check_writable(request.output)
    upkeep.bound()
    packed = settings.pack(request.profile)
    given = catalog.load_plan(request.plan) if request.plan else None
    loaded, profile, targets, base, findings = _prepared(request, clock)
    if given and given.base == "model":
        given = checked(base.facts, given)
    original = take_original(base, loaded, profile, targets, clock)
    bases, rival = _bases(request, base, original, loaded, profile, clock, given)
    found = improve(bases, rival, original, loaded, profile, targets, clock, given)
    with clock.stage("frontier", "looking along the trade-off curve"):
        curve = frontier(found.planner, found.best.proposal if found.best else None)
    with clock.stage("bundle", "taking test vectors"):
        sampled = handoff.sample(found.best, loaded) if found.best else None
    findings += sampled.findings if sampled else ()
    made = _report(request, loaded, base, original, found, curve, findings, clock)
    if made.artifact:
        clock.tell(f"writing {request.output}")
        assert found.best is not None and sampled is not None
        files = _files(made, found.best, sampled) | packed
        contents = handoff.describe(made, loaded, profile, sampled, files)
        bundle.write(request.output, files | integration.files(handoff.model(contents)), contents)
    entries, size = upkeep.trim()
    if entries:
        clock.tell(f"removed {entries} entries, {Bytes(size)}, from the cache: it may hold {upkeep.bound()}")
    return made


def follow(task: str, weights: str | None, calibration: str | None) -> None:
    """In every process but the first of a launch: take part in the trainings of its build."""
    loaded = functools.cache(lambda: load(task, weights, calibration))
    distil.follow(lambda: training_batches(loaded())())


def _prepared(request: Request, clock: Clock) -> tuple[Loaded, Profile, tuple[Target, ...], Base, tuple[Finding, ...]]:
    """The task loaded and analysed, the devices ready."""
    with clock.stage("load", f"loading {request.task} for {request.profile}"):
        profile, targets = load_profile(request.profile)
        loaded = load(request.task, request.weights, request.calibration)
    with clock.stage("devices", f"making {', '.join(target.name for target in targets)} ready"):
        for target in targets:
            DEVICES[target.device].check(target)
    with clock.stage("analyse", f"analysing {loaded.name}"):
        model = lift(loaded.task.model, loaded.task.example_inputs)
        profile, findings = _usable(profile, loaded, model)
        backend = backends.of(profile, targets)
        if backend.name == "cortex_m":  # Vela finds an order of its own
            ordered = order.apply(model, loaded.task.example_inputs)
            model, findings = ordered.model, (*findings, *_reordered(ordered))
        base = prepare("model", model, loaded, profile, backend, inputs_digest(loaded), fresh=request.rebuild)
        if base.reused:
            clock.reuse("the analysis of the model")
    with clock.stage("calibrate", "finding what layers cost (once)"):
        costs.warm_up(targets, profile.threads, base.facts)
    return loaded, profile, targets, base, findings


def _reordered(ordered: order.Ordered) -> Iterator[Finding]:
    if ordered.after < ordered.before:
        what = f"operators run in another order: {ordered.after:,} activations alive at once, not {ordered.before:,}"
        yield Finding("note", "schedule", what)


def load_profile(name: str) -> tuple[Profile, tuple[Target, ...]]:
    """A profile and its targets, the gating one first."""
    profile = catalog.load_profile(name)
    return profile, catalog.targets_of(profile)


def _usable(profile: Profile, loaded: Loaded, model: fx.GraphModule) -> tuple[Profile, tuple[Finding, ...]]:
    """The profile without what this task cannot do; each loss is a finding."""
    findings = []
    if "distil" in profile.techniques and not batch_is_free(model, loaded.task.example_inputs):
        profile = replace(profile, techniques=tuple(t for t in profile.techniques if t != "distil"))
        findings.append(
            Finding("skipped", "distil", "the exported graph has a fixed batch size of 1: it cannot be trained")
        )
    elif loaded.task.train is None and "distil" in profile.techniques:
        what = f"the task has no training batches: distillation sees {len(loaded.samples)} calibration inputs alone"
        findings.append(Finding("note", "distil", what))
    if loaded.task.evaluate is None:
        what = "the task has no evaluate(): agreement with the original stands in for a metric"
        findings.append(Finding("skipped", "accuracy", what))
    return profile, tuple(findings)


def _bases(
    request: Request,
    model: Base,
    original: Original,
    loaded: Loaded,
    profile: Profile,
    clock: Clock,
    given: Plan | None,
) -> tuple[list[Make], Make | None]:
    """What makes the models to compress, in order: the task's own, the same shortened, its student once distilled.

    And the one that is tried before a plan of the first is trained, where it is estimated to lose less.
    """
    inputs, digest = loaded.task.example_inputs, inputs_digest(loaded)

    made: list[Base] = []

    def shortened(planner: Planner | None) -> Base | None:
        if made:
            return made[0]
        if given is not None:
            return students.shortened(model, given.dropped, loaded, profile, digest)
        assert planner is not None
        with clock.stage("plan", "looking for blocks that could go"):
            chosen = students.choose(planner, loaded)
        if chosen is None:
            return None
        short, why = chosen
        with clock.stage("analyse", f"analysing the model without {len(short.dropped)} of its blocks"):
            names = [block.name for block in short.dropped]
            made.append(replace(students.shortened(model, names, loaded, profile, digest), why=(why,)))
        return made[0]

    def student(planner: Planner | None) -> Base | None:
        assert loaded.task.student is not None
        lifted = lift(loaded.task.student, inputs)
        with clock.stage("distil", "distilling the student"):
            settings, seed = profile.distillation, profile.seed
            keep = cache.key(lifted_digest(lifted), model.digest, repr((settings, seed, sorted(versions().items()))))
            taught, how, _ = trained(
                lifted, original.model, loaded, settings, seed, clock.training, keep, (), request.rebuild
            )
        with clock.stage("analyse", "analysing the student"):
            lifted = lift(taught, inputs)
            base = prepare("student", lifted, loaded, profile, model.backend, digest, fresh=request.rebuild)
        why = "student: no plan for the model itself met the budgets"
        return replace(base, training=f"student distilled: {how}", why=(why,))

    wanted = {"student"} if request.student else {given.base} if given else {"model", "shortened", "student"}
    bases: list[Make] = [lambda planner: model] if "model" in wanted else []
    if "shortened" in wanted and (given or "prune" in profile.techniques):
        bases.append(shortened)
    if "student" in wanted and loaded.task.student is not None and "distil" in profile.techniques:
        bases.append(student)
    return bases, shortened if shortened in bases and not given else None


def inputs_digest(loaded: Loaded) -> str:
    """SHA-256 of the calibration inputs and of whatever else the task declares."""
    tensors = [x.contiguous().numpy().tobytes() for sample in loaded.samples for x in sample]
    return cache.key(loaded.sources, loaded.task.outputs, str(loaded.task.labelled), *tensors)


# ------------------------------------------------------------------------------------------------------- report


def _report(
    request: Request,
    loaded: Loaded,
    base: Base,
    original: Original,
    found: Found,
    curve: tuple[FrontierPoint, ...],
    findings: Sequence[Finding],
    clock: Clock,
) -> Report:
    best, planner = found.best, found.planner
    profile, targets = planner.profile, planner.targets
    outcome: Any = "infeasible" if found.infeasible or best is None else best.outcome
    built = best is not None and outcome != "infeasible"
    shown = best if built else None
    findings = (*findings, *found.findings, *(shown.findings if shown else ()), *_kept(clock))
    return Report(
        outcome=outcome,
        summary=_summary(outcome, profile, found),
        task=loaded.name,
        profile=profile.name,
        targets=profile.targets,
        artifact=f"{loaded.name}{shown.built.artifact.suffix}" if shown else "",
        artifact_sha256=shown.built.sha256 if shown else "",
        size=len(shown.built.artifact.data) if shown else 0,
        original_size=len(original.built.artifact.data),
        plan=shown.plan if shown else None,
        verdicts=shown.verdicts if shown else (),
        accuracy=shown.accuracy if shown else None,
        parity=shown.parity if shown else (),
        measurements=shown.measurements if shown else (),
        original_measurements=original.measurements,
        layers=_layers(shown.base, shown.plan, targets, profile.threads) if shown else (),
        rounds=found.rounds,
        reachable=found.reachable,
        frontier=curve,
        dropped=planner.points[1],
        trials=planner.base.trials,
        calibration={
            target.name: DEVICES[target.device].calibration_error(target, profile.threads) for target in targets
        },
        findings=tuple(findings),
        stages={name: round(seconds, 3) for name, seconds in clock.stages.items()},
        environment=_environment(loaded, profile, base),
        build_id=cache.key(base.digest, repr(profile), repr(targets), *versions().values())[:16],
    )


def _kept(clock: Clock) -> Iterator[Finding]:
    if clock.reused:
        what = "; ".join(dict.fromkeys(clock.reused))
        yield Finding("note", "cache", f"reused from earlier builds: {what}. `--rebuild` makes it anew")
    if why := cache.unkept():
        yield Finding("skipped", "cache", f"{why}: not all is kept for later builds")


def _summary(outcome: str, profile: Profile, found: Found) -> str:
    if outcome == "met":
        return f"every budget of {profile.name} is met"
    if outcome == "infeasible":
        rows = found.reachable
        binding = [row for row in rows if not row.feasible] or [row for row in rows if row.nearest is not None]
        what = ", ".join(f"{report.named(row.kind)}{f' on {row.target}' if row.target else ''}" for row in binding)
        return f"no plan meets every budget; {what} binds" if what else "no plan meets all budgets together"
    verdicts = found.best.verdicts if found.best else ()
    wanted = "fail" if outcome == "broken" else "inconclusive"
    names = [f"{report.named(v.kind)}{f' on {v.target}' if v.target else ''}" for v in verdicts if v.status == wanted]
    if outcome == "broken":
        return f"{', '.join(names) or 'the comparison with eager PyTorch'} failed, and nothing is left to try"
    return f"{', '.join(names)} could not be decided"


def _layers(base: Base, plan: Plan, targets: Sequence[Target], threads: int) -> tuple[LayerRow, ...]:
    choice = choice_of(base.facts, plan)
    losses = {candidate.choice: candidate.loss for candidate in base.candidates}
    casts = {c.choice.layer: c.loss for c in base.candidates if isinstance(c.choice, Cast)}
    widths = {name: width for width in plan.widths for name in base.facts.group(width.group).outputs}
    forms = {form.layer: form for form in plan.forms}
    realised: dict[str, list[LayerFacts]] = {}
    names = {before.name for before in base.facts.layers}
    for layer, _ in choice.layers():  # a factor and a conversion go by their layer's name and a suffix
        name = layer.name if layer.name in names else layer.name.rpartition(".")[0]
        if layer.op not in ("quantize", "dequantize"):
            realised.setdefault(name, []).append(layer)
    rows = []
    for before in base.facts.layers:
        after = realised[before.name]
        width, form = widths.get(before.name), forms.get(before.name)
        changes = [f"width {width.of} -> {width.channels}"] if width and before.weighted else []
        changes += [f"{form.kind} rank {' x '.join(map(str, form.ranks))}"] if form else []
        loss = losses.get(form, 0.0) if form else 0.0
        loss += losses.get(width, 0.0) if width and width.group == before.name else 0.0
        precision = choice.precision_of(before.name)
        loss += casts.get(before.name, 0.0) if precision == "int8" else 0.0
        rows.append(
            LayerRow(
                name=before.name,
                op=before.op,
                change=", ".join(changes),
                precision=precision,
                parameters=(before.parameters, sum(layer.parameters for layer in after)),
                macs=(before.macs, sum(layer.macs for layer in after)),
                latency={
                    target.name: (
                        costs.layer_latency(before, "fp32" if base.backend.on_host else "int8", target, threads),
                        sum(costs.layer_latency(layer, precision, target, threads) for layer in after),
                    )
                    for target in targets
                    if target.timed
                },
                loss=loss,
            )
        )
    return tuple(rows)


def _environment(loaded: Loaded, profile: Profile, base: Base) -> dict[str, str]:
    return {
        **versions(),
        "machine": machine(),
        "seed": str(profile.seed),
        "inputs": base.digest,
        "training threads": str(torch.get_num_threads()),
    }


def plan_json(plan: Plan) -> bytes:
    """A plan as a file to read, edit and build by."""
    return msgspec.json.format(msgspec.json.encode(asdict(plan)), indent=2) + b"\n"


def _files(made: Report, best: Attempt, sampled: Sampled) -> dict[str, bytes]:
    text = report.to_json(made)
    read = report.from_json(text)
    return {
        made.artifact: best.built.artifact.data,
        "plan.json": plan_json(best.plan),
        "report.json": text.encode(),
        "report.html": report.html(read).encode(),
        "report.md": report.markdown(read).encode(),
        **{bundle.graph_name(made.artifact, i): graph for i, graph in enumerate(best.built.artifact.graphs)},
        **handoff.vectors(made, sampled),
    }
