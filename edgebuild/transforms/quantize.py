"""Quantization: static int8, int8 with ranges found at run time, 4-bit weights in groups; with training or without.

The finish by training fakes the rounding in fp32 (Jacob et al. 2018, arXiv:1712.05877). It starts from the
post-training ranges, which stay, with batch norm folded into the weights, so that what is trained is what is lowered.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgebuild.divergence import divergence
from edgebuild.errors import TaskError, TransformError
from edgebuild.lift import batch_is_free, outputs_of
from edgebuild.sensitivity import Sensitivity
from edgebuild.spec import GROUP, Candidate, Cast, ModelFacts

Samples = Sequence[tuple[Tensor, ...]]

CHOOSING = 32  # samples that decide between ranges; the others show the ranges


@dataclass(frozen=True)
class Quantized:
    """A quantized copy of a model, ready to lower, and how it was made, in words for the report."""

    model: nn.Module
    how: str


def candidates(facts: ModelFacts, sensitivity: Sensitivity) -> tuple[Candidate, ...]:
    """int8 for every layer that can compute in it, with its loss against fp32, in execution order."""
    casts = sensitivity.casts
    return tuple(Candidate(Cast(layer.name), casts[layer.name]) for layer in facts.layers if layer.name in casts)


def apply(
    model: fx.GraphModule, inputs: tuple[Tensor, ...], samples: Samples, quantizer: Any, logits: bool = True
) -> Quantized:
    """A quantized copy of the model, simulated in fp32 by quantize/dequantize pairs or as int8 modules (FX).

    `quantizer` comes from the backend: a PT2E quantizer, a torchao config by layer, or a QConfigMapping for FX.
    `samples` have batch size 1. Raises TaskError without samples.
    """
    from torchao.quantization import FqnToConfig

    if not samples:
        raise TaskError(
            "there are no calibration inputs to quantize with", "give the task at least one calibration batch"
        )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if isinstance(quantizer, torch.ao.quantization.QConfigMapping):
            return Quantized(_fx(model, inputs, samples, quantizer), "ranges by the x86 engine's histograms")
        if isinstance(quantizer, FqnToConfig):
            return _grouped(model, quantizer)
        from edgebuild.transforms import fake

        graph, how = fake.rounded(model, inputs, samples, quantizer, logits)
        return Quantized(fake.converted(graph), how)


def _fx(model: fx.GraphModule, inputs: tuple[Tensor, ...], samples: Samples, mapping: Any) -> nn.Module:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(copy.deepcopy(model).eval(), mapping, inputs)
    for sample in samples:
        prepared(*sample)
    return convert_fx(prepared)


def split(samples: Samples) -> tuple[Samples, Samples]:
    """Samples to learn from and up to 32 others to decide by, or all for both where there are few."""
    if len(samples) < CHOOSING:
        return samples, samples
    every = max(4, len(samples) // CHOOSING)
    return [sample for i, sample in enumerate(samples) if i % every], samples[::every][:CHOOSING]


# ------------------------------------------------------------------------------------------------- with training


class Trainable(nn.Module):
    """A model with rounding faked in its graph: it trains, copies and switches modes as any module does.

    Weights are rounded by their range at each step, activations by the ranges found before. Rounding to 8 bits means
    nothing in bf16, so autocast is off inside.
    """

    def __init__(self, graph: fx.GraphModule, inputs: tuple[Tensor, ...], how: str):
        super().__init__()
        self.graph, self.inputs, self.how = graph, inputs, how
        self.training = False

    def forward(self, *inputs: Tensor) -> Any:
        with torch.autocast(inputs[0].device.type, enabled=False):
            return self.graph(*inputs)

    def train(self, mode: bool = True) -> "Trainable":
        """Nothing but the flag: batch norm is folded, and an exported graph refuses to be switched."""
        self.training = mode
        return self


def prepare_qat(
    model: fx.GraphModule, inputs: tuple[Tensor, ...], samples: Samples, quantizer: Any, logits: bool = True
) -> Trainable:
    """The model as it is trained with its rounding; it takes batches where the model does.

    Raises TaskError without samples, TransformError for a quantizer that nothing can be trained with.
    """
    from torchao.quantization.pt2e.quantizer import Quantizer

    if not samples:
        raise TaskError("there are no calibration inputs to quantize with", "give at least one calibration batch")
    if not batch_is_free(model, inputs):
        raise TransformError(
            "the exported graph has a fixed batch size of 1: it cannot be trained", "set qat_steps to 0"
        )
    if not isinstance(quantizer, Quantizer):
        raise TransformError(
            f"a model cannot be trained with the rounding of {type(quantizer).__name__}",
            "set qat_steps to 0, or choose scheme static or dynamic",
        )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        from edgebuild.transforms import fake

        graph, how = fake.rounded(model, inputs, samples, quantizer, logits)
    return Trainable(graph, inputs, how)


def convert(trained: nn.Module) -> nn.Module:
    """A trained model, ready to lower."""
    from edgebuild.transforms import fake

    assert isinstance(trained, Trainable)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        graph = copy.deepcopy(trained.graph)
        graph(*trained.inputs)  # the last step changed the weights, and not yet their ranges
        return fake.converted(graph)


def finish(
    model: fx.GraphModule,
    teacher: nn.Module,
    inputs: tuple[Tensor, ...],
    samples: Samples,
    held: Samples,
    quantizer: Any,
    logits: bool,
    train: Callable[[Trainable], tuple[Trainable, Any]],
) -> Quantized:
    """The model quantized by training, or after it where that answers more like the teacher.

    `train` gives a trained copy and says how it went; `held` are samples that it does not see. Raises as `prepare_qat`.
    """
    start = prepare_qat(model, inputs, samples, quantizer, logits)
    trained, how = train(start)
    results = [convert(start), convert(trained)]
    before, after = (_unlike(teacher, result, held, logits) for result in results)
    said = f"on {len(held)} samples held back {_said(after)} instead of {_said(before)}"
    if after < before:
        return Quantized(results[1], f"{start.how}; trained with its rounding: {how}; {said}")
    return Quantized(results[0], f"{start.how}; training with its rounding ({how}) was thrown away: {said}")


def _unlike(teacher: nn.Module, other: nn.Module, samples: Samples, logits: bool) -> tuple[float, float]:
    """How far a model that takes samples of batch size 1 is from its teacher; what compares as less is nearer.

    For logits first the share of other answers (top-1): training on labels sharpens outputs, which moves them away from
    the teacher's and may still be right. Then the KL divergence in nats.
    """
    with torch.no_grad():
        pairs = [(outputs_of(teacher(*sample)), outputs_of(other(*sample))) for sample in samples]
    kl = sum(divergence(before, after, logits) for before, after in pairs) / len(pairs)
    agreed = [float((y[0].argmax(-1) == z[0].argmax(-1)).float().mean()) for y, z in pairs] if logits else [1.0]
    return 1 - sum(agreed) / len(agreed), kl


def _said(unlike: tuple[float, float]) -> str:
    return f"{1 - unlike[0]:.1%} agree with the teacher ({unlike[1]:.3g} nats)"


# -------------------------------------------------------------------------------------------------- 4-bit groups


def _grouped(model: fx.GraphModule, config: Any) -> Quantized:
    """A copy whose linear layers have the config's weights; 8-bit ones where no whole groups fit."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis, quantize_

    eight = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    known = config.fqn_to_config
    chosen = {name: known.get(name, known["_default"]) for name in layers}
    odd = [name for name, c in chosen.items() if c is not None and layers[name].in_features % GROUP]
    chosen.update(dict.fromkeys(odd, eight))
    made = copy.deepcopy(model)
    for name, one in chosen.items():
        if one is not None:
            quantize_(made.get_submodule(name), one)
    how = f"4-bit weights in groups of {GROUP}, activations ranged at run time"
    return Quantized(made, f"{how}; 8 bits where groups do not fit: {', '.join(odd)}" if odd else how)
