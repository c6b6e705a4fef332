import pytest
import torch

from edgebuild.training.mixing import mixed
from edgebuild.training.objective import UNLABELLED

X = torch.arange(9.0)[:, None, None, None].expand(9, 2, 16, 12).contiguous()  # every sample of one value
LABELS = torch.arange(9)


@pytest.mark.parametrize("share", [1 / 3, 0.5, 1.0])
def test_a_share_of_the_rows_has_a_box_of_another_sample_and_no_label(share):
    found, none = 0, 0
    for seed in range(20):
        (x,), labels = mixed((X,), LABELS, share, seed)
        rows = (labels == UNLABELLED).nonzero().flatten().tolist()
        assert len(rows) == int(9 * share)
        for row in range(9):
            values = x[row].unique()
            if row not in rows:
                assert values.tolist() == [row] and labels[row] == row
                continue
            others = values[values != row].tolist()
            assert len(others) <= 1  # a box of one other sample
            found, none = found + len(others), none + (not others)
            if others:
                within = x[row, 0] == others[0]
                assert torch.equal(x[row, 0], x[row, 1])
                high, wide = within.any(1), within.any(0)
                assert torch.equal(within, high[:, None] & wide)
    assert found > 10 * none
    assert X[3].unique().tolist() == [3.0] and LABELS.tolist() == list(range(9))  # what came in is as it was


def test_boxes_cover_a_third_of_their_samples_at_every_size():
    """A uniform share of half the area in the mean, less what the border cuts off."""
    x = torch.arange(400.0)[:, None, None, None].expand(400, 1, 24, 24)
    (found,), _ = mixed((x,), None, 1.0, 0)
    covered = (found != x).float().mean((1, 2, 3))
    assert 0.25 < covered.mean() < 0.4
    assert covered.min() < 0.02 and covered.max() > 0.6


def test_the_rows_are_spread_so_that_every_part_has_its_share():
    _, labels = mixed((torch.zeros(64, 1, 4, 4),), torch.zeros(64, dtype=torch.long), 0.5, 0)
    for part in labels.chunk(8):
        assert int((part == UNLABELLED).sum()) == 4


def test_a_seed_gives_the_same_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    (one,), _ = mixed((X,), None, 0.5, 5)
    (again,), none = mixed((X,), None, 0.5, 5)
    (other,), _ = mixed((X,), None, 0.5, 6)
    assert torch.equal(one, again) and not torch.equal(one, other) and none is None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("inputs", "labels"),
    [
        ((torch.zeros(4, 8, dtype=torch.long),), None),  # tokens
        ((torch.randn(4, 8, 6),), None),  # sequences
        ((torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)), None),  # which of two would be mixed?
        ((torch.randn(4, 1, 8, 8),), torch.rand(4, 3)),  # labels that are no classes
        ((torch.randn(1, 1, 8, 8),), None),  # nothing to mix with
    ],
)
def test_what_cannot_be_mixed_comes_back_as_it_is(inputs, labels):
    found, told = mixed(inputs, labels, 1.0, 0)
    assert found is inputs and told is labels
