"""Measure a file in a process of its own: python measure.py model.onnx rows.npy threads.

Prints JSON: the latencies for each batch size, and the peak of the memory in bytes. It imports
nothing but NumPy and ONNX Runtime, as a user of the file does.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

BATCHES = (1, 32, 256)
SECONDS = 0.5  # for each batch size
LEAST_CALLS, MOST_CALLS = 3, 100


def latencies(session: Any, rows: np.ndarray) -> list[dict[str, float]]:
    """Return the median milliseconds of a call, and the number of calls, for each batch size."""
    found = []
    for size in BATCHES:
        batch = np.resize(rows, (size, *rows.shape[1:]))
        session.run(None, {"inputs": batch})
        times: list[float] = []
        while len(times) < LEAST_CALLS or (sum(times) < SECONDS and len(times) < MOST_CALLS):
            start = time.perf_counter()
            session.run(None, {"inputs": batch})
            times.append(time.perf_counter() - start)
        median = 1000 * statistics.median(times)
        found.append({"batch_size": size, "milliseconds": median, "calls": len(times)})
    return found


def peak_bytes() -> int | None:
    """Return the peak of the memory of this process, or None where it is not known."""
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # On Linux, the number of `resource` is at least that of the process that started this one.
    status = Path("/proc/self/status").read_text() if sys.platform == "linux" else ""
    peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(peaks[0]) if peaks else None


def main(model: str, rows: str, threads: str) -> None:
    """Measure a file and print the result."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model, options, providers=providers)
    found = latencies(session, np.load(rows, allow_pickle=False))
    print(json.dumps({"latencies": found, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
