"""A point of the planner's space, what it is made of when lowered, and plans from and to data. No torch here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache, cached_property
from math import prod

from edgebuild.errors import SpecError
from edgebuild.spec import (
    CLAMPS,
    IN_PLACE,
    INT8_OPERATORS,
    MODEL_INPUT,
    PASSING_OPERATORS,
    ChannelGroup,
    Form,
    LayerFacts,
    ModelFacts,
    Plan,
    Precision,
    Width,
    factors,
)

Realised = tuple[tuple[LayerFacts, Precision], ...]


@dataclass(frozen=True)
class Choice:
    """A point of the space: the width of each cut group, the form of each factorized layer, what stays fp32."""

    facts: ModelFacts = field(compare=False, repr=False)
    precision: Precision
    widths: Mapping[str, int] = field(default_factory=dict)
    forms: Mapping[str, Form] = field(default_factory=dict)
    keep_fp32: frozenset[str] = frozenset()

    def channels(self, group: ChannelGroup) -> int:
        return self.widths.get(group.name, group.channels)

    def layers(self) -> Realised:
        """What is lowered, in execution order: each layer at its widths, factorized ones as their factors.

        Where precisions meet there is a `quantize` or `dequantize` of the tensor, once for all its readers.
        """
        return tuple((step.layer, step.precision) for step in self.steps)

    @cached_property
    def steps(self) -> tuple["Step", ...]:
        """`layers()` with the tensors that each reads and makes."""
        into, out = self._missing()
        steps: list[Step] = []
        tensors: dict[str, LayerFacts] = {}
        at: dict[tuple[str, Precision], Tensor] = {}  # in which precisions a tensor is there, and what it is called
        read: set[str] = set()

        def convert(source: str, precision: Precision, index: int) -> None:
            (before,) = [tensor for (name, _), tensor in at.items() if name == source]
            steps.append(Step(border(tensors[source], precision), "int8", index, (before,), (source, precision)))
            at[source, precision] = (source, precision)

        for index, layer in enumerate(self.facts.layers):
            narrow = narrowed(layer, into.get(layer.name, 0), out.get(layer.name, 0))
            precision = self._precisions[layer.name]
            for source in layer.sources:
                if source == MODEL_INPUT and source not in tensors:
                    tensors[source], at[source, "fp32"] = model_input(narrow), (source, "fp32")
                if (source, precision) not in at:
                    convert(source, precision, index)
                read.add(source)
            reads = tuple(at[source, precision] for source in layer.sources)
            tensors[layer.name] = narrow
            if precision == "fp32" and layer.op in CLAMPS:  # fused: it makes no tensor of its own
                at[layer.name, precision] = reads[0]
                continue
            form = self.forms.get(layer.name)
            for part in factorized(narrow, form) if form else (narrow,):
                steps.append(Step(part, precision, index, reads, (part.name, precision)))
                reads = ((part.name, precision),)
            at[layer.name, precision] = reads[0]
        for layer in self.facts.layers:
            if layer.name not in read and (layer.name, "fp32") not in at:
                convert(layer.name, "fp32", len(self.facts.layers) - 1)
        return tuple(steps)

    def precision_of(self, layer: str) -> Precision:
        """What a layer computes in."""
        return self._precisions[layer]

    @cached_property
    def _precisions(self) -> Mapping[str, Precision]:
        found: dict[str, Precision] = {MODEL_INPUT: "fp32"}
        for layer in self.facts.layers:
            if self.precision == "fp32" or layer.name in self.keep_fp32:
                found[layer.name] = "fp32"
            elif layer.weighted or layer.op in INT8_OPERATORS:
                found[layer.name] = "int8"
            else:
                found[layer.name] = found[layer.sources[0]] if layer.op in PASSING_OPERATORS else "fp32"
        return found

    def _missing(self) -> tuple[dict[str, int], dict[str, int]]:
        """Channels that each layer loses at its input and its output."""
        into: dict[str, int] = {}
        out: dict[str, int] = {}
        for group in self.facts.groups:
            lost = group.channels - self.channels(group)
            if lost:
                for name, slot in group.inputs.items():
                    into[name] = into.get(name, 0) + lost * slot.each
                for name, slot in group.outputs.items():
                    out[name] = out.get(name, 0) + lost * slot.each
        return into, out

    def live_bytes(self) -> tuple[int, ...]:
        """Bytes of the activations alive at each layer of `facts.layers`, conversions and factors included.

        The model's inputs stay to the end: they are the caller's.
        """
        most = [0] * len(self.facts.layers)
        for step, live in zip(self.steps, self.step_bytes(), strict=True):
            most[step.index] = max(most[step.index], self.input_bytes() + live)
        return tuple(most)

    def step_bytes(
        self, bytes_of: "BytesOf | None" = None, in_place: bool = True, joined: bool = False
    ) -> tuple[int, ...]:
        """Bytes of the activations alive at each of `steps`, apart from the model's inputs; see `alive`."""
        size = {step.makes: (bytes_of or tensor_bytes)(step.layer, step.makes[1]) for step in self.steps}
        return tuple(sum(size[tensor] for tensor in alive) for alive in self.alive(in_place, joined))

    def alive(self, in_place: bool = True, joined: bool = False) -> tuple[frozenset["Tensor"], ...]:
        """The tensors alive at each of `steps`, apart from the model's inputs.

        Where that is done `in_place`, an operator that may, and whose input nobody else reads, writes its output over
        it. `joined`: what a concatenation alone reads is made as a part of its output.
        """
        dies = {tensor: i for i, step in enumerate(self.steps) for tensor in step.reads}
        size = {step.makes: tensor_bytes(step.layer, step.makes[1]) for step in self.steps}
        readers = [tensor for step in self.steps for tensor in step.reads]
        parts = {
            tensor: step.makes
            for step in self.steps
            for tensor in step.reads
            if joined and step.layer.op == "cat" and readers.count(tensor) == 1
        }
        alive: frozenset[Tensor] = frozenset()
        found = []
        for i, step in enumerate(self.steps):
            before = step.reads[0] if in_place and step.layer.op in IN_PLACE and step.reads else None
            if before in alive and dies[before] == i and size[before] == size[step.makes]:
                alive -= {before}
            alive |= {parts.get(step.makes, step.makes)}
            found.append(alive)
            alive = frozenset(tensor for tensor in alive if dies.get(tensor, len(self.steps)) > i)
        return tuple(found)

    def reads_inputs(self) -> int:
        """The index of the last of `steps` that reads an input of the model as it comes."""
        return max(i for i, step in enumerate(self.steps) if (MODEL_INPUT, "fp32") in step.reads)

    def input_bytes(self) -> int:
        """Bytes of the model's inputs."""
        first = next((layer for layer in self.facts.layers if MODEL_INPUT in layer.sources), None)
        return 4 * prod(first.in_shape) if first else 0


BytesOf = Callable[[LayerFacts, Precision], int]
Tensor = tuple[str, Precision]  # by the layer that makes it; one that is converted is two


@dataclass(frozen=True)
class Step:
    """An operator as it is lowered, for the layer with this index in `facts.layers`."""

    layer: LayerFacts
    precision: Precision
    index: int
    reads: tuple[Tensor, ...]
    makes: Tensor


def choice_of(facts: ModelFacts, plan: Plan) -> Choice:
    """The choice that a plan stands for."""
    return Choice(
        facts,
        plan.precision,
        {width.group: width.channels for width in plan.widths},
        {form.layer: form for form in plan.forms},
        frozenset(plan.keep_fp32),
    )


def to_plan(choice: Choice, **fields: object) -> Plan:
    """The choice as a plan."""
    widths = tuple(
        Width(group.name, choice.channels(group), group.channels)
        for group in choice.facts.groups
        if choice.channels(group) < group.channels
    )
    forms = tuple(choice.forms[layer.name] for layer in choice.facts.layers if layer.name in choice.forms)
    kept = tuple(layer.name for layer in choice.facts.layers if layer.name in choice.keep_fp32)
    return Plan(widths=widths, forms=forms, precision=choice.precision, keep_fp32=kept, **fields)  # type: ignore[arg-type]


def checked(facts: ModelFacts, plan: Plan) -> Plan:
    """A plan written or edited by hand, with each width under its group's name. Raises SpecError with the layer's name.

    A width may name any layer that makes the group's channels; all that name one group must agree.
    """
    if (plan.base == "shortened") != bool(plan.dropped):
        raise SpecError(
            f"the plan's base is {plan.base!r}, and it drops {', '.join(plan.dropped) or 'no block'}",
            'blocks are dropped from the base "shortened", and only from it',
        )
    group_of = {name: group for group in facts.groups for name in group.outputs if facts.layer(name).weighted}
    weighted = {layer.name: layer for layer in facts.layers if layer.weighted}
    widths: dict[str, tuple[str, Width]] = {}
    for width in plan.widths:
        _check_layer(width.group, weighted)
        group = group_of.get(width.group)
        if group is None:
            reason = facts.unprunable.get(width.group, facts.unprunable.get("*", "it is in no channel group"))
            raise SpecError(f"the plan cuts layer {width.group!r}, whose channels are fixed: {reason}")
        if width.of != group.channels or not 0 < width.channels <= group.channels:
            raise SpecError(
                f"the plan keeps {width.channels} of {width.of} channels of layer {width.group!r}, "
                f"which has {group.channels}"
            )
        first, before = widths.setdefault(group.name, (width.group, width))
        if before.channels != width.channels:
            raise SpecError(
                f"the plan keeps {width.channels} channels of layer {width.group!r} and {before.channels} of "
                f"{first!r}, whose channels are the same",
                f"give the group of {', '.join(n for n in group.outputs if n in weighted)} one width",
            )
    choice = Choice(facts, plan.precision, {name: width.channels for name, (_, width) in widths.items()})
    narrow = {layer.name: layer for layer, _ in choice.layers()}
    for form in plan.forms:
        _check_layer(form.layer, weighted)
        layer = narrow[form.layer]
        if layer.groups > 1 or (form.kind == "svd") != (layer.op == "linear" or layer.kernel == (1, 1)):
            raise SpecError(
                f"the plan factorizes layer {form.layer!r} by {form.kind}, which a {layer.op} {layer.kernel} cannot be"
            )
        if not fits(layer, form):
            bounds = rank_bounds(layer, form)
            raise SpecError(
                f"the plan gives layer {form.layer!r} the ranks {form.ranks} for {form.kind}, at most {bounds} "
                f"with {layer.in_channels} channels in and {layer.out_channels} out"
            )
    for name in plan.keep_fp32:
        _check_layer(name, weighted)
    for what, names in (("factorizes", [form.layer for form in plan.forms]), ("keeps in fp32", list(plan.keep_fp32))):
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise SpecError(f"the plan {what} layer {twice!r} twice")
    if plan.distil_steps < 0:
        raise SpecError(f"the plan distils for {plan.distil_steps} steps", "give 0 for as many as the time allows")
    if plan.qat_steps < 0:
        raise SpecError(f"the plan has qat_steps {plan.qat_steps}", "give a number of steps, or 0")
    if plan.precision == "fp32" and (plan.qat_steps or plan.scheme != "static"):
        asked = f"qat_steps {plan.qat_steps}" if plan.qat_steps else f"scheme {plan.scheme!r}"
        raise SpecError(f"the plan has {asked} and precision 'fp32', which rounds nothing", "set precision to 'int8'")
    if plan.scheme == "8da4w" and plan.qat_steps:
        raise SpecError(
            "the plan trains 4-bit groups with their rounding, which is not supported", "set qat_steps to 0"
        )
    kept = tuple(
        Width(name, width.channels, width.of) for name, (_, width) in widths.items() if width.channels < width.of
    )
    return replace(plan, widths=kept)


def _check_layer(name: str, known: Mapping[str, LayerFacts]) -> None:
    if name not in known:
        close = get_close_matches(name, known, n=1)
        raise SpecError(
            f"the plan names layer {name!r}, which the model does not have",
            f"perhaps you meant {close[0]!r}" if close else "",
        )


def model_input(reader: LayerFacts) -> LayerFacts:
    """An input of the model as a tensor; `reader` is the first layer that reads it."""
    return replace(reader, name="input", out_channels=reader.in_channels, out_elements=reader.in_elements)


def border(tensor: LayerFacts, precision: Precision) -> LayerFacts:
    """The conversion of what a layer makes to a precision."""
    op, elements = {"int8": "quantize", "fp32": "dequantize"}[precision], tensor.out_elements
    channels, shape = tensor.out_channels, tensor.out_shape
    return LayerFacts(
        f"{tensor.name}.{op}", op, channels, channels, in_elements=elements, out_elements=elements, in_shape=shape,
        out_shape=shape, sources=(tensor.name,),
    )  # fmt: skip


def tensor_bytes(layer: LayerFacts, precision: Precision) -> int:
    """Bytes of what a layer makes."""
    return layer.out_elements * (1 if precision == "int8" else 4)


@cache
def narrowed(layer: LayerFacts, lost_in: int, lost_out: int) -> LayerFacts:
    return layer.at(layer.in_channels - lost_in, layer.out_channels - lost_out) if lost_in or lost_out else layer


@cache
def factorized(layer: LayerFacts, form: Form) -> tuple[LayerFacts, ...]:
    """The layer's factors; `spec.factors`, remembered."""
    return factors(layer, form)


def fits(layer: LayerFacts, form: Form) -> bool:
    """Whether the layer can have such ranks."""
    bounds = rank_bounds(layer, form)
    return len(form.ranks) == len(bounds) and all(0 < r <= b for r, b in zip(form.ranks, bounds, strict=True))


def rank_bounds(layer: LayerFacts, form: Form) -> tuple[int, ...]:
    """The highest ranks that a form of the layer can have."""
    n, m = layer.in_channels, layer.out_channels
    if form.kind == "svd":
        return (min(n, m),)
    if form.kind == "spatial":
        return (min(n * layer.kernel[0], m * layer.kernel[1]),)
    return (m, n)
