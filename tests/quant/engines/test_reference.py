"""The engine reference does what every engine must do."""

from tests.quant.engines.battery import EngineContract


class TestReference(EngineContract):
    name = "reference"
