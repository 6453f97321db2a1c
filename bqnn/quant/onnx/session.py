"""ONNX Runtime on the CPU."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = ("onnx", "onnxruntime")


def missing_packages() -> str | None:
    """Return which of the packages are missing, with the remedy, or None."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if not missing:
        return None
    return f"{' and '.join(missing)} must be installed; run: pip install 'bqnn[onnx]'"


def start_session(path: Path | bytes, threads: int, *, optimized: bool = True) -> Any:
    """Load a file with ONNX Runtime, on the CPU.

    Args:
        path: The file, or its content.
        threads: The number of threads.
        optimized: Whether the runtime may fuse operators.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    )
    model = path if isinstance(path, bytes) else str(path)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
