"""The frozen values that the stages hand to each other. No torch here.

Sizes are in bytes, times in seconds, channel counts in channels. `Plan`, `Measurement` and `Verdict` are written to
JSON as they stand.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Literal

from edgebuild.errors import SpecError
from edgebuild.units import Bandwidth, Bytes, Hertz, Percent, Seconds

Technique = Literal["quantize", "prune", "factorize", "distil"]
TECHNIQUES: tuple[Technique, ...] = ("quantize", "prune", "factorize", "distil")

# ---------------------------------------------------------------------------------------------------- hardware


@dataclass(frozen=True)
class L1:
    """A core's own data cache. Its latency is part of the loads' in the core's model."""

    size: Bytes
    ways: int
    source: str
    replacement: Literal["lru", "random"] = "lru"


@dataclass(frozen=True)
class SharedCache:
    """A level below L1; `latency` and `interval` are in cycles of the core.

    `latency`: from a miss above to the data. `interval`: between two lines that the level gives to one core;
    `interval_all`: to all cores together, 0 where that is the same. `shared`: one for all cores of the cluster, else
    each core has its own.
    """

    size: Bytes
    ways: int
    latency: int
    interval: int
    source: str
    interval_all: int = 0
    shared: bool = True
    replacement: Literal["lru", "random"] = "lru"


@dataclass(frozen=True)
class Clock:
    """The clock that a core holds: `rate` with one core busy, `all_cores` with all of them (0: the same)."""

    rate: Hertz
    source: str
    all_cores: Hertz = Hertz(0.0)

    def under(self, threads: int, cores: int) -> float:
        """Hz with so many of the cluster's cores busy: between the two figures, in proportion."""
        if not self.all_cores or threads <= 1:
            return float(self.rate)
        return self.rate + (self.all_cores - self.rate) * (threads - 1) / (cores - 1)


@dataclass(frozen=True)
class Memory:
    """Main memory: its size, latency, and the sustained read bandwidth of one core and of all cores together."""

    size: Bytes
    latency: Seconds
    one_core: Bandwidth
    all_cores: Bandwidth
    source: str


@dataclass(frozen=True)
class Threads:
    """`fork_join`: seconds to hand a piece of work to the threads of a pool and to wait for the last of them."""

    fork_join: Seconds
    source: str


@dataclass(frozen=True)
class Identity:
    """What `/proc/cpuinfo` says of a core, in hex; XNNPACK picks its micro-kernels by it."""

    implementer: str
    part: str
    variant: str
    revision: str
    features: str
    source: str


@dataclass(frozen=True)
class Pipeline:
    """How a core takes in instructions.

    `width`: micro-operations dispatched (in-order: instructions issued) in a cycle. `reorder_buffer`: micro-operations
    in flight, 0 for an in-order core. `store_buffer`: stores waiting to be written. `mispredict`: cycles from a branch
    that was guessed wrong to the first instruction behind it.
    """

    order: Literal["in-order", "out-of-order"]
    width: int
    reorder_buffer: int
    store_buffer: int
    mispredict: int
    source: str


@dataclass(frozen=True)
class Misses:
    """How a core asks for memory: L1 lines on the way at once, and lines that its prefetcher runs ahead of a stream."""

    line_fill_buffers: int
    prefetch: int
    source: str


@dataclass(frozen=True)
class Execution:
    """How a core executes a class of instructions.

    `ports` is written as "F0 + F1" (one of each), "I0/I1" (either), "M x8" (busy for 8 cycles), or "" for none.
    `latency`: cycles until the result can be used; for a load, with the data in L1. `accumulate`: cycles until the next
    multiply-accumulate can add to the result, where that is less. `micro_ops`: how many of `Pipeline.width` it takes.
    """

    ports: str
    latency: int
    accumulate: int = 0
    micro_ops: int = 1


@dataclass(frozen=True)
class ExecutionGroup:
    """Instruction classes whose figures come from one source; the classes are `INSTRUCTION_CLASSES`."""

    source: str
    classes: Mapping[str, Execution] = field(hash=False)


@dataclass(frozen=True)
class Core:
    """A core's microarchitecture, for the simulator; one TOML in `targets/cores/`, or beside the target's."""

    name: str
    title: str
    ports: tuple[str, ...]
    pipeline: Pipeline
    misses: Misses
    execution: tuple[ExecutionGroup, ...]

    def of(self, instruction_class: str) -> Execution:
        return next(group.classes[instruction_class] for group in self.execution if instruction_class in group.classes)

    def slots(self, instruction_class: str) -> tuple[tuple[tuple[str, ...], int], ...]:
        """What a class takes, slot by slot: the ports of which one is taken, and for how many cycles.

        Raises SpecError where `Execution.ports` is not written as it says.
        """
        written, slots = self.of(instruction_class).ports, []
        for part in written.split(" + ") if written else ():
            match = _SLOT.fullmatch(part)
            if match is None:
                raise SpecError(
                    f"{self.name}: ports of {instruction_class}: {written!r} is not written as 'F0/F1 x2 + L'"
                )
            ports = tuple(match["ports"].split("/"))
            for port in ports:
                if port not in self.ports:
                    raise SpecError(f"{self.name}: ports of {instruction_class}: {port!r} is not in {list(self.ports)}")
            slots.append((ports, int(match["cycles"] or 1)))
        return tuple(slots)


_SLOT = re.compile(r"(?P<ports>\w+(/\w+)*)( x(?P<cycles>\d+))?")


# What `native/simulator/decode.c` sorts A64 instructions into. _d: up to 64 bits of a vector register, _q: 128 bits.
INSTRUCTION_CLASSES: Mapping[str, str] = {
    "nop": "hints, barriers, system registers",
    "alu": "integer arithmetic and logic, moves, conditional selects",
    "alu_shift": "the same with a shifted or extended operand; bit fields, extracts, variable shifts",
    "mul": "integer multiply, multiply-add",
    "div": "integer division",
    "branch": "branches, calls, returns",
    "load": "load to one general register",
    "load_pair": "LDP to general registers",
    "load_d": "load of up to 64 bits to a vector register",
    "load_q": "load of 128 bits to a vector register",
    "load_pair_d": "LDP to vector registers, up to 64 bits each",
    "load_pair_q": "LDP to vector registers, 128 bits each",
    "load_multiple": "LD1 to two to four registers, LD2 to LD4",
    "load_replicate": "LD1R to LD4R",
    "load_lane": "LD1 to LD4 of a single lane",
    "store": "store from general registers, STP included",
    "store_d": "store of up to 64 bits from a vector register",
    "store_q": "store of 128 bits from vector registers: STR, STP of two times 64 bits, ST1",
    "store_pair_q": "STP of two 128-bit registers, ST1 of two",
    "store_lane": "ST1 to ST4 of a single lane",
    "prefetch": "PRFM",
    "atomic": "exclusive and acquire-release accesses, LSE atomics",
    "fma_d": "floating-point multiply-accumulate, scalar or 64 bits",
    "fma_q": "floating-point multiply-accumulate, 128 bits",
    "fmul_d": "floating-point multiplication, scalar or 64 bits",
    "fmul_q": "floating-point multiplication, 128 bits",
    "fadd_d": "floating-point addition, comparison, minimum and maximum, scalar or 64 bits",
    "fadd_q": "floating-point addition, comparison, minimum and maximum, 128 bits",
    "fdiv": "floating-point division and square root",
    "fcvt_d": "conversion and rounding, scalar or 64 bits",
    "fcvt_q": "conversion and rounding, 128 bits",
    "imac": "integer vector multiply and multiply-accumulate, 64-bit or widening",
    "imac_q": "integer vector multiply and multiply-accumulate, 128 bits, not widening",
    "dot": "SDOT, UDOT, USDOT, BFDOT",
    "matmul": "SMMLA, UMMLA, USMMLA, BFMMLA",
    "valu_d": "integer vector arithmetic and logic, 64 bits",
    "valu_q": "integer vector arithmetic and logic, 128 bits",
    "vshift_d": "vector shift, 64 bits",
    "vshift_q": "vector shift, saturating narrow, 128 bits",
    "vaccumulate": "pairwise or absolute-difference accumulate, shift and accumulate, across-vector sums",
    "permute_d": "ZIP, UZP, TRN, EXT, DUP, INS, 64 bits",
    "permute_q": "ZIP, UZP, TRN, EXT, DUP, INS, 128 bits",
    "table": "TBL, TBX",
    "vector_to_general": "UMOV, SMOV, FMOV to a general register",
    "general_to_vector": "DUP, INS, FMOV from a general register",
    "vmov": "vector move immediate, FMOV between vector registers",
}


@dataclass(frozen=True)
class Cluster:
    """Equal cores of a target. The TOML's `model` names the core's file; `qemu_cpu` is the ISA of the simulation."""

    name: str
    core: str
    model: Core
    count: int
    count_source: str
    qemu_cpu: str
    clock: Clock
    l1d: L1
    l2: SharedCache
    identity: Identity


Bound = Literal["issue", "latency", "cache", "memory", "threads"]
Resource = Literal["core", "memory", "threads"]
RESOURCES: Mapping[Bound, Resource] = {
    "issue": "core",
    "latency": "core",
    "cache": "memory",
    "memory": "memory",
    "threads": "threads",
}
SCALE_BOUNDS = (0.3, 3.0)


@dataclass(frozen=True)
class Calibration:
    """Factors on the seconds that a simulation waits for each resource, fitted to the real device.

    `source` says what was measured, where and when, and how large the error is of what was not fitted.
    """

    core: float
    memory: float
    threads: float
    source: str

    def scale(self, bound: Bound) -> float:
        return {"core": self.core, "memory": self.memory, "threads": self.threads}[RESOURCES[bound]]


@dataclass(frozen=True)
class Timing:
    """The median latency of an artifact that was measured elsewhere; `model` names `models/MODEL.pte`."""

    model: str
    artifact_sha256: str
    threads: int
    latency: Seconds
    runs: int


@dataclass(frozen=True)
class Timings:
    """What the kit's scripts write: `device` is what the device says of itself."""

    device: str
    runtime: str
    measurement: tuple[Timing, ...]


@dataclass(frozen=True)
class Remote:
    """How an ssh target is reached: `host` is any destination that OpenSSH takes, a name of the user's config included.

    `port` 0 and `identity_file` "" leave it to that config. `options` are those of ssh_config(5), as "Key=value".
    """

    host: str
    port: int = 0
    identity_file: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Npu:
    """An Ethos-U NPU as Arm's Vela compiler is told of it, which estimates its cycles from these three names.

    `accelerator` is the NPU with its MACs per cycle ("ethos-u55-128"), `system_config` (clock, bandwidths, latencies of
    memories) and `memory_mode` (what lies in which memory) are sections of the `vela.ini` that Vela ships.
    """

    accelerator: str
    system_config: str
    memory_mode: str
    source: str


@dataclass(frozen=True)
class Board:
    """A microcontroller: its Cortex-M core ("cortex-m4") and the memories that its data sheet states.

    `sram` counts what the core (and the NPU) can compute in, `flash` what keeps programs and weights.
    """

    cpu: str
    sram: Bytes
    flash: Bytes
    source: str


DeviceName = Literal["host", "arm", "ssh", "ethos_u", "cortex_m"]
MICROCONTROLLERS: tuple[DeviceName, ...] = ("ethos_u", "cortex_m")


@dataclass(frozen=True)
class Target:
    """A piece of hardware with its runtime; one TOML in `targets/`.

    `device` names the module of `edgebuild.devices` that runs artifacts for it. `cluster` lists the cores, the ones
    that run the model first; it, `memory` and `threads` are empty for the host, whose figures are measured and not
    written down. `latency_error` is the relative error band of a latency that was simulated and not measured. An ssh
    target is reached by `ssh`, and its latency predicted by `costs_of`, which a file names. `calibration` is None where
    no latency was fitted. A microcontroller has a `board`, one with an NPU an `npu` too.
    """

    name: str
    title: str
    device: DeviceName
    status: Literal["measured", "validated", "unvalidated"]
    cluster: tuple[Cluster, ...] = ()
    l3: SharedCache | None = None
    memory: Memory | None = None
    threads: Threads | None = None
    latency_error: Percent = Percent(0.0)
    latency_error_source: str = ""
    calibration: Calibration | None = None
    ssh: Remote | None = None
    costs_of: "Target | None" = None
    npu: Npu | None = None
    board: Board | None = None

    @property
    def microcontroller(self) -> bool:
        return self.device in MICROCONTROLLERS

    @property
    def timed(self) -> bool:
        """Whether anything tells how long an artifact takes on it."""
        return self.device != "cortex_m"


# ----------------------------------------------------------------------------------------------------- budgets

BudgetKind = Literal[
    "size",
    "latency",
    "latency_p95",
    "latency_p99",
    "throughput",
    "peak_memory",
    "sram",
    "flash",
    "accuracy_drop",
    "min_delegated",
]
LOWER_BOUNDS = ("throughput", "min_delegated")
TIMED = ("latency", "latency_p95", "latency_p99", "throughput")
PER_TARGET = (*TIMED, "peak_memory", "sram", "flash")


@dataclass(frozen=True)
class Budget:
    """A bound. `relative` is for `accuracy_drop` alone: the bound is a share of the original's metric."""

    kind: BudgetKind
    bound: float
    relative: bool = False

    @property
    def at_least(self) -> bool:
        return self.kind in LOWER_BOUNDS

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def margin(self, value: float) -> float:
        """Room left, as a share of the bound; negative when the budget is broken."""
        room = value - self.bound if self.at_least else self.bound - value
        return room / self.bound if self.bound else (0.0 if room == 0 else room)


Hints = Literal["none", "vectors", "all"]


@dataclass(frozen=True)
class Distillation:
    """How a student learns from its teacher (Hinton et al. 2015, arXiv:1503.02531; Romero et al. 2015, 1412.6550).

    `steps` fixes the length, so that the same build gives the same bytes; `time` then only ends a training that takes
    too long. With `steps` 0 a training has as many steps as fit into `time`. `learning_rate`: the peak; 0 for the
    optimizer's usual one. `teacher_weight`: the share of the softened KL term where there are labels. `hints`: which
    features are learned too, "vectors" (what a classifier reads, and other layers that read one vector of a sample),
    "all" channel groups or "none"; `hint_weight`: what their error is multiplied by. `cutmix`: the share of a batch of
    images into which a part of another one is pasted (Yun et al. 2019, 1905.04899); without a value all where only the
    calibration samples are there to train on, and none of a task's own training batches. `freeze_after`: the share of
    the steps after which the first layers are not trained any more (Brock et al. 2017, 1706.04983); 1 for never.
    """

    steps: int = 400
    learning_rate: float = 0.0
    temperature: float = 8.0
    teacher_weight: float = 0.95
    hints: Hints = "vectors"
    hint_weight: float = 0.3
    cutmix: float | None = None
    freeze_after: float = 0.5
    time: Seconds = Seconds(600.0)


@dataclass(frozen=True)
class Profile:
    """A target plus the budgets and the artifact kind; one TOML in `profiles/`.

    `also_on` lists further targets on which the budgets must hold as well. `threads` run on the cores of `cluster`, ""
    for the ones that a target lists first. `time` bounds the whole build.
    """

    name: str
    title: str
    target: str
    artifact: Literal["pte", "torchscript"]
    budgets: tuple[Budget, ...]
    also_on: tuple[str, ...] = ()
    threads: int = 1
    cluster: str = ""
    techniques: tuple[Technique, ...] = TECHNIQUES
    rounds: int = 4
    time: Seconds = Seconds(1800.0)
    seed: int = 0
    distillation: Distillation = Distillation()

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target, *(name for name in self.also_on if name != self.target))

    def budget(self, kind: BudgetKind) -> Budget | None:
        return next((budget for budget in self.budgets if budget.kind == kind), None)


# ----------------------------------------------------------------------------------------------- what a model is

Precision = Literal["fp32", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")

# How a quantized model computes: int8 with activations ranged beforehand; the same, ranged at run time, in linear and
# ungrouped convolutional layers alone; linear layers alone with 4-bit weights in groups, activations as in dynamic.
Scheme = Literal["static", "dynamic", "8da4w"]
SCHEMES: tuple[Scheme, ...] = ("static", "dynamic", "8da4w")
GROUP = 32  # 4-bit weights of a row that share a scale
DEPTH = 8  # input channels that XNNPACK's int8 kernels sum at once; fewer are filled up with zeros
SEGMENT = 16  # where the segments of a `.pte` may start: XNNPACK packs constants anew, and no other kernel wants more
MODEL_INPUT = ""

# Operators without weights in an int8 model, by PyTorch's XNNPACK quantizer: these compute in int8, these pass on what
# they are given; every other operator computes in fp32 between a dequantize and a quantize.
INT8_OPERATORS = frozenset({"adaptive_avg_pool2d", "add", "cat", "mul"})
CLAMPS = frozenset({"relu6", "hardtanh"})
IN_PLACE = CLAMPS | frozenset({"hardswish", "sigmoid", "tanh", "elu", "leaky_relu"})
PASSING_OPERATORS = CLAMPS | frozenset({"max_pool2d", "mean", "permute", "reshape", "squeeze", "transpose", "view"})


@dataclass(frozen=True)
class LayerFacts:
    """What analysis says of one layer for a single sample (batch size 1).

    `op` is conv2d, linear, or the name of an operator without weights. `positions` counts what the weights are applied
    to: output height x width for a convolution, rows for a linear layer. `in_elements` and `out_elements` are the
    activations of a sample. For a depthwise convolution `groups` equals `in_channels`; for an attention it counts the
    heads, and `positions` the tokens that each token looks at. `sources` names the layers whose outputs it reads,
    MODEL_INPUT for an input of the model.
    """

    name: str
    op: str
    in_channels: int
    out_channels: int
    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    positions: int = 1
    in_elements: int = 0
    out_elements: int = 0
    bias: bool = False
    in_shape: tuple[int, ...] = ()
    out_shape: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()

    @property
    def weighted(self) -> bool:
        return self.op in ("conv2d", "linear")

    @property
    def depthwise(self) -> bool:
        return self.op == "conv2d" and self.groups > 1 and self.groups == self.in_channels

    @property
    def weights(self) -> int:
        """Elements of the weight tensor, without the bias."""
        return self.out_channels * (self.in_channels // self.groups) * prod(self.kernel) if self.weighted else 0

    @property
    def parameters(self) -> int:
        return self.weights + (self.out_channels if self.bias else 0)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        if self.op == "attention":  # two products
            return 2 * self.positions * self.out_elements
        return self.weights * self.positions

    def bytes_moved(self, precision: Precision) -> int:
        """Bytes read and written once each: input, output and weights."""
        size = 1 if precision == "int8" else 4
        return size * (self.in_elements + self.out_elements + self.weights) + (
            4 * self.out_channels if self.bias else 0
        )

    def at(self, in_channels: int, out_channels: int) -> "LayerFacts":
        """The same layer at other widths."""
        by_group = self.depthwise or self.op == "attention"
        groups = self.groups * in_channels // self.in_channels if by_group else self.groups
        return replace(
            self,
            in_channels=in_channels,
            out_channels=out_channels,
            groups=groups,
            in_elements=round(self.in_elements * in_channels / max(self.in_channels, 1)),
            out_elements=round(self.out_elements * out_channels / max(self.out_channels, 1)),
        )


@dataclass(frozen=True)
class Slot:
    """Where a group's channels lie in a layer: c is the layer's `start + c * each` up to `start + (c + 1) * each`.

    `each` is 1 for a convolution, height x width for a linear layer behind a flatten; `start` is not 0 behind a concat.
    """

    start: int
    each: int


@dataclass(frozen=True)
class ChannelGroup:
    """The channels that must be pruned together: those of every layer in `outputs`, read by every layer in `inputs`.

    `name` is the first layer that makes the channels. A depthwise convolution and an operator without weights stand in
    both maps. In the group of an attention a channel is a head, made of several channels of its layers.
    """

    name: str
    channels: int
    outputs: Mapping[str, Slot]
    inputs: Mapping[str, Slot]

    @property
    def each(self) -> int:
        """Channels of the first layer that make up one of the group: 1, or the width of a head."""
        return self.outputs[self.name].each


@dataclass(frozen=True)
class ModelFacts:
    """The whole analysis: layers in execution order, which is the schedule, and channel groups."""

    layers: tuple[LayerFacts, ...]
    groups: tuple[ChannelGroup, ...]
    unprunable: Mapping[str, str] = field(default_factory=dict)  # layer -> why its channels are fixed

    def layer(self, name: str) -> LayerFacts:
        return self._layers[name]

    def group(self, name: str) -> ChannelGroup:
        return self._groups[name]

    @cached_property
    def _layers(self) -> Mapping[str, LayerFacts]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def _groups(self) -> Mapping[str, ChannelGroup]:
        return {group.name: group for group in self.groups}

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)


# ------------------------------------------------------------------------------------------------------- plans

FormKind = Literal["svd", "spatial", "tucker2"]


@dataclass(frozen=True)
class Width:
    """Keep `channels` of a group's `of` channels."""

    group: str
    channels: int
    of: int


@dataclass(frozen=True)
class Form:
    """A layer as a product of smaller ones; `ranks` is (r,) for svd and spatial, (r_out, r_in) for tucker2."""

    layer: str
    kind: FormKind
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Cast:
    """A layer that computes in another precision than fp32: its weights and what it reads are quantized."""

    layer: str
    precision: Precision = "int8"


@dataclass(frozen=True)
class Candidate:
    """One way to realise a group (`choice` is a Width) or a layer (a Form, a Cast), with its estimated loss increase.

    The loss is in nats of the model's own output distribution, as `edgebuild.sensitivity` defines it.
    """

    choice: Width | Form | Cast
    loss: float


@dataclass(frozen=True)
class Dropped:
    """A candidate that the planner was not given, and why it cannot pay on the target."""

    where: str
    candidate: str
    reason: str


@dataclass(frozen=True)
class Trial:
    """A plan of one technique alone that was tried, with its loss in nats as estimated and as found.

    `changes` counts the groups or layers that it changes; `scheme` says how a quantized model computed.
    """

    technique: Technique
    changes: int
    estimated: float
    real: float
    scheme: Scheme = "static"


@dataclass(frozen=True)
class Plan:
    """What to do to the model, as data; ships with the artifact and can be built again from its JSON.

    `base` says which model is compressed: the task's own, the same without the residual blocks in `dropped` (by their
    first layers), or the student that the task brings. `widths` and `forms` hold what changes; everything they do not
    name stays. `scheme` is how int8 is computed. `qat_steps` of training with faked rounding follow the distillation;
    with 0 the model is quantized as it is. `why` says in plain words what each technique was needed for.
    """

    base: Literal["model", "shortened", "student"] = "model"
    dropped: tuple[str, ...] = ()
    widths: tuple[Width, ...] = ()
    forms: tuple[Form, ...] = ()
    precision: Precision = "int8"
    keep_fp32: tuple[str, ...] = ()
    scheme: Scheme = "static"
    distil: bool = False
    distil_steps: int = 0
    qat_steps: int = 0
    why: tuple[str, ...] = ()
    schema_version: int = 1

    @property
    def techniques(self) -> tuple[Technique, ...]:
        used = {
            "quantize": self.precision == "int8",
            "prune": bool(self.widths or self.dropped),
            "factorize": bool(self.forms),
            "distil": self.distil,
        }
        return tuple(name for name in TECHNIQUES if used[name])

    @property
    def choices(self) -> "Plan":
        """The plan without its explanation: two plans with equal choices build the same artifact."""
        return replace(self, why=())


@dataclass(frozen=True)
class Solve:
    """A run of the planner's integer program.

    `gap`: how far the plan's loss may lie above the least possible, relative; None where no plan was found. `seconds`
    is the solver's time, `building` that of writing the program down. `columns` counts the binaries too.
    """

    status: Literal["optimal", "time limit", "infeasible", "no plan in time", "failed"]
    seconds: float
    building: float
    gap: float | None
    nodes: int
    binaries: int
    columns: int
    rows: int


def factors(layer: LayerFacts, form: Form) -> tuple[LayerFacts, ...]:
    """The layers that stand in for a factorized one, in order; the last keeps the bias."""
    n, m = layer.in_channels, layer.out_channels
    if layer.op == "linear":
        rows, (r,) = (layer.positions,), form.ranks
        return (
            _factor(layer, 0, n, r, (), (), rows, rows, bias=False),
            _factor(layer, 1, r, m, (), (), rows, rows, bias=layer.bias),
        )
    (kh, kw), (sh, sw) = layer.kernel, layer.stride
    before, after = layer.in_shape[2:], layer.out_shape[2:]
    if form.kind == "svd":
        (r,) = form.ranks
        return (
            _factor(layer, 0, n, r, (1, 1), (sh, sw), before, after, bias=False),
            _factor(layer, 1, r, m, (1, 1), (1, 1), after, after, bias=layer.bias),
        )
    if form.kind == "spatial":
        (r,) = form.ranks
        between = (layer.out_shape[2], layer.in_shape[3])
        return (
            _factor(layer, 0, n, r, (kh, 1), (sh, 1), before, between, bias=False),
            _factor(layer, 1, r, m, (1, kw), (1, sw), between, after, bias=layer.bias),
        )
    r_out, r_in = form.ranks
    return (
        _factor(layer, 0, n, r_in, (1, 1), (1, 1), before, before, bias=False),
        _factor(layer, 1, r_in, r_out, (kh, kw), (sh, sw), before, after, bias=False),
        _factor(layer, 2, r_out, m, (1, 1), (1, 1), after, after, bias=layer.bias),
    )


def pays(layer: LayerFacts, form: Form) -> bool:
    """Whether the factors need fewer multiply-accumulates and weights than the layer, with ranks that it can have."""
    if form.kind == "tucker2" and (form.ranks[0] >= layer.out_channels or form.ranks[1] >= layer.in_channels):
        return False
    parts = factors(layer, form)
    return sum(part.macs for part in parts) < layer.macs and sum(part.weights for part in parts) < layer.weights


def _factor(
    layer: LayerFacts,
    index: int,
    in_channels: int,
    out_channels: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    before: tuple[int, ...],
    after: tuple[int, ...],
    bias: bool,
) -> LayerFacts:
    """A factor; `before` and `after` are height and width of an image, or the rows that a linear layer sees."""
    image = layer.op == "conv2d"
    return LayerFacts(
        name=f"{layer.name}.{index}",
        op=layer.op,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel=kernel,
        stride=stride,
        positions=prod(after),
        in_elements=in_channels * prod(before),
        out_elements=out_channels * prod(after),
        bias=bias,
        in_shape=(1, in_channels, *before) if image else (*before, in_channels),
        out_shape=(1, out_channels, *after) if image else (*after, out_channels),
    )


# ------------------------------------------------------------------------------------------------ what was found

Method = Literal["measured", "simulated", "estimated", "counted", "reported"]


@dataclass(frozen=True)
class OperatorTime:
    """An operator of an inference on a simulated machine. `layer`: the model's layer that it computes, "" if none.

    `bounds` splits the seconds by what was waited for: a free issue port, an operand that is being computed, data from
    a cache below L1 or from memory, the other threads. `instructions` counts those executed by class
    (INSTRUCTION_CLASSES), `memory_bytes` what moved between the caches and memory. Of the `pieces` that parallel loops
    consist of, `executed` were executed, and the rest stands for like ones.
    """

    name: str
    seconds: float
    bounds: Mapping[Bound, float]
    instructions: Mapping[str, int]
    macs: int
    l1_misses: int
    l2_misses: int
    l3_misses: int
    memory_bytes: int
    pieces: int
    executed: int
    layer: str = ""


@dataclass(frozen=True)
class Measurement:
    """A figure and how it was come by; "reported" by the build, where what it would take is not at hand any more.

    `quantity` is a BudgetKind (or `latency_min` and the like); `error` is the relative half-width of its error band, 0
    where the figure is exact or measured. `runs` counts repetitions, `detail` says the rest. `operators` is what a
    simulated latency consists of; `split` a peak of memory, in bytes by kind, where the device counts it.
    """

    target: str
    quantity: str
    value: float
    method: Method
    error: float = 0.0
    runs: int = 1
    detail: str = ""
    operators: tuple[OperatorTime, ...] = ()
    split: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Simulation:
    """One inference on a simulated machine, in the order in which operators ran.

    `calibrated` says what the times were fitted to; "" where they were not.
    """

    target: str
    threads: int
    sampled: bool
    operators: tuple[OperatorTime, ...]
    calibrated: str = ""

    @property
    def seconds(self) -> float:
        return sum(operator.seconds for operator in self.operators)


@dataclass(frozen=True)
class Parity:
    """Outputs of an artifact against eager PyTorch on the task's real inputs.

    `sqnr_db`: signal to quantization-noise ratio, 10 log10(sum y^2 / sum (y - y')^2). `agreement`: share of samples
    with the same top-1; None where the output is no vector of scores. `reference` says what it was held against.
    """

    target: str
    reference: str
    samples: int
    sqnr_db: float
    agreement: float | None
    bit_exact: bool
    max_abs: float
    ok: bool
    first_divergence: str = ""


@dataclass(frozen=True)
class Accuracy:
    """The task's metric of the original and of the artifact, each with a 95% interval where one can be given."""

    metric: str
    original: float
    artifact: float
    samples: int
    original_interval: tuple[float, float] | None
    artifact_interval: tuple[float, float] | None
    drop: float
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    """A budget held against a figure on one target ("" where the budget is the artifact's own)."""

    kind: BudgetKind
    target: str
    bound: float
    predicted: float | None
    value: float | None
    method: Method | None
    margin: float | None
    status: Literal["pass", "fail", "inconclusive"]
    note: str = ""


@dataclass(frozen=True)
class Artifact:
    """A lowered model: its bytes and what the backend says of it.

    `delegated` counts operators in and out of the delegate; `fallen_back` names each operator that stayed outside with
    the source line it came from, and what is known of why and of what it costs. `graphs`: for each delegate of an
    Ethos-U the TOSA graph (a flatbuffer) that its commands were compiled from.
    """

    kind: Literal["pte", "torchscript"]
    data: bytes = field(repr=False)
    backend: str
    delegated: int
    not_delegated: int
    fallen_back: tuple[str, ...]
    planned_memory: int
    graphs: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def suffix(self) -> str:
        return {"pte": ".pte", "torchscript": ".pt"}[self.kind]

    @property
    def share_delegated(self) -> float:
        total = self.delegated + self.not_delegated
        return self.delegated / total if total else 0.0


# ---------------------------------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Finding:
    """Something that must not stay silent: a fallback, a skipped check, an estimate in place of a measurement."""

    kind: Literal["fallback", "skipped", "estimated", "limit", "note"]
    where: str
    what: str


@dataclass(frozen=True)
class CalibrationError:
    """How far off a device's cost model is: relative errors of layers of a kind, each predicted from all others.

    `layers` counts those that were timed.
    """

    kind: str
    precision: Precision
    layers: int
    median: float
    worst: float


@dataclass(frozen=True)
class Prediction:
    """A figure of a built artifact beside what the corrected cost model had said of it; `error` is relative."""

    quantity: str
    target: str
    predicted: float
    found: float
    method: Method
    error: float


@dataclass(frozen=True)
class LayerRow:
    """A layer before and after; sizes in parameters. `latency` is the prediction for each target, in seconds.

    Before is the layer as the original has it, in fp32; on a microcontroller, which computes in int8 alone, in int8.
    """

    name: str
    op: str
    change: str
    precision: Precision
    parameters: tuple[int, int]
    macs: tuple[int, int]
    latency: Mapping[str, tuple[float, float]]
    loss: float


@dataclass(frozen=True)
class Round:
    """One pass of the loop: a plan, what the models said of it, what was found. `size` in bytes.

    A `draft` was lowered and measured without training, since weights change neither size nor latency nor memory; it
    broke a budget, so it was never trained. `estimated_loss` and `loss` are nats of the softened output distribution
    on the calibration samples: as estimated before training, and as found on what was lowered.
    """

    number: int
    plan: Plan
    draft: bool
    artifact_sha256: str
    size: int
    verdicts: tuple[Verdict, ...]
    predictions: tuple[Prediction, ...]
    estimated_loss: float
    loss: float
    score: float | None  # the task's metric, of the artifact
    training: str
    solve: Solve | None
    corrections: Mapping[str, float]  # factor on the cost model that the plan was made with, by budget and target
    met: bool
    quantization: str = ""  # how ranges were found, and what training with the rounding brought


@dataclass(frozen=True)
class Reachable:
    """What plans can reach for a budget, as predicted (a figure that was `measured` on a built plan is marked so).

    `smallest`: with the other budgets left aside, `feasible` where that is within the bound. `nearest`: a bound just
    above the least that can be kept with all other budgets as asked; None where they cannot be met whatever it is.
    """

    kind: BudgetKind
    target: str
    bound: float
    smallest: float
    feasible: bool
    nearest: float | None
    measured: bool = False


@dataclass(frozen=True)
class FrontierPoint:
    """A plan on the trade-off curve: the least estimated loss (nats) where `axis` is at most `bound`.

    `predicted` gives size and latency of the gating target by name. `gap` is the solver's. `chosen`: it is the plan
    that was built.
    """

    axis: str
    bound: float
    predicted: Mapping[str, float]
    loss: float
    gap: float
    chosen: bool


@dataclass(frozen=True)
class Report:
    """All that a build found. `report.json` is this value; every other form of the report is made from that JSON alone.

    `outcome`: met, broken (built, a budget failed), inconclusive (no budget failed, but one could not be decided) or
    infeasible (nothing was built; `reachable` says what binds).
    """

    outcome: Literal["met", "broken", "inconclusive", "infeasible"]
    summary: str
    task: str
    profile: str
    targets: tuple[str, ...]
    artifact: str
    artifact_sha256: str
    size: int
    original_size: int
    plan: Plan | None
    verdicts: tuple[Verdict, ...]
    accuracy: Accuracy | None
    parity: tuple[Parity, ...]
    measurements: tuple[Measurement, ...]
    original_measurements: tuple[Measurement, ...]
    layers: tuple[LayerRow, ...]
    rounds: tuple[Round, ...]
    reachable: tuple[Reachable, ...]
    frontier: tuple[FrontierPoint, ...]
    dropped: tuple[Dropped, ...]
    trials: tuple[Trial, ...]
    calibration: Mapping[str, tuple[CalibrationError, ...]]  # by target
    findings: tuple[Finding, ...]
    stages: Mapping[str, float]  # seconds by stage
    environment: Mapping[str, str]  # versions, machine, seed: what a rebuild would need
    build_id: str = ""
    schema_version: int = 1
