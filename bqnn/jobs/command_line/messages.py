"""Explain the errors of Hydra in one line, with a correction if there is one."""

import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException, OverrideParseException

from bqnn.jobs.command_line.arguments import group_choices, is_readable, quoted, read_arguments
from bqnn.jobs.command_line.configuration import config_dir, is_choice, unresolved
from bqnn.jobs.records import read_record
from bqnn.jobs.secrets import mask
from bqnn.jobs.terminal import describe
from bqnn.jobs.typed import command_line
from bqnn.settings.conf import leaves
from bqnn.settings.suggest import did_you_mean, nearest
from bqnn.text import one_line


def explain(error: Exception, verb: str) -> str:
    """Explain an error of the command line in one line, with a correction if there is one.

    Args:
        error: An exception, from Hydra or another library.
        verb: The name of the program.

    Returns:
        The line, without secrets.
    """
    if re.search("Could not (find|load) 'hydra/sweeper/optuna'", str(error)):
        return 'hydra/sweeper: it needs more packages; pip install "bqnn[optuna]"'
    if isinstance(error, OverrideParseException):
        return _in_quotes(error.override) or _line(str(error))
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        return _unknown_choice(error.missing_cfg_file, error.options)
    text = str(error)
    if "defaults list" in text:  # the group exists; + adds it
        return _line(text + _hint_for_preset())
    if match := re.match(r"Could not override '([^']+)'", text):
        hint = _hint_for_sweep(match[1]) if {"-m", "--multirun"} & set(sys.argv) else ""
        return _line(unknown_key(match[1], _known_keys(verb), verb) + hint)
    if text.startswith(("Config group override must be a string", "Error resolving interpolation")):
        return _no_choice() or _line(text)
    if match := re.search(
        r"Missing mandatory value: (\S+)|Interpolation key '(\S+)' not found", text
    ):
        return f"{match[1] or match[2]} is missing; give it on the command line"
    if match := re.search(r"hydra_plugins\.hydra_(joblib|ray|submitit)_launcher", text):
        extra = {"submitit": "slurm"}.get(match[1], match[1])
        return f'hydra/launcher: it needs more packages; pip install "bqnn[{extra}]"'
    if match := re.match(r"Ambiguous value for argument '(.*)'\n", text):
        return _in_quotes(match[1]) or _line(text)
    if not isinstance(error, HydraException):
        return describe(error)
    text = text.partition("Config search path")[0]  # omit the list of searched paths
    if error.__cause__ is not None:
        text += " " + str(error.__cause__).partition("\n")[0]
    return _line(text)


def unknown_key(key: str, known: Iterable[str], verb: str) -> str:
    """Report an unknown key, the most similar key, and the choices that have the key.

    Args:
        key: The unknown key.
        known: The known keys of values.
        verb: The name of the program.
    """
    known = {key[:end] for key in known for end in [*_dots(key), None]}
    group, _, rest = key.partition(".")
    having = [
        path.stem
        for path in sorted(config_dir().glob("*/*.yaml"))
        if path.parent.name == group and rest in dict(leaves(read_record(path)))
    ]
    hint = did_you_mean(key, known)
    if rest and having:
        hint = f"; {' and '.join(f'{group}={choice}' for choice in having)} would have it"
    part = "hydra" if group == "hydra" else "job"
    return f"{key}: there is no such key{hint} ({command_line(verb)} --cfg {part} shows all)"


def _line(text: str) -> str:
    return one_line(mask(text))


def _hint_for_preset() -> str:
    """Return a hint if a preset overrides a group that its verb does not have."""
    presets = [o for o in read_arguments().overrides if o.startswith("experiment=")]
    return f" ({presets[0]} may be a preset of another verb)" if presets else ""


def _unknown_choice(path: str, options: Sequence[str]) -> str:
    group, _, choice = path.rpartition("/")
    near = nearest(choice, options)
    hint = "" if near is None else f"; did you mean {group}={near}?"
    return _line(f"Could not find '{group}/{choice}'{hint} (there are {', '.join(options)})")


def _no_choice() -> str | None:
    """Return the correction of an override that removes a group or sets it to a non-choice."""
    for override in read_arguments().overrides:
        group, equals, value = override.partition("=")
        choices = group_choices(group)
        is_wrong = group[:1] == "~" or (equals and value not in choices and "," not in value)
        if choices and is_wrong:
            return _line(f"{override}: choose one of {', '.join(choices)}")
    return None


def _in_quotes(override: str) -> str | None:
    """Return how to quote an override whose value has characters that are syntax in Hydra.

    It is None if quotes would not help.
    """
    key, _, value = override.partition("=")
    cure = quoted(key, value.strip("'\""))
    if not is_readable(cure):
        return None
    return (
        f"{_line(override)}: outside of quotes, = , ( ) [ ] {{ }} and others are Hydra's own; "
        f"write {_line(shlex.quote(cure))}, or -m for a sweep over several values"
    )


def _dots(key: str) -> Iterator[int]:
    return (end for end, character in enumerate(key) if character == ".")


def _known_keys(verb: str) -> list[str]:
    """Return the configuration keys for the choices on the command line, ignoring its values."""
    arguments = read_arguments()
    folder = arguments.config_dir
    own = [] if folder is None else [f"hydra.searchpath=[{json.dumps(f'file://{folder}')}]"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        choices = [o for o in arguments.overrides if is_choice(o) and "," not in o]
        try:
            composed = compose(verb, [*own, *choices], return_hydra_config=True)
            return [key for key, _ in leaves(unresolved(composed))]
        except HydraException:
            return []


def _hint_for_sweep(key: str) -> str:
    """Return a hint for a missing key: Hydra composes a sweep without the swept choices."""
    return f"; if the choices that are swept have this key, write {key}=choice(<value>)"
