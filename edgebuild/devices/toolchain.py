"""What runs models on Arm: qemu's user mode, a compiler for Arm, ExecuTorch's Arm library, our runner.

qemu and the compiler come from the system. The library comes out of ExecuTorch's own aarch64 wheel, fetched once by pip
and held against a known hash; the runner is compiled once. Both are kept in the cache, in folders named by what they
hold.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from edgebuild import cache
from edgebuild.errors import MissingEnvironment

INSTALL = "apt-get install -y qemu-user g++-aarch64-linux-gnu"
ARM = "arm"  # the kind of what the cache keeps of it
NATIVE = Path(__file__).parent / "native"
FLAGS = ("-std=c++20", "-O2", "-Wall", "-Wextra", "-DC10_USING_CUSTOM_GENERATED_MACROS")
PLUGIN_FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden")
LIBRARIES = (
    "executorch",
    "executorch_kernels_optimized",
    "executorch_kernels_quantized",
    "executorch_backend_xnnpack",
    "executorch_threadpool",
)

# SHA-256 of the aarch64 wheel on PyPI, by ExecuTorch's version. Its C++ libraries do not depend on the version of
# Python, so that one wheel serves all interpreters.
_WHEEL_PYTHON = "3.11"
WHEELS = {"1.5.1": "8ee02348a3ea80ddf770822911ebf78da616b73afce0fbaaa79f23311c88c66a"}


def qemu() -> Path:
    """The emulator: $EDGEBUILD_QEMU, else `qemu-aarch64`. Raises MissingEnvironment."""
    return _program("EDGEBUILD_QEMU", "qemu-aarch64")


def compiler() -> Path:
    """The C++ compiler for Arm: $EDGEBUILD_CXX, else `aarch64-linux-gnu-g++`. Raises MissingEnvironment."""
    return _program("EDGEBUILD_CXX", "aarch64-linux-gnu-g++")


def c_compiler() -> Path:
    """The C compiler for this machine: $EDGEBUILD_CC, else `cc`. Raises MissingEnvironment."""
    return _program("EDGEBUILD_CC", "cc", "apt-get install -y gcc")


def sdk() -> Path:
    """A folder with the `include` and `lib` of ExecuTorch for Arm, fetched on first use. Raises MissingEnvironment."""
    return cache.folder(ARM, _sdk_name(), _fetch_sdk)


def kept_sdk() -> Path | None:
    """The folder of `sdk`, where it was fetched before."""
    try:
        return cache.find(ARM, _sdk_name())
    except MissingEnvironment:
        return None


def runner() -> Path:
    """The Arm program that runs a `.pte` (`native/runner.cpp`), built on first use. Raises MissingEnvironment."""
    headers_and_libraries, cxx = sdk(), compiler()

    def make(folder: Path) -> None:
        link = f"-Wl,-rpath,$ORIGIN/../{headers_and_libraries.name}/lib"
        build_runner(cxx, headers_and_libraries, folder / "runner", link)

    return cache.folder(ARM, _runner_name(cxx), make) / "runner"


def plugin() -> Path:
    """The simulator, a plugin of qemu (`native/simulator`), built on first use. Raises MissingEnvironment."""
    cc = c_compiler()
    sources = sorted((NATIVE / "simulator").glob("*.c"))

    def make(folder: Path) -> None:
        command = [str(cc), *PLUGIN_FLAGS, *map(str, sources), "-o", str(folder / "simulator.so")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr.strip()]
            raise MissingEnvironment(
                f"{cc} cannot build the simulator: {errors[0].strip()}", "it needs GCC 8 or Clang 9"
            )

    return cache.folder(ARM, _plugin_name(cc), make) / "simulator.so"


def version_of(program: Path) -> str:
    """The first line of what a program says of its version."""
    return _first_line([str(program), "--version"])


def native_compiler() -> Path:
    """The C++ compiler for this machine, `g++`. Raises MissingEnvironment."""
    return _program("EDGEBUILD_NATIVE_CXX", "g++", "apt-get install -y g++")


def native_sdk() -> Path:
    """The installed ExecuTorch, which brings its `include` and `lib`. Raises MissingEnvironment."""
    _executorch_version()
    spec = find_spec("executorch")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (Path(folder) / "lib/libexecutorch.so").is_file():
            return Path(folder)
    raise MissingEnvironment(
        "the installed executorch has no C++ libraries", f"pip install executorch=={[*WHEELS][-1]}"
    )


def native_runner() -> Path:
    """The program that runs a `.pte`, for this machine, built on first use. Raises MissingEnvironment."""
    headers_and_libraries, cxx = native_sdk(), native_compiler()
    name = f"runner-{_runner_key(cxx, _executorch_version(), platform.machine())}"

    def make(made: Path) -> None:
        build_runner(cxx, headers_and_libraries, made / "runner", f"-Wl,-rpath,{headers_and_libraries / 'lib'}")

    return cache.folder("native", name, make) / "runner"


def build_runner(cxx: Path, headers_and_libraries: Path, output: Path, *link: str) -> None:
    """Compile the runner against ExecuTorch's `include` and `lib`, for whatever machine the compiler is for."""
    include = headers_and_libraries / "include"
    command = [
        str(cxx),
        *FLAGS,
        *("-isystem", str(include)),
        *("-isystem", str(include / "executorch/runtime/core/portable_type/c10")),
        *map(str, sorted(NATIVE.glob("*.cpp"))),
        *("-o", str(output), f"-L{headers_and_libraries / 'lib'}", "-Wl,--no-as-needed,--allow-shlib-undefined"),
        *(f"-l{library}" for library in LIBRARIES),
        *link,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
        raise MissingEnvironment(
            f"{cxx} cannot build the runner: {errors[0].strip()}",
            "it needs GCC 10 or newer with its C++ library",
        )


def library_prefix(cxx: Path) -> Path:
    """The folder below which the dynamic linker and the C library for Arm lie, as qemu's `-L` takes it."""
    asked = [str(cxx), "-print-file-name=ld-linux-aarch64.so.1"]
    answer = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    if not Path(answer).is_absolute():  # the compiler repeats the bare name of a file that it does not have
        raise MissingEnvironment(f"{cxx} has no C library for Arm", INSTALL)
    return Path(answer).resolve().parent.parent


def status() -> list[tuple[str, bool, str]]:
    """Each part: its name, whether it is there or can be built, and where it is or how to get it. Builds nothing."""
    found = []
    for name, find in (("qemu-aarch64", qemu), ("aarch64-linux-gnu-g++", compiler)):
        try:
            path = find()
            found.append((name, True, _first_line([str(path), "--version"]) or str(path)))
        except MissingEnvironment as missing:
            found.append((name, False, missing.remedy))
    try:
        folder = _place(_sdk_name())
        how = f"fetched on first use by {shlex.join(_pip_command())}"
        found.append(("executorch for Arm", folder.is_dir(), str(folder) if folder.is_dir() else how))
    except MissingEnvironment as missing:
        found.append(("executorch for Arm", False, missing.remedy))
    if all(present for _, present, _ in found):
        folder = _place(_runner_name(compiler()))
        found.append(("Arm runner", True, str(folder) if folder.is_dir() else "will be built on first use"))
    else:
        found.append(("Arm runner", False, "built on first use, once the others are there"))
    try:
        cc = c_compiler()
        folder = _place(_plugin_name(cc))
        found.append(("cc", True, _first_line([str(cc), "--version"]) or str(cc)))
        found.append(("simulator", True, str(folder) if folder.is_dir() else "will be built on first use"))
    except MissingEnvironment as missing:
        found.append(("cc", False, missing.remedy))
        found.append(("simulator", False, "built on first use, once cc is there"))
    return found


def _program(variable: str, name: str, install: str = INSTALL) -> Path:
    chosen = os.environ.get(variable)
    path = shutil.which(chosen or name)
    if path is None:
        where = f"{chosen} (from {variable})" if chosen else name
        raise MissingEnvironment(f"{where}, which this device needs, is not installed", install)
    return Path(path)


def _executorch_version() -> str:
    try:
        installed = version("executorch").partition("+")[0]
    except PackageNotFoundError:
        raise MissingEnvironment("executorch is not installed", f"pip install executorch=={list(WHEELS)[-1]}") from None
    if installed not in WHEELS:
        known = " or ".join(WHEELS)
        raise MissingEnvironment(
            f"no hash is known of the Arm wheel of executorch {installed}", f"pip install executorch=={known}"
        )
    return installed


def _place(name: str) -> Path:
    return cache.root() / ARM / name


def _sdk_name() -> str:
    release = _executorch_version()
    return f"executorch-{release}-{WHEELS[release][:16]}"


def _runner_name(cxx: Path) -> str:
    return f"runner-{_runner_key(cxx, _sdk_name())}"


def _plugin_name(cc: Path) -> str:
    folder = NATIVE / "simulator"
    texts = [
        path.read_bytes() for path in (*sorted(folder.glob("*.c")), *sorted(folder.glob("*.h")), NATIVE / "marks.h")
    ]
    key = cache.key(*texts, *PLUGIN_FLAGS, _first_line([str(cc), "--version"]))
    return f"simulator-{key[:16]}"


def _runner_key(cxx: Path, *more: str) -> str:
    sources = [path.read_bytes() for path in sorted(NATIVE.iterdir()) if path.suffix in (".cpp", ".h")]
    return cache.key(*sources, *FLAGS, *LIBRARIES, *more, _first_line([str(cxx), "--version"]))[:16]


def _pip_command() -> list[str]:
    options = "--no-deps --only-binary=:all: --platform manylinux_2_28_aarch64 --implementation cp --python-version"
    return [sys.executable, *f"-m pip download {options} {_WHEEL_PYTHON} executorch=={_executorch_version()}".split()]


def _fetch_sdk(folder: Path) -> None:
    release = _executorch_version()
    with tempfile.TemporaryDirectory() as downloads:
        command = [*_pip_command(), "--disable-pip-version-check", "--quiet", "--dest", downloads]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(downloads).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            said = done.stderr.strip().splitlines() or ["no wheel came"]
            raise MissingEnvironment(
                f"the Arm wheel of executorch {release} cannot be fetched: {said[-1].strip()}",
                "pip needs a network once, or PIP_FIND_LINKS set to a folder that holds the wheel",
            )
        digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if digest != WHEELS[release]:
            raise MissingEnvironment(
                f"{wheels[0].name} is not the known wheel: SHA-256 {digest}, expected {WHEELS[release]}",
                "check the package index that pip uses",
            )
        with zipfile.ZipFile(wheels[0]) as wheel, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            for name in wheel.namelist():
                if name.startswith(("executorch/include/", "executorch/lib/")):
                    wheel.extract(name, scratch)
            for part in ("include", "lib"):
                (Path(scratch) / "executorch" / part).rename(folder / part)


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.partition("\n")[0]
