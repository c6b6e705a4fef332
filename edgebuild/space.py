"""What may be chosen, and the limits on it: candidates without those that cannot pay on the target. No torch here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from edgebuild.plan import Choice, factorized
from edgebuild.spec import (
    BudgetKind,
    Candidate,
    Cast,
    ChannelGroup,
    Dropped,
    Form,
    LayerFacts,
    ModelFacts,
    Precision,
    Width,
)

# A change must save this share of what its layers cost: less is within the error of any measurement.
WORTHWHILE = 0.005
# A layer is int8 without a choice where that loses less than this share of all int8 losses, or fewer nats than anyone
# would see in the outputs.
NOTICEABLE, NOTICEABLE_NATS = 0.02, 1e-4
SLACK = 1e-6  # relative; rounding of sums must not make the choice that sets a bound break it


Amount = Callable[[LayerFacts, Precision], float]


@dataclass(frozen=True)
class Planned:
    """What buffers take: a `step` beside the tensors, and a `tensor`; concatenations that are `joined` copy nothing."""

    step: Amount
    tensor: Callable[[LayerFacts, Precision], int]
    joined: bool


@dataclass(frozen=True)
class Phase:
    """A stretch of time with needs of its own: a sum over the layers, a constant, the activations alive if `live`.

    The model's `inputs` are the caller's and kept, or live until they were read, or lie elsewhere. On a microcontroller
    every buffer is `planned`: that says what a step takes while it runs, beside the tensors.
    """

    layer: Amount
    fixed: float = 0.0
    live: bool = False
    planned: "Planned | None" = None
    inputs: Literal["kept", "read", "elsewhere"] = "kept"

    def of(self, choice: Choice) -> float:
        """What it takes of a choice: with live activations at the worst of the steps."""
        total = self.fixed + sum(self.layer(layer, precision) for layer, precision in choice.layers())
        if not self.live:
            return total
        if (plan := self.planned) is None:
            return total + max(live + self.input_bytes(choice, i) for i, live in enumerate(choice.step_bytes()))
        lives = choice.step_bytes(plan.tensor, in_place=False, joined=plan.joined)
        return total + max(
            live + self.input_bytes(choice, i) + plan.step(step.layer, step.precision)
            for i, (step, live) in enumerate(zip(choice.steps, lives, strict=True))
        )

    def input_bytes(self, choice: Choice, step: int) -> int:
        """Bytes of the model's inputs that are held at a step."""
        held = self.inputs == "kept" or (self.inputs == "read" and step <= choice.reads_inputs())
        return choice.input_bytes() if held else 0


@dataclass(frozen=True)
class Resource:
    """A cost that adds up over the layers as they are lowered, to which `fixed` belongs to none.

    With `phases`, the most that any of them takes comes on top.
    """

    layer: Amount
    fixed: float = 0.0
    phases: tuple[Phase, ...] = ()

    def of(self, choice: Choice) -> float:
        total = self.fixed + sum(self.layer(layer, precision) for layer, precision in choice.layers())
        return total + max((phase.of(choice) for phase in self.phases), default=0.0)


@dataclass(frozen=True)
class Limit:
    """A budget as the program sees it: `factor` times the resource must stay at or below `bound`.

    `factor` is what measurements said of the prediction so far (measured = factor x predicted).
    """

    kind: BudgetKind
    target: str
    bound: float
    resource: Resource = field(compare=False)
    factor: float = 1.0

    def predicted(self, choice: Choice) -> float:
        return self.factor * self.resource.of(choice)

    def holds(self, choice: Choice) -> bool:
        return self.predicted(choice) <= self.bound * (1 + 2 * SLACK)


@dataclass(frozen=True)
class Option:
    """A way to realise a layer: dense where `form` is None; its estimated loss in nats."""

    form: Form | None
    precision: Precision
    loss: float


@dataclass(frozen=True)
class Space:
    """All that may be chosen.

    `widths`: for each group that can be cut its widths, the whole one first, with the loss of each in nats. `options`:
    for each layer that has a choice its options; every other layer is dense in the model's `precision`, losing
    `fixed_loss` in all.
    """

    facts: ModelFacts
    precision: Precision
    widths: Mapping[str, tuple[tuple[int, float], ...]]
    options: Mapping[str, tuple[Option, ...]]
    fixed_loss: float = 0.0

    @property
    def whole(self) -> Choice:
        """Every group at its width, every layer dense in the model's precision."""
        return Choice(self.facts, self.precision)

    def without_forms(self) -> "Space":
        """The space with every layer dense."""
        dense = {name: tuple(o for o in options if o.form is None) for name, options in self.options.items()}
        return replace(self, options=dense)

    def loss(self, choice: Choice) -> float:
        """The estimated loss of a choice in nats. Raises KeyError where it is no point of the space."""
        total = self.fixed_loss
        for name, levels in self.widths.items():
            total += dict(levels)[choice.widths.get(name, levels[0][0])]
        for name, options in self.options.items():
            precision = choice.precision_of(name)
            total += next(o.loss for o in options if (o.form, o.precision) == (choice.forms.get(name), precision))
        return total


def make(
    facts: ModelFacts,
    candidates: Sequence[Candidate],
    limits: Sequence[Limit],
    precision: Precision,
    mixed: bool = True,
) -> tuple[Space, tuple[Dropped, ...]]:
    """The space of a model in `precision`, and the candidates that were left out as they cannot pay.

    What a candidate saves is judged with everything else whole. `mixed`: a layer of an int8 model may stay fp32.
    """
    dropped: list[Dropped] = []
    widths = {group.name: _levels(facts, group, candidates, limits, precision, dropped) for group in facts.groups}
    options: dict[str, tuple[Option, ...]] = {}
    casts = {c.choice.layer: c.loss for c in candidates if isinstance(c.choice, Cast)} if precision == "int8" else {}
    noticeable = max(NOTICEABLE_NATS, NOTICEABLE * sum(casts.values()))
    whole = Choice(facts, precision)
    costs = [limit.predicted(whole) for limit in limits]
    fixed_loss = sum(loss for name, loss in casts.items() if not facts.layer(name).weighted)  # such an operator is int8
    for layer in (layer for layer in facts.layers if layer.weighted):
        loss = casts.get(layer.name, 0.0)
        found = [Option(None, precision, loss)]
        if layer.name in casts and mixed:
            kept = Choice(facts, precision, keep_fp32=frozenset({layer.name}))
            saves = any(_saves(cost, limit.predicted(kept), cost) for cost, limit in zip(costs, limits, strict=True))
            if saves or loss > noticeable:
                found.append(Option(None, "fp32", 0.0))
            else:
                dropped.append(Dropped(layer.name, "fp32", f"saves nothing, and int8 loses {loss:.2g} nats"))
        for form, extra in _forms(layer, candidates, limits, precision, dropped):
            found += [Option(form, option.precision, option.loss + extra) for option in found if option.form is None]
        if len(found) > 1:
            options[layer.name] = tuple(found)
        else:
            fixed_loss += loss
    return Space(
        facts, precision, {name: levels for name, levels in widths.items() if len(levels) > 1}, options, fixed_loss
    ), tuple(dropped)


def _levels(
    facts: ModelFacts,
    group: ChannelGroup,
    candidates: Sequence[Candidate],
    limits: Sequence[Limit],
    precision: Precision,
    dropped: list[Dropped],
) -> tuple[tuple[int, float], ...]:
    """A group's widths and losses, the whole one first; a width that costs what a wider one costs is dropped."""
    losses = {
        c.choice.channels: c.loss for c in candidates if isinstance(c.choice, Width) and c.choice.group == group.name
    }
    levels, before = [(group.channels, 0.0)], _group_cost(facts, group, group.channels, limits, precision)
    whole = before
    for width in sorted(losses, reverse=True):
        cost = _group_cost(facts, group, width, limits, precision)
        if any(map(_saves, before, cost, whole)):
            levels.append((width, max(losses[width], levels[-1][1])))
            before = cost
        else:
            dropped.append(Dropped(group.name, f"width {width}", f"costs as much as {levels[-1][0]} on every budget"))
    return tuple(levels)


def _group_cost(
    facts: ModelFacts, group: ChannelGroup, width: int, limits: Sequence[Limit], precision: Precision
) -> list[float]:
    """What the layers that a group touches cost by each limit, with the group at a width and all others whole."""
    choice = Choice(facts, precision, {group.name: width} if width != group.channels else {})
    touched = {*group.inputs, *group.outputs}
    layers = [(layer, p) for layer, p in choice.layers() if layer.name in touched]
    live = sum(choice.live_bytes()) if any(limit.resource.phases for limit in limits) else 0
    found = []
    for limit in limits:
        amounts = [limit.resource.layer, *(phase.layer for phase in limit.resource.phases)]
        cost = sum(amount(layer, p) for amount in amounts for layer, p in layers)
        found.append(cost + (live if any(phase.live for phase in limit.resource.phases) else 0))
    return found


def _forms(
    layer: LayerFacts,
    candidates: Sequence[Candidate],
    limits: Sequence[Limit],
    precision: Precision,
    dropped: list[Dropped],
) -> list[tuple[Form, float]]:
    """A layer's factorizations that save something, without those that another beats in loss and in every cost."""
    dense = [limit.resource.layer(layer, precision) for limit in limits]
    found: list[tuple[Form, float, list[float]]] = []
    own = [c for c in candidates if isinstance(c.choice, Form) and c.choice.layer == layer.name]
    for candidate in sorted(own, key=lambda candidate: candidate.loss):
        form = candidate.choice
        assert isinstance(form, Form)
        cost = [sum(limit.resource.layer(part, precision) for part in factorized(layer, form)) for limit in limits]
        name = f"{form.kind} {' x '.join(map(str, form.ranks))}"
        better = next(
            (other for other, _, spent in found if all(a <= b for a, b in zip(spent, cost, strict=True))), None
        )
        if not any(map(_saves, dense, cost, dense)):
            dropped.append(Dropped(layer.name, name, "saves nothing on any budget against the dense layer"))
        elif better:
            other = f"{better.kind} {' x '.join(map(str, better.ranks))}"
            dropped.append(Dropped(layer.name, name, f"{other} costs less and loses less"))
        else:
            found.append((form, candidate.loss, cost))
    return [(form, loss) for form, loss, _ in found]


def _saves(before: float, after: float, whole: float) -> bool:
    return before - after > WORTHWHILE * whole
