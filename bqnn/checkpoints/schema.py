"""The schema of recipes: keys, and the kind and range of each value, mostly of settings.options."""

from collections.abc import Mapping

from bqnn.arguments import prefixed
from bqnn.quant.spec import QuantSpec
from bqnn.settings.options import METHOD, NET, OPTIMIZER, TASK
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
    """ValueError, in one line, for a recipe that is not exactly what `RECIPE` describes.

    Names are looked up in their tables later; here they are only kept from being paths.
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
    is_open = where in OPEN
    for key in value:
        if key not in rule and not (is_open and is_option(key)):
            raise ValueError(
                f"{where}: no key {short(key)} is known there; bqnn/settings/options.py has "
                "those that are"
            )
    for key in REQUIRED[where]:
        if key not in value:
            raise ValueError(f"{where}: has no {key}")
    for key, entry in value.items():
        _check(f"{where}.{key}", entry, rule.get(key, OPTION))


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
    "quant": Rule("a dictionary", lambda value: type(value) is dict),  # that QuantSpec checks
}

# Where other options than these may stand, for methods and networks of your own. What a task says
# leads to files and addresses, so a new option of a data set needs its line in options.TASK.
OPEN = ("recipe.method", "recipe.method.optimizer", "recipe.net")

# Keys that have to be there, by where they are; options have defaults where they are not.
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "recipe": ("version", "stage", "seed", "method", "net", "task", "facts"),
    "recipe.method": ("name", "optimizer"),
    "recipe.method.optimizer": ("name",),
    "recipe.net": ("name",),
    "recipe.task": ("name", "dataset"),
    "recipe.facts": ("likelihood", "input_shape", "num_train"),
}
