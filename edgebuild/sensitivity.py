"""How much a change of a layer costs, from the task's own inputs and without labels.

For a change of the weights dW, the loss is the model's own: the KL divergence between its output distribution before
and after. To second order that is 1/2 E[(g . dW)^2], where g is the gradient of -log p(y) for a label y drawn from the
model's output (the Fisher information; Martens 2020, arXiv:1412.1193; Theis et al. 2018, arXiv:1801.05787). It needs
one backward pass a sample, is in nats, and is the same unit for a pruned channel, a lower rank and any other change.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from edgebuild.errors import TaskError
from edgebuild.lift import outputs_of
from edgebuild.spec import ModelFacts

# A trained classifier is so sure of itself that its gradients vanish; the softened distribution still ranks the
# changes, and is the one that distillation fits.
TEMPERATURE = 4.0

Probe = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """g . dW for each sample s: `gates[group][s, c]` for losing channel c, `probed[layer][s, i]` for candidate i."""

    gates: Mapping[str, NDArray[np.float64]]
    probed: Mapping[str, NDArray[np.float64]]

    def channel_scores(self, group: str) -> NDArray[np.float64]:
        """The loss increase (nats) for each single channel of a group, shape (channels,)."""
        return 0.5 * np.mean(self.gates[group] ** 2, axis=0)


def loss(dots: NDArray[np.float64]) -> NDArray[np.float64]:
    """Loss increase in nats from g . dW per sample (samples first)."""
    return 0.5 * np.mean(dots**2, axis=0)


def measure(
    model: fx.GraphModule,
    facts: ModelFacts,
    samples: Sequence[tuple[Tensor, ...]],
    probes: Mapping[str, Probe],
    logits: bool,
    seed: int = 0,
) -> Sensitivity:
    """One backward pass for each sample (batch size 1).

    `probes[layer]` maps the gradient of the layer's weight to one dot product for each candidate. `logits` says
    whether outputs are scores of a distribution (else they are values, with unit Gaussian noise).
    Raises TaskError where outputs or gradients are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    consumers = {
        name: model.get_submodule(name) for group in facts.groups for name in group.inputs if _is_layer(facts, name)
    }
    seen: dict[str, list[Tensor]] = {}
    handles = [module.register_forward_pre_hook(_keep_input(name, seen)) for name, module in sorted(consumers.items())]
    gates: dict[str, list[Tensor]] = {group.name: [] for group in facts.groups}
    probed: dict[str, list[Tensor]] = {name: [] for name in probes}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        for sample in samples:
            seen.clear()
            model.zero_grad(set_to_none=True)
            with torch.enable_grad():
                inputs = tuple(x.clone().requires_grad_(x.is_floating_point()) for x in sample)
                objective = _negative_log_likelihood(outputs_of(model(*inputs)), logits, generator)
                objective.backward()
            for group in facts.groups:
                total = torch.zeros(group.channels, dtype=torch.float64)
                for name, slot in group.inputs.items():
                    for tensor in seen.get(name, []):
                        if tensor.grad is None:
                            continue
                        product = _by_channel(tensor.detach().double() * tensor.grad.double(), name, facts)
                        span = product[slot.start : slot.start + slot.each * group.channels]
                        total += span.reshape(group.channels, slot.each).sum(1)
                gates[group.name].append(-total)
            for name, probe in probes.items():
                grad = model.get_submodule(name).weight.grad
                assert isinstance(grad, Tensor)
                probed[name].append(probe(grad).double())
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    result = Sensitivity(
        {name: torch.stack(rows).numpy() for name, rows in gates.items()},
        {name: torch.stack(rows).numpy() for name, rows in probed.items()},
    )
    for name, rows in (*result.gates.items(), *result.probed.items()):
        if not np.isfinite(rows).all():
            raise TaskError(
                f"the gradients at layer {name!r} are not finite", "check the weights and the calibration inputs"
            )
    return result


def _is_layer(facts: ModelFacts, name: str) -> bool:
    layer = facts.layer(name)
    return layer.weighted and not layer.depthwise


def _keep_input(name: str, seen: dict[str, list[Tensor]]) -> Callable[..., None]:
    def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].requires_grad:
            inputs[0].retain_grad()
            seen.setdefault(name, []).append(inputs[0])

    return hook


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
