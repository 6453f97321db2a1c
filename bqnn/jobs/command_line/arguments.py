"""Parse and check the command line, before Hydra composes a configuration from it."""

import argparse
import re
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from bqnn.jobs.command_line.configuration import config_dir
from bqnn.jobs.secrets import mask
from bqnn.jobs.typed import command_line, program
from bqnn.text import one_line

# The key of an override, of a value or of a group, with its prefix, as Hydra accepts it.
KEY = re.compile(r"(\+\+?|~)?[\w$][\w$./@:-]*")


class UsageError(Exception):
    """The command line has unknown options, or options in the wrong order."""


def read_arguments() -> argparse.Namespace:
    """Parse the command line of this process with the parser of Hydra.

    Returns:
        The options and, as `overrides`, the list of all key=value.

    Raises:
        UsageError: An option is unknown, or follows a key=value.
    """

    def refuse(message: str) -> NoReturn:
        _, options, rest = message.rpartition("unrecognized arguments: ")
        remedy = "--help and --hydra-help tell what there is"
        if options and not any(word.startswith("-") for word in rest.split()):
            remedy = "write options, such as -m, before all that has the form key=value"
        raise UsageError(f"{one_line(mask(message))}; {remedy}")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_args()


def refuse_malformed(arguments: argparse.Namespace, verb: str) -> None:
    """Refuse arguments that Hydra would report unclearly, or would not check.

    Args:
        arguments: The arguments from `read_arguments`.
        verb: The name of the program.

    Raises:
        ValueError: An option cannot be used here, or an override is not key=value.
    """
    if arguments.experimental_rerun is not None:
        raise ValueError(
            "--experimental-rerun: it would unpickle a file, which can run any code; write the "
            "overrides again, with resume=true to resume a run"
        )
    if arguments.config_name is not None or arguments.config_path is not None:
        raise ValueError(
            f"--config-name, --config-path: {program(verb)} reads conf/{verb}.yaml; leave them "
            "out, and add choices of your own with --config-dir"
        )
    for override in arguments.overrides:
        key, equals, value = override.partition("=")
        shown = one_line(mask(override)) or "''"
        if not KEY.fullmatch(key) or not (equals or key.startswith("~")):
            raise ValueError(
                f"{shown}: write it as key=value, with a key of letters ({command_line(verb)} "
                "--cfg job shows all)"
            )
        if equals and not value and (choices := group_choices(key)):
            raise ValueError(f"{shown}: choose one of {', '.join(choices)}")


def group_choices(group: str) -> list[str]:
    """Return the sorted choices of a group of conf/; empty if there is no such group.

    Args:
        group: The key of the group, with or without a prefix.

    Examples:
        >>> "smoke" in group_choices("+trainer")
        True
    """
    return sorted(path.stem for path in (config_dir() / group.lstrip("+~")).glob("*.yaml"))


def is_readable(override: str) -> bool:
    """Return whether Hydra can parse an override.

    Examples:
        >>> is_readable("method=bbb"), is_readable("checkpoint=a=b")
        (True, False)
    """
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def quoted(key: str, value: str) -> str:
    """Return an override with its value in quotes, in which no character is syntax of Hydra.

    Examples:
        >>> quoted("checkpoint", "a=b")
        'checkpoint="a=b"'
    """
    escaped = value.replace('"', '\\"')
    return f'{key}="{escaped}"'
