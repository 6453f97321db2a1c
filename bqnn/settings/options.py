"""The type and range of each value of a configuration, by group and key.

These tables define the check of the command line (`check_options`), the schema of recipes
(`bqnn.checkpoints.schema`) and docs/configuration.md. The files in conf/ have the defaults and the
meanings. `bqnn.commands.choices`, which needs torch, checks the names of methods, networks, data
sets and optimizers.
"""

import json
from collections.abc import Mapping
from typing import Any

from bqnn.settings.conf import NAME_KEYS, built_in, leaves
from bqnn.settings.rules import (
    ANY,
    COUNT,
    DRAWN,
    DRAWS,
    EVERY,
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    SEED,
    SHARE,
    SIZE,
    WIDTH,
    Rule,
    duration,
    either,
    flag,
    indices,
    many,
    maybe,
    name,
    one_of,
    plain,
    real,
    target,
    text,
    whole,
)
from bqnn.text import short

DISTORTIONS = (
    *("rotation", "shift", "brightness", "noise", "blur"),
    *("shot_noise", "impulse_noise", "contrast", "pixelation", "jpeg"),
)
UNFAMILIAR = ("fashion_mnist", "mnist", "svhn", "uniform", "inverted", "out_of_range")

PREDICTIVE = ("draws", "moments")

Table = Mapping[str, Rule]

COLUMN = either(whole(-10_000_000, 10_000_000), text())
COLUMNS = Rule("a list of names or indices of columns, as in [a,b]", many(COLUMN, 100_000).holds)

JOB: Table = {
    "seed": SEED,
    "checkpoint": PATH,
    "data_dir": PATH,
    "plots": flag(),
    "resume": flag(),
    "trust": flag(),
    "objective": many(text(), 8),
    "convergence": flag(),
    "calibrate": maybe(one_of("temperature", "vector")),
    "save_calibrated": flag(),
    "conformal": maybe(real(0, 1, without=(0, 1))),
    "num_samples": maybe(DRAWS),
    "max_samples": maybe(DRAWS),
    "tolerance": maybe(NOT_NEGATIVE),
    "predictive": one_of(*PREDICTIVE),
    "numeric": maybe(one_of("unquantized", "simulated", "int8")),
    "select": one_of("all", "best"),
    "format": one_of("onnx"),
    "form": one_of("exact", "qdq"),
    "masks": one_of("fixed", "random"),
}

# The options of data sets, and the defaults of a task for its training.
TASK: Table = {
    "_target_": target(),
    "table": Rule("the name of a folder in <data_dir>/uci, without slashes", name().holds),
    "name": name(),
    "max_epochs": EVERY,
    "check_val_every_n_epoch": EVERY,
    "save_every": NOT_NEGATIVE,
    "batch_size": whole(1),
    "validation_share": SHARE,
    "refit": flag(),
    "split": COUNT,
    "source": one_of("torchvision", "folder"),
    "root": maybe(PATH),
    "mean": maybe(many(ANY, 256)),
    "std": maybe(many(POSITIVE, 256)),
    "crop_padding": whole(0, 1024),
    "flip": flag(),
    "size": maybe(whole(1, 1024)),
    "channels": maybe(one_of(1, 3)),
    "file": PATH,
    "target": Rule(
        "the name of a column, in quotes if it looks like a number, or its index from 0 (-1 is the "
        "last one)",
        COLUMN.holds,
    ),
    "kind": one_of("auto", "regression", "classification"),
    "features": maybe(COLUMNS),
    "ignore": COLUMNS,
    "categories": COLUMNS,
    "missing": one_of("refuse", "drop"),
    "decimal": one_of("point", "comma"),
    "test_share": maybe(real(0, 1, without=(0, 1))),
    "function": one_of("gap", "linear"),
    "num_train": DRAWN,
    "num_test": DRAWN,
    "data_seed": COUNT,
}

NET: Table = {
    "_target_": target(),
    "hidden_features": either(SIZE, many(SIZE, 256)),
    "channels": many(SIZE, 2),
    "width": SIZE,
    "blocks_per_stage": many(whole(0, 256), 8),
}

METHOD: Table = {
    "_target_": target(),
    "num_samples": DRAWS,
    "val_samples": DRAWS,
    "schedule": one_of("cosine", "cosine_by_step", "constant"),
    "prior_std": POSITIVE,
    "init_rho": real(-80, 80),
    "beta": NOT_NEGATIVE,
    "warmup_epochs": COUNT,
    "init_from": maybe(PATH),
    "init_delta": POSITIVE,
    "rho_lr": maybe(POSITIVE),
    "rate": maybe(SHARE),
    "drop_before_output": flag(),
    "num_members": whole(1, 10_000),
    "burn_in": COUNT,
    "collect_every": EVERY,
    "swa_start": SHARE,
    "swa_lr": POSITIVE,
    "scale": POSITIVE,
    "rank": either(one_of(0), whole(2, 1000)),
    "prior": either(POSITIVE, one_of("validation", "marginal_likelihood")),
    "chain_epochs": maybe(EVERY),
    "optimize_epochs": COUNT,
    "cycle_epochs": maybe(EVERY),
    "exploration": SHARE,
}

OPTIMIZER: Table = {
    "lr": POSITIVE,
    "weight_decay": NOT_NEGATIVE,
    "betas": many(SHARE, 2),
    "eps": NOT_NEGATIVE,
    "amsgrad": flag(),
    "maximize": flag(),
    "momentum": NOT_NEGATIVE,
    "dampening": ANY,
    "nesterov": flag(),
    "friction": real(0, 1, without=(0,)),
    "temperature": POSITIVE,
    "resample_momentum": COUNT,
    "resample_prior": COUNT,
    "prior_shape": POSITIVE,
    "prior_rate": POSITIVE,
}

QUANT: Table = {
    "mode": one_of("qat", "ptq"),
    "control": flag(),
    "weight_bits": WIDTH,
    "activation_bits": WIDTH,
    "output_bits": maybe(WIDTH),
    "sigma_bits": maybe(WIDTH),
    "noise_bits": WIDTH,
    "noise_range": POSITIVE,
    "rounding": one_of("nearest", "stochastic"),
    "weight_symmetric": flag(),
    "keep": many(text(), 1000),
    "freeze_epochs": COUNT,
}

BUDGET: Table = {
    "mean_bits": maybe(real(2, 8)),
    "bytes": maybe(whole(1)),
    "mean_activation_bits": maybe(real(2, 8)),
    "measure": one_of("nll", "kl", "mi", "auroc"),
    "other": maybe(one_of(*UNFAMILIAR)),
    "widths": Rule(
        "at least one whole number from 2 to 8, as in [2,4,8]",
        lambda value: many(WIDTH, 7).holds(value) and len(value) > 0,
    ),
    "rows": maybe(EVERY),
}

FINE_TUNING: Table = {
    "max_epochs": EVERY,
    "seed": maybe(SEED),
    "calibration_batches": EVERY,
    "imitate": flag(),
    "prior_weight": NOT_NEGATIVE,
    "lr_at_8_bits": POSITIVE,
}

TRAINER: Table = {
    "max_epochs": EVERY,
    "check_val_every_n_epoch": EVERY,
    "save_every": NOT_NEGATIVE,
    "save_best": flag(),
    "limit_train_batches": either(
        whole(1), Rule("a share above 0 and at most 1", lambda v: type(v) is float and 0 < v <= 1)
    ),
    "accelerator": one_of("auto", "cpu", "gpu", "cuda"),
    "devices": either(whole(1, 1024), one_of("auto", -1), many(whole(0, 1023), 1024), indices()),
    "precision": Rule(
        "32-true or bf16-mixed (variances underflow in 16-bit floats)",
        one_of("32-true", "bf16-mixed").holds,
    ),
    "compile": flag(),
    "data_on_device": flag(),
    "matmul_precision": maybe(one_of("highest", "high", "medium")),
    "threads": maybe(whole(1, 1024)),
    "progress_bar": flag(),
    # Further options of Lightning's Trainer, which a command line adds with `+`.
    "num_nodes": whole(1, 1024),
    "strategy": one_of(
        "auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true"
    ),
    "max_steps": either(whole(1), one_of(-1)),
    "max_time": maybe(duration()),
    "min_epochs": COUNT,
    "min_steps": COUNT,
    "accumulate_grad_batches": EVERY,
    "gradient_clip_val": NOT_NEGATIVE,
    "gradient_clip_algorithm": maybe(one_of("norm", "value")),
    "detect_anomaly": flag(),
    "deterministic": maybe(either(flag(), one_of("warn"))),
    "benchmark": maybe(flag()),
    "sync_batchnorm": flag(),
    "profiler": maybe(one_of("simple", "advanced", "pytorch")),
    "reload_dataloaders_every_n_epochs": COUNT,
    "enable_autolog_hparams": flag(),
}

SUITE: Table = {
    "splits": many(one_of("train", "val", "test"), 3),
    "ood": maybe(many(one_of(*UNFAMILIAR), len(UNFAMILIAR))),
    "distortions": many(one_of(*DISTORTIONS), len(DISTORTIONS)),
}

LOGGER: Table = {
    "name": one_of("wandb", "csv", "none"),
    "artifacts": flag(),
    "tags": Rule("a list of words, as in [a,b]", lambda value: type(value) is list),
}

# The tables by group. The files in conf/ explain the meaning of null.
TABLES: dict[str, Table] = {
    "": JOB,
    "task": TASK,
    "net": NET,
    "method": METHOD,
    "method.optimizer": OPTIMIZER,
    "quant": QUANT,
    "quant.budget": BUDGET,
    "quant.fine_tuning": FINE_TUNING,
    "quant.fine_tuning.optimizer": {**OPTIMIZER, "lr": maybe(POSITIVE)},
    "trainer": TRAINER,
    "suite": SUITE,
    "logger": LOGGER,
}
RULES: dict[str, Rule] = {
    f"{group}.{key}".lstrip("."): rule
    for group, table in TABLES.items()
    for key, rule in table.items()
}

# The options that a plug-in has in common with bqnn's own classes. Its other options can be any
# plain values, even if an option of bqnn has the same name.
COMMON: dict[str, tuple[str, ...]] = {
    "method": ("_target_", "num_samples", "val_samples", "schedule"),
    "net": ("_target_",),
    "task": (
        *("_target_", "name", "max_epochs", "check_val_every_n_epoch", "save_every"),
        *("batch_size", "validation_share", "refit", "split"),
    ),
}
PLAIN = plain()

# Options of Lightning that would break guarantees of a job, and the alternative to each.
LEFT_OUT = {
    "trainer.fast_dev_run": "trainer=smoke is a short run",
    "trainer.barebones": "logger=none plots=false omits everything that is optional",
    "trainer.overfit_batches": "trainer.limit_train_batches trains on fewer batches",
    "trainer.limit_val_batches": "the validation rows are one batch; "
    "trainer.check_val_every_n_epoch sets how often they are used, and task.validation_share=0 "
    "disables validation",
    "trainer.limit_test_batches": "the test rows are one batch, and are always used",
    "trainer.limit_predict_batches": "the trainer predicts nothing",
    "trainer.val_check_interval": "trainer.check_val_every_n_epoch sets how often the validation "
    "rows are used",
    "trainer.enable_checkpointing": "checkpoint.ckpt is always written",
    "trainer.model_registry": "logger.artifacts=true keeps checkpoints in Weights & Biases",
}
# Pairs of options of which the first must not exceed the second.
ORDERED = (
    ("trainer.min_epochs", "trainer.max_epochs"),
    ("trainer.min_steps", "trainer.max_steps"),
)


def is_plugin(group: str, options: object) -> bool:
    """Return whether a group of a configuration names a class of another package.

    Args:
        group: method, net or task.
        options: The group, which may come from an untrusted source.

    Examples:
        >>> is_plugin("net", {"name": "mlp"})
        False
        >>> is_plugin("net", {"name": "MyNet", "_target_": "my_package.MyNet"})
        True
    """
    return isinstance(options, Mapping) and (
        "_target_" in options or options.get(NAME_KEYS[group]) not in built_in(group)
    )


def check_options(config: Mapping[str, Any]) -> None:
    """Check the values of a configuration against `RULES`.

    The check also refuses the options in `LEFT_OUT`, and values that contradict each other.

    Args:
        config: A resolved configuration, in plain types. Keys without a rule are ignored.

    Raises:
        ValueError: A value is refused. The message has the key, the value and the valid choices.

    Examples:
        >>> check_options({"quant": {"weight_bits": 9}})
        Traceback (most recent call last):
        ValueError: quant.weight_bits=9: choose a whole number from 2 to 8
    """
    values = dict(leaves(config))
    for key in filter(None, TABLES):
        if key in values and values[key] != {}:
            hint = f"; did you mean {key}.name?" if key.endswith("optimizer") else ""
            raise ValueError(
                f"{key}={_shown(values[key])}: it is a group of keys; set them one by one{hint}"
            )
    for key, rule in {**RULES, **_rules_of_plugins(config)}.items():
        if key in values and not rule.holds(values[key]):
            raise ValueError(f"{key}={_shown(values[key])}: choose {rule.words}")
    for key, instead in LEFT_OUT.items():
        if key in values:
            raise ValueError(f"{key}={_shown(values[key])}: leave it out; {instead}")
    for least, most in ORDERED:
        if most in values and 0 <= values[most] < values.get(least, 0):
            raise ValueError(
                f"{least}={values[least]}: training ends at {most}={values[most]}; lower the first "
                "or raise the second"
            )
    every, epochs = (values.get(f"trainer.{k}") for k in ("check_val_every_n_epoch", "max_epochs"))
    if values.get("trainer.save_best") and every is not None and every > (epochs or every):
        raise ValueError(
            f"trainer.save_best=true: no epoch would be validated, since "
            f"trainer.check_val_every_n_epoch={every} and trainer.max_epochs={epochs}; lower the "
            "first"
        )


def _rules_of_plugins(config: Mapping[str, Any]) -> dict[str, Rule]:
    """Return the rules of the options of plug-ins, which replace those of bqnn's own classes."""
    return {
        f"{group}.{key}": PLAIN
        for group, common in COMMON.items()
        if is_plugin(group, config.get(group))
        for key, _ in leaves(config[group])
        if key not in (*common, NAME_KEYS[group]) and not key.startswith("optimizer.")
    }


def _shown(value: object) -> str:
    """Format a value as in an override on the command line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(map(short, value[:8]))}{', ...' if len(value) > 8 else ''}]"
    return short(value).strip("'")
