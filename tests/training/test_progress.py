"""Progress of a training and an evaluation: a bar on a terminal, else a few lines."""

import logging
from functools import partial
from pathlib import Path

import pytest
from tqdm import tqdm

from bqnn.data import SyntheticData
from bqnn.inference.likelihoods import Regression
from bqnn.methods import Method, Pointwise
from bqnn.nets import MLP
from bqnn.training.progress import NUM_LINES, TrainingProgress, evaluation_progress
from tests.bare_trainer import bare_trainer


def train(max_epochs: int, every: int) -> None:
    data = SyntheticData(num_train=40, num_test=4, batch_size=16, validation_share=0.2)
    data.setup()
    trainer = bare_trainer(
        max_epochs,
        callbacks=[TrainingProgress()],
        enable_checkpointing=True,
        check_val_every_n_epoch=every,
        num_sanity_val_steps=0,
        log_every_n_steps=0,
    )
    trainer.fit(model(), data)


def model() -> Method:
    net = MLP([1], [1, 1], hidden_features=[4])
    options = {"num_train": 32, "seed": 0, "optimizer": {"name": "sgd", "lr": 1e-3}}
    return Pointwise(net, Regression(0.0, 1.0), num_samples=3, **options)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bqnn.training.progress._is_terminal", lambda: True)
    monkeypatch.setattr("bqnn.training.progress._size", lambda: {"ncols": 200, "nrows": 20})
    monkeypatch.setattr("bqnn.training.progress.tqdm", partial(tqdm, mininterval=0))


def test_a_log_gets_a_line_for_some_logged_epochs_and_for_the_last(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "bqnn")
    train(max_epochs=100, every=2)
    lines = [text for text in caplog.messages if text.startswith("epoch ")]
    assert NUM_LINES - 5 <= len(lines) <= NUM_LINES + 2
    for line in lines:
        assert "train/loss " in line
        assert "val/nll " in line
        assert line.endswith(" s left")
    assert lines[0].startswith("epoch 2/100: ")
    assert lines[-1].startswith("epoch 100/100: ")
    assert capsys.readouterr().err == ""


def test_a_log_says_what_is_evaluated(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "bqnn")
    for sets in (["test"], ["val", "test"], ["train", "val", "test", "ood/uniform"]):
        with evaluation_progress("float", sets, num_samples=3):
            pass
    assert caplog.messages == [
        "evaluating float: test; draws: 3",
        "evaluating float: val, test; draws: 3",
        "evaluating float: 4 sets; draws: 3",
    ]


def test_a_short_training_gets_a_line_for_each_logged_epoch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "bqnn")
    train(max_epochs=3, every=1)
    lines = [text.partition(":")[0] for text in caplog.messages if text.startswith("epoch ")]
    assert lines == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]


@pytest.mark.usefixtures("terminal")
def test_a_terminal_gets_one_bar_with_the_loss_and_the_time_left(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "bqnn")
    train(max_epochs=3, every=1)
    assert not [text for text in caplog.messages if text.startswith("epoch ")]
    shown = capsys.readouterr().err.split("\r")
    assert shown[-1].startswith("epoch 3/3 100%|")
    for text in ("train/loss ", "val/nll ", "<00:00"):
        assert text in shown[-1]
    assert shown[-1].count("\n") == 1  # the bars before it were overwritten
    assert not any("\n" in text for text in shown[:-1])


@pytest.mark.usefixtures("terminal")
def test_an_evaluation_says_which_set_and_which_draw(capsys: pytest.CaptureFixture[str]) -> None:
    with evaluation_progress("int8", ["test", "ood/svhn"], num_samples=2) as progress:
        assert progress is not None
        for draw in range(2):
            for index in range(2):
                progress(index, draw)
        shown = capsys.readouterr().err.split("\r")
    assert [text.partition(":  ")[0].partition(": 1")[0] for text in shown[-4:]] == [
        "int8: test, draw 1/2",
        "int8: ood/svhn, draw 1/2",
        "int8: test, draw 2/2",
        "int8: ood/svhn, draw 2/2",
    ]
    with evaluation_progress("int8", ["test"], 2, is_shown=False) as progress:
        assert progress is None


def test_every_set_and_draw_is_reported_once() -> None:
    data = SyntheticData(num_train=40, num_test=4, batch_size=16, validation_share=0.2)
    data.setup()
    told: list[tuple[int, int]] = []
    inputs = [data.train.inputs, data.test.inputs]
    model().eval().predictive_sets(inputs, data.normalize, 3, lambda *of: told.append(of))
    assert sorted(told) == [(index, draw) for index in range(2) for draw in range(3)]


def test_progress_can_be_switched_off(
    script_here, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["logger=none", "trainer=smoke", "plots=false", "task=synthetic"]
    arguments += ["trainer.progress_bar=false", "trainer.check_val_every_n_epoch=1"]
    code, errors = script_here("train", *arguments, "hydra.run.dir=run")
    assert code == 0
    assert "epoch " not in errors
    assert "epoch 2/2" not in (tmp_path / "run" / "train.log").read_text()
