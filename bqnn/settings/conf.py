"""The files in conf/: defaults and their comments."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1]
# conf/ is inside the package in a wheel, and beside it in a checkout.
CONF = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested dictionaries with its dotted key.

    Example:
        >>> dict(leaves({"seed": 1, "net": {"name": "mlp"}}))
        {'seed': 1, 'net.name': 'mlp'}
    """
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@functools.cache
def published() -> str:
    """Return the text of all files in conf/, which contains no secrets."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(CONF.rglob("*.yaml")))
