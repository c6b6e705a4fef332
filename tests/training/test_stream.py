import random

import numpy as np
import pytest
import torch

from edgebuild.errors import TaskError
from edgebuild.training.stream import Stream


def drawn():
    """Batches from all three global generators."""
    for _ in range(3):
        yield torch.rand(2, 1) + torch.tensor([[random.random(), np.random.rand()]])


def take(stream, count):
    return [next(stream)[0][0] for _ in range(count)]


def test_batches_do_not_depend_on_what_is_drawn_between_them():
    plain = take(Stream(drawn, False, 0), 5)
    stream, found = Stream(drawn, False, 0), []
    for _ in range(5):
        found += take(stream, 1)
        torch.rand(7), random.random(), np.random.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert not torch.equal(plain[0], plain[3])  # the second time round is drawn anew
    assert not torch.equal(plain[0], take(Stream(drawn, False, 1), 1)[0])


def test_the_caller_s_generators_are_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    take(Stream(drawn, False, 0), 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_skipping_gives_what_would_have_come():
    stream = Stream(drawn, False, 0)
    stream.skip(4)
    assert torch.equal(take(stream, 1)[0], take(Stream(drawn, False, 0), 5)[4])


def test_a_broken_batch_says_what_is_wrong():
    with pytest.raises(TaskError, match="not \\(inputs, labels\\)"):
        next(Stream(drawn, True, 0))
    with pytest.raises(TaskError, match="are empty"):
        next(Stream(list, False, 0))
