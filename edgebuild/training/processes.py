"""Processes that train together under any launcher (`torchrun`, `accelerate launch`), by Hugging Face's accelerate.

The first process runs the build; the others wait for trainings to take part in. All of them make the same batches, and
each trains on its part of every batch: with the gradients' mean and shared batch statistics, that is the training of
one process.
"""

import os
import pickle
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Value = TypeVar("Value")

PATIENCE = timedelta(hours=24)  # that a process waits for the first one, which lowers and measures between trainings


def count() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number; 0 leads."""
    return int(os.environ.get("RANK", "0"))


@cache
def accelerator() -> Any:
    """This process's accelerate.Accelerator; the first call joins the others."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])


def device() -> torch.device:
    """Where this process trains."""
    if count() > 1:
        found: torch.device = accelerator().device
        return found
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tell(work: Any) -> None:
    """From the first process: hand the others what to do next; None lets them go."""
    if count() > 1 and rank() == 0:
        _broadcast([pickle.dumps(work)])


def wait() -> Any:
    """In the other processes: what to do next, or None at the end."""
    return pickle.loads(_broadcast([None])[0])  # from a process of the same launch


def agree(value: Value) -> Value:
    """The first process's value, in all of them: what depends on time or on files must not differ."""
    found: Value = _broadcast([value])[0] if count() > 1 else value
    return found


def mean(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes."""
    if count() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / count()


def part(inputs: tuple[Tensor, ...], labels: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor | None, float]:
    """This process's rows of a batch, and by what its mean loss counts in the mean over all rows."""
    if count() == 1:
        return inputs, labels, 1.0
    rows = len(inputs[0])
    if rows < count():
        # too few to share: each trains on all of them, and only the running variances come out a hair different
        return inputs, labels, 1.0
    cut = slice(rank() * rows // count(), (rank() + 1) * rows // count())
    share = (cut.stop - cut.start) * count() / rows
    return tuple(x[cut] for x in inputs), labels[cut] if labels is not None else None, share


def prepared(model: nn.Module) -> nn.Module:
    """The model for training with the others: gradients are averaged. What was prepared before is no more."""
    if count() == 1:
        return model
    accelerator().free_memory()
    prepared: nn.Module = accelerator().prepare_model(model)
    return prepared


def _broadcast(values: list[Any]) -> list[Any]:
    from accelerate.utils import broadcast_object_list

    accelerator()
    found: list[Any] = broadcast_object_list(values, from_process=0)
    return found
