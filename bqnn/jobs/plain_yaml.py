"""Parse YAML of plain values in one pass, as `yaml.safe_load` would."""

import re
from functools import lru_cache
from typing import Any

import yaml

LONGEST_NUMBER = 1000  # characters
DEEPEST = 200  # nested mappings and lists
TWICE = "a name is there twice in it"

_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NUMBER = re.compile(rf"[-+.:_xXa-fA-F0-9]{{{LONGEST_NUMBER + 1},}}")
# Where an entry of the outermost mapping starts; a directive, or an end of a document.
_ENTRY = re.compile("^(?=[A-Za-z_])", re.MULTILINE)
_MARK = re.compile(r"(?:^|[\r\x85\u2028\u2029])(?:%|---|\.\.\.)", re.MULTILINE)
_NOTHING = object()


def parse_yaml(text: str) -> Any:
    """Parse YAML from an untrusted source.

    Args:
        text: The text.

    Returns:
        The value of the document, or None if there is none.

    Raises:
        ValueError: There are several documents, aliases, tags, merges or keys that are not scalars,
            a key is repeated, or a number has more than 1000 characters.
        yaml.YAMLError: It is not YAML.
        RecursionError: It is nested more than 200 deep.

    Examples:
        >>> parse_yaml("a: [1, x]")
        {'a': [1, 'x']}
    """
    builder = _Builder()
    for event in yaml.parse(text, Loader=_Parser):
        builder.take(event)
    return None if builder.root is _NOTHING else builder.root


def parse_similar_yaml(text: str) -> Any:
    r"""Do what `parse_yaml` does, in less time for many texts that have entries in common.

    Equal entries of the mappings of several texts are the same object, so that callers must not
    change them.

    Examples:
        >>> texts = ("seed: 1\nnet: {a: 2}", "seed: 2\nnet: {a: 2}")
        >>> first, second = map(parse_similar_yaml, texts)
        >>> second, second["net"] is first["net"]
        ({'seed': 2, 'net': {'a': 2}}, True)
    """
    head, *entries = _ENTRY.split(text)
    if head or not entries or _MARK.search(text):
        return parse_yaml(text)
    merged: dict[str, Any] = {}
    try:
        for entry in entries:
            merged |= _parse_entry(entry)
    except (ValueError, RecursionError, yaml.YAMLError):
        return parse_yaml(text)  # its errors are those of the whole text
    return merged if len(merged) == len(entries) else parse_yaml(text)


@lru_cache(maxsize=256)
def _parse_entry(text: str) -> dict[str, Any]:
    entry = parse_yaml(text)
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ValueError("it is not one entry of a mapping")
    return entry


class _Builder:
    """Builds the value of a document from events of the parser."""

    def __init__(self) -> None:
        self.root: Any = _NOTHING
        self.open: list[tuple[Any, set[str]]] = []  # containers, and the keys of mappings
        self.keys: list[Any] = []  # per open container: the key that waits for its value

    def take(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.ScalarEvent):
            self._scalar(event)
        elif isinstance(event, yaml.CollectionStartEvent):
            _refuse_tag(event)
            if len(self.open) == DEEPEST:
                raise RecursionError
            self.open.append(({} if isinstance(event, yaml.MappingStartEvent) else [], set()))
            self.keys.append(_NOTHING)
        elif isinstance(event, yaml.CollectionEndEvent):
            self.keys.pop()
            value, _ = self.open.pop()
            self._place(value)
        # An alias can make a mapping contain itself, or expand ten lines to 10^10 entries.
        elif isinstance(event, yaml.AliasEvent):
            raise ValueError("it uses aliases (*name), which are not read here")
        elif isinstance(event, yaml.DocumentStartEvent) and self.root is not _NOTHING:
            raise ValueError("it has several documents")

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        _refuse_tag(event)
        text: str = event.value
        # Parsing some numbers, such as 1:59:59:59..., takes quadratic time.
        if len(text) > LONGEST_NUMBER and _NUMBER.fullmatch(text):
            raise ValueError(f"it has a number of {len(text)} characters")
        value = _value(text) if event.implicit[0] else text
        if not self._waits_for_key():
            self._place(value)
            return
        _, names = self.open[-1]
        if text == "<<" and event.implicit[0]:
            raise ValueError("it uses merges (<<), which are not read here")
        if text in names:
            raise ValueError(TWICE)
        names.add(text)
        self.keys[-1] = value

    def _place(self, value: Any) -> None:
        if not self.open:
            self.root = value
            return
        container, _ = self.open[-1]
        if isinstance(container, list):
            container.append(value)
        elif self._waits_for_key():
            raise ValueError("it has a list or a mapping as a name")
        else:
            container[self.keys[-1]] = value
            self.keys[-1] = _NOTHING

    def _waits_for_key(self) -> bool:
        return bool(self.open) and isinstance(self.open[-1][0], dict) and self.keys[-1] is _NOTHING


def _refuse_tag(event: Any) -> None:
    if event.tag is not None:  # a tag can be invalid for its text
        raise ValueError("it uses tags (!name), which are not read here")


@lru_cache(maxsize=4096)
def _value(text: str) -> Any:
    """Return the value of a scalar without quotes, which cannot be changed."""
    tag = _resolver.resolve(yaml.ScalarNode, text, (True, False))
    return _constructor.construct_object(yaml.ScalarNode(tag, text))


_resolver, _constructor = yaml.resolver.Resolver(), yaml.constructor.SafeConstructor()
