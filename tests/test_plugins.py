"""Plug-ins are found by path or entry point; checkpoints import only trusted ones."""

import sys
from collections.abc import Callable
from copy import deepcopy
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bqnn import plugins
from bqnn.checkpoints.recipe import build, load
from bqnn.checkpoints.schema import check_recipe
from bqnn.commands.choices import check_training
from bqnn.data import DATASETS, TensorData, build_data
from bqnn.data.task import make_data
from bqnn.methods import METHODS, Method
from bqnn.nets import MLP, NETS
from bqnn.plugins import find_class, foreign

CODE = """
from pathlib import Path

import torch
from torch import nn

from bqnn.data.synthetic import SyntheticData
from bqnn.methods import Pointwise
from bqnn.nets import MLP

Path(__file__).with_name("imported").touch()
from os import system
some_object = MLP([3], [1, 1])

class Net(MLP):
    def __init__(self, input_shape, heads, *, width=4):
        super().__init__(input_shape, heads, hidden_features=[width])

class Plain(nn.Sequential):
    def __init__(self, features, outputs=2):
        super().__init__(nn.Linear(features, 4), nn.BatchNorm1d(4), nn.Linear(4, outputs))

def make(heads, **options):
    return nn.LazyLinear(sum(heads)) if options.pop("good", True) else {"no": "network"}

class OwnMethod(Pointwise):
    def __init__(self, net, likelihood, *, strength=1.0, **options):
        super().__init__(net, likelihood, **options)
        self.strength = strength

class OwnData(SyntheticData):
    pass
"""
RECIPE: dict[str, Any] = {
    "version": 1,
    "stage": "float",
    "seed": 0,
    "method": {"name": "pointwise", "optimizer": {"name": "adam"}},
    "net": {"name": "Net", "_target_": "foreign_code.Net", "width": 5},
    "task": {"name": "table", "dataset": "uci"},
    "facts": {
        "likelihood": "regression",
        "target_mean": 0.0,
        "target_std": 1.0,
        "input_shape": [3],
        "num_train": 10,
    },
}
OWN_METHOD = {**RECIPE["method"], "name": "OwnMethod", "_target_": "foreign_code.OwnMethod"}


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Return the module foreign_code, and whether it has been imported."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "foreign_code.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "foreign_code", raising=False)
    return (folder / "imported").exists


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Declare entry points as an installed package does."""
    found = {
        "bqnn.nets": {"mine": "foreign_code:Net", "lenet": "foreign_code:Net"},
        "bqnn.methods": {"my_method": "foreign_code:OwnMethod"},
        "bqnn.data": {"my_data": "foreign_code:OwnData"},
    }

    def entry_points(group: str, name: str | None = None) -> list[EntryPoint]:
        entries = [EntryPoint(key, value, group) for key, value in found[group].items()]
        return [entry for entry in entries if name in (None, entry.name)]

    monkeypatch.setattr(plugins, "entry_points", entry_points)


def altered(group: str, **options: Any) -> dict[str, Any]:
    return {**RECIPE, group: {**RECIPE[group], **options}}


def saved(path: Path, recipe: dict[str, Any]) -> Path:
    torch.save({"recipe": recipe, "state_dict": build(recipe).state_dict()}, path)
    sys.modules.pop("foreign_code")
    (path.parent / "foreign" / "imported").unlink()
    return path


# ---- found


def test_a_class_is_found_by_its_path_and_by_its_entry_point(imported, declared):
    by_path = find_class("net", RECIPE["net"], NETS, nn.Module)
    assert by_path is find_class("net", {"name": "mine"}, NETS, nn.Module)
    assert by_path.__name__ == "Net"
    assert find_class("method", {"name": "my_method"}, METHODS, Method).__name__ == "OwnMethod"
    assert find_class("task", {"dataset": "my_data"}, DATASETS, TensorData).__name__ == "OwnData"


def test_names_of_bqnn_win_over_entry_points_and_paths_over_names(imported, declared):
    assert find_class("net", {"name": "lenet"}, NETS, nn.Module) is NETS["lenet"]
    assert foreign("net", {"name": "lenet"}, NETS) is None
    labelled = {"name": "lenet", "_target_": "foreign_code.Net"}
    assert foreign("net", labelled, NETS) == "foreign_code.Net"
    assert find_class("net", labelled, NETS, nn.Module).__name__ == "Net"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"name": "min"},
            r"^net.name='min': unknown; did you mean mine\? choose one of mlp, .*mine",
        ),
        ({"_target_": "no_such_package.Net"}, "cannot be imported .*No module named.*PYTHONPATH"),
        ({"_target_": "foreign_code.Nett"}, "cannot be imported .*has no attribute 'Nett'"),
        ({"_target_": "foreign_code.some_object"}, "it is an MLP; give the path of a subclass of"),
        ({"_target_": "foreign_code.system"}, "it is a builtin_function_or_method; give the path"),
        ({"_target_": "foreign_code.OwnData"}, "it is a class; give the path of a subclass of"),
        ({"_target_": "foreign_code.Path"}, "it is a class; give the path of a subclass of torch"),
    ],
)
def test_other_objects_than_networks_are_refused_in_one_line(options, said, imported, declared):
    with pytest.raises(ValueError, match=said) as error:
        find_class("net", options, NETS, nn.Module)
    assert "\n" not in str(error.value)


def test_a_module_that_fails_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_code.py").write_text("raise RuntimeError('two\\nlines')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        ValueError, match=r"^net._target_=broken_code.Net: .*RuntimeError: two line"
    ):
        find_class("net", {"_target_": "broken_code.Net"}, NETS, nn.Module)


# ---- built


def test_a_network_gets_the_shapes_that_it_has_arguments_for(imported):
    assert isinstance(build(RECIPE).net, MLP)
    options = {"name": "p", "_target_": "foreign_code.Plain", "features": 3}
    net = build({**RECIPE, "net": options}).net
    assert net[0].in_features == 3
    assert all(module.training for module in net.modules())  # the check leaves it as it was
    assert int(net[1].num_batches_tracked) == 0
    lazy = build({**RECIPE, "net": {"name": "make", "_target_": "foreign_code.make"}}).net
    assert lazy.weight.shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"features": 5}, r"net=x fails on inputs of shape \(2, 3\) .*argument input_shape$"),
        ({"features": 3, "outputs": 7}, r"outputs of shape \(2, 7\) .*need \(2, 2\): a mean and a"),
        ({"features": 3, "depth": 7}, r"^net=x cannot be built .*unexpected keyword argument 'd"),
        ({"_target_": "foreign_code.make", "good": False}, "net=x returned a dict of 1, not a tor"),
    ],
)
def test_a_network_that_does_not_suit_the_data_is_refused(options, said, imported):
    options = {"name": "x", "_target_": "foreign_code.Plain", **options}
    with pytest.raises(ValueError, match=said) as error:
        build({**RECIPE, "net": options})
    assert "\n" not in str(error.value)


def test_a_method_and_a_data_set_get_their_options(imported):
    method: Any = build({**RECIPE, "method": {**OWN_METHOD, "strength": 3.0, "num_samples": 2}})
    assert (method.strength, method.num_samples) == (3.0, 2)
    data: Any = build_data(
        "any", data_dir="d", seed=3, options={"num_train": 9}, target="foreign_code.OwnData"
    )
    assert (data.num_train, data.seed) == (9, 3)


def test_options_are_checked_before_a_training(imported):
    config = {
        **{group: deepcopy(RECIPE[group]) for group in ("seed", "method", "net")},
        "task": {"name": "t", "dataset": "d", "_target_": "foreign_code.OwnData", "num_test": 3},
        "quant": {"name": "none"},
    }
    check_training(config)
    for group, said in (("net", "net.widht: net=Net has no such option; did you mean net.width"),):
        with pytest.raises(ValueError, match=said):
            check_training({**config, group: {**config[group], "widht": 3}})
    with pytest.raises(ValueError, match=r"^task.num_tst: .*did you mean task.num_test"):
        check_training({**config, "task": {**config["task"], "num_tst": 3}})
    with pytest.raises(ValueError, match=r"^net.features is missing: net=P requires it"):
        check_training({**config, "net": {"name": "P", "_target_": "foreign_code.Plain"}})
    method = {**OWN_METHOD, "num_samples": 0}
    with pytest.raises(ValueError, match=r"^method.num_samples=0: expected a whole number"):
        check_training({**config, "method": method})


# ---- trusted


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (RECIPE, "its net is 'foreign_code.Net'"),
        (altered("net", name="mlp"), "its net is 'foreign_code.Net'"),
        ({**RECIPE, "net": {"name": "mine", "width": 5}}, "its net is 'foreign_code:Net'"),
        (
            {**RECIPE, "method": OWN_METHOD},
            "its method is 'foreign_code.OwnMethod', its net is 'foreign_code.Net'",
        ),
        (
            {**RECIPE, "net": {"name": "mlp"}, "method": {**RECIPE["method"], "name": "my_method"}},
            "its method is 'foreign_code:OwnMethod'",
        ),
    ],
)
def test_a_checkpoint_imports_nothing_unless_it_is_trusted(
    recipe, said, imported, declared, tmp_path
):
    path = saved(tmp_path / "a.ckpt", recipe)
    with pytest.raises(ValueError, match=rf"a\.ckpt: {said}; opening it would .*add trust=true"):
        load(path)
    assert not imported()
    model = load(path, trust=True)
    assert imported()
    expected = build(recipe).eval().predictive(torch.ones(2, 3))
    assert torch.equal(model.predictive(torch.ones(2, 3)), expected)


def test_a_data_set_of_a_checkpoint_is_imported_if_it_is_trusted(imported, declared):
    config = {"seed": 0, "data_dir": "data", "checkpoint": "a.ckpt"}
    for task in ({"dataset": "x", "_target_": "foreign_code.OwnData"}, {"dataset": "my_data"}):
        with pytest.raises(
            ValueError, match=r"^a\.ckpt: its task is 'foreign_code.OwnData'; .*trus"
        ):
            make_data({**config, "task": {"name": "x", **task}})
    assert not imported()
    for given in ({"trust": True}, {"checkpoint": None}):
        mine: dict[str, Any] = {"name": "x", "dataset": "my_data", "num_test": 9}
        own = {key: value for key, value in {**config, **given}.items() if value is not None}
        assert len(make_data({**own, "task": mine}).test) == 9


def bomb(levels: int) -> object:
    value: object = 0
    for _ in range(levels):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "options",
    [
        *({"x": value} for value in (bomb(100), [0] * 20_000, float("nan"), 10**400, "x" * 5000)),
        *({"x": value} for value in ({"_target_": "a.B"}, {1: 2}, {"a b": 1}, torch.zeros(1), b"")),
        *({key: 1} for key in ("_args_", "a b", "a.b", "", "x" * 99, "__init__")),
        {"x": [[[[[[[[[0]]]]]]]]]},
    ],
)
def test_options_of_a_plug_in_are_plain_values(options):
    check_recipe(altered("net", x={"a": [1, 0.5, None, True, "b"]}))
    with pytest.raises(ValueError, match=r"^recipe\.net") as error:
        check_recipe(altered("net", **options))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("group", "options"),
    [
        ("method", {"num_samples": 10**9}),
        ("method", {"schedule": "x"}),
        ("method", {"optimizer": {"name": "adam", "lr": -1}}),
        ("task", {"name": "../x"}),
        ("task", {"batch_size": 0}),
        ("net", {"_target_": "os.system"}),
        ("net", {"name": "../x"}),
    ],
)
def test_the_rules_of_common_options_hold_for_plug_ins(group, options):
    target = {"_target_": "a.B", **options}
    with pytest.raises(ValueError, match=rf"^recipe\.{group}\."):
        check_recipe(altered(group, **target))
