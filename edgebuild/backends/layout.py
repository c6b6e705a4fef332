"""Tensors as microcontrollers read them: images with their channels innermost in memory."""

import copy

import torch
from torch import Tensor, nn


def channels_last(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs as CMSIS-NN and the NPU read them: images with their channels innermost."""
    return tuple(_innermost(x) if x.dim() == 4 else x for x in inputs)


def _innermost(x: Tensor) -> Tensor:
    """As torch.channels_last, with strides that say so for a single channel too, where PyTorch takes any for both."""
    _, channels, height, width = x.shape
    strides = (height * width * channels, 1, width * channels, channels)
    return torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)


def of_weights(model: nn.Module) -> nn.Module:
    """A copy of the model with its convolutions' weights in the same order, so that what they make is too."""
    made = copy.deepcopy(model)
    for tensor in (*made.parameters(), *made.buffers()):
        if tensor.dim() == 4:
            tensor.data = _innermost(tensor.data)
    return made
