"""Short labels for the options in which runs differ, besides seed, split and bits."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bqnn.jobs.identity import WITHOUT_EFFECT
from bqnn.text import printable

# Options with their own column, or without an effect on the numbers.
IGNORED = (
    *WITHOUT_EFFECT, "seed", "task.split", "method.name", "task.name", "quant.mode",
    "quant.weight_bits", "quant.activation_bits", "quant.fine_tuning.seed",
    "trained.fine_tuning.seed", "select", "plots", "method.val_samples", "task.save_every",
    "convergence", "save_calibrated",
)  # fmt: skip
IGNORED_OF_TRAINER = (*("accelerator", "data_on_device", "progress_bar", "save_every", "threads"),)
# Methods are compared if these options are equal. Other options, such as the number of epochs, are
# chosen for each method, and only distinguish runs of the same method.
SCHEME = ("net.", "quant.", "suite.", "numeric")
DEEPEST = 16  # nested groups
LONGEST = 80  # characters of a value in a label


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten a nested configuration.

    Args:
        config: The configuration, which may come from an untrusted file.
        prefix: Precedes every key.

    Returns:
        Dotted keys and printable values of at most about 80 characters.

    Raises:
        ValueError: Groups are nested more than 16 deep, or a value is.

    Examples:
        >>> flatten({"seed": 1, "net": {"name": "mlp"}})
        {'seed': '1', 'net.name': 'mlp'}
    """
    if prefix.count(".") > DEEPEST:
        raise ValueError(f"config.yaml: groups are nested more than {DEEPEST} deep")
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[printable(f"{prefix}{key}")] = _value(value)
    return flat


def method_labels(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """Label each flat configuration of one method by the options of the method that differ.

    Examples:
        >>> method_labels([{"method.rate": "0.1"}, {"method.rate": "0.2"}])
        ['rate=0.1', 'rate=0.2']
    """
    keys = tell_apart(configs, lambda key: key.startswith("method."))
    return [_text(keys, flat, prefix="method.") for flat in configs]


def setting_labels(
    configs: Sequence[Mapping[str, str]], methods: Sequence[str], known: Sequence[str]
) -> list[str]:
    """Label each flat configuration of a table by the options that differ, except the method's.

    An option that is chosen for each method is omitted if all runs of other methods have its value.

    Args:
        configs: The configurations.
        methods: The name of the method of each configuration.
        known: The label of each configuration from `method_labels`.
    """
    scheme = tell_apart(configs, lambda key: key.startswith(SCHEME))
    texts = [_text(scheme, flat) for flat in configs]
    labels = list(texts)
    for method in dict.fromkeys(methods):
        own = [index for index, name in enumerate(methods) if name == method]
        others = [flat for flat, name in zip(configs, methods, strict=True) if name != method]
        keys = tell_apart(
            [configs[index] for index in own],
            lambda key: not key.startswith(("method.", *SCHEME)),
            [f"{known[index]} {texts[index]}" for index in own],
        )
        values = {key: {flat[key] for flat in others if key in flat} for key in keys}
        for index in own:
            flat = configs[index]
            unusual = [key for key in keys if values[key] != {flat.get(key)}]
            labels[index] = f"{texts[index]} {_text(unusual, flat)}".strip()
    return labels


def tell_apart(
    configs: Sequence[Mapping[str, str]],
    is_candidate: Callable[[str], bool] = lambda key: True,
    known: Sequence[str] | None = None,
) -> list[str]:
    """Find the keys that distinguish configurations, each one beyond the keys before it.

    Names of groups come first, so that `quant.name` covers all changes of a preset. A key that some
    configurations lack, for instance because it is newer, counts only if the others differ in it.

    Args:
        configs: Flat configurations.
        is_candidate: Whether a key may be chosen.
        known: A label of each configuration, which needs no key to distinguish it.

    Examples:
        >>> tell_apart([{"net.width": "8", "x": "1"}, {"net.width": "16", "x": "1"}])
        ['net.width']
    """
    values: dict[str, set[str]] = {}
    for flat in configs:
        for key, value in flat.items():
            values.setdefault(key, set()).add(value)
    labels: list[tuple[str | None, ...]] = [(text,) for text in known or [""] * len(configs)]
    chosen = []
    for key in sorted(values, key=lambda key: (not key.endswith(".name"), key)):
        if len(values[key]) < 2 or _is_ignored(key) or not is_candidate(key):
            continue
        longer = [(*texts, flat.get(key)) for texts, flat in zip(labels, configs, strict=True)]
        if len(set(longer)) > len(set(labels)):
            chosen.append(key)
            labels = longer
    return chosen


def _is_ignored(key: str) -> bool:
    of_trainer = {f"{part}trainer.{n}" for part in ("", "trained.") for n in IGNORED_OF_TRAINER}
    return key in of_trainer or any(key == name or key.startswith(f"{name}.") for name in IGNORED)


def _text(keys: Sequence[str], flat: Mapping[str, str], prefix: str = "") -> str:
    return " ".join(f"{key.removeprefix(prefix)}={flat[key]}" for key in keys if key in flat)


def _value(value: object) -> str:
    """Format a value. A long value is truncated and gets a hash of its full text."""
    try:
        text = printable(str(value))
    except (RecursionError, ValueError):  # ValueError: a number of more than 4300 digits
        raise ValueError("config.yaml: a value is nested too deeply, or too long") from None
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}...{hashlib.sha256(text.encode()).hexdigest()[:8]}"
