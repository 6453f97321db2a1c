"""train.py: the files that it writes, its error messages and its exit codes."""

import csv
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from bqnn.checkpoints.file import read_checkpoint
from bqnn.checkpoints.recipe import load
from bqnn.data.task import make_data
from bqnn.jobs.claim import WRITTEN
from bqnn.methods import METHODS
from tests.running import run_script

ROOT = Path(__file__).resolve().parents[2]
Script = Callable[..., subprocess.CompletedProcess[str]]
ScriptHere = Callable[..., tuple[int, str]]

SHORT = ["method.num_samples=3", "method.val_samples=1", "logger=none"]


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def short(method: str) -> list[str]:
    """Return overrides for a short run of a method that still collects ensemble members."""
    samples = {"pointwise": ["logger=none"]}.get(method, SHORT)
    members = ["method.burn_in=1", "method.collect_every=1"] if method == "sghmc" else []
    return [f"method={method}", "trainer.max_epochs=3", *samples, *members]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_digits_and_synthetic(
    method: str,
    script: Script,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "sweep"
    arguments = ["-m", *short(method), "task=digits,synthetic", f"hydra.sweep.dir={folder}"]
    if method == "bbb":  # one in a process of its own
        result = script("train", *arguments)
        assert result.returncode == 0, result.stderr
        output = result.stdout
    else:
        run_script("train", *arguments)
        output = capsys.readouterr().out
    jobs = sorted(path for path in folder.iterdir() if path.is_dir())
    assert len(jobs) == 2
    for job in jobs:
        metrics = json.loads((job / "metrics.json").read_text())
        assert all(math.isfinite(value) for value in metrics.values())
        assert status(job)["state"] == "DONE"
        assert str(job) in output
    digits, synthetic = jobs
    quality = {"error", "nll", "brier", "ape", "mi", "ece", "ece10", "ece_adaptive"}
    assert _keys(digits, "test") == _keys(digits, "val") == quality
    quality = {"rmse", "nll", "nll_mixture", "coverage95", "rmse_standardized", "nll_standardized"}
    quality |= {"crps", "interval_score95"}
    assert _keys(synthetic, "test") == _keys(synthetic, "val") == quality
    figures = {path.name for path in digits.glob("*.png")}
    assert figures == {"curves.png", "reliability.png", "confidence.png"}
    figures = {path.name for path in synthetic.glob("*.png")}
    assert figures == {"curves.png", "fit.png", "interval_calibration.png"}


def test_a_run_is_described_by_its_folder(
    script_here: ScriptHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, errors = script_here("train", *short("bbb"), "hydra.run.dir=run")
    assert (code, errors)[0] == 0
    run = tmp_path / "run"

    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["method"]["name"] == "bbb"
    assert config["trainer"]["max_epochs"] == 3
    assert "${" not in (run / "config.yaml").read_text()

    described = status(run)
    assert described["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert described["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert described["start"] < described["end"]

    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert {"train/loss", "train/nll", "train/kl", "train/beta", "val/nll"} <= rows[0].keys()
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())

    predictions = np.load(run / "predictions.npz")
    assert predictions["samples"].shape == (3, len(predictions["targets"]), 10)
    error = np.mean(_softmax(predictions["samples"]).mean(0).argmax(-1) != predictions["targets"])
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test/error"] == pytest.approx(error, abs=1e-6)

    opened = torch.load(run / "checkpoint.ckpt", weights_only=True)
    assert json.loads(json.dumps(opened["recipe"])) == opened["recipe"]
    assert not list(run.glob(".*"))  # nothing half-written


@pytest.mark.parametrize("method", METHODS)
def test_a_reloaded_checkpoint_predicts_bit_for_bit_the_same(method: str, trained: Path) -> None:
    run = trained / f"{method}_0"
    data = make_data(yaml.safe_load((run / "config.yaml").read_text()))
    model = load(run / "checkpoint.ckpt")
    samples = model.predictive(data.normalize(data.test.inputs))
    kept = np.load(run / "predictions.npz")
    assert np.array_equal(samples.numpy(), kept["samples"])


@pytest.mark.parametrize("method", METHODS)
def test_equal_seeds_give_bit_equal_results_and_other_seeds_others(
    method: str, script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = [*short(method), "task=synthetic", "plots=false", "task.max_epochs=5"]
    for name, seed in (("a", 1), ("b", 1), ("c", 0)):
        run = [*arguments, f"seed={seed}", f"hydra.run.dir={name}"]
        assert script_here("train", *run)[0] == 0
    a, b, c = (_quality(tmp_path / name) for name in "abc")
    assert a == b
    assert a != c
    first, second = (read_checkpoint(tmp_path / n / "checkpoint.ckpt") for n in "ab")
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name


def test_bbb_starts_from_a_pointwise_checkpoint(script_here: ScriptHere, tmp_path: Path) -> None:
    assert script_here("train", *short("pointwise"), "hydra.run.dir=p", "plots=false")[0] == 0
    path = tmp_path / "p" / "checkpoint.ckpt"
    arguments = ["plots=false", f"method.init_from={path}", "trainer.max_epochs=1"]
    arguments += ["method.optimizer.lr=1e-9", "hydra.run.dir=b"]
    assert script_here("train", *short("bbb"), *arguments)[0] == 0
    pointwise = read_checkpoint(path)["state_dict"]
    bayes = read_checkpoint(tmp_path / "b" / "checkpoint.ckpt")["state_dict"]
    for name, weight in pointwise.items():
        mean = bayes[name.replace(".weight", ".mean")]
        assert torch.allclose(mean, weight, atol=1e-6)
    code, errors = script_here("train", *short("bbb"), *arguments[:-1], "net=mlp")
    assert code == 1
    assert "its network is not this one" in errors
    quantized = ["quant=default", "hydra.run.dir=q"]  # which changes the network before training
    assert script_here("train", *short("bbb"), *arguments[:-1], *quantized)[0] == 0
    path.unlink()  # a trained model does not need it any more
    load(tmp_path / "b" / "checkpoint.ckpt")


# What never becomes a job, and what is said of it.
REFUSED = [
    (["method=nonsense"], "Could not find 'method/nonsense' (there are bbb, ensemble,"),
    (["method=bb"], "did you mean method=bbb?"),
    (["task=digit"], "did you mean task=digits?"),
    (["trainer=smok"], "did you mean trainer=smoke?"),
    (["method.lr=1"], "method.lr: there is no such key; did you mean method.optimizer.lr?"),
    (["mehod=bbb"], "mehod: there is no such key; did you mean method?"),
    (["+mehod=bbb"], "mehod: there is no such key; did you mean method?"),
    (["++mehod=bbb"], "did you mean method?"),
    (["epochs=3"], "did you mean task.max_epochs?"),
    (["method.rate=0.3"], "method=mcdropout would have it"),
    (["+method.lr=1"], "did you mean method.optimizer.lr?"),
    (["+method.beta_=1"], "did you mean method.beta?"),
    (["+method.burn_in=1"], "method.burn_in: method=bbb has no such option"),
    (["+method.optimizer.beta=[0.9,0.99]"], "did you mean method.optimizer.betas?"),
    (["+method.optimizer.friction=0.1"], "method.optimizer.friction"),
    (["+task.batchsize=3"], "did you mean task.batch_size?"),
    (["+net.chanels=[1,2]"], "did you mean net.channels?"),
    (
        ["+quant.weight_bits=3"],
        "there is no such key; quant=default would have it",
    ),
    (["quant=default", "+quant.weight_bit=3"], "did you mean quant.weight_bits?"),
    (["+trainer.max_stepz=3"], "did you mean trainer.max_steps?"),
    (["+trainer.logger=false"], "trainer.logger: there is no such key"),
    (["+logger.x.y=1"], "logger.x.y"),
    (["~seed"], "~seed: this key is needed"),
    (["~trainer.max_epochs"], "~trainer.max_epochs: this key is needed"),
    (["~trainer"], "~trainer.accelerator: this key is needed"),
    (["~method"], "~method: choose one of bbb, ensemble,"),
    (["~method.prior_std"], "method.prior_std is missing: method=bbb requires it"),
    (["~method.optimizer"], "method.optimizer.name='None': unknown"),
    (["~task.name"], "task.name is missing"),
    (["method.optimizer=adam"], "did you mean method.optimizer.name?"),
    (["method="], "method=: choose one of bbb, ensemble,"),
    (["method.lr="], "method.lr: there is no such key; did you mean method.optimizer.lr?"),
    (["=3"], "=3: write it as key=value"),
    (["[x]=1"], "[x]=1: write it as key=value"),
    (["a b=1"], "a b=1: write it as key=value"),
    (["++=1"], "++=1: write it as key=value"),
    (["~"], "~: write it as key=value"),
    ([""], "'': write it as key=value"),
    (["a==b"], "write 'a=\"=b\"'"),
    (["hydra.foo=1"], "hydra.foo: there is no such key"),
    (["+hydra.foo=1"], "hydra.foo: there is no such key"),
    (
        ["hydra.rnu.dir=x"],
        f"did you mean hydra.run.dir? (python {ROOT}/train.py --cfg hydra shows all)",
    ),
    (["++hydra.run.dri=x"], "did you mean hydra.run.dir?"),
    (["hydra.run.dir="], "hydra.run.dir=: name a folder, or leave it out"),
    (["hydra.run.dir=' '"], "name a folder, or leave it out"),
    (["hydra.job.name=x/y"], "hydra.job.name=x/y: it is the name of the log file"),
    (["--config-name=quantize"], "train.py reads conf/train.yaml"),
    (["--experimental-rerun=x"], "it would unpickle a file"),
    (["logger.name=nope"], "logger.name=nope: choose wandb or csv or none"),
    (["logger=wandb", "logger.tags=abc"], "logger.tags=abc: choose a list of words"),
    (["task=uci"], "task.table is missing; give it on the command line"),
    (["task=table", "task.file=a.csv"], "task.target is missing; give it on the command line"),
    (["task=images"], "task.root is missing; give it on the command line"),
    (["task=uci", "task.table=/home/me/my.csv"], "task.table=/home/me/my.csv"),
    (["task=uci", "task.table=.."], "task.table=.."),
    (["method=mcdropout", "method.rate=1.5"], "method.rate=1.5"),
    (["method.prior_std=0"], "method.prior_std=0"),
    (["method.num_samples=0"], "method.num_samples=0"),
    (["method=sghmc", "method.optimizer.lr=-1"], "lr=-1"),
    (["method.optimizer.name=adamm"], "method.optimizer.name='adamm': unknown; did you mean adam?"),
    (["method.schedule=cosinus"], "cosine or cosine_by_step or constant"),
    (["method.optimizer.lr=fast"], "lr=fast: choose a finite number above 0"),
    (["method.optimizer.lr='1e-3'"], "lr=1e-3: choose a finite number above 0"),
    (["method.optimizer.lr=inf"], "method.optimizer.lr=inf"),
    (["method.beta=true"], "method.beta=true"),
    (["task.validation_share=1"], "validation_share=1"),
    (
        ["task.validation_share=nan"],
        "validation_share=nan: choose a finite number, 0 or more, below",
    ),
    (["task.batch_size=0"], "batch_size=0"),
    (["task.batch_size=true"], "batch_size=true"),
    (["task.batch_size=2.5"], "batch_size=2.5: choose a whole number from 1 to"),
    (["seed=one"], "seed=one: choose a whole number from 0 to"),
    (["seed=null"], "seed=null"),
    (["seed=-1"], "seed=-1"),
    ([f"seed={2**70}"], f"seed={2**70}: choose a whole number from 0 to {2**63 - 1}"),
    ([f"method.prior_std={10**400}"], "method.prior_std"),
    (["trainer.max_epochs=0"], "trainer.max_epochs=0"),
    (["trainer.max_epochs=null"], "trainer.max_epochs=null: choose a whole number from 1 to"),
    (["trainer.max_epochs=-1"], "trainer.max_epochs=-1"),
    (["task.batch_size=many"], "task.batch_size=many"),
    (["trainer.check_val_every_n_epoch=0"], "trainer.check_val_every_n_epoch=0"),
    (["trainer.precision=16-mixed"], "trainer.precision=16-mixed: choose 32-true or bf16-mixed"),
    (["trainer.precision=64-true"], "trainer.precision=64-true: choose 32-true or bf16-mixed"),
    (["trainer.precision=bf16-true"], "trainer.precision=bf16-true"),
    (["trainer.precision=half"], "trainer.precision=half"),
    (["trainer.save_every=-1"], "trainer.save_every=-1"),
    (["trainer.save_every=nan"], "trainer.save_every=nan: choose a finite number, 0 or more"),
    (["trainer.save_every=inf"], "trainer.save_every=inf"),
    (["trainer.limit_train_batches=0"], "trainer.limit_train_batches=0"),
    (["trainer.threads=0"], "trainer.threads=0: choose null, or a whole number from 1"),
    (["+trainer.max_steps=null"], "trainer.max_steps=null: choose a whole number"),
    (["+trainer.max_steps=abc"], "trainer.max_steps=abc"),
    (["+trainer.max_time=90"], "trainer.max_time=90: choose null, or a string such as 00:01:30:00"),
    (["+trainer.num_nodes=inf"], "trainer.num_nodes=inf"),
    (["+trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val=-1"),
    (["+trainer.accumulate_grad_batches=0.5"], "trainer.accumulate_grad_batches=0.5"),
    (["+trainer.fast_dev_run=true"], "trainer.fast_dev_run=true: leave it out"),
    (["+trainer.limit_val_batches=0"], "trainer.limit_val_batches=0: leave it out"),
    (["+trainer.val_check_interval=0"], "trainer.val_check_interval=0: leave it out"),
    (["+trainer.limit_predict_batches=x"], "trainer.limit_predict_batches=x: leave it out"),
    (["+trainer.model_registry=x"], "trainer.model_registry=x: leave it out"),
    (["+trainer.profiler=x"], "trainer.profiler=x: choose null, or simple or advanced"),
    (["+trainer.plugins=x"], "trainer.plugins: there is no such key"),
    (["trainer.strategy=fsdp"], "trainer.strategy=fsdp: choose auto or ddp"),
    (["+trainer.max_steps=0"], "trainer.max_steps=0: choose a whole number from 1"),
    (["+trainer.max_time=00:00:00:00"], "trainer.max_time=00:00:00:00"),
    (["+trainer.min_epochs=4", "trainer.max_epochs=2"], "min_epochs=4: training ends at trainer.m"),
    (["+trainer.min_steps=4", "+trainer.max_steps=2"], "min_steps=4: training ends at trainer.max"),
    (["+trainer.num_nodes=2"], "trainer.num_nodes=2: the environment does not identify"),
    (["trainer.devices=0"], "trainer.devices=0"),
    (["trainer.devices=-1"], "trainer.devices=-1: CPUs have no device numbers"),
    (["trainer.devices=[0,1]"], "trainer.devices=[0, 1]: CPUs have no device numbers"),
    (["trainer.accelerator=gpu"], "trainer.accelerator=gpu: torch finds no GPU"),
    (["trainer=gpu"], "trainer.accelerator=gpu: torch finds no GPU"),
    (
        ["trainer.save_best=true", "trainer.check_val_every_n_epoch=3", "trainer.max_epochs=2"],
        "no epoch would be validated",
    ),
    (["trainer=null"], "trainer=null: choose"),
    (["method=3"], "method=3: choose"),
    (["plots=1"], "plots=1: choose true or false"),
    (["method.init_from=missing.ckpt"], "no checkpoint at missing.ckpt"),
    (["method.init_from=empty"], "there is no checkpoint.ckpt in this folder"),
    (["method.init_from=a=b"], "write 'method.init_from=\"a=b\"'"),
    (
        ["quant=default", "quant.mode=ptq"],
        "to calibrate a trained network, quantize its checkpoint",
    ),
    (["quant=default", "quant.weight_bits=9"], "quant.weight_bits=9"),
    (["seed"], "seed: write it as key=value"),
    (["task=uci", 'task.table="\x1b[2J/"'], "task.table=\\x1b[2J/"),
    (["method=\x1b[31m"], "\\x1b[31m"),
    (["task=images", "task.root=empty"], "no folder empty/train"),
    (["task=images", "task.root=empty", "task.test_share=0.2"], "empty has no class folders"),
    (["task=table", "task.file=gone.csv", "task.target=y"], "no file gone.csv"),
    (["task=table", "task.file=empty", "task.target=y"], "empty cannot be read (Is a directory)"),
]

# What is a job, and fails once it has looked at its data or at its devices.
FAILING = [
    (["task=yacht", "data_dir=empty"], "no network in tests"),
    (["trainer.save_best=true", "task.validation_share=0"], "trainer.save_best=true"),
    (["net=resnet", "task=synthetic"], "are not images"),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSED, ids=lambda x: ascii(x)[:40])
def test_a_wrong_command_line_gives_one_line_and_leaves_nothing(
    arguments: list[str], said: str, script_here: ScriptHere, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    code, errors = script_here("train", "logger=none", *arguments)
    assert code == 1
    assert len(errors.strip().splitlines()) == 1, errors
    assert said in errors
    assert errors.strip().isprintable()
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["method=bb"],
        ["method=bbb,bb"],
        ["method.lr=0.1"],
        ["seed=one,two"],
        ["method=pointwise,bbb", "trainer.max_epochs=0,null"],
        ["+method.lr=1,2"],
        ["hydra/launcher=nonsense"],
        ["seed=1,,"],
        ["+hydra.foo=1"],
        ["hydra.sweep.subdir=same"],
        ["trainer=ddp", "trainer.accelerator=cpu"],
        ["+trainer.min_epochs=9", "trainer.max_epochs=2,3"],
    ],
    ids=str,
)
def test_a_sweep_none_of_whose_jobs_can_start_leaves_nothing(
    arguments: list[str], script_here: ScriptHere, tmp_path: Path
) -> None:
    sweep = [] if any("," in argument for argument in arguments) else ["task.batch_size=3,4"]
    for folder in ([], ["hydra.sweep.dir=deep/er"]):
        code, errors = script_here("train", "-m", "logger=none", *arguments, *sweep, *folder)
        assert code == 1
        assert len(errors.strip().splitlines()) == 1, errors
        assert list(tmp_path.iterdir()) == []


def test_a_sweep_without_a_folder_is_refused(script_here: ScriptHere, tmp_path: Path) -> None:
    code, errors = script_here("train", "-m", "logger=none", "seed=1,2", "hydra.sweep.dir=")
    assert code == 1
    assert "hydra.sweep.dir=: name a folder" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a=1", "-m", "b=2"], "write options, such as -m, before all that has the form key=value"),
        (["--nope"], "--nope; --help and --hydra-help tell what there is"),
        (["--cfg", "nope"], "'nope'"),
        (["--config-dir"], "--config-dir"),
    ],
    ids=str,
)
def test_options_that_the_program_has_not_are_one_line_and_exit_code_2(
    arguments: list[str], said: str, script_here: ScriptHere, tmp_path: Path
) -> None:
    for verb in ("train", "quantize", "evaluate"):
        code, errors = script_here(verb, *arguments)
        assert code == 2
        assert len(errors.strip().splitlines()) == 1, errors
        assert errors.startswith(f"{verb}.py: ")
        assert said in errors
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("verb", "argument", "said"),
    [
        ("quantize", "+trainer.fast_dev_run=1", "trainer.fast_dev_run=1: leave it out"),
        ("quantize", "trainer.accelerator=gpu", "torch finds no GPU"),
        (
            "quantize",
            "trainer.devices=2",
            "only a single training can use several devices",
        ),
        ("quantize", "+quant.fine_tuning.optimizer.lrr=1", "did you mean"),
        ("quantize", "~quant.fine_tuning.optimizer", "this key is needed"),
        ("evaluate", "trainer.accelerator=gpu", "torch finds no GPU"),
        ("evaluate", "+trainer.devices=2", "trainer.devices: there is no such key"),
        ("evaluate", "suite.splits=3", "suite.splits=3"),
    ],
)
def test_invalid_options_of_other_scripts_are_refused_before_files_are_written(
    verb: str, argument: str, said: str, script_here: ScriptHere, tmp_path: Path
) -> None:
    (tmp_path / "x.ckpt").touch()
    code, errors = script_here(verb, "checkpoint=x.ckpt", "logger=none", argument)
    assert code == 1
    assert len(errors.strip().splitlines()) == 1, errors
    assert said in errors
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_devices_that_do_not_exist_are_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, script_here: ScriptHere, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MisconfigurationException("no such thing\nhere.")

    monkeypatch.setattr("pytorch_lightning.Trainer", refuse)
    code, errors = script_here("train", "logger=none")
    assert code == 1
    assert len(errors.strip().splitlines()) == 1
    assert "trainer.devices=1" in errors
    assert ": no such thing here; choose trainer.devices=1 trainer.accelerator=auto" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--cfg", "all", "--resolve"], ["--help"], ["--info", "searchpath"]], ids=str
)
def test_informational_options_leave_no_files(
    arguments: list[str], script_here: ScriptHere, tmp_path: Path
) -> None:
    assert script_here("train", *arguments)[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_a_missing_checkpoint_is_refused_before_torch_is_imported(
    script: Script, tmp_path: Path
) -> None:
    hook = "import sys; sys.modules['torch'] = None"  # an import would fail
    (tmp_path / "sitecustomize.py").write_text(hook)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        for verb in ("evaluate", "quantize"):
            for path, said in (
                ("nowhere/checkpoint.ckpt", "no checkpoint at nowhere/checkpoint.ckpt: no such"),
                ("'nowhere/*.ckpt'", "no such file"),
                ("a=b/checkpoint.ckpt", """write 'checkpoint="a=b/checkpoint.ckpt"'"""),
                ("a,b/checkpoint.ckpt", """write 'checkpoint="a,b/checkpoint.ckpt"'"""),
                ("a(b)/checkpoint.ckpt", """write 'checkpoint="a(b)/checkpoint.ckpt"'"""),
                (".", "there is no checkpoint.ckpt in this folder"),
            ):
                result = script(verb, f"checkpoint={path}")
                assert result.returncode == 1
                assert said in result.stderr
                assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".py"] == []


def test_own_groups_and_options_of_a_config_dir_are_taken(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    (tmp_path / "own" / "method").mkdir(parents=True)
    (tmp_path / "own" / "setup").mkdir()
    mine = "defaults: [mcdropout]\nrate: 0.4\n"
    (tmp_path / "own" / "method" / "mine.yaml").write_text(mine)
    preset = "# @package _global_\ntask: {batch_size: 500}\nnotes: {why: any}\n"
    (tmp_path / "own" / "setup" / "e.yaml").write_text(preset)
    arguments = ["--config-dir=own", "method=mine", "+setup=e", "trainer=smoke", "logger=none"]
    arguments += ["plots=false", "+trainer.gradient_clip_val=1", "+method.optimizer.eps=1e-7"]
    code, errors = script_here("train", *arguments, "hydra.run.dir=run")
    assert code == 0, errors
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["method"]["rate"], config["task"]["batch_size"]) == (0.4, 500)
    assert config["notes"] == {"why": "any"}
    code, errors = script_here("train", *arguments, "+notes.wy=here", "hydra.run.dir=run2")
    assert code == 1
    assert "notes.wy: there is no such key; did you mean notes.why?" in errors
    code, errors = script_here("train", "--config-dir=own", "setup=e")
    assert "use +setup=e" in errors
    code, errors = script_here("train", *arguments, "method=min", "hydra.run.dir=run2")
    assert "did you mean method=mine?" in errors


@pytest.mark.parametrize(("arguments", "said"), FAILING, ids=lambda x: str(x)[:40])
def test_a_job_that_started_and_fails_says_so_in_one_line_and_in_its_status(
    arguments: list[str],
    said: str,
    script_here: ScriptHere,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("bqnn.data.download.urlopen", _no_network)
    code, errors = script_here("train", "logger=none", *arguments, "hydra.run.dir=run")
    assert code == 1
    assert len(errors.strip().splitlines()) == 1, errors
    assert said in errors
    assert status(tmp_path / "run")["state"] == "FAILED"
    assert said in status(tmp_path / "run")["error"]


@pytest.mark.parametrize(
    ("content", "said"),
    [("1 2 3\n4 nan 6\n7 8 9\n", "nan"), ("1 2 3\n4 5\n7 8 9\n", "data.txt"), ("", "empty")],
)
def test_a_bad_table_is_refused_by_file(
    content: str, said: str, script_here: ScriptHere, tmp_path: Path
) -> None:
    folder = _write_table(tmp_path, content)
    arguments = ["task=uci", "task.table=mine", f"data_dir={tmp_path}", "hydra.run.dir=run"]
    code, errors = script_here("train", "logger=none", *arguments)
    assert code == 1
    assert said in errors
    assert str(folder / "data.txt") in errors
    assert status(tmp_path / "run")["state"] == "FAILED"


def test_a_table_of_ones_own_trains(script_here: ScriptHere, tmp_path: Path) -> None:
    rows = "\n".join(f"{x} 1 {2 * x}" for x in range(12))  # the second column is constant
    _write_table(tmp_path, rows, num_rows=12)
    arguments = [*short("bbb"), "task=uci", "task.table=mine", f"data_dir={tmp_path}"]
    assert script_here("train", *arguments, "hydra.run.dir=run")[0] == 0
    assert "rmse" in _keys(tmp_path / "run", "test")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("task.target=prise", "task.target='prise': flats.csv has no such column; choose one of"),
        ("task.features=[size]", "task.features='size': flats.csv has no such column"),
        ("task.features=[]", "no input column is left besides 'price'; list other columns (task.f"),
        ("task.ignore=[size]", "task.ignore='size': flats.csv has no such column"),
        ("task.categories=[size]", "task.categories='size': flats.csv has no such column"),
        ("task.kind=ranking", "task.kind"),
    ],
)
def test_columns_that_a_csv_file_has_not_leave_nothing(
    option: str, said: str, script_here: ScriptHere, tmp_path: Path
) -> None:
    (tmp_path / "flats.csv").write_text("area,price\n1,2\n")
    task = ["task=table", "task.file=flats.csv", "task.target=price"]
    code, errors = script_here("train", "logger=none", *task, option)
    assert code == 1
    assert said in errors
    assert len(errors.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["flats.csv"]


@pytest.mark.parametrize(
    ("target", "metric"), [("price", "rmse"), ("city", "error"), ("sold", "error")]
)
def test_a_csv_file_of_ones_own_goes_all_the_way(
    target: str, metric: str, script_here: ScriptHere, tmp_path: Path
) -> None:
    cities = ("Ghent", "Aalst", "Ypres")
    rows = [f"{i},{cities[i % 3]},{2 * i + 0.5},{i % 2}" for i in range(40)]
    (tmp_path / "flats.csv").write_text("\n".join(["area,city,price,sold", *rows]))
    task = ["task=table", "task.file=flats.csv", f"task.target={target}"]
    assert script_here("train", *short("bbb"), *task, "hydra.run.dir=run")[0] == 0
    assert metric in _keys(tmp_path / "run", "test")
    common = ["logger=none", "plots=false"]
    options = ["checkpoint=run", "quant.mode=ptq", "quant.weight_bits=4", "hydra.run.dir=quantized"]
    assert script_here("quantize", *common, *options)[0] == 0
    options = ["checkpoint=quantized", "numeric=int8", "hydra.run.dir=evaluated"]
    assert script_here("evaluate", *common, *options)[0] == 0
    assert _quality(tmp_path / "evaluated")[f"int8/test/{metric}"] == pytest.approx(
        _quality(tmp_path / "quantized")[f"int8/test/{metric}"]
    )
    (tmp_path / "flats.csv").write_text("\n".join(["area,city,price,sold", *rows[1:]]))
    for verb in ("evaluate", "quantize"):
        code, errors = script_here(verb, *common, "checkpoint=run")
        assert code == 1
        assert "the data of task 'flats.csv' have changed since the training" in errors


def test_images_of_any_size_in_class_folders_are_trained_on_and_quantized(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    from PIL import Image

    for name, width in (("cat", 9), ("dog", 12)):
        (tmp_path / "my_images" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (width + i, 10), (20 * i, 0, 0)).save(
                tmp_path / "my_images" / name / f"{i}.png"
            )
    task = ["task=images", "task.root=my_images", "task.size=8", "task.channels=1"]
    task += ["task.test_share=0.2", "net=lenet", "method=pointwise", "trainer=smoke"]
    common = ["logger=none", "plots=false"]
    assert script_here("train", *task, *common, "hydra.run.dir=run")[0] == 0
    recipe = read_checkpoint(tmp_path / "run" / "checkpoint.ckpt")["recipe"]
    assert recipe["facts"]["input_shape"] == [1, 8, 8]
    options = ["checkpoint=run", "quant.mode=ptq", "hydra.run.dir=quantized"]
    assert script_here("quantize", *common, *options)[0] == 0
    assert np.load(tmp_path / "quantized" / "predictions.npz")["targets"].tolist() == [0, 0, 1, 1]


def test_a_network_is_trained_on_a_folder_of_images(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    _write_images(tmp_path / "my_images")
    arguments = ["task=images", "task.root=my_images", "task.flip=true", "trainer=smoke"]
    arguments += ["logger=csv", "net.width=4", "hydra.run.dir=run"]
    assert script_here("train", *arguments)[0] == 0
    recipe = read_checkpoint(tmp_path / "run" / "checkpoint.ckpt")["recipe"]
    assert recipe["facts"]["class_names"] == ["cat", "dog"]
    assert (tmp_path / "run" / "csv" / "metrics.csv").exists()  # Lightning's own
    assert (tmp_path / "run" / "metrics.csv").exists()


def test_images_outside_are_read_for_a_trusted_checkpoint(
    script_here: ScriptHere, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    images = tmp_path_factory.mktemp("out\x1b[31mside")
    _write_images(images)
    arguments = ["task=images", f'task.root="{images}"', "trainer=smoke", "logger=none"]
    arguments += ["net.width=4", "plots=false", "method.num_samples=1", "method=pointwise"]
    assert script_here("train", *arguments, "hydra.run.dir=run")[0] == 0
    common = ["checkpoint=run", "logger=none", "plots=false"]
    for verb, options in (("evaluate", ["suite=test"]), ("quantize", ["quant.mode=ptq"])):
        code, errors = script_here(verb, *common, *options)
        assert code == 1
        assert errors.strip().isprintable()
        assert "\\x1b[31mside" in errors
        assert "add trust=true" in errors
        assert "data_dir=" not in errors
        code, errors = script_here(verb, *common, *options, "trust=true")
        assert code == 0, errors


def test_the_folder_of_a_run_is_a_checkpoint_and_the_same_one(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = [*short("pointwise"), "task=synthetic", "plots=false"]
    assert script_here("train", *arguments, "hydra.run.dir='a=b, (c)'")[0] == 0
    evaluate = ["suite=test", "logger=none", "plots=false", "hydra.run.dir=e"]
    run = "checkpoint='a=b, (c)'"
    assert script_here("evaluate", run, *evaluate)[0] == 0
    file = "checkpoint='a=b, (c)/checkpoint.ckpt'"
    before = status(tmp_path / "e")
    assert script_here("evaluate", file, *evaluate, "resume=true")[0] == 0  # it is done
    assert status(tmp_path / "e") == before
    bbb = [*short("bbb"), "task=synthetic", "plots=false", "method.init_from='a=b, (c)'"]
    assert script_here("train", *bbb, "hydra.run.dir=f")[0] == 0
    patterns = ["checkpoint=a*", *evaluate[:-1], "hydra.run.dir=p"]
    assert script_here("evaluate", *patterns)[0] == 0
    assert (tmp_path / "p" / "0_pointwise_synthetic" / "metrics.json").exists()


def test_a_given_folder_is_used_as_given_and_never_twice(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = ["logger=none", "trainer=smoke", "plots=false", "task=synthetic"]
    (tmp_path / "mine").mkdir()
    assert script_here("train", *arguments, "hydra.run.dir=mine")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    code, errors = script_here("train", *arguments, "hydra.run.dir=mine")
    assert code == 1
    assert "already holds a job" in errors
    after = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    assert before == after


def test_foreign_files_in_a_given_folder_are_kept(script_here: ScriptHere, tmp_path: Path) -> None:
    arguments = ["logger=none", "trainer=smoke", "plots=false", "task=synthetic"]
    for name in ("config.yaml", "checkpoint.ckpt", "curves.png"):
        (tmp_path / name).write_text("mine")
        code, errors = script_here("train", *arguments, "hydra.run.dir=.")
        assert code == 1
        assert f"holds {name}, which the job would overwrite" in errors
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    (tmp_path / "notes.txt").write_text("mine")
    assert script_here("train", *arguments, "hydra.run.dir=.")[0] == 0
    assert status(tmp_path)["state"] == "DONE"
    assert {path.name for path in tmp_path.iterdir()} - {
        "notes.txt",
        "status.json",
        "train.log",
    } < {*WRITTEN}


def test_runs_of_the_same_second_get_folders_of_their_own(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = ["logger=none", "trainer=smoke", "plots=false", "task=synthetic"]
    for _ in range(3):
        assert script_here("train", *arguments)[0] == 0
    folders = sorted((tmp_path / "outputs" / "train").iterdir())
    assert len(folders) == 3
    assert all("bbb_synthetic_s0" in folder.name for folder in folders)
    assert all(status(folder)["state"] == "DONE" for folder in folders)


def test_a_sweep_goes_on_after_a_failed_job(script_here: ScriptHere, tmp_path: Path) -> None:
    arguments = ["logger=none", "trainer=smoke", "plots=false", "task=synthetic"]
    arguments += ["method=mcdropout", "method.rate=7,0.1", "hydra.sweep.dir=sweep"]
    code, errors = script_here("train", "-m", *arguments)
    assert code == 1
    assert "method.rate=7" in errors
    states = [status(tmp_path / "sweep" / f"{i}_mcdropout_synthetic_s0")["state"] for i in (0, 1)]
    assert states == ["FAILED", "DONE"]


def test_the_resume_command_works_for_any_name_of_the_folder(
    script: Script, tmp_path: Path
) -> None:
    sweep = ["-m", "logger=none", "trainer=smoke", "plots=false", "task=synthetic"]
    sweep += ["method=mcdropout", "method.rate=7,0.1"]
    result = script("train", *sweep, "hydra.sweep.dir='a=b, (c)'")
    assert result.returncode == 1
    assert (
        shlex.split(result.stdout.splitlines()[-1])[-1] == f'hydra.sweep.dir="{tmp_path}/a=b, (c)"'
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_keeps_its_checkpoint(
    number: signal.Signals, tmp_path: Path
) -> None:
    arguments = ["logger=none", "trainer.max_epochs=100000", "trainer.save_every=0"]
    command = [sys.executable, str(ROOT / "train.py"), "task=synthetic", *arguments]
    process = subprocess.Popen(
        [*command, "hydra.run.dir=run"],
        cwd=tmp_path,
        env=dict(os.environ),
        stderr=subprocess.PIPE,
        text=True,
    )
    checkpoint = tmp_path / "run" / "checkpoint.ckpt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert status(tmp_path / "run")["state"] == "INTERRUPTED"
    load(checkpoint)
    advice = "task=synthetic logger=none trainer.max_epochs=100000 trainer.save_every=0 resume=true"
    assert f"{advice} hydra.run.dir={tmp_path}/run" in errors


def test_an_offline_wandb_run_is_closed_with_its_job(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = ["logger=wandb", "trainer=smoke", "task=synthetic", "hydra.run.dir=run"]
    code, errors = script_here("train", *arguments)
    assert code == 0, errors
    runs = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 1
    import wandb

    assert wandb.run is None


def test_bf16_trains_every_method(script_here: ScriptHere, tmp_path: Path) -> None:
    for method in METHODS:
        arguments = [*short(method), "trainer.precision=bf16-mixed", "plots=false"]
        assert script_here("train", *arguments, f"hydra.run.dir={method}")[0] == 0
        # Ten classes at random have an NLL of 2.3.
        assert json.loads((tmp_path / method / "metrics.json").read_text())["test/nll"] < 1.9


def test_best_is_the_epoch_with_the_lowest_validation_nll(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = [*short("bbb"), "trainer.save_best=true", "trainer.max_epochs=6"]
    arguments += ["method.optimizer.lr=3e-2", "plots=false", "hydra.run.dir=run"]
    assert script_here("train", *arguments)[0] == 0
    with (tmp_path / "run" / "metrics.csv").open() as file:
        nll = [float(row["val/nll"]) for row in csv.DictReader(file)]
    assert read_checkpoint(tmp_path / "run" / "best.ckpt")["epoch"] == nll.index(min(nll))


def _keys(folder: Path, split: str) -> set[str]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {key.partition("/")[2] for key in metrics if key.startswith(f"{split}/")}


def _quality(folder: Path) -> dict[str, float]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {key: value for key, value in metrics.items() if not key.startswith("time/")}


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


def _no_network(*_: object, **__: object) -> None:
    raise OSError("no network in tests")


def _write_images(root: Path) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(8):
                pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


def _write_table(data_dir: Path, content: str, num_rows: int = 3) -> Path:
    folder = data_dir / "uci" / "mine" / "data"
    folder.mkdir(parents=True)
    rows = [str(row) for row in range(num_rows)]
    files = {
        "data.txt": content,
        "index_features.txt": "0\n1\n",
        "index_target.txt": "2\n",
        "n_splits.txt": "1\n",
        "index_train_0.txt": "\n".join(rows[:-1]),
        "index_test_0.txt": rows[-1],
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder
