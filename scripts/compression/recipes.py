"""Public tools on a trained CIFAR-10 model, each by the recipe of its own documentation, where the tool is installed.

    recipes.py RECIPE --model FILE.py --weights FILE --images ZIP --original FILE.pte --output FILE.pte [...]

A tool that prunes does so until its int8 `.pte` is `--speedup` times faster than the original's fp32 `.pte`; what is
left trains on the same batches for the same time; then it is quantized and lowered as ExecuTorch's manual says. Writes
the `.pte`, and what was done as JSON on the last line of its output.
"""

import argparse
import copy
import json
import operator
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from compression import cifar
from edgebuild import catalog
from edgebuild.devices import host
from edgebuild.vision import import_torchvision

DIVISOR = 8  # channels stay a multiple of it: XNNPACK's tiles
GRADIENT_BATCHES = 16  # for importances by gradients
SCORED = 1000  # training images that judge a width in ModelOpt's search
NORMED = 4  # batches that batch norms see before
HESSIANS = 8  # estimates of each in MCT's importance
CALIBRATED = 300  # images, as NNCF takes by default
PEAK_RATE, WARM_UP = 0.05, 0.05


@dataclass(frozen=True)
class Job:
    """What every recipe is given."""

    model: nn.Module
    data: cifar.Images
    original: Path  # its fp32 `.pte`
    speedup: float
    seconds: float
    tries: int  # of how much to prune
    folder: Path

    @property
    def inputs(self) -> tuple[Tensor]:
        return (self.data.train[:1].float(),)

    def training_images(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Some of them at random: they are stored class by class."""
        picked = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(seed))[:count]
        return self.data.train[picked].float(), self.data.train_labels[picked]


Prune = Callable[[Job, float], nn.Module]  # a new model, without a share of whatever the tool counts
Train = Callable[[nn.Module, Job], tuple[nn.Module, int]]  # the model, and steps taken
Quantize = Callable[[nn.Module, Job, Sequence[Tensor]], nn.Module]


@dataclass(frozen=True)
class Recipe:
    """`tool` is one of TOOLS in `compression.tools`."""

    tool: str
    what: str
    prune: Prune | None
    train: Train | None
    quantize: Quantize


# ------------------------------------------------------------------------------------------------------ pruning


def taylor(job: Job, share: float, **how: Any) -> nn.Module:
    """Torch-Pruning's README: Taylor importance (Molchanov et al. 2019) from gradients of the task's loss."""
    import torch_pruning as tp

    model = copy.deepcopy(job.model)
    pruner = tp.pruner.BasePruner(
        model,
        job.inputs[0],
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=share,
        max_pruning_ratio=0.9,
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear)],
        round_to=DIVISOR,
        **how,
    )
    images, labels = job.training_images(GRADIENT_BATCHES * cifar.BATCH)
    for _ in range(how.get("iterative_steps", 1)):
        model.zero_grad()
        for x, y in zip(images.split(cifar.BATCH), labels.split(cifar.BATCH), strict=True):
            F.cross_entropy(model(x), y).backward()
        pruner.step()
    model.zero_grad()
    return model


def taylor_global(job: Job, share: float) -> nn.Module:
    """The same, over all layers at once, in steps with the gradients taken anew."""
    return taylor(job, share, global_pruning=True, iterative_steps=4)


def fastnas(job: Job, share: float) -> nn.Module:
    """ModelOpt's manual on pruning: FastNAS under a bound on FLOPs, every width judged by the accuracy it leaves."""
    import modelopt.torch.prune as mtp

    config = mtp.fastnas.FastNASConfig()
    config.nn_conv2d["*"]["channel_divisor"] = DIVISOR
    config.nn_batchnorm2d["*"]["feature_divisor"] = DIVISOR
    images, labels = job.training_images(SCORED)
    judged = replace(job.data, test=images, test_labels=labels)
    batches = job.training_images(NORMED * cifar.BATCH, seed=1)[0].split(cifar.BATCH)

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return cifar.accuracy(model, judged)

    search = {
        "data_loader": batches,
        "collect_func": lambda batch: batch,
        "score_func": score,
        "checkpoint": str(job.folder / "fastnas.pth"),  # the accuracies that it found are good for any bound
    }
    bound = {"flops": f"{100 * (1 - share):.1f}%"}
    model = copy.deepcopy(job.model)
    return mtp.prune(model, [("fastnas", config)], bound, job.inputs[0], search)[0]


def label_free_hessian(job: Job, share: float) -> nn.Module:
    """MCT's manual on structured pruning: importance by the label-free Hessian, under a bound on the weights' memory.

    Its default platform prunes 32 channels at a time. Its pruner dies on constants in the graph ("argument of type
    'int' is not iterable"), so the normalization of the input is taken out, and put in front of what comes back.
    """
    import_torchvision()
    import model_compression_toolkit as mct

    front, network = _without_normalization(job.model)
    batches = front(job.training_images(4 * 32)[0]).split(32)
    platform = mct.get_target_platform_capabilities()
    narrow = type(platform).model_validate_json(platform.model_dump_json().replace('"simd_size":32', '"simd_size":8'))
    memory = 4 * sum(p.numel() for p in network.parameters()) * (1 - share)
    pruned, _ = mct.pruning.pytorch_pruning_experimental(
        network,
        mct.core.ResourceUtilization(weights_memory=memory),
        lambda: ([batch.numpy()] for batch in batches),
        mct.pruning.PruningConfig(HESSIANS),
        narrow,
    )
    return nn.Sequential(front, pruned)


class Normalize(nn.Module):
    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation


def _without_normalization(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """`(x - mean) / deviation` at the model's start, and the rest."""
    rest = fx.symbolic_trace(copy.deepcopy(model))
    constants = {}
    for node in list(rest.graph.nodes):
        if node.op == "call_function" and node.target in (operator.sub, operator.truediv):
            constants[node.target] = getattr(rest, node.args[1].target)
            node.replace_all_uses_with(node.args[0])
            rest.graph.erase_node(node)
    rest.graph.eliminate_dead_code()
    rest.recompile()
    return Normalize(constants[operator.sub], constants[operator.truediv]), rest


def fitted(job: Job, recipe: Recipe) -> tuple[float, nn.Module]:
    """The share to prune and the least pruned model that is fast enough in int8; else the fastest there is."""
    assert recipe.prune is not None
    found: list[tuple[float, float, nn.Module]] = []
    low, high, problem = 0.0, 1.0, None
    for _ in range(job.tries):
        share = (low + high) / 2
        try:
            model = recipe.prune(job, share)
        except Exception as error:  # so much the tool cannot do, and each says it by an exception of its own
            problem, high = error, share
            continue
        times = faster(job, lower(recipe.quantize(model, job, job.training_images(2)[0].split(1)), job.inputs))
        print(f"without {share:.1%}: {times:.2f} times faster", flush=True)
        found.append((times, share, model))
        low, high = (low, share) if times >= job.speedup else (share, high)
    if not found:
        assert problem is not None
        raise problem
    enough = [each for each in found if each[0] >= job.speedup]
    _, share, model = min(enough, key=lambda f: f[1]) if enough else max(found, key=lambda f: f[0])
    return share, model


def faster(job: Job, program: bytes) -> float:
    """How many times faster than the original a program is, host, 1 thread."""
    with tempfile.TemporaryDirectory(prefix="edgebuild-bench-") as folder:
        path = Path(folder) / "candidate.pte"
        path.write_bytes(program)
        before, after = (_processor_seconds(file, job.data) for file in (job.original, path))
    return before / after


def latency(artifact: Path, data: cifar.Images) -> float:
    """Seconds, the median, host, 1 thread."""
    measured = host.measure(artifact, catalog.load_target("host"), 1, [(data.test[:1].float().numpy(),)], ())
    return next(m.value for m in measured if m.quantity == "latency")


def _processor_seconds(artifact: Path, data: cifar.Images) -> float:
    """The same, without the time that other processes took: a search must not end at one of their bursts."""
    with host.load(artifact, catalog.load_target("host"), 1) as worker:
        found, _settled = worker.time((data.test[:1].float().numpy(),), cpu=True)
    return float(np.median(found)) / 1e9


# ----------------------------------------------------------------------------------------------------- training


def fine_tune(model: nn.Module, job: Job) -> tuple[nn.Module, int]:
    """Cross-entropy, as Torch-Pruning's, MCT's and ModelOpt's manuals have it."""
    return _train(model, job, lambda output, labels: F.cross_entropy(output, labels))


def distil(model: nn.Module, job: Job) -> tuple[nn.Module, int]:
    """ModelOpt's manual on distillation: its loss on the logits, the original as teacher, beside cross-entropy."""
    import modelopt.torch.distill as mtd

    config = {
        "teacher_model": copy.deepcopy(job.model),
        "criterion": mtd.LogitsDistillationLoss(),
        "loss_balancer": mtd.StaticLossBalancer(),
    }
    taught: Any = mtd.convert(model, [("kd_loss", config)])

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return taught.compute_kd_loss(student_loss=F.cross_entropy(output, labels))

    trained, steps = _train(taught, job, loss)
    return mtd.export(trained), steps


def _train(model: nn.Module, job: Job, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[nn.Module, int]:
    """SGD with momentum, the rate warmed up and then half a cosine, over the seconds that there are."""
    model.train()  # on a line of its own: ModelOpt's returns None
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batches = cifar.augmented(job.data, seed=1, epochs=10_000)
    bf16 = _bf16_is_faster(job)
    steps, began = 0, time.monotonic()
    while (done := (time.monotonic() - began) / job.seconds) < 1:
        x, y = next(batches)
        rate = done / WARM_UP if done < WARM_UP else 0.5 * (1 + cos(pi * (done - WARM_UP) / (1 - WARM_UP)))
        optimizer.param_groups[0]["lr"] = PEAK_RATE * rate
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(x.contiguous(memory_format=torch.channels_last))
        loss(output.float(), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        steps += 1
    model.eval()
    return model.to(memory_format=torch.contiguous_format), steps  # type: ignore[call-overload]


def _bf16_is_faster(job: Job) -> bool:
    """Whether training in bf16 is faster on this processor, by the original model."""
    model = copy.deepcopy(job.model).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = job.training_images(32)[0].contiguous(memory_format=torch.channels_last)
    seconds = {}
    for bf16 in (False, True):
        for _ in range(2):  # the second counts
            began = time.monotonic()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                model(x).float().sum().backward()
            seconds[bf16] = time.monotonic() - began
    return seconds[True] < seconds[False]


# ------------------------------------------------------------------------------------- quantization and lowering


def xnnpack_quantizer() -> Any:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


def pt2e(model: nn.Module, job: Job, samples: Sequence[Tensor]) -> nn.Module:
    """ExecuTorch's manual on XNNPACK: static int8, weights per channel."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(torch.export.export(model, job.inputs).module(check_guards=False), xnnpack_quantizer())
    for sample in samples:
        prepared(sample)
    return convert_pt2e(prepared)


def nncf(model: nn.Module, job: Job, samples: Sequence[Tensor]) -> nn.Module:
    """NNCF's manual on ExecuTorch: its ranges and bias correction under XNNPACK's quantizer."""
    from nncf import Dataset
    from nncf.experimental.torch.fx import quantize_pt2e

    exported = torch.export.export(model, job.inputs).module(check_guards=False)
    return quantize_pt2e(exported, xnnpack_quantizer(), Dataset(list(samples)))


def neural_compressor(model: nn.Module, job: Job, samples: Sequence[Tensor]) -> nn.Module:
    """neural-compressor's manual on PT2E, with signed activations, since XNNPACK takes no others.

    Its quantizer annotates for Inductor on x86, and quantizes weights at run time by an operator that ExecuTorch lacks.
    """
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import StaticQuantConfig, convert, prepare

    prepared = prepare(export(model, job.inputs), StaticQuantConfig(w_dtype="int8", act_dtype="int8", act_sym=True))
    for sample in samples:
        prepared(sample)
    return convert(prepared)


def lower(model: nn.Module, inputs: tuple[Tensor, ...]) -> bytes:
    """ExecuTorch's manual on XNNPACK."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    exported = torch.export.export(model, inputs)
    edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    return bytes(edge.to_executorch().buffer)


# ---------------------------------------------------------------------------------------------------- what there is

RECIPES = {
    "torch-pruning": Recipe("torch-pruning", "Taylor, every layer alike; PT2E", taylor, fine_tune, pt2e),
    "torch-pruning-global": Recipe("torch-pruning", "Taylor over all layers; PT2E", taylor_global, fine_tune, pt2e),
    "torch-pruning-nncf": Recipe("nncf", "Torch-Pruning's Taylor; NNCF's int8", taylor, fine_tune, nncf),
    "modelopt": Recipe("modelopt", "FastNAS; PT2E", fastnas, fine_tune, pt2e),
    "modelopt-distil": Recipe("modelopt", "FastNAS, its distillation; PT2E", fastnas, distil, pt2e),
    "mct": Recipe("mct", "label-free Hessian; PT2E", label_free_hessian, fine_tune, pt2e),
    "pt2e": Recipe("torch-pruning", "PT2E alone", None, None, pt2e),
    "nncf": Recipe("nncf", "int8 alone: it prunes single weights, which XNNPACK does not skip", None, None, nncf),
    "neural-compressor": Recipe("neural-compressor", "int8 alone: it does not prune", None, None, neural_compressor),
}


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=list(RECIPES))
    for name in ("model", "weights", "images", "original", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--speedup", type=float, default=9.5)
    parser.add_argument("--seconds", type=float, default=900.0)
    parser.add_argument("--tries", type=int, default=6, help="of how much to prune")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="edgebuild-bench-") as folder:
        data, model = cifar.images(options.images), cifar.load(options.model, options.weights)
        job = Job(model, data, options.original, options.speedup, options.seconds, options.tries, Path(folder))
        found = carry_out(RECIPES[options.recipe], job, options.output)
    print(json.dumps(found))


def carry_out(recipe: Recipe, job: Job, output: Path) -> dict[str, Any]:
    """Write the `.pte`; what was done to get it."""
    began = time.monotonic()
    share, model = fitted(job, recipe) if recipe.prune else (0.0, copy.deepcopy(job.model))
    searched = time.monotonic()
    model, steps = recipe.train(model, job) if recipe.train else (model, 0)
    trained = time.monotonic()
    with torch.no_grad():
        before = cifar.accuracy(model, job.data)
    output.write_bytes(lower(recipe.quantize(model, job, job.training_images(CALIBRATED)[0].split(1)), job.inputs))
    return {
        "share": share,
        "widths": [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)],
        "epochs": steps * cifar.BATCH / len(job.data.train),
        "before int8": before,
        "search seconds": round(searched - began, 1),
        "training seconds": round(trained - searched, 1),
    }


if __name__ == "__main__":
    main()
