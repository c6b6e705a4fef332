"""What a Linux device needs to run a `.pte`: the runner, the libraries that it loads, and their C library and loader.

The C library comes along so that the device's own does not matter: it may be older than the one that the runner was
linked with, or of another kind, as Alpine's and Android's are. `command` starts the runner through that loader.
"""

import hashlib
import io
import platform
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from edgebuild import cache
from edgebuild.devices import toolchain
from edgebuild.errors import MissingEnvironment

LOADERS = {"aarch64": "ld-linux-aarch64.so.1", "x86_64": "ld-linux-x86-64.so.2"}  # by `uname -m`
COMPLETE = "complete"  # the last file of a packed folder: without it the transfer broke off

_NEEDED = re.compile(r"\(NEEDED\).*\[(.+)\]")


@dataclass(frozen=True)
class Packed:
    """A runtime folder as a tar archive, the same bytes each time, and a name that stands for its content."""

    name: str
    data: bytes


def folder(machine: str) -> Path:
    """A folder with `runner` and `lib` for a machine of LOADERS, made on first use. Raises MissingEnvironment."""
    if machine == "aarch64":
        runner, cxx, libraries = toolchain.runner(), toolchain.compiler(), toolchain.sdk() / "lib"
    elif machine == platform.machine():
        runner, cxx, libraries = toolchain.native_runner(), toolchain.native_compiler(), toolchain.native_sdk() / "lib"
    else:
        raise MissingEnvironment(
            f"the runner for {machine} is only built on a machine of that kind", f"run edgebuild on {machine}"
        )
    loader = LOADERS[machine]
    c_library = [_library(name, libraries, cxx).read_bytes() for name in (loader, "libc.so.6")]
    key = cache.key(machine, runner.parent.name, *c_library)[:16]

    def make(made: Path) -> None:
        (made / "lib").mkdir()
        shutil.copy(runner, made / "runner")
        open_ends, known = [runner], {loader}
        while open_ends:
            for name in _needed(open_ends.pop(), cxx) - known:
                known.add(name)
                open_ends.append(_library(name, libraries, cxx))
        for name in known:
            shutil.copy(_library(name, libraries, cxx), made / "lib" / name)
            (made / "lib" / name).chmod(0o755)

    return cache.folder("runtime", f"{machine}-{key}", make)


def command(where: str, machine: str) -> str:
    """The words of a shell that start the runner of a runtime folder at `where`, itself in the shell's words."""
    return f'"{where}/lib/{LOADERS[machine]}" --library-path "{where}/lib" "{where}/runner"'


def pack(made: Path) -> Packed:
    """Pack a runtime folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in [made / "runner", *sorted((made / "lib").iterdir())]:
            member = tarfile.TarInfo(str(path.relative_to(made)))
            member.size, member.mode = path.stat().st_size, 0o755
            with path.open("rb") as file:
                archive.addfile(member, file)
        archive.addfile(tarfile.TarInfo(COMPLETE))
    data = buffer.getvalue()
    return Packed(f"runtime-{hashlib.sha256(data).hexdigest()[:16]}", data)


def _needed(path: Path, cxx: Path) -> set[str]:
    """The libraries that an ELF file names."""
    asked = subprocess.run([str(cxx), "-print-prog-name=readelf"], capture_output=True, text=True)
    try:
        done = subprocess.run([asked.stdout.strip() or "readelf", "-d", str(path)], capture_output=True, text=True)
    except OSError:
        raise MissingEnvironment("readelf is not installed", "apt-get install -y binutils") from None
    if done.returncode:
        raise MissingEnvironment(f"readelf cannot read {path}: {done.stderr.strip()}", "apt-get install -y binutils")
    return set(_NEEDED.findall(done.stdout))


def _library(name: str, libraries: Path, cxx: Path) -> Path:
    """A library of ExecuTorch, else of the compiler."""
    if (libraries / name).is_file():
        return libraries / name
    answer = subprocess.run([str(cxx), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not Path(answer).is_absolute():  # the compiler repeats the bare name of a file that it does not have
        raise MissingEnvironment(f"{cxx} has no {name}", toolchain.INSTALL)
    return Path(answer).resolve()
