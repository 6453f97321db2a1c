"""The optional packages onnx and onnxruntime."""

from importlib.util import find_spec

PACKAGES = ("onnx", "onnxruntime")


def require_packages() -> None:
    """Raise a ValueError with the remedy if onnx or onnxruntime is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"format=onnx: {' and '.join(missing)} must be installed; run: pip install 'bqnn[onnx]'"
        )
