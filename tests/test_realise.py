"""What a plan becomes: the artifact itself is looked into."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from edgebuild.analyse import analyse
from edgebuild.backends import HOST
from edgebuild.base import Base, lifted_digest, prepare
from edgebuild.built import Built
from edgebuild.clock import Clock
from edgebuild.compress import compress
from edgebuild.lift import lift
from edgebuild.load import Loaded
from edgebuild.realise import realise
from edgebuild.sensitivity import Sensitivity
from edgebuild.spec import Budget, Form, Plan, Precision, Profile, Width
from edgebuild.task import Task
from edgebuild.transforms import distil

PROFILE = Profile("p", "t", "host", "pte", (Budget("size", 1e6),))


def in_fp32(weight: Tensor, artifact: bytes) -> bool:
    """Whether the artifact holds a weight as XNNPACK takes it in fp32: output channels first, input channels last."""
    return weight.detach().movedim(1, -1).contiguous().numpy().tobytes() in artifact


def test_a_factorized_layer_that_is_kept_in_fp32_keeps_its_factors_so(empty_cache):
    """In 4-bit groups, where layers are chosen by their names alone."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1)]
    samples = tuple((x,) for x in torch.randn(8, 3, 8, 8).split(1))
    inputs = samples[0]
    model = lift(nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(256, 96), nn.ReLU(), nn.Linear(96, 64)), inputs)
    base = Base("model", model, analyse(model, inputs), Sensitivity({}, {}, {}, {}), (), lifted_digest(model), HOST)
    loaded = Loaded("small", Task(model, inputs, list(samples)), samples, "")
    forms = (
        *(Form("0", "spatial", (4,)), Form("2", "tucker2", (8, 8)), Form("4", "svd", (8,))),
        *(Form("6", "svd", (32,)), Form("8", "svd", (32,))),
    )
    plan = Plan(forms=forms, precision="int8", keep_fp32=("2", "8"), scheme="8da4w")

    data = realise(base, plan, loaded, PROFILE, model, Clock(lambda message, seconds: None).training).artifact.data
    ((_, factorized),) = compress(base, plan, loaded)
    factors = {name: weight for name, weight in factorized.named_parameters() if name.endswith(".weight")}
    assert len(factors) == 11
    for name, weight in factors.items():
        if weight.ndim == 2:  # convolutions are left alone
            assert in_fp32(weight, data) == (name.partition(".")[0] in plan.keep_fp32), name


def test_a_deep_cut_is_made_in_two_steps_with_training_in_between(small_net, images, empty_cache, monkeypatch):
    profile = replace(PROFILE, techniques=("prune", "distil"))
    loaded = Loaded("small", Task(small_net, images[0], list(images)), tuple(images), "")
    base = prepare("model", lift(small_net, images[0]), loaded, profile, HOST, "", False)
    told = Clock(lambda message, seconds: None).training

    def built(share: float, precision: Precision = "fp32") -> Built:
        widths = tuple(Width(g.name, max(1, int(g.channels * share)), g.channels) for g in base.facts.groups)
        plan = Plan(widths=widths, precision=precision, distil=True, distil_steps=7)
        return realise(base, plan, loaded, profile, base.model, told)

    shallow, deep = built(0.9), built(0.2)
    assert "half way" not in shallow.training and shallow.steps == 7
    assert deep.training.startswith("half way to its widths: 3 steps") and "at its widths: 4 steps" in deep.training
    assert deep.steps == 7
    assert len(deep.artifact.data) < len(shallow.artifact.data)

    assert "100% of each batch mixed by CutMix" in shallow.training, "there are no samples but the calibration's"
    loaded = replace(loaded, task=replace(loaded.task, train=lambda: [torch.cat([x for (x,) in images])]))
    assert "CutMix" not in built(0.8).training

    monkeypatch.setattr(distil, "apply", None)
    assert built(0.2, "int8").training == deep.training, "both trainings were kept"
