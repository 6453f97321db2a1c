"""The engine onednn does what every engine must do."""

from tests.quant.engines.battery import EngineContract


class TestOneDnn(EngineContract):
    name = "onednn"
