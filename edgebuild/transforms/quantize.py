"""Post-training int8 quantization: per-channel weights, activations ranged on the task's calibration inputs."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgebuild.errors import TaskError
from edgebuild.lift import export
from edgebuild.sensitivity import Sensitivity
from edgebuild.spec import Candidate, Cast, ModelFacts


def candidates(facts: ModelFacts, sensitivity: Sensitivity) -> tuple[Candidate, ...]:
    """int8 for every layer that can compute in it, with its loss against fp32, in execution order."""
    casts = sensitivity.casts
    return tuple(Candidate(Cast(layer.name), casts[layer.name]) for layer in facts.layers if layer.name in casts)


def apply(
    model: fx.GraphModule, inputs: tuple[Tensor, ...], samples: Sequence[tuple[Tensor, ...]], quantizer: Any
) -> nn.Module:
    """An int8 copy of the model, simulated in fp32 by quantize/dequantize pairs (PT2E) or as int8 modules (FX).

    `quantizer` comes from the backend: a PT2E quantizer, or a QConfigMapping for FX. `samples` have batch size 1.
    Raises TaskError without samples.
    """
    if not samples:
        raise TaskError(
            "there are no calibration inputs to quantize with", "give the task at least one calibration batch"
        )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if isinstance(quantizer, torch.ao.quantization.QConfigMapping):
            return _fx(model, inputs, samples, quantizer)
        return _pt2e(model, inputs, samples, quantizer)


def _pt2e(
    model: fx.GraphModule, inputs: tuple[Tensor, ...], samples: Sequence[tuple[Tensor, ...]], quantizer: Any
) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(export(model, inputs).module(check_guards=False), quantizer)
    for sample in samples:
        prepared(*sample)
    converted = convert_pt2e(prepared)
    for module in converted.modules():
        module.training = False  # it was exported in eval mode; the flag alone is wrong, and eval() is refused
    return converted


def _fx(
    model: fx.GraphModule, inputs: tuple[Tensor, ...], samples: Sequence[tuple[Tensor, ...]], mapping: Any
) -> nn.Module:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(copy.deepcopy(model).eval(), mapping, inputs)
    for sample in samples:
        prepared(*sample)
    return convert_fx(prepared)
