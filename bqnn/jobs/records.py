"""Read small JSON and YAML files from untrusted sources."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from bqnn.files import open_regular
from bqnn.jobs.plain_yaml import LONGEST_NUMBER, TWICE, parse_similar_yaml, parse_yaml
from bqnn.text import one_line

LARGEST_JSON, LARGEST_YAML = 16 * 2**20, 2**20  # bytes; parsing YAML takes a second per MiB


def read_record(path: Path, has_similar: bool = False) -> dict[str, Any]:
    """Read a JSON object, or a YAML mapping if the suffix of the file is `.yaml`.

    Args:
        path: The file, at most 16 MiB of JSON or 1 MiB of YAML.
        has_similar: Whether many YAML files with equal entries are read, which are then shared: the
            caller must not change them.

    Returns:
        The object, with strings as keys.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a regular file, is not readable, is too large, is not UTF-8, is
            not JSON or YAML, is nested too deeply, uses YAML aliases, merges or tags, repeats a
            key, has a number of more than 1000 characters, or does not hold an object with strings
            as keys. The message is one line.
    """
    try:
        is_yaml = path.suffix == ".yaml"
        text = _text(path, LARGEST_YAML if is_yaml else LARGEST_JSON)
        parse = parse_similar_yaml if has_similar else parse_yaml
        record = parse(text) if is_yaml else _json(text)
    except FileNotFoundError:
        raise
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror or error}") from error
    except (ValueError, OverflowError, yaml.YAMLError) as error:
        raise ValueError(f"{path.name} cannot be read: {one_line(str(error))[:300]}") from error
    if not isinstance(record, dict) or not all(type(key) is str for key in record):
        raise ValueError(f"{path.name} is not an object with names as keys")
    return record


def instant(value: object) -> datetime | None:
    """Parse an ISO 8601 timestamp.

    Unlike their texts, times of different UTC offsets compare correctly.

    Args:
        value: The timestamp. A timestamp without an offset is in UTC.

    Returns:
        The time in UTC, or None if the value is not a timestamp.
    """
    if type(value) is not str:
        return None
    try:
        time = datetime.fromisoformat(value)
        # Convert to UTC here: the conversion overflows near the years 1 and 9999.
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _text(path: Path, largest: int) -> str:
    with open_regular(path) as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"it is larger than {largest // 2**20} MiB")
    return data.decode()


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_named_once, parse_int=_whole)


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) < len(pairs):
        raise ValueError(TWICE)
    return named


def _whole(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"it has a number of {len(digits)} characters")
    return int(digits)
