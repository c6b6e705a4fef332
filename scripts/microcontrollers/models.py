"""Models of the size that microcontrollers run: MLPerf Tiny's four (arXiv:2106.07597), and others to predict for."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias, its batch norm, a ReLU."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def separable(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A depthwise 3x3 and a pointwise convolution."""
    return nn.Sequential(convolution(inputs, inputs, 3, stride, inputs), convolution(inputs, outputs, 1))


def head(channels: int, classes: int) -> nn.Sequential:
    """The average over the image, and a linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Block(nn.Module):
    """A residual block of two convolutions (arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = convolution(inputs, outputs, 3, stride)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.second(self.first(x))) + self.short(x))


class Fire(nn.Module):
    """A squeeze and two parallel expansions, whose channels are put side by side (arXiv:1602.07360)."""

    def __init__(self, inputs: int, squeezed: int, expanded: int):
        super().__init__()
        self.squeeze = convolution(inputs, squeezed, 1)
        self.one, self.three = convolution(squeezed, expanded, 1), convolution(squeezed, expanded, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        return torch.cat([self.one(x), self.three(x)], 1)


class Inverted(nn.Module):
    """MobileNetV2's block: widened, filtered, narrowed, added (arXiv:1801.04381)."""

    def __init__(self, channels: int, factor: int):
        super().__init__()
        wide = factor * channels
        self.body = nn.Sequential(convolution(channels, wide, 1), convolution(wide, wide, 3, 1, wide))
        self.narrow = nn.Sequential(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.narrow(self.body(x))
        return y


def resnet8() -> nn.Module:
    """MLPerf Tiny's image classification: [1, 3, 32, 32] to ten classes, 78,666 parameters, 12.5 million MACs."""
    return nn.Sequential(convolution(3, 16), Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2), head(64, 10))


def ds_cnn(channels: int = 64, words: int = 12) -> nn.Module:
    """MLPerf Tiny's keyword spotting: [1, 1, 49, 10]; the keywords example has ten words."""
    stem = nn.Conv2d(1, channels, (10, 4), 2, (4, 1), bias=False)
    blocks = [separable(channels, channels) for _ in range(4)]
    return nn.Sequential(stem, nn.BatchNorm2d(channels), nn.ReLU(), *blocks, head(channels, words))


def mobilenet_v1(width: float = 0.25) -> nn.Module:
    """MLPerf Tiny's visual wake words: [1, 3, 96, 96] to two classes (arXiv:1704.04861)."""
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    channels, layers = int(32 * width), [convolution(3, int(32 * width), 3, 2)]
    for wide, stride in plan:
        layers.append(separable(channels, int(wide * width), stride))
        channels = int(wide * width)
    return nn.Sequential(*layers, head(channels, 2))


def autoencoder() -> nn.Module:
    """MLPerf Tiny's anomaly detection: [1, 640] to itself."""
    sizes = [640, 128, 128, 128, 128, 8, 128, 128, 128, 128]
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 640))


def lenet() -> nn.Module:
    """Two convolutions with pools and two linear layers: [1, 1, 28, 28]."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def vgg() -> nn.Module:
    """Convolutions and pools alone: [1, 3, 32, 32]."""
    layers = [convolution(3, 16), convolution(16, 16), nn.MaxPool2d(2), convolution(16, 32), convolution(32, 32)]
    return nn.Sequential(*layers, nn.MaxPool2d(2), convolution(32, 64), head(64, 10))


def squeezenet() -> nn.Module:
    """Concatenations: [1, 3, 64, 64]."""
    fires = [Fire(16, 8, 16), Fire(32, 8, 16), nn.MaxPool2d(2), Fire(32, 16, 32)]
    return nn.Sequential(convolution(3, 16, 3, 2), *fires, head(64, 10))


def inverted() -> nn.Module:
    """Wide tensors between narrow ones: [1, 3, 48, 48]."""
    blocks = [Inverted(16, 4), Inverted(16, 6), convolution(16, 24, 3, 2), Inverted(24, 6)]
    return nn.Sequential(convolution(3, 16, 3, 2), *blocks, head(24, 10))


# name -> what makes it, and the shape of its input
MODELS = {
    "resnet8": (resnet8, (1, 3, 32, 32)),
    "ds_cnn": (ds_cnn, (1, 1, 49, 10)),
    "mobilenet_v1 x0.25": (mobilenet_v1, (1, 3, 96, 96)),
    "autoencoder": (autoencoder, (1, 640)),
    "lenet": (lenet, (1, 1, 28, 28)),
    "vgg": (vgg, (1, 3, 32, 32)),
    "squeezenet": (squeezenet, (1, 3, 64, 64)),
    "inverted": (inverted, (1, 3, 48, 48)),
    "ds_cnn 32 channels": (lambda: ds_cnn(32), (1, 1, 49, 10)),
    "mobilenet_v1 x0.125": (lambda: mobilenet_v1(0.125), (1, 3, 96, 96)),
}
