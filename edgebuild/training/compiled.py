"""A model that only answers, compiled for the shapes of its inputs by oneDNN's graph compiler, through TorchScript."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgebuild.lift import outputs_of
from edgebuild.training.objective import Watched

WARM_UP = 3  # calls: the first two show the shapes, the third compiles
APART = {True: 5e-2, False: 1e-3}  # of the outputs' norm, in bf16 or not, where both are right
MOST_FORMS = 4  # to compile for: a batch, an epoch's last one, the held-out samples

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Means:
    """How to compute on this machine: in bf16 or not; what is not trained by oneDNN's compiled kernels or not."""

    bf16: bool = False
    compiled: bool = False


class Answering:
    """A model in eval mode: from inputs to its outputs, and behind them what its `layers` read. No gradients.

    `means` may be changed at any time; compiled kernels are taken where they give the same.
    """

    def __init__(self, model: nn.Module, layers: tuple[str, ...] = (), means: Means = Means()):
        self.means = means
        self._model = _Telling(model, layers)
        self._forms: dict[Any, Callable[..., Tensors] | None] = {}

    def __call__(self, inputs: Tensors) -> Tensors:
        """The outputs in the precision in which they were computed."""
        if self.means.compiled and (answers := self._compiled_for(inputs)):
            with torch.no_grad():
                return answers(*inputs)
        with torch.no_grad(), torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=self.means.bf16):
            told: Tensors = self._model(*inputs)
            return told

    def _compiled_for(self, inputs: Tensors) -> Callable[..., Tensors] | None:
        form = (self.means.bf16, *((x.shape, x.stride(), x.dtype) for x in inputs))
        if form not in self._forms and len(self._forms) < MOST_FORMS:
            self._forms[form] = _compiled(self._model, inputs, self.means.bf16)
        return self._forms.get(form)


class _Telling(nn.Module):
    """A model's outputs, and behind them what its layers read."""

    def __init__(self, model: nn.Module, layers: tuple[str, ...]):
        super().__init__()
        self.model, self.layers = model, layers
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensors:
        with closing(Watched(self.model, self.layers)) as watched:
            results = outputs_of(self.model(*inputs))
        return (*results, *(watched.read[name] for name in self.layers))


def _compiled(model: _Telling, inputs: Tensors, bf16: bool) -> Callable[..., Tensors] | None:
    """The model for inputs of this form; None where it cannot be compiled or answers otherwise.

    Only what was lifted is compiled, on CPUs: another model's control flow may depend on its inputs. Takes about half a
    second.
    """
    if inputs[0].device.type != "cpu" or not isinstance(model.model, fx.GraphModule):
        return None
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; what follows it takes a minute and a C++ compiler
        with autocast:
            wanted = model(*inputs)
        try:
            with _fusing():
                with autocast:
                    traced: Callable[..., Tensors] = torch.jit.freeze(torch.jit.trace(model, inputs, check_trace=False))
                for _ in range(WARM_UP):
                    found = traced(*inputs)
        except Exception:  # whatever does not trace or compile: it is computed as it is
            return None
    return traced if _alike(wanted, found, APART[bf16]) else None


def _alike(wanted: Tensors, found: Tensors, apart: float) -> bool:
    """Whether all tensors are, by their norms, no farther from each other than that."""
    pairs = [(y.float(), z.float()) for y, z in zip(wanted, found, strict=True)]
    return all(y.shape == z.shape and float((y - z).norm()) <= apart * float(y.norm()) for y, z in pairs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in eval mode for a block; afterwards each of its modules in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _fusing() -> Iterator[None]:
    """PyTorch's recipe for bf16: what autocast chose while tracing stays, TorchScript's own is off."""
    fusion, autocast = torch.jit.onednn_fusion_enabled(), torch._C._jit_set_autocast_mode(False)
    torch.jit.enable_onednn_fusion(True)
    try:
        yield
    finally:
        torch.jit.enable_onednn_fusion(fusion)
        torch._C._jit_set_autocast_mode(autocast)
