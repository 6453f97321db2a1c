"""metrics.csv has a row per logged epoch; W&B gets curves of metrics that change."""

import csv
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger

from bqnn.data import SyntheticData
from bqnn.inference.likelihoods import Regression
from bqnn.jobs.job import Job
from bqnn.methods import Method, Pointwise
from bqnn.nets import MLP
from bqnn.training.loggers import MetricsCsv, log_checkpoint, log_final, make_loggers
from bqnn.training.wandb import WandbHistory
from tests.bare_trainer import bare_trainer


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Method:
    monkeypatch.setattr(Method, "is_logged_epoch", lambda self: True)
    return object.__new__(Method)


def trainer(epoch: int, **metrics: float) -> Any:
    named = {name.replace("_", "/"): torch.tensor(value) for name, value in metrics.items()}
    steps = 10 * (epoch + 1)
    return SimpleNamespace(
        current_epoch=epoch, global_step=steps, callback_metrics=named, is_global_zero=True
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_validation_and_training_of_an_epoch_share_a_row(tmp_path: Path, module: Method) -> None:
    table = MetricsCsv(tmp_path / "metrics.csv")
    for epoch in range(2):
        table.on_validation_end(trainer(epoch), module)
        metrics = {"val_nll": 2.0 - epoch, "train_nll": 1.0 - epoch, "test_nll": 7.0}
        table.on_train_epoch_end(trainer(epoch, **metrics), module)
        assert len(rows(tmp_path / "metrics.csv")) == epoch + 1
    assert rows(tmp_path / "metrics.csv") == [
        {"epoch": "0", "step": "9", "train/nll": "1.0", "val/nll": "2.0"},
        {"epoch": "1", "step": "19", "train/nll": "0.0", "val/nll": "1.0"},
    ]


def test_an_epoch_without_validation_leaves_its_cells_empty(tmp_path: Path, module: Method) -> None:
    table = MetricsCsv(tmp_path / "metrics.csv")
    table.on_train_epoch_end(trainer(0, train_nll=1.0), module)
    table.on_validation_end(trainer(1), module)
    table.on_train_epoch_end(trainer(1, train_nll=2.0, val_nll=3.0), module)
    table.on_train_epoch_end(trainer(2, train_nll=4.0, val_nll=3.0), module)  # the old one
    assert [row["val/nll"] for row in rows(tmp_path / "metrics.csv")] == ["", "3.0", ""]


def test_rows_that_fit_the_header_are_appended(tmp_path: Path, module: Method) -> None:
    path = tmp_path / "metrics.csv"
    table = MetricsCsv(path)
    for epoch in range(3):
        table.on_train_epoch_end(trainer(epoch, train_nll=float(epoch)), module)
    path.write_text(path.read_text().replace("0.0", "seen"))
    table.on_train_epoch_end(trainer(3, train_nll=3.0), module)
    assert [row["train/nll"] for row in rows(path)] == ["seen", "1.0", "2.0", "3.0"]
    path.unlink()  # as a user may
    table.on_train_epoch_end(trainer(4, train_nll=4.0), module)
    assert [row["train/nll"] for row in rows(path)] == ["0.0", "1.0", "2.0", "3.0", "4.0"]


def test_a_resumed_table_is_cut_back_to_its_checkpoint(tmp_path: Path, module: Method) -> None:
    table = MetricsCsv(tmp_path / "metrics.csv")
    table.on_train_epoch_end(trainer(0, train_nll=1.0), module)
    state = {"rows": list(table.state_dict()["rows"])}
    table.on_train_epoch_end(trainer(1, train_nll=2.0), module)
    resumed = MetricsCsv(tmp_path / "metrics.csv")
    resumed.load_state_dict(state)
    resumed.on_fit_start(trainer(1), module)
    assert [row["epoch"] for row in rows(tmp_path / "metrics.csv")] == ["0"]


def test_loggers_get_both_rows_of_an_epoch_with_the_step_of_metrics_csv(tmp_path: Path) -> None:
    data = SyntheticData(num_train=40, num_test=4, batch_size=8, validation_share=0.2)
    data.setup()
    net = MLP([1], [1, 1], hidden_features=[4])
    options = {"num_train": len(data.train), "seed": 0, "optimizer": {"name": "sgd", "lr": 1e-3}}
    method = Pointwise(net, Regression(0.0, 1.0), **options)
    logger = CSVLogger(tmp_path, name="csv", version="")
    table = MetricsCsv(tmp_path / "metrics.csv")
    fit = bare_trainer(3, logger=logger, callbacks=[table], enable_checkpointing=True)
    fit.fit(method, data)
    lightning, own = (rows(tmp_path / name) for name in ("csv/metrics.csv", "metrics.csv"))
    places = [(row["epoch"], row["step"]) for row in own]
    assert places == [("0", "3"), ("1", "7"), ("2", "11")]
    for kind in ("train/nll", "val/nll"):
        assert [(row["epoch"], row["step"]) for row in lightning if row[kind]] == places


def test_a_resumed_job_keeps_the_csv_of_its_earlier_starts(tmp_path: Path) -> None:
    job = Job(tmp_path, "train")
    job.configure({"logger": {"name": "csv"}})
    for value in (1.0, 2.0):
        (logger,) = make_loggers(job)
        log_final([logger], {"test/nll": value})
    values = [rows(tmp_path / name / "metrics.csv")[0]["test/nll"] for name in ("csv", "csv_2")]
    assert values == ["1.0", "2.0"]


# ---- Weights & Biases


class Summary(dict[str, float]):
    """The part of wandb.Run.summary that bqnn uses."""


class FakeRun:
    """Records what a wandb.Run gets; `broken` makes it fail like a run whose service died."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.history: list[dict[str, float]] = []
        self.summary = Summary()
        self.artifacts: list[str] = []
        self.broken = False
        self.dir = "run/wandb/offline-run-1/files"
        self.offline = True

    def log(self, row: dict[str, float]) -> None:
        if self.broken:
            raise ConnectionResetError("Connection lost")
        self.history.append(row)

    def define_metric(self, name: str, **options: Any) -> None:
        """Do nothing."""

    def finish(self, exit_code: int) -> None:
        if self.broken:
            raise TimeoutError("60 s are over")

    def log_artifact(self, artifact: Any) -> None:
        self.artifacts.append(artifact.name)


def test_only_changing_metrics_have_a_history() -> None:
    run: Any = FakeRun()
    history = WandbHistory(run)
    for epoch, (loss, beta) in enumerate([(3.0, 0.1), (2.0, 0.1), (1.0, 0.1), (1.0, 0.2)]):
        history.log_metrics({"epoch": epoch, "train/loss": loss, "train/beta": beta}, step=epoch)
        history.log_metrics({"epoch": epoch, "train/lr": 0.5})
    log_final([history], {"test/nll": 0.7, "num_samples": 20})
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in run.history:
        for name, value in row.items():
            if name != "epoch":
                curves.setdefault(name, []).append((row["epoch"], value))
    assert {name: sorted(points) for name, points in curves.items()} == {
        "train/loss": [(0, 3.0), (1, 2.0), (2, 1.0), (3, 1.0)],
        "train/beta": [(0, 0.1), (2, 0.1), (3, 0.2)],
    }
    assert {"train/lr": 0.5, "test/nll": 0.7, "num_samples": 20}.items() <= run.summary.items()


def test_a_failure_of_wandb_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    run: Any = FakeRun()
    history = WandbHistory(run)
    run.broken = True
    for epoch in range(4):
        history.log_metrics({"epoch": epoch, "train/loss": float(epoch)})
    (message,) = caplog.messages
    assert "Connection lost" in message
    history.finish(0)
    assert "complete it with wandb sync run/wandb/offline-run-1" in caplog.messages[-1]


def test_names_are_made_valid_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "bqnn.training.wandb.start_run", lambda folder, **options: FakeRun(**options)
    )
    job = Job(tmp_path, "train", sweep="s" * 200)
    logger = {"name": "wandb", "project": "a/b?#%:\\c", "entity": "me & you", "group": None}
    job.configure(
        {
            "logger": {**logger, "tags": ["x" * 100, "a b", 7, "digits"], "artifacts": True},
            "method": {"name": "bbb"},
            "task": {"name": "my tableü/" + "é" * 200},
            "quant": {"name": "none"},
            "seed": 3,
        }
    )
    (tmp_path / "checkpoint.ckpt").touch()
    (history,) = make_loggers(job)
    assert isinstance(history, WandbHistory)
    options = history.run.options  # type: ignore[attr-defined]
    for key in ("name", "project", "entity", "group"):
        assert re.fullmatch(r"[\w.-]{1,128}", options[key], re.ASCII), options[key]
    assert options["name"].startswith("bbb-my-tableu-")
    assert options["name"].endswith("-float-s3")
    for tag in options["tags"]:
        assert re.fullmatch(r"[\w.-]{1,64}", tag, re.ASCII), tag
    assert options["tags"][-2:] == ["7", "digits"]
    log_checkpoint([history], job)
    assert history.run.artifacts == [options["name"]]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("tags", "expected"), [(None, []), ("mine", ["mine"]), ([], [])])
def test_tags_may_be_a_list_a_text_or_nothing(tags: Any, expected: list[str]) -> None:
    from bqnn.training.wandb import _tags

    config = {"method": {"name": "bbb"}, "task": {"name": "digits"}, "logger": {"tags": tags}}
    assert _tags(config) == ["bbb", "digits", *expected]
