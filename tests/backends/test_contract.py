"""What every backend promises: small artifacts that answer as eager does, in fp32 and int8; the same bytes twice."""

import copy

import boards
import pytest
import torch

from edgebuild import judge, verify
from edgebuild.attempt import artifact_file
from edgebuild.backends import BACKENDS, Backend
from edgebuild.devices import DEVICES
from edgebuild.errors import BackendError
from edgebuild.lift import lift
from edgebuild.spec import SCHEMES, Artifact
from edgebuild.transforms import quantize

TARGETS = {"xnnpack": "host", "torchscript": "host", "ethos_u": boards.U55, "cortex_m": boards.M7}
PRECISIONS = {name: ("fp32", "int8") if Backend(name).on_host else ("int8",) for name in BACKENDS}
ALL = [(name, precision) for name, precisions in PRECISIONS.items() for precision in precisions]


@pytest.mark.parametrize(("name", "precision"), ALL)
def test_artifacts_answer_as_eager_does(name, precision, small_net, image, images):
    (target, _), lifted = boards.on(TARGETS[name]), lift(small_net, image)
    backend = Backend(name, target.npu, target.board)
    model = lifted
    if precision == "int8":
        model = quantize.apply(lifted, backend.layout(image), images, backend.quantizer()).model
    artifact = backend.lower(model, image)
    assert artifact.kind == ("torchscript" if name == "torchscript" else "pte") and artifact.delegated > 0
    assert not backend.on_host or artifact.fallen_back == ()
    assert (
        len(artifact.data) < (4 if precision == "fp32" else 1.6) * sum(p.numel() for p in lifted.parameters()) + 40_000
    )
    with artifact_file(artifact) as path, DEVICES[target.device].load(path, target, 1) as session:
        found = verify.run(session, images)
    least = judge.LEAST_SQNR_DB[precision]
    assert judge.parity(found, verify.eager(model, images), target.name, "eager", least, logits=True).ok


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    head = (torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4))
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), *head).eval()


@pytest.mark.parametrize("name", ["xnnpack", "ethos_u", "cortex_m"])
def test_lowering_twice_gives_the_same_bytes(name, image, images):
    target, _ = boards.on(TARGETS[name])
    backend = Backend(name, target.npu, target.board)

    def made() -> Artifact:
        model = quantize.apply(lift(tiny(), image), backend.layout(image), images[:2], backend.quantizer()).model
        return backend.lower(model, image)

    first = made()
    assert first == made() and len(first.graphs) == (name == "ethos_u")


@pytest.mark.parametrize("name", ["ethos_u", "cortex_m"])
def test_a_microcontroller_refuses_what_it_cannot_compute(name):
    target, backend = boards.on(TARGETS[name])
    assert backend.name == name and backend.schemes == ("static",) and not backend.mixes
    with pytest.raises(BackendError, match="classify cannot stay fp32"):
        backend.quantizer(("classify",))
    for scheme in set(SCHEMES) - {"static"}:
        with pytest.raises(BackendError, match=f"not {scheme}.*set scheme to static"):
            backend.quantizer((), scheme)


def test_what_falls_off_the_delegate_is_named(image):

    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.cumsum(x, 1) + 1.0

    artifact = BACKENDS["xnnpack"].lower(lift(Odd(), image), image)
    assert artifact.not_delegated >= 1 and any("cumsum" in operator for operator in artifact.fallen_back)


def test_weights_alone_are_not_quantized(encoder, sentences):
    """XNNPACK would drop their scales and answer wrongly."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    model = lift(encoder, sentences[0])
    quantize_(
        model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)), lambda m, name: name == "up"
    )
    with pytest.raises(BackendError, match="quantized weights and fp32 activations"):
        BACKENDS["xnnpack"].lower(model, sentences[0])


def test_half_layer_norms_are_not_lowered(encoder, sentences):
    half = tuple(x.half() for x in sentences[0])
    with pytest.raises(BackendError, match="fp16 LayerNorm"):
        BACKENDS["xnnpack"].lower(copy.deepcopy(encoder).half(), half)
