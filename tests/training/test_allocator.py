import platform
import resource

import pytest
import torch

from edgebuild.training import allocator


def faults() -> int:
    """Pages that the system gives for a tensor of 64 MiB, which is freed again."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(1 << 24).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's memory is left as it is")
def test_what_is_freed_is_used_again_in_the_block_and_given_back_after_it():
    anew = faults()
    with allocator.kept_memory():
        faults()
        again = faults()
    assert again * 10 < anew
    assert faults() * 2 > anew
