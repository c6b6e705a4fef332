"""The ssh device against a real sshd on this machine, with keys, a cache and a temporary folder of its own."""

import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import Board, free_port, new_key
from torch import nn

from edgebuild import catalog
from edgebuild.backends import xnnpack
from edgebuild.devices import guest, host, remote, runtime, ssh, sysfs
from edgebuild.errors import DeviceError, MissingEnvironment, SpecError
from edgebuild.lift import lift
from edgebuild.spec import LayerFacts, Remote, Target
from edgebuild.transforms import quantize

HOST = Target(name="host", title="", device="host", status="measured")
SHAPE = (1, 3, 32, 32)


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 1, 1, groups=16),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).eval()
    inputs = (torch.randn(SHAPE),)
    lifted = lift(net, inputs)
    int8 = quantize.apply(lifted, inputs, [inputs], xnnpack.quantizer()).model
    folder = tmp_path_factory.mktemp("nets")
    for name, model in (("fp32", lifted), ("int8", int8)):
        (folder / f"{name}.pte").write_bytes(xnnpack.lower(model, inputs).data)
    return {name: folder / f"{name}.pte" for name in ("fp32", "int8")}


def _images(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).standard_normal((count, *SHAPE)).astype(np.float32))


def _elsewhere(board: Board, **changes: object) -> Target:
    assert board.target.ssh is not None
    return replace(board.target, ssh=replace(board.target.ssh, **changes))


# ------------------------------------------------------------------------------------------------------- it works


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("threads", [1, 2])
def test_outputs_are_those_of_the_host(board, nets, precision, threads):
    samples = [(image,) for image in _images(3)]
    with ssh.load(nets[precision], board.target, threads) as session:
        found = session.run_many(samples)
    with host.load(nets[precision], HOST, threads) as session:
        expected = session.run_many(samples)
    for (output,), (wanted,) in zip(found, expected, strict=True):
        if precision == "int8":
            np.testing.assert_array_equal(output, wanted)
        else:
            np.testing.assert_allclose(output, wanted, rtol=1e-5, atol=1e-5)
    assert board.left() == []


def test_the_figures_are_measured_and_say_how(board, nets, monkeypatch):
    monkeypatch.setattr(ssh.timing.settle, "__defaults__", (0.1, 3.0))
    began = time.monotonic()
    found = {m.quantity: m for m in ssh.measure(nets["fp32"], board.target, 1, [(_images(1)[0],)], [])}
    took = time.monotonic() - began
    assert set(found) == {"latency", "latency_p95", "latency_p99", "latency_min", "throughput", "peak_memory"}
    assert {(m.method, m.target, m.error) for m in found.values()} == {("measured", "board", 0.0)}
    latency = found["latency"]
    assert 0 < found["latency_min"].value <= latency.value <= found["latency_p95"].value
    assert found["latency_p95"].value <= found["latency_p99"].value < took
    assert latency.runs >= 50 and latency.value * latency.runs < took
    assert found["throughput"].value == pytest.approx(1 / latency.value, rel=0.9)
    assert os.uname().release in latency.detail and f"{latency.runs} runs with 1 thread;" in latency.detail
    assert "middle half of the runs" in latency.detail and "governor" in latency.detail
    assert nets["fp32"].stat().st_size / 2 < found["peak_memory"].value < 2**20
    assert board.left() == []


def test_the_libraries_are_copied_once(board, nets):
    with ssh.load(nets["fp32"], board.target, 1):
        pass
    (place,) = board.store.iterdir()
    kept = {path: path.stat().st_mtime_ns for path in (place, *place.rglob("*"))}
    assert place / runtime.COMPLETE in kept and len(kept) > 10
    began = time.monotonic()
    with ssh.load(nets["int8"], board.target, 1):
        pass
    assert time.monotonic() - began < 5
    assert {path: path.stat().st_mtime_ns for path in (place, *place.rglob("*"))} == kept


def test_a_transfer_that_broke_off_is_not_taken_for_the_runtime(board, nets, monkeypatch):
    whole = ssh._packed(runtime.folder(os.uname().machine))
    half = replace(whole, name="runtime-half", data=whole.data[: len(whole.data) // 2 // 512 * 512])
    monkeypatch.setattr(ssh, "_packed", lambda folder: half)
    with pytest.raises(DeviceError, match="a command failed with code 1"), ssh.load(nets["fp32"], board.target, 1):
        pass
    assert "runtime-half" not in {path.name for path in board.store.iterdir()}
    assert not list(board.store.glob(".part-*"))


def test_the_predictions_are_those_of_the_target_that_is_named(monkeypatch):
    class Stub:
        def __getattr__(self, name):
            return lambda *arguments: (name, *arguments)

    board = Target(name="board", title="", device="ssh", status="measured", ssh=Remote("b"), costs_of=HOST)
    monkeypatch.setitem(__import__("edgebuild.devices").devices.DEVICES, "host", Stub())
    layer = LayerFacts("l", "linear", 4, 4)
    assert ssh.layer_latency(layer, "int8", board, 2) == ("layer_latency", layer, "int8", HOST, 2)
    assert ssh.layer_latencies([(layer, "int8")], board, 2) == ("layer_latencies", [(layer, "int8")], HOST, 2)
    assert ssh.call_latency(board, 2) == ("call_latency", HOST, 2)
    assert ssh.calibration_error(board, 2) == ("calibration_error", HOST, 2)


# ---------------------------------------------------------------------------------------------- what goes wrong


def test_a_runner_that_dies_is_a_finding_and_leaves_nothing(board, nets):
    with ssh.load(nets["fp32"], board.target, 1) as session:
        (runner,) = board.runners()
        os.kill(runner, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(DeviceError, match=r"fp32\.pte on board: the runner was ended by SIGKILL"):
                session.run((_images(1)[0],))
    assert board.left() == []


def test_a_connection_that_breaks_is_a_finding_and_the_device_cleans_up(board, nets):
    with ssh.load(nets["fp32"], board.target, 1) as session:
        assert len(board.left()) == 1 and board.runners()
        for connection in psutil.Process(board.server.pid).children():
            connection.kill()
        with pytest.raises(DeviceError, match=r"fp32\.pte on board: the runner is out of reach: the connection"):
            session.run((_images(1)[0],))
        assert board.cleaned() and not board.runners()


def test_a_client_that_is_killed_leaves_nothing_on_the_device(board, nets):
    with remote.connect(board.target.ssh, "board") as connection:
        connection.run(f"echo x >{connection.folder}/model.pte")
        (master,) = (child for child in psutil.Process().children() if child.name() == "ssh")
        master.kill()
        assert board.cleaned()
        with pytest.raises(DeviceError, match="board: the connection was lost"):
            connection.run("true")


@pytest.mark.parametrize("stuck", ["inference", "end"])
def test_a_runner_that_hangs_is_ended_there_too(board, nets, monkeypatch, stuck):
    with ssh.load(nets["fp32"], board.target, 1) as session:
        (runner,) = board.runners()
        os.kill(runner, signal.SIGSTOP)
        if stuck == "inference":
            monkeypatch.setattr(guest, "TIMEOUT", 0.5)
            with pytest.raises(DeviceError, match=r"the runner did not answer within 0\.5 s"):
                session.run((_images(1)[0],))
    assert board.cleaned() and not board.runners()


def test_an_exception_in_the_block_leaves_nothing(board, nets):
    with pytest.raises(KeyboardInterrupt), ssh.load(nets["fp32"], board.target, 1):
        raise KeyboardInterrupt
    assert board.cleaned() and not board.runners()


def test_nothing_that_answers(board):
    with pytest.raises(DeviceError, match="nothing answers on that port.*refused.*check port"):
        ssh.check(_elsewhere(board, port=free_port()))


def test_a_host_that_does_not_exist(board):
    with pytest.raises(DeviceError, match="there is no such host.*check host"):
        ssh.check(_elsewhere(board, host="nowhere.invalid", port=0))


def test_a_key_that_is_not_taken(board, tmp_path):
    new_key(tmp_path / "other")
    with pytest.raises(DeviceError, match=rf"takes none of the keys.*ssh-copy-id -p {board.port} \w+@127\.0\.0\.1"):
        ssh.check(_elsewhere(board, identity_file=str(tmp_path / "other")))


def test_an_unknown_host_key_is_not_accepted(board, tmp_path):
    options = (f"UserKnownHostsFile={tmp_path}/none", "GlobalKnownHostsFile=/dev/null", "IdentitiesOnly=yes")
    with pytest.raises(DeviceError, match="its host key is not known.*connect once by hand: ssh -p"):
        ssh.check(_elsewhere(board, options=options))
    assert not (tmp_path / "none").exists()


def test_a_server_that_never_answers_does_not_hang(board, monkeypatch):
    monkeypatch.setattr(remote, "LOGIN_TIMEOUT", 1.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(DeviceError, match=r"did not log in within 1\.5 s"):
            ssh.check(_elsewhere(board, port=silent.getsockname()[1]))


def test_without_a_client_the_command_that_gets_it_is_named(board, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingEnvironment, match="apt-get install -y openssh-client") as caught:
        ssh.check(board.target)
    assert caught.value.exit_code == 4


def test_another_kind_of_machine(board, nets, monkeypatch):
    monkeypatch.setattr(remote, "_HOLD", remote._HOLD.replace("uname -m\n", "echo riscv64\n"))
    with pytest.raises(DeviceError, match="board is a machine of kind 'riscv64'"):
        ssh.check(board.target)


def test_a_loader_that_refuses_is_explained(board, nets, monkeypatch):
    monkeypatch.setattr(runtime, "command", lambda place, machine: "echo 'FATAL: kernel too old' >&2; exit 1; true")
    with (
        pytest.raises(DeviceError, match="kernel too old.*too old for the runner; update its system"),
        ssh.load(nets["fp32"], board.target, 1),
    ):
        pass


def test_only_pte_files(board, tmp_path):
    (tmp_path / "net.pt").touch()
    for name, said in (("net.pt", "a .pt file .a device over ssh runs .pte files"), ("gone.pte", "there is no file")):
        with pytest.raises(DeviceError, match=said), ssh.load(tmp_path / name, board.target, 1):
            pass


def test_a_broken_artifact_is_a_finding(board, nets, tmp_path):
    broken = tmp_path / "broken.pte"
    broken.write_bytes(nets["fp32"].read_bytes()[:100])
    with (
        pytest.raises(DeviceError, match=r"broken\.pte on board: the runner ended with exit code 2: edgebuild runner"),
        ssh.load(broken, board.target, 1),
    ):
        pass
    assert board.left() == []


# ----------------------------------------------------------------------------------------------- notes and files


def test_notes_of_a_quiet_machine():
    facts = {"governor": "performance", "clock": "1500000", "load": "0.10", "cores": "4", "throttled": "0x0"}
    assert sysfs.notes(facts, facts, 4) == ["load before: 0.10 on 4 cores", "CPU governor performance at 1.5 GHz"]


def test_notes_of_what_slows_a_machine_down():
    before = {"governor": "ondemand", "cores": "2", "throttles": "3", "throttled": "0x50000"}
    after = {"governor": "ondemand", "clock": "600000", "most": "1500000", "allowed": "1000000", "throttles": "4"}
    after |= {"cooling_0": "1", "throttled": "0x50005"}
    text = "; ".join(sysfs.notes(before, after, 3))
    for part in (
        "more threads than its 2 cores",
        "CPU governor ondemand at 600 MHz; not performance",
        "limited to 1 GHz of 1.5 GHz",
        "throttled by heat during the runs",
        "thermal governor holds the clock down",
        "Raspberry Pi: the voltage is too low",
        "Raspberry Pi: it is throttled",
    ):
        assert part in text
    assert "short of voltage before" in "; ".join(sysfs.notes(before, before, 1))


FILE = """
name = "board"
title = "A board"
device = "ssh"
status = "measured"
costs_of = "host"
[ssh]
host = "pi@raspberrypi.local"
port = 2222
identity_file = "~/.ssh/board"
options = ["UserKnownHostsFile=/dev/null"]
"""


def test_a_target_file(tmp_path):
    path = tmp_path / "board.toml"
    path.write_text(FILE)
    target = catalog.load_target(str(path))
    assert target.ssh == Remote("pi@raspberrypi.local", 2222, "~/.ssh/board", ("UserKnownHostsFile=/dev/null",))
    assert target.costs_of == catalog.load_target("host")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('costs_of = "host"', ""), "needs costs_of.*known: .*host"),
        (('"host"', '"hots"'), "unknown target 'hots'.*perhaps you meant 'host'"),
        (('costs_of = "host"', "costs_of = 3"), "costs_of is the name of a target"),
        (('host = "pi@raspberrypi.local"', ""), "missing required field `host`"),
        (('"pi@raspberrypi.local"', '"-oProxyCommand=x"'), "is no destination"),
        (("2222", "99999"), "is no destination"),
        (("port", "prot"), "unknown key 'ssh.prot'.*perhaps you meant 'port'"),
        (('"UserKnownHostsFile=/dev/null"', '"-v"'), "'-v' is not an option of ssh_config"),
        (('device = "ssh"', 'device = "host"'), "are for device = .ssh., not for 'host'"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_a_mistake_in_a_target_file(tmp_path, change, message):
    path = tmp_path / "board.toml"
    path.write_text(FILE.replace(*change, 1))
    with pytest.raises(Exception, match=message) as caught:
        catalog.load_target(str(path))
    assert caught.value.exit_code == 2


def test_an_ssh_target_without_its_table_or_that_predicts_itself(tmp_path):
    path = tmp_path / "board.toml"
    path.write_text(FILE.partition("[ssh]")[0])
    with pytest.raises(SpecError, match=r"needs a table \[ssh\].*host = "):
        catalog.load_target(str(path))
    path.write_text(FILE.replace('"host"', f'"{path}"', 1))
    with pytest.raises(SpecError, match="predicts nothing over ssh"):
        catalog.load_target(str(path))
