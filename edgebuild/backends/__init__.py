"""Backends turn a model into an artifact. Each module offers `quantizer` and `lower`; `BACKENDS` is the registry."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from torch import Tensor, nn

from edgebuild.backends import cortex_m, ethos_u, layout, torchscript, xnnpack
from edgebuild.spec import SCHEMES, Artifact, Board, Npu, Profile, Scheme, Target

BACKENDS: dict[str, Any] = {"xnnpack": xnnpack, "torchscript": torchscript, "ethos_u": ethos_u, "cortex_m": cortex_m}


@dataclass(frozen=True)
class Backend:
    """How models are quantized and lowered for a target; `npu` and `board` are of a microcontroller alone."""

    name: str
    npu: Npu | None = None
    board: Board | None = None

    @property
    def on_host(self) -> bool:
        """Whether the machine that builds runs its artifacts, by the same library as the target."""
        return self.name in ("xnnpack", "torchscript")

    @property
    def mixes(self) -> bool:
        """Whether a layer of an int8 model may stay fp32."""
        return self.on_host

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The ways in which it computes int8."""
        return SCHEMES if self.name == "xnnpack" else ("static",)

    @property
    def _told(self) -> tuple[Any, ...]:
        return {"ethos_u": (self.npu,), "cortex_m": (self.board,)}.get(self.name, ())

    def quantizer(self, keep_fp32: tuple[str, ...] = (), scheme: Scheme = "static") -> Any:
        """What `transforms.quantize` is to quantize with. Raises BackendError for what the backend cannot compute."""
        return BACKENDS[self.name].quantizer(keep_fp32, scheme, *self._told)

    def lower(self, model: nn.Module, inputs: tuple[Tensor, ...], sram: float = inf) -> Artifact:
        """The artifact, within `sram` bytes where an NPU's compiler can give up speed for them.

        Raises BackendError with the lowering's reason.
        """
        told = (*self._told, sram) if self.npu else self._told
        made: Artifact = BACKENDS[self.name].lower(model, inputs, *told)
        return made

    def layout(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Example inputs as they are to lie in memory."""
        return inputs if self.on_host else layout.channels_last(inputs)


HOST = Backend("xnnpack")


def of(profile: Profile, targets: Sequence[Target]) -> Backend:
    """The backend of a profile whose targets these are: one for them all, as the catalog sees to."""
    if profile.artifact == "torchscript":
        return Backend("torchscript")
    first = targets[0]
    return Backend(first.device, first.npu, first.board) if first.microcontroller else HOST
