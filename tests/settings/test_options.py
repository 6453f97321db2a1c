"""Every combination of groups composes, with the values that the scripts need."""

import math
from copy import deepcopy
from inspect import signature
from itertools import cycle
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from pytorch_lightning import Trainer

from bqnn.checkpoints.recipe import NUMERICS, make_recipe
from bqnn.data import DATASETS
from bqnn.data.distortions import DISTORTIONS
from bqnn.data.synthetic import _FUNCTIONS
from bqnn.jobs.command_line.configuration import plain
from bqnn.jobs.identity import config_hash
from bqnn.methods import METHODS
from bqnn.methods.schedules import SCHEDULES
from bqnn.nets import NETS
from bqnn.quant.callback import fine_tuning_optimizer
from bqnn.report.settings import flatten, tell_apart
from bqnn.settings.conf import CONF, leaves, published
from bqnn.settings.options import LEFT_OUT, RULES, UNFAMILIAR, check_options
from bqnn.settings.suggest import nearest
from bqnn.text import valid_name


def group(name: str) -> list[str]:
    """Return the choices of a group; a plug-in completes `own`."""
    return sorted(path.stem for path in (CONF / name).glob("*.yaml") if path.stem != "own")


FACTS = {"likelihood": "regression", "input_shape": [3], "num_train": 1}
REQUIRED = {
    "uci": ["task.table=yacht"],
    "images": ["task.root=my_images"],
    "table": ["task.file=flats.csv", "task.target=price"],
}


def composed(*overrides: str, verb: str = "train") -> dict:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plain(compose(verb, list(overrides)))


@pytest.mark.parametrize("task", group("task"))
@pytest.mark.parametrize("method", group("method"))
def test_every_cell_composes(method: str, task: str) -> None:
    loggers = group("logger")
    trainers = group("trainer")
    assert len(trainers) >= len(loggers)  # so that each logger is in a pair
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for trainer, logger in zip(trainers, cycle(loggers), strict=False):
            overrides = [f"method={method}", f"task={task}", f"trainer={trainer}"]
            overrides += [f"logger={logger}", *REQUIRED.get(task, [])]
            config = plain(compose("train", overrides))
            assert config["method"]["name"] == method
            assert config["logger"]["name"] == logger
            assert config["task"]["dataset"] in DATASETS
            assert config["net"]["name"] in NETS
            assert config["trainer"]["max_epochs"] > 0
            for key in ("check_val_every_n_epoch", "save_every"):
                assert key in config["trainer"]
            make_recipe(config, FACTS)  # the schema knows every option


def test_plug_ins_compose_and_have_free_options() -> None:
    overrides = ["method=own", "+method._target_=my_package.MyMethod", "+method.rate=[1, null]"]
    overrides += ["net=own", "+net._target_=my_package.nets.MyNet", "+net.width={a: b, c: 0.5}"]
    overrides += ["task=own", "+task._target_=my_package.MyData", "+task.root=3"]
    config = composed(*overrides)
    names = [config["method"]["name"], config["net"]["name"], config["task"]["name"]]
    assert names == ["MyMethod", "MyNet", "MyData"]
    assert config["task"]["dataset"] == "MyData"
    recipe = make_recipe(config, FACTS)
    assert recipe["net"] == {
        "name": "MyNet",
        "_target_": "my_package.nets.MyNet",
        "width": {"a": "b", "c": 0.5},
    }
    for refused in ("method.num_samples=0", "task.batch_size=0", "method.optimizer.lr=-1"):
        with pytest.raises(ValueError, match=f"^{refused.replace('.', '[.]')}: choose "):
            composed(*overrides, refused)


@pytest.mark.parametrize(
    "target",
    [
        *("os.system", "builtins.eval", "subprocess.Popen", "sys.modules", "posix.system"),
        *("MyNet", "my-package.MyNet", "my_package.", ".MyNet", "my_package..MyNet", "a.b c"),
        *("a.__globals__", "_a.MyNet", "a.MyNet()", "a:MyNet", "a.lambda", "a/b.MyNet"),
        "a." + "b" * 200,
    ],
)
def test_invalid_paths_of_classes_are_refused(target: str) -> None:
    for name in ("method", "net", "task"):
        with pytest.raises(ValueError, match=rf"^{name}\._target_=.*choose the dotted path"):
            check_options({name: {"name": "x", "_target_": target}})


def test_every_method_and_network_has_a_configuration() -> None:
    assert group("method") == sorted(METHODS)
    assert group("net") == sorted(NETS)


@pytest.mark.parametrize("suite", group("suite"))
def test_every_suite_composes_of_sets_that_there_are(suite: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = plain(compose("evaluate", [f"suite={suite}", "checkpoint=file.ckpt"]))
    assert "test" in config["suite"]["splits"]
    assert set(config["suite"]["distortions"]) <= DISTORTIONS.keys()


def test_every_tuned_file_belongs_to_a_cell() -> None:
    cells = {f"{method}_{task}" for method in group("method") for task in group("task")}
    assert set(group("tuned")) <= cells


def test_the_command_line_wins_over_tuned_values() -> None:
    assert composed("method=bbb", "task=digits")["method"]["beta"] == 0.002  # conf/tuned
    assert composed("method=bbb", "task=digits", "method.beta=0.7")["method"]["beta"] == 0.7


def test_the_task_chooses_the_network_unless_told() -> None:
    assert composed("task=cifar10")["net"]["name"] == "resnet"
    assert composed("task=cifar10", "net=lenet")["net"]["name"] == "lenet"
    assert composed("task=yacht")["net"]["name"] == "mlp"


def test_data_dir_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BQNN_DATA_DIR", raising=False)
    assert composed()["data_dir"] == "data"
    monkeypatch.setenv("BQNN_DATA_DIR", "/elsewhere")
    assert composed()["data_dir"] == "/elsewhere"
    assert composed("data_dir=here")["data_dir"] == "here"


CELLS = [
    *(("train", f"method={m}", f"task={t}") for m in group("method") for t in group("task")),
    *(("train", f"net={net}", "quant=default") for net in group("net")),
    *(("train", f"trainer={trainer}") for trainer in group("trainer")),
    *(("quantize", f"quant={quant}", "checkpoint=x") for quant in ("default", "paper")),
    *(("evaluate", f"suite={suite}", "checkpoint=x") for suite in group("suite")),
    ("export", "checkpoint=x"),
]


@pytest.mark.parametrize(("verb", "overrides"), [(c[0], c[1:]) for c in CELLS], ids=str)
def test_every_number_and_switch_has_its_rule_and_takes_no_other_kind(
    verb: str, overrides: tuple[str, ...]
) -> None:
    required = REQUIRED.get(overrides[-1].removeprefix("task="), [])
    config = composed(*overrides, *required, verb=verb)
    for key, value in leaves(config):
        entries = value if isinstance(value, list) else [value]
        if not any(isinstance(entry, int | float) for entry in entries):
            continue
        assert key in RULES, f"{key}={value} has no rule in bqnn/settings/options.py"
        wrong: list[object] = ["text", 10**400, math.nan, math.inf, [True], {}, -(10**20)]
        wrong += [1, 0.5] if isinstance(value, bool) else [True, False]
        assert [odd for odd in wrong if RULES[key].holds(odd)] == [], key


# Where null may be written instead of a number, and what it then stands for is said in conf/.
NULL = {
    "num_samples": "null for the method's own number",
    "max_samples": "null for the method's own number",
    "tolerance": "null: all draws",
    "trainer.threads": "null leaves it to torch",
    "quant.output_bits": "null: activation_bits",
    "quant.sigma_bits": "weight_bits",
    "quant.budget.mean_bits": "mu and sigma; null: no limit",
    "quant.budget.bytes": "as packed_bytes in size.json; null: no limit",
    "quant.budget.mean_activation_bits": "except for the outputs; null: no limit",
    "quant.budget.rows": "null: all rows of the validation set",
    "quant.fine_tuning.seed": "null for that of the float training",
    "quant.fine_tuning.prior_weight": "null: 0 with imitate, else 1",
    "quant.fine_tuning.optimizer.lr": "lr_at_8_bits and its rule",
    "task.mean": "one number per channel",
    "task.std": "one number per channel",
    "task.size": "a number crops images",
    "task.channels": "null: all have the same already",
    "task.features": "null: all but the target",
    "method.rho_lr": "null for that of the optimizer",
    "method.chain_epochs": "null: one chain",
    "method.cycle_epochs": "null: constant steps",
}


def test_null_is_taken_only_where_the_configuration_says_what_it_means() -> None:
    takes_numbers = [k for k, rule in RULES.items() if any(map(rule.holds, (1, 3, [1])))]
    assert {key for key in takes_numbers if RULES[key].holds(None)} == NULL.keys()
    for meaning in NULL.values():
        assert meaning in published()


def test_sets_of_words_are_those_of_the_code() -> None:
    for key, words in {
        "method.schedule": SCHEDULES,
        "suite.distortions": DISTORTIONS,
        "suite.ood": UNFAMILIAR,
        "task.function": _FUNCTIONS,
        "numeric": NUMERICS,
    }.items():
        rule = RULES[key]
        for name in words:
            assert rule.holds(name) or rule.holds([name])
            assert name in rule.words


# What `make_trainer` gives itself.
GIVEN_TO_THE_TRAINER = {
    *("callbacks", "logger", "plugins", "log_every_n_steps", "enable_progress_bar"),
    *("enable_model_summary", "num_sanity_val_steps", "inference_mode", "default_root_dir"),
    "use_distributed_sampler",
}


def test_every_option_of_lightnings_trainer_has_its_rule_or_is_left_out() -> None:
    known = {key.removeprefix("trainer.") for key in (*RULES, *LEFT_OUT) if key[:8] == "trainer."}
    assert signature(Trainer).parameters.keys() - known <= GIVEN_TO_THE_TRAINER
    assert not known & GIVEN_TO_THE_TRAINER


def test_a_name_with_more_of_it_than_a_letter_is_the_nearest() -> None:
    keys = ["method", "method.rate", "method.optimizer.lr", "task.batch_size", "trainer.max_epochs"]
    nearest_of = {
        "method.lr": "method.optimizer.lr",
        "lr": "method.optimizer.lr",
        "mehod": "method",
        "batchsize": "task.batch_size",
        "trainer.epochs": "trainer.max_epochs",
        "zzz": None,
    }
    assert {name: nearest(name, keys) for name in nearest_of} == nearest_of


@pytest.mark.parametrize(
    ("verb", "overrides", "end"),
    [
        ("train", ["task=uci", "task.table=/home/me/my.csv"], "_bbb_-home-me-my.csv_s0"),
        ("train", ["task.name='a b/../c'"], "_bbb_a-b-..-c_s0"),
        ("train", ["method.name=../../x"], "x_digits_s0"),
        ("train", ["task.name='Übung'"], "_bbb_Ubung_s0"),
        ("quantize", ["checkpoint=x", "quant.mode='a/b'"], "_a-b_w8a7"),
        ("evaluate", ["checkpoint=x"], "_default"),
    ],
)
def test_folders_have_valid_names(verb: str, overrides: list[str], end: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(verb, overrides, return_hydra_config=True)
        config.hydra.job.num = 3
        run, sweep = config.hydra.run.dir, config.hydra.sweep.subdir
    assert run.startswith(f"outputs/{verb}/2")
    for name in (run.removeprefix(f"outputs/{verb}/"), sweep):
        assert name.endswith(end)
        assert name == valid_name(name)
    assert sweep.startswith("3_")


def test_the_rate_of_fine_tuning_grows_with_the_weights_step() -> None:
    def rate(*overrides: str) -> float:
        config = composed("checkpoint=x", *overrides, verb="quantize")
        return fine_tuning_optimizer(config["quant"])["lr"]

    assert [rate(f"quant.weight_bits={bits}") for bits in (8, 6, 4, 2)] == pytest.approx(
        [3e-5 * 255 / steps for steps in (255, 63, 15, 3)]
    )
    assert rate("quant.activation_bits=4") == rate("quant.weight_bits=5")
    assert rate("quant.activation_bits=4", "quant.weight_bits=3") == rate("quant.weight_bits=3")
    assert rate("quant.weight_bits=2", "quant.fine_tuning.optimizer.lr=0.5") == 0.5
    assert rate("quant=paper", "quant.weight_bits=2") == 1e-5


def test_a_sweep_over_bits_that_was_resumed_is_one_setting_to_the_report() -> None:
    swept = [
        flatten(composed("checkpoint=x", f"bits={bits}", f"resume={resume}", verb="quantize"))
        for bits in ("w8a7", "w4a7", "w3a7", "w8a4")
        for resume in ("true", "false")
    ]
    assert tell_apart(swept) == []


def test_newer_options_that_do_nothing_leave_a_run_the_same() -> None:
    config = composed("checkpoint=x", verb="quantize")
    older = deepcopy(config)
    del older["objective"], older["quant"]["budget"]
    assert config_hash(config) == config_hash(older)
    limited = composed("checkpoint=x", "quant.budget.mean_bits=3", verb="quantize")
    assert config_hash(limited) != config_hash(older)


@pytest.mark.parametrize(
    ("verb", "given", "newer", "effect"),
    [
        ("train", "task=digits", ["task.refit"], "task.refit=true"),
        (
            "quantize",
            "quant.mode=ptq",
            ["quant.weight_rounding", "quant.bias_correction"],
            "quant.bias_correction=true",
        ),
        ("evaluate", "suite=test", ["max_samples", "tolerance", "predictive"], "tolerance=0.1"),
    ],
)
def test_each_newer_option_leaves_an_older_run_the_same(
    verb: str, given: str, newer: list[str], effect: str
) -> None:
    options = [given, *([] if verb == "train" else ["checkpoint=x"])]
    config = composed(*options, verb=verb)
    older = deepcopy(config)
    for key in newer:
        group, _, last = key.rpartition(".")
        del (older[group] if group else older)[last]
    assert config_hash(config) == config_hash(older)
    assert config_hash(composed(*options, effect, verb=verb)) != config_hash(older)


@pytest.mark.parametrize("task", ["boston", "concrete", "energy", "power", "wine", "yacht"])
def test_the_six_tables_are_short_files_on_top_of_uci(task: str) -> None:
    config = composed(f"task={task}", "task.split=3")
    assert config["task"]["dataset"] == "uci"
    assert config["task"]["split"] == 3
    assert len((Path(CONF) / "task" / f"{task}.yaml").read_text().splitlines()) <= 4
