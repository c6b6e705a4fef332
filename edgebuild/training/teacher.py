"""What the teacher says of each batch, computed once and kept: training repeats the task's batches over and over.

Kept by the batch's content, so that nothing has to be known of how the task makes its batches: every round, finish and
profile that meets the same batch takes the same outputs, and the features with them where they are few.
"""

import contextlib
import hashlib
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from edgebuild import cache
from edgebuild.training.compiled import Answering

KIND = "teacher"
FEATURE = "read by "
MOST_KEPT = 512 * 2**20  # bytes of what one teacher said
FEW = 1024  # features of a sample, to be kept with its outputs


@dataclass(frozen=True)
class Taught:
    """What a teacher says of a batch: its outputs, and what its layers read, by their names. Detached."""

    outputs: tuple[Tensor, ...]
    features: Mapping[str, Tensor]


UNTAUGHT = Taught((), {})


class Teacher:
    """A model whose outputs are remembered. `digest` says which model it is; "" remembers nothing.

    It also says what its `layers` read. `kept` counts the batches that were remembered at the start, `computed` and
    `recalled` those since then. `answering`: how it computes; what was remembered in another precision is still
    taken.
    """

    def __init__(self, model: nn.Module, digest: str = "", layers: tuple[str, ...] = ()):
        self.model, self.layers = model.eval(), layers
        self.answering = Answering(self.model, layers)
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

    def __call__(self, inputs: tuple[Tensor, ...]) -> Taught:
        """What it says of a batch, computed where it is not remembered."""
        key = _digest(inputs) if self._store is not None else b""
        taught = self._read(key)
        if taught is not None:
            self.recalled += 1
            device = inputs[0].device
            features = {name: x.to(device) for name, x in taught.features.items()}
            return Taught(tuple(y.to(device) for y in taught.outputs), features)
        taught = self.computed_for(inputs)
        self._write(key, taught)
        return taught

    def remembers(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether a batch's outputs were kept."""
        return self._read(_digest(inputs)) is not None

    def computed_for(self, inputs: tuple[Tensor, ...]) -> Taught:
        """What it says of a batch, computed in any case."""
        self.computed += 1
        told = tuple(y.float() if y.dtype == torch.bfloat16 else y for y in self.answering(inputs))
        outputs = len(told) - len(self.layers)
        return Taught(told[:outputs], dict(zip(self.layers, told[outputs:], strict=True)))

    def _read(self, key: bytes) -> Taught | None:
        if self._store is None:
            return None
        try:
            row = self._store.execute("SELECT tensors FROM outputs WHERE batch = ?", (key,)).fetchone()
            tensors: Mapping[str, Tensor] = load(row[0]) if row else {}
        except Exception:  # damaged, in whatever way: it is computed again
            self._store = None
            return None
        features = {name: tensors[FEATURE + name] for name in self.layers if FEATURE + name in tensors}
        if not tensors or len(features) < len(self.layers):
            return None
        return Taught(tuple(tensors[name] for name in sorted(tensors) if not name.startswith(FEATURE)), features)

    def _write(self, key: bytes, taught: Taught) -> None:
        if self._store is None or self._size > MOST_KEPT:
            return
        if sum(x[0].numel() for x in taught.features.values()) > FEW:
            return
        tensors = {f"{i:03}": y for i, y in enumerate(taught.outputs)}
        tensors |= {FEATURE + name: x for name, x in taught.features.items()}
        data = save({name: x.contiguous().cpu() for name, x in tensors.items()})
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
