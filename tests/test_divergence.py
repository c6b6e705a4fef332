import math

import pytest
import torch
from torch import nn

from edgebuild.divergence import distance, indifference

INPUTS = [(torch.tensor([[x]]),) for x in (1.0, -1.0)]


def test_who_answers_alike_loses_all_that_the_model_knows_of_its_inputs():
    sure = nn.Linear(1, 2, bias=False)
    sure.weight.data = torch.tensor([[400.0], [-400.0]])
    assert indifference(sure, INPUTS, logits=True) == pytest.approx(math.log(2))
    assert indifference(sure, INPUTS, logits=False) == pytest.approx(400.0**2), "half the variance of each value"
    alike = nn.Linear(1, 2)
    alike.weight.data.zero_()
    assert indifference(alike, INPUTS, logits=True) == pytest.approx(0.0, abs=1e-9)
    alike.bias.data.zero_()
    assert distance(sure, alike, INPUTS, logits=True) == pytest.approx(indifference(sure, INPUTS, logits=True))
