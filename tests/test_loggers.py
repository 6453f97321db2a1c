"""metrics.csv has one header and a row per logged epoch, on disk at once."""

import csv
from pathlib import Path

from bqnn.loggers import MetricsCsv


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_validation_and_training_of_an_epoch_share_a_row(tmp_path: Path) -> None:
    logger = MetricsCsv(tmp_path / "metrics.csv")
    for epoch in range(2):
        logger.log_metrics({"val/nll": 2.0 - epoch, "epoch": epoch}, step=10 * epoch + 9)
        logger.log_metrics({"train/nll": 1.0 - epoch, "epoch": epoch}, step=10 * epoch + 9)
        assert len(rows(tmp_path / "metrics.csv")) == epoch + 1
    assert rows(tmp_path / "metrics.csv") == [
        {"epoch": "0", "step": "9", "train/nll": "1.0", "val/nll": "2.0"},
        {"epoch": "1", "step": "19", "train/nll": "0.0", "val/nll": "1.0"},
    ]


def test_the_header_grows_with_the_first_validation(tmp_path: Path) -> None:
    logger = MetricsCsv(tmp_path / "metrics.csv")
    logger.log_metrics({"train/nll": 1.0, "epoch": 0}, step=0)
    logger.log_metrics({"val/nll": 3.0, "epoch": 1}, step=1)
    logger.log_metrics({"train/nll": 2.0, "epoch": 1}, step=1)
    assert rows(tmp_path / "metrics.csv") == [
        {"epoch": "0", "step": "0", "train/nll": "1.0", "val/nll": ""},
        {"epoch": "1", "step": "1", "train/nll": "2.0", "val/nll": "3.0"},
    ]


def test_the_evaluation_after_the_fit_adds_no_row(tmp_path: Path) -> None:
    logger = MetricsCsv(tmp_path / "metrics.csv")
    logger.log_metrics({"train/nll": 1.0, "epoch": 0}, step=0)
    logger.log_metrics({"test/nll": 1.0, "epoch": 1}, step=1)
    assert len(rows(tmp_path / "metrics.csv")) == 1
