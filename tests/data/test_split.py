"""Random test rows."""

import pytest
import torch

from bqnn.data.split import draw_test_rows


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_class_has_its_share(seed):
    labels = torch.tensor([0, 1, 1, 2] * 25)
    drawn = draw_test_rows(labels, 0.2, seed)
    assert labels[drawn].bincount().tolist() == [5, 10, 5]
    assert torch.equal(draw_test_rows(labels, 0.2, seed), drawn)
    assert not torch.equal(draw_test_rows(labels, 0.2, seed + 1), drawn)


def test_small_classes_are_in_both_parts_if_they_can_be(caplog):
    labels = torch.tensor([0] * 20 + [1] * 2 + [2])
    for share in (0.01, 0.2, 0.99):
        drawn = labels[draw_test_rows(labels, share, seed=0)].bincount(minlength=3)
        assert 1 <= drawn[0] <= 19
        assert drawn[1:].tolist() == [1, 0]
    assert "1 of 3 classes have a single row" in caplog.text


def test_every_row_is_as_likely_as_another():
    counts = sum(draw_test_rows(torch.zeros(10), 0.3, seed).int() for seed in range(2000))
    assert counts.sum() == 3 * 2000
    assert (counts - 600).abs().max() < 6 * (2000 * 0.3 * 0.7) ** 0.5


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_a_share_is_above_0_and_below_1(share):
    with pytest.raises(ValueError, match=r"test_share=.*choose a number above 0 and below 1"):
        draw_test_rows(torch.zeros(10), share, seed=0)


def test_one_row_cannot_be_split():
    with pytest.raises(ValueError, match=r"test_share=0.2: 1 rows are too few for a test row"):
        draw_test_rows(torch.zeros(1), 0.2, seed=0)
