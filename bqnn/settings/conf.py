"""The files in conf/: defaults and their comments."""

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1]
# conf/ is inside the package in a wheel, and beside it in a checkout.
CONF = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested dictionaries with its dotted key.

    Examples:
        >>> dict(leaves({"seed": 1, "net": {"name": "mlp"}}))
        {'seed': 1, 'net.name': 'mlp'}
    """
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# The key of each group that selects a method, a network or a data set by name.
NAME_KEYS = {"method": "name", "net": "name", "task": "dataset"}


@functools.cache
def built_in(group: str) -> tuple[str, ...]:
    """Return the names of bqnn's own methods, networks or data sets, from the files in conf/.

    Args:
        group: method, net or task.

    Examples:
        >>> built_in("net")
        ('lenet', 'mlp', 'resnet')
    """
    pattern = re.compile(rf"^{NAME_KEYS[group]}: (\w+)", re.MULTILINE)
    texts = (path.read_text(encoding="utf-8") for path in sorted((CONF / group).glob("*.yaml")))
    return tuple(dict.fromkeys(match[1] for text in texts if (match := pattern.search(text))))


@functools.cache
def published() -> str:
    """Return the text of all files in conf/, which contains no secrets."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(CONF.rglob("*.yaml")))
