"""What `edgebuild plan` prints: the plan layer by layer, its predicted figures, how it was found."""

from rich.console import Console
from rich.table import Table

from edgebuild.pipeline import Preview
from edgebuild.propose import Proposal, natural
from edgebuild.report.content import binding
from edgebuild.report.figures import figure, subject


def show(found: Preview, console: Console) -> None:
    """Print a preview. Figures are the models': nothing was lowered or measured."""
    budgets = Table("budget", "bound", "predicted", "least of any plan", box=None)
    for limit, row in zip(found.limits, found.reachable, strict=True):
        predicted = found.proposal.predicted[limit.kind, limit.target] if found.proposal else None
        cells = (row.bound, None if predicted is None else natural(limit.kind, predicted), row.smallest)
        name = subject({"kind": row.kind, "target": row.target})
        budgets.add_row(name, *(figure(row.kind, value) for value in cells))
    if found.proposal is None:
        rows = [vars(row) for row in found.reachable]
        for line in binding(rows):
            console.print(line, highlight=False, soft_wrap=True)
        console.print(budgets)
    else:
        _changes(found.proposal, console)
        console.print(budgets)
        for why in found.proposal.plan.why:
            console.print(f"why: {why}", highlight=False, soft_wrap=True, markup=False)
        losses = ", ".join(f"{name} {loss:.3g}" for name, loss in found.proposal.loss.items() if loss)
        console.print(f"estimated loss before training: {losses or 'none'} nats", highlight=False)
    if found.solve:
        gap = "" if found.solve.gap is None else f", within {found.solve.gap:.2%} of the best"
        console.print(
            f"solver: {found.solve.status}{gap}; {found.solve.seconds:.2f} s for {found.solve.binaries} binaries, "
            f"{found.solve.columns} columns, {found.solve.rows} rows",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"candidates left out as they cannot pay: {len(found.dropped)}", highlight=False)


def _changes(proposal: Proposal, console: Console) -> None:
    plan = proposal.plan
    if not (plan.widths or plan.forms or plan.keep_fp32):
        console.print(f"{plan.precision} and nothing else: it fits", highlight=False)
        return
    table = Table("layer or group", "change", box=None)
    table.columns[0].overflow = "fold"
    for width in plan.widths:
        table.add_row(width.group, f"{width.channels} of {width.of} channels")
    for form in plan.forms:
        table.add_row(form.layer, f"{form.kind} at rank {' x '.join(map(str, form.ranks))}")
    for name in plan.keep_fp32:
        table.add_row(name, "fp32")
    console.print(table)
