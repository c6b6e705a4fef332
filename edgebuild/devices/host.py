"""The machine that builds. `.pte` and `.bpte` files run in ExecuTorch's Python runtime, `.pt` files in TorchScript.

An artifact runs in a process of its own, so that a crash or a hang is a finding and not the end.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from math import inf
from pathlib import Path
from time import monotonic
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as tensors

from edgebuild.devices import confine, host_rates, host_worker, layer_model, probes, timing
from edgebuild.devices.device import Arrays
from edgebuild.devices.turn import turn
from edgebuild.errors import DeviceError, MissingEnvironment
from edgebuild.spec import CalibrationError, LayerFacts, Measurement, Precision, Target
from edgebuild.units import Bytes

TIMEOUT = 120.0  # seconds for an answer, and for starting, which is an import of torch
SHARE = 0.5  # seconds for a request of `run_many`: short, so that the time-out tells a long evaluation from a hang
MOST_BYTES = 64 << 20  # of the samples in such a request
# The best of several rounds, each over all methods: another process's burst of work must not hit all runs of a method.
CALIBRATION_ROUNDS, CALIBRATION_TIME, CALIBRATION_QUANTILE = 4, 0.006, 0.2


def check(target: Target) -> None:
    """Raise MissingEnvironment where the runtimes are not installed or the system is not Linux."""
    if not sys.platform.startswith("linux"):
        raise MissingEnvironment(f"target {target.name!r} reads memory from /proc", "run edgebuild on Linux")
    for name in ("torch", "executorch"):
        if importlib.util.find_spec(name) is None:
            raise MissingEnvironment(f"{name} is not installed for {sys.executable}", "pip install edgebuild")


@dataclass
class Worker:
    """A process that holds an artifact; `host_worker` describes the protocol. No answer is longer than `most` bytes."""

    what: str
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    most: int = sys.maxsize
    timed_out: bool = field(default=False, init=False)

    def run(self, inputs: Arrays) -> Arrays:
        """One inference; arrays of the model's own dtypes and shapes. Raises DeviceError where it fails or hangs."""
        return self.ask("run", inputs)[1]

    def run_many(self, samples: Sequence[Arrays]) -> list[Arrays]:
        """One inference after another, many to a request, so that the exchange does not outweigh small models.

        All samples have the shapes that the artifact was lowered for. Raises DeviceError as `run` does.
        """
        outputs: list[Arrays] = []
        count = 1
        while len(outputs) < len(samples):
            chunk = samples[len(outputs) : len(outputs) + count]
            try:
                stacked = tuple(np.stack(arrays) for arrays in zip(*chunk, strict=True))
            except ValueError as error:
                raise DeviceError(f"{self.what}: the samples differ: {error}") from None
            began = monotonic()
            found = self.ask("many", stacked)[1]
            outputs += zip(*found, strict=True)
            if monotonic() - began < SHARE / 2 and sum(array.nbytes for array in stacked) < MOST_BYTES / 2:
                count *= 2
        return outputs

    def memory(self, inputs: Arrays) -> tuple[int, bool]:
        """Peak resident bytes above the empty runtime while loading and running, and whether it was seen by the kernel.

        Only for a worker that has not loaded its artifact. Where the kernel keeps the old peak, it is what was resident
        afterwards.
        """
        answer, _ = self.ask("memory", inputs)
        return max(answer["peak"] - answer["base"], 0), answer["exact"]

    def time(
        self,
        inputs: Arrays,
        method: str = "forward",
        at_least: float = timing.AT_LEAST,
        at_most: float = timing.AT_MOST,
        cpu: bool = False,
    ) -> tuple[NDArray[np.int64], bool]:
        """Nanoseconds of each run, after a warm-up, and whether the median had settled; the bounds are in seconds.

        `cpu` counts the time that the process had a core, which only for a single thread is the time that runs take.
        """
        answer, (found,) = self.ask(
            "time", inputs, TIMEOUT + at_most, method=method, at_least=at_least, at_most=at_most, cpu=cpu
        )
        return found, answer["settled"]

    def ask(self, op: str, inputs: Arrays = (), timeout: float = TIMEOUT, **more: Any) -> tuple[dict[str, Any], Arrays]:
        """One request and its answer."""
        # safetensors keeps no strides: it writes the bytes of an array as they lie.
        body = tensors.save({str(i): np.array(array, order="C") for i, array in enumerate(inputs)}) if inputs else b""
        mark = self._error_bytes()
        with self._watched(timeout, mark):
            assert self.process.stdin is not None
            host_worker.write_frame(self.process.stdin, {"op": op, **more}, body)
            return self._answer(mark)

    def greet(self) -> None:
        """Wait until the runtime is imported."""
        with self._watched(TIMEOUT, 0):
            self._answer(0)

    def _answer(self, mark: int) -> tuple[dict[str, Any], Arrays]:
        assert self.process.stdout is not None
        header, body = host_worker.read_frame(self.process.stdout, self.most)
        if "error" in header:
            raise DeviceError(f"{self.what}: {header['error']}{self._last_words(mark)}")
        arrays = tensors.load(body) if body else {}
        return header, tuple(arrays[str(i)] for i in range(len(arrays)))

    @contextmanager
    def _watched(self, timeout: float, mark: int) -> Iterator[None]:
        """End the process where it takes too long, and turn its end into a DeviceError that says why."""
        timer = threading.Timer(timeout, self._give_up)
        timer.start()
        try:
            yield
        except (EOFError, BrokenPipeError):
            raise DeviceError(self._epitaph(timeout) + self._last_words(mark)) from None
        except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            self.process.kill()  # nobody knows where the next frame starts
            raise DeviceError(f"{self.what}: the process answered nonsense: {error}{self._last_words(mark)}") from None
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        self.timed_out = True
        self.process.kill()

    def _epitaph(self, timeout: float) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        code = self.process.returncode
        if self.timed_out:
            how = f"did not answer within {timeout:g} s"
        elif code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        return f"{self.what}: the process {how}"

    def _error_bytes(self) -> int:
        return os.fstat(self.errors.fileno()).st_size

    def _last_words(self, mark: int) -> str:
        """The last line on stderr since `mark`: what came before belongs to requests that went well."""
        text = os.pread(self.errors.fileno(), 1 << 20, max(mark, self._error_bytes() - (1 << 20)))
        lines = text.decode(errors="replace").strip().splitlines()
        return f"; stderr: {lines[-1].strip()[:300]}" if lines else ""

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            with suppress(BrokenPipeError):
                assert stream is not None
                stream.close()


@contextmanager
def load(artifact: Path, target: Target, threads: int) -> Iterator[Worker]:
    """Load an artifact for running. Raises MissingEnvironment, and DeviceError where it cannot be loaded."""
    with start(artifact, target, threads) as worker:
        worker.ask("load")
        yield worker


@dataclass(frozen=True)
class Confined:
    """For an artifact that is not trusted: bytes of memory that it may take, and the longest answer, in bytes."""

    memory: int
    most: int


@contextmanager
def start(
    artifact: Path, target: Target, threads: int, confined: Confined | None = None, reference: bool = False
) -> Iterator[Worker]:
    """Start a worker that has not loaded its artifact yet; it is ended with the block.

    `reference`: it follows a microcontroller's program by reference operators.
    """
    check(target)
    what = f"{artifact.name} on {target.name}"
    if artifact.suffix not in (".pte", ".bpte", ".pt"):
        raise DeviceError(f"{what}: a {artifact.suffix or 'nameless'} file", "the host runs .pte, .bpte and .pt files")
    if not artifact.is_file():
        raise DeviceError(f"{what}: there is no file {artifact}")
    # A file and not a module, with -P, so that nothing in the current folder can stand in for a library.
    command = [host_worker.__file__, str(artifact.absolute()), str(threads), *(["reference"] if reference else [])]
    command = [sys.executable, "-P", *([confine.__file__, str(confined.memory)] if confined else []), *command]
    errors = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - closed by the worker
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
    worker = Worker(what, process, errors, confined.most if confined else sys.maxsize)
    try:
        worker.greet()
        yield worker
    finally:
        worker.close()


def measure(
    artifact: Path,
    target: Target,
    threads: int,
    inputs: Sequence[Arrays],
    layers: Sequence[tuple[LayerFacts, Precision]],
    enough: timing.Enough = timing.once,
) -> tuple[Measurement, ...]:
    """Latency, throughput and peak memory of the artifact, on the first of `inputs`; `layers` are not needed.

    An inference is what a caller waits for: copying the inputs in and running. Throughput is that of calls one after
    another.
    """
    busy = os.getloadavg()[0]
    with turn("host"), start(artifact, target, threads) as worker:
        peak, exact = worker.memory(inputs[0])
        found, settled = worker.time(inputs[0])
        found = timing.go_on(found, enough, lambda s: worker.time(inputs[0], at_least=s, at_most=s)[0])
    detail = (
        f"{threads} thread{'s' if threads > 1 else ''}; load of the machine before: {busy:.2f} on {os.cpu_count()} "
        f"cores; {timing.spread(found, settled)}"
    )
    size = Bytes(artifact.stat().st_size)
    memory = f"resident above an empty runtime, at its highest while loading and running a file of {size}"
    if not exact:
        memory = "resident above an empty runtime after loading and running; this kernel does not let the peak be reset"
    return (
        *timing.measurements(target.name, found, detail),
        Measurement(target.name, "peak_memory", float(peak), "measured", runs=host_worker.MEMORY_RUNS, detail=memory),
    )


def layer_latency(layer: LayerFacts, precision: Precision, target: Target, threads: int) -> float:
    """Predicted seconds of one layer of a `.pte`, by rates that were measured on this machine (see `layer_model`)."""
    return float(rates(target, threads).seconds([(layer, precision)])[0])


def layer_latencies(
    layers: Sequence[tuple[LayerFacts, Precision]], target: Target, threads: int
) -> NDArray[np.float64]:
    """Predicted seconds of each of many layers, a few microseconds' work for each."""
    return rates(target, threads).seconds(layers)


def call_latency(target: Target, threads: int) -> float:
    """Predicted seconds of an inference beside its layers."""
    return rates(target, threads).call


def calibration_error(target: Target, threads: int) -> tuple[CalibrationError, ...]:
    """How far off the rates are for layers that they were not fitted to, by kind of layer and precision."""
    return rates(target, threads).errors


@cache
def rates(target: Target, threads: int) -> layer_model.Rates:
    """The rates of this machine: stored ones, else measured now, which takes about half a minute."""
    if (known := host_rates.read(threads)) is not None:
        return known
    timed = probes.everything()
    seconds = np.full(len(timed), inf)
    program = host_rates.program(timed)
    with turn("host"), start(program, target, threads) as worker:
        for _ in range(CALIBRATION_ROUNDS):
            for i, probe in enumerate(timed):
                x = np.ones(probe.shape, np.int8 if probe.int8_input else np.float32)
                found, _settled = worker.time((x,), probes.method(i), 0.0, CALIBRATION_TIME, cpu=threads == 1)
                seconds[i] = min(seconds[i], float(np.quantile(found, CALIBRATION_QUANTILE)) / 1e9)
    call = seconds[0]
    samples = [
        (probe.layer, probe.precision, float(total - call) / probe.repeats)
        for probe, total in zip(timed[1:], seconds[1:], strict=True)
    ]
    fitted = layer_model.fit(samples, float(call))
    host_rates.write(fitted, threads)
    return fitted
