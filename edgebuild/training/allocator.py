"""The C library's allocator in a training, each of whose steps needs the memory that the one before it gave back."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3); in bytes
MOST = 2**31 - 1
LARGEST_OF_ITS_OWN = 32 << 20  # the threshold for mmap up to which glibc goes by itself; for trimming twice as much


@contextmanager
def kept_memory() -> Iterator[None]:
    """In a block, what is freed stays with the process; afterwards it goes back to the system.

    glibc asks the system for the memory of large tensors anew at every step, and the system clears each of its pages:
    a quarter of a step of a small student. Other C libraries are left as they are.
    """
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    libc.mallopt(M_TRIM_THRESHOLD, MOST)
    libc.mallopt(M_MMAP_THRESHOLD, MOST)
    try:
        yield
    finally:
        libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_OF_ITS_OWN)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_OF_ITS_OWN)
        libc.malloc_trim(0)
