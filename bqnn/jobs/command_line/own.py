"""Command lines that name a method, a network or a data set of another package."""

from bqnn.settings.conf import NAME_KEYS, built_in


def choose_own(arguments: list[str]) -> list[str]:
    """Complete the overrides of groups that name a plug-in.

    Such a group is composed from conf/<group>/own.yaml, so that it does not inherit the options of
    a class of bqnn. Its overrides get the prefix `++`, because own.yaml cannot list the options.

    Args:
        arguments: The arguments of the command line.

    Returns:
        The arguments for Hydra. They stay as they are if no group names a plug-in, or if this
        function has returned them before.

    Examples:
        >>> choose_own(["net._target_=my_package.MyNet", "net.width=32"])
        ['net=own', '++net._target_=my_package.MyNet', '++net.width=32']
    """
    for group in NAME_KEYS:
        keys = [argument.partition("=")[0].lstrip("+") for argument in arguments]
        of_group = [place for place, key in enumerate(keys) if key.startswith(f"{group}.")]
        if not any(_names_plugin(arguments[place], group) for place in of_group):
            continue
        completed = [
            f"++{argument.lstrip('+')}" if place in of_group else argument
            for place, argument in enumerate(arguments)
        ]
        if group not in keys:
            completed.insert(of_group[0], f"{group}=own")
        arguments = completed
    return arguments


def _names_plugin(argument: str, group: str) -> bool:
    """Return whether an override sets a path, or a name that bqnn does not have."""
    key, _, value = argument.lstrip("+").partition("=")
    names = value.replace("'", "").replace('"', "").split(",")
    is_name = key == f"{group}.{NAME_KEYS[group]}" and not set(names) <= set(built_in(group))
    return is_name or key == f"{group}._target_"
