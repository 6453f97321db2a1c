"""Check that the names in a configuration exist, and that their classes accept the options.

The check runs before a job starts, so a mistyped name or option leaves no files behind. It imports
the plug-ins that the configuration names.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from bqnn.arguments import keywords, required, takes_any
from bqnn.checkpoints.recipe import start_keys
from bqnn.checkpoints.schema import check_recipe
from bqnn.commands.budget import has_budget
from bqnn.data import DATASETS, TensorData
from bqnn.data.task import TRAINING_KEYS
from bqnn.methods import METHODS, Method, PostHocGaussian
from bqnn.nets import NETS
from bqnn.optim import OPTIMIZERS
from bqnn.plugins import find_class
from bqnn.quant.callback import quantization_callbacks
from bqnn.settings.conf import leaves
from bqnn.settings.suggest import did_you_mean
from bqnn.text import short

# Arguments that the program passes, so that no configuration may have them.
GIVEN = {
    "method": ("net", "likelihood", "num_train", "seed", "make_net"),
    "net": ("input_shape", "heads"),
    "task": ("data_dir", "seed"),
    "optimizer": (
        *("params", "num_train", "num_burn_in_steps", "noise", "fused", "foreach", "capturable"),
    ),
}


def check_training(config: Mapping[str, Any]) -> None:
    """Check everything that `train.py` builds from its configuration.

    Args:
        config: The resolved configuration.

    Raises:
        ValueError: A name or an option is unknown, missing or invalid. The message has a suggestion
            if a valid name is similar.
    """
    method = find_class("method", config["method"], METHODS, Method)
    net = find_class("net", config["net"], NETS, nn.Module)
    data = find_class("task", config["task"], DATASETS, TensorData)
    _check_options("method", config["method"], method, ("name", "_target_", *start_keys(method)))
    if not takes_any(net):
        _check_options("net", config["net"], net, ("name", "_target_"))
    _check_options("task", config["task"], data, TRAINING_KEYS)
    check_optimizer("method.optimizer", config["method"].get("optimizer", {}))
    if has_budget(config["quant"]):
        raise ValueError(
            "quant.budget: it needs a trained network; train with quant=none, then quantize the "
            "checkpoint with quantize.py"
        )
    quantization_callbacks(config["quant"])
    if isinstance(method, type) and issubclass(method, PostHocGaussian):
        _check_post_hoc(config)
    groups = {group: config[group] for group in ("seed", "method", "net", "task")}
    facts = {"likelihood": "regression", "input_shape": [1], "num_train": 1}
    try:
        check_recipe({"version": 1, "stage": "float", **groups, "facts": facts})
    except ValueError as error:
        raise ValueError(str(error).removeprefix("recipe.")) from None


def _check_post_hoc(config: Mapping[str, Any]) -> None:
    """Refuse what needs a posterior before the end of the training."""
    late = f"method={config['method']['name']} sets its posterior after the last epoch"
    if config["quant"]["name"] != "none":
        raise ValueError(
            f"quant={config['quant']['name']}: {late}, and ranges of a training without it are too "
            "narrow; train with quant=none, then quantize the checkpoint with quantize.py"
        )
    if config["trainer"]["save_best"]:
        raise ValueError(
            f"trainer.save_best=true: {late}, so that the best epoch may have none; leave it out"
        )


def check_optimizer(key: str, options: Mapping[str, Any]) -> None:
    """Check the name and the options of the optimizer at a key of the configuration.

    Raises:
        ValueError: The name or an option is unknown.
    """
    name = str(options.get("name"))
    if name not in OPTIMIZERS:
        hint = did_you_mean(name, OPTIMIZERS)
        raise ValueError(
            f"{key}.name={short(name)}: unknown{hint or ';'} choose one of {', '.join(OPTIMIZERS)}"
        )
    _check_options(key, options, OPTIMIZERS[name], ("name",))


def _check_options(
    group: str, options: Mapping[str, Any], called: Callable[..., Any], more: tuple[str, ...]
) -> None:
    """Refuse options that a class does not accept, and the lack of those that it requires.

    Args:
        group: The key of the options in the configuration.
        options: The options.
        called: The class or function that gets them.
        more: Keys of the group that are not passed on.
    """
    name = options.get("name", options.get("dataset"))
    given = set(GIVEN[group.rpartition(".")[2]])
    accepted = keywords(called) - given | set(more)
    for key in options:
        if key not in accepted:
            there = {path for path, _ in leaves(options)}
            names = sorted(f"{group}.{option}" for option in (accepted | there) - {key})
            hint = did_you_mean(f"{group}.{key}", names)
            raise ValueError(f"{group}.{key}: {group}={name} has no such option{hint}")
    for key in required(called) - given - set(options):
        raise ValueError(f"{group}.{key} is missing: {group}={name} requires it")
