"""Small real models, and a cache of the tests' own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgebuild import cache


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without anything in it, for tests of what is made on first use."""
    monkeypatch.setenv("EDGEBUILD_CACHE", str(tmp_path / "cache"))
    return cache.root()


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


class SmallNet(nn.Module):
    """A residual sum, a depthwise convolution, a concat, in-place operators, a flatten: what channel groups follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = Block(16)
        self.left = nn.Conv2d(16, 16, 1)
        self.right = nn.Conv2d(16, 8, 3, padding=1, stride=1)
        self.depthwise = nn.Conv2d(24, 24, 3, stride=2, padding=1, groups=24)
        self.point = nn.Conv2d(24, 32, 1)
        self.dropout = nn.Dropout(0.1)
        self.hidden = nn.Linear(32 * 4 * 4, 48)
        self.classify = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(nn.functional.relu_(self.stem(x)))
        x = torch.cat([self.left(x), self.right(x)], 1).relu_()
        x = torch.relu(self.point(nn.functional.relu6(self.depthwise(x))))
        x = self.dropout(torch.flatten(x, 1))
        return self.classify(torch.relu(self.hidden(x)))


@pytest.fixture(scope="session")
def small_net() -> nn.Module:
    """SmallNet with batch-norm statistics that are no identity, in eval mode."""
    torch.manual_seed(0)
    net = SmallNet().train()
    with torch.no_grad():
        for _ in range(5):
            net(torch.randn(16, 3, 8, 8) * 2 + 0.5)
    return net.eval()


@pytest.fixture(scope="session")
def image() -> tuple[Tensor, ...]:
    return (torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)


@pytest.fixture(scope="session")
def images() -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(1, 3, 8, 8, generator=generator),) for _ in range(16)]


@pytest.fixture(autouse=True)
def no_gradients_left() -> Iterator[None]:
    yield
    torch.set_grad_enabled(True)
