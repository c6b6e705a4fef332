"""The simulated Arm device, on real artifacts under the real emulator."""

import shutil
import signal
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from executorch.exir import to_edge_transform_and_lower
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.runtime import Runtime
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from edgebuild import catalog
from edgebuild.devices import arm, guest, machine, toolchain
from edgebuild.errors import DeviceError, MissingEnvironment
from edgebuild.spec import Target

ARM_TARGETS = [name for name in catalog.names("targets") if catalog.load_target(name).device == "arm"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def emulator():
    for name, found, how in toolchain.status()[:2]:
        if not found:
            pytest.skip(f"{name} is not installed; get it with `{how}`")


@pytest.fixture(scope="session")
def pi() -> Target:
    return catalog.load_target("raspberry-pi-4")


def _export(module: nn.Module, inputs: tuple[torch.Tensor, ...], int8: bool = False) -> bytes:
    program = torch.export.export(module.eval(), inputs)
    if int8:
        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        prepared = prepare_pt2e(program.module(), quantizer)
        prepared(*inputs)
        program = torch.export.export(convert_pt2e(prepared), inputs)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    return lowered.to_executorch().buffer


def _on_host(artifact: Path, inputs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    method = Runtime.get().load_program(artifact).load_method("forward")
    assert method is not None
    return tuple(output.numpy().copy() for output in method.execute([torch.from_numpy(array) for array in inputs]))


@pytest.fixture(scope="session")
def nets(tmp_path_factory) -> dict[str, Path]:
    """A convolutional net (dense, depthwise, linear) as fp32 and int8 artifacts."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 1, 1, groups=16),
        nn.ReLU6(),
        nn.Conv2d(16, 40, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, 10),
    )
    folder = tmp_path_factory.mktemp("nets")
    paths = {}
    for precision in ("fp32", "int8"):
        paths[precision] = folder / f"net-{precision}.pte"
        paths[precision].write_bytes(_export(net, (torch.randn(1, 3, 32, 32),), precision == "int8"))
    return paths


def _images(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).standard_normal((count, 1, 3, 32, 32)).astype(np.float32))


@pytest.mark.parametrize("name", ARM_TARGETS)
def test_every_target_runs_its_kernels(emulator, nets, name):
    target = catalog.load_target(name)
    for precision in ("fp32", "int8"):
        with arm.load(nets[precision], target, 2) as guest:
            assert guest.midr & ~0xF0000 == machine.midr(target.cluster[0].identity)
            for image in _images(3):
                (simulated,), (host,) = guest.run((image,)), _on_host(nets[precision], (image,))
                if precision == "int8":
                    np.testing.assert_array_equal(simulated, host)
                else:
                    np.testing.assert_allclose(simulated, host, rtol=1e-4, atol=1e-4)


class _Mixed(nn.Module):
    def forward(self, x, index, mask, pixels):
        chosen = torch.where(mask, x, x * 2) + pixels.to(torch.float32)
        return chosen, index + 1, mask.logical_not(), chosen.sum()


@pytest.fixture(scope="session")
def mixed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mixed") / "mixed.pte"
    inputs = (torch.randn(2, 3), torch.ones(4, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool))
    path.write_bytes(_export(_Mixed(), (*inputs, torch.ones(1, 3, dtype=torch.uint8))))
    return path


def test_many_inputs_of_many_dtypes_and_ranks(emulator, pi, mixed):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    index = np.array([-5, 0, 1, 2**40])
    mask = np.array([[True, False, True], [False, True, False]])
    pixels = np.array([[0, 128, 255]], dtype=np.uint8)
    with arm.load(mixed, pi, 1) as guest:
        chosen, following, inverse, total = guest.run((x, index, mask, pixels))
    expected = np.where(mask, x, x * 2) + pixels
    np.testing.assert_array_equal(chosen, expected)
    np.testing.assert_array_equal(following, index + 1)
    np.testing.assert_array_equal(inverse, ~mask)
    assert total.shape == () and total == expected.sum()
    assert (chosen.dtype, following.dtype, inverse.dtype) == (np.float32, np.int64, np.bool_)


def test_a_model_that_takes_channels_last_gets_its_input_in_that_order(emulator, pi, tmp_path):
    torch.manual_seed(0)
    net = nn.Conv2d(3, 4, 3)
    path = tmp_path / "last.pte"
    path.write_bytes(_export(net, (torch.randn(1, 3, 5, 7).contiguous(memory_format=torch.channels_last),)))
    image = np.random.default_rng(0).standard_normal((1, 3, 5, 7)).astype(np.float32)
    with arm.load(path, pi, 1) as guest:
        (simulated,) = guest.run((image,))
    np.testing.assert_allclose(simulated, net(torch.from_numpy(image)).detach().numpy(), rtol=1e-4, atol=1e-4)


def test_the_runner_builds_without_warnings_and_runs_on_this_machine(nets, tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    package = Path(sysconfig.get_path("purelib")) / "executorch"
    built = tmp_path / "runner"
    toolchain.build_runner(Path(compiler), package, built, f"-Wl,-rpath,{package / 'lib'}", "-Werror")
    for path in nets.values():
        with guest.start([str(built), str(path), "1"], path.name, {}) as held:
            for image in _images(2):
                (output,), (expected,) = held.run((image,)), _on_host(path, (image,))
                np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 4])
def test_peak_memory_repeats_to_the_byte(emulator, pi, nets, threads):
    found = []
    for _ in range(3):
        with arm.load(nets["fp32"], pi, threads) as guest:
            for image in _images(2):
                guest.run((image,))
            found.append((guest.loading, guest.held, guest.running))
    assert found == found[:1] * 3
    load_peak, kept, run_peak = (heap.total for heap in found[0])
    assert nets["fp32"].stat().st_size / 2 < kept <= load_peak < 2**20
    assert kept <= run_peak


def test_memory_follows_the_weights(emulator, pi, tmp_path):
    peaks = []
    for width in (64, 512):
        path = tmp_path / f"linear-{width}.pte"
        path.write_bytes(_export(nn.Linear(256, width), (torch.randn(1, 256),)))
        with arm.load(path, pi, 1) as guest:
            guest.run((np.ones((1, 256), np.float32),))
            peaks.append(guest.peak)
    assert peaks[1] - peaks[0] >= 4 * 256 * (512 - 64)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_kinds_of_heap_sum_to_the_peak(emulator, pi, nets, precision, threads):
    with arm.load(nets[precision], pi, threads) as session:
        assert session.loading.split["workspace"] == session.held.split["workspace"] == 0  # nothing has run yet
        session.run((_images(1)[0],))
        heaps = (session.loading, session.held, session.running)
    for heap in heaps:
        assert tuple(heap.split) == guest.KINDS
        assert sum(heap.split.values()) == heap.total and min(heap.split.values()) >= 0
    assert session.running.split["workspace"] > 0


def test_weights_and_planned_buffers_are_told_apart(emulator, pi, tmp_path):
    path = tmp_path / "linear.pte"
    path.write_bytes(_export(nn.Linear(256, 512), (torch.randn(1, 256),)))
    with arm.load(path, pi, 1) as session:
        session.run((np.ones((1, 256), np.float32),))
    packed = 4 * (256 + 1) * 512
    assert packed <= session.held.split["weights"] == session.running.split["weights"] < packed + 10_000
    assert packed <= session.loading.split["weights"] < packed + 50_000  # the graph is there as well
    buffers = deserialize_pte_binary(path.read_bytes()).program.execution_plan[0].non_const_buffer_sizes
    assert sum(buffers) >= 4 * (256 + 512)
    for heap in (session.loading, session.held, session.running):
        assert sum(buffers) <= heap.split["arena"] <= sum(buffers) + 24 * len(buffers)  # as the allocator rounds up
    assert session.loading.split["program"] == pytest.approx(path.stat().st_size, rel=0.02)
    assert session.held.split["program"] < 10_000  # the weights' own bytes are let go of


def test_measure_says_how_it_came_by_each_figure(emulator, pi, nets):
    found = {m.quantity: m for m in arm.measure(nets["int8"], pi, 4, [(_images(1)[0],)], [])}
    assert set(found) == {"latency", "throughput", "peak_memory"}
    assert found["latency"].value > 0
    assert found["throughput"].value == pytest.approx(1 / found["latency"].value)
    assert {m.method for m in found.values()} == {"simulated"}
    assert found["latency"].error == pi.latency_error > 0
    assert found["peak_memory"].error == 0
    assert "while loading" in found["peak_memory"].detail and "during inference" in found["peak_memory"].detail
    assert sum(found["peak_memory"].split.values()) == found["peak_memory"].value
    assert {m.target for m in found.values()} == {"raspberry-pi-4"}


# ---------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("size", [0, 7, 100, 2000])
def test_a_truncated_artifact_is_a_finding(emulator, pi, nets, tmp_path, size):
    broken = tmp_path / "broken.pte"
    broken.write_bytes(nets["fp32"].read_bytes()[:size])
    with (
        pytest.raises(DeviceError, match=r"broken\.pte on raspberry-pi-4: the runner ") as caught,
        arm.load(broken, pi, 1),
    ):
        pass
    assert caught.value.exit_code == 1


def test_an_artifact_that_is_not_there(emulator, pi, tmp_path):
    with (
        pytest.raises(DeviceError, match="exit code 2: edgebuild runner: .*gone.pte"),
        arm.load(tmp_path / "gone.pte", pi, 1),
    ):
        pass


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ((), "0 inputs given, but the model takes 1"),
        ((np.zeros((1, 3, 32, 32), np.int64),), "input 0 has dtype 4, but the model takes 6"),
        ((np.zeros((3, 32, 32), np.float32),), "input 0 has 3 dimensions, but the model takes 4"),
        ((np.zeros((1, 3, 32, 33), np.float32),), "input 0 has size 33 in dimension 3, but the model takes 32"),
        ((np.zeros((1, 3, 32, 32), np.complex64),), "input 0 has dtype complex64, which no artifact takes"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(emulator, pi, nets, inputs, said):
    with arm.load(nets["fp32"], pi, 1) as guest, pytest.raises(DeviceError, match=said):
        guest.run(inputs)


def test_a_guest_that_dies_is_a_finding_and_stays_one(emulator, pi, nets):
    with arm.load(nets["fp32"], pi, 1) as guest:
        guest.process.send_signal(signal.SIGKILL)
        guest.process.wait()
        for _ in range(2):
            with pytest.raises(DeviceError, match=r"net-fp32\.pte on raspberry-pi-4: the runner was ended by SIGKILL"):
                guest.run((_images(1)[0],))


def test_a_guest_that_hangs_is_ended(emulator, pi, nets, monkeypatch):
    with arm.load(nets["fp32"], pi, 1) as held:
        held.process.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(guest, "TIMEOUT", 0.5)
        with pytest.raises(DeviceError, match=r"the runner did not answer within 0\.5 s"):
            held.run((_images(1)[0],))
        assert held.process.returncode == -signal.SIGKILL


def test_the_process_ends_with_the_block(emulator, pi, nets):
    with pytest.raises(KeyboardInterrupt), arm.load(nets["fp32"], pi, 1) as guest:
        raise KeyboardInterrupt
    assert guest.process.returncode is not None


def test_without_qemu_the_command_that_gets_it_is_named(pi, nets, monkeypatch):
    monkeypatch.setenv("EDGEBUILD_QEMU", "/nowhere/qemu-aarch64")
    for use in (lambda: arm.check(pi), lambda: arm.load(nets["fp32"], pi, 1).__enter__()):
        with pytest.raises(MissingEnvironment, match="apt-get install -y qemu-user") as caught:
            use()
        assert caught.value.exit_code == 4


def test_a_core_that_qemu_does_not_know(emulator, pi):
    strange = replace(pi, cluster=(replace(pi.cluster[0], qemu_cpu="cortex-z80"),))
    with pytest.raises(MissingEnvironment, match="does not know the CPU 'cortex-z80' of raspberry-pi-4"):
        arm.check(strange)
