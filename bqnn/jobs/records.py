"""Read small JSON and YAML files that another program, or another person, may have written."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from bqnn.files import open_regular
from bqnn.text import one_line

LARGEST_RECORD = 16 * 2**20  # bytes

_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_record(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or the mapping in a YAML file (`.yaml`), whatever it may hold.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: In one line: it is no regular file, is not readable, is over 16 MiB, is not
            UTF-8, is not JSON (YAML), is nested too deeply, uses YAML aliases, or holds anything
            but an object with texts as keys.
    """
    try:
        text = _text(path)
        record = _yaml(text) if path.suffix == ".yaml" else json.loads(text)
    except FileNotFoundError:
        raise
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror or error}") from error
    except (ValueError, OverflowError, yaml.YAMLError) as error:
        raise ValueError(f"{path.name} cannot be read: {one_line(str(error))[:300]}") from error
    if not isinstance(record, dict) or not all(type(key) is str for key in record):
        raise ValueError(f"{path.name} holds no object with names")
    return record


def instant(value: object) -> datetime | None:
    """The point in time that an ISO 8601 text names; None for anything else.

    Instants of different UTC offsets compare correctly, their texts do not. A text without an
    offset is taken as UTC.
    """
    if type(value) is not str:
        return None
    try:
        time = datetime.fromisoformat(value)
        # Compared in UTC later; near the years 1 and 9999 that does not exist.
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _text(path: Path) -> str:
    with open_regular(path) as file:
        data = file.read(LARGEST_RECORD + 1)
    if len(data) > LARGEST_RECORD:
        raise ValueError(f"it is larger than {LARGEST_RECORD // 2**20} MiB")
    return data.decode()


def _yaml(text: str) -> Any:
    # An alias can make a mapping hold itself, or ten lines stand for 10^10 entries.
    for event in yaml.parse(text, Loader=_SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it uses aliases (*name), which are not read here")
    return yaml.load(text, _SafeLoader)
