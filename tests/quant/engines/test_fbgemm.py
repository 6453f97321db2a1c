"""The engine fbgemm does what every engine must do."""

from tests.quant.engines.battery import EngineContract


class TestFbgemm(EngineContract):
    name = "fbgemm"
