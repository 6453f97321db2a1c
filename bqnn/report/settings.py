"""What tells runs apart beyond their seed, split and bits, in as few words as possible."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bqnn.jobs.status import WITHOUT_EFFECT
from bqnn.text import printable

# Columns of their own, or without effect on the numbers.
IGNORED = (
    *WITHOUT_EFFECT, "seed", "task.split", "method.name", "task.name", "quant.mode",
    "quant.weight_bits", "quant.activation_bits", "quant.fine_tuning.seed",
    "trained.fine_tuning.seed", "select", "plots", "method.val_samples", "task.save_every",
    "convergence",
)  # fmt: skip
IGNORED_OF_TRAINER = ("accelerator", "progress_bar", "save_every", "threads")
# Methods are compared where these are equal. Others, the number of epochs for one, are chosen for
# each method, and only tell apart the runs of one.
SCHEME = ("net.", "quant.", "suite.", "numeric")
DEEPEST = 16  # groups within groups
LONGEST = 80  # characters of a value in a label


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested configuration as dotted keys and printable texts, each of at most about 80
    characters. ValueError: groups are nested more than 16 deep.
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
    """For each flat configuration of one method, how its options differ from the others'."""
    keys = tell_apart(configs, lambda key: key.startswith("method."))
    return [_text(keys, flat, prefix="method.") for flat in configs]


def setting_labels(
    configs: Sequence[Mapping[str, str]], methods: Sequence[str], said: Sequence[str]
) -> list[str]:
    """For each flat configuration of a table, how it differs elsewhere than in its method.

    methods: their names; said: what `method_labels` says of each already. Of what is chosen for
    each method, a value that all runs of the other methods have goes without saying.
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
            [f"{said[index]} {texts[index]}" for index in own],
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
    """The keys, each of which tells apart configurations that those before it do not.

    known: what is said of each already. Names of groups come first, so that `quant.name` says all
    that a preset changes. A key that some lack (it belongs to an option that is among the others,
    or is newer than those runs) counts where those that have it differ in it.
    """
    values: dict[str, set[str]] = {}
    for flat in configs:
        for key, value in flat.items():
            values.setdefault(key, set()).add(value)
    said: list[tuple[str | None, ...]] = [(text,) for text in known or [""] * len(configs)]
    chosen = []
    for key in sorted(values, key=lambda key: (not key.endswith(".name"), key)):
        if len(values[key]) < 2 or _is_ignored(key) or not is_candidate(key):
            continue
        longer = [(*texts, flat.get(key)) for texts, flat in zip(said, configs, strict=True)]
        if len(set(longer)) > len(set(said)):
            chosen.append(key)
            said = longer
    return chosen


def _is_ignored(key: str) -> bool:
    of_trainer = {f"{part}trainer.{n}" for part in ("", "trained.") for n in IGNORED_OF_TRAINER}
    return key in of_trainer or any(key == name or key.startswith(f"{name}.") for name in IGNORED)


def _text(keys: Sequence[str], flat: Mapping[str, str], prefix: str = "") -> str:
    return " ".join(f"{key.removeprefix(prefix)}={flat[key]}" for key in keys if key in flat)


def _value(value: object) -> str:
    """The text of a value; a long one is cut, and has its hash in place of what is missing."""
    try:
        text = printable(str(value))
    except (RecursionError, ValueError):  # ValueError: more than 4300 digits
        raise ValueError("config.yaml: a value is nested too deeply, or too long") from None
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}...{hashlib.sha256(text.encode()).hexdigest()[:8]}"
