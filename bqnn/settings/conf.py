"""The files in conf/: defaults and their comments."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel it is inside the package, in a checkout beside it.
CONF = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested dictionaries, under its keys joined by dots."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@functools.cache
def published() -> str:
    """The text of all files in conf/: what stands there is no secret."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(CONF.rglob("*.yaml")))
