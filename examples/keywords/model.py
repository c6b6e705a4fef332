"""The DS-CNN of "Hello Edge: Keyword Spotting on Microcontrollers" (Zhang et al. 2017, arXiv:1711.07128)."""

from torch import Tensor, nn


def separable(channels: int) -> nn.Sequential:
    """A depthwise 3x3 and a pointwise 1x1 convolution (arXiv:1704.04861)."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


class KeywordNet(nn.Module):
    """Float coefficients [batch, 1, 49, 10] to scores [batch, 10]. 23,050 parameters.

    64 channels and 4 blocks are the sizes of MLPerf Tiny's keyword spotting model, which has 12 words.
    """

    def __init__(self, words: int = 10, channels: int = 64, blocks: int = 4):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, channels, (10, 4), stride=2, padding=(4, 1), bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.features = nn.Sequential(*(separable(channels) for _ in range(blocks)))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels, words))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.features(self.stem(x)))
        return scores
