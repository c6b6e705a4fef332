"""What a device offers. Devices know nothing of torch: tensors cross as numpy arrays, artifacts as files."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgebuild.devices.timing import Enough, once
from edgebuild.spec import CalibrationError, LayerFacts, Measurement, Precision, Target

Arrays = tuple[NDArray, ...]


@contextmanager
def as_file(data: bytes, suffix: str, graphs: Sequence[bytes] = ()) -> Iterator[Path]:
    """An artifact's bytes as a file, its TOSA graphs beside it, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="edgebuild-") as folder:
        path = Path(folder) / f"model{suffix}"
        path.write_bytes(data)
        for i, graph in enumerate(graphs):
            path.with_suffix(f".{i}.tosa").write_bytes(graph)
        yield path


class Session(Protocol):
    """An artifact loaded in a process of its own."""

    def run(self, inputs: Arrays) -> Arrays:
        """One inference. Raises DeviceError where the process crashes or hangs."""
        ...

    def run_many(self, samples: Sequence[Arrays]) -> list[Arrays]:
        """One inference after another."""
        ...


class Device(Protocol):
    """The functions of a device module."""

    def check(self, target: Target) -> None:
        """Raise MissingEnvironment, naming what is missing and the command that gets it."""

    def load(self, artifact: Path, target: Target, threads: int) -> AbstractContextManager[Session]:
        """Load an artifact for running."""
        ...

    def measure(
        self,
        artifact: Path,
        target: Target,
        threads: int,
        inputs: Sequence[Arrays],
        layers: Sequence[tuple[LayerFacts, Precision]],
        enough: Enough = once,
    ) -> tuple[Measurement, ...]:
        """Latency, throughput, peak memory; `layers`, what the artifact is made of, is for those that estimate.

        A device that keeps time goes on, within bounds, until `enough` says so of the runs.
        """
        ...

    def layer_latency(self, layer: LayerFacts, precision: Precision, target: Target, threads: int) -> float:
        """Predicted seconds of one layer."""
        ...

    def layer_latencies(
        self, layers: Sequence[tuple[LayerFacts, Precision]], target: Target, threads: int
    ) -> NDArray[np.float64]:
        """Predicted seconds of each of many layers, at once."""
        ...

    def call_latency(self, target: Target, threads: int) -> float:
        """Predicted seconds of an inference beside its layers."""
        ...

    def calibration_error(self, target: Target, threads: int) -> tuple[CalibrationError, ...]:
        """How far off the predictions are on the layers that they were fitted to; empty where nothing was fitted."""
        ...
