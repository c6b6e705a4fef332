"""The commands: parse, call, print, exit. Whatever loads torch is imported inside the command that needs it."""

import errno
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from edgebuild import __version__, github
from edgebuild.errors import BudgetBroken, EdgebuildError, Infeasible, MissingEnvironment, UsageError

app = typer.Typer(
    help="make for edge models: builds a trained model down to a device's budgets, and proves it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
targets_app = typer.Typer(help="The hardware that budgets are checked on.", no_args_is_help=True)
profiles_app = typer.Typer(help="Targets with budgets.", no_args_is_help=True)
cache_app = typer.Typer(help="What earlier builds made, kept for later ones.", no_args_is_help=True)
keys_app = typer.Typer(help="Keys to sign bundles with.", no_args_is_help=True)
app.add_typer(targets_app, name="targets")
app.add_typer(profiles_app, name="profiles")
app.add_typer(cache_app, name="cache")
app.add_typer(keys_app, name="keys")

EXIT = {"met": 0, "broken": BudgetBroken.exit_code, "infeasible": Infeasible.exit_code}
INTERRUPTED = 130
STOPPED = "interrupted: nothing is left half-written"
NO_READER = 141  # 128 + SIGPIPE
REPORT_LIMIT = 64 << 20  # bytes; that of a model with a thousand layers has some four million
BUG = 70  # EX_SOFTWARE: never the code of a broken budget
# What a path or a disk is to blame for.
_OF_THE_SYSTEM = {
    getattr(errno, name)
    for name in ["ENAMETOOLONG", "ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "ELOOP", "EMFILE"]
}

TaskArgument = Annotated[
    str, typer.Argument(metavar="TASK", help="A Python file, a folder with task.py, a .pt2 file or torchvision:NAME.")
]
ProfileOption = Annotated[str, typer.Option("--profile", "-p", help="A shipped profile's name, or a path to a TOML.")]
WeightsOption = Annotated[str | None, typer.Option(help="Weights of a torchvision model: safetensors or a state dict.")]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder, or its archive to verify.")]
RequireOption = Annotated[
    list[Path] | None,
    typer.Option(metavar="KEY", help="Refuse a bundle that none of these public keys has signed. Repeatable."),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(help="Calibration inputs for torchvision models and .pt2 files: .npz or a folder of images."),
]

InconclusiveOption = Annotated[
    str, typer.Option(help="What a budget that cannot be decided means: fail, warn, or by the target's status (auto).")
]
JsonOption = Annotated[Path | None, typer.Option(help="Also write the figures here, as JSON.")]
MarkdownOption = Annotated[Path | None, typer.Option(help="Also write a comment for a pull request here.")]


def main() -> None:
    """Run the command line; every error that edgebuild raises on purpose ends in one line and its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not None, as of a process without one
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        code = app(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # not at the very end, where nobody would answer for it
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except EdgebuildError as error:
        line = " ".join(str(error).split())
        _say(f"error: {line}")
        if github.active():
            print(github.command("error", "edgebuild", line))
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _say(STOPPED)
        sys.exit(INTERRUPTED)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer ends a Ctrl-C by itself, silently
            _say(STOPPED)
        if isinstance(stop.__context__, BrokenPipeError):  # so do typer and rich, with the code of a broken budget
            _leave()
        raise
    except BrokenPipeError:
        _leave()
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # click's own: usage
            error.show()
            sys.exit(error.exit_code)
        if isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM:
            _discard()
            _say(f"error: {error.filename or 'the output cannot be written'}: {error.strerror}")
            sys.exit(EdgebuildError.exit_code)
        import traceback

        traceback.print_exc()
        _say("error: this is a defect of edgebuild, not of your task; please report it with the lines above")
        sys.exit(BUG)


def _leave() -> NoReturn:
    """End as a program does whose reader went away, such as `head`."""
    _discard()
    sys.exit(NO_READER)


def _discard() -> None:
    """Let Python not try, and complain, again when it ends."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _version(value: bool) -> None:
    if value:
        print(f"edgebuild {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
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

            _hush()
            return pipeline.follow(task, weights, calibration)
        context.call_on_close(lambda: processes.tell(None))
    from rich.console import Console

    from edgebuild import bundle, cache, catalog, environment, inputs
    from edgebuild import report as reports

    _check_inconclusive(inconclusive)
    chosen = catalog.load_profile(profile)
    name = Path(task.partition(":")[2] or task).resolve().stem
    folder = output or Path("build") / f"{name if name != 'task' else Path(task).resolve().parent.name}-{chosen.name}"
    bundle.check_writable(folder)
    _check_writable(json)
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
            _write(json, text)
        raise typer.Exit(known["code"])
    inputs.watch()
    _hush()
    from edgebuild import pipeline

    tell = (lambda message, seconds: None) if quiet else _progress
    request = pipeline.Request(task, profile, folder, weights, calibration, student, rebuild, plan)
    made = pipeline.build(request, tell)
    text = reports.to_json(made)
    reports.terminal(reports.from_json(text), console)
    if json:
        _write(json, text)
    code = _exit_code(made, inconclusive, targets[0].status != "unvalidated")
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


def _check_inconclusive(value: str) -> None:
    if value not in ("auto", "fail", "warn"):
        raise UsageError(f"--inconclusive {value!r}", "use auto, fail or warn")


def _hush() -> None:
    """Keep what the libraries warn each other about off the terminal: none of it is about the user's model."""
    import logging
    import warnings

    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    for name in ("torchao", "torch.utils._pytree", "torch.export", "executorch", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)


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


def _progress(message: str, seconds: float) -> None:
    print(f"[{seconds:6.1f} s] {message}", file=sys.stderr, flush=True)


def _exit_code(made: Any, inconclusive: str, calibrated: bool) -> int:
    """0, 1 or 3; an undecided budget fails on a calibrated target and warns on another, unless told otherwise."""
    if made.outcome == "inconclusive":
        fails = calibrated if inconclusive == "auto" else inconclusive == "fail"
        _say(f"{'error' if fails else 'warning'}: {made.summary}")
        return BudgetBroken.exit_code if fails else 0
    return EXIT[made.outcome]


def _check_writable(path: Path | None) -> None:
    """Raise the UsageError that `_write` would raise, before the long work."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder", "name a file in it")
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}", "make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"cannot write {path}: it is read-only", "name another file")


def _write(path: Path, text: str) -> None:
    """Write a file, whole or not at all; "-" is standard output.

    A link, such as /dev/stdout, and what is no plain file are written through.
    """
    if str(path) == "-":
        sys.stdout.write(text)
        return
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_text(text, encoding="utf-8")
            return
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".edgebuild-") as scratch:
            made = Path(scratch) / "made"
            made.write_text(text, encoding="utf-8")
            made.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


@app.command("verify-bundle")
def verify_bundle(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder or archive.")],
    require_signature: RequireOption = None,
) -> None:
    """Check every file of a bundle from anywhere, and run its test vectors in a confined process.

    Exit codes: 0 all is well, 1 outputs differ from the expected ones, 2 damaged, hostile or no bundle, 4 something is
    missing.
    """
    from edgebuild import verify_bundle as verifier

    def tell(check: verifier.Check) -> None:
        print(f"{'ok    ' if check.ok else 'differs'} {check.what}: {check.found}", flush=True)

    loaded = _load(path, require_signature)
    raise typer.Exit(0 if verifier.verify(path, tell, loaded) else 1)


def _load(path: Path, keys: list[Path] | None) -> Any:
    """The bundle, signed by one of the keys where that is asked for: what was verified is what is used."""
    from edgebuild import bundle

    if not keys:
        return bundle.load(path)
    from edgebuild import signing

    signed = signing.verify(path, keys)
    print(f"signed by {signed.key} (key {signed.keyid[:16]})", flush=True)
    return signed.bundle


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The archive to write. [BUNDLE.zip]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Pack a bundle into a zip archive, after checking it; the same bundle gives the same bytes."""
    from edgebuild import bundle

    output = output or folder.resolve().with_name(f"{folder.resolve().name}.zip")
    bundle.write_archive(folder, output, force)
    print(f"{output} is written. Next: edgebuild verify-bundle {output}")


@app.command()
def report(
    path: Annotated[
        Path | None, typer.Argument(metavar="PATH", show_default=False, help="A bundle, or a report.json.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained HTML file here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown here, as GitHub shows it.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML here.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write report.json here.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of report.json.")] = False,
) -> None:
    """Show the report of a build, or write it in other forms; "-" as a file is standard output.

    Exit codes: 0 it was shown, whatever its outcome, 2 bad usage or input.
    """
    from edgebuild import report as reports
    from edgebuild.errors import UsageError

    if schema:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(reports.schema()), indent=2).decode())
        return
    _hush()
    if path is None:
        raise UsageError("no PATH", "name a bundle or a report.json")
    text = _report_text(path)
    read = reports.from_json(text)
    if not (html or markdown or junit or json):
        from rich.console import Console

        reports.terminal(read, Console())
    for file, form in ((html, reports.html), (markdown, reports.markdown), (junit, reports.junit)):
        if file:
            _write(file, form(read))
    if json:
        _write(json, text)


def _report_text(path: Path) -> str:
    """The report of a bundle, once that is verified, or the text of a file of its own."""
    from edgebuild import bundle
    from edgebuild.errors import SpecError, UsageError

    try:
        if path.suffix != ".json":
            files = bundle.read(path)
            if "report.json" not in files:
                raise SpecError(f"{path} has no report.json")
            return files["report.json"].decode()
        with path.open("rb") as file:
            data = file.read(REPORT_LIMIT + 1)
        if len(data) > REPORT_LIMIT:
            raise SpecError(f"{path} is larger than {REPORT_LIMIT:,} bytes: that is no report.json")
        return data.decode()
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: the report is not UTF-8: {error.reason}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "name a bundle or a report.json") from None


@app.command()
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
    made = cells.run(spec, jobs, ray, (lambda message, seconds: None) if quiet else _progress)
    if json:
        _write(json, cells.as_json(made))
    if junit:
        _write(junit, cells.junit(spec.output, made))
    if Path("-") not in (json, junit):
        cells.terminal(made, Console())
        print(f"\nThe overview is {spec.output / 'overview.html'}")
    raise typer.Exit(made.exit_code)


@app.command()
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

    _check_writable(output)
    _hush()
    from edgebuild import pipeline, preview

    tell = (lambda message, seconds: None) if quiet else _progress
    found = pipeline.plan(pipeline.Request(task, profile, Path("build"), weights, calibration), tell)
    preview.show(found, Console())
    if found.proposal is None:
        raise typer.Exit(Infeasible.exit_code if found.solve and found.solve.status == "infeasible" else 1)
    if output:
        _write(output, pipeline.plan_json(found.proposal.plan).decode())


@app.command()
def inspect(
    task: TaskArgument,
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help="Predict latency on this target.")] = None,
    weights: WeightsOption = None,
    calibration: CalibrationOption = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads for the predicted latency.")] = 1,
) -> None:
    """Print TASK's layers, channel groups and peak memory."""
    from rich.console import Console

    _hush()
    from edgebuild import catalog
    from edgebuild.inspection import inspect as look

    look(task, [catalog.load_target(name) for name in target or ()], threads, weights, calibration, Console())


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where to write task.py.")] = Path("."),
) -> None:
    """Write a starter task."""
    path = folder / "task.py"
    if path.exists():
        raise UsageError(f"{path} exists already", "choose another folder")
    starter = Path(__file__).with_name("starter.py.txt").read_text(encoding="utf-8")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
    _write(path, starter)
    print(
        f"{path} is written: it builds as it is; put your model in. Next: edgebuild build {folder} --profile mobile-cpu"
    )


@app.command()
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


@cache_app.command("info")
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


@cache_app.command("clear")
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


@app.command()
def check(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder or archive.")],
    profile: Annotated[
        str | None, typer.Option("--profile", "-p", help="Hold it against this profile. [the bundle's own]")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", "-d", help="Measure on this target alone, a name or a path to a TOML. Repeatable."),
    ] = None,
    json: JsonOption = None,
    markdown: MarkdownOption = None,
    junit: Annotated[Path | None, typer.Option(help="Also write a JUnit report here.")] = None,
    require_signature: RequireOption = None,
    inconclusive: InconclusiveOption = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the report.")] = False,
) -> None:
    """Measure BUNDLE's artifact again and hold it against a profile, without the model and its data.

    Exit codes: 0 all budgets met, 1 a budget broken or wrong outputs, 2 bad usage or a damaged bundle, 4 something is
    missing. In a step of GitHub Actions it annotates the run and adds to the job's summary.
    """
    from rich.console import Console

    from edgebuild import checking, report, settings
    from edgebuild.report import gate

    _check_inconclusive(inconclusive)
    files = _load(bundle, require_signature).files
    chosen = settings.read(files, profile or "", device or ())
    with github.plain():
        made = checking.check(files, chosen, (lambda message, seconds: None) if quiet else _progress, not device)
        text = report.to_json(made)
        data = _decoded(text)
        gate.check_terminal(data, Console())
    for path, written in ((json, text), (markdown, gate.check_markdown(data)), (junit, report.junit(data))):
        if path:
            _write(path, written)
    code = _exit_code(made, inconclusive, chosen.calibrated)
    if github.active():
        for status, title, message in gate.check_problems(data):
            print(github.command("error" if status == "fail" or code else "warning", f"edgebuild: {title}", message))
        github.summarize(gate.check_markdown(data))
    raise typer.Exit(code)


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="The bundle that was.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The bundle that is.")],
    max_regression: Annotated[
        list[str] | None,
        typer.Option(
            help="How much worse a figure may be: latency=5%, size=1KiB, accuracy_drop=0.2points; repeatable."
        ),
    ] = None,
    json: JsonOption = None,
    markdown: MarkdownOption = None,
) -> None:
    """Say what changed between two bundles, and whether a figure became worse than allowed.

    Exit codes: 0 no regression beyond what is allowed, 1 there is one or it could not be looked at, 2 bad usage or a
    damaged bundle. Nothing is measured: the figures are those of the two builds.
    """
    from rich.console import Console

    from edgebuild import bundle, report, settings
    from edgebuild.diff import diff as compare
    from edgebuild.diff import parse
    from edgebuild.report import gate

    allowed = [parse(written) for written in max_regression or ()]
    before, after = bundle.read(old), bundle.read(new)
    made = compare(before, after, settings.read(before), settings.read(after), allowed)
    text = report.to_json(made)
    data = _decoded(text)
    with github.plain():
        gate.diff_terminal(data, Console())
    for path, written in ((json, text), (markdown, gate.diff_markdown(data))):
        if path:
            _write(path, written)
    if github.active():
        for title, message in gate.diff_problems(data):
            print(github.command("error", f"edgebuild: {title}", message))
        github.summarize(gate.diff_markdown(data))
    raise typer.Exit(EXIT[made.outcome])


def _decoded(text: str) -> Any:
    import msgspec

    return msgspec.json.decode(text)


@targets_app.command("list")
def targets_list() -> None:
    """List the shipped targets."""
    _list("targets", lambda t: (t.device, t.status, t.title))


@profiles_app.command("list")
def profiles_list() -> None:
    """List the shipped profiles."""
    _list("profiles", lambda p: (", ".join(p.targets), p.artifact, p.title))


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


@targets_app.command("show")
def targets_show(name: str) -> None:
    """Print a target's file, each figure with its source."""
    _show("targets", name)


@targets_app.command("kit")
def targets_kit(
    directory: Annotated[Path, typer.Argument(help="The folder to write, new or empty.")],
    model: Annotated[
        list[str] | None, typer.Option(help="A model to measure, NAME=FILE.pte. [three of torchvision's]")
    ] = None,
    arch: Annotated[str, typer.Option(help="Kinds of machine to bring a runner for: aarch64, x86_64.")] = "aarch64",
) -> None:
    """Write a folder that measures models on a phone or a board, over adb or ssh."""
    _hush()
    from edgebuild import kit

    kit.write(directory, kit.parse(model or ()), [name.strip() for name in arch.split(",")], _say)
    print(f"{directory} is written. Next: {directory}/measure_ssh.sh USER@HOST, or {directory}/measure_adb.sh")


@targets_app.command("calibrate")
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
    fit = calibrate.calibrate(target, catalog.load_timings(measured), models or measured.parent / "models", _say)
    calibrate.show(fit, Console())
    calibrate.write(source, output, fit)
    print(f"{output} is written. Next: name it as the target in a profile")


@profiles_app.command("show")
def profiles_show(name: str) -> None:
    """Print a profile's file."""
    _show("profiles", name)


def _show(kind: str, name: str) -> None:
    from edgebuild import catalog

    {"targets": catalog.load_target, "profiles": catalog.load_profile}[kind](name)  # refuse what cannot be used
    print(catalog.find(kind, name).read_text(encoding="utf-8"), end="")


@keys_app.command("generate")
def keys_generate(
    output: Annotated[Path, typer.Option("--output", "-o", help="The private key's file; .pub is its public half.")],
    encrypt: Annotated[
        bool, typer.Option("--encrypt", help="Ask for a passphrase, or take EDGEBUILD_SIGNING_PASSPHRASE.")
    ] = False,
) -> None:
    """Write a new Ed25519 key pair; a file that is there is never replaced."""
    from edgebuild import signing

    public, keyid = signing.generate(output, _passphrase(confirm=True) if encrypt else None)
    print(f"{output} is written{', encrypted' if encrypt else ''}: keep it secret")
    print(f"{public} is written: hand it to whoever checks bundles (key {keyid[:16]})")


@app.command()
def sign(
    bundle: BundleArgument,
    key: Annotated[
        list[str] | None, typer.Option(help="The private key's file; several sign together. [$EDGEBUILD_SIGNING_KEY]")
    ] = None,
    builder: Annotated[
        str | None, typer.Option(help="A URI for what built it, such as that of the CI workflow.")
    ] = None,
) -> None:
    """Sign a bundle: every file's hash and how it was built, as in-toto / SLSA provenance beside its manifest.

    Exit codes: 0 signed, 2 bad usage or input, 4 the library for signatures is missing.
    """
    from edgebuild import signing

    given = os.environ.get("EDGEBUILD_SIGNING_KEY")  # not typer's: it would split a PEM at its spaces
    signers = [signing.signer(one, _passphrase) for one in key or ([given] if given else [])]
    if not signers:
        raise UsageError("no key to sign with", "give its file with --key, or set EDGEBUILD_SIGNING_KEY")
    signing.sign(bundle, signers, builder or signing.BUILDER)
    print(f"{bundle} is signed by {', '.join(f'key {one.public_key.keyid[:16]}' for one in signers)}")


@app.command("verify-signature")
def verify_signature(
    bundle: BundleArgument,
    key: Annotated[list[Path], typer.Option(help="A public key that is trusted; several where keys change.")],
) -> None:
    """Check that one of the keys signed a bundle, and every file as it is.

    Exit codes: 0 it did, 2 it did not or bad usage, 4 the library for signatures is missing.
    """
    from edgebuild import signing

    signed = signing.verify(bundle, key)
    files = len(signed.bundle.files) + 1  # the manifest
    print(f"{bundle} is signed by {signed.key} (key {signed.keyid[:16]}): all {files} files as signed")


def _passphrase(confirm: bool = False) -> bytes:
    given = os.environ.get("EDGEBUILD_SIGNING_PASSPHRASE")
    if not given and not sys.stdin.isatty():
        raise UsageError("the key needs a passphrase, and nobody is there to ask", "set EDGEBUILD_SIGNING_PASSPHRASE")
    return (given or typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True)).encode()
