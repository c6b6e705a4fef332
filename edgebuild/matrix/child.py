"""A program of its own: becomes `edgebuild`, alone on its log, and gone with the process that started it.

Its arguments are the process that started it, the log, and those of `edgebuild`.
"""

import ctypes
import fcntl
import os
import shlex
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)


def main(parent: int, log: str, arguments: list[str]) -> None:
    """Run `edgebuild` with these arguments in the place of this process, its output in the log."""
    # The kernel ends this process when its parent ends, however that comes: a killed matrix leaves no builds behind.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        sys.exit(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C while it waits for the log is no traceback
    # The log is the lock: two runs of a matrix do not build a cell at once, and the later one finds it up to date. It
    # is opened twice, as what the build starts gets its output and not the lock.
    lock = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.ftruncate(lock, 0)
    os.set_inheritable(lock, True)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    print(shlex.join(["edgebuild", *arguments]), flush=True)
    os.execv(sys.executable, [sys.executable, "-P", "-m", "edgebuild", *arguments])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
