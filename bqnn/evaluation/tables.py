"""Text tables of metrics for a terminal."""

from collections.abc import Mapping, Sequence

STAGES = ("float", "unquantized", "simulated", "int8")  # the numerics of a quantized network
_COMPARED = ("error", "nll", "nll_mixture", "ape", "mi", "ece", "rmse")
_OF_SETS = (
    *(*_COMPARED, "std", "epistemic_std", "auroc_entropy", "auroc_mi", "auroc_std"),
    *("coverage_lac", "size_lac", "coverage_cqr", "width_cqr", "num_samples"),
)


def split_table(metrics: Mapping[str, float], splits: Sequence[str]) -> str:
    """Format the metrics of each split side by side.

    Args:
        metrics: Metrics with keys such as test/nll.
        splits: The prefixes of the keys, such as val, test and int8/test.

    Examples:
        >>> print(split_table({"val/nll": 0.5, "test/nll": 0.25}, ["val", "test"]))
                                     val        test
        nll                       0.5000      0.2500
    """
    names = [name.removeprefix("test/") for name in metrics if name.startswith("test/")]
    cells = {name: [metrics.get(f"{split}/{name}") for split in splits] for name in names}
    return _text_table(splits, cells, first=20, others=12)


def comparison_table(metrics: Mapping[str, float]) -> str:
    """Format the metrics of float, unquantized, simulated and int8 side by side.

    The column `fine-tuning` is the difference unquantized - float, and `quantization` is int8 -
    unquantized.

    Args:
        metrics: Metrics with keys such as int8/test/nll.
    """
    names = [n for n in _COMPARED if f"float/test/{n}" in metrics]
    head = (*STAGES, "fine-tuning", "quantization")
    first = max(6, *(len(name) + 1 for name in names))
    lines = [f"{'test':<{first}}" + "".join(f"{title:>14}" for title in head)]
    for name in names:
        cells = [metrics[f"{stage}/test/{name}"] for stage in STAGES]
        changes = (cells[1] - cells[0], cells[3] - cells[1])
        lines.append(
            f"{name:<{first}}"
            + "".join(f"{_number(cell):>14}" for cell in cells)
            + "".join(f"{_number(change, '+'):>14}" for change in changes)
        )
    return "\n".join(lines)


def suite_table(metrics: Mapping[str, float]) -> str:
    """Format the main metrics of a suite, with a line per set and the mean of each distortion.

    Args:
        metrics: Metrics with keys such as ood/uniform/ape.
    """
    sets = dict.fromkeys(key.rpartition("/")[0] for key in metrics)
    lines = [name for name in sets if not name.startswith("shift/") or name.endswith("_mean")]
    names = [name for name in _OF_SETS if any(f"{line}/{name}" in metrics for line in lines)]
    cells = {line: [metrics.get(f"{line}/{name}") for name in names] for line in lines}
    return _text_table(names, cells, first=max(map(len, lines)) + 2, others=15)


def _text_table(
    head: Sequence[str], cells: Mapping[str, Sequence[float | None]], first: int, others: int
) -> str:
    """Format named lines of numbers below a header; `first` and `others` are column widths."""
    lines = [f"{'':<{first}}" + "".join(f"{title:>{others}}" for title in head)]
    for name, numbers in cells.items():
        texts = ("" if x is None else _number(x) for x in numbers)
        lines.append(f"{name:<{first}}" + "".join(f"{text:>{others}}" for text in texts))
    return "\n".join(lines)


def _number(value: float, sign: str = "") -> str:
    """Format a number in at most 12 characters."""
    return f"{value:{sign}.4f}" if abs(value) < 1e6 else f"{value:{sign}.3e}"
