"""Rounding faked in fp32 in a model's exported graph (PT2E): ranges, the choice between them, corrected biases.

Static ranges are estimated from the calibration inputs in several ways, and the one is taken that loses least: the KL
divergence of the model's own outputs decides, on samples that the ranges did not see. Biases are corrected for the mean
error that rounding leaves in each layer (Nagel et al. 2019, arXiv:1906.04721, section 4.2) where that loses less.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchao.quantization.pt2e import (
    DerivedObserverOrFakeQuantize,
    FakeQuantize,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)
from torchao.quantization.pt2e.observer import ObserverBase
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from edgebuild.divergence import batches, divergence
from edgebuild.lift import batch_is_free, export, outputs_of
from edgebuild.transforms import quantize

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv2d.default, aten.conv1d.default)
TAIL = 1e-4  # share of the values that percentile ranges cut off, half on each side
BETTER = 0.98  # corrected biases must bring the loss below this share of it: less is chance


def rounded(
    model: fx.GraphModule, inputs: tuple[Tensor, ...], samples: quantize.Samples, quantizer: Any, logits: bool
) -> tuple[fx.GraphModule, str]:
    """The model's graph with modules that fake rounding, and how their ranges were found."""
    shown, deciding = quantize.split(samples)
    graph = prepare_pt2e(_graph(copy.deepcopy(model), inputs), quantizer)
    for batch in batches(graph, shown):
        graph(*batch)
    observers = dict(_observers(graph))
    pairs = [(batch, outputs_of(model(*batch))) for batch in batches(graph, deciding)]

    def loss() -> float:
        total = sum(divergence(y, outputs_of(graph(*batch)), logits) * len(batch[0]) for batch, y in pairs)
        return total / len(deciding)

    ranged = any(isinstance(observer, HistogramObserver) for observer in observers.values())
    losses: dict[str, float] = {}
    for name in RANGES if ranged else ("run time",):
        _set_ranges(graph, observers, name)
        losses[name] = loss()
    best = min(losses, key=losses.__getitem__)
    _set_ranges(graph, observers, best)
    said = ", ".join(f"{name} {value:.3g}" for name, value in losses.items())
    how = f"activations ranged by {best} (nats lost: {said})"
    plain = {name: tensor.clone() for name, tensor in graph.named_parameters()}
    _Twice(graph).correct(batches(graph, shown)[0])
    corrected = loss()
    if corrected < BETTER * losses[best]:
        return graph, f"{how}, biases corrected (nats lost: {corrected:.3g})"
    for name, parameter in graph.named_parameters():
        parameter.copy_(plain[name])
    return graph, how


def _graph(model: fx.GraphModule, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """The exported graph, for batches where the model takes them."""
    graph = export(model, inputs, free_batch=batch_is_free(model, inputs)).module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    return graph


def _observers(graph: fx.GraphModule) -> Iterator[tuple[str, nn.Module]]:
    for name, module in graph.named_modules(remove_duplicate=False):
        if isinstance(module, ObserverBase):
            yield name, module


def _mse(seen: HistogramObserver) -> tuple[Tensor, Tensor]:
    """The range with the least squared error, as the observer searches it in its histogram."""
    scale, zero = seen.calculate_qparams()
    return (seen.quant_min - zero) * scale, (seen.quant_max - zero) * scale


def _percentile(seen: HistogramObserver) -> tuple[Tensor, Tensor]:
    """The range without the tails."""
    share = seen.histogram.cumsum(0) / seen.histogram.sum().clamp(min=1)
    step = (seen.max_val - seen.min_val) / seen.bins
    low = int((share < TAIL / 2).sum())
    high = min(int((share < 1 - TAIL / 2).sum()) + 1, seen.bins)
    return seen.min_val + step * low, seen.min_val + step * high


RANGES: Mapping[str, Callable[[HistogramObserver], tuple[Tensor, Tensor]]] = {
    "least squares": _mse,
    "minimum and maximum": lambda seen: (seen.min_val, seen.max_val),
    f"percentile {100 * (1 - TAIL):g}": _percentile,
}


def _set_ranges(graph: fx.GraphModule, observers: Mapping[str, nn.Module], name: str) -> None:
    """Put a module that rounds in the place of each observer; what shares an observer shares its rounding."""
    made: dict[int, nn.Module] = {}
    for observer in observers.values():
        if id(observer) not in made and not isinstance(observer, DerivedObserverOrFakeQuantize):
            made[id(observer)] = _rounding(observer, name)
    for place, observer in observers.items():
        if isinstance(observer, DerivedObserverOrFakeQuantize) and id(observer) not in made:
            made[id(observer)] = _derived(observer, [made[id(source)] for source in observer.obs_or_fqs])
        graph.set_submodule(place, made[id(observer)])


def _derived(seen: Any, sources: list[Any]) -> nn.Module:
    """A scale that follows from others, as a bias's from those of inputs and weights; nothing is rounded by it here."""
    form = {key: getattr(seen, key) for key in ("quant_min", "quant_max", "qscheme", "ch_axis")}
    return DerivedObserverOrFakeQuantize(seen.dtype, sources, seen.derive_qparams_fn, **form)


def _rounding(seen: Any, name: str) -> nn.Module:
    """What rounds as an observer asks: weights by their own range, activations by the range seen or by their own."""
    if isinstance(seen, HistogramObserver):
        fake = FakeQuantize(MinMaxObserver, **_form(seen))
        fake.activation_post_process.min_val, fake.activation_post_process.max_val = RANGES[name](seen)
        fake.scale, fake.zero_point = fake.calculate_qparams()
        fake.zero_point = fake.zero_point.float()
        fake.disable_observer()
        return _steady(fake)
    kind = MovingAveragePerChannelMinMaxObserver if hasattr(seen, "ch_axis") else MovingAverageMinMaxObserver
    fake = FakeQuantize(kind, averaging_constant=1.0, is_dynamic=seen.is_dynamic, **_form(seen))
    fake.eps = float(seen.eps)  # the conversion asks for it
    return _steady(fake)


def _steady(fake: nn.Module) -> nn.Module:
    """Without integer buffers but zeros: a moving average of weights and buffers would round them down."""
    for name in ("observer_enabled", "fake_quant_enabled"):
        switch = getattr(fake, name)
        delattr(fake, name)
        setattr(fake, name, switch)
    return fake


def _form(seen: Any) -> dict[str, Any]:
    form = {key: getattr(seen, key) for key in ("dtype", "quant_min", "quant_max", "qscheme")}
    return {**form, "eps": float(seen.eps)} | ({"ch_axis": seen.ch_axis} if hasattr(seen, "ch_axis") else {})


class _Twice(fx.Interpreter):
    """Runs a graph with rounding and without it side by side, so that a layer is corrected behind corrected ones."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph)
        self._nodes = tuple(graph.graph.nodes)

    def correct(self, inputs: tuple[Tensor, ...]) -> None:
        """Add to each layer's bias what rounding takes from the mean of each of its output channels."""
        places = [node for node in self._nodes if node.op == "placeholder"]
        exact: dict[fx.Node, Any] = dict(zip(places, inputs, strict=True))
        rough = dict(exact)
        for node in self._nodes:
            if node.op in ("placeholder", "output"):
                continue
            rounds = node.op == "call_module" and isinstance(self.module.get_submodule(str(node.target)), FakeQuantize)
            self.env = exact
            exact[node] = exact[node.args[0]] if rounds else self.run_node(node)
            self.env = rough
            rough[node] = self.run_node(node)
            bias = self._bias(node)
            if bias is not None:
                axis = 1 if node.target in CONVOLUTIONS else exact[node].dim() - 1
                gap = (exact[node] - rough[node]).mean([d for d in range(exact[node].dim()) if d != axis])
                bias += gap
                rough[node] = rough[node] + gap.reshape([-1 if d == axis else 1 for d in range(exact[node].dim())])
            for dead in self.user_to_last_uses.get(node, ()):
                exact.pop(dead, None)
                rough.pop(dead, None)

    def _bias(self, node: fx.Node) -> Tensor | None:
        """The bias that belongs to this layer alone."""
        if node.target not in (*CONVOLUTIONS, aten.linear.default) or len(node.args) < 3:
            return None
        source = node.args[2]
        if isinstance(source, fx.Node) and source.op == "call_module":  # a range of its own
            source = source.args[0]
        if not isinstance(source, fx.Node) or source.op != "get_attr" or len(source.users) > 1:
            return None
        *path, name = str(source.target).split(".")
        bias = getattr(self.module.get_submodule(".".join(path)), name)
        return bias if isinstance(bias, Tensor) else None


def converted(graph: fx.GraphModule) -> nn.Module:
    """The graph with real quantize/dequantize pairs, ready to lower."""
    from executorch.backends.transforms.duplicate_dynamic_quant_chain import DuplicateDynamicQuantChainPass

    _rebind(graph)
    made = convert_pt2e(graph)
    DuplicateDynamicQuantChainPass()(made)  # layers that share a rounding found at run time would split the delegate
    for module in made.modules():
        module.training = False  # it was exported in eval mode; the flag alone is wrong, and eval() is refused
    return made


def _rebind(graph: fx.GraphModule) -> None:
    """Let the annotations of a graph name its own nodes: in a copy they name those of the graph that was copied."""
    own = {node.name: node for node in graph.graph.nodes}
    for node in graph.graph.nodes:
        annotation = node.meta.get(Q_ANNOTATION_KEY)
        if annotation is not None:
            inputs = {own[source.name]: form for source, form in annotation.input_qspec_map.items()}
            node.meta[Q_ANNOTATION_KEY] = replace(annotation, input_qspec_map=inputs)
