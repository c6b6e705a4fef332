"""The teacher's outputs, computed once for each batch and kept: training repeats the task's batches over and over.

Kept by the batch's content, so that nothing has to be known of how the task makes its batches: every round, finish and
profile that meets the same batch takes the same outputs.
"""

import contextlib
import hashlib
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from edgebuild import cache
from edgebuild.lift import outputs_of

KIND = "teacher"
MOST_KEPT = 512 * 2**20  # bytes of one teacher's outputs


class Teacher:
    """A model whose outputs are remembered. `digest` says which model it is; "" remembers nothing.

    `kept` counts the batches that were remembered at the start, `computed` and `recalled` those since then. With `bf16`
    it computes in that, where the CPU is faster with it; what was remembered in another precision is still taken.
    """

    def __init__(self, model: nn.Module, digest: str = ""):
        self.model, self.bf16 = model.eval(), False
        self.kept = self.computed = self.recalled = 0
        self._store: sqlite3.Connection | None = None
        self._size = 0
        if digest:
            name = f"{digest}.sqlite"
            path = cache.find(KIND, name) or cache.root() / KIND / name
            try:
                self._open(_writable(path))
            except (OSError, sqlite3.Error) as error:
                cache.not_kept(error)
                with contextlib.suppress(OSError, sqlite3.Error):  # it costs time, no more
                    self._open(_readable(path) if path.exists() else _writable(cache.aside(KIND) / name))

    def _open(self, store: sqlite3.Connection) -> None:
        counted = store.execute("SELECT COUNT(*), COALESCE(SUM(LENGTH(tensors)), 0) FROM outputs").fetchone()
        self.kept, self._size = counted
        self._store = store

    def __call__(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs for a batch, detached."""
        key = _digest(inputs) if self._store is not None else b""
        found = self._read(key)
        if found is not None:
            self.recalled += 1
            return found
        outputs = self.outputs(inputs)
        self._write(key, outputs)
        return outputs

    def remembers(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether a batch's outputs were kept."""
        return self._read(_digest(inputs)) is not None

    def outputs(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs for a batch, computed in any case: whoever wants the model's features needs its forward pass."""
        self.computed += 1
        with torch.no_grad(), torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=self.bf16):
            results = outputs_of(self.model(*inputs))
        return tuple(y.float() if y.dtype == torch.bfloat16 else y for y in results)

    def _read(self, key: bytes) -> tuple[Tensor, ...] | None:
        if self._store is None:
            return None
        try:
            row = self._store.execute("SELECT tensors FROM outputs WHERE batch = ?", (key,)).fetchone()
            tensors: Mapping[str, Tensor] = load(row[0]) if row else {}
        except Exception:  # damaged, in whatever way: it is computed again
            self._store = None
            return None
        return tuple(tensors[name] for name in sorted(tensors)) or None

    def _write(self, key: bytes, outputs: tuple[Tensor, ...]) -> None:
        if self._store is None or self._size > MOST_KEPT:
            return
        data = save({f"{i:03}": y.contiguous().cpu() for i, y in enumerate(outputs)})
        try:
            self._store.execute("INSERT OR REPLACE INTO outputs VALUES (?, ?)", (key, data))
            self._size += len(data)
        except sqlite3.Error as error:  # the disk is full, or the cache is read-only, or somebody deleted it
            cache.not_kept(error)
            self._size = MOST_KEPT + 1


def _writable(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    store = sqlite3.connect(path, timeout=10, isolation_level=None)
    store.execute("PRAGMA journal_mode=WAL")
    store.execute("PRAGMA synchronous=OFF")
    store.execute("CREATE TABLE IF NOT EXISTS outputs (batch BLOB PRIMARY KEY, tensors BLOB)")
    return store


def _readable(path: Path) -> sqlite3.Connection:
    """What is there in a cache that cannot be written, where nothing is left to be put in order first."""
    if path.with_name(f"{path.name}-wal").exists():
        raise sqlite3.OperationalError("a write-ahead log is left")
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None)


def _digest(inputs: tuple[Tensor, ...]) -> bytes:
    digest = hashlib.blake2b(digest_size=20)
    for x in inputs:
        digest.update(f"{tuple(x.shape)} {x.dtype}".encode())
        digest.update(_bytes(x))
    return digest.digest()


def _bytes(x: Tensor) -> Any:
    return x.detach().cpu().contiguous().view(torch.uint8).numpy().data if x.dim() else x.cpu().numpy().tobytes()
