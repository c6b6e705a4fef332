#!/usr/bin/env python
"""Mutates a bundle thousands of times and hands it to everything that reads one.

    scripts/fuzz_bundles.py BUNDLE --count 1000 --seed 0 --json outcomes.json

A reader must refuse a mutant in one line, or take it for what it is: the same as before (`identical`), or, where the
hashes were made right again as an attacker would, well-formed as far as it can tell (`well-formed`). Anything else is a
failure: another exception, a line too long, more than TIME seconds, any file that is written, any program started.
Programs are run in the confined worker, by a fork of it each; `contained` are those that crash or hang there. Each case
has a seed of its own, which is printed where it fails; `--only SEED` repeats it.
"""

import argparse
import contextlib
import copy
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import stat
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgebuild import archive, bundle, catalog, manifest, report, verify_bundle
from edgebuild.devices import confine, host, host_worker
from edgebuild.errors import DeviceError, EdgebuildError

TIME = 20  # seconds for a case
LONGEST = 1500  # characters of an error
PROGRAM_TIME = 5.0  # seconds for a mutated program
PROGRAM_MEMORY = 1 << 30

Files = dict[str, bytes]
Random = random.Random


class Hang(BaseException):
    """A case took too long."""


@dataclass
class Tally:
    """How many mutants of a kind ended how, with an example of each, and what must not have happened."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def add(self, kind: str, outcome: str, example: str) -> None:
        self.outcomes.setdefault(kind, Counter())[outcome] += 1
        self.examples.setdefault(f"{kind}: {outcome}", example)


# ------------------------------------------------------------------------------------------------------ mutations


def mutated(data: bytes, rng: Random) -> bytes:
    """Bytes with something changed."""
    spoilt = bytearray(data)
    if not spoilt:
        return b"x"
    at = rng.randrange(len(spoilt))
    match rng.choice(["flip", "flips", "cut", "head", "grow", "zeros", "noise", "repeat", "delete", "word"]):
        case "flip":
            spoilt[at] ^= 1 << rng.randrange(8)
        case "flips":
            for _ in range(rng.randint(2, 64)):
                spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
        case "cut":
            del spoilt[at:]
        case "head":
            del spoilt[: at + 1]
        case "grow":
            spoilt += rng.randbytes(rng.randint(1, 1000))
        case "zeros":
            spoilt[at : at + 64] = bytes(len(spoilt[at : at + 64]))
        case "noise":
            spoilt[at : at + 64] = rng.randbytes(len(spoilt[at : at + 64]))
        case "repeat":
            spoilt[at:at] = spoilt[at : at + rng.randint(1, 256)]
        case "delete":
            del spoilt[at : at + rng.randint(1, 64)]
        case "word":  # where lengths and offsets are
            word = rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(data)])
            spoilt[at : at + 4] = struct.pack("<L", word)[: len(spoilt[at : at + 4])]
    return bytes(spoilt)


_ABSURD: list[Any] = [
    None, True, -1, 0, 1 << 40, 1 << 70, 1e308, -0.0, "", "x" * 5000, "../../etc/passwd", "/etc/passwd", "a\x00b",
    "a\nb", "\u202e", "\ud800", [], {}, [[]] * 50, {"a": {"b": {}}}, "NaN", "CON", "manifest.json", "..", ".",
]  # fmt: skip


def mutated_json(data: bytes, rng: Random) -> bytes:
    """JSON that is still JSON, or nearly, with absurd values."""
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        if not (places := list(_places(value))):
            return json.dumps(rng.choice(_ABSURD[:-5])).encode()
        parent, key = rng.choice(places)
        match rng.choice(["absurd", "absurd", "delete", "swap", "more", "rename"]):
            case "delete":
                del parent[key]
            case "swap":
                other, name = rng.choice(places)
                parent[key], other[name] = copy.deepcopy((other[name], parent[key]))
            case "more" if isinstance(parent, dict):
                parent[rng.choice(["more", "../x", "", "Files", "x" * 1000])] = copy.deepcopy(rng.choice(_ABSURD))
            case "rename" if isinstance(parent, dict):
                parent[rng.choice(["../../x", "/x", "A" * 300, ".x", "MANIFEST.JSON"])] = parent.pop(key)
            case _:
                parent[key] = copy.deepcopy(rng.choice(_ABSURD))
    return json.dumps(value).encode()


def mutated_text(data: bytes, rng: Random) -> bytes:
    """JSON with what a parser may stumble over in it."""
    nasty = [
        b"NaN",
        b"Infinity",
        b"1e999",
        b"-",
        b"9" * 10_000,
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'"\\ud800"',
        b"\xff",
    ]
    at = data.find(b": ", rng.randrange(len(data)))
    return data[: at + 2] + rng.choice(nasty) + data[at + 2 :] if at >= 0 else data[:-5]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Everything in a JSON value, as its parent and its key there."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(item, (dict, list)):
            yield from _places(item)


def resealed(data: bytes) -> bytes:
    """A manifest with the checksum that it should have; as it is where it is no object."""
    try:
        rest = json.loads(data)
        rest.pop("checksum", None)
        return json.dumps({**rest, "checksum": manifest.checksum(rest)}).encode()
    except (ValueError, RecursionError, AttributeError, TypeError):
        return data


def with_right_hashes(files: Files, said: dict[str, Any]) -> bytes:
    """The manifest of other files: what an attacker makes who has changed them."""
    entries = {name: {"sha256": manifest.sha256(data), "size": len(data)} for name, data in sorted(files.items())}
    said = json.loads(json.dumps({**said, "files": entries}))
    if (artifact := said["artifact"])["file"] in entries:
        artifact["sha256"] = entries[artifact["file"]]["sha256"]
    return resealed(json.dumps(said).encode())


# -------------------------------------------------------------------------------------------------------- watching


class Watch:
    """What this process writes or starts, while it is on: a reader does neither."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.on = False
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        writes = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
        paths: list[Any] = []
        if event == "open":
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                paths = [arguments[0]]
        elif event in writes:
            paths = [arguments[0]]
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            self.found.append(f"{event} {arguments[0]}")
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)):
                self.found.append(f"{event} {os.fsdecode(path)}")


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise Hang in the block once the time is over."""

    def over(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --------------------------------------------------------------------------------------------------------- readers


@dataclass(frozen=True)
class Original:
    """The bundle that is mutated."""

    loaded: bundle.Bundle
    said: dict[str, Any]
    packed: bytes
    inputs: list[bundle.Arrays]
    outputs: list[bundle.Arrays]


Case = tuple[str, Callable[[], str]]  # a kind of mutant, and what reads it and says how it went


def folder_case(original: Original, folder: Path, rng: Random) -> Case:
    files = dict(original.loaded.files)
    listing, name = original.loaded.unlisted["manifest.json"], rng.choice(list(files))
    kind = rng.choice(
        ["file", "listing", "json", "sealed json", "text", "swap", "remove", "stray", "node", "right hashes"]
    )
    if kind == "file":
        files[name] = mutated(files[name], rng)
    elif kind == "listing":
        listing = mutated(listing, rng)
    elif kind == "json":
        listing = mutated_json(listing, rng)
    elif kind == "sealed json":
        listing = resealed(mutated_json(listing, rng))
    elif kind == "text":
        listing = mutated_text(listing, rng)
    elif kind == "swap":
        other = rng.choice(list(files))
        files[name], files[other] = files[other], files[name]
    elif kind == "remove":
        del files[name]
    elif kind == "stray":
        files[rng.choice(["stray", "a/b", ".hidden", f"{name}~", "MANIFEST.json", "x" * 200, "a\nb"])] = b"stray"
    elif kind == "right hashes":
        files[name] = mutated(files[name], rng)
        listing = with_right_hashes(files, original.said)
    for path, data in {**files, "manifest.json": listing}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    if kind == "node":
        _node(folder / name, rng)
    return f"folder, {kind}", lambda: _loaded(original, folder)


def _node(path: Path, rng: Random) -> None:
    """Something else in the place of a file."""
    path.unlink()
    match rng.choice(["link", "outside", "loop", "pipe", "folder", "closed"]):
        case "link":
            path.symlink_to(path.parent / "manifest.json")
        case "outside":
            path.symlink_to("/etc/passwd")
        case "loop":
            path.symlink_to(path)
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "closed":
            path.write_bytes(b"")
            path.chmod(0)


def archive_case(original: Original, folder: Path, rng: Random) -> Case:
    path = folder / "bundle.zip"
    made = {**original.loaded.files, "manifest.json": original.loaded.unlisted["manifest.json"]}
    kind = rng.choice(
        ["bytes", "bytes", "directory", "directory", "names", "right hashes", "deflated", "bomb", "nested"]
    )
    data = original.packed
    if kind == "bytes":
        data = mutated(data, rng)
    elif kind == "directory":  # the central directory and its end, where a reader starts
        at = data.find(b"PK\x01\x02")
        tail = mutated(data[at:], rng) if rng.random() < 0.5 else _field(data[at:], rng)
        data = data[:at] + tail
    elif kind in ("names", "deflated", "bomb"):
        entries = [(zipfile.ZipInfo(name), content) for name, content in made.items()]
        if kind == "names":
            entry, content = rng.choice(entries)
            name = rng.choice(
                ["../x", "/x", "..\\x", "a/../../x", "C:x", "manifest.json", "x\x00y", "MODEL.PTE", "é", "a" * 5000]
            )
            entries.append((_info(name, rng), content))
        elif kind == "bomb":
            entries.append((zipfile.ZipInfo(rng.choice(["bomb", *made])), bytes(rng.choice([1, 8, 40]) << 20)))
        data = _zipped(
            entries, rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]) if kind != "names" else zipfile.ZIP_STORED
        )
    elif kind == "nested":
        data = archive.pack({"bundle.zip": data, **(made if rng.random() < 0.5 else {})})
    else:
        name = rng.choice(list(original.loaded.files))
        files = {**original.loaded.files, name: mutated(made[name], rng)}
        data = archive.pack({**files, "manifest.json": with_right_hashes(files, original.said)})
    path.write_bytes(data)
    return f"archive, {kind}", lambda: _loaded(original, path)


def _info(name: str, rng: Random) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x")
    info.filename = name
    info.external_attr = rng.choice([0, stat.S_IFLNK | 0o777, stat.S_IFIFO, stat.S_IFDIR]) << 16
    return info


def _field(directory: bytes, rng: Random) -> bytes:
    """One field of an entry of the directory, or of its end, set to something else."""
    spoilt = bytearray(directory)
    starts = [at for at in range(len(directory) - 4) if directory[at : at + 4] in (b"PK\x01\x02", b"PK\x05\x06")]
    at = rng.choice(starts) + rng.choice([4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 30, 32, 34, 36, 38, 42])
    value = struct.pack("<H", rng.choice([0, 1, 8, 12, 99, 0x41, 0xFFFF, rng.randrange(1 << 16)]))
    spoilt[at : at + 2] = value[: max(0, len(spoilt) - at)]
    return bytes(spoilt)


def _zipped(entries: list[tuple[zipfile.ZipInfo, bytes]], compression: int) -> bytes:
    import io
    import warnings

    data = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(data, "w") as opened:
        warnings.simplefilter("ignore")  # of names that are there twice
        for entry, content in entries:
            opened.writestr(entry, content, compression)
    return data.getvalue()


def _loaded(original: Original, path: Path) -> str:
    found, _, _ = verify_bundle.read(path)
    for name, file in found.manifest.files.items():
        assert manifest.sha256(found.files[name]) == file.sha256, name
        assert not Path(name).is_absolute() and ".." not in Path(name).parts, name
    return "identical" if found.manifest == original.loaded.manifest else "well-formed"


def report_case(original: Original, folder: Path, rng: Random) -> Case:
    text = original.loaded.files["report.json"]
    spoilt = rng.choice([mutated, mutated_json, mutated_json, mutated_text])(text, rng)

    def read() -> str:
        made = report.from_json(spoilt)
        report.markdown(made)
        report.junit(made)
        return "identical" if made == report.from_json(text) else "well-formed"

    return "report", read


def plan_case(original: Original, folder: Path, rng: Random) -> Case:
    text = original.loaded.files["plan.json"]
    (folder / "plan.json").write_bytes(rng.choice([mutated, mutated_json, mutated_json, mutated_text])(text, rng))
    (folder / "right.json").write_bytes(text)

    def read() -> str:
        plan = catalog.load_plan(str(folder / "plan.json"))
        return "identical" if plan == catalog.load_plan(str(folder / "right.json")) else "well-formed"

    return "plan", read


def vectors_case(original: Original, folder: Path, rng: Random) -> Case:
    data = original.loaded.files[original.loaded.manifest.vectors.file]
    size = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:  # the header alone: names, dtypes, shapes and offsets
        header = rng.choice([mutated, mutated_json])(data[8:size], rng)
        spoilt = struct.pack("<Q", len(header)) + header + data[size:]
    else:
        spoilt = mutated(data, rng)

    def read() -> str:
        inputs, outputs = bundle.read_vectors(spoilt)
        again = bundle.vectors(inputs, outputs)  # every array can be touched
        return "identical" if again == bundle.vectors(original.inputs, original.outputs) else "well-formed"

    return "vectors", read


READERS = [folder_case, folder_case, archive_case, archive_case, report_case, plan_case, vectors_case]


def judge(case: Case, seed: str, tally: Tally) -> None:
    """Let the reader have a mutant, and write down how it went."""
    kind, read = case
    began = time.monotonic()
    try:
        with limited(TIME):
            outcome, example = read(), ""
    except EdgebuildError as error:
        outcome, example = "refused", str(error)
        if "\n" in example or len(example) > LONGEST:
            tally.failures.append(f"{seed}: {kind}: no line to read: {example[:200]!r}")
    except Hang:
        outcome, example = "hang", f"more than {TIME} s"
        tally.failures.append(f"{seed}: {kind}: {example}")
    except BaseException as error:  # whatever else it is, it is a defect
        outcome, example = "defect", f"{type(error).__name__}: {error}"[:300]
        tally.failures.append(f"{seed}: {kind}: {example}")
    tally.slowest = max(tally.slowest, time.monotonic() - began)
    tally.add(kind, outcome, f"[{seed}] {example}")


# -------------------------------------------------------------------------------------------------------- programs


class Forked:
    """A confined `host_worker` as a fork of this process, which has its libraries: as Popen, as far as it is used."""

    def __init__(self, path: Path, errors: int):
        inputs, outputs = os.pipe(), os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.dup2(inputs[0], 0), os.dup2(outputs[1], 1), os.dup2(errors, 2)
                for end in (*inputs, *outputs):
                    os.close(end)
                signal.setitimer(signal.ITIMER_REAL, 0)
                faulthandler.disable()  # what crashes here is no news
                confine.confine(PROGRAM_MEMORY)
                host_worker.main(str(path), 1)
            finally:
                os._exit(0)
        os.close(inputs[0]), os.close(outputs[1])
        self.stdin, self.stdout = os.fdopen(inputs[1], "wb"), os.fdopen(outputs[0], "rb")

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def run_program(original: Original, path: Path) -> str:
    """Run a mutated program on the test vectors as `verify-bundle` does; says how its outputs are."""
    with tempfile.TemporaryFile("a+b") as errors:
        forked = Forked(path, errors.fileno())
        worker = host.Worker(path.name, forked, errors, 1 << 24)  # type: ignore[arg-type]
        try:
            worker.greet()
            worker.ask("load", timeout=PROGRAM_TIME)
            stacked = tuple(np.stack(arrays) for arrays in zip(*original.inputs, strict=True))
            _, found = worker.ask("many", stacked, PROGRAM_TIME)
        finally:
            forked.kill()
            forked.wait()
            forked.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                forked.stdin.close()
    wanted = [np.stack(arrays) for arrays in zip(*original.outputs, strict=True)]
    same = all(a.shape == b.shape and np.array_equal(a, b) for a, b in zip(found, wanted, strict=False))
    return "identical" if same else "other outputs"


def judge_program(original: Original, folder: Path, rng: Random, seed: str, tally: Tally) -> None:
    artifact = original.loaded.manifest.artifact
    data = original.loaded.files[artifact.file]
    if rng.random() < 0.5:  # the flatbuffer, which is small beside the weights
        size = min(len(data), 8192)
        data = mutated(data[:size], rng) + data[size:]
    else:
        data = mutated(data, rng)
    path = folder / artifact.file
    path.write_bytes(data)
    began = time.monotonic()
    try:
        with limited(4 * PROGRAM_TIME):
            outcome, example = run_program(original, path), ""
    except DeviceError as error:
        example = str(error)
        outcome = "contained" if "was ended by" in example or "did not answer" in example else "refused"
        if "\n" in example or len(example) > LONGEST:
            tally.failures.append(f"{seed}: program: no line to read: {example[:200]!r}")
    except BaseException as error:
        outcome, example = "defect", f"{type(error).__name__}: {error}"[:300]
        tally.failures.append(f"{seed}: program: {example}")
    tally.slowest = max(tally.slowest, time.monotonic() - began)
    tally.add("program, right hashes", outcome, f"[{seed}] {example}")


# ------------------------------------------------------------------------------------------------------------ main


def fuzz(
    path: Path, count: int, programs: int, seed: int, only: str = "", tell: Callable[[str], None] = lambda _: None
) -> Tally:
    """Try `count` mutants of a bundle on the readers, and `programs` of its program in the worker."""
    loaded = bundle.load(path)
    files = {**loaded.files, "manifest.json": loaded.unlisted["manifest.json"]}
    vectors = bundle.read_vectors(loaded.files[loaded.manifest.vectors.file])
    original = Original(loaded, json.loads(loaded.unlisted["manifest.json"]), archive.pack(files), *vectors)
    readers = READERS if "report.json" in files else [case for case in READERS if case is not report_case]
    if programs:
        import torch  # noqa: F401 - the forks are to have it
        from executorch.extension.pybindings import _C  # noqa: F401
    tally, watch = Tally(), Watch()
    with tempfile.TemporaryDirectory(prefix="edgebuild-fuzz-") as top:
        for number in range(count + programs):
            name = f"{seed}.{number}"
            if only and name != only:
                continue
            rng, folder = Random(name), Path(top, "case")
            folder.mkdir()
            if number < count:
                case = readers[number % len(readers)](original, folder, rng)
                watch.on = True
                judge(case, name, tally)
                watch.on = False
            else:
                judge_program(original, folder, rng, name, tally)
            if watch.found:
                tally.failures.append(f"{name}: written or started: {watch.found}")
                watch.found.clear()
            if sorted(os.listdir(top)) != ["case"]:
                tally.failures.append(f"{name}: written beside the bundle: {os.listdir(top)}")
            shutil.rmtree(folder)
            if (number + 1) % 100 == 0:
                tell(f"{number + 1} of {count + programs}, {len(tally.failures)} failures")
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path, nargs="?", default=Path("build/digits-mobile-cpu"))
    parser.add_argument("--count", type=int, default=1000, help="mutants for the readers")
    parser.add_argument("--programs", type=int, default=-1, help="mutated programs for the worker [a fifth of --count]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="the seed of one case, as it was printed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    programs = options.programs if options.programs >= 0 else options.count // 5
    print(f"seed {options.seed}: {options.count} mutants of {options.bundle} and {programs} of its program", flush=True)
    began = time.monotonic()
    tally = fuzz(
        options.bundle,
        options.count,
        programs,
        options.seed,
        options.only,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    names = sorted({outcome for outcomes in tally.outcomes.values() for outcome in outcomes})
    print(f"\n| mutant | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    for kind, outcomes in sorted(tally.outcomes.items()):
        print(f"| {kind} | {' | '.join(str(outcomes[name] or '') for name in names)} |")
    total = sum((Counter(outcomes) for outcomes in tally.outcomes.values()), Counter())
    print(f"| all | {' | '.join(str(total[name]) for name in names)} |")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"\n{time.monotonic() - began:.0f} s, the slowest {tally.slowest:.1f} s, at most {memory / 1024:.0f} MiB "
        f"resident; {len(tally.failures)} failures"
    )
    for line in tally.failures[:50]:
        print(f"FAILED {line}")
    if options.json:
        outcome = {"seed": options.seed, "outcomes": tally.outcomes, "examples": tally.examples}
        options.json.write_text(json.dumps({**outcome, "failures": tally.failures}, indent=2) + "\n")
    sys.exit(1 if tally.failures else 0)


if __name__ == "__main__":
    main()
