"""The terms of an epoch, and their means."""

import torch

from bqnn.methods.terms import EpochTerms


def test_means_weigh_rows_and_a_new_epoch_starts_empty() -> None:
    epoch = EpochTerms()
    for num_rows, nll in ((1, 8.0), (3, 4.0)):
        epoch.record({"loss": torch.tensor(nll, requires_grad=True), "beta": 0.5}, num_rows)
    assert epoch.means().tolist() == [5.0, 0.5]
    assert epoch.rows == [1, 3]
    assert not any(loss.requires_grad for loss in epoch.losses)
    epoch.clear()
    assert (epoch.rows, epoch.losses) == ([], [])
