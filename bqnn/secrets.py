"""Keys and passwords of the environment stay out of what a job writes."""

import os
import re
from collections.abc import Iterator

SECRET = re.compile("KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def refuse_secrets(config: object) -> None:
    """ValueError where a value of the configuration holds one of the environment's secrets.

    config.yaml, checkpoints and Weights & Biases would keep it. Secret is what has such a name, and
    eight characters or more.
    """
    secrets = {
        name: value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= 8
    }
    for key, text in _texts(config, ""):
        for name, value in secrets.items():
            if value in text:
                raise ValueError(
                    f"{key} holds the environment's {name}, which would be written to config.yaml; "
                    "remove it from the configuration, the environment is enough"
                )


def _texts(value: object, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _texts(entry, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry, key)
    elif isinstance(value, str):
        yield key, value
