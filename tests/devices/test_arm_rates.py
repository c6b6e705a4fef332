"""What layers cost on a simulated machine: small layers are really simulated, into a cache of their own."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from edgebuild import cache, catalog
from edgebuild.devices import arm, arm_rates, probes, simulator, toolchain
from edgebuild.spec import PRECISIONS, CalibrationError, LayerFacts

PI, PHONE = (catalog.load_target(name) for name in ("raspberry-pi-4", "pixel-7"))
FEW = (
    *(probes.conv(width, width, side, 1) for width in (16, 32, 64) for side in (4, 8, 16)),
    *(probes.depthwise(width, side) for width in (16, 32, 64) for side in (4, 8, 16)),
)


def few() -> tuple[probes.Probe, ...]:
    layers = [(layer, precision) for precision in PRECISIONS for layer in (*FEW, *map(_add, (4, 8, 16)))]
    inputs = [(probes.plain("input", 3, side), "fp32") for side in (8, 16)]
    return tuple(probes.Probe(layer, precision, 3) for layer, precision in [(probes.CALL, "fp32"), *layers, *inputs])


def _add(side: int) -> LayerFacts:
    return probes.plain("add", 16, side)


@contextmanager
def at(folder: Path) -> Iterator[Path]:
    """Times and curves of the few layers go to a folder, as if this process knew none yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEBUILD_CACHE", str(folder))
        patch.setattr(probes, "everything", few)
        _forget()
        yield folder
    _forget()


def _forget() -> None:
    arm_rates._known.cache_clear()
    arm_rates._groups.cache_clear()


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with nothing in it but the toolchain of the user's."""
    for name, found, how in toolchain.status()[:2]:
        if not found:
            pytest.skip(f"{name} is not installed; get it with `{how}`")
    folder = tmp_path_factory.mktemp("ready")
    (folder / "arm").mkdir()
    for path in (toolchain.sdk(), toolchain.runner().parent, toolchain.plugin().parent):
        (folder / "arm" / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def simulated(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which convolutions and depthwise ones in int8 have been simulated on the Raspberry Pi."""
    folder = shutil.copytree(ready, tmp_path_factory.mktemp("simulated") / "cache", symlinks=True)
    with at(folder):
        for layer in (FEW[0], FEW[-1]):  # one by one: a layer's time depends a little on those in its process
            arm.layer_latency(layer, "int8", PI, 1)
    return folder


@pytest.fixture
def new_cache(ready: Path, tmp_path: Path) -> Iterator[Path]:
    with at(shutil.copytree(ready, tmp_path / "cache", symlinks=True)) as folder:
        yield folder


@pytest.fixture
def known_cache(simulated: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of what was simulated, the test's own."""
    with at(shutil.copytree(simulated, tmp_path / "cache", symlinks=True)) as folder:
        yield folder


def test_only_the_kinds_that_are_asked_for_are_simulated(new_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert arm.layer_latency(FEW[0], "int8", PI, 1) > 0
    assert capsys.readouterr().err == "simulating 9 layers on raspberry-pi-4 for the cost model\n"
    assert arm.layer_latency(FEW[1], "int8", PI, 1) > 0
    assert capsys.readouterr().err == ""
    assert [(error.kind, error.precision, error.layers) for error in arm.calibration_error(PI, 1)] == [
        ("gemm", "int8", 9)
    ]


def test_what_was_simulated_is_kept_and_what_is_missing_made_up_for(
    known_cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    value = arm.layer_latency(FEW[4], "int8", PI, 1)
    _forget()
    monkeypatch.setattr(probes, "everything", lambda: (*few(), probes.Probe(probes.conv(48, 48, 8, 1), "int8", 1)))
    again = arm.layer_latency(FEW[4], "int8", PI, 1)
    assert capsys.readouterr().err == "simulating 1 layer on raspberry-pi-4 for the cost model\n"
    assert again == pytest.approx(value, rel=0.2)
    _forget()
    monkeypatch.setattr(simulator, "simulate_methods", None)
    assert arm.layer_latency(FEW[4], "int8", PI, 1) == again


def test_a_damaged_file_is_made_anew(known_cache: Path) -> None:
    value = arm.layer_latency(FEW[0], "int8", PI, 1)
    for path in (known_cache / "arm").glob("*.json"):
        path.write_bytes(b"{")
    _forget()
    assert arm.layer_latency(FEW[0], "int8", PI, 1) == value


def test_another_machine_is_another_key() -> None:
    slower = replace(PI, memory=replace(PI.memory, latency=2 * PI.memory.latency))
    keys = {arm_rates._machine(target, threads) for target, threads in ((PI, 1), (PI, 4), (PHONE, 1), (slower, 1))}
    assert len(keys) == 4
    assert arm_rates._machine(replace(PI, title="another"), 1) == arm_rates._machine(PI, 1)


def test_a_target_with_dot_products_finds_dense_int8_layers_cheaper_than_depthwise_ones(known_cache: Path) -> None:
    """The share of a depthwise layer in a pair of layers differs, so that what pays to be pruned does too."""
    pointwise, depthwise = probes.conv(64, 64, 16, 1), probes.depthwise(64, 16)
    shares = {}
    for target in (PI, PHONE):
        dense, thin = arm.layer_latencies([(pointwise, "int8"), (depthwise, "int8")], target, 1)
        shares[target.name] = thin / (dense + thin)
    assert shares["pixel-7"] > 1.5 * shares["raspberry-pi-4"]


def test_what_was_not_timed_has_a_price_and_the_input_too(known_cache: Path) -> None:
    assert arm.layer_latency(probes.plain("roll", 32, 8), "fp32", PI, 1) > 0
    first = replace(probes.conv(3, 16, 8, 1), sources=("",))
    assert arm.layer_latency(first, "fp32", PI, 1) > arm.layer_latency(replace(first, sources=("x",)), "fp32", PI, 1)
    assert 0 < arm.call_latency(PI, 1) < 1e-4


def test_errors_say_what_they_are_of(known_cache: Path) -> None:
    arm.layer_latencies([(FEW[0], "int8"), (FEW[-1], "int8")], PI, 1)
    found = arm.calibration_error(PI, 1)
    assert all(isinstance(error, CalibrationError) and 0 <= error.median <= error.worst for error in found)
    assert {"gemm", "depthwise"} <= {error.kind for error in found}
    assert cache.root() == known_cache
