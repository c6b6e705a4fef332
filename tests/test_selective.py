"""The footprint of a selective build: counted in real libraries, for real programs."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgebuild import selective
from edgebuild.backends import pte, xnnpack
from edgebuild.devices import elf, toolchain
from edgebuild.errors import MissingEnvironment


class Delegated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x))


class Outside(Delegated):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(super().forward(x), 1)


class Further(Delegated):
    def forward(self, x: Tensor) -> Tensor:
        return torch.logical_not(torch.cumsum(super().forward(x), 1) > 1)


def needs(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return pte.requirements(xnnpack.lower(model.eval(), (torch.randn(1, 8),)).data)


def parts(operators: tuple[str, ...], backends: tuple[str, ...] = ()) -> dict[str, int]:
    found = selective.footprints(operators, backends)[0]
    assert (found.machine, found.missing) == (platform.machine(), "")
    return {part.name: part.bytes for part in found.parts}


def test_more_operators_outside_of_the_delegate_are_a_larger_footprint() -> None:
    sizes = [parts(*needs(model)) for model in (Delegated(), Outside(), Further())]
    assert sizes[0]["operators"] == 0 < sizes[1]["operators"] < sizes[2]["operators"]
    for name in ("runtime", "threads", "XnnpackBackend"):
        file = toolchain.native_sdk() / f"lib/lib{(selective.ALWAYS | selective.BACKENDS)[name]}.so"
        assert {size[name] for size in sizes} == {sizes[0][name]}
        assert 0.5 * file.stat().st_size < sizes[0][name] < file.stat().st_size


def test_shared_code_counts_once() -> None:
    one, other = "aten::add.out", "aten::mul.out"
    apart = [parts((name,))["operators"] for name in (one, other)]
    assert max(apart) < parts((one, other))["operators"] < sum(apart)


def test_every_operator_of_the_registry_is_found() -> None:
    library = elf.Library(toolchain.native_sdk() / "lib/libexecutorch_kernels_optimized.so")
    kernels = library.kernels()
    text = library.sections[".text"]
    assert all(re.fullmatch(r"\w+::\w+(\.\w+)?", name) for name in kernels)
    names = set(re.findall(rb"\0((?:aten|dim_order_ops|et_copy)::[\w.]+)(?=\0)", library.data))
    assert {name.decode() for name in names} == set(kernels)
    # What no kernel reaches is Eigen's BLAS.
    assert 0.75 * text.size < library.reach(kernels.values()) < text.size


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("objdump"), reason="needs objdump for x86-64")
def test_a_disassembler_finds_the_same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    path = toolchain.native_sdk() / "lib/libexecutorch_kernels_quantized.so"
    library = elf.Library(path)
    kernels = library.kernels()
    found = {name: library.reach([at]) for name, at in kernels.items()}
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True)
    text = library.sections[".text"]
    edges = [
        (int(at, 16), int(direct or through, 16), what[0] == "j")
        for at, what, direct, through in re.findall(
            r"^ +(\w+):\t(?:bnd )?(\S+) +(?:([0-9a-f]+)(?= <)|.*# ([0-9a-f]+))", listing.stdout, re.MULTILINE
        )
        if text.holds(int(at, 16))
    ]
    at, to, jump = (np.array(column) for column in zip(*edges, strict=True))
    monkeypatch.setattr(elf, "_x86", lambda code, address: (at, to.copy(), jump))
    assert found == {name: pytest.approx(library.reach([root]), rel=0.05) for name, root in kernels.items()}


def test_arm_is_counted_once_its_wheel_is_here() -> None:
    sdk = toolchain.kept_sdk()
    if sdk is None or platform.machine() == "aarch64":
        pytest.skip("the Arm wheel was not fetched, or is this machine's own")
    here, arm = selective.footprints(*needs(Further()))
    assert arm.machine == "aarch64" and arm.missing == ""
    sizes = [{part.name: part.bytes for part in each.parts} for each in (here, arm)]
    # The same sources: the code of a part differs by what compilers and vector extensions make of it.
    assert all(0.25 < sizes[1][name] / size < 2 for name, size in sizes[0].items())
    arms, ours = (
        elf.Library(folder / "lib/libexecutorch_kernels_optimized.so") for folder in (sdk, toolchain.native_sdk())
    )
    assert arms.kernels().keys() == ours.kernels().keys()
    assert 0.75 * arms.sections[".text"].size < arms.reach(arms.kernels().values()) < arms.sections[".text"].size


def test_what_the_libraries_have_no_code_for_is_named() -> None:
    found = selective.footprints(("aten::add.out", "my::own.out"), ("MyBackend", "XnnpackBackend"))[0]
    assert found.missing == "MyBackend, my::own.out"
    assert [part.name for part in found.parts] == ["runtime", "threads", "XnnpackBackend", "operators"]


@pytest.mark.parametrize("damage", ["none there", "no library", "half of one"])
def test_where_nothing_can_be_counted_it_says_why(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sdk() -> Path:
        if damage == "none there":
            raise MissingEnvironment("executorch is not installed")
        return tmp_path

    real = toolchain.native_sdk() / "lib"
    (tmp_path / "lib").mkdir()
    for file in real.glob("*.so"):
        data = file.read_bytes()
        (tmp_path / "lib" / file.name).write_bytes(b"text" if damage == "no library" else data[: len(data) // 2])
    monkeypatch.setattr(toolchain, "native_sdk", sdk)
    found = selective.footprints(("aten::add.out",), ())[0]
    assert found.parts == () and found.missing.startswith("nothing could be counted: ")


def test_the_second_count_comes_out_of_the_cache(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = selective.footprints(("aten::add.out",), ("XnnpackBackend",))
    assert [each.machine for each in first] == [platform.machine()]  # nothing was fetched
    monkeypatch.delattr(elf.Library, "reach")
    assert selective.footprints(("aten::add.out",), ("XnnpackBackend",)) == first
