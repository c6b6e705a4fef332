"""Imports point upward only: the table of DESIGN.md, enforced on the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "edgebuild"

BASE = {"errors", "units", "spec"}
MODEL = BASE | {"vision", "manifest", "lift", "task"}

# Module or package -> what it may import of edgebuild beside itself. Each names only what stands above it.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "units": {"errors"},
    "spec": {"errors", "units"},
    "catalog": BASE,
    "cache": BASE,
    "upkeep": BASE | {"cache"},
    "inputs": {"cache"},
    "clock": {"errors", "units"},
    "environment": set(),
    "doctor": BASE,
    "vela": BASE,
    "plan": BASE,
    "vision": {"errors"},
    "manifest": BASE,
    "attention": set(),
    "lift": BASE | {"attention"},
    "task": BASE | {"vision", "manifest"},
    "signature": MODEL,
    "load": MODEL | {"cache", "signature"},
    "analyse": BASE | {"lift", "attention"},
    "rounding": set(),
    "divergence": BASE | {"lift"},
    "sensitivity": BASE | {"lift", "rounding", "divergence"},
    "training": BASE | {"cache", "clock", "lift", "divergence"},
    "transforms": BASE | {"clock", "plan", "training"} | {"lift", "analyse", "divergence", "sensitivity"},
    "trials": BASE | {"lift", "divergence", "sensitivity", "transforms"},
    "backends": BASE | {"lift", "vela"},
    "devices": BASE | {"cache", "vela"},
    "calibrate": BASE | {"catalog", "devices"},
    "selective": BASE | {"cache", "manifest", "devices"},
    "kit": MODEL | {"analyse", "transforms", "backends", "devices"},
    "space": BASE | {"plan"},
    "program": BASE | {"plan", "space"},
    "footprint": BASE,
    "arena": BASE | {"plan", "space", "devices"},
    "costs": BASE | {"cache", "plan", "space", "devices", "footprint", "arena"},
    "judge": BASE | {"devices"},
    "verify": MODEL | {"load", "judge", "devices", "backends"},
    "built": BASE | {"cache", "training", "devices"},
    "analysis": BASE | {"cache", "sensitivity", "built"},
    "base": MODEL
    | {"analysis", "environment", "load", "cache", "analyse", "sensitivity", "transforms", "trials", "backends"},
    "compress": MODEL | {"base", "load", "divergence", "training", "transforms"},
    "realise": MODEL
    | {"base", "built", "compress", "divergence"}
    | {"environment", "clock", "training", "load", "cache", "transforms", "backends", "judge", "verify"},
    "inspection": MODEL | {"load", "analyse", "devices", "plan", "arena", "costs"},
    "report": BASE,
    "archive": {"errors"},
    "bundle": BASE | {"manifest", "archive", "report"},
    "verify_bundle": BASE | {"manifest", "report", "bundle", "devices"},
    "signing": BASE | {"environment", "manifest", "bundle"},
    "integration": {"manifest"},
    "settings": BASE | {"catalog"},
    "checking": BASE | {"bundle", "clock", "devices", "environment", "judge", "report", "settings"},
    "diff": BASE | {"bundle", "report", "settings"},
    "github": BASE,
    "propose": BASE | {"plan", "space", "program", "costs", "base", "report"},
}
MAY_IMPORT["students"] = MODEL | {"load", "analyse", "divergence", "transforms", "base", "propose"}
STAGES = set(MAY_IMPORT)
MAY_IMPORT["attempt"] = STAGES
MAY_IMPORT["loop"] = STAGES | {"attempt"}
MAY_IMPORT["handoff"] = STAGES | {"attempt"}
MAY_IMPORT["pipeline"] = STAGES | {"attempt", "loop", "handoff"}
MAY_IMPORT["preview"] = STAGES | {"pipeline"}
MAY_IMPORT["matrix"] = BASE | {"catalog", "cache", "inputs", "clock", "report"}
MAY_IMPORT["pytest_plugin"] = {"errors", "bundle", "manifest", "settings", "checking", "report"}
MAY_IMPORT["cli"] = STAGES | {"attempt", "loop", "handoff", "pipeline", "preview", "matrix"}
MAY_IMPORT["__main__"] = {"cli"}

FRAMEWORKS = {"torch", "accelerate", "torchao", "torchvision", "torch_pruning", "executorch", "tensorly"}
# These load no framework.
LIGHT = {
    "errors",
    "units",
    "spec",
    "catalog",
    "calibrate",
    "cache",
    "upkeep",
    "clock",
    "inputs",
    "doctor",
    "vela",
    "plan",
    "space",
    "program",
    "arena",
    "costs",
    "footprint",
    "devices",
    "judge",
    "report",
    "manifest",
    "selective",
    "archive",
    "bundle",
    "signing",
    "integration",
    "settings",
    "checking",
    "diff",
    "github",
    "pytest_plugin",
    "verify_bundle",
    "matrix",
}
# Apart from the process that an artifact runs in, a program of its own, and what `host_rates` and `arm_rates` import
# when they have to write the program of the layers that are timed. Only the first of them runs `devices.reference`,
# which it finds by its path.
HEAVY = {"devices.host_worker", "devices.probe_program", "devices.reference"}
# CMSIS-NN's own arithmetic of what an operator takes while it runs, and the cores it knows: no torch comes with either,
# and they are asked inside of the function that needs them.
ARITHMETIC = {
    "devices.cortex_m": {
        "executorch.backends.cortex_m.library.cmsis_nn",
        "executorch.backends.cortex_m.target_config.CortexMTargetConfig",
    }
}


def sources() -> list[str]:
    return sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def module(source: str) -> str:
    """ "report/__init__.py" -> "report", "devices/arm.py" -> "devices.arm"."""
    return source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(source: str) -> Iterator[str]:
    """Every imported name, at any depth of the file, as a full dotted path."""
    for node in ast.walk(ast.parse((PACKAGE / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno}: write the import in full, from the package on"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_table_itself_points_upward() -> None:
    seen: set[str] = set()
    for name, allowed in MAY_IMPORT.items():
        assert allowed - {name} <= seen, f"{name} names what stands below it: {allowed - seen}"
        seen.add(name)


@pytest.mark.parametrize("source", [source for source in sources() if source != "__init__.py"])
def test_imports_point_upward(source: str) -> None:
    own = module(source).split(".")[0]
    assert own in MAY_IMPORT, f"{source}: no row in the table of who may import whom"
    used = {name.split(".")[1] for name in imports(source) if name.startswith("edgebuild.")} - {"__version__"}
    assert used - {own} <= MAY_IMPORT[own], f"{source} may not import {sorted(used - {own} - MAY_IMPORT[own])}"


@pytest.mark.parametrize("source", [source for source in sources() if module(source).split(".")[0] in LIGHT])
def test_light_modules_load_no_framework(source: str) -> None:
    heavy = {name for name in imports(source) if name.split(".")[0] in FRAMEWORKS}
    heavy -= ARITHMETIC.get(module(source), set())
    assert not heavy or module(source) in HEAVY, f"{source} imports {sorted(heavy)}"


def test_arithmetic_of_microcontrollers_loads_no_torch() -> None:
    ask = (
        "import sys; from edgebuild import arena, catalog; from edgebuild.spec import LayerFacts;"
        "layer = LayerFacts('c', 'conv2d', 8, 8, kernel=(3, 3), stride=(1, 1), positions=64,"
        " in_shape=(1, 8, 8, 8), out_shape=(1, 8, 8, 8));"
        "size = arena.scratch(layer, catalog.load_target('stm32f746'));"
        "print(size, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    size, loaded = done.stdout.split()
    assert int(size) > 0 and loaded == "False"
