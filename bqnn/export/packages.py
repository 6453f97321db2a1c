"""The optional packages onnx and onnxruntime."""

from importlib.util import find_spec

PACKAGES = ("onnx", "onnxruntime")


def require_packages() -> None:
    """Raise a ModuleNotFoundError with the remedy if onnx or onnxruntime is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"format=onnx needs {' and '.join(missing)}; install what it needs with "
            "pip install 'bqnn[onnx]'"
        )
