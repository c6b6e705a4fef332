import torch
from torch import nn

from edgebuild.analyse import analyse, check_prunable, cut
from edgebuild.lift import lift
from edgebuild.plan import Choice
from edgebuild.spec import Slot


def facts_of(model, inputs):
    lifted = lift(model, inputs)
    return lifted, check_prunable(lifted, inputs, analyse(lifted, inputs))


def test_layers_have_their_shapes_parameters_and_macs(small_net, image):
    _, facts = facts_of(small_net, image)
    right = facts.layer("right")
    assert (right.in_channels, right.out_channels, right.kernel, right.positions) == (16, 8, (3, 3), 64)
    assert right.macs == 16 * 8 * 9 * 64
    assert facts.layer("depthwise").macs == 24 * 9 * 16
    weights = {name: m for name, m in small_net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert {layer.name for layer in facts.layers if layer.weighted} == set(weights)
    for name, module in weights.items():
        assert facts.layer(name).weights == module.weight.numel()


def test_groups_follow_residual_concat_depthwise_and_flatten(small_net, image):
    _, facts = facts_of(small_net, image)
    assert {group.name for group in facts.groups} == {"stem", "block.conv1", "left", "right", "point", "hidden"}
    stem = facts.group("stem")
    assert {"stem", "block.conv2"} <= set(stem.outputs)
    assert {"block.conv1", "left", "right"} <= set(stem.inputs)
    right = facts.group("right")
    assert right.outputs["depthwise"] == Slot(16, 1)
    assert right.inputs["point"] == Slot(16, 1)
    assert facts.group("point").inputs["hidden"] == Slot(0, 16)
    assert facts.unprunable == {"classify": "its channels are the model's output"}


def test_cutting_a_group_cuts_every_layer_of_it(small_net, image):
    lifted, facts = facts_of(small_net, image)
    pruned = cut(lifted, image, {"stem": [0, 3, 5], "point": [1]})
    assert pruned.stem.weight.shape[0] == pruned.block.conv2.weight.shape[0] == 13
    assert pruned.left.weight.shape[1] == 13
    assert pruned.hidden.weight.shape[1] == 31 * 16
    assert lifted.stem.weight.shape[0] == 16
    assert pruned(*image).shape == (1, 10)


def test_cutting_dead_channels_does_not_change_the_outputs(small_net, image):
    lifted, _ = facts_of(small_net, image)
    with torch.no_grad():
        for name in ("left", "right"):
            lifted.get_submodule(name).weight[2] = 0
            lifted.get_submodule(name).bias[2] = -1
        lifted.depthwise.bias[[2, 18]] = 0
        lifted.depthwise.weight[[2, 18]] = 0
    pruned = cut(lifted, image, {"left": [2], "right": [2]})
    assert torch.allclose(pruned(*image), lifted(*image), atol=1e-5)


def test_peak_memory_is_that_of_the_liveliest_step(image):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 32, 3, padding=1)
            self.b = nn.Conv2d(32, 2, 3, padding=1)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    _, facts = facts_of(Wide().eval(), image)
    whole = Choice(facts, "fp32")
    assert max(whole.live_bytes()) == 4 * (3 + 32 + 2) * 64  # at `b`: its input and output, and the model's input
    assert max(Choice(facts, "fp32", {"a": 8}).live_bytes()) == 4 * (3 + 8 + 2) * 64


def test_a_width_baked_into_the_graph_is_unprunable_with_the_reason(image):
    class Baked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3, padding=1)
            self.b = nn.Linear(8 * 64, 4)

        def forward(self, x):
            return self.b(self.a(x).view(-1, 8, 64).reshape(-1, 512))

    _, facts = facts_of(Baked().eval(), image)
    assert "a" not in {group.name for group in facts.groups}
    assert "a" in facts.unprunable or "*" in facts.unprunable


def test_grouped_convolutions_keep_their_width(image):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 36, 3)).eval()
    _, facts = facts_of(model, image)
    assert "grouped convolution" in facts.unprunable["0"]
