"""What tells runs apart beyond their seed, split and bits, in as few words as possible."""

from collections.abc import Mapping, Sequence
from typing import Any

from bqnn.status import WITHOUT_EFFECT

# Columns of their own, or without effect on the numbers.
IGNORED = (
    *WITHOUT_EFFECT, "seed", "task.split", "method.name", "task.name", "quant.mode",
    "quant.weight_bits", "quant.activation_bits", "select", "plots", "method.val_samples",
    "method.init_from", "task.save_every", "convergence",
)  # fmt: skip
IGNORED_OF_TRAINER = ("accelerator", "devices", "progress_bar", "save_every", "threads")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested configuration as dotted keys and texts."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def labels(configs: Sequence[Mapping[str, str]]) -> tuple[list[str], list[str]]:
    """For each flat configuration, how it differs from the others: in its method, and elsewhere."""
    keys = tell_apart(configs)
    of_method = [key for key in keys if key.startswith("method.")]
    others = [key for key in keys if key not in of_method]
    return (
        [_text({key.removeprefix("method."): flat[key] for key in of_method}) for flat in configs],
        [_text({key: flat[key] for key in others}) for flat in configs],
    )


def tell_apart(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys, each of which tells apart configurations that those before it do not.

    Names of groups come first, so that `quant.name` says all that a preset changes. Keys that
    some configurations lack are left out: they belong to an option that is among the others, or
    are newer than those runs.
    """
    shared = set(configs[0]).intersection(*configs)
    chosen: list[str] = []
    groups = 1
    for key in sorted(shared, key=lambda key: (not key.endswith(".name"), key)):
        if _is_ignored(key):
            continue
        count = len({tuple(flat[name] for name in (*chosen, key)) for flat in configs})
        if count > groups:
            chosen.append(key)
            groups = count
    return chosen


def _is_ignored(key: str) -> bool:
    of_trainer = {f"{part}trainer.{n}" for part in ("", "trained.") for n in IGNORED_OF_TRAINER}
    return key in of_trainer or any(key == name or key.startswith(f"{name}.") for name in IGNORED)


def _text(differences: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in differences.items())
