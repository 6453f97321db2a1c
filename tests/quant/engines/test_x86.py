"""The engine x86 does what every engine must do."""

from tests.quant.engines.battery import EngineContract


class TestX86(EngineContract):
    name = "x86"
