import pytest
import torch
from torch import nn

from edgebuild.spec import Distillation
from edgebuild.training.learner import Lesson
from edgebuild.training.objective import UNLABELLED, Hint, Watched, feature_loss, objective
from edgebuild.transforms import distil

SETTINGS = Distillation(temperature=2.0, teacher_weight=0.25)
Y, T = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[0.0, 2.0, 0.0]])


def test_the_loss_is_kl_times_t_squared_mixed_with_cross_entropy():
    p, q = (T / 2).softmax(-1), (Y / 2).softmax(-1)
    soft = 4 * float((p * (p / q).log()).sum())
    hard = -float(Y.log_softmax(-1)[0, 1])
    assert float(objective((Y,), (T,), None, SETTINGS, True)) == pytest.approx(soft)
    assert float(objective((Y,), (), torch.tensor([1]), SETTINGS, True)) == pytest.approx(hard)
    both = objective((Y,), (T,), torch.tensor([1]), SETTINGS, True)
    assert float(both) == pytest.approx(0.25 * soft + 0.75 * hard)
    two = objective((torch.cat((Y, Y)),), (), torch.tensor([1, UNLABELLED]), SETTINGS, True)
    assert float(two) == pytest.approx(hard / 2)  # a row without a label counts as 0
    assert float(objective((Y,), (), torch.tensor([[0.0, 1.0, 0.0]]), SETTINGS, True)) == pytest.approx(hard)
    assert float(objective((Y,), (T,), None, SETTINGS, False)) == pytest.approx(2.0)  # mean of 1, 4 and 1


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.LazyLinear(3))
    teacher(torch.zeros(1, 1, 5, 5))
    student = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.Flatten(), nn.LazyLinear(3))
    student(torch.zeros(1, 1, 5, 5))
    return student, teacher


HINTS = (Hint("2", "2", torch.tensor([1, 3])),)


def features(student: nn.Module, teacher: nn.Module, x: torch.Tensor) -> float:
    watched = Watched(student, ("2",)), Watched(teacher, ("2",))
    with torch.no_grad():
        student(x), teacher(x)
    for part in watched:
        part.close()
    return float(feature_loss(HINTS, watched[0].read, watched[1].read, teacher))


def test_features_are_those_of_the_channels_that_were_kept():
    student, teacher = pair()
    x = torch.randn(8, 1, 5, 5)
    assert features(student, teacher, x) > 0.1
    with torch.no_grad():
        student[0].weight.copy_(teacher[0].weight[[1, 3]])
        student[0].bias.copy_(teacher[0].bias[[1, 3]])
    assert features(student, teacher, x) == pytest.approx(0.0, abs=1e-10)
    assert not student[2]._forward_pre_hooks and not teacher[2]._forward_pre_hooks


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_hints_bring_the_features_together(weight):
    student, teacher = pair()
    x = torch.randn(64, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    settings = Distillation(steps=60, learning_rate=1e-2, hint_weight=weight)
    trained, _ = distil.apply(student, teacher, lambda: x.split(16), Lesson(settings, False, True, 0, hints=HINTS))
    closer = features(trained, teacher, x) / features(student, teacher, x)
    assert closer < 0.5 if weight else closer > 0.5
    assert not trained[2]._forward_pre_hooks and not teacher[2]._forward_pre_hooks
