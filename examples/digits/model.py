"""A residual network for 8x8 digits, small enough to train on a laptop and rich enough to be worth compressing."""

from torch import Tensor, nn


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes (arXiv:1512.03385)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def separable(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """A depthwise 3x3 and a pointwise 1x1 convolution (arXiv:1704.04861)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels),
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class DigitsNet(nn.Module):
    """Float images [batch, 1, 8, 8] with values in [0, 16] to scores [batch, 10]. 186,218 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.features = nn.Sequential(Residual(32, 32), Residual(32, 64, stride=2), separable(64, 128, stride=2))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(128 * 2 * 2, 192), nn.ReLU(), nn.Linear(192, 10))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.features(self.stem(x * (1 / 16))))
        return scores
