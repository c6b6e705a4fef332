"""Runs a Python file whose input is not trusted: `confine.py MEMORY FILE ARGUMENT...`.

The process may write no file, start no program, make no TCP connection (Landlock, landlock(7)) and take no more than
MEMORY bytes of its own; a crash leaves no core. Reading stays possible. Without Landlock in the kernel, the rest holds.
"""

import ctypes
import os
import resource
import runpy
import struct
import sys

_CREATE_RULESET, _RESTRICT_SELF = 444, 446  # system calls, the same on every architecture
_NO_NEW_PRIVILEGES = 38  # prctl(2)
# LANDLOCK_ACCESS_FS_: all that execute, write, make or remove, and what each version of the interface added
_DENIED = 0b1_1111_1111_0011
_ADDED = {2: 1 << 13, 3: 1 << 14, 5: 1 << 15}  # REFER, TRUNCATE, IOCTL_DEV
_TCP = 0b11  # LANDLOCK_ACCESS_NET_BIND_TCP and _CONNECT_TCP, since version 4
LONGEST_STDERR = 1 << 20  # bytes: stderr is a file


def landlock() -> int:
    """The version of the kernel's Landlock, 0 where it has none."""
    return max(0, ctypes.CDLL(None).syscall(_CREATE_RULESET, None, 0, 1))


def confine(memory: int) -> None:
    """Confine this process and the threads that it starts from now on; raises OSError where the kernel refuses."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LONGEST_STDERR, LONGEST_STDERR))
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    version = landlock()
    if not version:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    denied = _DENIED | sum(right for since, right in _ADDED.items() if version >= since)
    rights = struct.pack("<QQ", denied, _TCP if version >= 4 else 0)
    ruleset = libc.syscall(_CREATE_RULESET, rights, len(rights) if version >= 4 else 8, 0)
    if ruleset < 0 or libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.syscall(_RESTRICT_SELF, ruleset, 0):
        raise OSError(ctypes.get_errno(), "Landlock refused")
    os.close(ruleset)


if __name__ == "__main__":
    confine(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
