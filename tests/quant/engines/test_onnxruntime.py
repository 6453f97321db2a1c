"""The engine onnxruntime does what every engine must do."""

from tests.quant.engines.battery import EngineContract


class TestOnnxRuntime(EngineContract):
    name = "onnxruntime"
