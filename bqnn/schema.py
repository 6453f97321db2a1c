"""What a recipe may hold: its keys, and the kind and range of each value."""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bqnn.quant.spec import QuantSpec
from bqnn.text import short


@dataclass(frozen=True)
class Rule:
    """What a value has to be, in words and as a test of it."""

    words: str
    holds: Callable[[Any], bool]


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
                f"{where}: no key {short(key)} is known there; bqnn/schema.py has those that are"
            )
    for key in REQUIRED[where]:
        if key not in value:
            raise ValueError(f"{where}: has no {key}")
    for key, entry in value.items():
        _check(f"{where}.{key}", entry, rule.get(key, OPTION))


def is_finite(value: object) -> bool:
    """Whether it is a number that a float can hold: 10**400 is none, and neither is NaN."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def whole(least: int, most: int = 2**31 - 1) -> Rule:
    words = f"a whole number from {least} to {most}"
    return Rule(words, lambda value: type(value) is int and least <= value <= most)


def number() -> Rule:
    return Rule("a finite number", is_finite)


def flag() -> Rule:
    return Rule("true or false", lambda value: type(value) is bool)


def text() -> Rule:
    return Rule(
        "a text of at most 4096 characters that UTF-8 can hold",
        lambda v: type(v) is str and len(v) <= 4096 and not re.search("[\ud800-\udfff]", v),
    )


def name() -> Rule:
    """Text that becomes the name of a folder, and never a path to another one."""
    return Rule(
        "a name without slashes, a dot in front or unprintable characters, of at most 200 bytes",
        lambda value: (
            type(value) is str
            and 0 < len(value) <= 200
            and value.isprintable()  # so it has no lone surrogates either
            and len(value.encode()) <= 200
            and value[0] != "."
            and not set("/\\") & set(value)
        ),
    )


def one_of(*choices: str | int) -> Rule:
    words = " or ".join(map(str, choices))
    return Rule(words, lambda value: type(value) in (str, int) and value in choices)


def many(rule: Rule, most: int) -> Rule:
    return Rule(
        f"at most {most} entries, each {rule.words}",
        lambda value: (
            type(value) is list and len(value) <= most and all(rule.holds(entry) for entry in value)
        ),
    )


def either(*rules: Rule) -> Rule:
    words = ", or ".join(rule.words for rule in rules)
    return Rule(words, lambda value: any(rule.holds(value) for rule in rules))


def maybe(rule: Rule) -> Rule:
    return Rule(f"null, or {rule.words}", lambda value: value is None or rule.holds(value))


def is_option(key: object) -> bool:
    """Whether a key could be a public argument of a constructor."""
    return type(key) is str and key.isidentifier() and len(key) <= 60 and key[0] != "_"


# An option of a method, network or optimizer of your own, whose constructor judges it.
NUMBER = either(
    whole(-10_000_000, 10_000_000),
    Rule("a finite float", lambda value: type(value) is float and is_finite(value)),
)
OPTION = maybe(either(flag(), NUMBER, name(), many(NUMBER, 256)))

SIZE = whole(1, 65_536)  # of a layer
COUNT = whole(0)
DRAWN = whole(1, 10_000_000)  # rows made up and kept in memory

OPTIMIZER: Schema = {
    "name": name(),
    "lr": number(),
    "weight_decay": number(),
    "betas": many(number(), 2),
    "eps": number(),
    "amsgrad": flag(),
    "maximize": flag(),
    "momentum": number(),
    "dampening": number(),
    "nesterov": flag(),
    "friction": number(),
    "temperature": number(),
    "resample_momentum": COUNT,
    "resample_prior": COUNT,
    "prior_shape": number(),
    "prior_rate": number(),
}

METHOD: Schema = {
    "name": name(),
    "num_samples": whole(1, 100_000),
    "val_samples": whole(1, 100_000),
    "schedule": name(),
    "optimizer": OPTIMIZER,
    "prior_std": number(),
    "init_rho": number(),
    "beta": number(),
    "warmup_epochs": COUNT,
    "init_from": maybe(text()),
    "init_delta": number(),
    "rate": number(),
    "drop_before_output": flag(),
    "num_members": whole(1, 10_000),
    "burn_in": COUNT,
    "collect_every": COUNT,
}

NET: Schema = {
    "name": name(),
    "hidden_features": either(SIZE, many(SIZE, 256)),
    "channels": many(SIZE, 2),
    "width": SIZE,
    "blocks_per_stage": many(whole(0, 256), 8),
}

TASK: Schema = {
    "name": name(),
    "dataset": name(),
    "max_epochs": COUNT,
    "check_val_every_n_epoch": COUNT,
    "save_every": number(),
    "batch_size": COUNT,
    "validation_share": number(),
    "table": name(),
    "split": COUNT,
    "source": name(),
    "root": maybe(text()),
    "mean": maybe(many(number(), 256)),
    "std": maybe(many(number(), 256)),
    "crop_padding": whole(0, 1024),
    "flip": flag(),
    "function": name(),
    "num_train": DRAWN,
    "num_test": DRAWN,
    "data_seed": whole(0),
}

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
    "method": METHOD,
    "net": NET,
    "task": TASK,
    "facts": FACTS,
    "quant": Rule("a dictionary", lambda value: type(value) is dict),  # that QuantSpec checks
}

# Where other options than these may stand, for methods and networks of your own. What a task says
# leads to files and addresses, so a new option of a data set needs its line in TASK.
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
