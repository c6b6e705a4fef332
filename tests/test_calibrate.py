"""Calibrating a simulated target: known scales are found again, and what cannot be told is not claimed."""

import hashlib
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from edgebuild import calibrate, catalog
from edgebuild.backends import xnnpack
from edgebuild.cli import app
from edgebuild.devices import simulator, toolchain
from edgebuild.errors import SpecError, UsageError
from edgebuild.lift import lift
from edgebuild.spec import Calibration, Timing, Timings
from edgebuild.units import Seconds

NAME = "raspberry-pi-4"
SCALES = {"core": 1.25, "memory": 0.8, "threads": 1.5}


@pytest.fixture(scope="module")
def models(tmp_path_factory, small_net, image) -> Path:
    """A model that waits for the core, one that waits for memory, and one of both."""
    for name, found, how in toolchain.status()[:2]:
        if not found:
            pytest.skip(f"{name} is not installed; get it with `{how}`")
    folder = tmp_path_factory.mktemp("kit") / "models"
    folder.mkdir()
    torch.manual_seed(0)
    nets = {
        "small": (small_net, image),
        "dense": (nn.Conv2d(64, 64, 3, padding=1).eval(), (torch.randn(1, 64, 24, 24),)),
        "wide": (nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024)).eval(), (torch.randn(1, 1024),)),
    }
    for name, (net, inputs) in nets.items():
        (folder / f"{name}.pte").write_bytes(xnnpack.lower(lift(net, inputs), inputs).data)
    return folder


@pytest.fixture(scope="module")
def timings(models) -> Timings:
    """Latencies of a device that is the simulated one but for its scales."""
    real = replace(catalog.load_target(NAME), calibration=Calibration(**SCALES, source="made up"))
    rows = []
    for name in ("small", "dense", "wide"):
        path = models / f"{name}.pte"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        for threads in (1, 2, 4):
            found = simulator.simulate(path, real, threads)
            assert found.calibrated == "made up" and "calibrated: made up" in simulator.summary(found)
            rows.append(Timing(name, digest, threads, Seconds(found.seconds), 50))
    return Timings("Linux / Raspberry Pi 4", "executorch 1.5.1", tuple(rows))


def only(timings: Timings, *places: int) -> Timings:
    return replace(timings, measurement=tuple(timings.measurement[i] for i in places))


def written(timings: Timings, path: Path) -> Path:
    lines = [f'device = "{timings.device}"', f'runtime = "{timings.runtime}"']
    for row in timings.measurement:
        lines += ["[[measurement]]", f'model = "{row.model}"', f'artifact_sha256 = "{row.artifact_sha256}"']
        lines += [f"threads = {row.threads}", f'latency = "{float(row.latency) * 1e3:.9g} ms"', f"runs = {row.runs}"]
    path.write_text("\n".join(lines) + "\n")
    return path


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["targets", "calibrate", *map(str, words)])
    return done.exit_code, done.output if done.exception is None else str(done.exception)


def test_known_scales_are_found_again(timings, models):
    found = calibrate.calibrate(catalog.load_target(NAME), timings, models, lambda line: None)
    for name, scale in SCALES.items():
        assert getattr(found.calibration, name) == pytest.approx(scale, rel=0.05)
    assert found.validates and found.worst is not None and found.worst < 0.05
    for row in found.rows:
        assert row.fitted == pytest.approx(row.timing.latency, rel=0.02)


def test_one_measurement_moves_all_scales_alike(timings, models):
    found = calibrate.calibrate(catalog.load_target(NAME), only(timings, 3), models, lambda line: None)
    (row,) = found.rows
    scales = [getattr(found.calibration, name) for name in SCALES]
    assert max(scales) / min(scales) < 1.02
    assert scales[0] == pytest.approx(row.timing.latency / row.simulated, rel=0.01)
    assert row.error is None and found.worst is None and not found.validates


def test_a_calibrated_target_is_fitted_from_the_start_again(timings, models):
    target = catalog.load_target(NAME)
    fitted = replace(target, calibration=Calibration(2.0, 2.0, 2.0, "before"))
    plain, again = (calibrate.calibrate(t, only(timings, 3), models, lambda line: None) for t in (target, fitted))
    assert plain == again


def test_scales_stay_within_bounds():
    found = calibrate.fit([{"core": 1.0, "memory": 1.0, "threads": 0.0}], [100.0])
    assert max(found.values()) == pytest.approx(3.0)


def test_the_command_writes_a_target_that_predicts_what_was_measured(timings, models, tmp_path):
    measured, output = written(timings, tmp_path / "measured.toml"), tmp_path / "my-pi.toml"
    code, said = run(NAME, "--measured", measured, "--models", models, "--output", output)
    assert code == 0, said
    target, source = catalog.load_target(str(output)), catalog.find("targets", NAME)
    assert target.name == "my-pi" and target.status == "validated" and 0 < target.latency_error <= 0.05
    assert target.calibration is not None and "9 measurements on Linux / Raspberry Pi 4" in target.calibration.source
    assert "predicted from the others" in target.latency_error_source
    assert (
        replace(
            target,
            **{
                name: getattr(shipped := catalog.load_target(NAME), name)
                for name in ("name", "status", "latency_error")
            },
            latency_error_source=shipped.latency_error_source,
            calibration=None,
        )
        == shipped
    )
    kept = source.read_text().partition("[memory]")[2]
    assert kept in output.read_text()  # formatted as it was
    row = timings.measurement[5]
    found = simulator.simulate(models / f"{row.model}.pte", target, row.threads)
    assert found.seconds == pytest.approx(row.latency, rel=0.02)
    assert run(NAME, "--measured", measured, "--models", models, "--output", output)[1].find("exists already") > 0


def test_few_measurements_leave_status_and_error(timings, models, tmp_path):
    measured, output = written(only(timings, 3), tmp_path / "measured.toml"), tmp_path / "pi.toml"
    code, said = run(NAME, "--measured", measured, "--models", models, "--output", output)
    assert code == 0 and "the target's stays" in said
    table, shipped = tomllib.loads(output.read_text()), catalog.load_target(NAME)
    assert table["status"] == shipped.status and "no held-out error" in table["calibration"]["source"]
    assert catalog.load_target(str(output)).latency_error == shipped.latency_error


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"artifact_sha256": "0" * 64}, SpecError, r"dense.pte is not what was measured"),
        ({"model": "gone"}, UsageError, r"gone.pte: No such file"),
        ({"threads": 8}, SpecError, r"8 threads, and raspberry-pi-4 runs models on the 4 cores"),
    ],
)
def test_measurements_of_something_else(timings, models, change, error, said):
    bad = replace(timings, measurement=(replace(timings.measurement[3], **change),))
    with pytest.raises(error, match=said):
        calibrate.calibrate(catalog.load_target(NAME), bad, models, lambda line: None)
    with pytest.raises(SpecError, match="measured with executorch 0.1"):
        calibrate.calibrate(catalog.load_target(NAME), replace(timings, runtime="executorch 0.1"), models, print)


ROW = '[[measurement]]\nmodel = "m"\nartifact_sha256 = "0"\nthreads = 1\nlatency = "3 ms"\nruns = 5\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "required field"),
        ("measurement = []\n", "no \\[\\[measurement\\]\\]"),
        (ROW.replace('"3 ms"', "3"), "has no unit"),
        (ROW.replace("threads = 1", "threads = 0"), "more than 0"),
        (ROW.replace('"m"', '"../m"'), "is named by"),
        (ROW + ROW, "is there twice"),
        (ROW + "treads = 1\n", "unknown key"),
    ],
)
def test_measured_files_that_cannot_be_read(tmp_path, text, said):
    path = tmp_path / "measured.toml"
    path.write_text('device = "d"\nruntime = "r"\n' + text)
    with pytest.raises(SpecError, match=said):
        catalog.load_timings(path)


def test_what_cannot_be_calibrated(tmp_path):
    with pytest.raises(UsageError, match="no measured file at"):
        catalog.load_timings(tmp_path / "gone.toml")
    with pytest.raises(UsageError, match="host is not simulated"):
        calibrate.calibrate(catalog.load_target("host"), Timings("d", "r", ()), tmp_path, print)
    text = catalog.find("targets", NAME).read_text()
    table = '\n[calibration]\ncore = 9.0\nmemory = 1\nthreads = 1\nsource = "s"\n'
    (tmp_path / "pi.toml").write_text(text + table)
    with pytest.raises(SpecError, match="calibration.core = 9 is not between 0.3 and 3"):
        catalog.load_target(str(tmp_path / "pi.toml"))
