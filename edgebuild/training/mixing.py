"""Further questions to the teacher: samples with a part of another one in them.

CutMix (Yun et al. 2019, arXiv:1905.04899), where the teacher says what is seen instead of the labels (Beyer et al.
2022, arXiv:2106.05237). A teacher is surest of what it was trained on, and tells least about it.
"""

import torch
from torch import Tensor

from edgebuild.training.objective import UNLABELLED


def mixed(
    inputs: tuple[Tensor, ...], labels: Tensor | None, share: float, seed: int
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """A batch with a box of another sample in a share of its rows, which have no label then.

    Only one input of float [n, c, h, w] (images, spectrograms) with int64 class labels [n, ...] or none is mixed;
    others come back as they are. A box covers a uniform share of its sample before it is cut at the border. The rows
    are spread evenly over the batch, so that every part of it has as many. `seed`: the same gives the same.
    """
    if not _can_be(inputs, labels):
        return inputs, labels
    (plain,) = inputs
    at = torch.arange(len(plain), device=plain.device)
    rows = at[((at + 1) * share).floor() > (at * share).floor()]
    random = torch.Generator().manual_seed(seed)
    others = torch.randint(1, len(plain), (len(rows),), generator=random).to(plain.device)
    half = torch.rand(len(rows), generator=random).sqrt() / 2
    high, wide = (_near(half, length, random) for length in plain.shape[2:])
    box = (high[:, None, :, None] & wide[:, None, None, :]).to(plain.device)
    x = plain.clone()
    x[rows] = torch.where(box, plain[(rows + others) % len(plain)], plain[rows])
    if labels is not None:
        labels = labels.index_fill(0, rows.to(labels.device), UNLABELLED)
    return (x,), labels


def _can_be(inputs: tuple[Tensor, ...], labels: Tensor | None) -> bool:
    if len(inputs) != 1 or (labels is not None and labels.dtype != torch.int64):
        return False
    (x,) = inputs
    return x.dim() == 4 and x.is_floating_point() and len(x) > 1 and min(x.shape[2:]) > 1


def _near(half: Tensor, length: int, random: torch.Generator) -> Tensor:
    """Which places of an axis are within a share of its length from one drawn for each row: bool [rows, length]."""
    middle = torch.randint(0, length, (len(half), 1), generator=random)
    return (torch.arange(length) - middle).abs() < half[:, None] * length
