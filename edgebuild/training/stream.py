"""The task's training batches without end, from random numbers of their own, so that a training can go on after a kill.

The task may draw from Python's, NumPy's and PyTorch's global generators: they are seeded once, and what the model draws
(dropout) comes from other states. Batch n is then the same whether or not the batches before it were trained on.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgebuild.errors import TaskError


class Stream:
    """`next()` gives (inputs, labels) of a batch; labels are None where the task has none. Raises TaskError."""

    def __init__(self, batches: Callable[[], Iterable[Any]], labelled: bool, seed: int):
        self._labelled = labelled
        self._batches = _forever(batches)
        with _Generators(None) as generators:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        self._state = generators.left

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
        return self

    def __next__(self) -> tuple[tuple[Tensor, ...], Tensor | None]:
        with _Generators(self._state) as generators:
            batch = next(self._batches)
        self._state = generators.left
        return split(batch, self._labelled)

    def skip(self, batches: int) -> None:
        """Leave batches out."""
        for _ in range(batches):
            next(self)


class _Generators:
    """Swaps the global generators' states in for a block; `left` is how the block left them."""

    def __init__(self, state: Any):
        self._state = state
        self.left: Any = None

    def __enter__(self) -> "_Generators":
        self._outside = _states()
        if self._state is not None:
            _set(self._state)
        return self

    def __exit__(self, *error: object) -> None:
        self.left = _states()
        _set(self._outside)


def _states() -> Any:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set(states: Any) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def split(batch: Any, labelled: bool) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The inputs of a batch as a tuple, and its labels where there are any."""
    if labelled:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TaskError("a training batch is not (inputs, labels)", "set labelled=False, or give pairs")
        inputs, labels = batch
    else:
        inputs, labels = batch, None
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), labels


def _forever(batches: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches():
            empty = False
            yield batch
        if empty:
            raise TaskError("the task's training batches are empty", "check what train() gives")
