"""The package passes the contracts of bqnn, as every plug-in should."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from bqnn.data import TensorData
from bqnn.testing import DataContract, MethodContract, NetContract
from tests.plugin_package.example_plugin import NoisyDropout, Strips, TwoMoons


class TestStrips(NetContract):
    input_shapes = ((3,), (1, 4, 4))

    def make(self, input_shape: Sequence[int], heads: Sequence[int]) -> nn.Module:
        return Strips(input_shape, heads, width=8)


class TestNoisyDropout(MethodContract):
    method = NoisyDropout
    options = {"optimizer": {"name": "adam", "lr": 1e-2}, "noise": 0.3}  # noqa: RUF012


class TestTwoMoons(DataContract):
    def make(self, **options: Any) -> TensorData:
        return TwoMoons(**{"data_dir": "data", "seed": 0, "batch_size": 64, **options})
