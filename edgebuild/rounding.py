"""What int8 rounds away, by the rules of PyTorch's XNNPACK quantizer: weights symmetric per output channel, activations
affine per tensor with the range that the calibration inputs show."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

SMALLEST_STEP = 2.0**-12  # the quantizer's own lower bound
WEIGHT_STEPS = 127
ACTIVATION_STEPS = 255


@dataclass(frozen=True)
class Rounding:
    """The range of an activation over the samples seen, and the sum of its squared gradients where it is not zero.

    Zero is a value of int8 whatever the range is: a ReLU's zeros are not rounded.
    """

    low: float = 0.0
    high: float = 0.0
    squares: float = 0.0

    def seen(self, x: Tensor, grad: Tensor) -> "Rounding":
        """With one more sample, a tensor of any shape and its gradient."""
        low, high = (float(bound) for bound in torch.aminmax(x))
        squares = float(grad[x != 0].double().square().sum())
        return Rounding(min(self.low, low), max(self.high, high), self.squares + squares)

    @property
    def variance(self) -> float:
        """E[(g . d)^2] summed over the samples, with rounding errors uniform over a step and independent of each other
        (Bennett 1948)."""
        step = max((self.high - self.low) / ACTIVATION_STEPS, SMALLEST_STEP)
        return self.squares * step**2 / 12


def weight_error(model: fx.GraphModule, name: str) -> Tensor:
    """A layer's int8 weights minus its own, in the weights' shape. Batch norm is folded in before they are rounded."""
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    over = (-1, *[1] * (weight.dim() - 1))
    factor = _norm_factor(model, name, weight).abs().clamp(min=1e-12).reshape(over)
    step = torch.clamp(weight.flatten(1).abs().amax(1).reshape(over) / WEIGHT_STEPS, min=SMALLEST_STEP / factor)
    return (weight / step).round() * step - weight


def _norm_factor(model: fx.GraphModule, name: str, weight: Tensor) -> Tensor:
    """What the batch norm behind a convolution multiplies its channels by; 1 where there is none."""
    node = next(node for node in model.graph.nodes if node.op == "call_module" and node.target == name)
    for user in node.users:
        norm = model.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None and len(node.users) == 1:
            gain = norm.weight.detach() if norm.weight is not None else torch.ones_like(norm.running_var)
            return gain / (norm.running_var + norm.eps).sqrt()
    return torch.ones(len(weight))
