"""The next plan to try: quantize only where that fits, else the least loss that the corrected cost model allows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

from edgebuild import costs, program, space
from edgebuild.base import Base
from edgebuild.costs import Factors
from edgebuild.plan import Choice, choice_of, to_plan
from edgebuild.report.figures import figure
from edgebuild.space import Limit, Space
from edgebuild.spec import (
    BudgetKind,
    Candidate,
    Cast,
    Dropped,
    Form,
    FrontierPoint,
    Plan,
    Precision,
    Profile,
    Reachable,
    Scheme,
    Solve,
    Target,
    Technique,
    Width,
)

# Share of a bound that a plan aims at: what is measured scatters, and a plan on the edge would break every second time.
AIM: Mapping[str, float] = {
    "size": 1.0,
    "latency": 0.97,
    "latency_p95": 0.95,
    "latency_p99": 0.95,
    "throughput": 0.97,
    "peak_memory": 0.98,
    "sram": 1.0,
    "flash": 1.0,
}
MOST_DISTILLATION = 4  # times the steps that the profile asks for
ROUNDING_LOSES = 1.1  # times the loss without it, from where on training with the rounding is tried
FEWEST_ROUNDED = 100  # steps of it
NEAREST_GAP = 1e-3
PRINTED = 1.002  # figures are printed with four digits
FRONTIER_POINTS, FRONTIER_GAP, FRONTIER_TIME = 6, 0.03, 4.0  # by axis; seconds for each


@dataclass(frozen=True)
class Proposal:
    """A plan, the choice behind it, and what the models say of it.

    `predicted`: the cost of each planned budget by (kind, target); `loss`: nats by technique, before any training.
    """

    plan: Plan
    choice: Choice
    predicted: Mapping[tuple[str, str], float]
    loss: Mapping[Technique, float]
    solve: Solve | None = None

    @property
    def draft(self) -> Plan:
        """The plan without its training."""
        return replace(self.plan, distil=False, distil_steps=0, qat_steps=0)

    @property
    def total_loss(self) -> float:
        return sum(self.loss.values())


@dataclass(frozen=True)
class Planner:
    """What planning for a base needs: its candidates as re-estimated so far, the cost model as corrected so far."""

    base: Base
    profile: Profile
    targets: tuple[Target, ...]
    factors: Factors
    candidates: tuple[Candidate, ...]

    @cached_property
    def limits(self) -> tuple[Limit, ...]:
        return self.limits_of(self.base.scheme)

    def limits_of(self, scheme: Scheme) -> tuple[Limit, ...]:
        return costs.limits(self.profile, self.targets, self.base.facts, self.factors, scheme)

    @property
    def precision(self) -> Precision:
        return "int8" if "quantize" in self.profile.techniques else "fp32"

    @cached_property
    def points(self) -> tuple[Space, tuple[Dropped, ...]]:
        """The space within the budgets as they are asked, and what was left out of it."""
        return self.space(self.limits)

    def space(self, limits: Sequence[Limit]) -> tuple[Space, tuple[Dropped, ...]]:
        mixed = self.base.backend.mixes
        return space.make(self.base.facts, self.candidates, limits, self.precision, mixed)


def start(planner: Planner) -> Proposal:
    """The least harm: nothing but the precision; 4-bit groups where the size budget asks for less than int8 gives."""
    choice = Choice(planner.base.facts, planner.precision)
    first = proposal(planner, _plan(planner, choice, ("int8 alone" if planner.precision == "int8" else "as it is",)))
    if planner.precision == "fp32" or not any(trial.scheme == "8da4w" for trial in planner.base.trials):
        return first
    why = (*planner.base.why, "8da4w: int8 is above the size budget")
    smaller = proposal(planner, replace(first.plan, scheme="8da4w", why=why))
    size = ("size", "")
    too_large = any(first.predicted[size] > limit.bound for limit in planner.limits if limit.kind == "size")
    return smaller if too_large and fits(planner, smaller) else first


def fits(planner: Planner, proposed: Proposal) -> bool:
    """Whether every planned budget is predicted to hold."""
    return all(proposed.predicted[limit.kind, limit.target] <= limit.bound for limit in planner.limits)


def propose(planner: Planner, tried: Sequence[Proposal]) -> tuple[Proposal | None, Solve]:
    """The plan that loses least within every budget and was not tried yet; None where the solver has none.

    It aims a little below the bounds on what is measured, and at the bounds themselves only where nothing else is left.
    """
    done = [proposed.choice for proposed in tried]
    solved = None
    for aim in (AIM, {}):
        limits = [replace(limit, bound=limit.bound * aim.get(limit.kind, 1.0)) for limit in planner.limits]
        points, _ = planner.space(limits)
        solved = program.solve(points, limits, done)
        if solved.choice is not None:
            plan = _plan(planner, solved.choice, _why(planner, solved.choice, solved.loss, points, limits))
            return proposal(planner, plan, solved.solve), solved.solve
        if solved.solve.status != "infeasible":
            break
    assert solved is not None
    return None, solved.solve


def proposal(planner: Planner, plan: Plan, solve: Solve | None = None) -> Proposal:
    """A plan with what the models say of it."""
    choice = choice_of(planner.base.facts, plan)
    predicted: dict[tuple[str, str], float] = {
        (limit.kind, limit.target): limit.predicted(choice) for limit in planner.limits_of(plan.scheme)
    }
    found = losses(planner.candidates, choice)
    real = {trial.scheme: trial.real for trial in planner.base.trials if trial.technique == "quantize"}
    if plan.scheme != planner.base.scheme and real.get(planner.base.scheme) and plan.scheme in real:
        found["quantize"] *= real[plan.scheme] / real[planner.base.scheme]
    return Proposal(plan, choice, predicted, found, solve)


def losses(candidates: Sequence[Candidate], choice: Choice) -> dict[Technique, float]:
    """Estimated nats of a choice by technique; what is no candidate counts as the nearest that is cut deeper."""
    found: dict[Technique, float] = {"quantize": 0.0, "prune": 0.0, "factorize": 0.0}
    widths: dict[str, list[tuple[int, float]]] = {}
    for candidate in candidates:
        what = candidate.choice
        if isinstance(what, Width):
            widths.setdefault(what.group, []).append((what.channels, candidate.loss))
        elif isinstance(what, Form):
            found["factorize"] += candidate.loss if choice.forms.get(what.layer) == what else 0.0
        elif isinstance(what, Cast):
            found["quantize"] += candidate.loss if choice.precision_of(what.layer) == what.precision else 0.0
    for group, channels in choice.widths.items():
        levels = sorted(widths.get(group, ()))
        at_most = [loss for width, loss in levels if width <= channels]
        found["prune"] += at_most[-1] if at_most else max((loss for _, loss in levels), default=0.0)
    return found


def more_training(last: Proposal, profile: Profile) -> Proposal | None:
    """The same choice with twice the distillation, or None where that was taken to its end, or has all the time."""
    steps = profile.distillation.steps
    wanted = 2 * last.plan.distil_steps if last.plan.distil else steps
    if "distil" not in profile.techniques or wanted > MOST_DISTILLATION * steps or (last.plan.distil and not steps):
        return None
    steps_told = f"{wanted} steps" if wanted else "as long as the profile gives"
    why = (*last.plan.why, f"distil, {steps_told}: with {last.plan.distil_steps} steps the accuracy budget broke")
    return replace(last, plan=replace(last.plan, distil=True, distil_steps=wanted, why=why))


def with_rounding(last: Proposal, profile: Profile, steps: int, unrounded: float, loss: float) -> Proposal | None:
    """The same choice, trained with its rounding at the end, where the rounding is what loses; None where it is not.

    `steps` of training were made before, `loss` nats were lost with the rounding and `unrounded` without it.
    """
    plan = last.plan
    able = "distil" in profile.techniques and plan.precision == "int8" and plan.scheme != "8da4w"
    if not able or plan.qat_steps or loss < ROUNDING_LOSES * unrounded:
        return None
    wanted = max(FEWEST_ROUNDED, (steps or profile.distillation.steps) // 4)
    share = 1 - unrounded / loss
    why = (*plan.why, f"{wanted} steps with the rounding: it makes {share:.0%} of what the plan loses")
    return replace(last, plan=replace(plan, qat_steps=wanted, why=why))


# ---------------------------------------------------------------------------------------------------- infeasible


def reachable(planner: Planner) -> tuple[Reachable, ...]:
    """For each planned budget the smallest value that any plan reaches, the other budgets left aside."""
    limits = planner.limits
    points, _ = planner.points
    rows = []
    for limit in limits:
        alone = program.least(points, [limit], limit, NEAREST_GAP)
        smallest = limit.predicted(alone.choice) if alone.choice else inf
        bound, best = natural(limit.kind, limit.bound), natural(limit.kind, smallest)
        rows.append(Reachable(limit.kind, limit.target, bound, best, smallest <= limit.bound, None))
    return tuple(rows)


def nearest(planner: Planner, limit: Limit) -> Proposal | None:
    """The plan with the least of a limit's cost that keeps all other budgets.

    None where they cannot be kept, and where the limit is within its bound then: it is not what binds.
    """
    limits = planner.limits
    points, _ = planner.points
    others = [other for other in limits if (other.kind, other.target) != (limit.kind, limit.target)]
    found = program.least(points, [*others, limit], limit, NEAREST_GAP)
    if found.choice is None or limit.predicted(found.choice) <= limit.bound:
        return None
    plan = _plan(planner, found.choice, (f"the least {name(limit)}, every other budget as asked",))
    return proposal(planner, plan, found.solve)


def askable(kind: str, value: float) -> float:
    """The bound to name for a least value of a limit, in the budget's own unit.

    A little wider, so that it holds when it is asked for as it is printed, and when it is measured once more.
    """
    return natural(kind, value * PRINTED / AIM[kind])


def natural(kind: str, value: float) -> float:
    """A limit's value in the budget's own unit: a throughput is limited by its inverse."""
    return 1 / value if kind == "throughput" else value


# -------------------------------------------------------------------------------------------------- the trade-off


def frontier(planner: Planner, chosen: Proposal | None) -> tuple[FrontierPoint, ...]:
    """The least estimated loss at falling latencies on the gating target, and at falling sizes, other budgets as asked.

    On a target that nothing times at falling SRAM, in place of latency. From the planner alone; around the chosen plan,
    whose own bound is among the points.
    """
    found = []
    target = planner.targets[0]
    kinds: tuple[BudgetKind, ...] = ("latency", "size") if target.timed else ("sram", "size")
    axes = [costs.limit(kind, target, inf, planner.profile, planner.base.facts, planner.factors) for kind in kinds]
    for axis in axes:
        others = [limit for limit in planner.limits if (limit.kind, limit.target) != (axis.kind, axis.target)]
        wide = replace(axis, bound=axis.predicted(Choice(planner.base.facts, planner.precision)))
        points, _ = planner.space([*others, wide])
        least = program.least(points, [*others, wide], wide, FRONTIER_GAP, FRONTIER_TIME)
        if least.choice is None:
            continue
        low, high = axis.predicted(least.choice), wide.bound
        seen: list[Choice] = []
        ratio = (low / high) ** (1 / (FRONTIER_POINTS - 1))
        for i in range(FRONTIER_POINTS):
            bound = high * ratio**i * (1 + NEAREST_GAP)
            limits = [*others, replace(axis, bound=bound)]
            solved = program.solve(points, limits, (), FRONTIER_GAP, FRONTIER_TIME)
            if solved.choice is None or solved.choice in seen:
                continue
            seen.append(solved.choice)
            predicted = {name(other): other.predicted(solved.choice) for other in axes}
            is_chosen = chosen is not None and solved.choice == chosen.choice
            found.append(FrontierPoint(name(axis), bound, predicted, solved.loss, solved.solve.gap or 0.0, is_chosen))
    return tuple(found)


def name(limit: Limit) -> str:
    """ "size", "latency on pixel"."""
    return limit.kind + (f" on {limit.target}" if limit.target else "")


# ------------------------------------------------------------------------------------------------------- reasons


def _plan(planner: Planner, choice: Choice, why: Sequence[str]) -> Plan:
    base, profile = planner.base, planner.profile
    why = (*base.why, *why)
    distil = bool(choice.widths or choice.forms or base.dropped) and "distil" in profile.techniques
    if distil:
        why = (*why, "distil: to recover what the cuts lose")
    steps = profile.distillation.steps if distil else 0
    return to_plan(
        choice,
        base=base.name,
        dropped=base.dropped,
        scheme=base.scheme if choice.precision == "int8" else "static",
        distil=distil,
        distil_steps=steps,
        why=why,
    )


def _why(planner: Planner, choice: Choice, loss: float, points: Space, limits: Sequence[Limit]) -> tuple[str, ...]:
    """What each technique of a choice was needed for, found by planning again without it."""
    whole = points.whole
    broken = [
        f"{figure(limit.kind, limit.predicted(whole))} {name(limit)}, budget {figure(limit.kind, limit.bound)}"
        for limit in planner.limits
        if limit.predicted(whole) > limit.bound
    ]
    why = [f"{points.precision} alone does not fit: {'; '.join(broken)}"] if broken else []
    without: dict[Technique, Space] = {
        "prune": replace(points, widths={}),
        "factorize": points.without_forms(),
    }
    for technique, used in {"prune": bool(choice.widths), "factorize": bool(choice.forms)}.items():
        if not used:
            continue
        other = program.solve(without[technique], limits, (), FRONTIER_GAP, FRONTIER_TIME)  # type: ignore[index]
        if other.solve.status == "infeasible":
            why.append(f"{technique}: without it no plan fits")
        elif other.choice is not None and other.loss > loss:
            why.append(
                f"{technique}: without it the plan is estimated to lose {other.loss:.3g} nats instead of {loss:.3g}"
            )
        else:
            why.append(f"{technique}: it makes room at an estimated loss of {loss:.3g} nats")
    if kept := sorted(choice.keep_fp32):
        why.append(f"fp32 stays in {', '.join(kept)}: the estimated loss is less by more than what it costs")
    return tuple(why)
