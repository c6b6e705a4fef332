"""What `edgebuild inspect` prints: layers, channel groups, memory."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from edgebuild import arena, costs
from edgebuild.analyse import analyse, check_prunable
from edgebuild.devices import DEVICES
from edgebuild.lift import lift
from edgebuild.load import load
from edgebuild.plan import Choice
from edgebuild.spec import PRECISIONS, Precision, Target
from edgebuild.units import Bytes, Seconds


def inspect(
    where: str, targets: Sequence[Target], threads: int, weights: str | None, calibration: str | None, console: Console
) -> None:
    """Analyse a task and print it. Raises EdgebuildError as loading and exporting do."""
    loaded = load(where, weights, calibration)
    for target in targets:
        DEVICES[target.device].check(target)
    model = lift(loaded.task.model, loaded.task.example_inputs)
    facts = check_prunable(model, loaded.task.example_inputs, analyse(model, loaded.task.example_inputs))
    costs.warm_up(targets, threads, facts)
    group_of = {name: group.name for group in facts.groups for name in group.outputs}
    heads = ["layer", "operator", "output", "parameters", "MACs", "channel group"]
    timed = [(target, p) for target in targets if target.timed for p in _precisions(target)]
    table = Table(*heads, *(f"{target.name}, {precision}" for target, precision in timed), box=None)
    for column in (table.columns[0], table.columns[5]):
        column.overflow = "fold"  # a name that is cut off names nothing
    for column in table.columns[3:5]:
        column.justify = "right"
    for layer in facts.layers:
        times = [str(Seconds(costs.layer_latency(layer, p, target, threads))) for target, p in timed]
        shape = " x ".join(map(str, layer.out_shape[1:]))
        weighted = (f"{layer.parameters:,}", f"{layer.macs:,}") if layer.weighted else ("", "")
        table.add_row(layer.name, layer.op, shape, *weighted, group_of.get(layer.name, ""), *times)
    console.print(table)
    groups = Table("channel group", "channels", "made by", "read by", box=None)
    for group in facts.groups:
        made, read = ([n for n in names if facts.layer(n).weighted] for names in (group.outputs, group.inputs))
        groups.add_row(group.name, str(group.channels), ", ".join(made), ", ".join(read))
    console.print("", groups, "")
    for name, reason in facts.unprunable.items():
        console.print(f"{name} keeps its width: {reason}", highlight=False, markup=False)
    console.print(f"\n{facts.parameters:,} parameters, {facts.macs:,} MACs for a sample", highlight=False)
    for precision in PRECISIONS:
        choice = Choice(facts, precision)
        live = Bytes(max(choice.live_bytes()))
        size, memory = costs.size(facts).of(choice), costs.peak_memory(facts).of(choice)
        console.print(
            f"{precision}: predicted size {Bytes(size)}, live activations at the peak {live}, "
            f"predicted peak memory {Bytes(memory)}",
            highlight=False,
        )
        for target in (target for target in targets if precision in _precisions(target)):
            said = []
            if target.microcontroller:
                sram, flash = (Bytes(of(facts, target).of(choice)) for of in (arena.sram, arena.flash))
                said += [f"SRAM on {target.name}: {sram}", f"flash: {flash}"]
            if target.timed:
                total = Seconds(costs.latency(target, threads).of(choice))
                said.append(f"latency on {target.name}, {threads} thread(s): {total}")
            console.print(f"      predicted {', '.join(said)}", highlight=False)


def _precisions(target: Target) -> tuple[Precision, ...]:
    return ("int8",) if target.microcontroller else PRECISIONS
