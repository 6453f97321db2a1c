"""Read small JSON and YAML files from untrusted sources."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from bqnn.files import open_regular
from bqnn.text import one_line

LARGEST_JSON, LARGEST_YAML = 16 * 2**20, 2**20  # bytes; YAML takes two seconds per MiB
LONGEST_NUMBER = 1000  # characters
TWICE = "a name is there twice in it"

_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NUMBER = rf"[-+.:_xXa-fA-F0-9]{{{LONGEST_NUMBER + 1},}}"


def read_record(path: Path) -> dict[str, Any]:
    """Read the object of a JSON file, or the mapping of a YAML file (`.yaml`).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: In one line: it is no regular file, is not readable, is too large, is not
            UTF-8, is not JSON (YAML), is nested too deeply, uses aliases or tags of YAML, has a
            name twice or a number of more than 1000 characters, or holds anything but an object
            with texts as keys.
    """
    try:
        is_yaml = path.suffix == ".yaml"
        text = _text(path, LARGEST_YAML if is_yaml else LARGEST_JSON)
        record = _yaml(text) if is_yaml else _json(text)
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
    """Parse an ISO 8601 timestamp; return None for anything else.

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


def _yaml(text: str) -> Any:
    for event in yaml.parse(text, Loader=_SafeLoader):
        # An alias can make a mapping hold itself, or ten lines stand for 10^10 entries.
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it uses aliases (*name), which are not read here")
        if getattr(event, "tag", None) is not None:  # of a text that it does not suit
            raise ValueError("it uses tags (!name), which are not read here")
        # Some take quadratic time to become a number, as 1:59:59:59... does.
        if isinstance(event, yaml.ScalarEvent) and re.fullmatch(_NUMBER, event.value):
            raise ValueError(f"it has a number of {len(event.value)} characters")
    loader = _SafeLoader(text)
    try:
        root = loader.get_single_node()
        _require_named_once(root)
        return None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


def _require_named_once(root: yaml.Node | None) -> None:
    nodes: list[yaml.Node | None] = [root]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(names)) < len(names):
                raise ValueError(TWICE)
            nodes += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
