"""Checkpoint files are untrusted: invalid ones are refused, and no code in them runs."""

import os
import pickle
import random
from collections.abc import Callable
from copy import deepcopy
from itertools import combinations
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch

from bqnn.arguments import ArgumentError, prefixed
from bqnn.checkpoints.file import _best_of_each, find_checkpoints, read_checkpoint, trained_epochs
from bqnn.checkpoints.recipe import build, load
from bqnn.checkpoints.schema import check_recipe
from bqnn.data.task import make_data
from bqnn.layers.ensemble import Ensemble
from bqnn.quant.callback import quantize_module
from bqnn.quant.spec import QuantSpec

FACTS: dict[str, Any] = {
    "likelihood": "regression",
    "target_mean": 0.0,
    "target_std": 1.0,
    "input_shape": [3],
    "num_train": 10,
}
RECIPE: dict[str, Any] = {
    "version": 1,
    "stage": "float",
    "seed": 0,
    "method": {"name": "pointwise", "num_samples": 1, "optimizer": {"name": "adam", "lr": 0.1}},
    "net": {"name": "mlp", "hidden_features": [4]},
    "task": {"name": "yacht", "dataset": "uci"},
    "facts": FACTS,
}
ENSEMBLE = {"burn_in": 0, "collect_every": 1, "num_members": 10_000}


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch evil",)


def saved(path: Path, **changes: object) -> Path:
    content = {"state_dict": build(RECIPE).state_dict(), "recipe": RECIPE, **changes}
    torch.save(content, path)
    return path


def altered(key: str, value: object) -> dict[str, Any]:
    """Return the recipe with a new or changed value at a dotted key."""
    recipe = deepcopy(RECIPE)
    *parents, last = key.split(".")
    group = recipe
    for parent in parents:
        group = group[parent]
    group[last] = value
    return recipe


def test_a_checkpoint_rebuilds_its_model(tmp_path: Path) -> None:
    model = load(saved(tmp_path / "a.ckpt"))
    assert not model.training
    x = torch.randn(5, 3)
    assert torch.equal(model(x), build(RECIPE).eval()(x))


# ---- files


def test_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, write in (("torch", torch.save), ("pickle", _pickle)):
        for content in ({"recipe": Evil(), "state_dict": {}}, {**RECIPE, "callbacks": Evil()}):
            write(content, tmp_path / name)
            with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
                load(tmp_path / name)
    assert not (tmp_path / "evil").exists()
    torch.load(tmp_path / "torch", weights_only=False)  # it would have
    assert (tmp_path / "evil").exists()


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.ckpt").read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.ckpt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut.ckpt cannot be read as a checkpoint: [^\n]+$"):
            read_checkpoint(tmp_path / "cut.ckpt")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no recipe and state_dict"):
        read_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "missing.ckpt")


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt")
    whole, expected = path.read_bytes(), read_checkpoint(path)
    draw, num_noticed = random.Random(0), 0
    for _ in range(200):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            found = read_checkpoint(path)
        except ValueError:
            num_noticed += 1
        else:
            assert found["recipe"] == expected["recipe"]
            for name, value in expected["state_dict"].items():
                assert torch.equal(found["state_dict"][name], value)
    assert num_noticed > 50  # the others hit padding and the names of the archive's parts


def test_an_archive_that_outgrows_its_file_is_refused(tmp_path: Path) -> None:
    with ZipFile(saved(tmp_path / "a.ckpt")) as a, ZipFile(tmp_path / "b.ckpt", "w") as b:
        for name in a.namelist():
            b.writestr(name, a.read(name), ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed"):
        read_checkpoint(tmp_path / "b.ckpt")
    front = pickle.dumps({"recipe": RECIPE, "state_dict": {}})  # which torch would read
    (tmp_path / "b.ckpt").write_bytes(front + (tmp_path / "a.ckpt").read_bytes())
    with pytest.raises(ValueError, match="other data besides the archive"):
        read_checkpoint(tmp_path / "b.ckpt")
    state = {"net.weight": torch.zeros(1).expand(10**6, 10**6)}  # 4 bytes in the file
    with pytest.raises(ValueError, match="claim 4000000000000 bytes"):
        read_checkpoint(saved(tmp_path / "a.ckpt", state_dict=state))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["FIFO", "folder"])
def test_paths_that_are_not_regular_files_do_not_block(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a.ckpt cannot be read as a checkpoint: [^\n]+$"):
        read_checkpoint(tmp_path / "a.ckpt")
    assert find_checkpoints(str(tmp_path / "*.ckpt")) == {tmp_path / "a.ckpt": None}


def test_an_endless_device_is_refused() -> None:
    with pytest.raises(ValueError, match="not a regular file"):
        read_checkpoint("/dev/zero")


@pytest.mark.parametrize(
    "state", [[1], {"net.weight": "x"}, {1: torch.zeros(1)}, {"\x1b[2J": torch.zeros(1)}]
)
def test_a_state_is_of_tensors_alone(state: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="entries that are not named, dense tensors"):
        read_checkpoint(saved(tmp_path / "a.ckpt", state_dict=state))


@pytest.mark.parametrize("metadata", [[], {"": []}, {"": {"version": "1"}}, {"": {"assign": 1}}])
def test_module_metadata_of_a_state_has_only_versions(metadata: object, tmp_path: Path) -> None:
    state = build(RECIPE).state_dict()
    state._metadata = metadata  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="metadata of modules that are not versions"):
        read_checkpoint(saved(tmp_path / "a.ckpt", state_dict=state))


def nested(value: object, levels: int) -> object:
    """Return a list that holds another one twice, which does the same, and so on."""
    for _ in range(levels):
        value = [value, value]
    return value


def test_values_that_would_fill_a_terminal_for_years_are_named_by_their_kind() -> None:
    bomb = nested(0, 100)
    expanded = torch.zeros(1).expand(10**6, 10**6)
    for value in (bomb, {"a": bomb}, expanded, "x" * 10**6, 10**400, b"x" * 10**6, {"a"}):
        for key in ("seed", "net.depth", "facts.input_mean", "task.table", "quant", "x"):
            with pytest.raises(ValueError, match="recipe") as error:
                check_recipe(altered(key, value if key != "quant" else [value]))
            assert len(str(error.value)) < 400
        quant = {"weight_bits": value}, {"engine": value}, {"overrides": [value]}, {"x": value}
        bits = [{"layer": "a", "weight_bits": value}], [{"layer": value, "weight_bits": 3}], value
        for options in (*quant, *({"overrides": each} for each in bits), {"noise_range": value}):
            with pytest.raises(ArgumentError) as error, prefixed("quant"):
                QuantSpec.from_dict(options)
            assert str(error.value).startswith("quant.")
            assert len(str(error.value)) < 300
            assert str(error.value).isprintable()


# ---- recipes

REFUSED = [
    ("version", 2, "recipe.version=2: expected 1"),
    ("stage", "int4", "recipe.stage='int4'"),
    ("stage", "qat", "has no quant"),
    ("seed", -1, "recipe.seed=-1"),
    ("_target_", "os.system", "recipe: no key '_target_' is known"),
    ("method._target_", "os.system", "recipe.method._target_='os.system': expected the dotted pa"),
    ("net._target_", ["a.B"], "recipe.net._target_=a list of 1: expected the dotted path"),
    ("task._target_", "builtins.exec", "recipe.task._target_='builtins.exec': expected the dott"),
    ("facts._target_", "a.B", "recipe.facts: no key '_target_' is known"),
    ("method.name", "os.system", "method.name='os.system': unknown"),
    ("method.name", ["pointwise"], "recipe.method.name="),
    ("method.num_samples", 10**9, "recipe.method.num_samples=1000000000"),
    ("method.optimizer", {"name": "adam", "_target_": "os.system"}, "no key '_target_'"),
    ("method.optimizer", {"name": "adam", "lr": float("nan")}, "lr=nan: expected a finite number"),
    ("net.name", "torch.hub.load", "net.name='torch.hub.load': unknown"),
    ("net.name", "../mlp", "recipe.net.name='../mlp': expected a name without slashes"),
    ("net.depth", 3, "unexpected keyword argument 'depth'"),
    ("net.depth", 10**12, "recipe.net.depth=1000000000000"),
    ("net.hidden_features", [10**12], "recipe.net.hidden_features="),
    ("net.hidden_features", [4] * 10**5, "recipe.net.hidden_features="),
    ("net.hidden_features", "4", "recipe.net.hidden_features='4'"),
    ("task.name", "../../evil", "recipe.task.name='../../evil'"),
    ("task.name", "a\x1b[2Jb", "recipe.task.name='a\\x1b[2Jb'"),
    ("task.table", "../../etc", "recipe.task.table='../../etc'"),
    ("task.data_dir", "/etc", "recipe.task: no key 'data_dir'"),
    ("task.url", "http://evil", "recipe.task: no key 'url'"),
    ("task.num_train", 10**12, "recipe.task.num_train="),
    ("facts.likelihood", "poisson", "poisson"),
    ("facts.input_shape", [3.0], "recipe.facts.input_shape=a list of 1: expected"),
    ("facts.class_names", [Path("x")], "cannot be read as a checkpoint"),
    ("facts", "regression", "recipe.facts='regression': expected a dictionary"),
    ("facts.target_std", 10**400, "recipe.facts.target_std=a number of 1329 bits: expected a fin"),
    ("facts.input_mean", [0.0, 10**400], "recipe.facts.input_mean=a list of 2"),
    ("facts.input_mean", [0.0] * 3, "as many numbers in input_mean and in input_std"),
    ("facts.input_std", [1.0] * 3, "as many numbers in input_mean and in input_std"),
    ("facts.input_std", [1.0, 0.0, 1.0], "recipe.facts.input_std=a list of 3: expected at most"),
    ("facts.input_std", [1.0, float("nan"), 1.0], "recipe.facts.input_std=a list of 3"),
    ("facts.input_std", "111", "recipe.facts.input_std='111'"),
    ("facts.input_scale", 255.0, "as many numbers in input_mean and in input_std"),
    ("facts.input_scale", 0.0, "recipe.facts.input_scale=0.0: expected a finite number above 0"),
    ("facts", FACTS | {"input_mean": [0.0] * 2, "input_std": [1.0] * 2}, "has 3 features"),
    ("task.name", "é" * 200, "recipe.task.name='é"),
    ("task.file", 3, "recipe.task.file=3: expected a path"),
    ("task.size", 10**6, "recipe.task.size=1000000: expected null, or a whole number"),
    ("facts.feature_names", ["a", "b"], "2 feature_names and 0 feature_categories"),
    ("facts.source_sha256", "../x", "recipe.facts.source_sha256='../x': expected 64 hexadecimal"),
    ("facts.feature_categories", [["a"] * 20_000], "recipe.facts.feature_categories=a list of 1"),
    ("task.root", "\ud800", r"recipe.task.root='\ud800': expected null, or a path"),
    ("calibration", 2.0, "recipe.calibration=2.0: expected a dictionary"),
    ("calibration", {}, "recipe.calibration: has no name"),
    ("calibration", {"name": "deviation"}, "calibration='deviation' with no numbers: expected one"),
    ("calibration", {"name": "deviation", "factor": 0.0}, "recipe.calibration.factor=0.0"),
    ("calibration", {"name": "deviation", "factor": "2"}, "recipe.calibration.factor='2'"),
    ("calibration", {"name": "deviation", "_target_": "a.B"}, "no key '_target_' is known"),
    ("calibration", {"name": "temperature", "temperature": 2.0}, "is not for a regression of 2"),
    ("net", {"name": "mlp", "hidden_features": 3}, "cannot be built from these options"),
]


@pytest.mark.parametrize(("key", "value", "said"), REFUSED)
def test_a_recipe_follows_the_schema_and_names_known_classes(
    key: str, value: object, said: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "a.ckpt", recipe=altered(key, value))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load(path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "quant",
    [
        {"weight_bits": 99},
        {"_target_": "os.system"},
        {"noise_range": "3"},
        {"overrides": 3},
        {"overrides": [{"layer": 3, "weight_bits": 3}]},
        {"engine": ["fbgemm"]},
        {1: 2, "weight_bits": 3},
    ],
)
def test_a_quantization_is_checked_too(quant: dict, tmp_path: Path) -> None:
    recipe = {**RECIPE, "stage": "ptq", "quant": quant}
    path = saved(tmp_path / "a.ckpt", recipe=recipe)
    with pytest.raises(ValueError, match=r"a.ckpt is refused: quant"):
        load(path)
    assert find_checkpoints(str(tmp_path / "*.ckpt")) == {path: None}


@pytest.mark.parametrize("odd", [altered("facts.target_std", 10**400), nested({}, 30), None])
def test_one_odd_checkpoint_of_a_pattern_does_not_stop_the_others(
    odd: object, tmp_path: Path
) -> None:
    good, bad = saved(tmp_path / "a.ckpt"), saved(tmp_path / "b.ckpt", recipe=odd)
    assert find_checkpoints(str(tmp_path / "*.ckpt"), "float") == {good: RECIPE, bad: None}


@pytest.mark.parametrize("nll", ["NaN", "1e999", "[]", '"0"', "true", "1" + "0" * 400, "{"])
def test_the_best_run_is_found_despite_invalid_metrics(nll: str, tmp_path: Path) -> None:
    paths = [saved(_folder(tmp_path / name) / "a.ckpt") for name in "ab"]
    (tmp_path / "a" / "metrics.json").write_text(f'{{"val/nll": {nll}}}')
    (tmp_path / "b" / "metrics.json").write_text('{"val/nll": 7}')
    assert list(find_checkpoints(str(tmp_path / "*/a.ckpt"), "float", "best")) == paths[1:]


def test_names_that_are_paths_never_become_folders(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", recipe=altered("task.name", "../../evil"))
    with pytest.raises(ValueError, match="expected a name without slashes"):
        find_checkpoints(str(path), "float", "all")
    assert find_checkpoints(str(tmp_path / "*.ckpt"), "float", "all") == {path: None}


def test_runs_without_validation_have_no_best_run(tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{name}.ckpt") for name in "ab"]
    with pytest.raises(ValueError, match=r"no run of .* has a val/nll to choose by"):
        find_checkpoints(str(tmp_path / "*.ckpt"), "float", "best")
    paths[0].unlink()
    assert list(find_checkpoints(str(tmp_path / "*.ckpt"), "float", "best")) == paths[1:]


def test_a_checkpoint_does_not_choose_what_is_read_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    task = {"name": "images", "dataset": "images", "root": str(tmp_path / "there")}
    config = {"checkpoint": "a.ckpt", "task": task, "data_dir": "data", "seed": 0}
    with pytest.raises(ValueError, match=r"neither below the working directory nor below data_dir"):
        make_data(config)
    for near in ({"data_dir": str(tmp_path)}, {"task": {**task, "root": "there"}}):
        with pytest.raises(FileNotFoundError, match=r"no folder .*there/train"):
            make_data({**config, **near})
    table = {"name": "t", "dataset": "table", "file": str(tmp_path / "there.csv"), "target": "y"}
    (here / "link.csv").symlink_to(tmp_path / "there.csv")
    for file in (table["file"], "../there.csv", "link.csv"):
        with pytest.raises(ValueError, match=r"neither below the working directory nor below data"):
            make_data({**config, "task": {**table, "file": file}})
        with pytest.raises(FileNotFoundError, match=r"no file "):
            make_data({**config, "task": {**table, "file": file}, "trust": True})


# ---- shapes


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("net.hidden_features", [65_536] * 200),  # 3.5 TB
        ("facts.input_shape", [1_000_000] * 3),
        ("method", {**RECIPE["method"], "name": "sghmc", **ENSEMBLE}),
        ("method", {**RECIPE["method"], "name": "ensemble", "num_members": 3}),
        ("method", {**RECIPE["method"], "name": "ensemble", "num_members": 10_000}),
    ],
)
def test_an_oversized_recipe_is_refused_before_anything_is_allocated(
    key: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = set()
    register = torch.nn.Module.register_parameter

    def watched(module: torch.nn.Module, name: str, param: Any) -> None:
        if param is not None:
            devices.add(param.device.type)
        register(module, name, param)

    state = build(RECIPE).state_dict()
    if "net" not in key:
        state["net.collected"] = torch.tensor(10_000)
    path = saved(tmp_path / "a.ckpt", recipe=altered(key, value), state_dict=state)
    monkeypatch.setattr(torch.nn.Module, "register_parameter", watched)
    with pytest.raises(ValueError, match=r"a.ckpt: [^\n]+$"):
        load(path)
    assert devices <= {"meta"}


def test_members_are_counted_before_any_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(altered("method", {**RECIPE["method"], "name": "sghmc", **ENSEMBLE}))
    assert isinstance(model.net, Ensemble)
    model.net.collect()
    monkeypatch.setattr(Ensemble, "_add_member", None)  # nothing may call it
    for count in (10_000, 2, -1, 2**40, [1, 1], 1.0):
        state = {**model.state_dict(), "net.collected": torch.tensor(count)}
        path = saved(tmp_path / "a.ckpt", recipe=model.recipe, state_dict=state)
        with pytest.raises(ValueError, match=r"net.collected(=| is not a number)"):
            load(path)
    state = {**model.state_dict(), "net.collected": torch.tensor(10_000)}
    state["net.members.9999.output.heads.0.linear.bias"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"net.collected=10000 members, but the state lacks some"):
        load(saved(tmp_path / "a.ckpt", recipe=model.recipe, state_dict=state))
    names = model.net.current.state_dict()  # empty tensors take no room in a file
    state |= {f"net.members.{i}.{n}": torch.zeros(0) for i in range(20) for n in names}
    state["net.collected"] = torch.tensor(20)
    with pytest.raises(ValueError, match=r"net.collected=[0-9]+ members, but the state lacks some"):
        load(saved(tmp_path / "a.ckpt", recipe=model.recipe, state_dict=state))


def test_integers_are_compared_on_inputs_that_fit_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes: list[Any] = []

    def convert(net: Any, *_: Any, probe: Any, **__: Any) -> Any:
        sizes.append(probe)
        return net

    monkeypatch.setattr("bqnn.checkpoints.recipe.convert", convert)
    net = {"name": "resnet", "width": 2, "blocks_per_stage": [1]}
    for side in (16, 400, 1_000_000):
        facts = {**RECIPE["facts"], "input_shape": [1, side, side]}
        recipe = {**RECIPE, "net": net, "facts": facts, "stage": "ptq", "quant": {}}
        model = build(recipe)
        quantize_module(model, QuantSpec(), "ptq")
        path = saved(tmp_path / "a.ckpt", recipe=recipe, state_dict=model.state_dict())
        load(path, "int8")
    small, large, none = sizes
    assert (small.shape, large.shape) == ((4, 1, 16, 16), (1, 1, 400, 400))
    assert none is None
    assert "not compared with their simulation" in caplog.text


def test_layers_are_not_made_that_the_state_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_layers = 0
    make = torch.nn.Conv2d.__init__

    def counted(*args: Any, **options: Any) -> None:
        nonlocal num_layers
        num_layers += 1
        make(*args, **options)

    monkeypatch.setattr(torch.nn.Conv2d, "__init__", counted)
    recipe = altered("net", {"name": "resnet", "blocks_per_stage": [256] * 8})
    recipe["facts"] = {"likelihood": "classification", "class_names": ["a", "b"]}
    recipe["facts"] |= {"input_shape": [3, 32, 32], "num_train": 1}
    with pytest.raises(ValueError, match="many more layers than it has weights for"):
        load(saved(tmp_path / "a.ckpt", recipe=recipe))
    assert num_layers < 300


def test_weights_load_strictly(tmp_path: Path) -> None:
    state = build(RECIPE).state_dict()
    name, _ = state.popitem()
    with pytest.raises(ValueError, match=f"do not match its recipe: .*Missing key.*{name}"):
        load(saved(tmp_path / "a.ckpt", state_dict=state))
    state[name] = torch.zeros(7, 7)
    with pytest.raises(ValueError, match=f"do not match its recipe: .*size mismatch for {name}"):
        load(saved(tmp_path / "a.ckpt", state_dict=state))


@pytest.mark.parametrize("kind", [torch.float64, torch.int64, torch.bfloat16, torch.bool])
def test_weights_are_of_the_type_that_the_network_has(kind: torch.dtype, tmp_path: Path) -> None:
    state = {name: value.to(kind) for name, value in build(RECIPE).state_dict().items()}
    with pytest.raises(ValueError, match=f"is of {kind}, and its recipe's network has"):
        load(saved(tmp_path / "a.ckpt", state_dict=state))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    state = build(RECIPE).state_dict()
    name = next(iter(state))
    state[name][0] = value
    with pytest.raises(ValueError, match=rf"a.ckpt: {name} has [^\n]+$"):
        load(saved(tmp_path / "a.ckpt", state_dict=state))


def test_a_quantized_state_of_any_numbers_is_refused_or_predicts(tmp_path: Path) -> None:
    model = build(RECIPE)
    quantize_module(model, QuantSpec())
    model(torch.randn(8, 3))
    state, num_refused = model.state_dict(), 0
    one_of_each = {name.rpartition(".")[2]: name for name in state}
    for name in one_of_each.values():
        extremes = (float("nan"), 3e38, -1.0) if state[name].is_floating_point() else (300, -1)
        for extreme in extremes:
            odd = {**state, name: torch.full_like(state[name], extreme)}
            path = saved(tmp_path / "a.ckpt", recipe=model.recipe, state_dict=odd)
            for numeric in ("simulated", "int8"):
                try:
                    loaded = load(path, numeric)
                except ValueError as error:
                    assert str(path) in str(error)  # noqa: PT017
                    assert "\n" not in str(error)  # noqa: PT017
                    num_refused += 1
                else:
                    assert loaded.predictive(torch.ones(2, 3), 1).shape == (1, 2, 2)
    assert num_refused > len(one_of_each)


@pytest.mark.parametrize("observer", ["minmax", "moving_average"])
def test_a_quantized_checkpoint_passes_the_check_of_shapes(observer: str, tmp_path: Path) -> None:
    model = build(RECIPE)
    quantize_module(model, QuantSpec(weight_observer=observer))
    model(torch.randn(8, 3))  # ranges now have shapes
    path = saved(tmp_path / "a.ckpt", recipe=model.recipe, state_dict=model.state_dict())
    expected = model.eval()(torch.ones(2, 3))
    assert torch.equal(load(path)(torch.ones(2, 3)), expected)


def test_only_a_training_is_gone_on_with(tmp_path: Path) -> None:
    training: dict[str, Any] = {
        **{"epoch": 3, "global_step": 9, "loops": {}, "callbacks": {}, "optimizer_states": []},
        **{"lr_schedulers": [], "pytorch-lightning_version": "2.6.0"},
    }
    assert trained_epochs(saved(tmp_path / "a.ckpt", **training)) == 4
    for key in training:
        with pytest.raises(ValueError, match=rf"a.ckpt has no {key} of a training"):
            trained_epochs(saved(tmp_path / "a.ckpt", **{**training, key: 0.5}))
    for epoch in (-1, 2**40):
        with pytest.raises(ValueError, match=f"is of epoch {epoch}"):
            trained_epochs(saved(tmp_path / "a.ckpt", **{**training, "epoch": epoch}))


def test_the_schema_accepts_a_valid_recipe() -> None:
    check_recipe(RECIPE)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"val/nll": null}', '{"val/nll": [1]}', '{"val/nll": NaN}', "1" * 400],
)
def test_an_odd_metrics_file_counts_as_the_worst(content: str, tmp_path: Path) -> None:
    for name, text in (("a", content), ("b", '{"val/nll": 1.5}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(text)
    recipe = {"method": {"name": "bbb"}, "task": {"name": "digits"}}
    found: dict[Path, dict | None] = {tmp_path / name / "x.ckpt": recipe for name in ("a", "b")}
    assert list(_best_of_each(found)) == [tmp_path / "b" / "x.ckpt"]


def test_members_of_an_ensemble_start_from_their_own_streams_of_the_seed() -> None:
    recipe = altered("method", {**RECIPE["method"], "name": "ensemble", "num_members": 3})
    nets = build(recipe).net.members
    assert isinstance(nets, torch.nn.ModuleList)
    first = build(RECIPE).net
    weights = [next(net.parameters()) for net in (first, *nets)]
    assert torch.equal(weights[0], weights[1])  # that of a pointwise network
    assert not any(torch.equal(a, b) for a, b in combinations(weights[1:], 2))
    torch.manual_seed(99)
    for net, again in zip(nets, build(recipe).net.members, strict=True):
        assert torch.equal(next(net.parameters()), next(again.parameters()))
    other = build({**recipe, "seed": 1}).net.members
    assert not torch.equal(next(other[1].parameters()), weights[2])
