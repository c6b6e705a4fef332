"""A runner with a model loaded, wherever it runs: `native/runner.cpp` and its protocol, seen from this side."""

import signal
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgebuild.devices.device import Arrays
from edgebuild.errors import DeviceError
from edgebuild.spec import Measurement, Method
from edgebuild.units import Bytes

TIMEOUT = 300.0  # seconds for loading, and for each inference; mobilenet_v2 takes about 2

# Numbers of ExecuTorch's ScalarType (runtime/core/portable_type/scalar_type.h).
_DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<i2"),
    3: np.dtype("<i4"),
    4: np.dtype("<i8"),
    5: np.dtype("<f2"),
    6: np.dtype("<f4"),
    7: np.dtype("<f8"),
    11: np.dtype("?"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_TIMED = 2**32 - 1  # opens a request for timed inferences

# What heap is for, in the order of the protocol: the file's bytes that are held; what XNNPACK makes of them; the
# planned buffers; what XNNPACK takes while running; everything else.
KINDS = ("program", "weights", "arena", "workspace", "runtime")


@dataclass(frozen=True)
class Heap:
    """Bytes of heap above a runtime without a model, and their split by KINDS, each counted on its own."""

    total: int = 0
    split: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = (f"{name} {Bytes(size)}" for name, size in self.split.items() if size)
        return f"{Bytes(self.total)} ({', '.join(parts)})"


@dataclass
class Guest:
    """The runner, with a model loaded; `native/runner.cpp` describes the protocol.

    `loading` is the heap at the peak of loading, `held` what stayed of it, `running` that of the largest inference.
    `lost` is the exit code of `process` where that is only a connection to the runner, and it broke.
    """

    what: str
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    lost: int | None = None
    midr: int = 0
    loading: Heap = Heap()
    held: Heap = Heap()
    running: Heap = Heap()
    timed_out: bool = field(default=False, init=False)

    @property
    def most(self) -> Heap:
        """The heap at its highest so far."""
        return max(self.loading, self.running, key=lambda heap: heap.total)

    @property
    def peak(self) -> int:
        return self.most.total

    def run(self, inputs: Arrays) -> Arrays:
        """One inference, on arrays of the model's own dtypes and shapes.

        Raises DeviceError where the model does not take them, or the process fails or hangs.
        """
        request = _pack(inputs)
        with self._watched():
            self._stdin.write(request)
            self._stdin.flush()
            heap = self._read_heap()
            outputs = self._read_tensors()
        self.running = max(self.running, heap, key=lambda heap: heap.total)
        return outputs

    def run_many(self, samples: Sequence[Arrays]) -> list[Arrays]:
        """One inference after another, as `run` does."""
        return [self.run(inputs) for inputs in samples]

    def time(self, inputs: Arrays, warm_ups: int, runs: int) -> NDArray[np.int64]:
        """Nanoseconds of each of `runs` inferences on the same inputs, after `warm_ups` that are not timed.

        Raises DeviceError as `run` does.
        """
        request = struct.pack("<III", _TIMED, warm_ups, runs) + _pack(inputs)
        with self._watched():
            self._stdin.write(request)
            self._stdin.flush()
            return np.frombuffer(self._read_bytes(8 * runs), "<i8")

    @property
    def memory(self) -> str:
        """What `peak` is made of, in words."""
        return (
            f"heap above an empty runtime: {self.loading} while loading, of which {Bytes(self.held.total)} stay; "
            f"{self.running} during inference"
        )

    def peak_memory(self, target: str, method: Method) -> Measurement:
        most = self.most
        split = {kind: float(size) for kind, size in most.split.items()}
        return Measurement(target, "peak_memory", float(most.total), method, detail=self.memory, split=split)

    def greet(self) -> None:
        """Wait until the model is loaded."""
        with self._watched():
            (self.midr,) = self._read("<I")
            self.loading, self.held = self._read_heap(), self._read_heap()

    @property
    def _stdin(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin

    def _read(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self._read_bytes(struct.calcsize(form)))

    def _read_bytes(self, size: int) -> bytes:
        assert self.process.stdout is not None
        data = self.process.stdout.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def _read_heap(self) -> Heap:
        total, *parts = self._read(f"<{1 + len(KINDS)}q")
        return Heap(total, dict(zip(KINDS, parts, strict=True)))

    def _read_tensors(self) -> Arrays:
        arrays: list[NDArray[Any]] = []
        for _ in range(*self._read("<I")):
            code, rank = self._read("<II")
            if code not in _DTYPES:
                raise DeviceError(f"{self.what}: output {len(arrays)} has a dtype that numpy lacks (ScalarType {code})")
            shape, dtype = self._read(f"<{rank}Q"), _DTYPES[code]
            data = self._read_bytes(dtype.itemsize * prod(shape))
            arrays.append(np.frombuffer(bytearray(data), dtype).reshape(shape))
        return tuple(arrays)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """End the process where it takes too long, and turn its end into a DeviceError that says why."""
        timer = threading.Timer(TIMEOUT, self._give_up)
        timer.start()
        try:
            yield
        except (EOFError, BrokenPipeError):
            raise DeviceError(self._epitaph()) from None
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        self.timed_out = True
        self.process.kill()

    def _epitaph(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        code = self.process.returncode
        if self.timed_out:
            how = f"did not answer within {TIMEOUT:g} s"
        elif code == self.lost:
            how = "is out of reach: the connection was lost"
        elif (number := _signal(code)) is not None:
            how = f"was ended by {number.name}"
        else:
            how = f"ended with exit code {code}"
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"{self.what}: the runner {how}" + (f": {lines[-1].strip()}" if lines else "")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):
            self._stdin.close()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.close()


@contextmanager
def start(
    command: list[str], what: str, environment: dict[str, str] | None, lost: int | None = None
) -> Iterator[Guest]:
    """Start a runner and wait until it has loaded its model; it is ended with the block.

    Without an `environment` it has that of this process.
    """
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the guest
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
        )
    except OSError as error:
        errors.close()
        raise DeviceError(f"{what}: {command[0]} cannot be started: {error}") from None
    guest = Guest(what, process, errors, lost)
    try:
        guest.greet()
        yield guest
    finally:
        guest.close()


def _signal(code: int | None) -> signal.Signals | None:
    """The signal that ended a process, from its exit code or the one that a shell makes of it."""
    with suppress(ValueError):
        if code is not None and (code < 0 or code > 128):
            return signal.Signals(-code if code < 0 else code - 128)
    return None


def _pack(inputs: Arrays) -> bytes:
    parts = [struct.pack("<I", len(inputs))]
    for position, array in enumerate(inputs):
        dtype = array.dtype.newbyteorder("<")
        if dtype not in _CODES:
            raise DeviceError(f"input {position} has dtype {array.dtype}, which no artifact takes")
        parts.append(struct.pack(f"<II{array.ndim}Q", _CODES[dtype], array.ndim, *array.shape))
        parts.append(array.astype(dtype, copy=False).tobytes())
    return b"".join(parts)
