"""What is quantized, lowered and run answers as the fp32 model does, by every scheme; what cannot be done says why."""

import copy

import pytest
import torch
from torch import nn

from edgebuild import costs, judge, verify
from edgebuild.analyse import analyse
from edgebuild.attempt import HOST, artifact_file
from edgebuild.backends import BACKENDS, xnnpack
from edgebuild.devices import DEVICES
from edgebuild.divergence import distance
from edgebuild.errors import BackendError, TaskError, TransformError
from edgebuild.lift import lift
from edgebuild.plan import Choice
from edgebuild.spec import SCHEMES, Distillation
from edgebuild.training.learner import Lesson
from edgebuild.transforms import distil, fake, quantize

LEAST_SQNR = {"static": 25.0, "dynamic": 30.0, "8da4w": 12.0}  # dB against the fp32 model


@pytest.fixture(scope="module")
def lifted(small_net, image):
    model = lift(small_net, image)
    with torch.no_grad():
        model.classify.weight *= 20
    return model


@pytest.fixture(scope="module")
def transformer(encoder, sentences):
    return lift(encoder, sentences[0])


@pytest.fixture
def wide(images):
    """40 images, some far brighter than the rest."""
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(1, 3, 8, 8, generator=generator) * (1 + 3 * (i % 7 == 0)),) for i in range(40)]


def answers(model, inputs, samples):
    """The artifact, and what it computes on the host."""
    artifact = xnnpack.lower(model, inputs)
    with artifact_file(artifact) as path, DEVICES["host"].load(path, HOST, 1) as session:
        return artifact, verify.run(session, samples)


def sqnr(found, model, samples):
    return judge.parity(found, verify.eager(model, samples), "host", "", 0.0, logits=True).sqnr_db


# ------------------------------------------------------------------------------------------------------- schemes


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_answers_as_the_model_does_and_is_as_small_as_predicted(transformer, sentences, scheme):
    quantized = quantize.apply(transformer, sentences[0], sentences, xnnpack.quantizer((), scheme))
    artifact, found = answers(quantized.model, sentences[0], sentences)
    assert sqnr(found, quantized.model, sentences) > 25  # what was lowered
    assert sqnr(found, transformer, sentences) > LEAST_SQNR[scheme]
    facts = analyse(transformer, sentences[0])
    assert costs.size(facts, "pte", scheme).of(Choice(facts, "int8")) == pytest.approx(len(artifact.data), rel=0.12)
    assert ("embed" in quantized.how) == (scheme == "8da4w")  # 72 inputs: 8 bits instead


class Feedforward(nn.Module):
    """What follows an attention: the sum is int8 in the static scheme, whatever its layers are."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(72, 64), nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        x = self.embed(x)
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_what_stays_fp32_does_so_in_every_scheme(sentences, scheme):
    torch.manual_seed(0)
    model = lift(Feedforward().eval(), sentences[0])

    def size(kept):
        return len(xnnpack.lower(quantized(kept), sentences[0]).data)

    def quantized(kept):
        return quantize.apply(model, sentences[0], sentences[:4], xnnpack.quantizer(kept, scheme)).model

    assert size(("up",)) - size(()) == pytest.approx(3 * model.up.weight.numel(), rel=0.1)
    everything = tuple(name for name, m in model.named_modules() if isinstance(m, nn.Linear))
    if scheme != "static":
        assert torch.equal(quantized(everything)(*sentences[0]), model(*sentences[0]))


def test_convolutions_ranged_at_run_time(lifted, image, images):
    """All but the depthwise one, which stays fp32."""
    quantized = quantize.apply(lifted, image, images, xnnpack.quantizer((), "dynamic"))
    _, found = answers(quantized.model, image, images)
    assert sqnr(found, quantized.model, images) > 20 and sqnr(found, lifted, images) > 20


def test_torchscript_is_quantized_statically_alone():
    with pytest.raises(BackendError, match="statically, not dynamic"):
        BACKENDS["torchscript"].quantizer((), "dynamic")


# -------------------------------------------------------------------------------------------------------- ranges


def test_the_ranges_that_lose_least_are_taken(lifted, image, wide, monkeypatch):
    ways = dict(fake.RANGES)
    assert len(ways) == 3

    def loss(names):
        monkeypatch.setattr(fake, "RANGES", {name: ways[name] for name in names})
        made = quantize.apply(lifted, image, wide, xnnpack.quantizer())
        _, deciding = quantize.split(wide)
        return made, distance(lifted, made.model, deciding, True)

    monkeypatch.setattr(fake, "BETTER", 0.0)  # biases are left alone
    alone = {name: loss([name])[1] for name in ways}
    assert len(set(alone.values())) == 3
    best, least = loss(ways)
    assert least == pytest.approx(min(alone.values()), rel=1e-3)
    assert f"ranged by {min(alone, key=alone.__getitem__)} " in best.how


def test_ranges_are_what_they_are_called():
    outlier = seen(torch.cat([torch.linspace(0, 1, 99_999), torch.tensor([50.0])]))
    assert fake.RANGES["minimum and maximum"](outlier) == (0.0, 50.0)
    low, high = fake.RANGES["percentile 99.99"](outlier)
    assert low == 0.0 and 1.0 <= high < 1.1
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    low, high = fake.RANGES["least squares"](seen(normal))
    assert normal.min() < low < -3 and 3 < high < normal.max()


def seen(x):
    observer = fake.HistogramObserver(dtype=torch.int8, qscheme=torch.per_tensor_affine, eps=2**-12)
    observer(x)
    return observer


def test_corrected_biases_restore_the_means_of_every_layer(lifted, image, wide):
    """With weights rounded to 3 bits, so that there is something to correct."""
    with torch.no_grad():
        graph, _ = fake.rounded(lifted, image, wide, xnnpack.quantizer(), True)
    for module in graph.modules():
        if isinstance(module, fake.FakeQuantize) and module.is_per_channel:
            module.activation_post_process.quant_min, module.activation_post_process.quant_max = -3, 3
    batch = torch.cat([x for (x,) in wide])

    def bias():
        with torch.no_grad():
            return float((graph(batch) - lifted(batch)).mean(0).abs().max())

    before = bias()
    with torch.no_grad():
        fake._Twice(graph).correct((batch,))
    assert bias() < 0.15 * before  # the outputs themselves are rounded behind the last layer
    assert torch.equal(lifted.classify.bias, lift(lifted, image).classify.bias)


def test_without_samples_nothing_can_be_quantized(lifted, image):
    with pytest.raises(TaskError, match="no calibration inputs"):
        quantize.apply(lifted, image, [], xnnpack.quantizer())


def test_the_model_itself_is_not_changed(lifted, image, images):
    before = copy.deepcopy(lifted.state_dict())
    quantize.apply(lifted, image, images, xnnpack.quantizer())
    assert all(torch.equal(before[name], tensor) for name, tensor in lifted.state_dict().items())


# ---------------------------------------------------------------------------------------- training with rounding


def train(teacher, rate, steps):
    images = torch.randn(512, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    settings = Distillation(steps=steps, learning_rate=rate)
    return lambda student: distil.apply(student, teacher, lambda: images.split(32), Lesson(settings, False, True, 0))


def coarse(model):
    """The model with weights that 8 bits round badly: one in each row is far larger than the others."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (made.hidden, made.point, made.right):
            layer.weight.flatten(1)[:, 0] *= 30
    return made


def test_before_training_it_computes_what_is_lowered(lifted, image, images):
    start = quantize.prepare_qat(lifted, image, images, xnnpack.quantizer())
    batch = torch.cat([x for (x,) in images])
    with torch.no_grad():
        faked = start(batch)
        lowered = torch.cat([quantize.convert(start)(x) for (x,) in images])
    assert torch.allclose(faked, lowered, atol=1e-4) and not torch.allclose(faked, lifted(batch), atol=1e-2)
    assert copy.deepcopy(start).train().training and not start.eval().training


@pytest.mark.parametrize("scheme", ["static"])
def test_training_with_the_rounding_loses_less_and_what_is_lowered_has_it(lifted, image, images, scheme):
    model = coarse(lifted)
    samples, held = images[::2], images[1::2]
    quantizer = xnnpack.quantizer((), scheme)
    after = quantize.apply(model, image, samples, quantizer).model
    made = quantize.finish(model, model, image, samples, held, quantizer, True, train(model, 3e-4, 60))
    assert "trained with its rounding" in made.how
    assert distance(model, made.model, held, True) < distance(model, after, held, True)
    artifact, found = answers(made.model, image, held)
    assert artifact.fallen_back == () and sqnr(found, made.model, held) > 25


def test_a_training_that_makes_it_worse_is_thrown_away(lifted, image, images):
    quantizer = xnnpack.quantizer()
    plain = quantize.apply(lifted, image, images[::2], quantizer).model
    training = train(lifted, 1e-1, 5)
    made = quantize.finish(lifted, lifted, image, images[::2], images[1::2], quantizer, True, training)
    assert "thrown away" in made.how
    assert all(torch.equal(made.model(*x), plain(*x)) for x in images)


def test_what_cannot_be_trained_says_why(transformer, sentences):
    with pytest.raises(TransformError, match="cannot be trained with the rounding of FqnToConfig"):
        quantize.prepare_qat(transformer, sentences[0], sentences, xnnpack.quantizer((), "8da4w"))
    with pytest.raises(TransformError, match="fixed batch size"):
        quantize.prepare_qat(lift(Fixed(), sentences[0]), sentences[0], sentences, xnnpack.quantizer())


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.classify = nn.Linear(72, 4)

    def forward(self, x):
        return self.classify(x.reshape(1, 12, 72))
