"""The commands about what lies ready: targets, profiles, the cache, the installation."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgebuild.cli.options import (
    hush,
    say,
)
from edgebuild.errors import MissingEnvironment, UsageError


def doctor() -> None:
    """Say what is installed and what is missing, with the command that gets it."""
    from rich.console import Console
    from rich.table import Table

    from edgebuild.devices import remote, toolchain
    from edgebuild.doctor import packages

    rows = [*packages(), *toolchain.status(), remote.status()]
    table = Table("", "what", "found, or how to get it", box=None)
    for name, present, detail in rows:
        table.add_row("[green]ok[/]" if present else "[red]missing[/]", name, detail)
    Console().print(table)
    if missing := [name for name, present, _ in rows if not present]:
        raise MissingEnvironment(f"missing: {', '.join(missing)}", "the commands are above")


def targets_list() -> None:
    """List the shipped targets."""
    _list("targets", lambda t: (t.device, t.status, t.title))


def targets_show(name: str) -> None:
    """Print a target's file, each figure with its source."""
    _show("targets", name)


def targets_kit(
    directory: Annotated[Path, typer.Argument(help="The folder to write, new or empty.")],
    model: Annotated[
        list[str] | None, typer.Option(help="A model to measure, NAME=FILE.pte. [three of torchvision's]")
    ] = None,
    arch: Annotated[str, typer.Option(help="Kinds of machine to bring a runner for: aarch64, x86_64.")] = "aarch64",
) -> None:
    """Write a folder that measures models on a phone or a board, over adb or ssh."""
    hush()
    from edgebuild import kit

    kit.write(directory, kit.parse(model or ()), [name.strip() for name in arch.split(",")], say)
    print(f"{directory} is written. Next: {directory}/measure_ssh.sh USER@HOST, or {directory}/measure_adb.sh")


def targets_calibrate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A simulated target's name, or a path to its TOML.")],
    measured: Annotated[
        Path, typer.Option("--measured", "-m", help="What the kit of `edgebuild targets kit` wrote for the device.")
    ],
    models: Annotated[
        Path | None, typer.Option(help="The .pte files that were measured. [models, beside the measured file]")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The file to write. [./NAME.toml]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Fit a simulated target to latencies measured on the real device, and write its file."""
    from rich.console import Console

    from edgebuild import calibrate, catalog

    source = catalog.find("targets", name)
    target = catalog.load_target(name)
    output = output or Path(f"{source.stem}.toml")
    calibrate.check_writable(output, force)
    fit = calibrate.calibrate(target, catalog.load_timings(measured), models or measured.parent / "models", say)
    calibrate.show(fit, Console())
    calibrate.write(source, output, fit)
    print(f"{output} is written. Next: name it as the target in a profile")


def profiles_list() -> None:
    """List the shipped profiles."""
    _list("profiles", lambda p: (", ".join(p.targets), p.artifact, p.title))


def profiles_show(name: str) -> None:
    """Print a profile's file."""
    _show("profiles", name)


def _list(kind: str, row: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from edgebuild import catalog

    load = {"targets": catalog.load_target, "profiles": catalog.load_profile}[kind]
    heads = {"targets": ("target", "device", "status", ""), "profiles": ("profile", "targets", "artifact", "")}[kind]
    table = Table(*heads, box=None)
    for name in catalog.names(kind):
        table.add_row(name, *row(load(name)))
    Console().print(table)


def _show(kind: str, name: str) -> None:
    from edgebuild import catalog

    {"targets": catalog.load_target, "profiles": catalog.load_profile}[kind](name)  # refuse what cannot be used
    print(catalog.find(kind, name).read_text(encoding="utf-8"), end="")


def cache_info() -> None:
    """Say where the cache is, what it holds, and how large it may grow."""
    from rich.console import Console
    from rich.table import Table

    from edgebuild import cache, upkeep
    from edgebuild.units import Bytes

    most, found = upkeep.bound(), upkeep.entries()
    total = Bytes(sum(entry.size for entry in found))
    table = Table("kind", "entries", "size", "", box=None)
    for kind in sorted({*upkeep.KINDS, *(entry.kind for entry in found)}):
        sizes = [entry.size for entry in found if entry.kind == kind]
        what = upkeep.KINDS.get(kind, "not of this version")
        table.add_row(kind, str(len(sizes)), str(Bytes(sum(sizes))), what)
    console = Console()
    console.print(
        f"{cache.root()} holds {total} and may hold {most} ({upkeep.VARIABLE}).", highlight=False, soft_wrap=True
    )
    console.print(table)


def cache_clear(
    kind: Annotated[str | None, typer.Argument(help="Only entries of this kind, as `cache info` lists them.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove what the cache holds. What a running build uses stays."""
    import difflib

    from edgebuild import cache, upkeep
    from edgebuild.units import Bytes

    found = upkeep.entries()
    kinds = sorted({*upkeep.KINDS, *(entry.kind for entry in found)})
    if kind is not None and kind not in kinds:
        close = difflib.get_close_matches(kind, kinds, 1)
        remedy = f"perhaps you meant {close[0]!r}" if close else f"known: {', '.join(kinds)}"
        raise UsageError(f"the cache has no kind {kind!r}", remedy)
    size = Bytes(sum(entry.size for entry in found if kind in (None, entry.kind)))
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("nobody can be asked whether to remove it", "add --yes")
        typer.confirm(f"Remove {size} of {kind or 'everything'} from {cache.root()}?", abort=True)
    gone, left = upkeep.clear(kind or "")
    print(f"removed {len(gone)} entries, {Bytes(sum(entry.size for entry in gone))}")
    if left:
        print(f"left {len(left)} entries, {Bytes(sum(entry.size for entry in left))}, which a running process uses")
