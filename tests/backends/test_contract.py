"""What every backend promises: small artifacts that answer as eager does, in fp32 and int8; the same bytes twice."""

import copy

import pytest
import torch

from edgebuild import judge, verify
from edgebuild.attempt import HOST, artifact_file
from edgebuild.backends import BACKENDS
from edgebuild.devices import DEVICES
from edgebuild.errors import BackendError
from edgebuild.lift import lift
from edgebuild.transforms import quantize


@pytest.mark.parametrize("kind", sorted(BACKENDS))
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_artifacts_answer_as_eager_does(kind, precision, small_net, image, images):
    backend, lifted = BACKENDS[kind], lift(small_net, image)
    model = quantize.apply(lifted, image, images, backend.quantizer()).model if precision == "int8" else lifted
    artifact = backend.lower(model, image)
    assert artifact.kind == kind and artifact.delegated > 0 and artifact.fallen_back == ()
    assert (
        len(artifact.data) < (4 if precision == "fp32" else 1.6) * sum(p.numel() for p in lifted.parameters()) + 40_000
    )
    with artifact_file(artifact) as path, DEVICES["host"].load(path, HOST, 1) as session:
        found = verify.run(session, images)
    least = judge.LEAST_SQNR_DB[precision]
    assert judge.parity(found, verify.eager(model, images), "host", "eager", least, logits=True).ok


def test_lowering_twice_gives_the_same_bytes(small_net, image):
    lifted = lift(small_net, image)
    assert BACKENDS["xnnpack"].lower(lifted, image).data == BACKENDS["xnnpack"].lower(lifted, image).data


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
