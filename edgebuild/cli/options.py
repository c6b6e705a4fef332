"""Options and output that commands share. Nothing here loads torch."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from edgebuild.errors import BudgetBroken, Infeasible, UsageError

EXIT = {"met": 0, "broken": BudgetBroken.exit_code, "infeasible": Infeasible.exit_code}
TaskArgument = Annotated[
    str, typer.Argument(metavar="TASK", help="A Python file, a folder with task.py, a .pt2 file or torchvision:NAME.")
]
ProfileOption = Annotated[str, typer.Option("--profile", "-p", help="A shipped profile's name, or a path to a TOML.")]
WeightsOption = Annotated[str | None, typer.Option(help="Weights of a torchvision model: safetensors or a state dict.")]
CalibrationOption = Annotated[
    str | None,
    typer.Option(help="Calibration inputs for torchvision models and .pt2 files: .npz or a folder of images."),
]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder, or its archive to verify.")]
RequireOption = Annotated[
    list[Path] | None,
    typer.Option(metavar="KEY", help="Refuse a bundle that none of these public keys has signed. Repeatable."),
]
InconclusiveOption = Annotated[
    str, typer.Option(help="What a budget that cannot be decided means: fail, warn, or by the target's status (auto).")
]
JsonOption = Annotated[Path | None, typer.Option(help="Also write the figures here, as JSON.")]
MarkdownOption = Annotated[Path | None, typer.Option(help="Also write a comment for a pull request here.")]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def progress(message: str, seconds: float) -> None:
    print(f"[{seconds:6.1f} s] {message}", file=sys.stderr, flush=True)


def hush() -> None:
    """Keep what the libraries warn each other about off the terminal: none of it is about the user's model."""
    import logging
    import warnings

    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    for name in ("torchao", "torch.utils._pytree", "torch.export", "executorch", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)


def check_inconclusive(value: str) -> None:
    if value not in ("auto", "fail", "warn"):
        raise UsageError(f"--inconclusive {value!r}", "use auto, fail or warn")


def exit_code(made: Any, inconclusive: str, calibrated: bool) -> int:
    """0, 1 or 3; an undecided budget fails on a calibrated target and warns on another, unless told otherwise."""
    if made.outcome == "inconclusive":
        fails = calibrated if inconclusive == "auto" else inconclusive == "fail"
        say(f"{'error' if fails else 'warning'}: {made.summary}")
        return BudgetBroken.exit_code if fails else 0
    return EXIT[made.outcome]


def check_writable(path: Path | None) -> None:
    """Raise the UsageError that `write` would raise, before the long work."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder", "name a file in it")
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}", "make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"cannot write {path}: it is read-only", "name another file")


def write(path: Path, text: str) -> None:
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
