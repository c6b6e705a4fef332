"""Layer facts and channel groups, read off the lifted graph."""

import copy
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, fx, nn

from edgebuild.attention import Attention
from edgebuild.lift import outputs_of
from edgebuild.spec import MODEL_INPUT, ChannelGroup, LayerFacts, ModelFacts, Slot

# Folded into, or clamped by, the operator before them; they cost nothing of their own when lowered.
_FOLDED_MODULES = (nn.BatchNorm2d, nn.Dropout, nn.Identity)
_FOLDED_FUNCTIONS = (F.relu, torch.flatten)
_IN_PLACE = (*_FOLDED_FUNCTIONS, F.relu6, F.hardtanh)  # these cost something where they are quantized, but no memory
_WEIGHTED = (nn.Conv2d, nn.Linear)


def analyse(model: fx.GraphModule, inputs: tuple[Tensor, ...]) -> ModelFacts:
    """Everything the planner needs to know of a lifted model for a sample; `inputs` have batch size 1."""
    shapes = _shapes(model, inputs)
    layers = _layers(model, shapes)
    groups, unprunable = _groups(model, inputs)
    groups += _heads(model)
    groups.sort(key=lambda group: [layer.name for layer in layers].index(group.name))
    reach = _reach(model, shapes, groups)
    groups, unprunable = _without_outputs(model, groups, reach, unprunable)
    groups = [_with_weightless(group, layers, model, reach) for group in groups]
    return ModelFacts(tuple(layers), tuple(groups), unprunable)


# ------------------------------------------------------------------------------------------------------ layers


class _Shapes(fx.Interpreter):
    """Runs the graph and keeps the shape of every tensor."""

    def __init__(self, model: fx.GraphModule):
        super().__init__(model)
        self.found: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = tuple(int(size) for size in result.shape)
        return result


def _shapes(model: fx.GraphModule, inputs: tuple[Tensor, ...]) -> dict[fx.Node, tuple[int, ...]]:
    interpreter = _Shapes(model)
    with torch.no_grad():
        interpreter.run(*inputs)
    return interpreter.found


def _channels(shape: tuple[int, ...]) -> int:
    """The channel count: dimension 1 of a batch of images, else the last."""
    return shape[1] if len(shape) in (2, 4) else (shape[-1] if shape else 1)


def _tensor_inputs(node: fx.Node, shapes: Mapping[fx.Node, tuple[int, ...]]) -> list[fx.Node]:
    return [arg for arg in node.all_input_nodes if arg in shapes]


def _layers(model: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]]) -> list[LayerFacts]:
    """The layers in execution order, each with the layers that it reads; a folded operator is part of its source."""
    layers: list[LayerFacts] = []
    made: dict[fx.Node, str] = {}
    for node in model.graph.nodes:
        sources = [made[source] for source in _tensor_inputs(node, shapes) if source in made]
        facts = _layer_facts(node, model, shapes)
        if facts is not None:
            layers.append(replace(facts, sources=tuple(sources)))
            made[node] = facts.name
        elif node.op == "placeholder":
            made[node] = MODEL_INPUT
        elif sources:
            made[node] = sources[0]
    return layers


def _layer_facts(node: fx.Node, model: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]]) -> LayerFacts | None:
    if node not in shapes or node.op not in ("call_module", "call_function") or _folded(node, model):
        return None
    out, sources = shapes[node], _tensor_inputs(node, shapes)
    if not sources:
        return None
    into = shapes[sources[0]]
    facts = LayerFacts(
        name=node.name,
        op=getattr(node.target, "__name__", str(node.target)).split(".")[0],
        in_channels=_channels(into),
        out_channels=_channels(out),
        in_elements=sum(prod(shapes[source]) for source in sources),
        out_elements=prod(out),
        in_shape=into,
        out_shape=out,
    )
    if node.op == "call_function":
        return facts
    module = model.get_submodule(str(node.target))
    facts = replace(facts, name=str(node.target), op=type(module).__name__.lower())
    if isinstance(module, nn.Conv2d):
        return replace(
            facts,
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            groups=module.groups,
            kernel=tuple(module.kernel_size),
            stride=tuple(module.stride),
            positions=prod(out[2:]),
            bias=module.bias is not None or _normed(node, model),
        )
    if isinstance(module, nn.Linear):
        return replace(
            facts,
            in_channels=module.in_features,
            out_channels=module.out_features,
            positions=prod(out[:-1]),
            bias=module.bias is not None,
        )
    if isinstance(module, Attention):
        return replace(facts, groups=facts.in_channels // module.head_dim, positions=shapes[sources[1]][1])
    return facts


def _normed(node: fx.Node, model: fx.GraphModule) -> bool:
    """Whether a batch norm follows, which brings a bias where it is folded in."""
    users = [user for user in node.users if user.op == "call_module"]
    return any(isinstance(model.get_submodule(str(user.target)), nn.BatchNorm2d) for user in users)


def _folded(node: fx.Node, model: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), _FOLDED_MODULES)
    return node.target in _FOLDED_FUNCTIONS


# ------------------------------------------------------------------------------------------------------ groups


def _groups(model: fx.GraphModule, inputs: tuple[Tensor, ...]) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Channel groups in execution order, by torch-pruning's dependency graph (Fang et al. 2023, arXiv:2301.12900)."""
    order = list(dict.fromkeys(str(node.target) for node in model.graph.nodes if node.op == "call_module"))
    by_head = {name for group in _heads(model) for name in group.outputs}
    names = {module: name for name, module in model.named_modules()}
    try:
        own = {name: model.get_submodule(name) for name in order if name not in by_head}
        found = list(_members(dependencies(model, inputs), own, names))
    except Exception as error:  # a graph that the library cannot follow: nothing can be pruned, and the report says so
        return [], {"*": f"the channel dependencies could not be traced ({type(error).__name__}: {error})"}
    groups, unprunable = [], {}
    for members in found:
        group, reason = _group(members, names, order)
        if group is not None and not reason:
            groups.append(group)
        elif group is not None:
            unprunable.update({name: reason for name in group.outputs})
    return groups, unprunable


def _heads(model: fx.GraphModule) -> list[ChannelGroup]:
    """A group for each attention between linear layers of its own: its channels are the heads."""
    calls = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]

    def linear(node: fx.Node) -> bool:
        own = node.op == "call_module" and calls.count(str(node.target)) == 1
        return own and isinstance(model.get_submodule(str(node.target)), nn.Linear)

    groups = []
    for node in model.graph.nodes:
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        makers, readers = node.all_input_nodes, list(node.users)
        if not isinstance(module, Attention) or not all(map(linear, (*makers, *readers))):
            continue
        if len(makers) < 3 or any(len(maker.users) > 1 for maker in makers):
            continue
        first, slot = str(makers[0].target), Slot(0, module.head_dim)
        width = model.get_submodule(first).out_features
        assert isinstance(width, int)
        outputs, inputs = ({str(other.target): slot for other in found} for found in (makers, readers))
        groups.append(ChannelGroup(first, width // module.head_dim, outputs, inputs))
    return groups


def _members(graph: Any, modules: Mapping[str, nn.Module], names: Mapping[Any, str]) -> Iterator[Any]:
    """A dependency group for each layer that makes channels of its own; a depthwise convolution passes on others'."""
    grouped: set[str] = set()
    for name, module in modules.items():
        depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
        if not isinstance(module, _WEIGHTED) or depthwise or name in grouped:
            continue
        count = module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
        members = graph.get_pruning_group(module, _pruner(module), idxs=list(range(count)))
        makes = (tp.prune_conv_out_channels, tp.prune_linear_out_channels)
        grouped |= {
            names[m.dep.target.module] for m in members if m.dep.handler in makes and m.dep.target.module in names
        }
        yield members


def _pruner(module: nn.Module) -> Any:
    return tp.prune_conv_out_channels if isinstance(module, nn.Conv2d) else tp.prune_linear_out_channels


def dependencies(model: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Any:
    """torch-pruning's dependency graph of a lifted model."""
    logging.getLogger("torch_pruning").setLevel(logging.ERROR)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return tp.DependencyGraph().build_dependency(model, example_inputs=inputs, verbose=False)


def _group(members: Any, names: Mapping[Any, str], order: list[str]) -> tuple[ChannelGroup | None, str]:
    outputs: dict[str, Slot] = {}
    inputs: dict[str, Slot] = {}
    channels, reason = len(members[0].idxs), ""
    for member in members:
        module, indices = member.dep.target.module, list(member.idxs)
        name = names.get(module)
        if name is not None and isinstance(module, nn.LayerNorm):
            reason = f"{name!r} (LayerNorm) computes every channel from all of them"
        if name is None or not isinstance(module, _WEIGHTED):
            continue
        slot = _slot(indices, channels)
        makes = member.dep.handler in (tp.prune_conv_out_channels, tp.prune_linear_out_channels)
        depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
        if slot is None:
            reason = f"{name!r} sees the channels interleaved with others"
        elif isinstance(module, nn.Conv2d) and module.groups > 1 and not depthwise:
            reason = f"{name!r} is a grouped convolution"
        elif depthwise and isinstance(module, nn.Conv2d) and module.out_channels != module.in_channels:
            reason = f"{name!r} is a depthwise convolution with a channel multiplier"
        elif depthwise or tp.prune_depthwise_conv_out_channels is member.dep.handler:
            outputs[name] = inputs[name] = slot
        elif name in (outputs if makes else inputs) and (outputs if makes else inputs)[name] != slot:
            reason = f"{name!r} reads the channels twice"
        else:
            (outputs if makes else inputs)[name] = slot
    if not outputs:
        return None, ""
    first = min(outputs, key=order.index)
    return ChannelGroup(first, channels, outputs, inputs), reason


def _slot(indices: list[int], channels: int) -> Slot | None:
    each, rest = divmod(len(indices), channels)
    start = indices[0]
    return Slot(start, each) if not rest and indices == list(range(start, start + len(indices))) else None


def _reach(
    model: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]], groups: list[ChannelGroup]
) -> dict[fx.Node, dict[str, int]]:
    """Which groups make up the channels of each tensor, and how many of its channels stand for one of the group."""
    made = {name: (group.name, slot) for group in groups for name, slot in group.outputs.items()}
    reach: dict[fx.Node, dict[str, int]] = {}
    for node in model.graph.nodes:
        sources = [source for source in _tensor_inputs(node, shapes) if reach.get(source)]
        if node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), _WEIGHTED):
            group, slot = made.get(str(node.target), ("", None))
            reach[node] = {group: slot.each} if slot else {}
        elif node.target is torch.cat:
            reach[node] = {}
            for source in sources:
                for group, each in reach[source].items():
                    reach[node][group] = reach[node].get(group, 0) + each
        elif sources and node in shapes:
            base = max(sources, key=lambda source: prod(shapes[source]))
            factor, rest = divmod(_channels(shapes[node]), _channels(shapes[base]))
            reach[node] = {} if rest else {group: each * factor for group, each in reach[base].items()}
    return reach


def _without_outputs(
    model: fx.GraphModule,
    groups: list[ChannelGroup],
    reach: dict[fx.Node, dict[str, int]],
    unprunable: dict[str, str],
) -> tuple[list[ChannelGroup], dict[str, str]]:
    results = next(node for node in model.graph.nodes if node.op == "output").all_input_nodes
    fixed = {group for node in results for group in reach.get(node, {})}
    reasons = {
        name: "its channels are the model's output" for group in groups if group.name in fixed for name in group.outputs
    }
    return [group for group in groups if group.name not in fixed], {**unprunable, **reasons}


def _with_weightless(
    group: ChannelGroup, layers: list[LayerFacts], model: fx.GraphModule, reach: dict[fx.Node, dict[str, int]]
) -> ChannelGroup:
    """Add the operators without weights, so that their cost follows the group's width too."""
    weightless = {layer.name for layer in layers if not layer.weighted}
    outputs, inputs = dict(group.outputs), dict(group.inputs)
    for node in model.graph.nodes:
        name = str(node.target) if node.op == "call_module" else node.name
        if name not in weightless:
            continue
        if each := reach.get(node, {}).get(group.name):
            outputs[name] = Slot(0, each)
        sources = [source for source in node.all_input_nodes if group.name in reach.get(source, {})]
        if sources:
            inputs[name] = Slot(0, max(reach[source][group.name] for source in sources))
    return replace(group, outputs=outputs, inputs=inputs)


def check_prunable(model: fx.GraphModule, inputs: tuple[Tensor, ...], facts: ModelFacts) -> ModelFacts:
    """Cut a channel off every group of a copy and run it; drop groups that the graph cannot follow, with the reason."""
    kept, unprunable = [], dict(facts.unprunable)
    with torch.no_grad():
        expected = [tuple(y.shape) for y in outputs_of(model(*inputs))]
    for group in facts.groups:
        try:
            trial = cut(model, inputs, {group.name: [0]})
            with torch.no_grad():
                found = [tuple(y.shape) for y in outputs_of(trial(*inputs))]
            if found != expected:
                raise RuntimeError(f"the output's shape changes from {expected} to {found}")
            kept.append(group)
        except Exception as error:  # whatever a user's graph raises with another width, it is the reason
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            unprunable.update({name: f"cannot change width: {reason[:120]}" for name in group.outputs})
    return replace(facts, groups=tuple(kept), unprunable=unprunable)


def cut(model: fx.GraphModule, inputs: tuple[Tensor, ...], drop: Mapping[str, list[int]]) -> fx.GraphModule:
    """A copy of the model without the given channels of each group (named by its first layer)."""
    pruned = copy.deepcopy(model)
    heads = {group.name: group for group in _heads(pruned)}
    for name in drop.keys() & heads.keys():
        _cut_heads(pruned, heads[name], drop[name])
    graph = dependencies(pruned, inputs)
    for name, channels in drop.items():
        if name not in heads:
            root = pruned.get_submodule(name)
            graph.get_pruning_group(root, _pruner(root), idxs=sorted(channels)).prune()
    return pruned


def _cut_heads(model: fx.GraphModule, group: ChannelGroup, drop: list[int]) -> None:
    lost = [head * group.each + i for head in drop for i in range(group.each)]
    for name in group.outputs:
        tp.prune_linear_out_channels(model.get_submodule(name), idxs=lost)
    for name in group.inputs:
        tp.prune_linear_in_channels(model.get_submodule(name), idxs=lost)
