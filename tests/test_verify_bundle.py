"""`verify-bundle`: what is right passes, what is wrong is told, and what is hostile does no harm."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from bundles import runnable
from msgspec.structs import replace
from torch import Tensor, nn

from edgebuild import bundle, verify_bundle
from edgebuild.devices import confine
from edgebuild.errors import SpecError
from edgebuild.manifest import sha256
from edgebuild.verify_bundle import Check, difference


def written(folder: Path, change: dict[str, bytes], kind: Literal["pte", "torchscript"] = "pte") -> Path:
    """A bundle with some files put in the place of its own and every hash right, as an attacker would do it."""
    files, said = runnable(kind)
    files = {name: change.get(name, data) for name, data in files.items()}
    artifact = replace(said.artifact, sha256=sha256(files[said.artifact.file]))
    bundle.write(folder / "out", files, replace(said, artifact=artifact))
    return folder / "out"


def checked(path: Path) -> tuple[bool, list[Check]]:
    told: list[Check] = []
    return verify_bundle.verify(path, told.append), told


def test_a_good_bundle_passes_as_folder_and_archive(tmp_path: Path) -> None:
    folder = written(tmp_path, {})
    bundle.write_archive(folder, tmp_path / "out.zip")
    for path in (folder, tmp_path / "out.zip"):
        good, told = checked(path)
        assert good and [check.what for check in told] == [
            "files",
            "manifest",
            "confinement",
            "outputs",
            "bundled program",
        ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.zip"]


def test_a_good_torchscript_bundle_passes(tmp_path: Path) -> None:
    good, told = checked(written(tmp_path, {}, "torchscript"))
    assert good and told[-1].what == "outputs" and "3 test vectors: scores within" in told[-1].found


def test_other_outputs_are_told(tmp_path: Path) -> None:
    files, _ = runnable()
    inputs, outputs = bundle.read_vectors(files["vectors.safetensors"])
    off = bundle.vectors(inputs, [(y + np.float32(0.5),) for (y,) in outputs])
    good, told = checked(written(tmp_path, {"vectors.safetensors": off}))
    assert not good
    assert [check.what for check in told if not check.ok] == ["outputs"]  # the bundled program has vectors of its own
    assert "scores within 0.5 of 1e-05" in told[-2].found


def test_a_difference_is_no_matter_of_nan() -> None:
    a = np.array([1.0, np.nan, np.inf])
    assert difference(a, a) == 0
    assert difference(a, np.array([1.5, np.nan, np.inf])) == 0.5
    for other in ([1.0, 0.0, np.inf], [np.nan, np.nan, np.inf], [1.0, np.nan, -np.inf]):
        assert difference(a, np.array(other)) == np.inf
    assert difference(np.zeros((2, 0)), np.zeros((2, 0))) == 0


@pytest.mark.parametrize(
    ("name", "spoilt", "message"),
    [
        ("small.pte", lambda data: data[:400] + b"!", "small.bpte holds another program"),
        ("small.bpte", lambda data: data[16:], "small.bpte cannot be run"),
        ("vectors.safetensors", lambda data: data[:-1], "test vectors: not readable"),
        ("vectors.safetensors", lambda data: bundle.vectors(*([(np.zeros(2),)] * 3,) * 2), "shapes and dtypes"),
        ("vectors.safetensors", lambda data: bundle.vectors([], []), "0 test vectors, the manifest says 3"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, name: str, spoilt, message: str) -> None:
    with pytest.raises(SpecError, match=message) as error:
        checked(written(tmp_path, {name: spoilt(runnable()[0][name])}))
    assert "\n" not in str(error.value)


def hostile(folder: Path, model: nn.Module) -> Path:
    """A bundle whose artifact is a TorchScript program of an attacker's."""
    torch.jit.script(model).save(str(folder / "model.pt"))
    data = (folder / "model.pt").read_bytes()
    (folder / "model.pt").unlink()
    return written(folder, {"small.pt": data}, "torchscript")


class Writes(nn.Module):
    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_file(self.path, True, 2).unsqueeze(0)


class Hangs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        while bool(x.sum() < 1e30):
            x = x * 1
        return x


class Grows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(1 << 34, dtype=torch.uint8)[:2].unsqueeze(0).float()


class Floods(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(1, 1 << 20)


@pytest.mark.skipif(not confine.landlock(), reason="no Landlock in this kernel")
def test_a_program_cannot_write(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for path in (victim, tmp_path / "new"):
        with pytest.raises(SpecError, match="small.pt cannot be run"):
            checked(hostile(tmp_path, Writes(str(path))))
    assert victim.read_text() == "mine" and sorted(p.name for p in tmp_path.iterdir()) == ["out", "victim"]


@pytest.mark.parametrize(
    ("model", "message"), [(Hangs(), "did not answer within 3 s"), (Grows(), "memory"), (Floods(), "start no frame")]
)
def test_a_program_cannot_hang_or_take_all_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: nn.Module, message: str
) -> None:
    if isinstance(model, Hangs):
        monkeypatch.setattr(verify_bundle, "TIMEOUT", 3.0)
    with pytest.raises(SpecError, match=f"small.pt cannot be run: .*{message}") as error:
        checked(hostile(tmp_path, model))
    assert "\n" not in str(error.value)
