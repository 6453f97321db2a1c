"""A checkpoint file is data: what is no checkpoint is refused, and runs nothing."""

import os
import pickle
import random
from copy import deepcopy
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch

from bqnn.checkpoint import _best_of_each, find_checkpoints, read_checkpoint
from bqnn.quant.callback import quantize_module
from bqnn.quant.spec import QuantSpec
from bqnn.recipe import build, load, make_data
from bqnn.schema import check_recipe

RECIPE: dict[str, Any] = {
    "version": 1,
    "stage": "float",
    "seed": 0,
    "method": {"name": "pointwise", "num_samples": 1, "optimizer": {"name": "adam", "lr": 0.1}},
    "net": {"name": "mlp", "hidden_features": [4]},
    "task": {"name": "yacht", "dataset": "uci"},
    "facts": {
        "likelihood": "regression",
        "target_mean": 0.0,
        "target_std": 1.0,
        "input_shape": [3],
        "num_train": 10,
    },
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
    """The recipe with another value, or a new one, at a dotted key."""
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
    state = {"net.weight": torch.zeros(1).expand(10**6, 10**6)}  # 4 bytes in the file
    with pytest.raises(ValueError, match="claim 4000000000000 bytes"):
        read_checkpoint(saved(tmp_path / "a.ckpt", state_dict=state))


@pytest.mark.parametrize("state", [[1], {"net.weight": "x"}, {1: torch.zeros(1)}])
def test_a_state_is_of_tensors_alone(state: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="other things than named, dense tensors"):
        read_checkpoint(saved(tmp_path / "a.ckpt", state_dict=state))


# ---- recipes

REFUSED = [
    ("version", 2, "recipe.version=2: expected 1"),
    ("stage", "int4", "recipe.stage='int4'"),
    ("stage", "qat", "has no quant"),
    ("seed", -1, "recipe.seed=-1"),
    ("_target_", "os.system", "recipe: no key '_target_' is known"),
    ("method._target_", "os.system", "recipe.method: no key '_target_' is known"),
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
    ("net.hidden_features", [4] * 10**6, "recipe.net.hidden_features="),
    ("net.hidden_features", "4", "recipe.net.hidden_features='4'"),
    ("task.name", "../../evil", "recipe.task.name='../../evil'"),
    ("task.name", "a\x1b[2Jb", "recipe.task.name='a\\x1b[2Jb'"),
    ("task.table", "../../etc", "recipe.task.table='../../etc'"),
    ("task.data_dir", "/etc", "recipe.task: no key 'data_dir'"),
    ("task.url", "http://evil", "recipe.task: no key 'url'"),
    ("task.num_train", 10**12, "recipe.task.num_train="),
    ("facts.likelihood", "poisson", "poisson"),
    ("facts.input_shape", [3.0], "recipe.facts.input_shape=[3.0]"),
    ("facts.class_names", [Path("x")], "cannot be read as a checkpoint"),
    ("facts", "regression", "recipe.facts='regression': expected a dictionary"),
]


@pytest.mark.parametrize(("key", "value", "said"), REFUSED)
def test_a_recipe_holds_what_the_schema_says_and_names_what_is_in_the_tables(
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
    ],
)
def test_a_quantization_is_checked_too(quant: dict, tmp_path: Path) -> None:
    recipe = {**RECIPE, "stage": "ptq", "quant": quant}
    with pytest.raises(ValueError, match="quant"):
        load(saved(tmp_path / "a.ckpt", recipe=recipe))


def test_names_that_are_paths_never_become_folders(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", recipe=altered("task.name", "../../evil"))
    with pytest.raises(ValueError, match="expected a name without slashes"):
        find_checkpoints(str(path), "float", "all")
    assert find_checkpoints(str(tmp_path / "*.ckpt"), "float", "all") == {path: None}


def test_the_best_of_what_has_no_validation_is_not_known(tmp_path: Path) -> None:
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


# ---- shapes


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("net.hidden_features", [65_536] * 200),  # 3.5 TB
        ("facts.input_shape", [1_000_000] * 3),
        ("method", {**RECIPE["method"], "name": "sghmc", **ENSEMBLE}),
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


def test_weights_load_strictly(tmp_path: Path) -> None:
    state = build(RECIPE).state_dict()
    name, _ = state.popitem()
    with pytest.raises(ValueError, match=f"not those of its recipe: .*Missing key.*{name}"):
        load(saved(tmp_path / "a.ckpt", state_dict=state))
    state[name] = torch.zeros(7, 7)
    with pytest.raises(ValueError, match=f"not those of its recipe: .*size mismatch for {name}"):
        load(saved(tmp_path / "a.ckpt", state_dict=state))


@pytest.mark.parametrize("observer", ["minmax", "moving_average"])
def test_a_quantized_checkpoint_passes_the_check_of_shapes(observer: str, tmp_path: Path) -> None:
    model = build(RECIPE)
    quantize_module(model, QuantSpec(weight_observer=observer))
    model(torch.randn(8, 3))  # ranges now have shapes
    path = saved(tmp_path / "a.ckpt", recipe=model.recipe, state_dict=model.state_dict())
    expected = model.eval()(torch.ones(2, 3))
    assert torch.equal(load(path)(torch.ones(2, 3)), expected)


def test_the_schema_takes_what_is_there() -> None:
    check_recipe(RECIPE)


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
