"""Plan, realise, measure, correct the cost model, again: until the measured artifact meets every budget."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from edgebuild import footprint, trials
from edgebuild.attempt import Attempt, Original, carry_out
from edgebuild.base import Base
from edgebuild.clock import Clock
from edgebuild.costs import Factors
from edgebuild.errors import BackendError, TransformError
from edgebuild.load import Loaded
from edgebuild.plan import Choice, checked
from edgebuild.propose import (
    Planner,
    Proposal,
    askable,
    more_training,
    natural,
    nearest,
    proposal,
    propose,
    reachable,
    start,
    with_rounding,
)
from edgebuild.spec import TIMED, Finding, Plan, Prediction, Profile, Reachable, Round, Target, Trial
from edgebuild.students import expected

Make = Callable[[Planner | None], Base | None]

LARGEST_CORRECTION = 5.0
MOST_DRAFTS = 12  # plans of one base; each was corrected by those before it
REFINEMENTS = 3  # drafts after one that fits, each where it is expected to lose so much less
WORTH_REFINING = 0.95
MOST_FASTER = 1.5  # times, by ranges found at run time: one instruction in three is spared
MOSTLY = 0.5  # of the MACs have to be in layers that are computed so


@dataclass(frozen=True)
class Found:
    """What the loop ends with; `best` is None where no plan could be built. `planner` is the one of the last base."""

    best: Attempt | None
    rounds: tuple[Round, ...]
    reachable: tuple[Reachable, ...]
    infeasible: bool
    findings: tuple[Finding, ...]
    planner: Planner


def improve(
    bases: Iterable[Make],
    rival: Make | None,
    original: Original,
    loaded: Loaded,
    profile: Profile,
    targets: Sequence[Target],
    clock: Clock,
    given: Plan | None = None,
) -> Found:
    """Try plans, least harm first, until one meets every budget, none can, or the profile's time is over.

    `bases` make the models to compress, each only if it comes to that, from the planner of the one before it; or None.
    `rival` is the one that is tried before a plan of the first is trained, where it is estimated to lose less. With a
    `given` plan, it is built and no other. Each plan is lowered and measured before it is trained: training changes
    neither size nor latency nor memory, and takes the time.
    """
    trail = _Trail([], [], [])
    reach: tuple[Reachable, ...] = ()
    planner: Planner | None = None
    infeasible = False
    for make in bases:
        base = make(planner)
        if base is None or any(attempt.base is base for attempt in trail.attempts):
            continue
        before = planner.factors if planner is not None and base.name == "shortened" else {}  # the same layers
        planner = Planner(base, profile, tuple(targets), before, base.candidates)
        planner = replace(planner, factors=before or first_factors(planner, original))
        planner, infeasible = _improve_base(planner, given, rival, original, loaded, clock, trail)
        rival = None
        with clock.stage("plan", "looking for what each budget could be"):
            reach = reachable(planner)
        if infeasible:
            reach = _nearest(reach, planner, original, loaded, clock, trail.findings)
        if given or clock.elapsed > profile.time or any(attempt.outcome == "met" for attempt in trail.attempts):
            break
    assert planner is not None
    best = min(trail.attempts, key=lambda attempt: attempt.rank, default=None)
    infeasible = infeasible and (best is None or best.outcome == "broken")
    return Found(best, tuple(trail.rounds), reach, infeasible, tuple(trail.findings), planner)


@dataclass(frozen=True)
class _Trail:
    """What was done so far, over all bases."""

    attempts: list[Attempt]
    rounds: list[Round]
    findings: list[Finding]


def _improve_base(
    planner: Planner,
    given: Plan | None,
    rival: Make | None,
    original: Original,
    loaded: Loaded,
    clock: Clock,
    trail: _Trail,
) -> tuple[Planner, bool]:
    """Rounds on one base; the planner as corrected, and whether it is proven that no plan of this base fits."""
    profile = planner.profile
    tried: list[Proposal] = []
    proposed: Proposal | None = proposal(planner, checked(planner.base.facts, given)) if given else start(planner)
    while proposed is not None:
        tried.append(proposed)
        attempt: Attempt | None = None
        try:
            attempt = carry_out(planner, proposed, original, loaded, clock, draft=proposed.plan.distil)
            planner = _note(planner, attempt, trail, clock)
            if len(tried) == 1 and not given and _may_be_fast_enough(attempt):
                attempt = _ranged_at_run_time(planner, attempt, original, loaded, clock, trail)
                proposed = attempt.proposal
            if attempt.draft and not attempt.failed:
                if not given:
                    planner, proposed = _refined(planner, proposed, attempt, tried, original, loaded, clock, trail)
                other = _rival(planner, rival)
                rival = None
                if other is not None:
                    other, _ = _improve_base(other, None, None, original, loaded, clock, trail)
                    if clock.elapsed > profile.time or any(kept.outcome == "met" for kept in trail.attempts):
                        return other, False
                attempt = carry_out(planner, proposed, original, loaded, clock, draft=False)
                planner = _note(planner, attempt, trail, clock)
        except (TransformError, BackendError) as error:
            where = f"round {len(trail.rounds) + 1}"
            trail.findings.append(Finding("skipped", where, f"the plan could not be built: {error}"))
        if given or (attempt and attempt.outcome == "met"):
            return planner, False
        if clock.elapsed > profile.time:
            what = f"the profile's time, {profile.time}, was over after round {len(trail.rounds)}"
            trail.findings.append(Finding("limit", "time", what))
            return planner, False
        if attempt and attempt.failed and all(verdict.kind == "min_delegated" for verdict in attempt.failed):
            what = "no width, rank or training changes which operators the backend takes"
            trail.findings.append(Finding("limit", "delegation", what))
            return planner, False
        if attempt and not attempt.draft and _only_accuracy_broke(attempt):
            built = attempt.built
            rounded = with_rounding(proposed, profile, built.steps, built.unrounded, built.loss)
            if rounded or proposed.plan.distil:
                proposed = rounded or more_training(proposed, profile)
                continue
        if (
            sum(not kept.draft for kept in trail.attempts if kept.base is planner.base) >= profile.rounds
            or len(tried) > MOST_DRAFTS
        ):
            what = f"{len(tried)} plans were tried: the profile's rounds are over"
            trail.findings.append(Finding("limit", "rounds", what))
            return planner, False
        with clock.stage("plan", "planning"):
            proposed, solve = propose(planner, tried)
        if attempt and not attempt.draft and _only_accuracy_broke(attempt):
            # it fits as it is: another plan is worth its time only where it is expected to lose less
            if proposed is None or proposed.total_loss >= attempt.proposal.total_loss:
                proposed = more_training(attempt.proposal, profile)
            if proposed is None:
                return planner, False
        if proposed is None:
            if solve.status != "infeasible":
                what = f"the solver found no plan: {solve.status} after {solve.seconds:.1f} s"
                trail.findings.append(Finding("limit", "plan", what))
            return planner, solve.status == "infeasible"
    return planner, False


def _refined(
    planner: Planner,
    proposed: Proposal,
    draft: Attempt,
    tried: list[Proposal],
    original: Original,
    loaded: Loaded,
    clock: Clock,
    trail: _Trail,
) -> tuple[Planner, Proposal]:
    """The plan to train instead of one whose draft fits: what a draft was measured at tells how much room it leaves.

    As each draft corrects the costs and the losses, the next is planned closer to the bounds; the one that really loses
    least is taken, before any training. With it the planner as corrected by them all.
    """
    best, least = proposed, draft.built.loss
    for _ in range(REFINEMENTS):
        with clock.stage("plan", "planning with the room that is left"):
            other, _ = propose(planner, tried)
        if other is None or other.total_loss >= WORTH_REFINING * least or clock.elapsed > planner.profile.time:
            break
        tried.append(other)
        try:
            attempt = carry_out(planner, other, original, loaded, clock, draft=True)
        except (TransformError, BackendError) as error:
            trail.findings.append(Finding("skipped", "a further draft", f"the plan could not be built: {error}"))
            continue
        planner = _note(planner, attempt, trail, clock)
        if not attempt.failed and attempt.built.loss < least:
            why = f"drafted once more: it loses {attempt.built.loss:.3g} nats untrained, the draft before {least:.3g}"
            best, least = replace(other, plan=replace(other.plan, why=(*other.plan.why, why))), attempt.built.loss
    return planner, best


def _may_be_fast_enough(attempt: Attempt) -> bool:
    """Whether int8 alone is too slow, and could be fast enough with ranges found at run time.

    Its inputs are unsigned, which spares XNNPACK's kernels for VNNI an instruction of three. They have to be ranged and
    rounded for each layer, though: that pays for whole convolutions, not for the many small ones of a factorized plan.
    """
    plan, facts = attempt.plan, attempt.base.facts
    if attempt.draft or plan.precision != "int8" or plan.scheme != "static" or not attempt.failed:
        return False
    if "dynamic" not in attempt.base.backend.schemes:
        return False
    near = all(
        v.kind in TIMED and v.value and max(v.value / v.bound, v.bound / v.value) < MOST_FASTER for v in attempt.failed
    )
    rounded = sum(layer.macs for layer in facts.layers if layer.weighted and footprint.rounds(layer, "dynamic"))
    return near and rounded > MOSTLY * facts.macs


def _ranged_at_run_time(
    planner: Planner, attempt: Attempt, original: Original, loaded: Loaded, clock: Clock, trail: _Trail
) -> Attempt:
    """The same plan with ranges found at run time, if that keeps every budget for what is measured; else as it is."""
    why = (*attempt.plan.why, "ranges found at run time: with ranges from before int8 alone is too slow")
    proposed = proposal(planner, replace(attempt.proposal.plan, scheme="dynamic", why=why))
    try:
        other = carry_out(planner, proposed, original, loaded, clock, draft=True)
        if not other.failed:
            other = carry_out(planner, proposed, original, loaded, clock, draft=False)
    except (TransformError, BackendError) as error:
        trail.findings.append(Finding("skipped", "ranges found at run time", f"the plan could not be built: {error}"))
        return attempt
    _note(planner, other, trail, clock)
    return attempt if other.draft else other


def _rival(planner: Planner, make: Make | None) -> Planner | None:
    """The planner of the base that is still estimated to lose less than this one's, if there is one."""
    base = make(planner) if make is not None else None
    if base is None:
        return None
    other = replace(planner, base=base, candidates=base.candidates)
    (short, _), (whole, _) = propose(other, []), propose(planner, [])
    if short is None:
        return None
    loss = expected(base.lost, short.total_loss, planner.profile)
    return other if whole is None or loss < whole.total_loss else None


def _note(planner: Planner, attempt: Attempt, trail: _Trail, clock: Clock) -> Planner:
    """Keep what an attempt found, and correct the planner by it."""
    # a draft that breaks nothing is the same plan as the trained attempt that follows, and no round of its own
    if not attempt.draft or attempt.failed:
        trail.attempts.append(attempt)
        trail.rounds.append(_round(len(trail.rounds) + 1, attempt, planner.factors))
        clock.tell(f"round {len(trail.rounds)}: {_in_words(attempt)}")
    return corrected(planner, attempt)


def _nearest(
    reach: tuple[Reachable, ...],
    planner: Planner,
    original: Original,
    loaded: Loaded,
    clock: Clock,
    findings: list[Finding],
) -> tuple[Reachable, ...]:
    """For each broken budget the nearest feasible value, all others as asked: as measured on a plan that reaches it.

    Such a plan is built without training, as training changes none of these figures.
    """
    rows = []
    for row, limit in zip(reach, planner.limits, strict=True):
        with clock.stage("plan", f"looking for the nearest feasible {row.kind}"):
            proposed = nearest(planner, limit)
        if proposed is None:
            rows.append(row)
            continue
        value, measured = proposed.predicted[limit.kind, limit.target], False
        try:
            attempt = carry_out(planner, proposed, original, loaded, clock, draft=True)
            found = next(v.value for v in attempt.verdicts if (v.kind, v.target) == (row.kind, row.target))
            if found:
                value, measured = max(value, natural(row.kind, found)), True
        except (TransformError, BackendError) as error:
            findings.append(Finding("skipped", "nearest feasible", f"the plan could not be built: {error}"))
        rows.append(replace(row, nearest=askable(row.kind, value), measured=measured))
    return tuple(rows)


def _only_accuracy_broke(last: Attempt) -> bool:
    return bool(last.failed) and all(verdict.kind == "accuracy_drop" for verdict in last.failed)


# --------------------------------------------------------------------------------------------------- corrections


def first_factors(planner: Planner, original: Original) -> Factors:
    """What the original's measurements say of the cost model."""
    if planner.base.name != "model":
        return {}
    whole = Choice(planner.base.facts, "fp32")
    found = {(m.quantity, m.target): m.value for m in original.measurements}
    factors: Factors = {}
    for limit in planner.limits:
        if value := found.get((limit.kind, limit.target)):
            factors[limit.kind, limit.target] = _factor(value, limit.resource.of(whole), limit.kind)
    return factors


def corrected(planner: Planner, attempt: Attempt) -> Planner:
    """The planner after an attempt: costs scaled to what was found, losses to what an untrained plan really lost.

    What was found of another scheme than the base's says nothing of the plans to come.
    """
    if attempt.plan.precision == "int8" and attempt.plan.scheme != planner.base.scheme:
        return planner
    factors = dict(planner.factors)
    for verdict in attempt.verdicts:
        key = (verdict.kind, verdict.target)
        predicted = attempt.proposal.predicted.get(key)
        if verdict.value and predicted:
            raw = predicted / planner.factors.get(key, 1.0)
            factors[key] = _factor(verdict.value, raw, verdict.kind)
    found = tuple(
        Trial(technique, 1, attempt.proposal.loss.get(technique, 0.0), real)
        for technique, real in attempt.built.losses.items()
    )
    return replace(planner, factors=factors, candidates=trials.rescaled(planner.candidates, found))


def _factor(found: float, predicted: float, kind: str) -> float:
    value = 1 / found if kind == "throughput" else found
    return min(LARGEST_CORRECTION, max(1 / LARGEST_CORRECTION, value / predicted))


# ------------------------------------------------------------------------------------------------------ helpers


def _round(number: int, attempt: Attempt, factors: Factors) -> Round:
    return Round(
        number=number,
        plan=attempt.plan,
        draft=attempt.draft,
        artifact_sha256=attempt.built.sha256,
        size=len(attempt.built.artifact.data),
        verdicts=attempt.verdicts,
        predictions=_predictions(attempt),
        estimated_loss=attempt.proposal.total_loss,
        loss=attempt.built.loss,
        score=attempt.accuracy.artifact if attempt.accuracy else None,
        training=attempt.built.training,
        quantization=attempt.built.quantization,
        solve=attempt.proposal.solve,
        corrections={
            f"{kind} {target}".strip(): round(factor, 4) for (kind, target), factor in sorted(factors.items())
        },
        met=attempt.outcome == "met",
    )


def _predictions(attempt: Attempt) -> tuple[Prediction, ...]:
    """What the cost model had said beside what was found, for every planned budget."""
    rows = []
    for verdict in attempt.verdicts:
        if verdict.predicted and verdict.value and verdict.method:
            error = verdict.predicted / verdict.value - 1
            rows.append(
                Prediction(verdict.kind, verdict.target, verdict.predicted, verdict.value, verdict.method, error)
            )
    return tuple(rows)


def _in_words(attempt: Attempt) -> str:
    broken = [f"{verdict.kind}{f' on {verdict.target}' if verdict.target else ''}" for verdict in attempt.failed]
    undecided = [f"{v.kind} on {v.target}" for v in attempt.verdicts if v.status == "inconclusive"]
    if attempt.outcome == "met":
        return "every budget is met"
    return (
        f"breaks {', '.join(broken)}" if broken else f"undecided: {', '.join(undecided) or 'outputs differ from eager'}"
    )
