"""Public tools against edgebuild at equal latency, with the same model, data and time: `compression.recipes`.

Every tool gets an environment of its own beside the versions of torch and ExecuTorch that edgebuild pins. One that does
not install, import or run is a row with its error. What was made before is taken from the folder of artifacts, if one
is kept and the same was asked: each `.pte` there has a `.json` that says how it was made. All are measured anew.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from compression import builds, cifar, recipes
from edgebuild import catalog, verify
from edgebuild.devices import host
from edgebuild.errors import DeviceError
from edgebuild.units import Seconds

ROOT = Path(__file__).parent.parent.parent
TOOLS: dict[str, tuple[str, ...]] = {  # what to install; the first is the tool
    "torch-pruning": (),  # edgebuild itself needs it
    "nncf": ("nncf==3.4.0",),
    "modelopt": ("nvidia-modelopt==0.47.0", "torchprofile==0.0.4"),
    "mct": ("model-compression-toolkit==2.6.1",),
    "neural-compressor": ("neural-compressor-pt==3.10",),
}
KEPT = ("torch", "torchvision", "torchao", "executorch", "numpy")  # as they are here
OURS = "edgebuild"
ROUNDS = 5  # of measuring all artifacts one after another

Row = dict[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes beside --model, --weights, --images and --time."""
    parser.add_argument("--recipes", nargs="*", default=list(recipes.RECIPES), choices=list(recipes.RECIPES))
    parser.add_argument("--speedup", type=float, default=9.5, help="times faster than fp32 to prune to, for tools")
    parser.add_argument("--tries", type=int, default=6, help="of how much to prune, for tools")
    parser.add_argument("--threads", type=int, default=2, help="to train with, for tools")
    parser.add_argument("--python", action="append", default=[], metavar="TOOL=PATH", help="an environment that has it")
    parser.add_argument("--artifacts", type=Path, help="folder to keep the .pte files of tools in")
    parser.add_argument(
        "--environments",
        type=Path,
        default=Path(tempfile.gettempdir()) / "edgebuild-bench-tools",
        help="folder for the tools' own environments",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """edgebuild's and each recipe's artifact, all measured in one run; prints the table."""
    given = dict(pair.split("=", 1) for pair in options.python)
    if unknown := sorted(set(given) - set(TOOLS)):
        raise SystemExit(f"--python: no tool {', '.join(unknown)}; there are {', '.join(TOOLS)}")
    data, model = cifar.images(options.images), cifar.load(options.model, options.weights)
    with tempfile.TemporaryDirectory(prefix="edgebuild-bench-") as temporary:
        folder = options.artifacts or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        original = folder / "fp32.pte"
        original.write_bytes(recipes.lower(model, (data.train[:1].float(),)))
        rows: list[Row] = [{"recipe": "fp32", "version": version("executorch"), "what": "the original"}]
        asked = {"speedup": options.speedup, "time": options.time, "tries": options.tries, "threads": options.threads}
        asked["original"] = hashlib.sha256(original.read_bytes()).hexdigest()
        for name in (OURS, *options.recipes):
            kept = folder / f"{name}.json"
            known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
            if known.get("asked") == asked:
                rows.append(known["row"])
                continue
            print(f"{name}: {recipes.RECIPES[name].what if name != OURS else 'a build'}", flush=True)
            if name == OURS:
                rows.append(_built(original, data, options))
            else:
                rows.append(_carried_out(name, given.get(recipes.RECIPES[name].tool, ""), original, options))
            kept.write_text(json.dumps({"asked": asked, "row": rows[-1]}), encoding="utf-8")
            print(f"  {rows[-1].get('error') or 'done'}", flush=True)
        _measure(rows, folder, data)
    print(table(rows))
    return {**asked, "rows": rows}


def _built(original: Path, data: cifar.Images, options: argparse.Namespace) -> Row:
    """edgebuild's own `.pte`, for the latency that the tools prune to; trained once, as theirs, whatever it loses."""
    budgets = {"latency": f"{1e3 * recipes.latency(original, data) / options.speedup:.4f} ms"}
    task = builds.cifar(options.model, options.weights, options.images)
    artifact = original.with_stem(OURS)
    made = builds.build(OURS, task, budgets, options.time, extra=builds.ONCE, artifact=artifact)
    training = made.seconds["distil"]
    return {
        "recipe": OURS,
        "version": version("edgebuild"),
        "what": ", ".join(made.techniques),
        "epochs": made.steps * cifar.BATCH / len(data.train),
        "search seconds": round(made.seconds["all"] - training, 1),
        "training seconds": training,
    }


def _carried_out(name: str, python: str, original: Path, options: argparse.Namespace) -> Row:
    recipe = recipes.RECIPES[name]
    row: Row = {"recipe": name, "version": "", "what": recipe.what}
    try:
        python = python or _environment(recipe.tool, options.environments)
        row["version"] = _version(recipe.tool, python)
        command = [python, "-P", recipes.__file__, name, "--original", original, "--output", original.with_stem(name)]
        for option in ("model", "weights", "images", "speedup", "tries", "threads"):
            command += [f"--{option}", getattr(options, option)]
        told = _output([*map(str, command), "--seconds", str(float(Seconds.parse(options.time)))])
        return row | json.loads(told.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        return row | {"error": _reason(error.stderr or error.stdout or str(error))}


def _environment(tool: str, folder: Path) -> str:
    """A Python with the tool, the packages of this one and, where they differ, those that the tool asks for."""
    if not TOOLS[tool]:
        return sys.executable
    python, done = folder / tool / "bin" / "python", folder / tool / "installed"
    if not done.is_file():
        venv.create(folder / tool, clear=True, with_pip=True)
        own = sysconfig.get_path("purelib", vars={"base": str(folder / tool)})
        (Path(own) / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
        constraints = folder / tool / "constraints.txt"
        constraints.write_text("".join(f"{name}=={version(name).split('+')[0]}\n" for name in KEPT))
        _output([str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints), *TOOLS[tool]])
        done.touch()
    return str(python)


def _version(tool: str, python: str) -> str:
    package = TOOLS[tool][0].split("==")[0] if TOOLS[tool] else tool
    return _output([python, "-c", f"import importlib.metadata as m; print(m.version({package!r}))"]).strip()


def _output(command: Sequence[str]) -> str:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "scripts")))
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def _reason(text: str) -> str:
    """The line that says what went wrong: an exception's, or pip's."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("ERROR:")), lines[-1] if lines else "no output")[:300]


def _measure(rows: list[Row], folder: Path, data: cifar.Images) -> None:
    """Size, latency and accuracy of each artifact; the rounds visit all, so that none has the machine's bad minute."""
    found: dict[str, list[float]] = {row["recipe"]: [] for row in rows}
    first = rows[0]
    for _ in range(ROUNDS):
        for row in rows:
            if "error" not in row:
                try:
                    found[row["recipe"]].append(recipes.latency(_artifact(row, folder), data))
                except DeviceError as error:  # lowered, and nevertheless nothing that runs
                    row["error"] = str(error)
    for row in rows:
        if "error" in row:
            continue
        path = _artifact(row, folder)
        row["size"], row["latency"] = path.stat().st_size, statistics.median(found[row["recipe"]])
        with host.load(path, catalog.load_target("host"), 1) as session, torch.no_grad():
            row["accuracy"] = cifar.accuracy(verify.predictor(session), data)
        row["smaller"], row["faster"] = first["size"] / row["size"], first["latency"] / row["latency"]
        row["lost"] = 100 * (first["accuracy"] - row["accuracy"])


def _artifact(row: Row, folder: Path) -> Path:
    return folder / f"{row['recipe']}.pte"


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table; the error, where there is one, in place of the figures."""
    lines = [
        "| recipe | version | what | size | smaller | latency | faster | accuracy | lost | epochs | search |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        start = f"| {r['recipe']} | {r['version']} | {r['what']} |"
        if "error" in r:
            lines.append(f"{start} {r['error']} |" + " |" * 7)
            continue
        epochs, search = r.get("epochs", 0.0), r.get("search seconds", 0.0)
        lines.append(
            f"{start} {r['size']:,} B | {r['smaller']:.1f}x | {1e3 * r['latency']:.3g} ms | {r['faster']:.1f}x "
            f"| {r['accuracy']:.2%} | {r['lost']:+.2f} | {epochs:.1f} | {search / 60:.1f} min |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "weights", "images"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--time", default="15 min", help="of each training")
    parser.add_argument("--json", type=Path)
    add_options(parser)
    options = parser.parse_args()
    found = run(options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
