"""What the wheel and the sdist hold, what they need, and what it costs to ask for help."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import edgebuild

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def files(folder: str, *suffixes: str) -> set[str]:
    """Files of the checkout below a folder, relative to the root; all, or those with one of the suffixes."""
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name.endswith(suffixes or "")
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the wheel, its .dist-info aside."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        folder,
        ROOT,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    assert built.name == f"edgebuild-{edgebuild.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(built) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the sdist, relative to its one folder."""
    folder = tmp_path_factory.mktemp("sdist")
    code = "import sys, hatchling.build; hatchling.build.build_sdist(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.tar.gz")
    top = f"edgebuild-{edgebuild.__version__}/"
    assert built.name == f"{top[:-1]}.tar.gz"
    with tarfile.open(built) as archive:
        names = [member.name for member in archive.getmembers() if member.isfile()]
    assert all(name.startswith(top) for name in names)
    return {name.removeprefix(top) for name in names}


def test_wheel_holds_the_package_its_native_sources_and_the_catalog(wheel: set[str]) -> None:
    code = files("edgebuild")
    catalog = {f"edgebuild/data/{name}" for name in files("targets", ".toml") | files("profiles", ".toml")}
    assert any(name.startswith("edgebuild/devices/native/") for name in code)
    assert {"edgebuild/data/targets/host.toml", "edgebuild/data/profiles/mobile-cpu.toml"} <= catalog
    assert wheel == code | catalog


def test_sdist_holds_all_that_the_wheel_and_the_tests_are_made_from(sdist: set[str]) -> None:
    code = files("edgebuild") | files("tests", ".py")
    data = files("targets", ".toml") | files("profiles", ".toml") | {"examples/digits/digits.safetensors"}
    single = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "PKG-INFO", "scripts/setup.sh", "scripts/demo"}
    assert code | data | single <= sdist
    folders = {"edgebuild", "tests", "targets", "profiles", "examples", "scripts", "docs"}
    allowed_single = single | {".gitignore"}  # hatchling adds .gitignore, which it builds by
    assert {name for name in sdist if name.split("/")[0] not in folders} <= allowed_single
    assert not {name for name in sdist if "__pycache__" in name or re.match("examples/[^/]+/data/", name)}


def test_direct_dependencies_are_pinned_exactly() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in [*PROJECT["project"]["dependencies"], *(name for extra in extras.values() for name in extra)]:
        assert re.fullmatch(r"[A-Za-z0-9-]+==\d+(\.\d+)+", requirement), requirement


def test_every_import_of_the_package_is_a_direct_dependency() -> None:
    extras = [names for extra, names in PROJECT["project"]["optional-dependencies"].items() if extra != "dev"]
    direct = [*PROJECT["project"]["dependencies"], *(name for names in extras for name in names)]
    declared = {_canonical(name.split("==")[0]) for name in direct}
    owners = packages_distributions()
    for source in files("edgebuild", ".py") - {"edgebuild/pytest_plugin.py"}:  # which pytest itself imports
        for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"edgebuild"}:
                owned = {_canonical(owner) for owner in owners.get(top, [])}
                assert owned & declared, f"{source} imports {top}, which no direct dependency brings"


def test_help_loads_no_framework() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "edgebuild", "--help"]
    environment = {**os.environ, "COLUMNS": "120"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = {line.split("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if line.count("|") == 2}
    assert "typer" in loaded
    assert not loaded & {"torch", "torchao", "torchvision", "executorch", "numpy", "scipy"}
    for verb in ("build", "report", "inspect", "init", "matrix", "targets", "profiles", "doctor"):
        assert re.search(rf"\b{verb}\b", done.stdout), done.stdout


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
