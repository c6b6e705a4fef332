"""Predicted sizes and memory against what was really lowered."""

import functools
import shutil

import pytest
import torch
from torch import nn

from edgebuild import costs
from edgebuild.analyse import analyse, cut
from edgebuild.backends import BACKENDS
from edgebuild.footprint import constants, layer_bytes, pointer_bytes, rounds
from edgebuild.lift import lift
from edgebuild.plan import Choice
from edgebuild.spec import SEGMENT, Form, LayerFacts
from edgebuild.transforms import factorize, quantize

MOST = 700  # bytes: the padding of both flatbuffers, and operators that end without a clamp
KEPT = ("block.conv1", "hidden")


@pytest.fixture(scope="module")
def lowered(image, images):
    """Lowers a model to bytes, once for several tests."""

    @functools.cache
    def made(model, precision="fp32", keep=(), kind="pte"):
        backend = BACKENDS["xnnpack" if kind == "pte" else kind]
        if precision == "int8":
            model = quantize.apply(model, image, images[:1], backend.quantizer(keep)).model
        return backend.lower(model, image).data

    return made


def predicted(model, inputs, precision="fp32", keep=(), kind="pte"):
    facts = analyse(model, inputs)
    return costs.size(facts, kind).of(Choice(facts, precision, keep_fp32=frozenset(keep)))


@pytest.fixture(scope="module")
def lifted(small_net, image):
    return lift(small_net, image)


@pytest.fixture(scope="module")
def pruned(lifted, image):
    return lift(cut(lifted, image, {"stem": [0, 3, 4], "hidden": list(range(7)), "point": [1]}), image)


@pytest.fixture(scope="module")
def factorized(lifted, image):
    forms = (Form("block.conv2", "tucker2", (8, 8)), Form("hidden", "svd", (12,)), Form("block.conv1", "spatial", (8,)))
    return lift(factorize.apply(lifted, image, forms), image)


@pytest.mark.parametrize("which", ["lifted", "pruned", "factorized"])
@pytest.mark.parametrize(("precision", "keep"), [("fp32", ()), ("int8", ()), ("int8", KEPT)])
def test_size_is_a_tight_upper_bound(which, precision, keep, request, image, lowered):
    model = request.getfixturevalue(which)
    keep = tuple(name for name in keep if name in dict(model.named_modules()))
    keep = tuple(name for name in keep if isinstance(model.get_submodule(name), (nn.Conv2d, nn.Linear)))
    size = len(lowered(model, precision, keep))
    assert size <= predicted(model, image, precision, keep) <= size + MOST


def test_what_a_choice_promises_is_what_the_realised_model_takes(lifted, factorized, image):
    forms = {"block.conv2": Form("block.conv2", "tucker2", (8, 8)), "hidden": Form("hidden", "svd", (12,))}
    forms["block.conv1"] = Form("block.conv1", "spatial", (8,))
    choice = Choice(analyse(lifted, image), "int8", forms=forms)
    assert costs.size(choice.facts).of(choice) == predicted(factorized, image, "int8")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_torchscript_within_a_tenth(lifted, image, lowered, precision):
    size = len(lowered(lifted, precision, kind="torchscript"))
    assert predicted(lifted, image, precision, kind="torchscript") == pytest.approx(size, rel=0.1)


def test_constants_lie_in_segments_of_their_own():
    layer = LayerFacts("c", "conv2d", 3, 10, kernel=(3, 3), stride=(1, 1), bias=True)
    assert constants(layer, "fp32") == (1080, 40)
    assert constants(layer, "int8") == (270, 40, 40, 40)
    wider = LayerFacts("c", "conv2d", 3, 11, kernel=(3, 3), stride=(1, 1), bias=True)
    # 297 bytes of weights take 304 where 270 take 272; 44 bytes for each channel take 48 as 40 do
    assert layer_bytes(wider, "int8") - layer_bytes(layer, "int8") == 2 * SEGMENT == 32
    assert layer_bytes(wider, "fp32") - layer_bytes(layer, "fp32") == 1_200 - 1_088


def test_clamps_are_operators_on_int8_tensors_alone(lifted, image):
    facts = analyse(lifted, image)
    clamps = {p: [layer.op for layer, _ in Choice(facts, p).layers()].count("relu6") for p in ("fp32", "int8")}
    assert clamps == {"fp32": 0, "int8": 1}


def test_live_bytes_follow_the_precision_of_each_tensor():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 8, 1)

        def forward(self, x):
            return self.b(nn.functional.hardswish(self.a(x)))

    image = (torch.randn(1, 2, 8, 8),)
    facts = analyse(lift(Net().eval(), image), image)
    inputs, a, b = 4 * 128, 256, 512
    # hardswish writes over what it reads
    assert Choice(facts, "fp32").live_bytes() == (inputs + 4 * a, inputs + 4 * a, inputs + 4 * a + 4 * b)
    # quantize and dequantize need both tensors; the output is dequantized at the last step
    assert Choice(facts, "int8").live_bytes() == (inputs + 128 + a, inputs + a + 4 * a, inputs + b + 4 * b)
    kept = Choice(facts, "int8", keep_fp32=frozenset({"b"})).live_bytes()
    assert kept[2] == inputs + 4 * a + 4 * b


def test_pointers_of_convolutions():
    conv = LayerFacts("c", "conv2d", 8, 8, kernel=(3, 3), stride=(1, 1), positions=64)
    assert pointer_bytes(conv) == 8 * 9 * 64
    assert pointer_bytes(LayerFacts("p", "conv2d", 8, 8, kernel=(1, 1), stride=(1, 1), positions=64)) == 0
    assert pointer_bytes(LayerFacts("d", "conv2d", 8, 8, 8, kernel=(3, 3), stride=(1, 1), positions=64)) == 0


@pytest.mark.skipif(not shutil.which("qemu-aarch64"), reason="needs qemu-user")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_peak_memory_within_a_tenth_on_the_arm_device(lifted, image, lowered, precision, tmp_path):
    from edgebuild.catalog import load_target
    from edgebuild.devices import arm

    path = tmp_path / "model.pte"
    path.write_bytes(lowered(lifted, precision, ()))
    with arm.load(path, load_target("raspberry-pi-4"), 1) as guest:
        guest.run(tuple(x.numpy() for x in image))
    choice = Choice(analyse(lifted, image), precision)
    assert costs.peak_memory(choice.facts).of(choice) == pytest.approx(guest.peak, rel=0.1)


def test_what_a_scheme_leaves_in_fp32(lifted, image):
    """Ranged at run time: the depthwise convolution, the one of an image's colours and what has no weights."""
    layers = {layer.name: layer for layer in analyse(lifted, image).layers}
    left = [name for name, layer in layers.items() if layer.weighted and not rounds(layer, "dynamic")]
    assert left == [name for name, layer in layers.items() if layer.depthwise or layer.name == next(iter(layers))]
    assert all(rounds(layer, "static") for layer in layers.values())
    assert [name for name, x in layers.items() if rounds(x, "8da4w")] == [
        name for name, x in layers.items() if x.op == "linear"
    ]
