"""A convolutional teacher for MNIST, and a student that has to do without convolutions."""

from torch import Tensor, nn


def _convolutions(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two 3x3 convolutions, then half the height and width."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


class Teacher(nn.Module):
    """Float images [batch, 1, 28, 28] in [0, 1] to scores [batch, 10]. 273,066 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(_convolutions(1, 16), _convolutions(16, 48))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(48 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.features(x))
        return scores


class Student(nn.Module):
    """Same inputs and outputs as the teacher, of linear layers alone. 52,650 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(28 * 28, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(x)
        return scores
