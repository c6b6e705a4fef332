"""A training's state on disk, in the cache: what a killed training goes on from."""

import io
from typing import Any

import torch

from edgebuild import cache

KIND = "training"


def write(name: str, state: dict[str, Any]) -> None:
    """Keep tensors and plain values under a name, in place of what was there; a reader never sees half of them."""
    file = io.BytesIO()
    torch.save(state, file)
    cache.write(KIND, name, file.getvalue())


def read(name: str) -> dict[str, Any] | None:
    """What was kept, or None: nothing was, or it is damaged. Nothing but tensors and plain values is unpickled."""
    data = cache.read(KIND, name)
    if data is None:
        return None
    try:
        state = torch.load(io.BytesIO(data), weights_only=True)
    except Exception:  # damaged, in whatever way: the training starts anew
        return None
    return state if isinstance(state, dict) else None


def remove(name: str) -> None:
    """Forget a training that came to its end."""
    cache.remove(KIND, name)
