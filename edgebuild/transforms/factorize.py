"""Low-rank factorization of weights.

svd: a linear layer or 1x1 convolution as two (Denton et al. 2014, arXiv:1404.0736).
spatial: a k x k convolution as k x 1 and 1 x k (Jaderberg et al. 2014, arXiv:1405.3866).
tucker2: as 1x1, k x k on fewer channels, and 1x1 (Kim et al. 2016, arXiv:1511.06530).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import tensorly as tl
import torch
from tensorly.decomposition import partial_tucker
from torch import Tensor, fx, nn

from edgebuild.errors import TransformError
from edgebuild.lift import outputs_of
from edgebuild.sensitivity import Probe, Sensitivity, loss
from edgebuild.spec import Candidate, Form, FormKind, LayerFacts, ModelFacts, pays

SHARES = (0.75, 0.5, 0.375, 0.25, 0.125)  # of the full rank
SMALLEST_RANK = 4


def forms(layer: LayerFacts, tile: int) -> tuple[Form, ...]:
    """The factorizations of a layer that need fewer multiply-accumulates than it does, in a fixed order."""
    if not layer.weighted or layer.groups > 1:
        return ()
    n, m = layer.in_channels, layer.out_channels
    found: list[Form] = []
    for kind in _kinds(layer):
        for share in SHARES:
            if kind == "tucker2":
                ranks: tuple[int, ...] = (_round(m * share, tile), _round(n * share, tile))
            elif kind == "spatial":
                ranks = (_round(min(n * layer.kernel[0], m * layer.kernel[1]) * share, tile),)
            else:
                ranks = (_round(min(n, m) * share, tile),)
            form = Form(layer.name, kind, ranks)
            if form not in found and pays(layer, form):
                found.append(form)
    return tuple(found)


def _kinds(layer: LayerFacts) -> tuple[FormKind, ...]:
    pointwise = layer.op == "linear" or layer.kernel == (1, 1)
    return ("svd",) if pointwise else ("spatial", "tucker2")


def _round(rank: float, tile: int) -> int:
    step = tile if rank >= tile else SMALLEST_RANK
    return max(SMALLEST_RANK, int(rank) // step * step)


# --------------------------------------------------------------------------------------------------- candidates


@dataclass(frozen=True)
class _Basis:
    """The orthogonal bases in which a lower rank is a leading block: left (rows x k) and right (k x columns)."""

    left: Tensor
    right: Tensor
    core: Tensor


def probes(model: fx.GraphModule, facts: ModelFacts, tile: int) -> dict[str, Probe]:
    """For each layer with forms, the map from its weight's gradient to g . dW of every form."""
    return {
        layer.name: _probe(model.get_submodule(layer.name).weight.detach(), forms(layer, tile))  # type: ignore[operator]
        for layer in facts.layers
        if forms(layer, tile)
    }


def candidates(facts: ModelFacts, sensitivity: Sensitivity, tile: int) -> tuple[Candidate, ...]:
    """Every form of every layer with its loss."""
    found = []
    for name, dots in sensitivity.probed.items():
        losses = loss(dots)
        found += [Candidate(form, float(losses[i])) for i, form in enumerate(forms(facts.layer(name), tile))]
    return tuple(found)


def _probe(weight: Tensor, chosen: Sequence[Form]) -> Probe:
    bases = {kind: _basis(weight, kind) for kind in {form.kind for form in chosen}}

    def probe(grad: Tensor) -> Tensor:
        dots = []
        for form in chosen:
            basis = bases[form.kind]
            seen = _matrix(grad, form.kind)
            if form.kind == "tucker2":
                kept = torch.einsum("oihw,or,is->rshw", seen, basis.left, basis.right) * basis.core
                inside = kept[: form.ranks[0], : form.ranks[1]].sum()
            else:
                inside = ((basis.left.T @ seen @ basis.right.T).diagonal() * basis.core)[: form.ranks[0]].sum()
            dots.append(inside - (seen * _matrix(weight, form.kind)).sum())
        return torch.stack(dots)

    return probe


def _basis(weight: Tensor, kind: FormKind) -> _Basis:
    if kind == "tucker2":
        left = torch.linalg.svd(weight.flatten(1), full_matrices=False)[0]
        right = torch.linalg.svd(weight.transpose(0, 1).flatten(1), full_matrices=False)[0]
        return _Basis(left, right, torch.einsum("oihw,or,is->rshw", weight, left, right))
    left, values, right = torch.linalg.svd(_matrix(weight, kind), full_matrices=False)
    return _Basis(left, right, values)


def _matrix(weight: Tensor, kind: FormKind) -> Tensor:
    """The weight as the matrix that a rank is taken of; a tucker2 weight stays a 4-tensor."""
    if kind == "tucker2":
        return weight
    if kind == "svd":
        return weight.flatten(1)
    out, into, kh, kw = weight.shape
    return weight.permute(1, 2, 0, 3).reshape(into * kh, out * kw)  # (in, kh) x (out, kw)


# -------------------------------------------------------------------------------------------------------- apply


def apply(model: fx.GraphModule, inputs: tuple[Tensor, ...], chosen: Sequence[Form]) -> fx.GraphModule:
    """A copy with each chosen layer replaced by its factors. Raises TransformError where a form does not fit."""
    result = copy.deepcopy(model)
    for form in chosen:
        try:
            layer = result.get_submodule(form.layer)
        except AttributeError:
            raise TransformError(f"the plan factorizes layer {form.layer!r}, which the model does not have") from None
        _check_form(layer, form)
        result.set_submodule(form.layer, nn.Sequential(*_decompose(layer, form)))
    with torch.no_grad():
        for want, got in zip(outputs_of(model(*inputs)), outputs_of(result(*inputs)), strict=True):
            if want.shape != got.shape or not torch.isfinite(got).all():
                raise TransformError("the factorized model's outputs are not finite or changed shape")
    return result


def _check_form(layer: nn.Module, form: Form) -> None:
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        bounds = {
            "svd": (min(layer.in_channels, layer.out_channels),),
            "spatial": (min(layer.in_channels * layer.kernel_size[0], layer.out_channels * layer.kernel_size[1]),),
            "tucker2": (layer.out_channels, layer.in_channels),
        }[form.kind]
    elif isinstance(layer, nn.Linear) and form.kind == "svd":
        bounds = (min(layer.in_features, layer.out_features),)
    else:
        raise TransformError(f"layer {form.layer!r} ({type(layer).__name__}) cannot be factorized by {form.kind}")
    if form.kind == "svd" and isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
        raise TransformError(f"layer {form.layer!r} is no 1x1 convolution; factorize it by spatial or tucker2")
    if len(form.ranks) != len(bounds) or any(not 0 < r <= b for r, b in zip(form.ranks, bounds, strict=True)):
        raise TransformError(f"layer {form.layer!r} cannot have ranks {form.ranks} for {form.kind}, at most {bounds}")


def _decompose(layer: nn.Module, form: Form) -> list[nn.Module]:
    weight = layer.weight.detach()  # type: ignore[operator]
    bias = layer.bias.detach() if layer.bias is not None else None  # type: ignore[operator]
    assert isinstance(weight, Tensor)
    if form.kind == "tucker2":
        return _tucker2(layer, weight, bias, form.ranks)
    basis, r = _basis(weight, form.kind), form.ranks[0]
    root = basis.core[:r].sqrt()
    left, right = basis.left[:, :r] * root, root[:, None] * basis.right[:r]
    if isinstance(layer, nn.Linear):  # W = left @ right, so `right` runs first
        first, second = nn.Linear(layer.in_features, r, bias=False), nn.Linear(r, layer.out_features, bias is not None)
        return [_filled(first, right), _filled(second, left, bias)]
    assert isinstance(layer, nn.Conv2d)
    n, m, (kh, kw), (sh, sw) = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride
    (ph, pw), (dh, dw) = _padding(layer), layer.dilation
    if form.kind == "svd":
        return [
            _filled(nn.Conv2d(n, r, 1, (sh, sw), (ph, pw), bias=False), right[:, :, None, None]),
            _filled(nn.Conv2d(r, m, 1, bias=bias is not None), left[:, :, None, None], bias),
        ]
    vertical = left.reshape(n, kh, r).permute(2, 0, 1)[..., None]
    horizontal = right.reshape(r, m, kw).permute(1, 0, 2)[:, :, None, :]
    return [
        _filled(nn.Conv2d(n, r, (kh, 1), (sh, 1), (ph, 0), (dh, 1), bias=False), vertical),
        _filled(nn.Conv2d(r, m, (1, kw), (1, sw), (0, pw), (1, dw), bias=bias is not None), horizontal, bias),
    ]


def _tucker2(layer: nn.Module, weight: Tensor, bias: Tensor | None, ranks: tuple[int, ...]) -> list[nn.Module]:
    assert isinstance(layer, nn.Conv2d)
    with tl.backend_context("pytorch"):
        (core, (out, into)), _ = partial_tucker(weight, rank=list(ranks), modes=[0, 1], init="svd", random_state=0)
    n, m, (r_out, r_in) = layer.in_channels, layer.out_channels, ranks
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    return [
        _filled(nn.Conv2d(n, r_in, 1, bias=False), into.T[:, :, None, None]),
        _filled(nn.Conv2d(r_in, r_out, (kh, kw), (sh, sw), _padding(layer), (dh, dw), bias=False), core),
        _filled(nn.Conv2d(r_out, m, 1, bias=bias is not None), out[:, :, None, None], bias),
    ]


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    if isinstance(layer.padding, str):
        if layer.padding == "valid":
            return 0, 0
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if any(total % 2 for total in totals):
            raise TransformError("an even kernel with padding='same' cannot be split")
        return totals[0] // 2, totals[1] // 2
    return layer.padding[0], layer.padding[1]


def _filled(layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(weight)  # type: ignore[operator]
        if bias is not None:
            layer.bias.copy_(bias)  # type: ignore[operator]
    return layer.eval()
