"""Text that came from outside, made fit for a terminal, a message or a name."""

import re
import unicodedata

LONGEST_NAME = 128  # what Weights & Biases takes for an artifact, a group or a run


def printable(text: str) -> str:
    r"""The text with every character that a terminal could act on escaped, as in ``\x1b``.

    Line breaks and tabs are escaped as well, so the result is one line. Lone surrogates, which
    stand for bytes of a file name that are not UTF-8, and characters that change the direction of
    writing are escaped, too.

    >>> printable("tables\x1b[2J\nof mine")
    'tables\\x1b[2J\\nof mine'
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def one_line(text: str) -> str:
    """The text in one line that a terminal can show: white space folded, the rest `printable`.

    >>> one_line("a list:\\n\\t[1,\\n\\t 2]")
    'a list: [1, 2]'
    """
    return printable(" ".join(text.split()))


def short(value: object, length: int = 60) -> str:
    """A stranger's value for an error message, in at most about `length` characters.

    Only texts and numbers are shown. Of anything else the message names the type and the size: its
    repr can take exponential time or memory (a list that holds itself many times, an expanded
    tensor).

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
    kind = printable(type(value).__name__)
    if type(value) in (list, tuple, dict, set, bytes, bytearray):
        return f"a {kind} of {len(value)}"  # type: ignore[arg-type]
    return f"a {kind}"


def valid_name(text: str, length: int = LONGEST_NAME) -> str:
    """A name for a file, a folder, or an artifact, tag, group or run of Weights & Biases.

    Accents are dropped; every other run of characters than ASCII letters, digits, dots, dashes and
    underscores becomes one dash; dots and dashes at the ends are cut, and so is what exceeds
    `length`. The name of nothing is "unnamed".

    >>> valid_name("/home/me/my table.csv"), valid_name("Übung 1"), valid_name("…")
    ('home-me-my-table.csv', 'Ubung-1', 'unnamed')
    """
    plain = unicodedata.normalize("NFKD", text)
    plain = "".join(character for character in plain if not unicodedata.combining(character))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain)
    return name.strip(".-")[:length].strip(".-") or "unnamed"
