import math

import numpy as np
import pytest
import torch
from executorch.runtime import Runtime
from torch import nn

from edgebuild import judge, verify
from edgebuild.attempt import HOST, artifact_file
from edgebuild.backends import xnnpack
from edgebuild.devices import DEVICES
from edgebuild.lift import lift
from edgebuild.spec import Budget, Measurement
from edgebuild.transforms import quantize


def rows(*values):
    return [(np.array([value], dtype=np.float32),) for value in values]


def test_parity_counts_what_it_says():
    want = rows([1.0, 2.0, 3.0], [3.0, 1.0, 0.0])
    same = judge.parity(want, want, "host", "eager", 40, logits=True)
    assert same.bit_exact and same.ok and same.agreement == 1
    other = judge.parity(rows([1.0, 2.0, 3.3], [0.0, 1.0, 3.0]), want, "host", "eager", 40, logits=True)
    noise = 0.3**2 + 9 + 9
    assert other.agreement == 0.5 and not other.bit_exact and not other.ok
    assert other.sqnr_db == pytest.approx(10 * math.log10(24 / noise), abs=0.01)


def test_nan_is_never_right():
    found = judge.parity(rows([float("nan"), 1.0]), rows([1.0, 1.0]), "host", "eager", -1e9, logits=True)
    assert not found.ok


@pytest.mark.parametrize(
    ("value", "error", "status"),
    [
        (5, 0, "pass"), (15, 0, "fail"), (5, 0.2, "pass"), (9, 0.2, "inconclusive"), (11, 0.2, "inconclusive"),
        (20, 0.2, "fail"), (5, 1.2, "inconclusive"),
    ],
)  # fmt: skip
def test_a_bound_inside_the_error_band_is_not_decided(value, error, status):
    found = Measurement("t", "latency", value, "estimated" if error else "measured", error)
    assert judge.verdict(Budget("latency", 10), "t", None, found).status == status


def test_the_band_of_a_throughput_is_that_of_its_time():
    found = Measurement("t", "throughput", 100.0, "estimated", 1.2)
    assert judge.verdict(Budget("throughput", 40.0), "t", None, found).status == "pass"
    assert judge.verdict(Budget("throughput", 60.0), "t", None, found).status == "inconclusive"


def test_a_figure_that_is_missing_is_not_a_pass():
    assert judge.verdict(Budget("latency", 10), "t", None, None).status == "inconclusive"


def test_at_least_budgets_hold_from_below():
    found = Measurement("", "min_delegated", 0.95, "counted")
    assert judge.verdict(Budget("min_delegated", 1.0), "", None, found).status == "fail"
    assert judge.verdict(Budget("min_delegated", 0.9), "", None, found).status == "pass"


def test_a_relative_drop_is_a_share_of_the_original():
    measured = verify.accuracy("accuracy", (0.8, 100), (0.79, 100))
    assert judge.accuracy_verdict(Budget("accuracy_drop", 0.02, relative=True), measured, "").status == "pass"
    assert judge.accuracy_verdict(Budget("accuracy_drop", 0.01, relative=True), measured, "").status == "fail"
    assert judge.accuracy_verdict(Budget("accuracy_drop", 0.01), measured, "").status == "pass"


def test_wilson_interval_as_published():
    low, high = verify.wilson(0.9, 100)
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-3)
    assert verify.wilson(1.0, 500)[0] > 0.99


def test_the_first_diverging_layer_is_named(small_net, image, images):
    """The artifact of a model whose `point` layer was changed afterwards diverges there, and not before."""
    lifted = lift(small_net, image)

    def lower_wrongly(head: nn.Module, inputs):
        wrong = lift(head, inputs)
        for name, module in wrong.named_modules():
            if name.endswith("point"):
                with torch.no_grad():
                    module.weight.mul_(-1)
        return xnnpack.lower(wrong, inputs)

    def outputs(artifact, sample):  # in this process: to start one for each head would take most of the time
        program = Runtime.get().load_program(artifact.data)
        return verify.to_arrays([y.clone() for y in program.load_method("forward").execute(sample)])

    assert verify.first_divergence(lifted, image, images[0], lower_wrongly, outputs, 40) == "point"


def test_int8_keeps_the_outputs_and_a_layer_kept_fp32_grows_the_file(small_net, image, images):
    lifted = lift(small_net, image)
    artifacts = {
        kept: xnnpack.lower(quantize.apply(lifted, image, images, xnnpack.quantizer(kept)).model, image)
        for kept in ((), ("hidden",))
    }
    assert len(artifacts["hidden",].data) > len(artifacts[()].data) + 2 * 512 * 48
    assert artifacts[()].not_delegated == 0
    with artifact_file(artifacts[()]) as path, DEVICES["host"].load(path, HOST, 1) as session:
        found = verify.run(session, images)
    assert judge.parity(found, verify.eager(lifted, images), "host", "eager", 20, logits=True).ok
