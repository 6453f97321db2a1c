"""The numbers that a sweeper gets from a Job: metrics that its configuration names."""

from pathlib import Path
from typing import Any

from bqnn.jobs.records import read_record
from bqnn.settings.suggest import did_you_mean
from bqnn.text import short


def objective_values(folder: Path, names: list[str]) -> list[float]:
    """Read the objectives of a Job that is done.

    Args:
        folder: Its folder.
        names: Metrics of its metrics.json, and sizes of its size.json, such as `size/packed_bytes`.

    Raises:
        ValueError: There is no such metric.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     size = Path(name, "metrics.json").write_text('{"val/nll": 0.25}')
        ...     objective_values(Path(name), ["val/nll"])
        [0.25]
    """
    known: dict[str, Any] = {}
    for file, prefix in (("metrics.json", ""), ("size.json", "size/")):
        if (folder / file).exists():
            record = read_record(folder / file)
            known |= {f"{prefix}{name}": value for name, value in record.items()}
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or "; metrics.json of a run has the names"
            raise ValueError(f"objective: the run has no metric {short(name)}{hint}")
    return [float(known[name]) for name in names]
