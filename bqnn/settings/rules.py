"""Rules for the types and ranges of values, each with a description for error messages."""

import keyword
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """A condition on a value.

    Attributes:
        words: The description of valid values, as in "choose {words}".
        holds: Whether a value is valid.

    Examples:
        >>> rule = maybe(whole(2, 8))
        >>> rule.words, rule.holds(None), rule.holds(9)
        ('null, or a whole number from 2 to 8', True, False)
    """

    words: str
    holds: Callable[[Any], bool]


def is_finite(value: object) -> bool:
    """Return whether a value is a number in the range of floats, unlike 10**400 and NaN."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def whole(least: int, most: int = 2**31 - 1) -> Rule:
    """Accept a whole number in a range that includes both bounds."""
    words = f"a whole number from {least} to {most}"
    return Rule(words, lambda value: type(value) is int and least <= value <= most)


def number() -> Rule:
    """Accept a finite number, of any size that floats can represent."""
    return Rule("a finite number", is_finite)


def flag() -> Rule:
    """Accept a boolean, which a configuration spells true or false."""
    return Rule("true or false", lambda value: type(value) is bool)


def text() -> Rule:
    """Accept a string of limited length, without lone surrogates."""
    return Rule(
        "a string of at most 4096 characters that are valid in UTF-8",
        lambda v: type(v) is str and len(v) <= 4096 and not re.search("[\ud800-\udfff]", v),
    )


def name() -> Rule:
    """Accept a string that is a valid name of a folder, and never a path to another one."""
    return Rule(
        "a name without slashes, a leading dot or unprintable characters, of at most 200 bytes",
        lambda value: (
            type(value) is str
            and 0 < len(value) <= 200
            and value.isprintable()  # excludes lone surrogates, too
            and len(value.encode()) <= 200
            and value[0] != "."
            and not set("/\\") & set(value)
        ),
    )


def one_of(*choices: str | int) -> Rule:
    """Accept one of the given strings or integers."""
    words = " or ".join(map(str, choices))
    return Rule(words, lambda value: type(value) in (str, int) and value in choices)


def many(rule: Rule, most: int) -> Rule:
    """Accept a list of at most `most` entries that satisfy a rule."""
    return Rule(
        f"at most {most} entries, each {rule.words}",
        lambda value: (
            type(value) is list and len(value) <= most and all(rule.holds(entry) for entry in value)
        ),
    )


def either(*rules: Rule) -> Rule:
    """Accept a value that satisfies at least one of the rules."""
    words = ", or ".join(rule.words for rule in rules)
    return Rule(words, lambda value: any(rule.holds(value) for rule in rules))


def maybe(rule: Rule) -> Rule:
    """Accept None, or a value that satisfies a rule."""
    return Rule(f"null, or {rule.words}", lambda value: value is None or rule.holds(value))


def is_option(key: object) -> bool:
    """Return whether a key can be a public argument of a constructor."""
    return type(key) is str and key.isidentifier() and len(key) <= 60 and key[0] != "_"


def target() -> Rule:
    """Accept the dotted path of a class or function in a module that may be imported.

    The modules of Python are excluded: none has a network, and some run commands.
    """
    return Rule(
        "the dotted path of a class or function outside of Python's own modules, such as "
        "my_package.MyNet",
        lambda value: (
            type(value) is str
            and len(value) <= 200
            and len(parts := value.split(".")) > 1
            and all(part.isidentifier() and part.isascii() and part[0] != "_" for part in parts)
            and not any(map(keyword.iskeyword, parts))
            and parts[0] not in sys.stdlib_module_names
        ),
    )


def plain() -> Rule:
    """Accept JSON types of limited depth and size, whose keys are names of arguments."""
    return Rule(
        "null, true, false, a finite number, a string, or lists and dictionaries of these",
        _is_plain,
    )


def _is_plain(value: object, deepest: int = 8, most: int = 10_000) -> bool:
    parts = [(value, 0)]
    while parts:
        value, depth = parts.pop()
        most -= 1
        if type(value) is list or type(value) is dict:
            if depth == deepest or len(value) > most:
                return False
            if type(value) is dict and not all(map(is_option, value)):
                return False
            inner = value.values() if type(value) is dict else value
            parts += [(part, depth + 1) for part in inner]
        elif not (value is None or type(value) is bool or is_finite(value) or _TEXT.holds(value)):
            return False
        if most < len(parts):
            return False
    return True


_TEXT = text()

# An option of your own method, network or optimizer, whose constructor checks it.
NUMBER = either(
    whole(-10_000_000, 10_000_000),
    Rule("a finite float", lambda value: type(value) is float and is_finite(value)),
)
OPTION = maybe(either(flag(), NUMBER, name(), many(NUMBER, 256)))

SIZE = whole(1, 65_536)  # of a layer
COUNT = whole(0)
DRAWN = whole(1, 10_000_000)  # synthetic rows in memory


def real(least: float, most: float = math.inf, without: tuple[float, ...] = ()) -> Rule:
    """Accept a finite number in a range; `without` are the bounds that it excludes."""
    words = "a finite number"
    if least > -math.inf:
        words += f" above {least:g}" if least in without else f", {least:g} or more"
    if most < math.inf:
        words += f", below {most:g}" if most in without else f", at most {most:g}"
    return Rule(words, lambda value: _is_between(value, least, most) and value not in without)


def _is_between(value: object, least: float, most: float) -> bool:
    # The bounds also exclude integers beyond the range of floats.
    return type(value) in (int, float) and -1.7e308 < value < 1.7e308 and least <= value <= most  # type: ignore[operator]


def indices() -> Rule:
    """Numbers of devices in a string, as Lightning accepts them."""
    return Rule(
        'a string such as "0,1"',
        lambda value: type(value) is str and re.fullmatch(r"\d+(,\d+)*,?", value) is not None,
    )


def duration() -> Rule:
    """Accept a positive length of time, as Lightning accepts it."""
    return Rule(
        "a string such as 00:01:30:00 (days:hours:minutes:seconds), more than zero",
        lambda value: (
            type(value) is str
            and re.fullmatch(r"\d{2,}(:\d\d){3}", value) is not None
            and re.search("[1-9]", value) is not None
        ),
    )


PATH = Rule("a path, in quotes if it looks like a number or a list", text().holds)
ANY = real(-math.inf)
POSITIVE = real(0, without=(0,))
NOT_NEGATIVE = real(0)
SHARE = real(0, 1, without=(1,))
SEED = whole(0, 2**63 - 1)
DRAWS = whole(1, 100_000)
WIDTH = whole(2, 8)  # in bits
EVERY = whole(1)
