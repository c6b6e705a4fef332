"""Chooses a plan: which widths and forms lose least while every budget holds. No torch here.

The search is greedy: from the whole model it takes, step by step, the cheapest loss for what the broken budgets still
need, then gives back whatever turned out not to be needed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod

from edgebuild.spec import (
    CLAMPS,
    IN_PLACE,
    INT8_OPERATORS,
    MODEL_INPUT,
    PASSING_OPERATORS,
    BudgetKind,
    Candidate,
    ChannelGroup,
    Form,
    LayerFacts,
    ModelFacts,
    Plan,
    Precision,
    Reachable,
    Width,
    factors,
    pays,
)

TINY = 1e-7  # nats; below this a loss is noise of the estimate

OTHER: Mapping[Precision, Precision] = {"fp32": "int8", "int8": "fp32"}

Realised = tuple[tuple[LayerFacts, Precision], ...]


@dataclass(frozen=True)
class Limit:
    """A budget as the search sees it: `cost` of the realised model must stay at or below `bound`.

    `factor` is what measurements said of the prediction so far (measured = factor x predicted).
    """

    kind: BudgetKind
    target: str
    bound: float
    cost: Callable[["Choice"], float] = field(compare=False)
    factor: float = 1.0

    def predicted(self, choice: "Choice") -> float:
        return self.factor * self.cost(choice)


@dataclass(frozen=True)
class Choice:
    """A point of the search: the width of each cut group, the form of each factorized layer."""

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
        return tuple((step.layer, step.precision) for step in self.steps())

    def steps(self) -> tuple["Step", ...]:
        """`layers()` with the tensors that each reads and makes."""
        into, out = self._missing()
        steps: list[Step] = []
        made: dict[tuple[str, Precision], LayerFacts] = {}  # the tensors there are, with the layer that makes them
        at: dict[tuple[str, Precision], Tensor] = {}  # what they are called: a clamp in fp32 makes none of its own
        read: set[str] = set()

        def convert(source: str, precision: Precision, index: int) -> None:
            tensor = made[source, OTHER[precision]]
            border = _border(tensor, precision)
            steps.append(Step(border, "int8", index, (at[source, OTHER[precision]],), (source, precision)))
            made[source, precision], at[source, precision] = tensor, (source, precision)

        for index, layer in enumerate(self.facts.layers):
            narrow = _narrow(layer, into.get(layer.name, 0), out.get(layer.name, 0))
            precision = self._precision(layer, made)
            for source in layer.sources:
                if source == MODEL_INPUT and not made.keys() & {(source, "fp32"), (source, "int8")}:
                    made[source, "fp32"], at[source, "fp32"] = _input(narrow), (source, "fp32")
                if (source, precision) not in made and (source, OTHER[precision]) in made:
                    convert(source, precision, index)
                read.add(source)
            made[layer.name, precision] = narrow
            tensors = tuple(at[source, precision] for source in layer.sources if (source, precision) in at)
            if precision == "fp32" and layer.op in CLAMPS:
                at[layer.name, precision] = tensors[0]
                continue
            form = self.forms.get(layer.name)
            for part in _factors(narrow, form) if form else (narrow,):
                steps.append(Step(part, precision, index, tensors, (part.name, precision)))
                tensors = ((part.name, precision),)
            at[layer.name, precision] = tensors[0]
        for layer in self.facts.layers:
            if layer.name not in read and (layer.name, "int8") in made:
                convert(layer.name, "fp32", len(self.facts.layers) - 1)
        return tuple(steps)

    def _precision(self, layer: LayerFacts, made: Mapping[tuple[str, Precision], LayerFacts]) -> Precision:
        """What a layer computes in; `made` holds the tensors before it."""
        if self.precision == "fp32" or layer.name in self.keep_fp32:
            return "fp32"
        if layer.weighted or layer.op in INT8_OPERATORS:
            return "int8"
        return "int8" if layer.op in PASSING_OPERATORS and (layer.sources[0], "int8") in made else "fp32"

    def sound(self) -> bool:
        """Whether every form still fits, and pays at, its layer's widths."""
        if not self.forms:
            return True
        into, out = self._missing()
        for name, form in self.forms.items():
            layer = self.facts.layer(name)
            narrow = _narrow(layer, into.get(name, 0), out.get(name, 0))
            if not _pays(narrow, form):
                return False
        return True

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

        The model's inputs stay to the end: they are the caller's. An operator that may, and whose input nobody else
        reads, writes its output over it.
        """
        steps = self.steps()
        dies = {tensor: i for i, step in enumerate(steps) for tensor in step.reads}
        size = {step.makes: _bytes(step.layer, step.makes[1]) for step in steps}
        alive: dict[Tensor, int] = {}
        most = [0] * len(self.facts.layers)
        inputs = self.outer_bytes()
        for i, step in enumerate(steps):
            mine, before = size[step.makes], step.reads[:1]
            if step.layer.op in IN_PLACE and before and dies[before[0]] == i and alive.get(before[0]) == mine:
                del alive[before[0]]
            alive[step.makes] = mine
            most[step.index] = max(most[step.index], inputs + sum(alive.values()))
            alive = {tensor: bytes_ for tensor, bytes_ in alive.items() if dies.get(tensor, len(steps)) > i}
        return tuple(most)

    def outer_bytes(self) -> int:
        """Bytes of the model's inputs."""
        first = next((layer for layer in self.facts.layers if MODEL_INPUT in layer.sources), None)
        return 4 * prod(first.in_shape) if first else 0


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
    )


def search(
    start: Choice, candidates: Sequence[Candidate], limits: Sequence[Limit], avoid: Sequence[Choice] = ()
) -> tuple[Choice, float] | None:
    """The choice with least estimated loss that keeps every limit, and that loss in nats; None where none was found.

    Choices in `avoid` are not given again.
    """
    moves = _moves(candidates)
    choice, path = start, [start]
    while not _fits(choice, limits) or choice in avoid:
        scored = [
            (score, key, after)
            for key, after in _steps(choice, moves)
            if (score := _score(choice, after, moves, limits)) > 0 and after not in avoid
        ]
        if not scored:
            return None
        choice = max(scored, key=lambda item: (item[0], item[1]))[2]
        path.append(choice)
    choice = _give_back(choice, moves, limits, avoid)
    return choice, _loss(choice, moves)


def reachable(start: Choice, candidates: Sequence[Candidate], limits: Sequence[Limit]) -> tuple[Reachable, ...]:
    """For each limit alone: the smallest value that the candidates reach, with all other limits left aside."""
    moves = _moves(candidates)
    found = []
    for limit in limits:
        smallest = replace(start, widths={name: min(options) for name, options in moves.widths.items()})
        best = limit.predicted(smallest)
        for layer, options in moves.forms.items():
            for form in options:
                trial = replace(smallest, forms={**smallest.forms, layer: form})
                if trial.sound() and limit.predicted(trial) < best:
                    smallest, best = trial, limit.predicted(trial)
        best = min(best, limit.predicted(start))
        found.append(Reachable(limit.kind, limit.target, limit.bound, best, best <= limit.bound))
    return tuple(found)


def to_plan(choice: Choice, **fields: object) -> Plan:
    """The choice as a plan."""
    widths = tuple(
        Width(group.name, choice.channels(group), group.channels)
        for group in choice.facts.groups
        if choice.channels(group) < group.channels
    )
    forms = tuple(choice.forms[layer.name] for layer in choice.facts.layers if layer.name in choice.forms)
    return Plan(widths=widths, forms=forms, precision=choice.precision, **fields)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- the search


@dataclass(frozen=True)
class _Moves:
    """Candidates by what they change: group -> width -> loss, layer -> form -> loss."""

    widths: Mapping[str, Mapping[int, float]]
    forms: Mapping[str, Mapping[Form, float]]


def _moves(candidates: Sequence[Candidate]) -> _Moves:
    widths: dict[str, dict[int, float]] = {}
    forms: dict[str, dict[Form, float]] = {}
    for candidate in candidates:
        if isinstance(candidate.choice, Width):
            widths.setdefault(candidate.choice.group, {})[candidate.choice.channels] = candidate.loss
        else:
            forms.setdefault(candidate.choice.layer, {})[candidate.choice] = candidate.loss
    return _Moves(widths, forms)


def _steps(choice: Choice, moves: _Moves) -> list[tuple[str, Choice]]:
    """Every choice one step away: a group one width narrower, a layer in another form."""
    found = []
    for name, options in moves.widths.items():
        now = choice.widths.get(name)
        narrower = [width for width in options if now is None or width < now]
        if narrower:
            width = max(narrower)
            found.append((f"width {name} {width}", replace(choice, widths={**choice.widths, name: width})))
    for layer, forms in moves.forms.items():
        for form in forms:
            if form != choice.forms.get(layer):
                found.append((f"form {form}", replace(choice, forms={**choice.forms, layer: form})))
    return [(key, after) for key, after in found if after.sound()]


def _score(before: Choice, after: Choice, moves: _Moves, limits: Sequence[Limit]) -> float:
    """What the broken limits gain, as a share of what they lack, for each nat lost; 0 where they gain nothing."""
    gain = 0.0
    for limit in limits:
        now = limit.predicted(before)
        lack = now - limit.bound
        if lack > 0:
            gain += max(-1.0, min(1.0, (now - limit.predicted(after)) / lack))
    return gain / max(_loss(after, moves) - _loss(before, moves), TINY) if gain > 0 else 0.0


def _loss(choice: Choice, moves: _Moves) -> float:
    widths = sum(moves.widths[name][width] for name, width in choice.widths.items())
    return widths + sum(moves.forms[layer][form] for layer, form in choice.forms.items())


def _fits(choice: Choice, limits: Sequence[Limit]) -> bool:
    return all(limit.predicted(choice) <= limit.bound for limit in limits)


def _give_back(choice: Choice, moves: _Moves, limits: Sequence[Limit], avoid: Sequence[Choice]) -> Choice:
    """Undo, dearest first, whatever the limits do not need."""
    improved = True
    while improved:
        improved = False
        trials = [
            replace(choice, forms={k: v for k, v in choice.forms.items() if k != layer}) for layer in choice.forms
        ]
        for name, width in choice.widths.items():
            wider = [option for option in moves.widths[name] if option > width]
            widths = {k: v for k, v in choice.widths.items() if k != name}
            trials.append(replace(choice, widths={**widths, name: min(wider)} if wider else widths))
        for trial in sorted(trials, key=lambda trial: _loss(trial, moves)):
            if (
                _loss(trial, moves) < _loss(choice, moves)
                and trial.sound()
                and _fits(trial, limits)
                and trial not in avoid
            ):
                choice, improved = trial, True
                break
    return choice


def _input(reader: LayerFacts) -> LayerFacts:
    """An input of the model as a tensor; `reader` is the first layer that reads it."""
    return replace(reader, name="input", out_channels=reader.in_channels, out_elements=reader.in_elements)


def _border(tensor: LayerFacts, precision: Precision) -> LayerFacts:
    """The conversion of what a layer makes to a precision."""
    op, elements = {"int8": "quantize", "fp32": "dequantize"}[precision], tensor.out_elements
    channels, shape = tensor.out_channels, tensor.out_shape
    return LayerFacts(
        f"{tensor.name}.{op}", op, channels, channels, in_elements=elements, out_elements=elements, in_shape=shape,
        out_shape=shape, sources=(tensor.name,),
    )  # fmt: skip


def _bytes(layer: LayerFacts, precision: Precision) -> int:
    return layer.out_elements * (1 if precision == "int8" else 4)


@cache
def _narrow(layer: LayerFacts, lost_in: int, lost_out: int) -> LayerFacts:
    return layer.at(layer.in_channels - lost_in, layer.out_channels - lost_out) if lost_in or lost_out else layer


@cache
def _pays(layer: LayerFacts, form: Form) -> bool:
    return pays(layer, form)


@cache
def _factors(layer: LayerFacts, form: Form) -> tuple[LayerFacts, ...]:
    return factors(layer, form)
