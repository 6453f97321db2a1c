"""Plug-ins: methods, networks and data sets that other packages provide.

A configuration names a plug-in by its path (`net._target_=my_package.MyNet`) or by an entry point
(`net.name=mynet`) that its package declares in its pyproject.toml:

    [project.entry-points."bqnn.nets"]
    mynet = "my_package:MyNet"
"""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from inspect import isfunction
from typing import Any

from bqnn.settings.conf import NAME_KEYS
from bqnn.settings.suggest import did_you_mean
from bqnn.text import one_line, short, type_of

# The groups of a configuration, and the entry points for each.
ENTRY_POINTS = {"method": "bqnn.methods", "net": "bqnn.nets", "task": "bqnn.data"}


def find_class(
    group: str, options: Mapping[str, Any], own: Mapping[str, Callable[..., Any]], base: type
) -> Callable[..., Any]:
    """Find the class that a group of a configuration names, and import it if it is a plug-in.

    Importing runs the code of the plug-in. Call `foreign` first if the options come from a
    checkpoint.

    Args:
        group: method, net or task.
        options: The group. `_target_` names the class; without it, `name` (`dataset` in a task) is
            a key of `own` or an entry point.
        own: bqnn's own classes by name.
        base: The class that a plug-in must inherit from. A network can also come from a function.

    Returns:
        The class or function.

    Raises:
        ValueError: The name is unknown, or the plug-in cannot be imported or is of another kind.

    Examples:
        >>> from torch import nn
        >>> find_class("net", {"name": "line", "_target_": "torch.nn.Linear"}, {}, nn.Module)
        <class 'torch.nn.modules.linear.Linear'>
    """
    key = NAME_KEYS[group]
    if "_target_" in options:
        target = options["_target_"]
        named, load = f"{group}._target_={target}", lambda: _import(target)
    elif options.get(key) in own:
        return own[options[key]]
    elif entry := _entry_point(group, options):
        named, load = f"{group}.{key}={entry.name} ({entry.value})", entry.load
    else:
        raise ValueError(_unknown(group, str(options.get(key)), own))
    found = _loaded(named, load)
    if not _is_kind(found, group, base):
        kind = "a class" if isinstance(found, type) else type_of(found)
        maker = f", or of a function that returns a {base.__name__}" if group == "net" else ""
        raise ValueError(
            f"{named}: it is {kind}; give the path of a subclass of "
            f"{base.__module__}.{base.__name__}{maker}"
        )
    return found


def foreign(
    group: str, options: Mapping[str, Any], own: Mapping[str, Callable[..., Any]]
) -> str | None:
    """Return what `find_class` would import for a group, or None if it imports nothing.

    This function imports nothing itself.

    Examples:
        >>> foreign("net", {"name": "MyNet", "_target_": "my_package.MyNet"}, {})
        'my_package.MyNet'
    """
    if "_target_" in options:
        return str(options["_target_"])
    if options.get(NAME_KEYS[group]) in own:
        return None
    entry = _entry_point(group, options)
    return None if entry is None else entry.value


def refuse_foreign(
    groups: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Callable[..., Any]]]], where: str
) -> None:
    """Refuse groups of an untrusted checkpoint that name plug-ins, before any is imported.

    Args:
        groups: The options of each group, and bqnn's own classes by name.
        where: The checkpoint, for the error message.

    Raises:
        ValueError: A group names a plug-in.
    """
    found = {group: foreign(group, options, own) for group, (options, own) in groups.items()}
    named = [f"{group} is {short(path, 200)}" for group, path in found.items() if path is not None]
    if named:
        raise ValueError(
            f"{where}: its {', its '.join(named)}; opening it would import and run this code; if "
            "you trust the checkpoint and the code, add trust=true (in Python, trust=True)"
        )


def _loaded(named: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # a module can raise anything
        reason = one_line(f"{type(error).__name__}: {error}")[:300]
        raise ValueError(
            f"{named}: cannot be imported ({reason}); check its name, install its package, or add "
            "its folder to PYTHONPATH"
        ) from error


def _import(target: str) -> object:
    module, _, name = target.rpartition(".")
    return getattr(import_module(module), name)


def _entry_point(group: str, options: Mapping[str, Any]) -> EntryPoint | None:
    """Return the entry point with the name in a group; the first one, as for imports."""
    name = str(options.get(NAME_KEYS[group]))
    return next(iter(entry_points(group=ENTRY_POINTS[group], name=name)), None)


def _is_kind(found: object, group: str, base: type) -> bool:
    if isinstance(found, type):
        return issubclass(found, base)
    root = str(getattr(found, "__module__", "")).partition(".")[0]
    return group == "net" and isfunction(found) and root not in sys.stdlib_module_names


def _unknown(group: str, name: str, own: Mapping[str, Callable[..., Any]]) -> str:
    names = [*own, *(entry.name for entry in entry_points(group=ENTRY_POINTS[group]))]
    hint = did_you_mean(name, names)
    rest = "" if hint else ", or install the package that provides it"
    return (
        f"{group}.{NAME_KEYS[group]}={short(name)}: unknown{hint or ';'} choose one of "
        f"{', '.join(names)}{rest}"
    )
