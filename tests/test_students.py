"""A budget that only the model without some of its blocks can meet."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgebuild import catalog, pipeline, students
from edgebuild.errors import SpecError, TransformError
from edgebuild.pipeline import Request
from edgebuild.spec import Report

TASK = """
import torch
from torch import nn
from edgebuild.task import Task

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))

def task() -> Task:
    torch.manual_seed(0)
    stem = (nn.Conv2d(3, 32, 3, padding=1), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    model = nn.Sequential(*stem, Residual(), Residual(), Residual(), *head)
    x = torch.randn(32, 3, 8, 8)
    with torch.no_grad():
        model.train()(x)
    return Task(model=model.eval(), example_inputs=(x[:1],), calibration=[x])
"""
PROFILE = """
name = "p"
title = "t"
target = "host"
artifact = "pte"
techniques = ["prune", "distil"]
[distillation]
steps = 4
[budgets]
size = "{size} B"
"""
BLOCKS = {"2.conv1", "3.conv1", "4.conv1"}


def silent(message: str, seconds: float) -> None:
    pass


def request_for(folder: Path, size: int, plan: str | None = None):
    profile = folder / "p.toml"
    profile.write_text(PROFILE.format(size=size))
    return Request(str(folder), str(profile), folder / "out", plan=plan)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("residual")
    (made / "task.py").write_text(TASK)
    return made


@pytest.fixture(scope="module")
def bound(folder: Path) -> int:
    """A size below the least that pruning reaches, by less than what two blocks take."""
    (row,) = pipeline.plan(request_for(folder, 1_000_000), silent).reachable
    return round(0.9 * row.smallest)


@pytest.fixture(scope="module")
def report(folder: Path, bound: int) -> Report:
    return pipeline.build(request_for(folder, bound), silent)


def test_blocks_go_where_pruning_is_not_enough(report: Report, bound: int) -> None:
    assert report.outcome == "met" and report.size <= bound
    assert report.plan is not None and report.plan.base == "shortened"
    assert report.plan.dropped and set(report.plan.dropped) < BLOCKS
    assert report.plan.distil and "prune" in report.plan.techniques
    assert any("residual blocks" in why and "no plan that fits with them" in why for why in report.plan.why)
    assert all(row.plan.base == "model" for row in report.rounds[:1]), "the whole model is tried first"
    assert not {row.name for row in report.layers} & set(report.plan.dropped)


def test_its_plan_builds_again(report: Report, folder: Path, bound: int) -> None:
    assert report.plan is not None
    written = folder / "plan.json"
    written.write_bytes(pipeline.plan_json(report.plan))
    again = pipeline.build(request_for(folder, bound, str(written)), silent)
    assert again.outcome == "met" and again.plan == report.plan and again.artifact_sha256 == report.artifact_sha256


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"base": "model"}, SpecError, "blocks are dropped from the base"),
        ({"dropped": ("5.conv1",)}, TransformError, "block '5.conv1', which the model does not have"),
    ],
)
def test_a_plan_that_drops_what_cannot_go_is_an_error(change, error, message, report, folder, bound) -> None:
    written = folder / "wrong.json"
    written.write_bytes(pipeline.plan_json(replace(report.plan, **change)))
    with pytest.raises(error) as raised:
        pipeline.build(request_for(folder, bound, str(written)), silent)
    assert message in f"{raised.value.what} {raised.value.remedy}"


def test_the_bundle_says_what_was_dropped(report: Report, folder: Path) -> None:
    markdown = (folder / "out" / "report.md").read_text()
    assert (
        "without the residual blocks" in markdown and json.loads((folder / "out" / "plan.json").read_text())["dropped"]
    )


def test_what_blocks_lose_counts_less_where_training_follows() -> None:
    profile = catalog.load_profile("mobile-cpu")
    assert "distil" in profile.techniques
    untrained = replace(profile, techniques=("quantize", "prune"))
    assert students.expected(0.2, 0.1, untrained) == pytest.approx(0.3)
    assert 0.1 < students.expected(0.2, 0.1, profile) < 0.3


def test_blocks_go_where_they_lose_less_than_pruning(folder: Path, bound: int, monkeypatch) -> None:
    """A size that pruning reaches: the plan for the whole model is drafted, and not trained."""
    monkeypatch.setattr(students, "TRAINED", 0.0)  # a random model's blocks are as important as its channels
    report = pipeline.build(request_for(folder, round(1.3 * bound)), silent)
    assert report.outcome == "met" and report.plan is not None and report.plan.base == "shortened"
    assert any("nats with them" in why for why in report.plan.why)
    assert not any(row.plan.base == "model" and row.plan.distil for row in report.rounds)
