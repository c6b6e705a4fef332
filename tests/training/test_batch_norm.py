import copy

import pytest
import torch
from torch import Tensor, nn

from edgebuild.training import batch_norm

SHAPES = [(32, 8, 32, 32), (16, 12, 32, 32), (64, 24, 16, 16), (1, 40, 64, 64), (128, 5, 32, 16)]


def net(channels: int) -> nn.Module:
    torch.manual_seed(channels)
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    return nn.Sequential(norm).train()


def images(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 2
    return x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_few_channels_are_trained_as_by_pytorch(shape, dtype):
    plain = net(shape[1])
    folded = copy.deepcopy(plain)
    batch_norm.for_training(folded)
    assert folded[0]._folds(images(shape, dtype))
    given = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    told = []
    for model in (plain, folded):
        x = images(shape, dtype)
        y = model(x)
        y.backward(given)
        told.append([y, x.grad, *(p.grad for p in model.parameters())])
    apart = 1e-5 if dtype is torch.float32 else 1e-2
    for wanted, found in zip(*told, strict=True):
        assert wanted.shape == found.shape and wanted.dtype == found.dtype
        assert (wanted.float() - found.float()).norm() <= apart * wanted.float().norm()
    assert told[1][0].is_contiguous(memory_format=torch.channels_last)
    batch_norm.as_before(folded)
    assert type(folded[0]) is nn.BatchNorm2d
    for (name, wanted), found in zip(plain.state_dict().items(), folded.state_dict().values(), strict=True):
        assert torch.allclose(wanted, found, rtol=1e-4, atol=1e-4), name


def test_what_does_not_fold_is_pytorchs_own():
    kinds = nn.BatchNorm2d(16), nn.BatchNorm2d(8, affine=False), nn.BatchNorm1d(8), nn.BatchNorm2d(8)
    model = nn.Sequential(*kinds)
    batch_norm.for_training(model)
    assert tuple(model[:3]) == kinds[:3]
    folded, x = model[3], images((32, 8, 32, 32), torch.float32)
    assert folded._folds(x) and not folded._folds(x.double()) and not folded._folds(x.contiguous())
    for other in (images((4, 8, 8, 8), torch.float32), images((64, 8, 21, 21), torch.float32)):  # small; no even pixels
        assert not folded._folds(other)
        assert torch.equal(folded(other), copy.deepcopy(folded.norm)(other))
    folded.eval()
    assert torch.equal(folded(x), folded.norm(x))
    assert not folded.bfloat16()._folds(x.bfloat16())
