"""How good the simulated Arm device is: `python scripts/bench_simulator.py accuracy|parity|speed [--output FILE.json]`.

`accuracy` holds simulated latencies against published ones, unfitted and with one scale, beside a roofline. `parity`
holds the outputs on every shipped Arm target against the host's. `speed` says what a simulation costs, what sampling
changes, and whether three runs count the same. Models have random weights and are kept in edgebuild's cache.
"""

import argparse
import inspect
import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from edgebuild import cache, calibrate, environment
from edgebuild.analyse import analyse
from edgebuild.backends import xnnpack
from edgebuild.catalog import load_target, names
from edgebuild.devices import arm, host, simulator
from edgebuild.lift import lift
from edgebuild.spec import Cluster, LayerFacts, Precision, Resource, Simulation, Target
from edgebuild.transforms import quantize
from edgebuild.units import Hertz
from edgebuild.vision import import_torchvision

SHAPE = (1, 3, 224, 224)
NEAR = 0.1  # relative error of a row that counts as right


# ------------------------------------------------------------------------------------------------------- the models


class MobileNetV1(nn.Module):
    """MobileNet v1 1.0 (Howard et al. 2017, arXiv:1704.04861), which torchvision does not have."""

    BLOCKS = ((32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2))
    BLOCKS += ((512, 512, 1),) * 5 + ((512, 1024, 2), (1024, 1024, 1))

    def __init__(self) -> None:
        super().__init__()
        layers = [self.convolution(3, 32, 3, 2)]
        for into, out, stride in self.BLOCKS:
            layers += [self.convolution(into, into, 3, stride, into), self.convolution(into, out, 1, 1)]
        self.features = nn.Sequential(*layers)
        self.classify = nn.Linear(1024, 1000)

    @staticmethod
    def convolution(into: int, out: int, kernel: int, stride: int, groups: int = 1) -> nn.Sequential:
        convolution = nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU6())

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(torch.flatten(nn.functional.adaptive_avg_pool2d(self.features(x), 1), 1))


def network(name: str) -> nn.Module:
    """A model with random weights, whose batch norms have seen data, so that activations keep their size."""
    torch.manual_seed(0)
    model = MobileNetV1() if name == "mobilenet_v1" else import_torchvision().models.get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # type: ignore[assignment]  # the plain mean
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        model.train()(torch.randn(4, *SHAPE[1:]))
    return model.eval()


@dataclass(frozen=True)
class Model:
    """A program and the layers that it computes."""

    path: Path
    layers: tuple[LayerFacts, ...]


def model(name: str, precision: Precision) -> Model:
    versions = json.dumps(environment.versions(), sort_keys=True)
    key = cache.key(inspect.getsource(MobileNetV1), inspect.getsource(network), inspect.getsource(model), versions)[:16]
    file, facts = f"{name}-{precision}-{key}.pte", f"{name}-{key}.json"
    path, known = cache.root() / "bench-models" / file, cache.read("bench-models", facts)
    if path.is_file() and known is not None:
        return Model(path, tuple(LayerFacts(**layer) for layer in json.loads(known)))
    generator = torch.Generator().manual_seed(1)
    inputs, batch = (torch.randn(SHAPE, generator=generator),), [(torch.randn(SHAPE, generator=generator),)]
    lifted = lift(network(name), inputs)
    layers = analyse(lifted, inputs).layers
    cache.write("bench-models", facts, json.dumps([asdict(layer) for layer in layers]).encode())
    ready = quantize.apply(lifted, inputs, batch, xnnpack.quantizer()).model if precision == "int8" else lifted
    artifact = xnnpack.lower(ready, inputs)
    if artifact.fallen_back:
        print(f"{name}, {precision}: {len(artifact.fallen_back)} operators outside the delegate")
    return Model(cache.write("bench-models", file, artifact.data), layers)


# ------------------------------------------------------------------------------------------------------- published


@dataclass(frozen=True)
class Published:
    target: str
    threads: int
    precision: Precision
    model: str
    milliseconds: float


V1, V2, V3L, V3S = "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"


def _published() -> tuple[Published, ...]:
    """github.com/google/XNNPACK, README.md: end-to-end benchmark, random weights, 224 x 224, batch 1.

    Phones: March 2020. Raspberry Pi: February 2022; it does not say whether the board was cooled.
    """
    fp32: list[tuple[str, int, tuple[float, ...]]] = [
        ("pixel", 1, (82, 49, 39, 12)),
        ("pixel", 2, (43, 26, 22, 7)),
        ("pixel-3a", 1, (88, 55, 44, 14)),
        ("raspberry-pi-4", 4, (77, 46, 40, 15)),
    ]
    rows = [
        Published(target, threads, "fp32", name, value)
        for target, threads, values in fp32
        for name, value in zip((V1, V2, V3L, V3S), values, strict=True)
    ]
    rows += [Published("raspberry-pi-4", 4, "int8", name, value) for name, value in ((V1, 24.0), (V2, 17.0))]
    return tuple(rows)


PUBLISHED = _published()

# -------------------------------------------------------------------------------------------------------- roofline

DENSE_EFFICIENCY, DEPTHWISE_EFFICIENCY = 0.75, 0.4  # shares of the peak that kernels reach, as is often assumed


def macs_per_cycle(cluster: Cluster, precision: Precision) -> float:
    """Peak of a core: 4 fp32 lanes of an FMLA, 16 int8 lanes of a dot product or 8 of a widening multiplication."""
    name, lanes = "fma_q", 4
    if precision == "int8":
        name, lanes = ("dot", 16) if "asimddp" in cluster.identity.features.split() else ("imac", 8)
    interval = max(cycles / len(ports) for ports, cycles in cluster.model.slots(name))
    return lanes / interval


def roofline(layers: Sequence[LayerFacts], precision: Precision, target: Target, threads: int) -> float:
    """Seconds by Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009, layer by layer."""
    assert target.memory is not None
    cluster = target.cluster[0]
    clock = cluster.clock.under(threads, cluster.count)
    bandwidth = min(threads * target.memory.one_core, target.memory.all_cores)
    peak = macs_per_cycle(cluster, precision) * clock * threads
    total = 0.0
    for layer in layers:
        efficiency = DEPTHWISE_EFFICIENCY if layer.depthwise else DENSE_EFFICIENCY
        total += max(layer.macs / (peak * efficiency), layer.bytes_moved(precision) / bandwidth)
    return total


# -------------------------------------------------------------------------------------------------------- accuracy


@dataclass(frozen=True)
class Row:
    """Milliseconds; `whole`: without sampling. `cooled`: sampled, at the clock of one core, where all are taken to
    throttle. `waits`: seconds of the simulation by resource."""

    published: Published
    simulated: float
    whole: float | None
    roofline: float
    cooled: float | None
    waits: dict[Resource, float]


@dataclass(frozen=True)
class Score:
    """Relative errors |predicted / published - 1| of some rows."""

    rows: int
    near: float
    median: float
    mean: float
    worst: float


def score(predicted: Sequence[float], published: Sequence[float]) -> Score:
    errors = np.abs(np.array(predicted) / np.array(published) - 1)
    near = float(np.mean(errors <= NEAR))
    return Score(len(errors), near, float(np.median(errors)), float(np.mean(errors)), float(np.max(errors)))


def unthrottled(target: Target) -> Target:
    """The target with the clock of one core for all, or itself."""
    first, *others = target.cluster
    clock = replace(first.clock, all_cores=Hertz(0.0))
    return replace(target, cluster=(replace(first, clock=clock), *others)) if first.clock.all_cores else target


def predict(row: Published, whole: bool) -> Row:
    made, target = model(row.model, row.precision), load_target(row.target)
    cool = unthrottled(target)
    found = simulator.simulate(made.path, target, row.threads)
    return Row(
        row,
        1e3 * found.seconds,
        1e3 * simulator.simulate(made.path, target, row.threads, sampled=False).seconds if whole else None,
        1e3 * roofline(made.layers, row.precision, target, row.threads),
        1e3 * simulator.simulate(made.path, cool, row.threads).seconds if cool != target else None,
        calibrate.by_resource(found),
    )


# How rows are put together that share a scale.
GROUPS: dict[str, Callable[[Published], tuple[Any, ...]]] = {
    "device": lambda row: (row.target,),
    "device, threads": lambda row: (row.target, row.threads),
    "device, precision": lambda row: (row.target, row.precision),
}


def from_one(rows: Sequence[Row], key: Callable[[Published], tuple[Any, ...]], kind: str) -> Score:
    """Each row in turn gives the scale for all others of its group; all choices are scored together."""
    predicted, published = [], []
    for one in rows:
        scale = one.published.milliseconds / getattr(one, kind)
        for other in rows:
            if other is not one and key(other.published) == key(one.published):
                predicted.append(scale * getattr(other, kind))
                published.append(other.published.milliseconds)
    return score(predicted, published)


def held_out(rows: Sequence[Row], other_model: bool) -> Score:
    """Each row of a device predicted by `edgebuild targets calibrate` from the others, or those of other models."""
    predicted = []
    for row in rows:
        others = [other for other in rows if other is not row]
        if other_model:
            others = [other for other in others if other.published.model != row.published.model]
        times = [other.published.milliseconds / 1e3 for other in others]
        predicted.append(1e3 * calibrate.total(row.waits, calibrate.fit([other.waits for other in others], times)))
    return score(predicted, [row.published.milliseconds for row in rows])


def accuracy(whole: bool) -> dict[str, Any]:
    kinds = ("simulated", *(["whole"] if whole else []), "roofline")
    rows = []
    print(f"{'device':15} {'thr':>3} {'':5} {'model':19} {'published':>9} {'simulated':>9} {'error':>7}", end="")
    print("".join(f" {kind:>9} {'error':>7}" for kind in kinds[1:]))
    for published in PUBLISHED:
        row = predict(published, whole)
        rows.append(row)
        ms = published.milliseconds
        print(
            f"{published.target:15} {published.threads:3} {published.precision:5} {published.model:19} {ms:9g} ", end=""
        )
        values = (getattr(row, kind) for kind in kinds)
        print(" ".join(f"{value:9.1f} {value / ms - 1:+7.1%}" for value in values), flush=True)
    scores = {}
    print(f"\n{'scale':30} {'':11} {'rows':>4} {'within 10%':>10} {'median':>7} {'mean':>7} {'worst':>7}")

    def tell(name: str, kind: str, found: Score) -> None:
        scores[f"{name}: {kind}"] = asdict(found)
        shares = f"{found.near:10.0%} {found.median:7.1%} {found.mean:7.1%} {found.worst:7.1%}"
        print(f"{name:30} {kind:11} {found.rows:4} {shares}")

    published = [row.published.milliseconds for row in rows]
    for kind in kinds:
        tell("none", kind, score([getattr(row, kind) for row in rows], published))
    for target, some in groupby(rows, lambda row: row.published.target):
        each = list(some)
        times = [row.published.milliseconds for row in each]
        for kind in kinds:
            tell(f"none, {target}", kind, score([getattr(row, kind) for row in each], times))
        if cooled := [row.cooled for row in each if row.cooled is not None]:
            tell(f"none, {target}", "cooled", score(cooled, times))
    for name, key in GROUPS.items():
        for kind in kinds:
            tell(f"one for each {name}", kind, from_one(rows, key, kind))
    for target, some in groupby(rows, lambda row: row.published.target):
        each = list(some)
        tell(f"of resources, {target}", "other row", held_out(each, other_model=False))
        tell(f"of resources, {target}", "other model", held_out(each, other_model=True))
    print(f"\n{'rank correlation (Spearman)':25}\n{'device':15} {'thr':>3} {' '.join(f'{kind:>9}' for kind in kinds)}")
    ranks, bands = {}, {}
    for (target, threads), some in groupby(rows, lambda row: (row.published.target, row.published.threads)):
        each = list(some)
        times = [row.published.milliseconds for row in each]
        found = [float(spearmanr([getattr(row, kind) for row in each], times)[0]) for kind in kinds]
        ranks[f"{target}, {threads}"] = found
        print(f"{target:15} {threads:3} {' '.join(f'{rank:9.2f}' for rank in found)}")
    print("\npublished over simulated, the band of `latency_error`")
    for target, some in groupby(rows, lambda row: row.published.target):
        each = list(some)
        for kind in kinds:
            off = [row.published.milliseconds / getattr(row, kind) - 1 for row in each]
            bands[f"{target}: {kind}"] = [min(off), max(off)]
            print(f"{target:15} {kind:9} {min(off):+.1%} to {max(off):+.1%}")
    return {"rows": [asdict(row) for row in rows], "scores": scores, "spearman": ranks, "bands": bands}


# ---------------------------------------------------------------------------------------------------------- parity

PARITY: tuple[tuple[str, Precision], ...] = ((V3S, "fp32"), (V2, "int8"))
FP32_BOUND = 1e-4  # of outputs that are scaled to a standard deviation of 1


def parity() -> dict[str, Any]:
    """Two models on two inputs, every Arm target against the host. Ends with an error where one is off."""
    rows, off = [], []
    targets = [target for target in map(load_target, names("targets")) if target.device == "arm"]
    print(f"{'model':19} {'':5} {'target':21} {'bit-exact':>9} {'max abs':>9} {'SQNR':>9}")
    for name, precision in PARITY:
        path = model(name, precision).path
        generator = torch.Generator().manual_seed(2)
        inputs = [(torch.randn(SHAPE, generator=generator).numpy(),) for _ in range(2)]
        with host.load(path, load_target("host"), 1) as worker:
            expected = np.concatenate([out[0].ravel() for out in worker.run_many(inputs)]).astype(np.float64)
        scale = expected.std() if precision == "fp32" else 1.0
        expected /= scale
        for target in targets:
            with arm.load(path, target, 1) as guest:
                found = np.concatenate([out[0].ravel() for out in guest.run_many(inputs)]).astype(np.float64)
            found /= scale
            noise = found - expected
            exact, most = bool(np.array_equal(found, expected)), float(np.abs(noise).max())
            with np.errstate(divide="ignore"):
                sqnr = float(10 * np.log10(np.sum(expected**2) / np.sum(noise**2)))
            if not (exact if precision == "int8" else most <= FP32_BOUND):
                off.append(f"{name} {precision} on {target.name}")
            rows.append(
                {"model": name, "precision": precision, "target": target.name, "bit_exact": exact}
                | {"max_abs": most, "sqnr_db": sqnr if np.isfinite(sqnr) else None}
            )
            cells = f"{'yes' if exact else 'no':>9} {most:9.1e} {sqnr:6.1f} dB"
            print(f"{name:19} {precision:5} {target.name:21} {cells}", flush=True)
    if off:
        raise SystemExit(f"outputs differ by more than they may: {', '.join(off)}")
    return {"rows": rows}


# ----------------------------------------------------------------------------------------------------------- speed

SPEED: tuple[tuple[str, Precision], ...] = (
    *((name, "fp32") for name in (V1, V2, V3L, V3S)),
    *((name, "int8") for name in (V1, V2)),
)
REPEATS = 3


def timed(path: Path, target: Target, threads: int, sampled: bool) -> tuple[Simulation, float, float]:
    """A simulation, its seconds on the wall, and the CPU seconds of its processes."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    # Not `simulate`, which would read from the cache what it simulated before.
    (found,) = simulator.simulate_methods(path, target, threads, "--sample" if sampled else "--simulate").values()
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    return found, wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def speed(machines: Sequence[str]) -> dict[str, Any]:
    """CPU seconds are the figure where others use the machine too. Ends with an error where runs count differently."""
    rows = []
    heads = f"{'wall':>6} {'CPU':>6} {'pieces':>7} {'whole: wall':>11} {'CPU':>6} {'sampling':>8} {'worst op':>8}"
    print(f"{'target':15} {'thr':>3} {'model':19} {'':5} {heads} equal")
    for machine in machines:
        target_name, _, written = machine.partition(":")
        target, threads = load_target(target_name), int(written or 1)
        arm.check(target)  # what is built on first use is not timed
        for name, precision in SPEED:
            path = model(name, precision).path
            runs = [timed(path, target, threads, sampled=True) for _ in range(REPEATS)]
            whole, whole_wall, whole_cpu = timed(path, target, threads, sampled=False)
            sampled = runs[0][0]
            wall, cpu = (float(np.median([run[i] for run in runs])) for i in (1, 2))
            pieces, executed = (sum(getattr(op, key) for op in sampled.operators) for key in ("pieces", "executed"))
            difference = sampled.seconds / whole.seconds - 1
            # the largest difference of an operator, as a share of the whole inference
            worst = max(
                abs(a.seconds - b.seconds) / whole.seconds
                for a, b in zip(sampled.operators, whole.operators, strict=True)
            )
            equal = all(run[0] == sampled for run in runs)
            rows.append(
                {"target": target_name, "threads": threads, "model": name, "precision": precision}
                | {"wall": wall, "cpu": cpu, "executed": executed / pieces, "whole_wall": whole_wall}
                | {"whole_cpu": whole_cpu, "difference": difference, "worst_operator": worst, "equal": equal}
            )
            cells = f"{wall:5.1f}s {cpu:5.1f}s {executed / pieces:7.1%} {whole_wall:10.1f}s {whole_cpu:5.1f}s"
            tail = f"{difference:+8.2%} {worst:8.2%} {'yes' if equal else 'NO'}"
            print(f"{target_name:15} {threads:3} {name:19} {precision:5} {cells} {tail}", flush=True)
    if not all(row["equal"] for row in rows):
        raise SystemExit(f"{REPEATS} simulations did not count the same")
    return {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("accuracy", "parity", "speed"))
    parser.add_argument("--whole", action="store_true", help="for accuracy: simulate without sampling, too")
    parser.add_argument(
        "--machine", action="append", help="for speed; several are taken [raspberry-pi-4:4]", metavar="TARGET:THREADS"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    benches = {
        "accuracy": lambda: accuracy(chosen.whole),
        "parity": parity,
        "speed": lambda: speed(chosen.machine or ["raspberry-pi-4:4"]),
    }
    found = benches[chosen.what]()
    if chosen.output:
        chosen.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
