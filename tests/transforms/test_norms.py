import copy

import pytest
import torch
from torch import nn

from edgebuild.divergence import distance
from edgebuild.lift import lift
from edgebuild.transforms import norms

SAMPLES = tuple((x,) for x in (torch.randn(70, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 + 0.5).split(1))


def test_statistics_are_those_of_the_samples(small_net):
    model = lift(small_net, SAMPLES[0])
    again = norms.restated(model, SAMPLES[:64])
    norm, before = again.get_submodule("block.bn1"), model.get_submodule("block.bn1")
    seen = []
    handle = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    again(torch.cat([x for (x,) in SAMPLES[:64]]))
    handle.remove()
    assert torch.allclose(norm.running_mean, seen[0].mean((0, 2, 3)), atol=1e-4)
    assert not again.training and norm.momentum == before.momentum == 0.1
    assert not torch.equal(norm.running_mean, before.running_mean)


def test_what_surgery_shifted_comes_back(small_net):
    model = norms.restated(lift(small_net, SAMPLES[0]), SAMPLES)
    shifted = copy.deepcopy(model)
    shifted.get_submodule("block.conv1").weight.data *= 3
    before, after = (distance(model, other, SAMPLES, True) for other in (shifted, norms.restated(shifted, SAMPLES)))
    assert after < 1e-3 * before


def test_what_has_no_norms_or_no_free_batch_is_left_alone(small_net):
    plain = lift(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), SAMPLES[0])
    assert norms.restated(plain, SAMPLES) is plain
    model = lift(small_net, SAMPLES[0])
    assert norms.restated(model, []) is model


@pytest.mark.parametrize("count", [1, 64, 65])
def test_any_number_of_samples(small_net, count):
    again = norms.restated(lift(small_net, SAMPLES[0]), SAMPLES[:count])
    assert torch.isfinite(again(SAMPLES[0][0])).all()


def test_a_folded_model_gives_the_same_outputs_without_its_norms(small_net):
    model = lift(small_net, SAMPLES[0])
    torch.nn.init.uniform_(model.get_submodule("block.bn1").running_mean)
    before = copy.deepcopy(model.state_dict())
    folded = norms.folded(model)
    x = torch.cat([x for (x,) in SAMPLES[:8]])
    assert torch.allclose(folded(x), model(x), atol=1e-4)
    assert sum("batch_norm" in str(n.target) or ".bn" in str(n.target) for n in folded.graph.nodes) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_norm_behind_what_others_read_too_stays():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.twice, self.other = (
                nn.Conv2d(3, 4, 3),
                nn.BatchNorm2d(4),
                nn.Conv2d(4, 4, 1),
                nn.BatchNorm2d(4),
            )

        def forward(self, x):
            x = self.conv(x)
            x = x + self.norm(x)
            return self.twice(self.other(self.twice(x)))

    model = lift(Net().eval(), SAMPLES[0])
    for norm in (model.get_submodule("norm"), model.get_submodule("other")):
        norm.running_mean.normal_(), norm.running_var.uniform_(1, 2)
    folded = norms.folded(model)
    assert {str(n.target) for n in folded.graph.nodes} >= {"norm", "other"}
    assert torch.allclose(folded(SAMPLES[0][0]), model(SAMPLES[0][0]), atol=1e-5)
