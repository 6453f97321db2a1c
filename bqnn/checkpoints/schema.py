"""The schema of recipes: their keys, and the type and range of each value."""

from collections.abc import Mapping

from bqnn.arguments import prefixed
from bqnn.quant.spec import QuantSpec
from bqnn.settings.options import COMMON, METHOD, NET, OPTIMIZER, PLAIN, TASK, is_plugin
from bqnn.settings.rules import (
    OPTION,
    Rule,
    is_option,
    many,
    name,
    number,
    one_of,
    text,
    whole,
)
from bqnn.text import short

Schema = Mapping[str, "Rule | Schema"]


def check_recipe(recipe: object) -> None:
    """Check a recipe against the schema `RECIPE`.

    The check refuses names that are paths. It does not look names up in their tables.

    Args:
        recipe: The recipe, which may come from an untrusted file.

    Raises:
        ValueError: A key is unknown or missing, or a value has a wrong type or range.

    Example:
        >>> check_recipe({"version": 2})
        Traceback (most recent call last):
        ValueError: recipe: has no stage
    """
    _check("recipe", recipe, RECIPE)
    assert isinstance(recipe, dict)
    if recipe["stage"] != "float" and "quant" not in recipe:
        raise ValueError(f"recipe: has no quant, but its stage is {recipe['stage']}")
    if "quant" in recipe:
        with prefixed("quant"):
            QuantSpec.from_dict(recipe["quant"])


def _check(where: str, value: object, rule: Rule | Schema) -> None:
    if isinstance(rule, Rule):
        if not rule.holds(value):
            raise ValueError(f"{where}={short(value)}: expected {rule.words}")
        return
    if type(value) is not dict:
        raise ValueError(f"{where}={short(value)}: expected a dictionary")
    is_open, default = where in OPEN, OPTION
    group = where.removeprefix("recipe.")
    if group in COMMON and is_plugin(group, value):
        fixed = (*COMMON[group], *REQUIRED[where])
        rule = {key: rule[key] for key in fixed}
        is_open, default = True, PLAIN
    for key in value:
        if key not in rule and not (is_open and is_option(key)):
            raise ValueError(
                f"{where}: no key {short(key)} is known; bqnn/settings/options.py lists the known "
                "keys"
            )
    for key in REQUIRED[where]:
        if key not in value:
            raise ValueError(f"{where}: has no {key}")
    for key, entry in value.items():
        _check(f"{where}.{key}", entry, rule.get(key, default))


FACTS: Schema = {
    "likelihood": name(),
    "input_shape": many(whole(1, 1_000_000), 3),
    "num_train": whole(1),
    "class_names": many(text(), 100_000),
    "input_mean": many(number(), 1_000_000),
    "input_std": many(number(), 1_000_000),
    "target_mean": number(),
    "target_std": number(),
}

RECIPE: Schema = {
    "version": one_of(1),
    "stage": one_of("float", "qat", "ptq"),
    "seed": whole(0, 2**63 - 1),
    "method": {"name": name(), "optimizer": {"name": name(), **OPTIMIZER}, **METHOD},
    "net": {"name": name(), **NET},
    "task": {"dataset": name(), **TASK},
    "facts": FACTS,
    "quant": Rule("a dictionary", lambda value: type(value) is dict),  # checked by QuantSpec
}

# Groups that accept further options, for methods and networks that are added to bqnn. Tasks are not
# among them: their options lead to files and addresses, so each one needs an entry in options.TASK.
# A plug-in, which is imported only if the user trusts the checkpoint, can have any option.
OPEN = ("recipe.method", "recipe.method.optimizer", "recipe.net")

# Required keys by group. All other keys have defaults.
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "recipe": ("version", "stage", "seed", "method", "net", "task", "facts"),
    "recipe.method": ("name", "optimizer"),
    "recipe.method.optimizer": ("name",),
    "recipe.net": ("name",),
    "recipe.task": ("name", "dataset"),
    "recipe.facts": ("likelihood", "input_shape", "num_train"),
}
