"""The bundle: whole or not at all, never over what is not ours, and nothing believed when it is read back."""

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from bundles import contents
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save

from edgebuild import bundle, manifest
from edgebuild.errors import SpecError, UsageError

FILES = {"model.pte": b"\x00\x01" * 500, "report.md": b"# fits\n", "vectors/a/0.bin": b"", "plan.json": b"{}\n"}


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: contents of files, None for folders."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def rewrite(folder: Path, change) -> None:
    """Change the manifest of a bundle as an attacker would."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    del data["checksum"]
    path.write_text(json.dumps({**data, "checksum": manifest.checksum(data)}))


def write(folder: Path, files: dict[str, bytes]) -> None:
    bundle.write(folder, files, contents(files))


def entry(data: bytes) -> dict:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


@pytest.fixture
def written(tmp_path) -> Path:
    write(tmp_path / "out", FILES)
    return tmp_path / "out"


# ------------------------------------------------------------------------------------------------------- writing


def test_what_was_written_is_read(written):
    assert bundle.read(written) == FILES
    assert list(bundle.read(written)) == sorted(FILES)
    assert os.listdir(written.parent) == ["out"]


def test_the_manifest_lists_every_file(written):
    listing = json.loads((written / "manifest.json").read_text())
    assert listing["schema_version"] == 2
    assert listing["files"] == {name: entry(data) for name, data in FILES.items()}


def test_the_same_files_give_the_same_bytes(written, tmp_path):
    write(tmp_path / "again", dict(reversed(FILES.items())))
    assert tree(tmp_path / "again") == tree(written)


def test_others_may_read_it(tmp_path):
    before = os.umask(0o022)
    try:
        write(tmp_path / "out", FILES)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "out/model.pte").stat().st_mode) == 0o644


def test_folders_above_are_made(tmp_path):
    bundle.check_writable(tmp_path / "a/b/c")
    assert not (tmp_path / "a").exists()
    write(tmp_path / "a/b/c", FILES)
    assert bundle.read(tmp_path / "a/b/c") == FILES


def test_an_old_bundle_and_an_empty_folder_are_replaced(written, tmp_path):
    bundle.check_writable(written)
    assert bundle.read(written) == FILES
    write(written, {"new.pte": b"new"})
    assert bundle.read(written) == {"new.pte": b"new"}
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", FILES)
    assert bundle.read(tmp_path / "empty") == FILES
    assert sorted(os.listdir(tmp_path)) == ["empty", "out"]


def test_a_damaged_bundle_is_still_ours(written):
    (written / "plan.json").unlink()
    (written / "model.pte").write_bytes(b"cut")
    write(written, FILES)
    assert bundle.read(written) == FILES


def test_a_link_to_a_folder_is_followed(written, tmp_path):
    (tmp_path / "link").symlink_to(written)
    write(tmp_path / "link", {"new.pte": b"new"})
    assert (tmp_path / "link").is_symlink()
    assert bundle.read(written) == {"new.pte": b"new"}


def stray_file(out: Path) -> None:
    (out / "notes.txt").write_text("mine")


def stray_below(out: Path) -> None:
    (out / "vectors/notes.txt").write_text("mine")


def stray_folder(out: Path) -> None:
    (out / "mine").mkdir()


def stray_link(out: Path) -> None:
    (out / "plan.json").unlink()
    (out / "plan.json").symlink_to(out / "report.md")


def linked_folder(out: Path) -> None:
    (out / "vectors").rename(out.parent / "elsewhere")
    (out / "vectors").symlink_to(out.parent / "elsewhere")


def other_manifest(out: Path) -> None:
    (out / "manifest.json").write_text('{"name": "my app", "schema_version": 1, "files": {}}')


def later_manifest(out: Path) -> None:
    rewrite(out, lambda data: data.update(schema_version=3))


def no_manifest(out: Path) -> None:
    (out / "manifest.json").unlink()


@pytest.mark.parametrize(
    "spoil",
    [stray_file, stray_below, stray_folder, stray_link, linked_folder, other_manifest, later_manifest, no_manifest],
)
def test_what_is_not_ours_is_left_alone(written, spoil):
    spoil(written)
    before = tree(written.parent)
    for refused in (lambda: bundle.check_writable(written), lambda: write(written, FILES)):
        with pytest.raises(UsageError) as error:
            refused()
        assert str(written) in str(error.value) and "another folder" in str(error.value)
        assert "\n" not in str(error.value)
    assert tree(written.parent) == before


@pytest.mark.parametrize("below", [".", "here"])
def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch, below):
    (tmp_path / below).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / below)
    with pytest.raises(UsageError, match="current folder"):
        write(Path("."), FILES)
    with pytest.raises(UsageError, match="current folder"):
        bundle.check_writable(tmp_path)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file/out", tmp_path / "file/a/b"):
        for call in (bundle.check_writable, lambda folder: write(folder, FILES)):
            with pytest.raises(UsageError, match="file"):
                call(folder)
    assert tree(tmp_path) == {"file": b"mine"}


def test_a_loop_of_links(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UsageError, match="cannot write"):
        bundle.check_writable(tmp_path / "loop")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc, where nobody can make a folder")
@pytest.mark.parametrize("call", [bundle.check_writable, lambda folder: write(folder, FILES)])
def test_a_place_where_nothing_can_be_made(call):
    with pytest.raises(UsageError, match="cannot write the bundle at /proc/out/deep") as error:
        call(Path("/proc/out/deep"))
    assert "\n" not in str(error.value)


@pytest.fixture
def open_folder():
    """A folder that every user can look into, other than pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def not_root():
    """Root may write everywhere: be nobody for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("closed", ["out", "out/vectors", "."])
def test_a_read_only_folder(open_folder, closed):
    out = open_folder / "above/out"
    write(out, FILES)
    for path in (open_folder / "above").rglob("*"):
        if path.is_dir():
            path.chmod(0o777)
    out.parent.chmod(0o777)
    (out.parent / closed).chmod(0o555)
    before = tree(open_folder)
    with not_root():
        for call in (bundle.check_writable, lambda folder: write(folder, {"new.pte": b"new"})):
            with pytest.raises(UsageError, match="read-only|Permission denied") as error:
                call(out)
            assert str(out) in str(error.value) and "\n" not in str(error.value)
    assert tree(open_folder) == before
    (out.parent / closed).chmod(0o777)
    with not_root():
        write(out, {"new.pte": b"new"})
        assert bundle.read(out) == {"new.pte": b"new"}
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("below", ["out", "a/b"])
def test_below_a_read_only_folder(open_folder, below):
    (open_folder / "closed").mkdir(mode=0o555)
    with not_root():
        for call in (bundle.check_writable, lambda folder: write(folder, FILES)):
            with pytest.raises(UsageError, match="Permission denied"):
                call(open_folder / "closed" / below)
    assert tree(open_folder) == {"closed": None}


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/x", "a/../x", "a//b", "a/", ".x", "a b", "a\n", "manifest.json", "manifest.json/x"],
)
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    with pytest.raises(UsageError, match="cannot hold"):
        write(tmp_path / "out", {"good": b"", name: b"x"})
    assert tree(tmp_path) == {}


def test_a_file_and_a_folder_of_one_name(tmp_path):
    with pytest.raises(UsageError, match="cannot hold"):
        write(tmp_path / "out", {"a": b"", "a/b": b""})


ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # scripts use what lies beside this file

FULL_DISK = """
import resource, sys
from pathlib import Path
from bundles import contents
from edgebuild import bundle
from edgebuild.errors import UsageError
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
files = {"a/small": b"x", "large": bytes(10_000)}
try:
    bundle.write(Path(sys.argv[1]), files, contents(files))
except UsageError as error:
    print(error)
"""


@pytest.mark.parametrize("there", [True, False])
def test_no_room(tmp_path, there):
    out = tmp_path / "deep/out"
    if there:
        write(out, FILES)
    before = tree(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(out)], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert done.stdout.startswith(f"cannot write the bundle at {out}: ") and done.stdout.count("\n") == 1
    assert tree(tmp_path) == before


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from bundles import contents
from edgebuild import bundle

out, name, count = sys.argv[1:]
real, calls = getattr(os, name), []

def interrupted(*arguments):
    calls.append(arguments)
    if len(calls) == int(count):
        os.kill(os.getpid(), signal.SIGINT)
    return real(*arguments)

setattr(os, name, interrupted)
files = {"a/first": b"1", "second": b"2"}
bundle.write(Path(out), files, contents(files))
"""


@pytest.mark.parametrize(
    ("there", "call", "count"),
    [(True, "fsync", 2), (False, "fsync", 2), (True, "rename", 1), (True, "rename", 2), (False, "rename", 1)],
)
def test_ctrl_c_leaves_what_was_there(tmp_path, there, call, count):
    out = tmp_path / "deep/out"
    if there:
        write(out, FILES)
    before = tree(tmp_path)
    command = [sys.executable, "-c", INTERRUPTED, str(out), call, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == -signal.SIGINT and "KeyboardInterrupt" in done.stderr
    assert tree(tmp_path) == before


# ------------------------------------------------------------------------------------------------------- reading


def changed_file(out: Path) -> None:
    (out / "plan.json").write_bytes(b"[]\n")


def shorter_file(out: Path) -> None:
    (out / "plan.json").write_bytes(b"{}")


def longer_file(out: Path) -> None:
    (out / "plan.json").write_bytes(b"{}\n ")


def missing_file(out: Path) -> None:
    (out / "plan.json").unlink()


def pipe(out: Path) -> None:
    (out / "plan.json").unlink()
    os.mkfifo(out / "plan.json")


def listed_folder(out: Path) -> None:
    (out / "plan.json").unlink()
    (out / "plan.json").mkdir()


def traversal(out: Path) -> None:
    (out.parent / "secret").write_bytes(b"s")
    rewrite(out, lambda data: data["files"].update({"../secret": entry(b"s")}))


def absolute(out: Path) -> None:
    (out.parent / "secret").write_bytes(b"s")
    rewrite(out, lambda data: data["files"].update({str(out.parent / "secret"): entry(b"s")}))


def negative_size(out: Path) -> None:
    rewrite(out, lambda data: data["files"]["plan.json"].update(size=-2))


def enormous(out: Path) -> None:
    rewrite(out, lambda data: data["files"]["plan.json"].update(size=1 << 50))


def itself(out: Path) -> None:
    rewrite(out, lambda data: data["files"].update({"manifest.json": entry(b"")}))


def unknown_key(out: Path) -> None:
    rewrite(out, lambda data: data.update(signed_by="me"))


def large_manifest(out: Path) -> None:
    with (out / "manifest.json").open("ab") as file:
        file.write(b" " * (1 << 20))


def not_json(out: Path) -> None:
    (out / "manifest.json").write_bytes(b"\xff{")


def deep_json(out: Path) -> None:
    (out / "manifest.json").write_bytes(b"[" * 500_000)


def linked_manifest(out: Path) -> None:
    (out / "manifest.json").rename(out.parent / "manifest.json")
    (out / "manifest.json").symlink_to(out.parent / "manifest.json")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (changed_file, "plan.json was changed"),
        (shorter_file, "plan.json is shorter"),
        (longer_file, "plan.json is longer"),
        (missing_file, "plan.json is missing"),
        (pipe, "plan.json"),
        (listed_folder, "plan.json"),
        (traversal, "'../secret'"),
        (absolute, "secret'"),
        (negative_size, "size"),
        (enormous, "more than"),
        (itself, "'manifest.json'"),
        (unknown_key, "signed_by"),
        (large_manifest, "larger than"),
        (not_json, "not edgebuild's"),
        (deep_json, "not edgebuild's"),
        (linked_manifest, "manifest.json"),
        (stray_file, "notes.txt is not listed"),
        (stray_below, "vectors/notes.txt is not listed"),
        (stray_folder, "mine is not listed"),
        (stray_link, "plan.json"),
        (linked_folder, "vectors"),
        (other_manifest, "not edgebuild's"),
        (later_manifest, "schema_version 3"),
        (no_manifest, "manifest.json is missing"),
    ],
)
def test_a_bundle_is_not_trusted(written, spoil, message):
    spoil(written)
    with pytest.raises(SpecError, match=message) as error:
        bundle.read(written)
    assert "\n" not in str(error.value) and str(written) in str(error.value)


def test_no_bundle_there(tmp_path):
    with pytest.raises(UsageError, match="no bundle"):
        bundle.read(tmp_path / "nowhere")


# -------------------------------------------------------------------------------------------------- test vectors

DTYPES = st.sampled_from(["<f4", ">f4", "<f2", "<f8", "i1", "u1", "<i4", "<i8", ">i8", "?"])
ARRAYS = DTYPES.flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
SAMPLES = st.lists(st.tuples(ARRAYS) | st.tuples(ARRAYS, ARRAYS), max_size=12)


@given(SAMPLES)
def test_vectors_come_back(samples):
    inputs, outputs = bundle.read_vectors(bundle.vectors(samples, samples[::-1]))
    for found, given_ in ((inputs, samples), (outputs, samples[::-1])):
        assert len(found) == len(given_)
        for got, want in zip(found, given_, strict=True):
            assert len(got) == len(want)
            for a, b in zip(got, want, strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype.newbyteorder("=")
                np.testing.assert_array_equal(a, b)


def test_vectors_of_a_view_are_its_values():
    image = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    views = [(image.transpose(2, 0, 1),), (image[:, ::2],)]
    data = bundle.vectors(views, views)
    assert data == bundle.vectors(views, views)
    for (got,), (want,) in zip(bundle.read_vectors(data)[0], views, strict=True):
        np.testing.assert_array_equal(got, want)


def test_vectors_that_cannot_be_written():
    array = np.zeros(2, np.float32)
    for inputs, outputs in ([(array,)], []), ([()], [(array,)]), ([(np.array(["a"]),)], [(array,)]):
        with pytest.raises(UsageError, match="test vectors"):
            bundle.vectors(inputs, outputs)


@pytest.mark.parametrize(
    "names", [["input_0_0"], ["input_1_0", "output_1_0"], ["input_0_0", "output_0_0", "x"], ["input_0_1", "output_0_0"]]
)
def test_vectors_out_of_sequence_are_refused(names):
    with pytest.raises(SpecError, match="test vectors"):
        bundle.read_vectors(save({name: np.zeros(1, np.float32) for name in names}))


@pytest.mark.parametrize("data", [b"", b"no safetensors", b"\xff" * 100, bundle.vectors([], [])[:-1]])
def test_what_is_no_safetensors_is_refused(data):
    with pytest.raises(SpecError, match="test vectors"):
        bundle.read_vectors(data)
