"""The host device, on real artifacts in real processes."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgebuild import cache, catalog
from edgebuild.backends import torchscript, xnnpack
from edgebuild.devices import host, host_rates, host_worker, probe_program, probes
from edgebuild.errors import DeviceError
from edgebuild.lift import lift
from edgebuild.spec import PRECISIONS, Target
from edgebuild.transforms import quantize

TARGET: Target = catalog.load_target("host")
X = np.random.default_rng(0).standard_normal((1, 3, 16, 16), dtype=np.float32)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


class Two(nn.Module):
    """A small network with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.relu(self.conv(x))
        return self.fc(features.mean((2, 3))), features


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Two().eval()


@pytest.fixture(scope="module")
def artifacts(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model as fp32 and int8 `.pte` and as TorchScript."""
    inputs = (torch.from_numpy(X),)
    lifted = lift(model, inputs)
    int8 = quantize.apply(lifted, inputs, [inputs, (torch.flip(inputs[0], (3,)),)], xnnpack.quantizer()).model
    made = {
        "fp32.pte": xnnpack.lower(lifted, inputs),
        "int8.pte": xnnpack.lower(int8, inputs),
        "model.pt": torchscript.lower(lifted, inputs),
    }
    folder = tmp_path_factory.mktemp("artifacts")
    for name, artifact in made.items():
        (folder / name).write_bytes(artifact.data)
    return {name: folder / name for name in made}


def eager(model: nn.Module, x: np.ndarray) -> list[np.ndarray]:
    with torch.no_grad():
        return [output.numpy() for output in model(torch.from_numpy(x))]


def scripted(module: nn.Module, path: Path) -> Path:
    torch.jit.script(module.eval()).save(str(path))
    return path


def linear(path: Path, inputs: int, outputs: int) -> Path:
    x = (torch.randn(1, inputs),)
    path.write_bytes(xnnpack.lower(lift(nn.Linear(inputs, outputs).eval(), x), x).data)
    return path


# ---------------------------------------------------------------------------------------------------------- running


def test_this_machine_passes_the_check() -> None:
    host.check(TARGET)


@pytest.mark.parametrize("name", ["fp32.pte", "model.pt"])
def test_outputs_are_those_of_eager(name: str, model: nn.Module, artifacts: dict[str, Path]) -> None:
    with host.load(artifacts[name], TARGET, 1) as session:
        found = session.run((X,))
    assert [output.shape for output in found] == [(1, 5), (1, 8, 16, 16)]
    for output, expected in zip(found, eager(model, X), strict=True):
        np.testing.assert_allclose(output, expected, atol=1e-5)


def test_int8_outputs_are_close_to_eager(model: nn.Module, artifacts: dict[str, Path]) -> None:
    with host.load(artifacts["int8.pte"], TARGET, 1) as session:
        found = session.run((X,))
    for output, expected in zip(found, eager(model, X), strict=True):
        noise = np.square(output - expected).sum() / np.square(expected).sum()
        assert 0 < noise < 1e-2


@pytest.mark.parametrize("name", ["fp32.pte", "model.pt"])
def test_many_samples_give_what_single_runs_give(name: str, artifacts: dict[str, Path]) -> None:
    samples = [(np.roll(X, i, axis=3) * (i + 1),) for i in range(9)]
    with host.load(artifacts[name], TARGET, 1) as session:
        together = session.run_many(samples)
        alone = [session.run(sample) for sample in samples]
        assert session.run_many([]) == []
    for outputs, expected in zip(together, alone, strict=True):
        for output, one in zip(outputs, expected, strict=True):
            np.testing.assert_array_equal(output, one)


def test_an_array_with_strides_arrives_as_it_is(artifacts: dict[str, Path]) -> None:
    strided = np.ascontiguousarray(X.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    with host.load(artifacts["fp32.pte"], TARGET, 1) as session:
        np.testing.assert_array_equal(session.run((strided,))[0], session.run((X,))[0])


@pytest.mark.parametrize("name", ["fp32.pte", "model.pt"])
def test_wrong_inputs_are_an_error_and_not_the_end(name: str, artifacts: dict[str, Path]) -> None:
    with host.load(artifacts[name], TARGET, 1) as session:
        with pytest.raises(DeviceError, match=rf"{name} on host: \w*Error"):
            session.run((X[:, :2],))
        with pytest.raises(DeviceError, match=f"{name} on host: the samples differ"):
            session.run_many([(X,), (X,), (X[:, :2],)])
        assert len(session.run((X,))) == 2


class Multiplies(nn.Module):
    """Work enough to be shared among threads."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ x


def test_threads_are_those_asked_for(artifacts: dict[str, Path], tmp_path: Path) -> None:
    def tasks(artifact: Path, x: np.ndarray, threads: int) -> int:
        with host.load(artifact, TARGET, threads) as session:
            session.run((x,))
            return len(os.listdir(f"/proc/{session.process.pid}/task"))

    multiplies = scripted(Multiplies(), tmp_path / "multiplies.pt")
    for artifact, x in ((artifacts["fp32.pte"], X), (multiplies, np.ones((512, 512), np.float32))):
        assert tasks(artifact, x, 2) > tasks(artifact, x, 1)


class Prints(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        print("a library that prints")
        return x, x  # the same memory twice


def test_what_a_library_prints_does_not_break_the_protocol(tmp_path: Path) -> None:
    with host.load(scripted(Prints(), tmp_path / "prints.pt"), TARGET, 1) as session:
        for _ in range(3):
            first, second = session.run((X,))
            np.testing.assert_array_equal(first, X)
            np.testing.assert_array_equal(second, X)
        assert b"a library that prints" in os.pread(session.errors.fileno(), 1 << 16, 0)


# ----------------------------------------------------------------------------------------------------------- failing


def test_a_truncated_program_is_a_device_error(artifacts: dict[str, Path], tmp_path: Path) -> None:
    whole = artifacts["fp32.pte"].read_bytes()
    for size in (0, 7, len(whole) // 2):
        broken = tmp_path / f"broken-{size}.pte"
        broken.write_bytes(whole[:size])
        with pytest.raises(DeviceError, match=f"broken-{size}.pte on host: "), host.load(broken, TARGET, 1):
            pass


def test_a_program_that_crashes_the_runtime_is_a_device_error(tmp_path: Path) -> None:
    noise = tmp_path / "noise.pte"
    noise.write_bytes(np.random.default_rng(0).bytes(5000))
    with (
        pytest.raises(DeviceError, match=r"noise\.pte on host: the process was ended by SIG"),
        host.load(noise, TARGET, 1),
    ):
        pass


def test_a_truncated_torchscript_file_is_a_device_error(artifacts: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(artifacts["model.pt"].read_bytes()[:200])
    with pytest.raises(DeviceError, match=r"broken\.pt on host: RuntimeError: "), host.load(broken, TARGET, 1):
        pass


def test_a_file_that_is_not_there_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="there is no file"), host.load(tmp_path / "none.pte", TARGET, 1):
        pass
    (tmp_path / "model.onnx").touch()
    with pytest.raises(DeviceError, match=r"the host runs \.pte, \.bpte and \.pt"):
        host.measure(tmp_path / "model.onnx", TARGET, 1, [(X,)], ())


class Hangs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        while bool((y == y).all()):
            y = y * 0.5
        return y


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_while_running_names_the_signal(number: signal.Signals, tmp_path: Path) -> None:
    with host.load(scripted(Hangs(), tmp_path / "hangs.pt"), TARGET, 1) as session:
        death = threading.Timer(0.3, os.kill, (session.process.pid, number))
        death.start()
        with pytest.raises(DeviceError, match=f"hangs.pt on host: the process was ended by {number.name}"):
            session.run((X,))
        death.join()
        with pytest.raises(DeviceError, match=number.name):
            session.run((X,))


def test_a_worker_that_hangs_is_ended(tmp_path: Path) -> None:
    with host.load(scripted(Hangs(), tmp_path / "hangs.pt"), TARGET, 1) as session:
        with pytest.raises(DeviceError, match=r"did not answer within 0\.5 s"):
            session.ask("run", (X,), timeout=0.5)
        assert session.process.poll() == -signal.SIGKILL


def test_nonsense_on_stdout_is_a_device_error(
    artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = tmp_path / "stranger.py"
    stranger.write_text("import sys; print('hello ' * 9); print('I am no worker', file=sys.stderr)")
    monkeypatch.setattr(host_worker, "__file__", str(stranger))
    with (
        pytest.raises(DeviceError, match=r"nonsense: b'hell' and sizes of .* start no frame"),
        host.load(artifacts["fp32.pte"], TARGET, 1),
    ):
        pass
    stranger.write_text("import sys; sys.exit('there is no runtime')")
    with (
        pytest.raises(DeviceError, match="ended with exit code 1; stderr: there is no runtime"),
        host.load(artifacts["fp32.pte"], TARGET, 1),
    ):
        pass


def test_the_process_ends_with_the_block_however_it_ends(artifacts: dict[str, Path]) -> None:
    with pytest.raises(KeyboardInterrupt), host.load(artifacts["fp32.pte"], TARGET, 1) as session:
        raise KeyboardInterrupt
    assert session.process.poll() is not None


def test_ctrl_c_is_left_to_the_parent(artifacts: dict[str, Path]) -> None:
    with host.load(artifacts["fp32.pte"], TARGET, 1) as session:
        os.kill(session.process.pid, signal.SIGINT)
        assert len(session.run((X,))) == 2


def test_the_worker_imports_nothing_of_the_exporter(
    artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    with host.load(artifacts["fp32.pte"], TARGET, 1) as session:
        imported = os.pread(session.errors.fileno(), 1 << 22, 0).decode()
    assert "executorch.extension.pybindings._C" in imported
    assert "executorch.exir" not in imported and "torchao" not in imported


# --------------------------------------------------------------------------------------------------------- measuring


@pytest.mark.parametrize("name", ["int8.pte", "model.pt"])
def test_measurements(name: str, artifacts: dict[str, Path]) -> None:
    found = {m.quantity: m for m in host.measure(artifacts[name], TARGET, 1, [(X,)], ())}
    assert set(found) == {"latency", "latency_p95", "latency_p99", "latency_min", "throughput", "peak_memory"}
    assert all(m.target == "host" and m.method == "measured" and m.error == 0 for m in found.values())
    value = {quantity: m.value for quantity, m in found.items()}
    assert 0 < value["latency_min"] <= value["latency"] <= value["latency_p95"] <= value["latency_p99"]
    assert 0 < value["throughput"] <= 1 / value["latency_min"]
    assert value["peak_memory"] > 0
    assert found["latency"].runs >= host_worker.MIN_RUNS
    assert found["latency"].detail.startswith("1 thread; load of the machine before: ")


def test_peak_memory_holds_the_weights(tmp_path: Path) -> None:
    small, large = linear(tmp_path / "small.pte", 64, 64), linear(tmp_path / "large.pte", 1024, 2048)

    def peak(path: Path, inputs: int) -> float:
        with host.start(path, TARGET, 1) as worker:
            return worker.memory((np.zeros((1, inputs), np.float32),))[0]

    assert peak(small, 64) < 1 << 20
    assert 8 << 20 <= peak(large, 1024) < 24 << 20  # packed by the delegate, and the file while it is read


# ------------------------------------------------------------------------------------------------------------- rates


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache with the rates of this machine."""
    program = host_rates.program(probes.everything())  # of the usual cache, as it depends on its code alone
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEBUILD_CACHE", str(tmp_path_factory.mktemp("cache")))
        cache.write("host", program.name, program.read_bytes())
        host.rates.cache_clear()
        host.rates(TARGET, 1)
        yield cache.root()
    host.rates.cache_clear()


def test_rates_are_measured_once(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("measured again")

    known = host.rates(TARGET, 1)
    monkeypatch.setattr(host, "start", never)
    host.rates.cache_clear()
    assert host.rates(TARGET, 1) == known
    files = sorted(path.name.partition("-")[0] for path in (measured / "host").iterdir())
    assert files == ["probes", "rates"]


def test_a_damaged_store_is_no_rates(measured: Path) -> None:
    (path,) = (measured / "host").glob("rates-*-1.json")
    whole = path.read_bytes()
    for damaged in (whole[:40], b"[]", json.dumps({"curves": {}}).encode(), whole.replace(b'"unit"', b'"units"')):
        path.write_bytes(damaged)
        assert host_rates.read(1) is None
    path.write_bytes(whole)
    assert host_rates.read(1) == host.rates(TARGET, 1)


def test_layers_cost_more_where_there_is_more_to_do(measured: Path) -> None:
    layer = probes.conv(64, 64, 16)
    seconds = {p: host.layer_latency(layer, p, TARGET, 1) for p in PRECISIONS}
    assert seconds["int8"] > 0 and 0 < seconds["fp32"] < 1
    for precision, value in seconds.items():
        assert host.layer_latency(layer.at(64, 128), precision, TARGET, 1) > value
        assert host.layer_latency(replace(layer, positions=1024), precision, TARGET, 1) > value


def test_many_layers_at_once_cost_what_they_cost_alone(measured: Path) -> None:
    layers = [(probe.layer, probe.precision) for probe in probes.everything()[1::10]]
    alone = [host.layer_latency(layer, precision, TARGET, 1) for layer, precision in layers]
    np.testing.assert_allclose(host.layer_latencies(layers, TARGET, 1), alone, rtol=1e-9)
    assert min(alone) > 0


def test_every_operator_and_an_unknown_one_has_a_price(measured: Path) -> None:
    for op in ("hardswish", "sigmoid", "quantize", "sub", "truediv", "mean", "roll"):
        for precision in PRECISIONS:
            assert 0 < host.layer_latency(probes.plain(op, 32, 8), precision, TARGET, 1) < 1e-2
    assert host.call_latency(TARGET, 1) > 0


def test_calibration_tells_how_far_off_it_is(measured: Path) -> None:
    errors = host.calibration_error(TARGET, 1)
    assert {("gemm", "fp32"), ("igemm", "int8"), ("depthwise", "int8"), ("add", "int8")} <= {
        (error.kind, error.precision) for error in errors
    }
    assert all(0 <= error.median <= error.worst for error in errors)


def test_a_program_of_probes_runs() -> None:
    layers = (probes.conv(8, 8, 6, 3, stride=2), probes.plain("hardsigmoid", 4, 5), probes.linear(4, 3))
    few = tuple(probes.Probe(layer, "fp32", 2) for layer in layers)
    path = cache.write("host", "few.pte", probe_program.write(few))
    with host.start(path, TARGET, 1) as worker:
        for i in range(len(few)):
            found, _ = worker.time((np.ones(few[i].shape, np.float32),), probes.method(i), 0.0, 0.001)
            assert len(found) > 0
