"""The integer program: widths, forms and precisions chosen together, to lose least within every limit. No torch here.

A binary says which width a channel group takes, and which form in which precision a layer takes. What a layer costs
depends on the width at its input and at its output, so each pair of widths has an indicator of its own. For binary
widths these indicators come out as 0 or 1 by themselves (their marginals are fixed), so that they may be continuous.
HiGHS solves it (Huangfu and Hall 2018, doi:10.1007/s12532-017-0130-5) through `scipy.optimize.milp`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

from edgebuild.plan import Choice, border, factorized, fits, model_input, narrowed, tensor_bytes
from edgebuild.space import SLACK, Amount, Limit, Option, Phase, Resource, Space
from edgebuild.spec import CLAMPS, INT8_OPERATORS, MODEL_INPUT, PASSING_OPERATORS, Form, LayerFacts, Precision, Solve

GAP = 0.01  # relative: a plan may lose this much more than the best one
TIME_LIMIT = 10.0  # seconds
REPAIRS = 4
# The solver sees a small loss only where it is not small beside its own tolerances: the largest possible sum is this.
LOSS_SCALE = 1e3

Row = dict[int, float]  # column -> coefficient
Affine = tuple[float, tuple[int, ...]]  # a number plus the sum of some columns


@dataclass(frozen=True)
class Solution:
    """What the solver said. `choice` is None where there is none (`solve.status` says whether that is proven)."""

    choice: Choice | None
    loss: float
    solve: Solve


def solve(
    space: Space,
    limits: Sequence[Limit],
    avoid: Sequence[Choice] = (),
    gap: float = GAP,
    time_limit: float = TIME_LIMIT,
) -> Solution:
    """The choice with the least estimated loss within every limit, to a relative gap; never one of `avoid`."""
    began = time.monotonic()
    tightened = list(limits)
    for _ in range(REPAIRS):
        program = _Program(space, tightened)
        for tried in avoid:
            program.exclude(tried)
        scale = LOSS_SCALE / max(program.largest_loss, 1e-12)
        objective = {column: scale * loss for column, loss in program.losses.items()}
        solution = _solution(program, objective, gap, time_limit, began)
        if solution.choice is None or all(limit.holds(solution.choice) for limit in limits):
            break
        # a sum that the program only comes near (see `_dense`, `_live`): ask for as much less as it was off
        off = [min(1.0, limit.bound / limit.predicted(solution.choice)) for limit in limits]
        tightened = [replace(limit, bound=limit.bound * share) for limit, share in zip(tightened, off, strict=True)]
    return solution


def least(
    space: Space, limits: Sequence[Limit], which: Limit, gap: float = GAP, time_limit: float = TIME_LIMIT
) -> Solution:
    """The choice with the smallest value of the limit `which`, its own bound set aside, within all `limits` but it."""
    began = time.monotonic()
    others = [limit for limit in limits if limit is not which]
    program = _Program(space, [*others, which], goal=which)
    return _solution(program, {program.goal: 1.0}, gap, time_limit, began)


def _solution(program: "_Program", objective: Row, gap: float, time_limit: float, began: float) -> Solution:
    result, seconds = program.minimize(objective, gap, time_limit)
    found = program.read(result)
    facts = program.facts(result, seconds, time.monotonic() - began - seconds)
    return Solution(found, program.space.loss(found) if found else float("inf"), facts)


# ------------------------------------------------------------------------------------------------------- the program

Columns = NDArray[np.intp]
Table = NDArray[np.float64]
Term = tuple[tuple[str, ...], Table]  # costs over the widths of up to two groups; the last axis is the limit


def _amounts(resource: Resource) -> list[Amount]:
    return [resource.layer, *(phase.layer for phase in resource.phases)]


class _Program:
    """Columns and rows under construction: the binaries of `widths` and `options`, then what follows."""

    def __init__(self, space: Space, limits: Sequence[Limit], goal: Limit | None = None):
        self.space, self.limits = space, tuple(limits)
        self.groups = {name: space.facts.group(name) for name in space.widths}
        self.integral: list[bool] = []
        self.closed: set[int] = set()  # columns that must be 0
        self.losses: Row = {}
        self.rows: list[tuple[Row, float, float]] = []
        # what is counted: each limit's own sum over the layers, then those of its phases
        self.amounts = [amount for limit in limits for amount in _amounts(limit.resource)]
        self.costs: list[Row] = [{} for _ in self.amounts]
        self.fixed = np.zeros(len(self.amounts))
        self.pairs: dict[tuple[str, ...], Columns] = {}
        self.widths = {name: self._choose([loss for _, loss in levels]) for name, levels in space.widths.items()}
        self.options = {name: self._choose([o.loss for o in options]) for name, options in space.options.items()}
        self.int8 = self._precisions()
        for layer in space.facts.layers:
            self._layer(layer)
        self._borders()
        self.goal = int(self._free((1,))[0])  # the value of the limit `goal`, as a share of its bound
        counted = iter(zip(self.costs, self.fixed.tolist(), strict=True))
        for limit in self.limits:
            self._limit(limit, [next(counted) for _ in _amounts(limit.resource)], limit is goal)

    @property
    def largest_loss(self) -> float:
        """The largest sum of losses."""
        chosen = (*self.widths.values(), *self.options.values())
        return sum(max(self.losses[column] for column in columns.tolist()) for columns in chosen)

    # -------------------------------------------------------------------------------------------- columns and rows

    def _columns(self, shape: tuple[int, ...], integral: bool) -> Columns:
        start = len(self.integral)
        self.integral += [integral] * int(np.prod(shape))
        return np.arange(start, len(self.integral)).reshape(shape)

    def _free(self, shape: tuple[int, ...]) -> Columns:
        """Continuous columns, not negative."""
        return self._columns(shape, integral=False)

    def _choose(self, losses: Sequence[float]) -> Columns:
        """Binaries of which exactly one is 1."""
        columns = self._columns((len(losses),), integral=True)
        self.losses |= dict(zip(columns.tolist(), losses, strict=True))
        self.rows.append((dict.fromkeys(columns.tolist(), 1.0), 1.0, 1.0))
        return columns

    def _equal(self, left: Sequence[Columns], right: Columns) -> None:
        """For each of the columns `right`: it is the sum of what stands at its place in `left` (first axis)."""
        for place, column in enumerate(right.tolist()):
            row = {int(term): 1.0 for columns in left for term in np.ravel(columns[place])}
            self.rows.append(({**row, column: -1.0}, 0.0, 0.0))

    def _charge(self, columns: Columns, table: Table) -> None:
        """What each column costs."""
        for column, amounts in zip(
            columns.ravel().tolist(), table.reshape(-1, len(self.amounts)).tolist(), strict=True
        ):
            for row, amount in zip(self.costs, amounts, strict=True):
                if amount:
                    row[column] = row.get(column, 0.0) + amount

    # ------------------------------------------------------------------------------------------------------ layers

    def _layer(self, layer: LayerFacts) -> None:
        into = [name for name, group in self.groups.items() if layer.name in group.inputs]
        out = [name for name, group in self.groups.items() if layer.name in group.outputs]
        touched = list(dict.fromkeys([*into, *out]))
        if layer.name not in self.options:
            if layer.op in CLAMPS and self._fixed_precision(layer) == "fp32":
                return  # fused
            for names, table in self._dense(layer, touched, out, self._fixed_precision(layer)):
                if names:
                    self._charge(self._indicators(names), table)
                else:
                    self.fixed = self.fixed + table
            return
        shares: dict[str, list[Columns]] = {name: [] for name in touched}  # by group, of each option: its indicators
        for column, option in zip(self.options[layer.name], self.space.options[layer.name], strict=True):
            own: dict[str, Columns] = {}
            for names, table in self._terms(layer, touched, out, option):
                if not names:
                    self._charge(column, table)
                    continue
                indicators = self._free(table.shape[:-1])
                self._charge(indicators, table)
                if option.form:
                    self._close(layer, names[0], indicators, option.form)
                self._equal([indicators.reshape(1, -1)], np.array([column]))
                for axis, name in enumerate(names):
                    moved = np.moveaxis(indicators, axis, 0)
                    if name in own:  # two terms of one option see the same width
                        first = np.array([self._total(columns) for columns in own[name]])
                        self._equal([moved], first)
                    else:
                        own[name] = moved
            for name, columns in own.items():
                shares[name].append(columns)
        for name, options in shares.items():
            self._equal(options, self.widths[name])

    def _total(self, columns: Columns) -> int:
        """A column that is the sum of others."""
        total = self._free((1,))
        self._equal([columns.reshape(1, -1)], total)
        return int(total[0])

    def _indicators(self, names: tuple[str, ...]) -> Columns:
        """The columns that say at which widths the groups are: one group's own, or those of a pair."""
        if len(names) == 1:
            return self.widths[names[0]]
        first, second = sorted(names)
        if (first, second) not in self.pairs:
            pair = self._free((len(self.widths[first]), len(self.widths[second])))
            self._equal([pair], self.widths[first])
            self._equal([pair.T], self.widths[second])
            self.pairs[first, second] = pair
        pair = self.pairs[first, second]
        return pair if names == (first, second) else pair.T

    def _terms(self, layer: LayerFacts, touched: list[str], out: list[str], option: Option) -> list[Term]:
        if option.form is None:
            return self._dense(layer, touched, out, option.precision)
        form = option.form

        # The first factor sees the input's width alone and the last the output's: savings add up exactly.
        def cost(widths: Mapping[str, int]) -> Table:
            return self._cost(factorized(self._at(layer, widths), form), option.precision)

        base = cost({})
        terms: list[Term] = [((), base)]
        for name in touched:
            table = self._table([name], cost) - base
            terms.append(((name,), table))
        return terms

    def _close(self, layer: LayerFacts, name: str, indicators: Columns, form: Form) -> None:
        """Rule out widths at which the layer has no such ranks."""
        for column, (width, _) in zip(indicators.tolist(), self.space.widths[name], strict=True):
            if not fits(self._at(layer, {name: width}), form):
                self.closed.add(column)

    def _dense(self, layer: LayerFacts, touched: list[str], out: list[str], precision: Precision) -> list[Term]:
        """A dense layer's cost, exact for up to two groups.

        Behind a concat a layer reads several groups: the saving of each is taken with the others whole.
        """

        def cost(widths: Mapping[str, int]) -> Table:
            return self._cost((self._at(layer, widths),), precision)

        if len(touched) <= 2:
            return [(tuple(touched), self._table(touched, cost))]
        hub = out if len(out) == 1 else []
        base = self._table(hub, cost)
        others = [name for name in touched if name not in hub]
        return [(tuple(hub), base), *(((name, *hub), self._table([name, *hub], cost) - base) for name in others)]

    def _at(self, layer: LayerFacts, widths: Mapping[str, int]) -> LayerFacts:
        """The layer with some groups at other widths."""
        into = out = 0
        for name, width in widths.items():
            group = self.groups[name]
            lost = group.channels - width
            into += lost * group.inputs[layer.name].each if layer.name in group.inputs else 0
            out += lost * group.outputs[layer.name].each if layer.name in group.outputs else 0
        return narrowed(layer, into, out)

    def _cost(self, parts: Sequence[LayerFacts], precision: Precision) -> Table:
        return np.array([sum(amount(part, precision) for part in parts) for amount in self.amounts])

    def _table(self, names: Sequence[str], cost: Callable[[Mapping[str, int]], Table]) -> Table:
        """Costs over the widths of the named groups, all others whole."""
        levels = [[width for width, _ in self.space.widths[name]] for name in names]
        table = np.array([cost(dict(zip(names, widths, strict=True))) for widths in product(*levels)])
        return table.reshape((*map(len, levels), len(self.amounts)))

    # ------------------------------------------------------------------------------------------- precision borders

    def _precisions(self) -> dict[str, Affine]:
        """For each tensor whether it is int8: 0, 1, or the sum of the options that make it so."""
        made: dict[str, Affine] = {MODEL_INPUT: (0.0, ())}
        for layer in self.space.facts.layers:
            if layer.name in self.options:
                options = zip(self.options[layer.name].tolist(), self.space.options[layer.name], strict=True)
                int8 = tuple(column for column, option in options if option.precision == "int8")
                always = len(int8) == len(self.options[layer.name])
                made[layer.name] = (1.0, ()) if always else (0.0, int8)
            elif self.space.precision == "fp32" or not (
                layer.weighted or layer.op in INT8_OPERATORS | PASSING_OPERATORS
            ):
                made[layer.name] = (0.0, ())
            else:
                made[layer.name] = made[layer.sources[0]] if layer.op in PASSING_OPERATORS else (1.0, ())
        return made

    def _fixed_precision(self, layer: LayerFacts) -> Precision:
        """The precision that a layer without options is taken to compute in.

        Int8 for one that passes on what a layer with a choice makes: the difference of its own cost is neglected.
        """
        fixed, columns = self.int8[layer.name]
        return "int8" if fixed or columns else "fp32"

    def _borders(self) -> None:
        """Conversions where a tensor is made in one precision and read in the other, once for all readers."""
        readers: dict[str, list[Affine]] = {}
        tensors = {layer.name: layer for layer in self.space.facts.layers}
        for layer in self.space.facts.layers:
            for source in layer.sources:
                readers.setdefault(source, []).append(self.int8[layer.name])
                tensors.setdefault(source, model_input(layer))
        for name, tensor in tensors.items():
            made, read = self.int8[name], readers.get(name, [(0.0, ())])  # the model's outputs are read in fp32
            for precision, sign in (("int8", 1.0), ("fp32", -1.0)):
                self._border(tensor, precision, sign, made, read)  # type: ignore[arg-type]

    def _border(
        self, tensor: LayerFacts, precision: Precision, sign: float, made: Affine, read: Sequence[Affine]
    ) -> None:
        # needed where sign * (reader - maker) = 1, with int8 as 1 and fp32 as 0
        differing = [reader for reader in dict.fromkeys(read) if reader != made]
        sure = [reader for reader in differing if not reader[1] and not made[1] and sign * (reader[0] - made[0]) > 0]
        open_ = [reader for reader in differing if reader[1] or made[1]]
        groups = [name for name, group in self.groups.items() if tensor.name in group.outputs][:1]

        def cost(widths: Mapping[str, int]) -> Table:
            return self._cost((border(self._at(tensor, widths) if widths else tensor, precision),), "int8")

        table = self._table(groups, cost)
        levels = self.widths[groups[0]] if groups else None
        if sure:
            if levels is None:
                self.fixed = self.fixed + table
            else:
                self._charge(levels, table)
            return
        for place in range(len(table) if levels is not None else 1) if open_ else ():
            needed = self._free((1,))
            self._charge(needed, table[place] if levels is not None else table)
            for reader in open_:
                # needed >= sign * (reader - made) + width chosen - 1
                row: Row = {int(needed[0]): 1.0}
                for column in reader[1]:
                    row[column] = row.get(column, 0.0) - sign
                for column in made[1]:
                    row[column] = row.get(column, 0.0) + sign
                if levels is not None:
                    row[int(levels[place])] = -1.0
                low = sign * (reader[0] - made[0]) - (1.0 if levels is not None else 0.0)
                self.rows.append((row, low, np.inf))

    # ------------------------------------------------------------------------------------------------------ limits

    def _limit(self, limit: Limit, counted: list[tuple[Row, float]], is_goal: bool) -> None:
        """factor * (sum + most of any phase) <= bound, in shares of the bound for rows of one scale."""
        resource, scale = limit.resource, limit.factor / limit.bound
        common = self._sum(*counted[0], resource.fixed, scale)
        tops: list[tuple[Row, float]] = []
        for phase, (cost, fixed) in zip(resource.phases, counted[1:], strict=True):
            own = self._sum(cost, fixed, phase.fixed, scale)
            for live, always in self._live(phase) if phase.live else [({}, 0.0)]:
                row = {column: scale * amount for column, amount in live.items()}
                tops.append(({**row, own: 1.0}, scale * always))
        for row, always in tops or [({}, 0.0)]:
            goal = {self.goal: -1.0} if is_goal else {}
            self.rows.append(({**row, common: 1.0, **goal}, -np.inf, -always + (0.0 if is_goal else 1.0 + SLACK)))

    def _sum(self, cost: Row, fixed: float, more: float, scale: float) -> int:
        """A column for a long sum, since each step of the schedule needs it."""
        total = int(self._free((1,))[0])
        row = {column: scale * amount for column, amount in cost.items()}
        taken = scale * (fixed + more)
        self.rows.append(({**row, total: -1.0}, -taken, -taken))
        return total

    def _live(self, phase: Phase) -> list[tuple[Row, float]]:
        """Bytes that each step of the schedule takes: a row over widths, and a constant.

        As of the dense layers in the model's precision; a tensor between two factors is neglected. Of steps that differ
        in nothing but live tensors, one that is part of another is left out.
        """
        whole = self.space.whole
        makers = {
            step.makes: self.space.facts.layer(step.makes[0]) for step in whole.steps if step.makes[0] != MODEL_INPUT
        }
        inputs = {step.makes: step.layer for step in whole.steps if step.makes[0] == MODEL_INPUT}
        found = []
        plan = phase.planned
        alive = whole.alive() if plan is None else whole.alive(in_place=False, joined=plan.joined)
        bytes_of = plan.tensor if plan else tensor_bytes
        for i, (step, live) in enumerate(zip(whole.steps, alive, strict=True)):
            if plan is None and (any(live < other for other in alive) or live in alive[:i]):
                continue
            row: Row = {}
            always = float(phase.input_bytes(whole, i))
            for tensor in sorted(live):
                if tensor in inputs:
                    always += bytes_of(inputs[tensor], tensor[1])
                    continue
                layer = makers[tensor]
                always += bytes_of(layer, tensor[1])
                for name in (name for name, group in self.groups.items() if layer.name in group.outputs):
                    for column, (width, _) in zip(self.widths[name].tolist(), self.space.widths[name], strict=True):
                        saved = bytes_of(layer, tensor[1]) - bytes_of(self._at(layer, {name: width}), tensor[1])
                        row[column] = row.get(column, 0.0) - saved
            if plan is not None:
                always += self._step(row, step.layer, step.precision, plan.step)
            found.append((row, always))
        return found

    def _step(self, row: Row, layer: LayerFacts, precision: Precision, amount: Amount) -> float:
        """Add what a layer takes while it runs, by the widths at its ends, to a row; the constant part of it."""
        ends = [name for name, group in self.groups.items() if layer.name in {*group.inputs, *group.outputs}]
        if not 1 <= len(ends) <= 2 or layer.name not in {known.name for known in self.space.facts.layers}:
            return float(amount(layer, precision))
        indicators = self._indicators(tuple(ends))
        levels = [[width for width, _ in self.space.widths[name]] for name in ends]
        for column, widths in zip(indicators.ravel().tolist(), product(*levels), strict=True):
            taken = amount(self._at(layer, dict(zip(ends, widths, strict=True))), precision)
            row[column] = row.get(column, 0.0) + taken
        return 0.0

    # --------------------------------------------------------------------------------------------------- the solver

    def exclude(self, choice: Choice) -> None:
        """Never this choice again: at least one of its binaries must be 0. One outside the space changes nothing."""
        chosen: Row = {}
        for name, levels in self.space.widths.items():
            width = choice.widths.get(name, levels[0][0])
            chosen |= {int(c): 1.0 for c, (w, _) in zip(self.widths[name], levels, strict=True) if w == width}
        for name, options in self.space.options.items():
            key = (choice.forms.get(name), choice.precision_of(name))
            pairs = zip(self.options[name], options, strict=True)
            chosen |= {int(c): 1.0 for c, option in pairs if (option.form, option.precision) == key}
        if len(chosen) == len(self.widths) + len(self.options):
            self.rows.append((chosen, 0.0, len(chosen) - 1.0))

    def minimize(self, objective: Row, gap: float, time_limit: float) -> tuple[OptimizeResult, float]:
        """HiGHS' answer and the seconds that it took."""
        count = len(self.integral)
        cost, upper = np.zeros(count), np.full(count, np.inf)
        for column, weight in objective.items():
            cost[column] = weight
        integral = np.array(self.integral)
        upper[integral] = 1.0
        upper[list(self.closed)] = 0.0
        rows = [i for i, (row, _, _) in enumerate(self.rows) for _ in row]
        columns = [column for row, _, _ in self.rows for column in row]
        weights = [weight for row, _, _ in self.rows for weight in row.values()]
        matrix = csr_array((weights, (rows, columns)), shape=(len(self.rows), count))
        bounds = LinearConstraint(matrix, [low for _, low, _ in self.rows], [high for _, _, high in self.rows])
        began = time.monotonic()
        result = milp(
            cost,
            integrality=integral.astype(int),
            bounds=Bounds(np.zeros(count), upper),
            constraints=bounds,
            options={"time_limit": time_limit, "mip_rel_gap": gap},
        )
        return result, time.monotonic() - began

    def read(self, result: OptimizeResult) -> Choice | None:
        """The choice that the solver's binaries stand for."""
        if result.x is None:
            return None
        widths, forms, keep = {}, {}, set()
        for name, levels in self.space.widths.items():
            width = levels[int(np.argmax(result.x[self.widths[name]]))][0]
            if width != levels[0][0]:
                widths[name] = width
        for name, options in self.space.options.items():
            option = options[int(np.argmax(result.x[self.options[name]]))]
            if option.form:
                forms[name] = option.form
            if option.precision != self.space.precision:
                keep.add(name)
        return Choice(self.space.facts, self.space.precision, widths, forms, frozenset(keep))

    def facts(self, result: OptimizeResult, seconds: float, building: float) -> Solve:
        """What is worth knowing of a run of the solver."""
        status = {0: "optimal", 1: "time limit", 2: "infeasible"}.get(result.status, "failed")
        found = result.x is not None
        return Solve(
            status="no plan in time" if status == "time limit" and not found else status,  # type: ignore[arg-type]
            seconds=round(seconds, 3),
            building=round(building, 3),
            gap=round(float(result.mip_gap), 6) if found and result.mip_gap is not None else None,
            nodes=int(result.mip_node_count or 0),
            binaries=sum(self.integral),
            columns=len(self.integral),
            rows=len(self.rows),
        )
