"""The next plan to try: quantize only where that may fit, else the least harm that the corrected cost model allows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from edgebuild import costs
from edgebuild.plan import Choice, Limit, reachable, search, to_plan
from edgebuild.realise import Base
from edgebuild.report.figures import figure
from edgebuild.spec import Plan, Profile, Reachable, Target, Technique, Width

# How far beyond a bound a prediction may lie and still be worth a measurement. Sizes are counted, the rest is modelled.
DOUBT: Mapping[str, float] = {
    "size": 1.02,
    "latency": 1.3,
    "latency_p95": 1.5,
    "latency_p99": 1.5,
    "throughput": 1.3,
    "peak_memory": 1.3,
}
MOST_DISTILLATION = 4  # times the steps that the profile asks for

Factors = dict[tuple[str, str], float]


@dataclass(frozen=True)
class Proposal:
    """A plan, the choice behind it, and what the cost model says of each planned budget, by (kind, target)."""

    plan: Plan
    choice: Choice
    predicted: Mapping[tuple[str, str], float]


def propose(
    base: Base, profile: Profile, targets: Sequence[Target], factors: Factors, tried: Sequence[Proposal]
) -> Proposal | None:
    """A plan that was not tried yet, or None where the cost model sees none that could fit."""
    start, limits = _start(base, profile), costs.limits(profile, targets, factors)
    done = [proposal.choice for proposal in tried]
    if not tried and _may_fit(start, limits):
        return _proposal(
            base,
            start,
            limits,
            profile,
            ("int8 alone may fit" if start.precision == "int8" else "it may fit as it is",),
        )
    found = search(start, base.candidates, limits, done)
    if found is None:
        relaxed = [replace(limit, bound=limit.bound * DOUBT[limit.kind]) for limit in limits]
        found = search(start, base.candidates, relaxed, done)
    if found is None:
        return None
    return _proposal(base, found[0], limits, profile, _why(base, start, found[0], found[1], limits))


def more_training(last: Proposal, profile: Profile) -> Proposal | None:
    """The same choice with twice the distillation, or None where that was taken to its end."""
    steps = profile.distillation.steps
    wanted = 2 * last.plan.distil_steps if last.plan.distil else steps
    if "distil" not in profile.techniques or wanted > MOST_DISTILLATION * steps:
        return None
    why = (*last.plan.why, f"distil, {wanted} steps: with {last.plan.distil_steps} the accuracy budget broke")
    return replace(last, plan=replace(last.plan, distil=True, distil_steps=wanted, why=why))


def reachable_now(base: Base, profile: Profile, targets: Sequence[Target], factors: Factors) -> tuple[Reachable, ...]:
    """The smallest value that the candidates reach for each planned budget alone."""
    return reachable(_start(base, profile), base.candidates, costs.limits(profile, targets, factors))


def _start(base: Base, profile: Profile) -> Choice:
    return Choice(base.facts, "int8" if "quantize" in profile.techniques else "fp32")


def _may_fit(choice: Choice, limits: Sequence[Limit]) -> bool:
    return all(limit.predicted(choice) <= limit.bound * DOUBT[limit.kind] for limit in limits)


def _proposal(base: Base, choice: Choice, limits: Sequence[Limit], profile: Profile, why: tuple[str, ...]) -> Proposal:
    if base.name == "student":
        why = ("student: no plan for the model itself met the budgets", *why)
    cut = bool(choice.widths or choice.forms)
    distil = cut and "distil" in profile.techniques
    if distil:
        why = (*why, "distil: to recover what the cuts lose")
    steps = profile.distillation.steps if distil else 0
    plan = to_plan(choice, base=base.name, distil=distil, distil_steps=steps, why=why)
    return Proposal(plan, choice, {(limit.kind, limit.target): limit.predicted(choice) for limit in limits})


def _why(base: Base, start: Choice, choice: Choice, loss: float, limits: Sequence[Limit]) -> tuple[str, ...]:
    """What each technique of a choice was needed for, found by planning again without it."""
    broken = [
        f"{figure(limit.kind, limit.predicted(start))} {limit.kind}{f' on {limit.target}' if limit.target else ''}, "
        f"budget {figure(limit.kind, limit.bound)}"
        for limit in limits
        if limit.predicted(start) > limit.bound
    ]
    why = [f"{start.precision} alone does not fit: {'; '.join(broken)}"]
    names: dict[Technique, bool] = {"prune": bool(choice.widths), "factorize": bool(choice.forms)}
    for technique, used in names.items():
        if not used:
            continue
        others = [c for c in base.candidates if isinstance(c.choice, Width) != (technique == "prune")]
        without = search(start, others, limits)
        if without is None:
            why.append(f"{technique}: without it no plan fits")
        elif without[1] > loss:
            why.append(
                f"{technique}: without it the plan is estimated to lose {without[1]:.3g} nats instead of {loss:.3g}"
            )
        else:
            why.append(f"{technique}: it makes room at an estimated loss of {loss:.3g} nats")
    return tuple(why)
