"""The start of a training, and the keys that its errors name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bqnn.checkpoints.file import read_checkpoint

ScriptHere = Callable[..., tuple[int, str]]
QUICK = ["task=synthetic", "task.num_train=200", "logger=none", "plots=false", "net=mlp"]


def sigma_is_a_share_of_the_mean(path: Path) -> bool:
    """Return whether each rho has the value that `init_from` sets."""
    state = read_checkpoint(path)["state_dict"]
    shares = [
        torch.nn.functional.softplus(state[name.replace(".mean", ".rho")]) / mean.abs()
        for name, mean in state.items()
        if name.endswith(".mean")
    ]
    return all((share.median() - 0.1).abs() < 1e-2 for share in shares)


def test_a_run_to_start_from_is_needed_only_once(script_here: ScriptHere, tmp_path: Path) -> None:
    pointwise = ["method=pointwise", "trainer.max_epochs=1", "hydra.run.dir=p"]
    assert script_here("train", *QUICK, *pointwise)[0] == 0
    bbb = [*QUICK, "method=bbb", "method.init_from=p/checkpoint.ckpt", "hydra.run.dir=b"]
    bbb += ["method.optimizer.lr=1e-9"]
    assert script_here("train", *bbb, "trainer.max_epochs=1")[0] == 0
    (tmp_path / "p" / "checkpoint.ckpt").unlink()
    path = tmp_path / "b" / "checkpoint.ckpt"
    assert sigma_is_a_share_of_the_mean(path)
    code, errors = script_here("train", *bbb, "trainer.max_epochs=2", "resume=true")
    assert code == 0, errors
    quick = ["logger=none", "plots=false", "quant.mode=qat", "quant.fine_tuning.max_epochs=1"]
    code, errors = script_here("quantize", f"checkpoint={path}", *quick)
    assert code == 0, errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["method=pointwise", "method.optimizer.lr=1e30"],
            "likely causes: method.optimizer.lr is too high",
        ),
        (
            ["method=sghmc", "+trainer.gradient_clip_val=1"],
            "trainer.gradient_clip_val=1: clipped gradients are not those of the posterior that "
            "sghmc samples; leave it out, and choose a smaller method.optimizer.lr",
        ),
        (["quant=default", "trainer.precision=bf16-mixed"], "trainer.precision=bf16-mixed: ranges"),
        (
            ["quant=default", "quant.overrides=[{layer: a, weight_bits: 8}]"],
            "quant.overrides: layer='a' matches no layer",
        ),
        (
            ["task.num_train=1", "task.validation_share=0.9"],
            "task.validation_share=0.9: it leaves none of the 1 rows",
        ),
    ],
)
def test_an_error_names_the_key_that_is_to_be_changed(
    options: list[str], said: str, script_here: ScriptHere
) -> None:
    code, errors = script_here("train", *QUICK, "trainer.max_epochs=3", *options)
    assert code == 1
    assert said in errors


def test_a_fine_tuning_has_an_optimizer_of_its_own(script_here: ScriptHere) -> None:
    run = ["method=pointwise", "trainer.max_epochs=1", "hydra.run.dir=p"]
    assert script_here("train", *QUICK, *run)[0] == 0
    arguments = ["checkpoint=p/checkpoint.ckpt", "logger=none", "plots=false", "quant.mode=qat"]
    arguments += ["quant.fine_tuning.max_epochs=3", "quant.fine_tuning.optimizer.lr=1e30"]
    code, errors = script_here("quantize", *arguments)
    assert code == 1
    assert "likely causes: quant.fine_tuning.optimizer.lr is too high" in errors
