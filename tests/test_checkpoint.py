"""A checkpoint file is data: what is no checkpoint is refused, and runs nothing."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from bqnn.checkpoint import read_checkpoint
from bqnn.recipe import build, load

RECIPE = {
    "version": 1,
    "stage": "float",
    "seed": 0,
    "method": {"name": "pointwise", "num_samples": 1, "optimizer": {"name": "adam", "lr": 0.1}},
    "net": {"name": "mlp", "hidden_features": [4]},
    "task": {"name": "yacht"},
    "facts": {
        "likelihood": "regression",
        "target_mean": 0.0,
        "target_std": 1.0,
        "input_shape": [3],
        "num_train": 10,
    },
}


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("evil",)


def saved(path: Path, **changes: object) -> Path:
    content = {"state_dict": build(RECIPE).state_dict(), "recipe": RECIPE, **changes}
    torch.save(content, path)
    return path


def test_a_checkpoint_rebuilds_its_model(tmp_path: Path) -> None:
    model = load(saved(tmp_path / "a.ckpt"))
    assert not model.training
    x = torch.randn(5, 3)
    assert torch.equal(model(x), build(RECIPE).eval()(x))


def test_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, write in (("torch", torch.save), ("pickle", _pickle)):
        write({"recipe": Evil(), "state_dict": {}}, tmp_path / name)
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            load(tmp_path / name)
    assert not (tmp_path / "evil").exists()


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.ckpt").write_bytes(b"")
    for name in ("half", "empty"):
        with pytest.raises(ValueError, match=f"{name}.ckpt cannot be read as a checkpoint"):
            read_checkpoint(tmp_path / f"{name}.ckpt")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no recipe and state_dict"):
        read_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "missing.ckpt")


def test_weights_load_strictly(tmp_path: Path) -> None:
    state = build(RECIPE).state_dict()
    state.popitem()
    with pytest.raises(RuntimeError, match="Missing key"):
        load(saved(tmp_path / "a.ckpt", state_dict=state))


@pytest.mark.parametrize(
    ("group", "value", "said"),
    [
        ("method", {"name": "os.system"}, "method.name='os.system': unknown"),
        ("net", {"name": "mlp", "depth": 3}, "net=mlp cannot be built"),
        ("facts", {"likelihood": "poisson", "input_shape": [3], "num_train": 1}, "poisson"),
    ],
)
def test_a_recipe_names_only_what_is_in_the_tables(group: str, value: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", "\\(")):
        build({**RECIPE, group: value})


def _pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))
