"""The simulated Arm device's time, end to end: the plugin under qemu, on small real artifacts."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from torch import nn

from edgebuild import catalog
from edgebuild.devices import simulator, toolchain
from edgebuild.errors import DeviceError, MissingEnvironment
from edgebuild.spec import Simulation, Target


@pytest.fixture(autouse=True, scope="module")
def emulator() -> None:
    for find in (toolchain.qemu, toolchain.compiler, toolchain.c_compiler):
        try:
            find()
        except MissingEnvironment as missing:
            pytest.skip(str(missing))


@pytest.fixture(scope="module")
def pi() -> Target:
    return catalog.load_target("raspberry-pi-5")


def _export(path: Path, module: nn.Module, *inputs: torch.Tensor) -> Path:
    program = torch.export.export(module.eval(), inputs)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)
    return path


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> Path:
    """Large enough that sampling leaves out pieces, and that threads pay."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return _export(tmp_path_factory.mktemp("net") / "net.pte", nn.Sequential(*layers), torch.randn(1, 3, 48, 48))


def fresh(artifact: Path, target: Target, threads: int, sampled: bool = True) -> Simulation:
    """A simulation that is not read from the cache."""
    (found,) = simulator.simulate_methods(artifact, target, threads, "--sample" if sampled else "--simulate").values()
    return found


@pytest.fixture(scope="module")
def sampled(net, pi) -> dict[int, Simulation]:
    return {threads: fresh(net, pi, threads) for threads in (1, 2, 4)}


def _instructions(simulation: Simulation) -> int:
    return sum(sum(operator.instructions.values()) for operator in simulation.operators)


def test_the_same_from_run_to_run_wherever_the_model_lies(net, pi, sampled, tmp_path, monkeypatch):
    moved = tmp_path / ("a" * 100) / "model.pte"
    moved.parent.mkdir()
    shutil.copy(net, moved)
    monkeypatch.setenv("SOMETHING_ELSE", "x" * 3000)
    assert fresh(moved, pi, 1) == sampled[1]
    assert fresh(net, pi, 1) == sampled[1]


def test_what_is_left_out_is_put_in_by_its_neighbours(net, pi, sampled):
    whole = fresh(net, pi, 1, sampled=False)
    pieces, executed = (sum(getattr(row, name) for row in sampled[1].operators) for name in ("pieces", "executed"))
    assert executed < pieces
    assert sampled[1].seconds == pytest.approx(whole.seconds, rel=0.02)
    assert _instructions(sampled[1]) == pytest.approx(_instructions(whole), rel=0.02)
    assert [row.name for row in sampled[1].operators] == [row.name for row in whole.operators]


def test_threads_share_the_work(sampled):
    one = sampled[1].seconds
    assert one / 4 <= sampled[4].seconds < sampled[2].seconds < one
    assert one / 2 <= sampled[2].seconds


def test_operators_and_bounds_add_up(sampled):
    for simulation in sampled.values():
        names = [row.name for row in simulation.operators]
        assert sum("Convolution" in name for name in names) == 2
        assert simulation.seconds == pytest.approx(sum(row.seconds for row in simulation.operators))
        for row in simulation.operators:
            assert sum(row.bounds.values()) == pytest.approx(row.seconds, rel=1e-6, abs=1e-12)
    # Each convolution has 9 products for each output, input channel and pixel; padding on the border adds none.
    assert sum(row.macs for row in sampled[1].operators) >= 9 * 32 * (3 + 32) * 46 * 46


class _Outside(nn.Module):
    def forward(self, x):
        return torch.cumsum(x, 1)


def test_a_model_without_delegate_and_parallel_loops(pi, tmp_path):
    found = fresh(_export(tmp_path / "outside.pte", _Outside(), torch.randn(1, 64)), pi, 2)
    assert any("outside" in row.name and row.seconds > 0 for row in found.operators)
    assert all(row.pieces == 0 for row in found.operators)


def test_a_file_that_is_no_program(pi, tmp_path):
    path = tmp_path / "broken.pte"
    path.write_bytes(b"not a program" * 100)
    with pytest.raises(DeviceError, match=r"broken\.pte simulated on raspberry-pi-5"):
        fresh(path, pi, 1)


@pytest.mark.parametrize(
    ("variable", "remedy"), [("EDGEBUILD_CC", "apt-get install -y gcc"), ("EDGEBUILD_QEMU", toolchain.INSTALL)]
)
def test_a_missing_program(net, pi, monkeypatch, variable, remedy):
    monkeypatch.setenv(variable, "/nowhere/program")
    with pytest.raises(MissingEnvironment, match=variable) as caught:
        fresh(net, pi, 1)
    assert caught.value.remedy == remedy


def test_a_description_that_lacks_a_class(net, pi, monkeypatch):
    whole = simulator.description
    monkeypatch.setattr(
        simulator,
        "description",
        lambda *given: "".join(line for line in whole(*given).splitlines(True) if "class fma_q" not in line),
    )
    with pytest.raises(DeviceError, match="no class fma_q"):
        fresh(net, pi, 1)


def test_a_process_that_hangs_is_ended(net, pi, monkeypatch):
    monkeypatch.setattr(simulator, "TIMEOUT", 0.2)
    with pytest.raises(DeviceError, match=r"net\.pte simulated on raspberry-pi-5: not done within 0\.2 s"):
        simulator.simulate_methods(net, pi, 1, "--sample")


def test_a_result_is_kept_and_a_damaged_one_is_made_anew(net, pi, sampled, empty_cache, monkeypatch):
    monkeypatch.setattr(simulator, "machine_key", lambda _, threads: (str(threads),))
    monkeypatch.setattr(simulator, "simulate_methods", lambda *_: {"forward": sampled[1]})
    first = simulator.simulate(net, pi, 1)
    monkeypatch.setattr(simulator, "simulate_methods", lambda *_: pytest.fail("simulated again"))
    assert simulator.simulate(net, pi, 1) == first == sampled[1]
    monkeypatch.setattr(simulator, "simulate_methods", lambda *_: {"forward": sampled[2]})
    (path,) = (empty_cache / "arm").glob("simulation-*.json")
    path.write_bytes(path.read_bytes()[:100])
    assert simulator.simulate(net, pi, 1) == sampled[2]
    assert simulator.simulate(net, pi, 2) == sampled[2]  # another machine, another name


def test_the_plugin_under_a_sanitizer(net, pi, sampled, monkeypatch, tmp_path):
    # Undefined behaviour ends in a trap. The address sanitizer looks at the model in test_simulator_model.py.
    built = tmp_path / "simulator.so"
    flags = (*toolchain.PLUGIN_FLAGS, "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
    sources = sorted((toolchain.NATIVE / "simulator").glob("*.c"))
    subprocess.run([toolchain.c_compiler(), *flags, *sources, "-o", built], check=True)
    monkeypatch.setattr(toolchain, "plugin", lambda: built)
    for threads in (1, 2):
        assert fresh(net, pi, threads) == sampled[threads]
