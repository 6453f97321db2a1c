"""The digits are those of scikit-learn, with and without its import."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from bqnn.data.digits import read_digits


@pytest.mark.parametrize("is_found", [True, False])
def test_digits_are_those_of_scikit_learn(is_found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_found:
        monkeypatch.setattr("bqnn.data.digits.find_spec", lambda name: None)
    pixels, targets = read_digits()
    digits = load_digits()
    assert np.array_equal(pixels, digits.data)
    assert np.array_equal(targets, digits.target)
    assert pixels.dtype == torch.float64
