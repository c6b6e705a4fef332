from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from edgebuild.errors import TaskError, TransformError
from edgebuild.spec import Distillation, Seconds
from edgebuild.training import run
from edgebuild.training.learner import Lesson
from edgebuild.training.optimizer import SGD_RATE
from edgebuild.transforms import distil

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def agreement(a: nn.Module, b: nn.Module) -> float:
    return (a(X).argmax(1) == b(X).argmax(1)).float().mean().item()


def lesson(steps=200, labelled=False, logits=True, rate=1e-2, **fields) -> Lesson:
    return Lesson(Distillation(steps=steps, learning_rate=rate), labelled, logits, 0, **fields)


def train(student, teacher, batches=None, **fields):
    return distil.apply(student, teacher, batches or (lambda: X.split(16)), lesson(**fields))


def test_the_student_comes_to_agree_with_the_teacher_and_is_a_copy():
    teacher, student = net(1), net(2)
    before = student[0].weight.clone()
    held_out = tuple((x,) for x in X.split(1))
    trained, how = train(student, teacher, held_out=held_out)
    assert agreement(trained, teacher) > max(0.9, agreement(student, teacher))
    assert how.last_loss < how.first_loss and how.steps == how.asked == 200
    assert how.after.divergence < how.before.divergence
    assert how.after.agreement == pytest.approx(agreement(trained, teacher))
    assert how.before.agreement == pytest.approx(agreement(student, teacher))
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


def test_weights_that_were_closer_before_the_training_are_kept():
    teacher, noise = net(1), torch.randn(64, 6, generator=torch.Generator().manual_seed(1)) * 100
    held_out = tuple((x,) for x in X.split(1))
    trained, how = train(teacher, net(3), batches=lambda: noise.split(16), steps=20, held_out=held_out)
    assert how.kept in ("last", "average")
    trained, how = train(teacher, teacher, batches=lambda: noise.split(16), steps=20, rate=0.5, held_out=held_out)
    assert how.kept == "start" and how.after == how.before
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), teacher.parameters(), strict=True))


class Touchy(nn.Module):
    """Its outputs are infinite once a weight has moved by more than half."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.norm = nn.BatchNorm2d(3)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x):
        scores = self.norm(self.layer(x)[..., None, None])[..., 0, 0]
        return scores / (self.layer.weight.abs().max() < 0.5)


def test_without_a_rate_a_training_that_diverges_starts_again_slower():
    with pytest.raises(TransformError, match="diverged"):
        train(Touchy(), net(1), steps=40, rate=0.5)
    trained, how = train(Touchy(), net(1), steps=40, rate=0.0)
    assert how.steps == 40 and how.how == f"SGD with a peak rate of {SGD_RATE * distil.SLOWER:g}"


def test_time_is_filled_with_as_many_steps_as_fit():
    timed = replace(lesson(), settings=Distillation(steps=0, time=Seconds(2.0)))
    trained, how = distil.apply(net(2), net(1), lambda: X.split(16), timed)
    assert how.steps == how.asked > 20 and how.seconds < 20
    assert agreement(trained, net(1)) > agreement(net(2), net(1))


def test_what_cannot_be_trained_says_why():
    with pytest.raises(TaskError, match="needs labels"):
        train(net(2), None)
    with pytest.raises(TaskError, match="are empty"):
        train(net(2), net(1), batches=lambda: [])
    with pytest.raises(TaskError, match="not \\(inputs, labels\\)"):
        train(net(2), net(1), labelled=True)
    with pytest.raises(TransformError, match="diverged at step 0"):
        train(net(2), net(1), batches=lambda: [X * float("nan")])


@pytest.mark.parametrize(("slow_from", "takes", "steps"), [(100, 0.05, (200, 400)), (1000, 0.5, (990, 1010))])
def test_a_schedule_is_shortened_where_the_machine_gets_slower(monkeypatch, slow_from, takes, steps):
    now, made = 0.0, 0

    def batches():
        nonlocal now, made
        for x in X.split(16):
            now += 0.01 if made < slow_from else takes
            made += 1
            yield x

    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: now))
    settings = Distillation(steps=0, time=Seconds(10.0), learning_rate=1e-3)
    _, how = distil.apply(net(2), net(1), batches, Lesson(settings, False, True, 0))
    assert steps[0] < how.steps < steps[1] and how.steps == how.asked
    assert how.seconds < run.LATE * 10 + 8 * takes
