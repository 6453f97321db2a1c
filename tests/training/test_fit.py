"""The start of a training, and the keys that its errors name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bqnn.checkpoints.file import read_checkpoint
from bqnn.methods.pointwise import Pointwise

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


def test_a_given_network_gets_its_curvature_in_one_epoch(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    pointwise = ["method=pointwise", "trainer.max_epochs=3", "hydra.run.dir=p"]
    assert script_here("train", *QUICK, *pointwise)[0] == 0
    laplace = [*QUICK, "method=laplace", "method.init_from=p/checkpoint.ckpt", "hydra.run.dir=l"]
    assert script_here("train", *laplace)[0] == 0
    found = read_checkpoint(tmp_path / "l" / "checkpoint.ckpt")
    state, given = found["state_dict"], read_checkpoint(tmp_path / "p" / "checkpoint.ckpt")
    for name, value in given["state_dict"].items():
        mean = name.replace(".weight", ".mean")
        assert torch.equal(state[mean if mean in state else name], value)
    assert found["epoch"] == 0
    # A resumed job has nothing left to train, even if it was stopped before it was DONE.
    status = tmp_path / "l" / "status.json"
    status.write_text(status.read_text().replace("DONE", "INTERRUPTED"))
    code, errors = script_here("train", *laplace, "resume=true")
    assert code == 0, errors
    again = read_checkpoint(tmp_path / "l" / "checkpoint.ckpt")["state_dict"]
    assert all(torch.equal(again[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["method=swag", "quant=default"], "quant=default: method=swag sets its posterior after"),
        (
            ["method=laplace", "trainer.save_best=true", "trainer.check_val_every_n_epoch=1"],
            "trainer.save_best=true: method=laplace sets its posterior after the last epoch",
        ),
        (
            ["method=laplace", "task.validation_share=0"],
            "method.prior=validation: there are no validation rows; provide some, or choose "
            "method.prior=marginal_likelihood",
        ),
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


def test_an_own_loss_that_cannot_imitate_names_the_key_of_quantize(
    script_here: ScriptHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["method=pointwise", "trainer.max_epochs=1", "hydra.run.dir=p"]
    assert script_here("train", *QUICK, *run)[0] == 0
    monkeypatch.setattr(Pointwise, "loss_terms", learns_the_targets)
    code, errors = script_here("quantize", "checkpoint=p", "logger=none", "plots=false")
    assert code == 1
    assert "quant.fine_tuning.imitate=true: loss_terms of Pointwise learns the targets" in errors


def learns_the_targets(method: Pointwise, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    nll = method.net(inputs).square().mean() + targets.square().mean()
    return {"loss": nll, "nll": nll}
