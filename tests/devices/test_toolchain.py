"""Where the parts of the simulated device come from, and what is said when one cannot be had."""

import zipfile
from pathlib import Path

import pytest

from edgebuild import cache, catalog
from edgebuild.devices import machine, toolchain
from edgebuild.errors import MissingEnvironment

WHEEL = "executorch-1.5.1-cp311-cp311-manylinux_2_28_aarch64.whl"


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("EDGEBUILD_CACHE", str(folder))
    return folder


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.parent.name != cache.LOCKS]


@pytest.mark.parametrize(
    ("variable", "find", "program"),
    [
        ("EDGEBUILD_QEMU", toolchain.qemu, "qemu-aarch64"),
        ("EDGEBUILD_CXX", toolchain.compiler, "aarch64-linux-gnu-g++"),
    ],
)
def test_a_missing_program_is_named_with_the_command_that_gets_it(monkeypatch, tmp_path, variable, find, program):
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingEnvironment) as caught:
        find()
    assert program in caught.value.what
    assert caught.value.remedy == "apt-get install -y qemu-user g++-aarch64-linux-gnu"
    assert caught.value.exit_code == 4

    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    with pytest.raises(MissingEnvironment, match=f"elsewhere .from {variable}."):
        find()

    there = tmp_path / "elsewhere"
    there.write_text("#!/bin/sh\n")
    there.chmod(0o755)
    assert find() == there


def test_status_tells_what_is_missing_and_how_to_get_it(monkeypatch, empty_cache):
    monkeypatch.setenv("EDGEBUILD_QEMU", "/nowhere/qemu")
    monkeypatch.setenv("EDGEBUILD_CC", "/nowhere/cc")
    found = {name: (present, detail) for name, present, detail in toolchain.status()}
    programs = ["qemu-aarch64", "aarch64-linux-gnu-g++", "executorch for Arm", "Arm runner", "cc", "simulator"]
    assert list(found) == programs
    assert found["qemu-aarch64"] == (False, toolchain.INSTALL)
    assert found["executorch for Arm"][0] is False and "pip download" in found["executorch for Arm"][1]
    assert found["Arm runner"][0] is False
    assert found["cc"] == (False, "apt-get install -y gcc")
    assert found["simulator"] == (False, "built on first use, once cc is there")
    assert not empty_cache.exists(), "asking must not fetch anything"


def test_without_a_network_nothing_is_left_behind(monkeypatch, empty_cache, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        MissingEnvironment, match=r"cannot be fetched: .*executorch.* \(pip needs a network once"
    ) as caught:
        toolchain.sdk()
    assert caught.value.exit_code == 4
    assert _files(empty_cache) == []


def test_a_wheel_with_another_hash_is_refused(monkeypatch, empty_cache, tmp_path):
    with zipfile.ZipFile(tmp_path / WHEEL, "w") as wheel:
        info = "executorch-1.5.1.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: executorch\nVersion: 1.5.1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: cp311-cp311-manylinux_2_28_aarch64\n")
        wheel.writestr("executorch/lib/libexecutorch.so", "not the real one")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(MissingEnvironment, match=f"is not the known wheel: SHA-256 .*{toolchain.WHEELS['1.5.1']}"):
        toolchain.sdk()
    assert _files(empty_cache) == []


def test_a_version_without_a_known_hash_is_refused(monkeypatch):
    monkeypatch.setattr(toolchain, "WHEELS", {"0.1": "0" * 64})
    with pytest.raises(MissingEnvironment, match=r"no hash is known .* \(pip install executorch==0\.1\)"):
        toolchain.sdk()


def test_a_compiler_that_cannot_build_the_runner(tmp_path):
    refuses = tmp_path / "g++"
    refuses.write_text("#!/bin/sh\necho 'runner.cpp:1:1: error: no such thing' >&2\nexit 1\n")
    refuses.chmod(0o755)
    with pytest.raises(MissingEnvironment, match=r"cannot build the runner: runner\.cpp:1:1: error: no such thing"):
        toolchain.build_runner(refuses, tmp_path, tmp_path / "runner")


def test_the_machine_that_a_guest_sees(empty_cache):
    cluster = catalog.load_target("pixel").cluster[0]
    folder = machine.folder(cluster)
    assert machine.folder(cluster) == folder
    blocks = (folder / "proc/cpuinfo").read_text().split("\n\n")
    assert len(blocks) == cluster.count == 2
    assert "CPU implementer\t: 0x51\n" in blocks[0] and "CPU part\t: 0x205\n" in blocks[1]
    cpus = folder / "sys/devices/system/cpu"
    assert (cpus / "present").read_text() == "0-1\n"
    assert (cpus / "cpu1/cpufreq/cpuinfo_max_freq").read_text() == "2150400\n"
    assert (cpus / "cpu0/topology/core_siblings_list").read_text() == "0-1\n"
    assert machine.midr(cluster.identity) == 0x51202051
