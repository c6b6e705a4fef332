import pytest
import torch
from torch import Tensor, nn

from edgebuild.errors import TaskError
from edgebuild.lift import batch_is_free, export, lift


def test_layers_keep_their_names_and_the_outputs_their_values(small_net, image):
    lifted = lift(small_net, image)
    layers = {name for name, module in lifted.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    assert layers == {name for name, module in small_net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    assert torch.allclose(lifted(*image), small_net(*image), atol=1e-6)


def test_the_original_is_not_shared(small_net, image):
    lifted = lift(small_net, image)
    with torch.no_grad():
        lifted.stem.weight.zero_()
    assert small_net.stem.weight.abs().sum() > 0


def test_batches_train_with_dropout_and_batch_statistics(small_net, image):
    lifted = lift(small_net, image).train()
    before = lifted.block.bn1.running_mean.clone()
    x = torch.randn(4, 3, 8, 8)
    assert batch_is_free(lifted, image)
    first, second = lifted(x), lifted(x)
    assert not torch.equal(first, second)  # dropout
    assert not torch.equal(lifted.block.bn1.running_mean, before)


def test_an_exported_program_lifts_to_the_same_layers(small_net, image):
    from_program = lift(export(small_net, image), image)
    assert torch.allclose(from_program(*image), small_net(*image), atol=1e-6)
    assert isinstance(from_program.get_submodule("block.conv1"), nn.Conv2d)


class InPlaceOnViews(nn.Module):
    """Adds in place through a slice: later readers of the whole see it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, :2].add_(1.0)
        return y.mean((2, 3))


class InPlaceReadLater(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = nn.functional.relu_(y)
        return y.mean((2, 3)) + z.sum((2, 3))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.conv(self.conv(x))
        return {"a": y, "b": y.mean((2, 3))}


class SamePadding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same")
        self.scale = nn.Parameter(torch.full((4, 1, 1), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sub(self.conv(x) * self.scale, 1.0, alpha=2)


@pytest.mark.parametrize("kind", [InPlaceOnViews, InPlaceReadLater, Shared, SamePadding])
def test_odd_graphs_keep_their_outputs(kind, image):
    torch.manual_seed(0)
    model = kind().eval()
    wanted = model(*image)
    found = lift(model, image)(*image)
    wanted = tuple(wanted.values()) if isinstance(wanted, dict) else (wanted,)
    found = found if isinstance(found, tuple) else (found,)
    for want, got in zip(wanted, found, strict=True):
        assert torch.allclose(want, got, atol=1e-5)


def test_a_global_mean_becomes_the_pooling_that_delegates(image):
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((-1, -2))

    lifted = lift(Mean(), image)
    assert nn.functional.adaptive_avg_pool2d in {node.target for node in lifted.graph.nodes}
    assert lifted(*image).shape == (1, 3)


def test_control_flow_on_data_is_an_error_that_says_so(image):
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TaskError, match="does not export.*depends on the data"):
        lift(Branch(), image)


class Masked(nn.Module):
    """Writes constants that are neither parameters nor buffers into a view, as Swin's windows do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        y[:, 0:2] = x[:, 0:2] * torch.tensor([2.0, 3.0])
        y[:, 2:] = 1.0
        return y + x


def test_constants_of_an_inner_module_come_along():
    model = nn.Sequential(Masked(), nn.Linear(4, 2))
    lifted = lift(model, (torch.randn(1, 4),))
    x = torch.randn(3, 4)
    assert torch.allclose(lifted(x), model(x), atol=1e-6)
