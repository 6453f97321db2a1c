"""The optional packages onnx and onnxruntime."""

from bqnn.quant.onnx.session import missing_packages


def require_packages() -> None:
    """Raise a ValueError with the remedy if onnx or onnxruntime is not installed."""
    missing = missing_packages()
    if missing is not None:
        raise ValueError(f"format=onnx: {missing}")
