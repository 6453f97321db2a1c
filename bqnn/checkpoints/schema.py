"""The schema of recipes: their keys, and the type and range of each value."""

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from bqnn.arguments import prefixed
from bqnn.quant.spec import QuantSpec
from bqnn.settings.options import COMMON, METHOD, NET, OPTIMIZER, PLAIN, TASK, is_plugin
from bqnn.settings.rules import (
    OPTION,
    POSITIVE,
    Rule,
    is_option,
    many,
    name,
    number,
    one_of,
    real,
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

    Examples:
        >>> check_recipe({"version": 2})
        Traceback (most recent call last):
        ValueError: recipe: has no stage
    """
    _check("recipe", recipe, RECIPE)
    assert isinstance(recipe, dict)
    _check_normalization(recipe["facts"])
    _check_columns(recipe["facts"])
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


def _check_normalization(facts: Mapping[str, Any]) -> None:
    """Check that there is a mean and a standard deviation for each feature or channel."""
    lengths = {key: len(facts[key]) for key in ("input_mean", "input_std") if key in facts}
    num_features = facts["input_shape"][0] if facts["input_shape"] else 0
    if (lengths or "input_scale" in facts) and [*lengths.values()] != [num_features] * 2:
        raise ValueError(
            f"recipe.facts: its input_shape has {num_features} features or channels; expected as "
            "many numbers in input_mean and in input_std"
        )


def _check_columns(facts: Mapping[str, Any]) -> None:
    """Check that the columns of a table are as many as the network's inputs."""
    if "feature_names" not in facts and "feature_categories" not in facts:
        return
    names, categories = (facts.get(key, []) for key in ("feature_names", "feature_categories"))
    if len(names) != len(categories) or len(set(names)) != len(names):
        raise ValueError(
            f"recipe.facts: {len(names)} feature_names and {len(categories)} feature_categories; "
            "expected one entry per column, and each name once"
        )
    num_inputs = sum(max(1, len(each)) for each in categories)
    if num_inputs != prod(facts["input_shape"]):
        raise ValueError(
            f"recipe.facts: its columns are {num_inputs} inputs; expected as many as input_shape "
            "says"
        )


FACTOR = real(1e-3, 1e3)  # of a calibration

FACTS: Schema = {
    "likelihood": name(),
    "input_shape": many(whole(1, 1_000_000), 3),
    "num_train": whole(1),
    "class_names": many(text(), 100_000),
    "input_mean": many(number(), 1_000_000),
    "input_std": many(POSITIVE, 1_000_000),
    "input_scale": POSITIVE,
    "target_mean": number(),
    "target_std": number(),
    # Of a table with a line of names; columns of numbers have no categories.
    "feature_names": many(text(), 100_000),
    "feature_categories": many(many(text(), 10_000), 100_000),
    "target_name": text(),
    "source_sha256": Rule(
        "64 hexadecimal digits",
        lambda value: type(value) is str and re.fullmatch("[0-9a-f]{64}", value) is not None,
    ),
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
    "calibration": {
        "name": name(),
        "temperature": FACTOR,
        "scale": many(FACTOR, 100_000),
        "bias": many(real(-1000, 1000), 100_000),
        "factor": FACTOR,
    },
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
    "recipe.calibration": ("name",),
}
