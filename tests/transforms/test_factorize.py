import pytest
import torch

from edgebuild.analyse import analyse
from edgebuild.errors import TransformError
from edgebuild.lift import lift
from edgebuild.sensitivity import moments
from edgebuild.spec import Form, factors
from edgebuild.transforms import factorize

FULL = [
    Form("hidden", "svd", (48,)),
    Form("left", "svd", (16,)),
    Form("right", "spatial", (24,)),
    Form("right", "tucker2", (8, 16)),
]


@pytest.fixture(scope="module")
def lifted(small_net, image):
    return lift(small_net, image)


@pytest.mark.parametrize("form", FULL, ids=str)
def test_at_full_rank_nothing_changes(lifted, image, form):
    assert torch.allclose(factorize.apply(lifted, image, [form])(*image), lifted(*image), atol=1e-4)


@pytest.mark.parametrize("form", FULL, ids=str)
def test_the_factors_weights_are_of_one_norm(lifted, image, images, form):
    seen = moments(lifted, analyse(lifted, image), images)
    layer = factorize.apply(lifted, image, [form], seen).get_submodule(form.layer)
    norms = [float(factor.weight.detach().norm()) for factor in layer]
    assert len(norms) == (3 if form.kind == "tucker2" else 2)
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-4)


@pytest.mark.parametrize(
    "form",
    [Form("hidden", "svd", (12,)), Form("right", "spatial", (8,)), Form("block.conv1", "tucker2", (8, 8))],
    ids=str,
)
def test_the_facts_of_the_factors_are_those_of_the_modules(lifted, image, form):
    result = lift(factorize.apply(lifted, image, [form]), image)
    facts = analyse(result, image)
    for predicted in factors(analyse(lifted, image).layer(form.layer), form):
        found = facts.layer(predicted.name)
        for field in (
            "in_channels",
            "out_channels",
            "kernel",
            "stride",
            "positions",
            "weights",
            "macs",
            "in_elements",
            "out_elements",
        ):
            assert getattr(predicted, field) == getattr(found, field), field


def test_a_strided_dilated_convolution_splits(image):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 6, 3, stride=2, padding=2, dilation=2)
    lifted = lift(torch.nn.Sequential(conv), image)
    for form in (Form("0", "spatial", (9,)), Form("0", "tucker2", (6, 3))):
        assert torch.allclose(factorize.apply(lifted, image, [form])(*image), conv(*image), atol=1e-4)


def test_a_strided_pointwise_convolution_splits(image):
    conv = torch.nn.Conv2d(3, 6, 1, stride=2)
    lifted = lift(torch.nn.Sequential(conv), image)
    assert torch.allclose(factorize.apply(lifted, image, [Form("0", "svd", (3,))])(*image), conv(*image), atol=1e-4)


def test_only_forms_that_pay_are_offered(lifted, image):
    facts = analyse(lifted, image)
    assert factorize.forms(facts.layer("depthwise"), 8) == ()
    for layer in facts.layers:
        for form in factorize.forms(layer, 8):
            assert sum(part.macs for part in factors(layer, form)) < layer.macs


def test_the_probe_is_the_gradient_times_the_change(lifted, image, images):
    """g . dW as computed for every rank at once equals the product with the factorized weight's difference."""
    facts = analyse(lifted, image)
    seen = moments(lifted, facts, images)
    probes = factorize.probes(lifted, facts, seen, 8)
    grad = torch.randn_like(lifted.hidden.weight)
    dots = probes["hidden"](grad)
    for form, dot in zip(factorize.forms(facts.layer("hidden"), 8), dots, strict=True):
        parts = factorize.apply(lifted, image, [form], seen).hidden
        change = parts[1].weight @ parts[0].weight - lifted.hidden.weight
        assert torch.allclose((grad * change).sum(), dot, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "form",
    [
        Form("hidden", "svd", (500,)),
        Form("hidden", "tucker2", (8, 8)),
        Form("right", "svd", (4,)),
        Form("right", "tucker2", (4,)),
        Form("left", "spatial", (4,)),
        Form("depthwise", "spatial", (4,)),
        Form("nowhere", "svd", (4,)),
    ],
    ids=str,
)
def test_a_form_that_does_not_fit_is_refused_by_name(lifted, image, form):
    with pytest.raises(TransformError, match=form.layer):
        factorize.apply(lifted, image, [form])


@pytest.mark.parametrize(
    "form", [Form("hidden", "svd", (12,)), Form("right", "spatial", (12,)), Form("right", "tucker2", (4, 8))], ids=str
)
def test_the_inputs_moments_make_the_outputs_error_smaller(lifted, image, images, form):
    seen = moments(lifted, analyse(lifted, image), images)
    batch = torch.cat([x for (x,) in images])
    with torch.no_grad():
        errors = [
            float(
                (
                    layer_output(factorize.apply(lifted, image, [form], how), batch, form.layer)
                    - layer_output(lifted, batch, form.layer)
                )
                .square()
                .mean()
            )
            for how in (seen, {})
        ]
    assert errors[0] < errors[1]


def layer_output(model, batch, name):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(batch)
    handle.remove()
    return seen[0]
