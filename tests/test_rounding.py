import copy

import pytest
import torch
from torch import nn

from edgebuild.analyse import analyse
from edgebuild.lift import lift
from edgebuild.rounding import Rounding, weight_error
from edgebuild.sensitivity import TEMPERATURE, measure


@pytest.fixture(scope="module")
def lifted(small_net, image):
    return lift(small_net, image)


def test_no_weight_moves_by_more_than_half_a_step(lifted):
    weight = lifted.hidden.weight.detach()
    half = weight.abs().amax(1, keepdim=True) / 127 / 2
    error = weight_error(lifted, "hidden")
    assert (error.abs() <= half * 1.0001).all()
    assert error.abs().max() > 0.9 * half.max()


def test_small_weights_are_lost_below_the_smallest_step(image):
    model = lift(nn.Sequential(nn.Conv2d(3, 4, 1)), image)
    with torch.no_grad():
        model.get_submodule("0").weight.fill_(1e-5)
    assert torch.allclose(weight_error(model, "0"), torch.tensor(-1e-5))


def test_a_batch_norm_is_folded_in_before_the_weights_are_rounded(lifted):
    """The norm scales a channel and its step alike, so that only the smallest step can tell."""
    error = weight_error(lifted, "block.conv1")
    weight = lifted.get_submodule("block.conv1").weight.detach()
    step = weight.flatten(1).abs().amax(1) / 127
    assert (error.flatten(1).abs().amax(1) <= step / 2 * 1.0001).all()


def test_zeros_are_not_rounded():
    seen = Rounding().seen(torch.tensor([0.0, 0.0, 2.55]), torch.tensor([5.0, 7.0, 3.0]))
    assert seen.variance == pytest.approx(9 * 0.01**2 / 12)
    assert seen.seen(torch.tensor([-2.55]), torch.tensor([0.0])).high == pytest.approx(2.55)


@pytest.mark.parametrize("name", ["stem", "left", "depthwise", "point", "hidden", "classify"])
def test_the_loss_of_int8_is_that_of_the_rounded_layer(lifted, image, images, name):
    """The estimate against the KL divergence that rounding the layer's weights and input really makes, within 3x."""
    estimated = measure(lifted, analyse(lifted, image), images, {}, {}, logits=True).casts[name]
    exact = copy.deepcopy(lifted).double()  # the divergence is below float32's rounding
    layer = exact.get_submodule(name)
    batch = torch.cat([x for (x,) in images]).double()
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        before = (exact(batch) / TEMPERATURE).log_softmax(-1)
    handle.remove()
    low, high = min(0.0, float(seen[0].min())), max(0.0, float(seen[0].max()))
    step = (high - low) / 255
    zero = round(-128 - low / step)
    quantized = copy_with(exact, name, weight_error(lifted, name))
    quantized.get_submodule(name).register_forward_pre_hook(
        lambda module, inputs: ((inputs[0] / step).round() + zero).clamp(-128, 127).sub(zero).mul(step)
    )
    with torch.no_grad():
        after = (quantized(batch) / TEMPERATURE).log_softmax(-1)
    real = float((before.exp() * (before - after)).sum(-1).mean())
    assert estimated / 3 < real < estimated * 3


def copy_with(model, name, change):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_submodule(name).weight += change
    return other
