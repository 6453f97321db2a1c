"""Keep keys and passwords of the environment out of files and output."""

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from urllib.parse import quote

from bqnn.settings.conf import published

# Variables with a matching name hold a secret. The second half matches the ends of words only, so
# that KEYBOARD and PATH do not match.
SECRET = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTHORIZATION"
    r"|(KEYS?|PASS|PWD|AUTH|CREDS?|JWT|COOKIE|DSN|(?<![A-Z])PAT)(?![A-Z])",
    re.IGNORECASE,
)
WORKING_FOLDERS = ("PWD", "OLDPWD")
WHERE = re.compile("(SOCK|SOCKET|FILE|PATH|DIR|HOME)$", re.IGNORECASE)  # holds a path, not a secret
PASSWORD_IN_URL = re.compile(r"://[^/\s:@]*:([^/\s@]+)@")
LEAST_LENGTH = 8  # characters; shorter values occur by chance


def mask(text: str) -> str:
    """Replace each secret of an environment variable NAME by `<NAME>`.

    Secrets are also replaced inside longer words, if they are percent-encoded as in an address,
    and if they are escaped as in JSON or Python.

    Args:
        text: Any text.

    Returns:
        The text without secrets.
    """
    for name, pattern in _secrets():
        text = pattern.sub(f"<{name}>", text)
    return text


def refuse_secrets(config: object, references: bool = True) -> None:
    """Refuse a configuration that holds one of the environment's secrets.

    config.yaml, multirun.yaml, checkpoints and Weights & Biases would store it. Secrets are the
    values of variables whose names match `SECRET`, and the passwords in addresses
    (https://me:password@host) in any variable. A secret has at least eight characters and does not
    occur in the files of conf/.

    Args:
        config: Nested dictionaries and lists. Keys, strings and numbers are checked.
        references: Whether to refuse a reference `${oc.env:NAME}` to a secret, too.

    Raises:
        ValueError: The configuration holds a secret. The message names the key and the variable,
            not the value.
    """
    secrets = list(_secrets())
    for key, text in _texts(config, ""):
        for name, pattern in secrets:
            is_named = references and re.search(rf"oc\.env:\s*{re.escape(name)}\b", text)
            if is_named or pattern.search(text):
                raise ValueError(
                    f"{mask(key)} holds the environment's {name}, which would be written to "
                    "config.yaml; remove it from the configuration, the environment is enough"
                )


def is_secret_name(name: str) -> bool:
    """Return whether a variable holds a secret, by its name.

    Args:
        name: The name of the environment variable.
    """
    return SECRET.search(name) is not None and name not in WORKING_FOLDERS


def _secrets() -> Iterator[tuple[str, re.Pattern[str]]]:
    for name, value in os.environ.items():
        for part in _secret_parts(name, value):
            yield name, _pattern(part)


@functools.cache
def _secret_parts(name: str, value: str) -> list[str]:
    """Return the secrets in a variable: each line of a secret, or the password in an address."""
    parts = PASSWORD_IN_URL.findall(value)
    is_path = os.path.isabs(value) and (WHERE.search(name) or os.path.exists(value))
    if is_secret_name(name) and not is_path:
        parts += [line.strip() for line in value.splitlines() if not line.startswith("-----")]
    long_enough = [part for part in parts if len(part) >= LEAST_LENGTH]
    return [part for part in long_enough if part not in published()]


@functools.cache
def _pattern(secret: str) -> re.Pattern[str]:
    """Compile a pattern that matches a secret in any mixture of encodings of its characters."""
    return re.compile("".join(map(_spellings, secret)))


def _spellings(character: str) -> str:
    encoded = "".join(f"%{byte:02x}" for byte in character.encode(errors="surrogateescape"))
    texts = {character, f"\\{character}", json.dumps(character)[1:-1]}
    texts |= {character.encode("unicode_escape").decode(), quote(character, errors="replace")}
    plus = {"+"} if character == " " else set()
    ways = sorted(map(re.escape, texts | plus), key=len, reverse=True)
    return f"(?:{'|'.join(ways)}|(?i:{encoded}))"


def _texts(value: object, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, entry in value.items():
            path = f"{key}.{name}".lstrip(".")
            yield path, str(name)
            yield from _texts(entry, path)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry, key)
    elif value is not None and not isinstance(value, bool):
        yield key, str(value)
