"""The commands that take a task. Whatever loads torch is imported inside the command that needs it."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from edgebuild.cli.options import (
    CalibrationOption,
    InconclusiveOption,
    ProfileOption,
    TaskArgument,
    WeightsOption,
    check_inconclusive,
    check_writable,
    exit_code,
    hush,
    progress,
    write,
)
from edgebuild.errors import EdgebuildError, Infeasible, UsageError


def build(
    context: typer.Context,
    task: TaskArgument,
    profile: ProfileOption,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The bundle folder. [build/TASK-PROFILE]")
    ] = None,
    weights: WeightsOption = None,
    calibration: CalibrationOption = None,
    student: Annotated[
        bool, typer.Option("--student", help="Compress the task's student in place of its model.")
    ] = False,
    plan: Annotated[
        str | None, typer.Option(help="Build by this plan.json, perhaps edited by hand, and by no other.")
    ] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build even if nothing changed, and from scratch.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Also write report.json here, whatever the outcome.")] = None,
    inconclusive: InconclusiveOption = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the report.")] = False,
) -> None:
    """Build TASK until it meets every budget of a profile, and write the bundle.

    Exit codes: 0 all budgets met, 1 a budget broken, 2 bad usage or input, 3 no feasible plan, 4 something is missing.

    Under a launcher of several processes (torchrun, accelerate launch) they train together.
    """
    started = os.environ.get("WORLD_SIZE") or "1"
    if not started.isdecimal():
        raise UsageError(f"WORLD_SIZE={started!r} is no number of processes", "unset it, or use a launcher")
    if int(started) > 1:
        from edgebuild.training import processes

        if processes.rank() > 0:
            from edgebuild import pipeline

            hush()
            return pipeline.follow(task, weights, calibration)
        context.call_on_close(lambda: processes.tell(None))
    from rich.console import Console

    from edgebuild import bundle, cache, catalog, environment, inputs
    from edgebuild import report as reports

    check_inconclusive(inconclusive)
    chosen = catalog.load_profile(profile)
    name = Path(task.partition(":")[2] or task).resolve().stem
    folder = output or Path("build") / f"{name if name != 'task' else Path(task).resolve().parent.name}-{chosen.name}"
    bundle.check_writable(folder)
    check_writable(json)
    targets = catalog.targets_of(chosen)
    depends = cache.key(
        repr(chosen),
        repr(targets),
        repr((weights, calibration, student, plan)),
        repr(sorted(environment.versions().items())),
    )
    record = cache.key(str(folder.resolve()), str(Path(task).resolve()))
    console = Console()
    known = None if rebuild else inputs.unchanged(record, depends)
    if known is not None and (text := _kept(folder, known)) is not None:
        same = f"reused as it is: {known['files']} files of the task, profile, targets and versions are unchanged"
        console.print(f"{folder} is up to date: {known['summary']} ({same})", highlight=False, soft_wrap=True)
        if "report" in known:
            reports.terminal(reports.from_json(text), console)
        if json:
            write(json, text)
        raise typer.Exit(known["code"])
    inputs.watch()
    hush()
    from edgebuild import pipeline

    tell = (lambda message, seconds: None) if quiet else progress
    request = pipeline.Request(task, profile, folder, weights, calibration, student, rebuild, plan)
    made = pipeline.build(request, tell)
    text = reports.to_json(made)
    reports.terminal(reports.from_json(text), console)
    if json:
        write(json, text)
    code = exit_code(made, inconclusive, targets[0].status != "unvalidated")
    if made.artifact:
        console.print(f"\nThe bundle is in {folder}", highlight=False, soft_wrap=True)
        kept = {"manifest": cache.key((folder / "manifest.json").read_bytes())}
    else:
        kept = {"report": text}
    read = inputs.read_files(task) + [Path(extra).resolve() for extra in (weights, calibration, plan) if extra]
    ours = [folder.resolve(), *([json.resolve()] if json else [])]
    files = [path for path in read if path.is_file() and not any(map(path.is_relative_to, ours))]
    inputs.record(record, files, depends, {"code": code, "summary": made.summary, **kept})
    raise typer.Exit(code)


def _kept(folder: Path, known: dict[str, Any]) -> str | None:
    """The report of a recorded build, if its bundle is the one that it wrote, to the byte, or it could write none."""
    from edgebuild import bundle, cache

    if "report" in known:
        return str(known["report"])
    try:
        files = bundle.read(folder)
        same = cache.key((folder / "manifest.json").read_bytes()) == known["manifest"]
        return files["report.json"].decode() if same else None
    except (EdgebuildError, OSError):
        return None


def plan(
    task: TaskArgument,
    profile: ProfileOption,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan here, for `edgebuild build --plan`.")
    ] = None,
    weights: WeightsOption = None,
    calibration: CalibrationOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the plan.")] = False,
) -> None:
    """Print the plan that a build of TASK for a profile would start with, without building it.

    Exit codes: 0 a plan was found, 2 bad usage or input, 3 no feasible plan, 4 something is missing.
    """
    from rich.console import Console

    check_writable(output)
    hush()
    from edgebuild import pipeline, preview

    tell = (lambda message, seconds: None) if quiet else progress
    found = pipeline.plan(pipeline.Request(task, profile, Path("build"), weights, calibration), tell)
    preview.show(found, Console())
    if found.proposal is None:
        raise typer.Exit(Infeasible.exit_code if found.solve and found.solve.status == "infeasible" else 1)
    if output:
        write(output, pipeline.plan_json(found.proposal.plan).decode())


def inspect(
    task: TaskArgument,
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help="Predict latency on this target.")] = None,
    weights: WeightsOption = None,
    calibration: CalibrationOption = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads for the predicted latency.")] = 1,
) -> None:
    """Print TASK's layers, channel groups and peak memory."""
    from rich.console import Console

    hush()
    from edgebuild import catalog
    from edgebuild.inspection import inspect as look

    look(task, [catalog.load_target(name) for name in target or ()], threads, weights, calibration, Console())


def init(
    folder: Annotated[Path, typer.Argument(help="Where to write task.py.")] = Path("."),
) -> None:
    """Write a starter task."""
    path = folder / "task.py"
    if path.exists():
        raise UsageError(f"{path} exists already", "choose another folder")
    starter = Path(__file__).parent.with_name("starter.py.txt").read_text(encoding="utf-8")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
    write(path, starter)
    print(
        f"{path} is written: it builds as it is; put your model in. Next: edgebuild build {folder} --profile mobile-cpu"
    )


def matrix(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A TOML of tasks and profiles.")],
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Builds at once. [one for two cores, if memory lasts]")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Build on the Ray cluster there: HOST:PORT or auto.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder of the bundles. [FILE's]")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the overview as JSON here, or to -.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Also write it as JUnit XML here, or to -.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the overview.")] = False,
) -> None:
    """Build many tasks for many profiles; what was built before and has not changed is not built again.

    Exit codes: 0 all budgets met, 3 no feasible plan for some and nothing worse, 1 a budget broken or a cell failed, 2
    bad usage or input, 4 something is missing.
    """
    from rich.console import Console

    from edgebuild import matrix as cells

    spec = cells.load(file, output)
    made = cells.run(spec, jobs, ray, (lambda message, seconds: None) if quiet else progress)
    if json:
        write(json, cells.as_json(made))
    if junit:
        write(junit, cells.junit(spec.output, made))
    if Path("-") not in (json, junit):
        cells.terminal(made, Console())
        print(f"\nThe overview is {spec.output / 'overview.html'}")
    raise typer.Exit(made.exit_code)
