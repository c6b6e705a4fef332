"""One measurement at a time on a machine: builds that measured at once would slow each other down without knowing."""

import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def turn(machine: str) -> Iterator[None]:
    """Wait until no other build of this user measures on a machine. The kernel ends the turn of a process that dies."""
    # not in the cache: two builds may have two caches, or one that machines share
    folder = Path(tempfile.gettempdir()) / f"edgebuild-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with (folder / f"measuring-{machine.replace('/', '_')}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another build that measures on {machine}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
