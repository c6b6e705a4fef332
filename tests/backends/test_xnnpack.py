"""What lowering to XNNPACK leaves out of ExecuTorch's work, and what it must not."""

import torch
import torch.nn.functional as F
from executorch.exir._serialize._program import deserialize_pte_binary
from torch import Tensor, nn

from edgebuild.attempt import HOST
from edgebuild.backends import xnnpack
from edgebuild.devices import as_file, host
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


def test_constants_have_short_names_and_are_found_by_them(small_net, image) -> None:
    made = xnnpack.lower(lift(small_net, image), image)
    names = deserialize_pte_binary(made.data).named_data.pte_data
    letters = {len(name.removeprefix("scale_")) for name in names}
    assert len(names) > 10 and letters == {xnnpack.NAME_LENGTH}
    with as_file(made.data, made.suffix) as file, host.load(file, HOST, 1) as session:
        (found,) = session.run(tuple(x.numpy() for x in image))
    torch.testing.assert_close(torch.from_numpy(found), small_net(*image), atol=1e-4, rtol=1e-4)
