"""Make untrusted text safe for terminals, error messages and names."""

import re
import unicodedata

LONGEST_NAME = 128  # the limit of Weights & Biases for names of artifacts, groups and runs


def printable(text: str) -> str:
    r"""Escape every character that a terminal could interpret, as in ``\x1b``.

    This includes line breaks and tabs, so the result is one line. It also includes characters that
    change the writing direction, and lone surrogates, which represent bytes of a file name that are
    not UTF-8.

    Examples:
        >>> printable("tables\x1b[2J\nof mine")
        'tables\\x1b[2J\\nof mine'
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def one_line(text: str) -> str:
    """Collapse white space to single spaces and escape the rest with `printable`.

    Examples:
        >>> one_line("a list:\\n\\t[1,\\n\\t 2]")
        'a list: [1, 2]'
    """
    return printable(" ".join(text.split()))


def short(value: object, length: int = 60) -> str:
    """Describe an untrusted value for an error message.

    Strings and numbers are shown. Every other value is described by its type and size, because its
    repr can take exponential time or memory (a list that contains itself many times, an expanded
    tensor).

    Args:
        value: The value to describe.
        length: The number of characters of a string that are shown.

    Returns:
        One printable line.

    Examples:
        >>> short("w8a7"), short(4.5), short([1, 2, 3])
        ("'w8a7'", '4.5', 'a list of 3')
    """
    if value is None or type(value) in (bool, float):
        return repr(value)
    if type(value) is int:
        # str() refuses more than 4300 digits, and is quadratic below that.
        return str(value) if value.bit_length() < 200 else f"a number of {value.bit_length()} bits"
    if type(value) is str:
        cut = value if len(value) <= length else value[: length - 3] + "..."
        return f"'{printable(cut)}'"
    kind = type_of(value)
    if type(value) in (list, tuple, dict, set, bytes, bytearray):
        return f"{kind} of {len(value)}"  # type: ignore[arg-type]
    return kind


def type_of(value: object) -> str:
    """Name the type of a value for an error message, with an article.

    Examples:
        >>> type_of(3), type_of([])
        ('an int', 'a list')
    """
    return with_article(printable(type(value).__name__))


def with_article(name: str) -> str:
    """Put "a" or "an" before the name of a class, as it is spoken.

    Examples:
        >>> with_article("int"), with_article("LSTM"), with_article("Linear")
        ('an int', 'an LSTM', 'a Linear')
    """
    is_spelled = name[1:2].isupper() and name[:1] in "AEFHILMNORSX"
    is_vowel = name[:1] in "AEIOaeio" or name.lower().startswith(("un", "up"))
    return f"{'an' if is_spelled or is_vowel else 'a'} {name}"


def counted(number: int, noun: str) -> str:
    """Put a number before a noun in the singular, to which "s" (or "es") is added unless it is 1.

    Examples:
        >>> counted(1, "column"), counted(2, "column"), counted(3, "class")
        ('1 column', '2 columns', '3 classes')
    """
    plural = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"


def valid_name(text: str, length: int = LONGEST_NAME) -> str:
    """Convert text to a valid name of a file, a folder or a Weights & Biases object.

    Accents are removed. Each sequence of characters other than ASCII letters, digits, dots, dashes
    and underscores becomes one dash. Dots and dashes at both ends are removed.

    Args:
        text: Any text.
        length: The maximum number of characters.

    Returns:
        The name, or "unnamed" if no character is left.

    Examples:
        >>> valid_name("/home/me/my table.csv"), valid_name("Übung 1"), valid_name("…")
        ('home-me-my-table.csv', 'Ubung-1', 'unnamed')
    """
    plain = unicodedata.normalize("NFKD", text)
    plain = "".join(character for character in plain if not unicodedata.combining(character))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain)
    return name.strip(".-")[:length].strip(".-") or "unnamed"
