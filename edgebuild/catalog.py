"""Finds and reads `targets/*.toml` and `profiles/*.toml`, by name or path. Unknown keys and bare numbers are errors."""

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from edgebuild.errors import SpecError, UsageError
from edgebuild.spec import (
    INSTRUCTION_CLASSES,
    SCALE_BOUNDS,
    Budget,
    Calibration,
    Core,
    Plan,
    Profile,
    Target,
    Timings,
)
from edgebuild.units import Bytes, Percent, Quantity, Seconds, Throughput, parse_drop

T = TypeVar("T")

MOST_THREADS = 256
TRAINING_BOUNDS: Mapping[str, tuple[float, float]] = {
    "steps": (0, inf),
    "learning_rate": (0, inf),
    "temperature": (0.1, 1000),
    "teacher_weight": (0, 1),
    "hint_weight": (0, inf),
    "cutmix": (0, 1),
    "freeze_after": (0, 1),
}

_PACKAGE = Path(__file__).parent
_BUDGET_UNITS: dict[Any, type[Quantity]] = {
    "size": Bytes,
    "latency": Seconds,
    "latency_p95": Seconds,
    "latency_p99": Seconds,
    "throughput": Throughput,
    "peak_memory": Bytes,
    "sram": Bytes,
    "flash": Bytes,
    "min_delegated": Percent,
}


def folder(kind: str) -> Path:
    """The folder of the shipped "targets" or "profiles": inside the installed package, or beside it in a checkout."""
    packaged = _PACKAGE / "data" / kind
    return packaged if packaged.is_dir() else _PACKAGE.parent / kind


def names(kind: str) -> list[str]:
    """Names of the shipped targets or profiles."""
    return sorted(path.stem for path in folder(kind).glob("*.toml"))


def find(kind: str, name: str) -> Path:
    """The file of a shipped name, or `name` itself where it is a path. Raises UsageError with a suggestion."""
    if _is_path(name):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"no {kind[:-1]} file at {name}", f"shipped {kind}: {', '.join(names(kind))}")
        return path
    path = folder(kind) / f"{name}.toml"
    if not path.is_file():
        raise UsageError(f"unknown {kind[:-1]} {name!r}", did_you_mean(name, names(kind)))
    return path


def load_target(name: str) -> Target:
    """Read a target by name or path. Raises UsageError where there is none, SpecError where it cannot be read."""
    path = find("targets", name)
    target, costs_of = _target(path)
    if not costs_of:
        return target
    base, further = _target(find("targets", beside(path, costs_of)))
    if further or base.device == "ssh" or base.microcontroller:
        raise SpecError(
            f"{name}: costs_of = {costs_of!r} predicts nothing over ssh", "name a simulated Arm or the host"
        )
    return replace(target, costs_of=base)


def _target(path: Path) -> tuple[Target, str]:
    """A target and the name of the one that its costs are of, "" where they are its own."""
    table = read(path)
    costs_of = table.pop("costs_of", "")
    if not isinstance(costs_of, str):
        raise SpecError(f"{path}: costs_of is the name of a target")
    clusters = table.get("cluster")
    for cluster in clusters if isinstance(clusters, list) else ():
        if isinstance(cluster, dict) and isinstance(name := cluster.get("model"), str):
            cluster["model"] = load_core(name, path.parent)
    target: Target = _decode(table, Target, path)
    _check_name(target.name, path)
    if target.device == "ssh":
        _check_remote(target, costs_of, path)
    elif target.ssh or costs_of:
        raise SpecError(f'{path}: [ssh] and costs_of are for device = "ssh", not for {target.device!r}')
    if target.device == "arm" and (not target.cluster or target.memory is None or target.threads is None):
        raise SpecError(f"{path}: an arm target needs [[cluster]], [memory] and [threads]")
    _check_board(target, path)
    for cluster in target.cluster:
        if not 1 <= cluster.count <= MOST_THREADS:
            raise SpecError(f"{path}: count = {cluster.count} of {cluster.name!r} is not between 1 and {MOST_THREADS}")
    if target.calibration is not None:
        _check_calibration(target, target.calibration, path)
    return target, costs_of


def _check_board(target: Target, path: Path) -> None:
    """A microcontroller has a board, and an NPU where its device is one; nothing else has."""
    wanted = {"board": target.microcontroller, "npu": target.device == "ethos_u"}
    for what, needed in wanted.items():
        if needed != (getattr(target, what) is not None):
            raise SpecError(f"{path}: device = {target.device!r} {'needs' if needed else 'has no'} table [{what}]")
    if target.board and not re.fullmatch(r"cortex-m\d+(plus)?", target.board.cpu):
        raise SpecError(f"{path}: board.cpu = {target.board.cpu!r} is no Cortex-M", 'such as "cortex-m4"')


def _check_name(name: str, path: Path) -> None:
    """Folders and files are named after targets and profiles."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise SpecError(f"{path}: name = {name[:100]!r}", "use letters, digits, '.', '-' and '_'")


def _check_calibration(target: Target, calibration: Calibration, path: Path) -> None:
    if target.device != "arm":
        raise SpecError(f'{path}: [calibration] is for device = "arm", not for {target.device!r}')
    _check_bounds(calibration, "calibration", dict.fromkeys(("core", "memory", "threads"), SCALE_BOUNDS), path)


def _check_bounds(table: object, name: str, bounds: Mapping[str, tuple[float, float]], path: Path) -> None:
    """The numbers of a table lie within their bounds, or are left out."""
    for key, (low, high) in bounds.items():
        value = getattr(table, key)
        if value is not None and not low <= value <= high:
            raise SpecError(f"{path}: {name}.{key} = {value:g} is not between {low:g} and {high:g}")


def load_timings(path: Path) -> Timings:
    """Read what the kit's scripts write. Raises UsageError where there is none, SpecError where it cannot be read."""
    if not path.is_file():
        raise UsageError(f"no measured file at {path}", "`edgebuild targets kit` writes a folder that measures one")
    timings: Timings = _decode(read(path), Timings, path)
    if not timings.measurement:
        raise SpecError(f"{path}: no [[measurement]]")
    seen = set()
    for timing in timings.measurement:
        what = f"{path}: {timing.model!r} with {timing.threads} threads"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", timing.model):
            raise SpecError(f"{what}: a model is named by letters, digits, - and _")
        if timing.threads < 1 or timing.runs < 1 or not timing.latency > 0:
            raise SpecError(f"{what}: threads, runs and latency must be more than 0")
        if (timing.model, timing.threads) in seen:
            raise SpecError(f"{what} is there twice")
        seen.add((timing.model, timing.threads))
    return timings


def _check_remote(target: Target, costs_of: str, path: Path) -> None:
    remote = target.ssh
    if remote is None or not remote.host:
        raise SpecError(f"{path}: an ssh target needs a table [ssh]", 'write [ssh] with host = "pi@raspberrypi.local"')
    if not costs_of:
        raise SpecError(
            f"{path}: an ssh target needs costs_of, the target that predicts its latency",
            f'such as costs_of = "raspberry-pi-4"; known: {", ".join(names("targets"))}',
        )
    if remote.host.startswith("-") or not 0 <= remote.port < 65536:
        raise SpecError(f"{path}: ssh.host = {remote.host!r} with ssh.port = {remote.port} is no destination")
    for option in remote.options:
        if not re.match(r"\w+\s*[=\s]\s*\S", option):
            raise SpecError(f"{path}: ssh.options: {option!r} is not an option of ssh_config(5)", 'write "Key=value"')


def beside(path: Path, name: str) -> str:
    """What the file at `path` calls `name`: a path counts from its folder, or else from the current one."""
    return str(path.parent / name) if _is_path(name) and (path.parent / name).is_file() else name


def _is_path(name: str) -> bool:
    return name.endswith(".toml") or "/" in name


def load_core(name: str, folder: Path | None = None) -> Core:
    """Read the model of a shipped core by its name, or one at a path that is relative to `folder`.

    Raises SpecError where it is not there or not complete.
    """
    path = core_file(name, folder or Path())
    core: Core = _decode(read(path), Core, path)
    _check_core(core, path)
    return core


def core_file(name: str, beside: Path) -> Path:
    """The file of a shipped core, or of one at a path from the folder `beside`. Raises SpecError where it is not."""
    cores = folder("targets") / "cores"
    path = beside / name if name.endswith(".toml") else cores / f"{name}.toml"
    if not path.is_file():
        raise SpecError(
            f"no model of a core {name!r}", did_you_mean(name, sorted(p.stem for p in cores.glob("*.toml")))
        )
    return path


def _check_core(core: Core, path: Path) -> None:
    found = [name for group in core.execution for name in group.classes]
    for name in found:
        if name not in INSTRUCTION_CLASSES:
            raise SpecError(f"{path}: unknown instruction class {name!r}", did_you_mean(name, INSTRUCTION_CLASSES))
        if found.count(name) > 1:
            raise SpecError(f"{path}: the instruction class {name!r} is there twice")
        core.slots(name)
    if missing := INSTRUCTION_CLASSES.keys() - set(found):
        raise SpecError(f"{path}: no figures for the instruction classes {', '.join(sorted(missing))}")


def load_profile(name: str) -> Profile:
    """Read a profile by name or path and check it against its targets."""
    path = find("profiles", name)
    table = read(path)
    budgets = _budgets(table.pop("budgets", {}), path)
    training = table.get("distillation")
    if isinstance(training, dict) and "time" in training:
        training.setdefault("steps", 0)  # as many as fit into the time
    profile: Profile = replace(_decode({**table, "budgets": []}, Profile, path), budgets=budgets)
    _check_name(profile.name, path)
    if not 1 <= profile.threads <= MOST_THREADS:
        raise SpecError(f"{path}: threads = {profile.threads} is not between 1 and {MOST_THREADS}")
    _check_bounds(profile.distillation, "distillation", TRAINING_BOUNDS, path)
    names = [beside(path, name) for name in profile.targets]
    profile = replace(profile, target=names[0], also_on=tuple(names[1:]))
    _check_alike(profile, list(_targets(profile, path)), path)
    return profile


def _check_alike(profile: Profile, targets: Sequence[Target], path: Path) -> None:
    """One artifact is for one kind of target, and a budget for what a target can be held to."""
    first = targets[0]
    for target in targets:
        if (target.npu, target.board and target.board.cpu) != (first.npu, first.board and first.board.cpu):
            raise SpecError(
                f"{path}: {first.name!r} and {target.name!r} need different artifacts", "write a profile for each"
            )
        for budget in profile.budgets:
            _check_budget(budget, target, path)
    if first.microcontroller and (profile.threads != 1 or "quantize" not in profile.techniques):
        raise SpecError(
            f"{path}: {first.name!r} computes int8 on one core", 'leave out threads, and keep "quantize" in techniques'
        )


def _check_budget(budget: Budget, target: Target, path: Path) -> None:
    what = f"{path}: budgets.{budget.kind}: {target.name!r}"
    if budget.kind in ("sram", "flash"):
        if target.board is None:
            raise SpecError(f"{what} is no microcontroller", "bound peak_memory or size in its place")
        has: Bytes = getattr(target.board, budget.kind)
        if budget.bound > has:
            raise SpecError(f"{what} has {has}, and {Bytes(budget.bound)} is asked")
    if budget.kind in ("latency_p95", "latency_p99") and target.microcontroller:
        raise SpecError(f"{what} has no spread of latencies: nothing is timed on it", "bound latency on an Ethos-U")
    if budget.kind in ("latency", "throughput") and not target.timed:
        raise SpecError(f"{what} cannot be timed here: nothing simulates its cycles", "bound sram and flash")


def targets_of(profile: Profile) -> tuple[Target, ...]:
    """A profile's targets, the gating one first, each with the cluster in front that the profile runs on."""
    return tuple(_targets(profile, Path(profile.name)))


def _targets(profile: Profile, path: Path) -> Iterator[Target]:
    for target in map(load_target, profile.targets):
        target = _ordered(target, profile, path)
        if profile.artifact == "torchscript" and target.device != "host":
            raise SpecError(
                f"{path}: a TorchScript artifact cannot be run on target {target.name!r}",
                'set artifact = "pte", or target = "host"',
            )
        cores = target.costs_of or target
        if cores.cluster and profile.threads > cores.cluster[0].count:
            raise SpecError(
                f"{path}: threads = {profile.threads}, but {cores.name!r} runs models on the "
                f"{cores.cluster[0].count} cores of its {cores.cluster[0].name!r} cluster"
            )
        yield target


def _ordered(target: Target, profile: Profile, path: Path) -> Target:
    """The target with the profile's cluster in front."""
    simulated = target.costs_of or target
    if not profile.cluster or not simulated.cluster:
        return target
    names = [cluster.name for cluster in simulated.cluster]
    if profile.cluster not in names:
        raise SpecError(
            f"{path}: {simulated.name!r} has no cluster {profile.cluster!r}", did_you_mean(profile.cluster, names)
        )
    ordered = sorted(simulated.cluster, key=lambda cluster: cluster.name != profile.cluster)
    chosen = replace(simulated, cluster=tuple(ordered))
    return chosen if simulated is target else replace(target, costs_of=chosen)


def load_plan(where: str) -> Plan:
    """Read a plan, perhaps edited by hand. Raises UsageError where there is none, SpecError where it cannot be read."""
    path = Path(where)
    if not path.is_file():
        raise UsageError(f"no plan at {where}", "write one with: edgebuild plan TASK --profile P --output plan.json")
    try:
        table = msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, RecursionError, UnicodeError, OSError) as error:
        raise SpecError(f"{path}: not JSON: {error}") from None
    if not isinstance(table, dict):
        raise SpecError(f"{path}: a plan is a JSON object", "edgebuild plan writes one to start from")
    plan: Plan = _decode(table, Plan, path)
    if plan.schema_version != Plan.schema_version:
        raise SpecError(
            f"{path}: schema_version is {plan.schema_version}, and this edgebuild reads {Plan.schema_version}"
        )
    return plan


def load_as(path: Path, kind: type[T]) -> T:
    """Read any TOML into a dataclass as strictly as targets and profiles are read. Raises SpecError."""
    value: T = _decode(read(path), kind, path)
    return value


def _budgets(table: Any, path: Path) -> tuple[Budget, ...]:
    if not isinstance(table, dict) or not table:
        raise SpecError(f"{path}: no budgets", 'write a table, such as [budgets] with size = "1 MiB"')
    budgets = []
    for key, written in table.items():
        try:
            if key == "accuracy_drop":
                drop = parse_drop(written)
                budgets.append(Budget("accuracy_drop", float(drop), relative=isinstance(drop, Percent)))
            elif key in _BUDGET_UNITS:
                budgets.append(Budget(key, float(_BUDGET_UNITS[key].parse(written))))
            else:
                raise SpecError(f"unknown budget {key!r}", did_you_mean(key, [*_BUDGET_UNITS, "accuracy_drop"]))
        except SpecError as error:
            raise SpecError(f"{path}: budgets.{key}: {error.what}", error.remedy) from None
    return tuple(budgets)


def read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise SpecError(f"{path}: {error}") from None


def _decode(table: dict[str, Any], kind: type, path: Path) -> Any:
    _check_keys(table, kind, path, "")
    try:
        return msgspec.convert(table, kind, dec_hook=_quantity)
    except msgspec.ValidationError as error:
        raise SpecError(f"{path}: {str(error).replace('$.', '')}") from None


def _quantity(kind: type, written: Any) -> Any:
    if issubclass(kind, Quantity):
        try:
            return kind.parse(written)
        except SpecError as error:
            raise ValueError(str(error)) from None
    raise NotImplementedError(kind)


def _check_keys(table: Any, kind: Any, path: Path, where: str) -> None:
    """Refuse keys that the dataclass `kind` does not have, at every depth."""
    kinds = [part for part in (kind, *get_args(kind)) if is_dataclass(part)]
    if isinstance(table, list):
        for i, item in enumerate(table):
            _check_keys(item, kind, path, f"{where}[{i}]")
    elif get_origin(kind) is Mapping and isinstance(table, dict):
        for key, value in table.items():
            _check_keys(value, get_args(kind)[1], path, f"{where}.{key}")
    elif kinds and isinstance(table, dict):
        hints = get_type_hints(kinds[0])
        known = [field.name for field in fields(kinds[0])]
        for key, value in table.items():
            if key not in known:
                raise SpecError(f"{path}: unknown key {f'{where}.{key}'.lstrip('.')!r}", did_you_mean(key, known))
            _check_keys(value, hints[key], path, f"{where}.{key}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The remedy for an unknown name."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"perhaps you meant {close[0]!r}" if close else f"known: {', '.join(known)}"
