"""What each value of the configuration may be, and the nearest name to a mistyped one.

Numbers, switches and closed sets of words have their rule here, by key; names that are looked up in
a table of classes are in `bqnn.commands.choices`, which needs torch.
"""

import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from bqnn.settings.rules import (
    COUNT,
    DRAWN,
    SIZE,
    Rule,
    either,
    flag,
    many,
    maybe,
    name,
    one_of,
    text,
    whole,
)
from bqnn.text import short

CONF = Path(__file__).resolve().parents[2] / "conf"
SIMILAR = 0.6  # of 1: what a mistyped name shares at least with the one that is suggested


def real(least: float, most: float = math.inf, without: tuple[float, ...] = ()) -> Rule:
    """A finite number in a range; `without` are the ends that do not belong to it."""
    words = "a finite number"
    if least > -math.inf:
        words += f" above {least:g}" if least in without else f", {least:g} or more"
    if most < math.inf:
        words += f", below {most:g}" if most in without else f", at most {most:g}"
    return Rule(words, lambda value: _is_between(value, least, most) and value not in without)


def _is_between(value: object, least: float, most: float) -> bool:
    # The limit of floats also keeps out whole numbers that none can hold.
    return type(value) in (int, float) and -1.7e308 < value < 1.7e308 and least <= value <= most  # type: ignore[operator]


def indices() -> Rule:
    """Numbers of devices in a text, as Lightning takes them."""
    return Rule(
        'a text such as "0,1"',
        lambda value: type(value) is str and re.fullmatch(r"\d+(,\d+)*,?", value) is not None,
    )


def duration() -> Rule:
    """A length of time above zero, as Lightning takes it."""
    return Rule(
        "a text such as 00:01:30:00 (days:hours:minutes:seconds)",
        lambda value: (
            type(value) is str
            and re.fullmatch(r"\d{2,}(:\d\d){3}", value) is not None
            and re.search("[1-9]", value) is not None
        ),
    )


PATH = Rule("a path, in quotes where it looks like a number or a list", text().holds)
ANY = real(-math.inf)
POSITIVE = real(0, without=(0,))
NOT_NEGATIVE = real(0)
SHARE = real(0, 1, without=(1,))
SEED = whole(0, 2**63 - 1)
DRAWS = whole(1, 100_000)
WIDTH = whole(2, 8)  # in bits
EVERY = whole(1)
DISTORTIONS = ("rotation", "shift", "brightness", "noise", "blur")
UNFAMILIAR = ("fashion_mnist", "svhn", "uniform", "inverted", "out_of_range")

NET = {
    "name": name(),
    "hidden_features": either(SIZE, many(SIZE, 256)),
    "channels": many(SIZE, 2),
    "width": SIZE,
    "blocks_per_stage": many(whole(0, 256), 8),
}

OPTIMIZER = {
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

# By key of the configuration. Where null is allowed, the file in conf/ says what it stands for.
RULES: dict[str, Rule] = {
    "seed": SEED,
    "checkpoint": PATH,
    "data_dir": PATH,
    "plots": flag(),
    "resume": flag(),
    "trust": flag(),
    "convergence": flag(),
    "allow_saturation": flag(),
    "num_samples": maybe(DRAWS),
    "numeric": maybe(one_of("unquantized", "simulated", "int8")),
    "select": one_of("all", "best"),
    "task.table": Rule("the name of a folder in <data_dir>/uci, without slashes", name().holds),
    "task.name": name(),
    "task.root": maybe(PATH),
    "task.batch_size": whole(1),
    "task.validation_share": SHARE,
    "task.max_epochs": EVERY,
    "task.check_val_every_n_epoch": EVERY,
    "task.save_every": NOT_NEGATIVE,
    "task.split": COUNT,
    "task.source": one_of("torchvision", "folder"),
    "task.mean": maybe(many(ANY, 256)),
    "task.std": maybe(many(POSITIVE, 256)),
    "task.crop_padding": whole(0, 1024),
    "task.flip": flag(),
    "task.function": one_of("gap", "linear"),
    "task.num_train": DRAWN,
    "task.num_test": DRAWN,
    "task.data_seed": COUNT,
    "trainer.max_epochs": EVERY,
    "trainer.check_val_every_n_epoch": EVERY,
    "trainer.save_every": NOT_NEGATIVE,
    "trainer.save_best": flag(),
    "trainer.limit_train_batches": either(
        whole(1), Rule("a share above 0 and at most 1", lambda v: type(v) is float and 0 < v <= 1)
    ),
    "trainer.accelerator": one_of("auto", "cpu", "gpu", "cuda"),
    "trainer.devices": either(
        whole(1, 1024), one_of("auto", -1), many(whole(0, 1023), 1024), indices()
    ),
    "trainer.precision": Rule(
        "32-true or bf16-mixed (variances underflow in 16-bit floats)",
        one_of("32-true", "bf16-mixed").holds,
    ),
    "trainer.threads": maybe(whole(1, 1024)),
    # Of Lightning, which are added with `+`.
    "trainer.num_nodes": whole(1, 1024),
    "trainer.strategy": one_of(
        "auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true"
    ),
    "trainer.max_steps": either(whole(1), one_of(-1)),
    "trainer.max_time": maybe(duration()),
    "trainer.min_epochs": COUNT,
    "trainer.min_steps": COUNT,
    "trainer.accumulate_grad_batches": EVERY,
    "trainer.gradient_clip_val": NOT_NEGATIVE,
    "trainer.gradient_clip_algorithm": maybe(one_of("norm", "value")),
    "trainer.detect_anomaly": flag(),
    "trainer.deterministic": maybe(either(flag(), one_of("warn"))),
    "trainer.benchmark": maybe(flag()),
    "trainer.sync_batchnorm": flag(),
    "trainer.profiler": maybe(one_of("simple", "advanced", "pytorch")),
    "trainer.reload_dataloaders_every_n_epochs": COUNT,
    "trainer.enable_autolog_hparams": flag(),
    "trainer.progress_bar": flag(),
    "method.init_from": maybe(PATH),
    "method.num_samples": DRAWS,
    "method.val_samples": DRAWS,
    "method.prior_std": POSITIVE,
    "method.init_rho": real(-80, 80),
    "method.beta": NOT_NEGATIVE,
    "method.warmup_epochs": COUNT,
    "method.init_delta": POSITIVE,
    "method.rate": SHARE,
    "method.drop_before_output": flag(),
    "method.num_members": whole(1, 10_000),
    "method.burn_in": COUNT,
    "method.collect_every": EVERY,
    "method.schedule": one_of("cosine", "cosine_by_step", "constant"),
    "logger.artifacts": flag(),
    "logger.name": one_of("wandb", "csv", "none"),
    "logger.tags": Rule("a list of words, as in [a,b]", lambda value: type(value) is list),
    "suite.splits": many(one_of("train", "val", "test"), 3),
    "suite.ood": maybe(many(one_of(*UNFAMILIAR), len(UNFAMILIAR))),
    "suite.distortions": many(one_of(*DISTORTIONS), len(DISTORTIONS)),
    "quant.mode": one_of("qat", "ptq"),
    "quant.weight_bits": WIDTH,
    "quant.activation_bits": WIDTH,
    "quant.output_bits": maybe(WIDTH),
    "quant.sigma_bits": maybe(WIDTH),
    "quant.noise_bits": WIDTH,
    "quant.noise_range": POSITIVE,
    "quant.weight_symmetric": flag(),
    "quant.allow_saturation": flag(),
    "quant.freeze_epochs": COUNT,
    "quant.fine_tuning.max_epochs": EVERY,
    "quant.fine_tuning.seed": maybe(SEED),
    "quant.fine_tuning.calibration_batches": EVERY,
    "quant.fine_tuning.prior_weight": NOT_NEGATIVE,
    "quant.fine_tuning.lr_at_8_bits": POSITIVE,
    **{f"net.{key}": rule for key, rule in NET.items() if key != "name" and isinstance(rule, Rule)},
    **{f"method.optimizer.{key}": rule for key, rule in OPTIMIZER.items()},
    **{f"quant.fine_tuning.optimizer.{key}": rule for key, rule in OPTIMIZER.items()},
    "quant.fine_tuning.optimizer.lr": maybe(POSITIVE),
}

# Keys that hold others, and no value.
GROUPS = (
    *("method", "net", "task", "trainer", "logger", "quant", "suite"),
    *("method.optimizer", "quant.fine_tuning", "quant.fine_tuning.optimizer"),
)

# Options of Lightning under which a job could not keep its promises, and what to write instead.
LEFT_OUT = {
    "trainer.fast_dev_run": "trainer=smoke is a short run",
    "trainer.barebones": "logger=none plots=false leaves out what can be left out",
    "trainer.overfit_batches": "trainer.limit_train_batches trains on fewer batches",
    "trainer.limit_val_batches": "the validation rows are one batch; "
    "trainer.check_val_every_n_epoch says how often they are used, and task.validation_share=0 "
    "that they are not",
    "trainer.limit_test_batches": "the test rows are one batch, and are always used",
    "trainer.limit_predict_batches": "the trainer predicts nothing",
    "trainer.val_check_interval": "trainer.check_val_every_n_epoch says how often the validation "
    "rows are used",
    "trainer.enable_checkpointing": "checkpoint.ckpt is always written",
    "trainer.model_registry": "logger.artifacts=true keeps checkpoints in Weights & Biases",
}
# That the first is no more than the second is a condition of training.
ORDERED = (
    ("trainer.min_epochs", "trainer.max_epochs"),
    ("trainer.min_steps", "trainer.max_steps"),
)


def check_options(config: Mapping[str, Any]) -> None:
    """Refuse a value of another kind, or out of the range that `RULES` gives its key.

    So are options that stand in `LEFT_OUT`, and values that contradict each other.

    Args:
        config: A resolved configuration, in plain types. Keys without a rule are not looked at.

    Raises:
        ValueError: In one line, with the key, the value and what is accepted.
    """
    values = dict(leaves(config))
    for key in GROUPS:
        if key in values and values[key] != {}:
            hint = f"; did you mean {key}.name?" if key.endswith("optimizer") else ""
            raise ValueError(
                f"{key}={_shown(values[key])}: it holds other keys; give them one by one{hint}"
            )
    for key, rule in RULES.items():
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
            f"trainer.save_best=true: no epoch would be validated to choose by, since "
            f"trainer.check_val_every_n_epoch={every} and trainer.max_epochs={epochs}; lower the "
            "first"
        )


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested dictionaries, under its keys joined by dots."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that a mistyped one, or one without its groups, was most probably meant to be.

    >>> nearest("method.lr", ["method.rate", "method.optimizer.lr", "seed"])
    'method.optimizer.lr'
    """
    last = name.rpartition(".")[2]

    def similarity(candidate: str) -> tuple[float, float]:
        own = candidate.rpartition(".")[2]
        return SequenceMatcher(None, last, own).ratio(), SequenceMatcher(
            None, name, candidate
        ).ratio()

    best = max(names, key=similarity, default=None)
    return best if best is not None and similarity(best)[0] >= SIMILAR else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The suggestion for an error message, or nothing where no name is near."""
    found = nearest(name, names)
    return "" if found is None else f"; did you mean {found}?"


@functools.cache
def published() -> str:
    """The text of all files in conf/: what stands there is no secret."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(CONF.rglob("*.yaml")))


def _shown(value: object) -> str:
    """A value as one writes it in an override."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(map(short, value[:8]))}{', ...' if len(value) > 8 else ''}]"
    return short(value).strip("'")
