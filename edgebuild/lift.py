"""Turns any model into one shape: a `torch.fx.GraphModule` whose layers are ordinary `torch.nn` modules.

Whatever the user brings (a module, functional calls, an exported program), the transforms then see the same thing: the
exported graph with its convolutions, linears and norms as `nn.Conv2d`, `nn.Linear`, `nn.BatchNorm2d`, named after
their weights. Such a graph can be pruned, refactored, trained (dropout and batch norm behave again) and exported.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from edgebuild.attention import rewrite
from edgebuild.errors import TaskError

aten = torch.ops.aten

# Operators with an everyday twin. Quantization by FX patterns and readers of the graph know the twin.
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    aten.relu.default: F.relu,
    aten.relu6.default: F.relu6,
    aten.hardtanh.default: F.hardtanh,
    aten.hardswish.default: F.hardswish,
    aten.hardsigmoid.default: F.hardsigmoid,
    aten.silu.default: F.silu,
    aten.gelu.default: F.gelu,
    aten.sigmoid.default: torch.sigmoid,
    aten.tanh.default: torch.tanh,
    aten.add.Tensor: operator.add,
    aten.mul.Tensor: operator.mul,
    aten.sub.Tensor: operator.sub,
    aten.div.Tensor: operator.truediv,
    aten.cat.default: torch.cat,
    aten.flatten.using_ints: torch.flatten,
    aten.mean.dim: torch.mean,
    aten.max_pool2d.default: F.max_pool2d,
    aten.avg_pool2d.default: F.avg_pool2d,
    aten.adaptive_avg_pool2d.default: F.adaptive_avg_pool2d,
}
_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten.chunk.default,
    aten.split.Tensor,
    aten.slice.Tensor,
    aten.select.int,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.flatten.using_ints,
    operator.getitem,
}


def export(module: nn.Module, inputs: tuple[Tensor, ...], free_batch: bool = False) -> ExportedProgram:
    """Export in eval mode with the inputs' shapes, or for batches of any size. Raises TaskError with the reason."""
    if not free_batch:
        return _export(module, inputs, None)
    two = tuple(torch.cat([x, x]) if x.dim() else x for x in inputs)
    return _export(module, two, tuple({0: Dim.AUTO} if x.dim() else None for x in inputs))


def lift(model: nn.Module | ExportedProgram, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """The model as a GraphModule of standard layers; the original is not changed and shares no parameter with it.

    The batch dimension stays free where the model allows, so that the result can be trained on batches. Raises
    TaskError where the model does not export or where the lifted graph does not reproduce its outputs.
    """
    if isinstance(model, ExportedProgram):
        program = model
    else:
        try:
            program = export(model, inputs, free_batch=True)
        except TaskError:
            program = export(model, inputs)
    lifted = _rebuild(program)
    rewrite(lifted, inputs)
    _check(model, lifted, inputs)
    return lifted


def batch_is_free(lifted: fx.GraphModule, inputs: tuple[Tensor, ...]) -> bool:
    """Whether the graph takes batches larger than the example's."""
    try:
        with torch.no_grad():
            lifted(*(torch.cat([x, x, x]) for x in inputs))
        return True
    except (RuntimeError, AssertionError):
        return False


def stacked(samples: Sequence[tuple[Tensor, ...]], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Samples of batch size 1 as batches of up to `size`."""
    for chunk in (samples[i : i + size] for i in range(0, len(samples), size)):
        yield tuple(torch.cat(column) for column in zip(*chunk, strict=True))


def up_to(lifted: fx.GraphModule, last: fx.Node) -> fx.GraphModule:
    """The model up to and including a node, whose value is the output; with the model's inputs and its layers."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in lifted.graph.nodes:
        if node.op == "placeholder" or last not in copied:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(copied[last])
    return fx.GraphModule(lifted, graph)


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    """A model's result as a tuple of tensors."""
    if isinstance(result, Tensor):
        return (result,)
    return tuple(leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor))


def _export(module: nn.Module, inputs: tuple[Tensor, ...], dynamic: Any) -> ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(module.eval() if module.training else module, inputs, dynamic_shapes=dynamic)
    except Exception as error:  # the exporter raises whatever it likes; all of it means the same to the user
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        where = next((line.strip() for line in str(error).splitlines() if 'File "' in line), "")
        raise TaskError(
            f"the model does not export: {reason[:300]} {where}".strip(),
            "torch.export needs a forward without control flow that depends on the data",
        ) from error


def _check(model: nn.Module | ExportedProgram, lifted: fx.GraphModule, inputs: tuple[Tensor, ...]) -> None:
    module = model.module() if isinstance(model, ExportedProgram) else model
    with torch.no_grad():
        expected, found = outputs_of(module(*inputs)), outputs_of(lifted(*inputs))
    for want, got in zip(expected, found, strict=True):
        if not torch.allclose(want, got, rtol=1e-4, atol=1e-4 * (1 + float(want.abs().max()))):
            raise TaskError(
                "the exported graph does not reproduce the model's outputs", "is the forward deterministic?"
            )


def _rebuild(program: ExportedProgram) -> fx.GraphModule:
    source = program.module(check_guards=False)
    assert isinstance(source, fx.GraphModule)
    if _mutates_views(source):
        source = program.run_decompositions({}).module(check_guards=False)
    read = {str(node.target) for node in source.graph.find_nodes(op="get_attr")}
    tensors = {name: operator.attrgetter(name)(source) for name in read}  # constants are neither parameters nor buffers
    root, graph = nn.Module(), fx.Graph()
    env: dict[fx.Node, Any] = {}

    def value(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: _materialize(env, node, tensors, root, graph))

    for node in source.graph.nodes:
        if node.op == "placeholder":
            env[node] = graph.placeholder(node.name)
        elif node.op == "get_attr":
            continue  # made on demand: most tensors end up inside a layer
        elif node.op == "output":
            leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(value(node.args[0])) if leaf is not None]
            graph.output(leaves[0] if len(leaves) == 1 else tuple(leaves))
        else:
            env[node] = _call(node, value, tensors, root, graph)
            if str(getattr(node.target, "_schema", "")).split("(")[0].split(".")[0].endswith("_"):
                env[node.args[0]] = env[node]  # later readers of the mutated tensor see the new value
    lifted = fx.GraphModule(root, graph)
    graph.eliminate_dead_code()
    lifted.recompile()
    return lifted.eval()


def _mutates_views(source: fx.GraphModule) -> bool:
    """Whether an in-place operator writes through a view, which following the program order alone would get wrong."""
    for node in source.graph.nodes:
        if node.op == "call_function" and _is_in_place(node.target):
            written = node.args[0]
            if not isinstance(written, fx.Node):
                return True
            viewed = False
            base = written
            while base.target in _VIEWS and isinstance(base.args[0], fx.Node):
                base = base.args[0]
                viewed = viewed or len(base.users) > 1
            aliases = any(user.target in _VIEWS for user in written.users)
            if viewed or (aliases and len(written.users) > 1):
                return True
    return False


def _is_in_place(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _materialize(
    env: dict[fx.Node, Any], node: fx.Node, tensors: dict[str, Tensor], root: nn.Module, graph: fx.Graph
) -> Any:
    if node in env:
        return env[node]
    name = str(node.target)  # a get_attr that no layer absorbed
    tensor = tensors[name]
    flat = "constants." + name.removeprefix("constants.").replace(".", "_")
    if not _has(root, flat):
        _place(root, flat, tensor)
    env[node] = graph.get_attr(flat)
    return env[node]


def _call(
    node: fx.Node, value: Callable[[Any], Any], tensors: dict[str, Tensor], root: nn.Module, graph: fx.Graph
) -> Any:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return graph.call_function(target, value(node.args), value(node.kwargs))  # type: ignore[arg-type]
    if _is_in_place(target):
        functional = str(target).split(".")[1].removesuffix("_")
        target = getattr(getattr(aten, functional), target._overloadname)
    arguments = _arguments(node, target)
    absorbed = {
        key: tensors[str(arg.target)].detach()
        for key, arg in arguments.items()
        if isinstance(arg, fx.Node) and arg.op == "get_attr"
    }
    made = _layer(target, arguments, absorbed)
    if made is not None:
        layer, inputs = made
        name = _layer_name(node, arguments, root)
        if not _has(root, name):
            _place(root, name, layer)
        created = graph.call_module(name, tuple(value(x) for x in inputs))
    elif target is aten.mean.dim and _is_global_average(arguments):
        # the same average in the form that the XNNPACK delegate takes
        pooled = graph.call_function(F.adaptive_avg_pool2d, (value(arguments["self"]), 1))
        created = pooled if arguments["keepdim"] else graph.call_function(torch.flatten, (pooled, 1))
    else:
        function = _FUNCTIONS.get(target, target)
        if function in (operator.add, operator.sub) and arguments.get("alpha", 1) != 1:
            function = target
        if function in (operator.add, operator.sub, operator.mul, operator.truediv):
            created = graph.call_function(function, (value(arguments["self"]), value(arguments["other"])))
        else:
            created = graph.call_function(function, value(node.args), value(node.kwargs))
    created.meta = {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
    return created


def _is_global_average(arguments: dict[str, Any]) -> bool:
    seen = arguments["self"].meta.get("val")
    return seen is not None and seen.dim() == 4 and sorted(d % 4 for d in arguments["dim"] or ()) == [2, 3]


def _arguments(node: fx.Node, target: torch._ops.OpOverload) -> dict[str, Any]:
    """All arguments of an ATen call by name, defaults filled in."""
    schema = target._schema.arguments
    given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema}


def _layer(target: Any, a: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[nn.Module, tuple[Any, ...]] | None:
    """The nn module that an ATen call stands for and the inputs that remain; None where there is none."""
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if target in (aten.conv2d.default, aten.conv2d.padding, aten.conv1d.default, aten.conv1d.padding):
        if weight is None or (a["bias"] is not None and bias is None):
            return None
        kind = nn.Conv2d if weight.dim() == 4 else nn.Conv1d
        padding = a["padding"] if isinstance(a["padding"], str) else tuple(a["padding"])
        layer: Any = kind(
            weight.shape[1] * a["groups"],
            weight.shape[0],
            tuple(weight.shape[2:]),  # type: ignore[arg-type]
            tuple(a["stride"]),
            padding,
            tuple(a["dilation"]),
            a["groups"],
            bias is not None,
        )
        return _filled(layer, weight=weight, bias=bias), (a["input"],)
    if target is aten.linear.default and weight is not None and weight.dim() == 2:
        if a["bias"] is not None and bias is None:
            return None
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        return _filled(layer, weight=weight, bias=bias), (a["input"],)
    if target is aten.batch_norm.default and "running_mean" in tensors:
        mean = tensors["running_mean"]
        layer = nn.BatchNorm2d(len(mean), a["eps"], a["momentum"], affine=weight is not None)
        layer._check_input_dim = _any_rank  # one class for every rank that ATen takes
        filled = _filled(layer, weight=weight, bias=bias, running_mean=mean, running_var=tensors["running_var"])
        return filled, (a["input"],)
    if target is aten.layer_norm.default:
        layer = nn.LayerNorm(tuple(a["normalized_shape"]), a["eps"], weight is not None, bias is not None)
        return _filled(layer, weight=weight, bias=bias), (a["input"],)
    if target is aten.embedding.default and weight is not None:
        return _filled(nn.Embedding(*weight.shape), weight=weight), (a["indices"],)
    if target is aten.dropout.default:
        return nn.Dropout(a["p"]), (a["input"],)
    return None


def _any_rank(x: Tensor) -> None:
    """Module level, so that a lifted model can be pickled."""


def _filled(layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor is not None:
                getattr(layer, name).copy_(tensor)
    return layer


def _layer_name(node: fx.Node, arguments: dict[str, Any], root: nn.Module) -> str:
    weight = arguments.get("weight")
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        name = str(weight.target)
        return name.removesuffix(".weight") if "." in name else f"layers.{name}"
    stack = node.meta.get("nn_module_stack")
    name = next(reversed(stack.values()))[0] if stack else ""
    name = f"layers.{node.name}" if not name or _has(root, name) else name
    return name


def _has(root: nn.Module, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(root, part):
            return False
        root = getattr(root, part)
    return True


def _place(root: nn.Module, name: str, value: nn.Module | Tensor) -> None:
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if isinstance(value, nn.Parameter):
        root.register_parameter(last, nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad))
    elif isinstance(value, Tensor):
        root.register_buffer(last, value.detach().clone())
    else:
        root.add_module(last, value)
