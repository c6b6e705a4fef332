"""How much a change of a layer costs, from the task's own inputs and without labels.

For a change d of weights or activations, the loss is the model's own: the KL divergence between its output
distribution before and after. To second order that is 1/2 E[(g . d)^2], where g is the gradient of -log p(y) for a
label y drawn from the model's output (the Fisher information; Martens 2020, arXiv:1412.1193; Theis et al. 2018,
arXiv:1801.05787). It needs one backward pass a sample, is in nats, and is the same unit for a pruned channel, a lower
rank, a precision and any other change.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from edgebuild.divergence import TEMPERATURE, batches
from edgebuild.errors import TaskError
from edgebuild.lift import outputs_of
from edgebuild.rounding import Rounding, weight_error
from edgebuild.spec import INT8_OPERATORS, ModelFacts

MOST_CHANNELS = 4096  # of a layer whose second moments are kept; more would take gigabytes

Probe = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """g . d for each sample s: `gates[group][s, c]` for losing channel c, `probed[layer][s, i]` for candidate i.

    `casts[layer]` is the loss increase (nats) of the layer in int8. `moments[layer]` is E[x x^T] of what a layer reads,
    channels x channels. `ranking[group]` scores the channels of a group where another measure than the gates ranks them
    better, shape (channels,).
    """

    gates: Mapping[str, NDArray[np.float64]]
    probed: Mapping[str, NDArray[np.float64]]
    casts: Mapping[str, float]
    moments: Mapping[str, Tensor]
    ranking: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def channel_scores(self, group: str) -> NDArray[np.float64]:
        """How much each channel of a group matters, by its ranking, else the loss increase (nats) without it."""
        return self.ranking[group] if group in self.ranking else loss(self.gates[group])


def loss(dots: NDArray[np.float64]) -> NDArray[np.float64]:
    """Loss increase in nats from g . d per sample (samples first)."""
    return 0.5 * np.mean(dots**2, axis=0)


def moments(model: fx.GraphModule, facts: ModelFacts, samples: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """E[x x^T] of what each ungrouped layer reads, over samples and positions: float64, channels x channels."""
    found: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            x = x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x
            x = x.reshape(-1, x.shape[-1])
            found[name] = found.get(name, torch.zeros((), dtype=torch.float64)) + (x.T @ x).double()
            rows[name] = rows.get(name, 0) + len(x)

        return hook

    layers = [layer for layer in facts.layers if layer.weighted and layer.groups == 1]
    handles = [
        model.get_submodule(layer.name).register_forward_pre_hook(keep(layer.name))
        for layer in layers
        if layer.in_channels <= MOST_CHANNELS
    ]
    try:
        with torch.no_grad():
            for batch in batches(model, samples):
                model(*batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / rows[name] for name, total in found.items()}


def measure(
    model: fx.GraphModule,
    facts: ModelFacts,
    samples: Sequence[tuple[Tensor, ...]],
    probes: Mapping[str, Probe],
    moments: Mapping[str, Tensor],
    logits: bool,
    seed: int = 0,
) -> Sensitivity:
    """One backward pass for each sample (batch size 1).

    `probes[layer]` maps the gradient of the layer's weight to one dot product for each candidate. `logits` says
    whether outputs are scores of a distribution (else they are values, with unit Gaussian noise).
    Raises TaskError where outputs or gradients are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    watched = _Watched(model, facts)
    gates: dict[str, list[Tensor]] = {group.name: [] for group in facts.groups}
    probed: dict[str, list[Tensor]] = {name: [] for name in probes}
    errors = {layer.name: weight_error(model, layer.name) for layer in facts.layers if layer.weighted}
    turned: dict[str, list[float]] = {name: [] for name in errors}  # g . d of int8 weights
    roundings: dict[tuple[str, int], Rounding] = {}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        for sample in samples:
            watched.read.clear()
            model.zero_grad(set_to_none=True)
            with torch.enable_grad():
                inputs = tuple(x.clone().requires_grad_(x.is_floating_point()) for x in sample)
                objective = _negative_log_likelihood(outputs_of(watched.run(*inputs)), logits, generator)
                objective.backward()
            for group in facts.groups:
                gates[group.name].append(-_gated(group, watched.read, facts))
            for name, probe in probes.items():
                probed[name].append(probe(_weight_gradient(model, name)).double())
            for name, error in errors.items():
                turned[name].append(float((_weight_gradient(model, name) * error).sum()))
            for name, tensors in watched.read.items():
                for i, x in enumerate(tensors):
                    if x.grad is not None:
                        roundings[name, i] = roundings.get((name, i), Rounding()).seen(x.detach(), x.grad)
    finally:
        model.zero_grad(set_to_none=True)
    casts = {name: float(loss(np.array(dots, dtype=np.float64))) for name, dots in turned.items()}
    for (name, _), rounding in roundings.items():
        casts[name] = casts.get(name, 0.0) + 0.5 * rounding.variance / len(samples)
    result = Sensitivity(
        {name: torch.stack(rows).numpy() for name, rows in gates.items()},
        {name: torch.stack(rows).numpy() for name, rows in probed.items()},
        casts,
        moments,
    )
    found: list[tuple[str, Any]] = [*result.gates.items(), *result.probed.items(), *result.casts.items()]
    for name, rows in found:
        if not np.isfinite(rows).all():
            raise TaskError(
                f"the gradients at layer {name!r} are not finite", "check the weights and the calibration inputs"
            )
    return result


class _Watched(fx.Interpreter):
    """Runs the graph and keeps what each layer reads, as a tensor of its own.

    Its gradient is then that of this one reader: where a residual sum and a convolution read the same tensor, each is
    charged for its own share alone.
    """

    def __init__(self, model: fx.GraphModule, facts: ModelFacts):
        super().__init__(model)
        self.read: dict[str, list[Tensor]] = {}
        self._names = {layer.name for layer in facts.layers if layer.weighted or layer.op in INT8_OPERATORS}

    def run_node(self, n: fx.Node) -> Any:
        name = str(n.target) if n.op == "call_module" else n.name
        if name not in self._names:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        args = torch.utils._pytree.tree_map(lambda x: self._own(name, x), args)
        return getattr(self, n.op)(n.target, args, kwargs)

    def _own(self, name: str, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.requires_grad:
            return x
        x = x.view_as(x)
        x.retain_grad()
        self.read.setdefault(name, []).append(x)
        return x


def _weight_gradient(model: nn.Module, name: str) -> Tensor:
    grad = model.get_submodule(name).weight.grad
    assert isinstance(grad, Tensor)
    return grad


def _gated(group: Any, read: Mapping[str, Sequence[Tensor]], facts: ModelFacts) -> Tensor:
    """x . g of each channel of a group, over everything that reads it, shape (channels,)."""
    total = torch.zeros(group.channels, dtype=torch.float64)
    for name, slot in group.inputs.items():
        layer = facts.layer(name)
        if not layer.weighted or layer.depthwise:
            continue
        for x in read.get(name, ()):
            if x.grad is not None:
                product = _by_channel(x.detach().double() * x.grad.double(), name, facts)
                span = product[slot.start : slot.start + slot.each * group.channels]
                total += span.reshape(group.channels, slot.each).sum(1)
    return total


def _by_channel(product: Tensor, name: str, facts: ModelFacts) -> Tensor:
    """Sum over everything but the layer's input channels."""
    axis = 1 if facts.layer(name).op == "conv2d" else product.dim() - 1
    return product.sum([d for d in range(product.dim()) if d != axis])


def _negative_log_likelihood(outputs: tuple[Tensor, ...], logits: bool, generator: torch.Generator) -> Tensor:
    total = torch.zeros((), dtype=outputs[0].dtype)
    for y in outputs:
        if not y.is_floating_point() or not y.requires_grad:
            continue
        if not torch.isfinite(y).all():
            raise TaskError(
                "the model's outputs are not finite on the calibration inputs", "check the weights and the inputs"
            )
        if logits and y.dim() >= 2:
            rows = (y / TEMPERATURE).flatten(0, -2)
            drawn = torch.multinomial(rows.detach().softmax(-1), 1, generator=generator)
            total = total - rows.log_softmax(-1).gather(-1, drawn).sum()
        else:
            total = total + (y * torch.randn(y.shape, generator=generator)).sum()
    return total
