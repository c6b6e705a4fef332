"""What lowering to XNNPACK leaves out of ExecuTorch's work, and what it must not."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgebuild.backends import xnnpack
from edgebuild.lift import lift


class Larger(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def test_a_bilinear_interpolation_is_still_found_and_delegated() -> None:
    image = (torch.randn(1, 4, 8, 8),)
    plain = xnnpack.lower(lift(nn.Conv2d(4, 4, 3).eval(), image), image)  # without the search for one
    assert plain.delegated and not plain.fallen_back
    larger = xnnpack.lower(lift(Larger().eval(), image), image)
    assert larger.delegated and not larger.fallen_back
