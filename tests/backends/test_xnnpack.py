"""What lowering to XNNPACK leaves out of ExecuTorch's work, and what it must not."""

import torch
import torch.nn.functional as F
from executorch.exir._serialize._program import deserialize_pte_binary
from torch import Tensor, nn

from edgebuild.attempt import HOST
from edgebuild.backends import xnnpack
from edgebuild.devices import as_file, host
from edgebuild.lift import lift
from edgebuild.transforms import quantize


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


class Branches(nn.Module):
    """A convolution of an image's colours, and two of what it makes; ReLUs behind two of the three."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.wide(x).relu() + self.narrow(x)


def test_convolutions_are_ranged_at_run_time_with_their_relu_and_in_one_delegate() -> None:
    torch.manual_seed(0)
    model, samples = lift(Branches().eval(), (torch.randn(1, 3, 8, 8),)), [(torch.randn(1, 3, 8, 8),) for _ in range(4)]
    made = quantize.apply(model, samples[0], samples, xnnpack.quantizer((), "dynamic"), logits=False)
    assert isinstance(made.model, torch.fx.GraphModule)
    rounded = [
        node.args[1].name.startswith("dequantize") and node.args[0].name.startswith("dequantize")
        for node in made.model.graph.nodes
        if node.target is torch.ops.aten.conv2d.default
    ]
    assert rounded == [False, True, True]  # the colours are fewer than the kernels sum at once
    artifact = xnnpack.lower(made.model, samples[0])
    assert len(deserialize_pte_binary(artifact.data).program.execution_plan[0].delegates) == 1
    with as_file(artifact.data, artifact.suffix) as file, host.load(file, HOST, 1) as session:
        (found,) = session.run(tuple(x.numpy() for x in samples[0]))
    torch.testing.assert_close(torch.from_numpy(found), made.model(*samples[0]), atol=0.05, rtol=0.05)
