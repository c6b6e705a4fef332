"""The commands that take a bundle or its report; none of them loads torch."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgebuild import github
from edgebuild.cli.options import (
    EXIT,
    BundleArgument,
    InconclusiveOption,
    JsonOption,
    MarkdownOption,
    RequireOption,
    check_inconclusive,
    exit_code,
    hush,
    progress,
    write,
)
from edgebuild.errors import SpecError, UsageError

REPORT_LIMIT = 64 << 20  # bytes; that of a model with a thousand layers has some four million


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
    hush()
    if path is None:
        raise UsageError("no PATH", "name a bundle or a report.json")
    text = _report_text(path)
    read = reports.from_json(text)
    if not (html or markdown or junit or json):
        from rich.console import Console

        reports.terminal(read, Console())
    for file, form in ((html, reports.html), (markdown, reports.markdown), (junit, reports.junit)):
        if file:
            write(file, form(read))
    if json:
        write(json, text)


def _report_text(path: Path) -> str:
    """The report of a bundle, once that is verified, or the text of a file of its own."""
    from edgebuild import bundle
    from edgebuild.errors import UsageError

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

    check_inconclusive(inconclusive)
    files = _load(bundle, require_signature).files
    chosen = settings.read(files, profile or "", device or ())
    with github.plain():
        made = checking.check(files, chosen, (lambda message, seconds: None) if quiet else progress, not device)
        text = report.to_json(made)
        data = _decoded(text)
        gate.check_terminal(data, Console())
    for path, written in ((json, text), (markdown, gate.check_markdown(data)), (junit, report.junit(data))):
        if path:
            write(path, written)
    code = exit_code(made, inconclusive, chosen.calibrated)
    if github.active():
        for status, title, message in gate.check_problems(data):
            print(github.command("error" if status == "fail" or code else "warning", f"edgebuild: {title}", message))
        github.summarize(gate.check_markdown(data))
    raise typer.Exit(code)


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
            write(path, written)
    if github.active():
        for title, message in gate.diff_problems(data):
            print(github.command("error", f"edgebuild: {title}", message))
        github.summarize(gate.diff_markdown(data))
    raise typer.Exit(EXIT[made.outcome])


def _decoded(text: str) -> Any:
    import msgspec

    return msgspec.json.decode(text)


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


def _passphrase(confirm: bool = False) -> bytes:
    given = os.environ.get("EDGEBUILD_SIGNING_PASSPHRASE")
    if not given and not sys.stdin.isatty():
        raise UsageError("the key needs a passphrase, and nobody is there to ask", "set EDGEBUILD_SIGNING_PASSPHRASE")
    return (given or typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True)).encode()
