"""A model too large for a Cortex-M's SRAM: the layer that sets the peak is narrowed, and the bundle can be checked."""

from dataclasses import dataclass

import pytest

from edgebuild import bundle, checking, pipeline, report, settings, verify_bundle
from edgebuild.pipeline import Request
from edgebuild.spec import Report
from edgebuild.verify_bundle import Check

# Its third layer is the largest in flash, and the first makes the largest tensor.
TASK = """
import torch
from torch import nn
from edgebuild.task import Task

def task() -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 48, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )
    x = torch.randn(16, 1, 16, 16)
    return Task(model=model.eval(), example_inputs=(x[:1],), calibration=[x])
"""
SRAM = 9 * 1024
PROFILE = """
name = "little"
title = "Nine kilobytes of a Cortex-M7"
target = "stm32f746"
artifact = "pte"
techniques = ["prune", "quantize"]
[budgets]
sram = "9 KiB"
flash = "64 KiB"
min_delegated = "100 %"
"""


@dataclass(frozen=True)
class Made:
    request: Request
    report: Report


def quietly(message: str, seconds: float) -> None:
    pass


@pytest.fixture(scope="module")
def narrowed(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("little")
    (folder / "task.py").write_text(TASK)
    (folder / "little.toml").write_text(PROFILE)
    request = Request(str(folder), str(folder / "little.toml"), folder / "out")
    return Made(request, pipeline.build(request, quietly))


def test_the_layer_that_sets_the_peak_is_narrowed(narrowed: Made) -> None:
    made = narrowed.report
    first, *_, last = made.rounds
    assert first.plan.techniques == ("quantize",) and not first.met
    sram = [next(p for p in row.predictions if p.quantity == "sram") for row in (first, last)]
    before, after = sram
    assert before.found is not None and before.found > SRAM >= (after.found or SRAM + 1)
    assert before.predicted == before.found and after.predicted == after.found, "known to the byte"
    assert [(width.group, width.channels < 32) for width in last.plan.widths] == [("0", True)]
    verdicts = {verdict.kind: verdict for verdict in made.verdicts}
    assert made.outcome == "met" and verdicts["sram"].status == "pass" and verdicts["sram"].method == "counted"
    assert verdicts["sram"].value == after.found and verdicts["sram"].bound == SRAM
    assert verdicts["flash"].value == made.size and verdicts["min_delegated"].value == 1.0
    rows = {row.name: row for row in made.layers}
    assert rows["0"].parameters[0] > rows["0"].parameters[1] and all(row.latency == {} for row in made.layers)


def test_the_report_says_it(narrowed: Made) -> None:
    files = bundle.read(narrowed.request.output)
    text = files["report.md"].decode()
    assert "9 KiB" in text and "sram" in text.lower() and "stm32f746" in text
    read = report.from_json(files["report.json"])
    assert [row["target"] for row in read["measurements"] if row["quantity"] == "sram"] == ["stm32f746"]
    assert not [row for row in read["measurements"] if row["quantity"] in ("latency", "throughput")]
    assert "cortex_m::" in files["integration/README.md"].decode(), "what a firmware links"


def test_the_bundle_is_checked_and_verified(narrowed: Made) -> None:
    files = bundle.read(narrowed.request.output)
    found = checking.check(files, settings.read(files), quietly)
    assert found.outcome == "met" and [row.target for row in found.parity] == ["stm32f746"]
    assert {v.kind: v.value for v in found.verdicts} == {v.kind: v.value for v in narrowed.report.verdicts}
    told: list[Check] = []
    assert verify_bundle.verify(narrowed.request.output, told.append)
    assert "outputs" in [check.what for check in told]
    assert "bundled program" not in [check.what for check in told]


def test_building_it_again_reuses_what_was_built(narrowed: Made) -> None:
    again = pipeline.build(narrowed.request, quietly)
    assert any("reused from earlier builds" in finding.what for finding in again.findings)
    assert (again.artifact_sha256, again.outcome) == (narrowed.report.artifact_sha256, "met")
