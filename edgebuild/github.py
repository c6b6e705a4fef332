"""What a step of GitHub Actions tells the runner: annotations and the summary of the job.

Workflow commands are lines on stdout (docs.github.com, "Workflow commands for GitHub Actions"). Texts out of a bundle
are not ours: they are escaped, and what is printed beside the commands is kept from being read as one.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from edgebuild.errors import UsageError

SUMMARY_LIMIT = 1 << 20  # bytes; GitHub refuses more

_MESSAGE = str.maketrans({"%": "%25", "\r": "%0D", "\n": "%0A"})
_PROPERTY = _MESSAGE | str.maketrans({":": "%3A", ",": "%2C"})


def active() -> bool:
    """Whether this process is a step of a GitHub workflow."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def command(kind: Literal["error", "warning", "notice"], title: str, message: str) -> str:
    """An annotation, as a line to print."""
    return f"::{kind} title={title.translate(_PROPERTY)}::{message.translate(_MESSAGE)}"


@contextmanager
def plain() -> Iterator[None]:
    """Nothing that is printed within is a command to the runner."""
    if not active():
        yield
        return
    word = secrets.token_hex(16)
    print(f"::stop-commands::{word}", flush=True)
    try:
        yield
    finally:
        print(f"::{word}::", flush=True)


def summarize(markdown: str) -> None:
    """Add to the summary of the job. Raises UsageError where its file cannot be written."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    if len(markdown.encode()) > SUMMARY_LIMIT:
        markdown = "The report is too long for a summary; see the Markdown file.\n"
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{markdown}\n")
    except OSError as error:
        raise UsageError(f"cannot write GITHUB_STEP_SUMMARY at {path}: {error.strerror}") from None
