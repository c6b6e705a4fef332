"""Models lowered for microcontrollers, each once: those of `scripts/microcontrollers`, with random weights."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgebuild import backends, catalog
from edgebuild.analyse import analyse
from edgebuild.backends import Backend
from edgebuild.devices import DEVICES, Session, as_file
from edgebuild.lift import lift
from edgebuild.spec import Artifact, Measurement, ModelFacts, Profile, Target
from edgebuild.transforms import quantize

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from microcontrollers.models import MODELS  # noqa: E402

U55, U85, M7, M4 = "corstone-300-u55-128", "corstone-320-u85-256", "stm32f746", "nrf52840"
SAMPLES = 8


@dataclass(frozen=True)
class Lowered:
    """A model in int8 for a target; `graph` is what was lowered, as PyTorch computes it."""

    target: Target
    backend: Backend
    facts: ModelFacts
    graph: nn.Module
    samples: tuple[tuple[Tensor, ...], ...]
    artifact: Artifact

    @contextmanager
    def file(self) -> Iterator[Path]:
        with as_file(self.artifact.data, self.artifact.suffix, self.artifact.graphs) as path:
            yield path

    @contextmanager
    def session(self) -> Iterator[Session]:
        with self.file() as path, DEVICES[self.target.device].load(path, self.target, 1) as session:
            yield session

    def measured(self) -> dict[str, Measurement]:
        """What its device measures, by quantity."""
        with self.file() as path:
            found = DEVICES[self.target.device].measure(path, self.target, 1, [(self.samples[0][0].numpy(),)], ())
        return {one.quantity: one for one in found}


def on(name: str) -> tuple[Target, Backend]:
    """A target and what lowers for it; the test is skipped where an Ethos-U's tools are not installed."""
    target = catalog.load_target(name)
    if target.npu:
        for package in ("ethosu", "tosa_reference_model"):
            pytest.importorskip(package, reason="needs pip install 'edgebuild[ethos-u]'")
    return target, backends.of(Profile("p", "p", name, "pte", ()), [target])


def lower(model: nn.Module, shape: tuple[int, ...], name: str) -> Lowered:
    """Quantize and lower a model for a target."""
    target, backend = on(name)
    stacked = torch.randn(SAMPLES, *shape[1:], generator=torch.Generator().manual_seed(0))
    samples = tuple((sample[None],) for sample in stacked)
    lifted = lift(model.eval(), samples[0])
    graph = quantize.apply(lifted, backend.layout(samples[0]), samples, backend.quantizer()).model
    return Lowered(target, backend, analyse(lifted, samples[0]), graph, samples, backend.lower(graph, samples[0]))


@cache
def lowered(model: str, name: str) -> Lowered:
    """A model of `scripts/microcontrollers` for a target."""
    make, shape = MODELS[model]
    torch.manual_seed(0)
    return lower(make(), shape, name)
