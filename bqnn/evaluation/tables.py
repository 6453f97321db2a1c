"""Text tables of metrics for a terminal."""

from collections.abc import Mapping, Sequence

# The float network, its fine-tuning without rounding, and the numerics of the quantized network.
STAGES = ("float", "finetuned", "unquantized", "simulated", "int8")
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
    """Format the metrics of a quantization side by side, and the changes.

    Args:
        metrics: Metrics with keys such as int8/test/nll. With those of a control, `finetuned`, the
            changes due to the fine-tuning and to the integers are apart.
    """
    names = [n for n in _COMPARED if f"float/test/{n}" in metrics]
    stages = [stage for stage in STAGES if f"{stage}/test/nll" in metrics]
    has_control = "finetuned" in stages
    changes = (
        [("finetuned", "float"), ("int8", "finetuned")] if has_control else [("int8", "float")]
    )
    head = [*stages, *(f"{after} - {before}" for after, before in changes)]
    first = max(6, *(len(name) + 1 for name in names))
    widths = [max(14, len(title) + 2) for title in head]
    lines = [_padded("test", first, head, widths)]
    for name in names:
        values = {stage: metrics[f"{stage}/test/{name}"] for stage in stages}
        cells = [_number(value) for value in values.values()]
        cells += [_number(values[after] - values[before], "+") for after, before in changes]
        lines.append(_padded(name, first, cells, widths))
    return "\n".join(lines)


def _padded(name: str, first: int, cells: Sequence[str], widths: Sequence[int]) -> str:
    """Format one line: a name in `first` columns, and right-aligned cells of given widths."""
    return f"{name:<{first}}" + "".join(
        f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)
    )


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
