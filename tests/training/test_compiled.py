import pytest
import torch
from torch import Tensor, nn

from edgebuild.lift import lift
from edgebuild.training.compiled import MOST_FORMS, Answering, Means, evaluating

BF16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.second(x) + x)
        return self.last(x.mean((2, 3)))


def lifted(model: nn.Module) -> nn.Module:
    return lift(model.eval(), (torch.randn(1, 3, 8, 8),))


def images(rows: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    return (torch.randn(rows, 3, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last),)


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.skipif(not BF16, reason="no bf16"))])
def test_what_is_compiled_gives_what_the_model_gives(bf16):
    model = lifted(Net())
    plain, compiled = (Answering(model, ("last",), Means(bf16, compiled)) for compiled in (False, True))
    apart = 0.05 if bf16 else 1e-5
    for rows in (*range(1, MOST_FORMS + 3), 1):  # beyond the forms that it compiles for, it computes as it is
        for inputs in (images(rows), (images(rows)[0] * 2 + 1,)):
            wanted, found = plain(inputs), compiled(inputs)
            assert len(found) == len(wanted) == 2 and not found[0].requires_grad and found[0].dtype == wanted[0].dtype
            for y, z in zip(wanted, found, strict=True):
                assert y.shape == z.shape and torch.allclose(y.float(), z.float(), rtol=apart, atol=apart)
    forms = list(compiled._forms.values())
    assert len(forms) == MOST_FORMS and None not in forms and not plain._forms
    assert not torch.jit.onednn_fusion_enabled()


def test_what_is_not_lifted_or_differs_from_call_to_call_is_computed_as_it_is():
    noisy = lifted(Net())
    noisy.register_forward_hook(lambda module, inputs, output: (output[0] + torch.randn(8, 4),))
    for model in (Net(), noisy):
        answering = Answering(model, means=Means(compiled=True))
        assert len(answering(images(8))) == 1 and list(answering._forms.values()) == [None]


def test_each_module_gets_its_mode_back():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3))).train()
    model[1].eval()
    with evaluating(model):
        assert not model.training and not model[0].training
    assert model.training and model[0].training and not model[1].training and not model[1][0].training
