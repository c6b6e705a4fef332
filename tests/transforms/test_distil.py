import pytest
import torch
from torch import nn

from edgebuild.errors import TaskError, TransformError
from edgebuild.spec import Distillation
from edgebuild.transforms import distil

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def agreement(a: nn.Module, b: nn.Module) -> float:
    return (a(X).argmax(1) == b(X).argmax(1)).float().mean().item()


def train(student, teacher, steps=200, labelled=False, batches=None, logits=True, rate=1e-2):
    settings = Distillation(steps=steps, learning_rate=rate)
    return distil.apply(student, teacher, batches or (lambda: X.split(16)), settings, labelled, logits, 0)


def test_the_student_comes_to_agree_with_the_teacher_and_is_a_copy():
    teacher, student = net(1), net(2)
    before = student[0].weight.clone()
    trained, how = train(student, teacher)
    assert agreement(trained, teacher) > max(0.9, agreement(student, teacher))
    assert how.last_loss < how.first_loss and how.steps == 200
    assert torch.equal(student[0].weight, before) and not trained.training


def test_the_same_seed_gives_the_same_weights():
    first, second = (train(net(2), net(1), steps=30)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_labels_alone_and_values():
    labels = net(1)(X).argmax(1)
    trained, _ = train(net(2), None, labelled=True, batches=lambda: zip(X.split(16), labels.split(16), strict=True))
    assert (trained(X).argmax(1) == labels).float().mean() > 0.9
    trained, how = train(net(2), net(1), logits=False)
    assert nn.functional.mse_loss(trained(X), net(1)(X)) < nn.functional.mse_loss(net(2)(X), net(1)(X))


def test_what_cannot_be_trained_says_why():
    with pytest.raises(TaskError, match="needs labels"):
        train(net(2), None)
    with pytest.raises(TaskError, match="are empty"):
        train(net(2), net(1), batches=lambda: [])
    with pytest.raises(TaskError, match="not \\(inputs, labels\\)"):
        train(net(2), net(1), labelled=True)
    with pytest.raises(TransformError, match="diverged"):
        train(net(2), net(1), batches=lambda: [X * float("nan")])
