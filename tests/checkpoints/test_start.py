"""Bayes-by-backprop is initialized from a pointwise run; other files are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bqnn.checkpoints.recipe import build, load, start_keys
from bqnn.checkpoints.start import start_from
from bqnn.methods import METHODS, BayesByBackprop, Method
from tests.small_methods import ADAM, NUM_ROWS, image_method, table_method


def recipe_of(method: str, **options: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "stage": "float",
        "seed": 0,
        "method": {"name": method, "optimizer": ADAM, **options},
        "net": {"name": "mlp", "hidden_features": [4]},
        "task": {"name": "made", "dataset": "up"},
        "facts": {
            **{"likelihood": "regression", "target_mean": 0.0, "target_std": 1.0},
            **{"input_shape": [3], "num_train": NUM_ROWS},
        },
    }


def saved(method: Method, name: str, folder: Path) -> str:
    path = folder / f"{name}.ckpt"
    torch.save({"recipe": recipe_of(name), "state_dict": method.state_dict()}, path)
    return str(path)


def bbb() -> BayesByBackprop:
    method = table_method("bbb")
    assert isinstance(method, BayesByBackprop)
    return method


def test_means_are_the_weights_of_the_run(tmp_path: Path) -> None:
    pointwise, bayes = table_method("pointwise"), bbb()
    with torch.no_grad():
        for param in pointwise.parameters():
            param.add_(1)
    start_from(bayes, saved(pointwise, "pointwise", tmp_path))
    weight = pointwise.state_dict()["net.output.heads.0.linear.weight"]
    assert torch.equal(bayes.state_dict()["net.output.heads.0.linear.mean"], weight)


def test_another_method_another_network_and_no_file_are_refused_by_the_argument(
    tmp_path: Path,
) -> None:
    path = saved(table_method("mcdropout"), "mcdropout", tmp_path)
    with pytest.raises(ValueError, match=r"^init_from=.*: this is a mcdropout run; give a point"):
        start_from(bbb(), path)
    path = saved(image_method("pointwise"), "pointwise", tmp_path)
    with pytest.raises(ValueError, match=r"^init_from=.*: its network is not this one, they diff"):
        start_from(bbb(), path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        start_from(bbb(), str(tmp_path / "missing.ckpt"))


def test_building_and_loading_a_model_ignore_the_start_of_training(tmp_path: Path) -> None:
    options = {"prior_std": 1.0, "init_rho": -3.0, "beta": 0.5}
    recipe = recipe_of("bbb", init_from="missing.ckpt", **options)
    model = build(recipe)
    path = tmp_path / "bbb.ckpt"
    torch.save({"recipe": recipe, "state_dict": model.state_dict()}, path)
    for name, value in load(path).state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_methods_with_gaussian_weights_have_a_start() -> None:
    has_start = {name: start_keys(method) for name, method in METHODS.items() if start_keys(method)}
    assert has_start == dict.fromkeys(("bbb", "swag", "laplace"), ("init_from",))
    with pytest.raises(ValueError, match=r"method=pointwise cannot be built .*init_from"):
        build(recipe_of("pointwise", init_from="a.ckpt"))
