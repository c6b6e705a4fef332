"""The commands: parse, call, print, exit. Whatever loads torch is imported inside the command that needs it."""

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from edgebuild import __version__, github
from edgebuild.cli import build, bundles, shelf
from edgebuild.cli.options import say
from edgebuild.errors import EdgebuildError

INTERRUPTED = 130
STOPPED = "interrupted: nothing is left half-written"
NO_READER = 141  # 128 + SIGPIPE
BUG = 70  # EX_SOFTWARE: never the code of a broken budget
# What a path or a disk is to blame for.
_OF_THE_SYSTEM = {
    getattr(errno, name)
    for name in ["ENAMETOOLONG", "ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "ELOOP", "EMFILE"]
}

Commands = dict[str, Callable[..., Any]]

# In the order of the help.
COMMANDS: Commands = {
    "init": build.init,
    "inspect": build.inspect,
    "plan": build.plan,
    "build": build.build,
    "matrix": build.matrix,
    "report": bundles.report,
    "check": bundles.check,
    "diff": bundles.diff,
    "pack": bundles.pack,
    "verify-bundle": bundles.verify_bundle,
    "sign": bundles.sign,
    "verify-signature": bundles.verify_signature,
    "doctor": shelf.doctor,
}
GROUPS: dict[str, tuple[str, Commands]] = {
    "targets": (
        "The hardware that budgets are checked on.",
        {
            "list": shelf.targets_list,
            "show": shelf.targets_show,
            "kit": shelf.targets_kit,
            "calibrate": shelf.targets_calibrate,
        },
    ),
    "profiles": ("Targets with budgets.", {"list": shelf.profiles_list, "show": shelf.profiles_show}),
    "keys": ("Keys to sign bundles with.", {"generate": bundles.keys_generate}),
    "cache": (
        "What earlier builds made, kept for later ones.",
        {"info": shelf.cache_info, "clear": shelf.cache_clear},
    ),
}


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
        say(f"error: {line}")
        if github.active():
            print(github.command("error", "edgebuild", line))
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        say(STOPPED)
        sys.exit(INTERRUPTED)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer ends a Ctrl-C by itself, silently
            say(STOPPED)
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
            say(f"error: {error.filename or 'the output cannot be written'}: {error.strerror}")
            sys.exit(EdgebuildError.exit_code)
        import traceback

        traceback.print_exc()
        say("error: this is a defect of edgebuild, not of your task; please report it with the lines above")
        sys.exit(BUG)


def _leave() -> NoReturn:
    """End as a program does whose reader went away, such as `head`."""
    _discard()
    sys.exit(NO_READER)


def _discard() -> None:
    """Let Python not try, and complain, again when it ends."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _version(value: bool) -> None:
    if value:
        print(f"edgebuild {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _assembled() -> typer.Typer:
    app = typer.Typer(
        help="make for edge models: builds a trained model down to a device's budgets, and proves it.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        callback=_options,
    )
    for name, command in COMMANDS.items():
        app.command(name)(command)
    for name, (what, commands) in GROUPS.items():
        group = typer.Typer(help=what, no_args_is_help=True)
        for verb, command in commands.items():
            group.command(verb)(command)
        app.add_typer(group, name=name)
    return app


app = _assembled()
