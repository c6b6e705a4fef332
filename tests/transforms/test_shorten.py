import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgebuild import judge, verify
from edgebuild.attempt import HOST, artifact_file
from edgebuild.backends import xnnpack
from edgebuild.devices import DEVICES
from edgebuild.divergence import divergence
from edgebuild.errors import TransformError
from edgebuild.lift import lift
from edgebuild.transforms import quantize, shorten


class Residual(nn.Module):
    """ResNet's block: a rectified sum, the shortcut a projection where the shape changes."""

    def __init__(self, into: int, out: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        same = stride == 1 and into == out
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(into, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class Inverted(nn.Module):
    """MobileNetV3's block: expand, depthwise, squeeze and excite, project; no activation after the sum."""

    def __init__(self, channels: int):
        super().__init__()
        wide = 4 * channels
        self.expand, self.bn1 = nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depthwise, self.bn2 = nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False), nn.BatchNorm2d(wide)
        self.squeeze, self.excite = nn.Conv2d(wide, 8, 1), nn.Conv2d(8, wide, 1)
        self.project, self.bn3 = nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.hardswish(self.bn2(self.depthwise(F.hardswish(self.bn1(self.expand(x))))))
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return x + self.bn3(self.project(y))


def head(channels: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def resnet() -> nn.Module:
    stem = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
    return nn.Sequential(*stem, Residual(16, 16), Residual(16, 32, 2), Residual(32, 32), Residual(32, 32), head(32))


def mobilenet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Inverted(16), Inverted(16), head(16))


class Encoder(nn.Module):
    """Two pre-norm or post-norm layers behind a projection of 8 rows of pixels."""

    def __init__(self, norm_first: bool):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
        self.embed = nn.Linear(24, 32)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.layers(self.embed(x.permute(0, 2, 1, 3).flatten(2))).mean(1))


# Each model with its blocks, and the layer of a block that, once it is zero, makes the whole branch zero.
NETS = {
    "resnet": (resnet, {"2.conv1": "2.bn2", "4.conv1": "4.bn2", "5.conv1": "5.bn2"}),
    "mobilenet": (mobilenet, {"1.expand": "1.bn3", "2.expand": "2.bn3"}),
    **{
        name: (
            lambda first=first: Encoder(first),
            {
                "layers.layers.0.self_attn.in_proj_query": "layers.layers.0.self_attn.out_proj",
                "layers.layers.0.linear1": "layers.layers.0.linear2",
                "layers.layers.1.self_attn.in_proj_query": "layers.layers.1.self_attn.out_proj",
                "layers.layers.1.linear1": "layers.layers.1.linear2",
            },
        )
        for name, first in (("pre-norm", True), ("post-norm", False))
    },
}


def trained(make):
    """With biases and batch-norm statistics that are no identity."""
    torch.manual_seed(0)
    net = make().train()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
        for _ in range(3):
            net(2 * torch.randn(16, 3, 8, 8) + 0.5)
    return net.eval()


@pytest.fixture(scope="module", params=NETS)
def net(request, image):
    make, ends = NETS[request.param]
    module = trained(make)
    return module, lift(module, image), ends


def test_blocks_are_found_in_order(net, image):
    _, lifted, ends = net
    found = shorten.blocks(lifted, image)
    assert [block.name for block in found] == list(ends)
    assert all(block.macs > 0 and block.layers[0] == block.name for block in found)
    layers = [layer for block in found for layer in block.layers]
    assert len(set(layers)) == len(layers)


def test_the_cost_of_a_block_is_that_of_its_layers(image):
    first = shorten.blocks(lift(trained(resnet), image), image)[0]
    assert first.layers == ("2.conv1", "2.conv2") and first.macs == 2 * 16 * 16 * 9 * 8 * 8


def test_a_dropped_block_is_a_branch_of_zeros(net, image, images):
    """Also for several at once and for batches, without a trace of the dropped layers, and the model as it was."""
    module, lifted, ends = net
    code, state = lifted.code, copy.deepcopy(lifted.state_dict())
    batch = (torch.cat([x for (x,) in images]),)
    for dropped in ([next(iter(ends))], list(ends)[1:]):
        masked = copy.deepcopy(module)
        for name in dropped:
            end = masked.get_submodule(ends[name])
            torch.nn.init.zeros_(end.weight)
            torch.nn.init.zeros_(end.bias)
        short = shorten.apply(lifted, image, dropped)
        assert torch.allclose(short(*batch), masked(*batch), atol=1e-5)
        gone = {layer for block in shorten.blocks(lifted, image) if block.name in dropped for layer in block.layers}
        assert gone and not gone & {name for name, _ in short.named_modules()}
        assert [block.name for block in shorten.blocks(short, image)] == [name for name in ends if name not in dropped]
    assert lifted.code == code and all(torch.equal(lifted.state_dict()[name], state[name]) for name in state)


def test_what_was_rectified_is_not_rectified_again(image):
    lifted = lift(trained(resnet), image)

    def count(model):
        return sum(node.target is F.relu for node in model.graph.nodes)

    assert count(lifted) - count(shorten.apply(lifted, image, ["4.conv1"])) == 2  # the inner one and that of the sum


class Odd(nn.Module):
    """Sums that are no block: a broadcast x, an inside that is read elsewhere or has no weights, two branches."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Conv2d(3, 3, 1) for _ in range(5))

    def forward(self, x):
        small = F.adaptive_avg_pool2d(self.a(x), 1)
        x = small + self.b(small.expand(-1, -1, 8, 8))
        inside = self.c(x)
        x = x + F.relu(inside)
        x = x + torch.sigmoid(x)
        x = self.d(x) + self.e(x)
        return x.mean((2, 3)) + inside.mean((2, 3))


def test_other_sums_are_no_blocks(image):
    torch.manual_seed(0)
    assert shorten.blocks(lift(Odd().eval(), image), image) == ()


def test_an_unknown_block_is_an_error_that_names_the_others(image):
    with pytest.raises(TransformError, match=r"'3\.conv1'.*does not have") as error:
        shorten.apply(lift(trained(resnet), image), image, ["3.conv1"])  # behind a projection
    assert "2.conv1, 4.conv1, 5.conv1" in str(error.value.remedy)


def test_the_least_loss_goes_first(image, images):
    lifted = lift(trained(resnet), image)
    found = list(shorten.greedy(lifted, image, images, logits=True))
    assert [len(short.dropped) for short in found] == [1, 2, 3]
    losses = [short.loss for short in found]
    assert losses == sorted(losses) and losses[0] > 0
    batch = (torch.cat([x for (x,) in images]),)
    alone = {
        block.name: divergence((lifted(*batch),), (shorten.apply(lifted, image, [block.name])(*batch),), True)
        for block in shorten.blocks(lifted, image)
    }
    first = found[0].dropped[0].name
    assert first == min(alone, key=alone.__getitem__) and losses[0] == pytest.approx(alone[first], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "precision"), [("resnet", "int8"), ("mobilenet", "fp32"), ("pre-norm", "int8"), ("post-norm", "fp32")]
)
def test_artifacts_answer_as_eager_does(name, precision, image, images):
    make, ends = NETS[name]
    lifted = lift(trained(make), image)
    model = shorten.apply(lifted, image, list(ends)[1:])
    if precision == "int8":
        model = quantize.apply(model, image, images, xnnpack.quantizer()).model
    artifact = xnnpack.lower(model, image)
    with artifact_file(artifact) as path, DEVICES["host"].load(path, HOST, 1) as session:
        found = verify.run(session, images)
    least = judge.LEAST_SQNR_DB[precision]
    assert judge.parity(found, verify.eager(model, images), "host", "eager", least, logits=True).ok
