"""Where a program's buffers lie: ExecuTorch's own planner, or a better fit where there is one.

ExecuTorch lets buffers share places by whole objects. Here each is put at the lowest place that is free for as long as
it lives, the largest first (Pisarchyk and Lee 2020, arXiv:2001.03288, "greedy by size"), and then the order is changed
at random, by the same seed, as long as that takes no more. The smaller result is taken.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MOVES = 2_000  # changes of the order that are tried


@dataclass(frozen=True)
class Buffer:
    """Bytes that are needed from step `first` to step `last`, both included."""

    size: int
    first: int
    last: int


def placed(buffers: Sequence[Buffer], order: Sequence[int]) -> tuple[list[int], int]:
    """An offset for each buffer, taken in an order, and the end of the highest."""
    offsets = [0] * len(buffers)
    done: list[int] = []
    end = 0
    for i in order:
        buffer = buffers[i]
        offset = 0
        beside = (j for j in done if buffers[j].first <= buffer.last and buffer.first <= buffers[j].last)
        for j in sorted(beside, key=lambda j: offsets[j]):
            if offset + buffer.size <= offsets[j]:
                break
            offset = max(offset, offsets[j] + buffers[j].size)
        offsets[i] = offset
        done.append(i)
        end = max(end, offset + buffer.size)
    return offsets, end


def least(buffers: Sequence[Buffer]) -> int:
    """What no placement is below: the bytes that are needed at the worst step."""
    steps = {buffer.first for buffer in buffers}
    return max((sum(b.size for b in buffers if b.first <= step <= b.last) for step in steps), default=0)


def fitted(buffers: Sequence[Buffer]) -> tuple[list[int], int]:
    """Offsets with an end as low as was found, and that end; the same for the same buffers."""
    size = len(buffers)
    by_size = sorted(range(size), key=lambda i: (-buffers[i].size, buffers[i].first, i))
    by_life = sorted(range(size), key=lambda i: (buffers[i].first - buffers[i].last, -buffers[i].size, i))
    bound = least(buffers)
    order = min((by_size, by_life), key=lambda order: placed(buffers, order)[1])
    offsets, end = placed(buffers, order)
    choose = random.Random(0)
    for _ in range(MOVES):
        if end <= bound:
            break
        other = list(order)
        other.insert(choose.randrange(size), other.pop(choose.randrange(size)))
        found, lower = placed(buffers, other)
        if lower <= end:  # sideways too: most orders have equals
            order, offsets, end = other, found, lower
    return offsets, end


def best_fit(alignment: int, specs: Any, graph_module: Any, graph_signature: Any, extra_padding: int) -> Any:
    """A memory planning algorithm of ExecuTorch; with views of other buffers it is left to ExecuTorch's."""
    from executorch.exir.memory_planning import MemoryAlgoResult, SpecAllocResult, greedy

    theirs = greedy(alignment, specs, graph_module, graph_signature, extra_padding)
    if any(spec.storage_base is not None or spec.mem_id not in (None, 1) for spec in specs):
        return theirs
    known = list(theirs.spec_dict)
    for spec in known:
        spec.realign(alignment)
    known.sort(key=lambda spec: (spec.lifetime, spec.allocated_memory, tuple(spec.shape)))
    buffers = [Buffer(spec.allocated_memory, *spec.lifetime) for spec in known]
    offsets, end = fitted(buffers)
    if end + extra_padding > theirs.bufsizes[-1] or len(theirs.bufsizes) != 2:
        return theirs
    found = {spec: SpecAllocResult(1, i, offset) for i, (spec, offset) in enumerate(zip(known, offsets, strict=True))}
    return MemoryAlgoResult(found, [theirs.bufsizes[0], end + extra_padding])


def config() -> Any:
    """What `to_executorch` is told, to plan so."""
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.memory_planning import MemoryPlanningAlgorithmSuite
    from executorch.exir.passes import MemoryPlanningPass

    suite = MemoryPlanningAlgorithmSuite([best_fit])
    return ExecutorchBackendConfig(memory_planning_pass=MemoryPlanningPass(memory_planning_algo=suite))
