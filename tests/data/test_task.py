"""Data sets that are built from the options of a task."""

import pytest
import torch

from bqnn.data.task import make_data

TASK = {"name": "toy", "dataset": "synthetic", "max_epochs": 3, "num_train": 50, "num_test": 10}


@pytest.mark.parametrize(("refit", "num_train"), [(False, 40), (True, 50)])
def test_a_refit_trains_on_the_validation_rows_too(refit: bool, num_train: int) -> None:
    task = {**TASK, "validation_share": 0.2, "refit": refit}
    data = make_data({"task": task, "data_dir": "data", "seed": 0})
    assert len(data.train) == num_train
    assert (data.val is None) == refit
    assert data.tested_share == 10 / 60


def test_a_refit_has_the_test_rows_of_the_selection() -> None:
    config = {"data_dir": "data", "seed": 0}
    data, refitted = (make_data({"task": {**TASK, "refit": r}, **config}) for r in (False, True))
    # Standardized by other training rows, the same rows have the same order.
    assert torch.equal(data.test.inputs.argsort(0), refitted.test.inputs.argsort(0))
