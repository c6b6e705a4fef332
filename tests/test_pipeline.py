"""The whole flow in one process, on a small network: what the loop does, and what its report holds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgebuild import judge, loop, pipeline
from edgebuild.attempt import Attempt
from edgebuild.devices import host
from edgebuild.pipeline import Request
from edgebuild.spec import Report, Verdict

TASK = """
import torch
from torch import nn
from edgebuild.task import Task

def task() -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )
    x = torch.randn(32, 3, 12, 12)
    with torch.no_grad():
        model.train()(x)
    return Task(model=model.eval(), example_inputs=(x[:1],), calibration=[x])
"""
PROFILE = """
name = "p"
title = "t"
target = "host"
artifact = "pte"
{more}
[distillation]
steps = 4
[budgets]
{budgets}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("small")
    (made / "task.py").write_text(TASK)
    return made


def request_for(folder: Path, budgets: str, more: str = "") -> Request:
    profile = folder / "p.toml"
    profile.write_text(PROFILE.format(budgets=budgets, more=more))
    return Request(str(folder), str(profile), folder / "out")


def build(folder: Path, budgets: str, more: str = "") -> Report:
    return pipeline.build(request_for(folder, budgets, more), lambda message, seconds: None)


@pytest.fixture(scope="module")
def tight(folder: Path) -> Report:
    return build(folder, 'size = "24 KiB"')


def test_the_least_harm_is_tried_first_and_the_program_takes_over(tight: Report) -> None:
    first, *_, last = tight.rounds
    assert first.plan.techniques == ("quantize",) and first.solve is None and not first.met
    assert last.plan.widths or last.plan.forms
    assert last.solve is not None and last.solve.status == "optimal" and last.solve.gap is not None
    assert tight.outcome == "met" and last.met and tight.size <= 24 * 1024
    plans = [row.plan.choices for row in tight.rounds]
    assert len({repr(plan) for plan in plans}) == len(plans), "a plan was tried twice"


def test_predictions_stand_beside_what_was_found(tight: Report) -> None:
    for row in tight.rounds:
        (size,) = [p for p in row.predictions if p.quantity == "size"]
        assert size.found == row.size and abs(size.error) <= 0.02
        assert row.loss >= 0 and row.estimated_loss >= 0
    assert {trial.technique for trial in tight.trials} == {"prune", "factorize", "quantize"}
    assert tight.calibration["host"], "the host's model says how far off it is"


def test_the_frontier_loses_more_where_it_is_tighter(tight: Report) -> None:
    for axis in ("latency on host", "size"):
        points = [point for point in tight.frontier if point.axis == axis]
        assert points, axis
        assert all(a.bound > b.bound for a, b in zip(points, points[1:], strict=False))
        assert all(b.loss >= a.loss * (1 - b.gap - 0.05) - 1e-9 for a, b in zip(points, points[1:], strict=False))
        assert all(point.predicted[axis] <= point.bound * 1.001 for point in points)
    latencies = [point for point in tight.frontier if point.axis == "latency on host"]
    assert all(point.predicted["size"] <= 24 * 1024 * 1.001 for point in latencies), "other budgets hold as asked"


def test_a_draft_that_breaks_a_budget_is_not_trained(folder: Path) -> None:
    """A latency that no plan reaches: plans are drafted, corrected by what was measured, and none is trained."""
    report = build(folder, 'size = "64 KiB"\nlatency = "1 us"')
    assert report.outcome == "infeasible" and report.plan is None
    assert all(row.draft or not row.plan.distil for row in report.rounds)
    binding = next(row for row in report.reachable if row.kind == "latency")
    assert not binding.feasible and binding.nearest is not None and binding.measured
    assert binding.nearest >= binding.smallest * 0.5
    size = next(row for row in report.reachable if row.kind == "size")
    assert size.feasible and size.nearest is None
    assert "latency on host binds" in report.summary


def test_the_draft_that_really_loses_least_is_trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it alone is timed for as long as its budgets ask, as its time was spent already."""
    seen: list[Attempt] = []
    last_arguments: list[Any] = []
    carry_out, measure = loop.carry_out, host.measure

    def kept(*arguments: Any, **options: Any) -> Attempt:
        seen.append(carry_out(*arguments, **options))
        return seen[-1]

    def measured(*arguments: Any) -> Any:
        last_arguments.append(arguments[-1])
        return measure(*arguments)

    monkeypatch.setattr(loop, "carry_out", kept)
    monkeypatch.setattr(host, "measure", measured)
    monkeypatch.setattr(loop, "WORTH_REFINING", 1e3)  # the first draft leaves no room here
    report = build(folder, 'size = "26 KiB"')
    drafts = [attempt for attempt in seen if attempt.draft and not attempt.failed]
    least = min(drafts, key=lambda attempt: attempt.built.loss)
    assert 2 <= len({repr(attempt.plan) for attempt in drafts}) == len(drafts) <= 1 + loop.REFINEMENTS
    assert report.plan is not None
    assert report.plan.choices.widths == least.plan.widths and report.plan.choices.forms == least.plan.forms
    assert (least is drafts[0]) or "drafted once more" in report.plan.why[-1]
    until_clear = [isinstance(getattr(last, "__self__", None), judge.Runs) for last in last_arguments]
    assert until_clear == [False] * (len(until_clear) - 1) + [True]


@pytest.mark.parametrize(("times", "outcome"), [(0.5, "met"), (0.9, "infeasible")])
def test_int8_too_slow_is_ranged_at_run_time_where_that_is_fast_enough(
    folder: Path, monkeypatch: pytest.MonkeyPatch, times: float, outcome: str
) -> None:
    seen: list[Attempt] = []
    carry_out = loop.carry_out

    def taking(attempt: Attempt, seconds: float) -> Attempt:
        def timed(v: Verdict) -> Verdict:
            return replace(v, value=seconds, status="pass" if seconds <= v.bound else "fail")

        return replace(attempt, verdicts=tuple(timed(v) if v.kind == "latency" else v for v in attempt.verdicts))

    def known(*arguments: Any, **options: Any) -> Attempt:
        attempt = carry_out(*arguments, **options)
        seen.append(taking(attempt, 1e-3 * (times if attempt.plan.scheme == "dynamic" else 1.0)))
        return seen[-1]

    monkeypatch.setattr(loop, "carry_out", known)
    report = build(folder, 'latency = "0.8 ms"', 'techniques = ["quantize"]')
    assert report.outcome == outcome
    schemes = [row.plan.scheme for row in report.rounds]
    assert schemes[:2] == ["static", "dynamic"] and schemes.count("dynamic") == 1
    if outcome == "met":
        assert report.plan is not None and report.plan.choices.scheme == "dynamic" and report.rounds[-1].met
    else:
        assert report.rounds[1].draft and not report.rounds[1].met
    may = [loop._may_be_fast_enough(taking(seen[0], seconds)) for seconds in (0.7e-3, 1e-3, 1.3e-3)]
    assert may == [False, True, False]  # it is fast enough as it is, a little too slow, by more than can be gained


def test_the_profiles_time_ends_the_loop_with_the_best_so_far(folder: Path) -> None:
    report = build(folder, 'size = "24 KiB"', 'time = "1 ms"')
    assert len(report.rounds) == 1 and report.outcome == "broken"
    assert report.plan is not None and report.size > 24 * 1024
    assert any(finding.kind == "limit" and "time" in finding.what for finding in report.findings)


def test_a_preview_builds_nothing(folder: Path) -> None:
    found = pipeline.plan(request_for(folder, 'size = "24 KiB"'), lambda message, seconds: None)
    assert found.proposal is not None and not found.fits_as_it_is
    assert found.proposal.predicted["size", ""] <= 24 * 1024
    assert found.solve is not None and found.solve.binaries > 0
    fitting = pipeline.plan(request_for(folder, 'size = "1 MiB"'), lambda message, seconds: None)
    assert fitting.fits_as_it_is and fitting.solve is None
