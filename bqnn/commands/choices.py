"""Check that the names in a configuration exist, and that their classes accept the options.

The check runs before a job starts, so a mistyped name or option leaves no files behind.
"""

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any

from bqnn.checkpoints.recipe import start_keys
from bqnn.checkpoints.schema import check_recipe
from bqnn.data import DATASETS
from bqnn.data.task import TRAINING_KEYS
from bqnn.methods import METHODS
from bqnn.nets import NETS
from bqnn.optim import OPTIMIZERS
from bqnn.quant.callback import quantization_callbacks
from bqnn.settings.conf import leaves
from bqnn.settings.suggest import did_you_mean
from bqnn.text import short

# Arguments that the program passes, so that no configuration may have them.
GIVEN = {
    "method": ("net", "likelihood", "num_train", "seed"),
    "net": ("input_shape", "heads"),
    "task": ("data_dir", "seed"),
    "optimizer": ("params", "num_train", "num_burn_in_steps", "fused", "foreach", "capturable"),
}


def check_training(config: Mapping[str, Any]) -> None:
    """Check everything that `train.py` builds from its configuration.

    Args:
        config: The resolved configuration.

    Raises:
        ValueError: A name or an option is unknown, missing or invalid. The message has a suggestion
            if a valid name is similar.
    """
    more = ("name", *start_keys(str(config["method"].get("name"))))
    _check_group("method", "name", config["method"], METHODS, more)
    _check_group("net", "name", config["net"], NETS, more=("name",))
    _check_group("task", "dataset", config["task"], DATASETS, more=TRAINING_KEYS)
    check_optimizer("method.optimizer", config["method"].get("optimizer", {}))
    quantization_callbacks(config["quant"])
    groups = {group: config[group] for group in ("seed", "method", "net", "task")}
    facts = {"likelihood": "regression", "input_shape": [1], "num_train": 1}
    try:
        check_recipe({"version": 1, "stage": "float", **groups, "facts": facts})
    except ValueError as error:
        raise ValueError(str(error).removeprefix("recipe.")) from None


def check_optimizer(key: str, options: Mapping[str, Any]) -> None:
    """Check the name and the options of the optimizer at a key of the configuration.

    Raises:
        ValueError: The name or an option is unknown.
    """
    _check_group(key, "name", options, OPTIMIZERS, more=("name",))


def _check_group(
    group: str,
    name_key: str,
    options: Mapping[str, Any],
    table: Mapping[str, Callable[..., Any]],
    more: tuple[str, ...],
) -> None:
    name = str(options.get(name_key))
    if name not in table:
        hint = did_you_mean(name, table)
        raise ValueError(
            f"{group}.{name_key}={short(name)}: unknown{hint or ';'} choose one of "
            f"{', '.join(table)}"
        )
    accepted = _keywords(table[name]) - set(GIVEN[group.rpartition(".")[2]]) | set(more)
    for key in options:
        if key not in accepted:
            there = {path for path, _ in leaves(options)}
            names = sorted(f"{group}.{option}" for option in (accepted | there) - {key})
            hint = did_you_mean(f"{group}.{key}", names)
            raise ValueError(f"{group}.{key}: {group}={name} has no such option{hint}")
    for key in _required(table[name]) - set(GIVEN[group.rpartition(".")[2]]) - set(options):
        raise ValueError(f"{group}.{key} is missing: {group}={name} requires it")


def _required(called: Callable[..., Any]) -> set[str]:
    """Return the names of the required arguments of a function."""
    parameters = signature(called).parameters.values()
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return {p.name for p in parameters if p.default is p.empty and p.kind in kinds}


def _keywords(called: Callable[..., Any]) -> set[str]:
    """Return the names of all arguments of a function, or of a class and its bases."""
    takers = [called] if not isinstance(called, type) else called.__mro__
    names: set[str] = set()
    for taker in takers:
        parameters = signature(taker).parameters.values()
        names |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
            break
    return names
