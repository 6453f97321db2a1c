"""UCIData: regression tables with their standard splits, in text files."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from bqnn.arguments import ArgumentError
from bqnn.data.base import Rows
from bqnn.data.download import download_table, known_tables
from bqnn.data.tables import TableData
from bqnn.files import open_regular
from bqnn.text import counted, one_line, short

log = logging.getLogger(__name__)

_TABLE_FILES = ("data.txt", "index_features.txt", "index_target.txt", "n_splits.txt")


class UCIData(TableData):
    """One split of a UCI table, as published by Gal & Ghahramani (2016).

    The folder `<data_dir>/uci/<table>/data` contains data.txt, index_features.txt,
    index_target.txt, n_splits.txt and, for each split k, index_train_k.txt and index_test_k.txt
    with the indices of rows. Columns and rows are counted from 0. The six standard tables are
    downloaded if the folder is missing.

    Args:
        table: The name of the table.
        split: The number of the split, from 0.
        data_dir: The folder of data files.
        seed: Seed of the validation split and of the order of training batches.
        batch_size: The number of rows in a training batch.
        validation_share: The share of training rows for validation.

    Raises:
        FileNotFoundError: Files are missing and cannot be downloaded.
        ValueError: A file is not a table of finite numbers. The message names the file and the row.

    Examples:
        >>> UCIData("bostonHousing", split=3, data_dir="data").folder.as_posix()
        'data/uci/bostonHousing/data'
    """

    def __init__(
        self,
        table: str,
        split: int = 0,
        *,
        data_dir: str = "data",
        seed: int = 0,
        batch_size: int = 100,
        validation_share: float = 0.2,
    ) -> None:
        super().__init__(
            data_dir=data_dir,
            seed=seed,
            batch_size=batch_size,
            validation_share=validation_share,
        )
        if table in ("", "..") or Path(table).name != table:
            raise ArgumentError(
                f"table={short(table)}: it must be the name of a folder in "
                f"{self.data_dir / 'uci'}; choose a name without slashes that is not '..'",
                "table",
            )
        self.table = table
        self.split = split
        self.folder = self.data_dir / "uci" / table / "data"

    def prepare_data(self) -> None:
        """Download a standard table if its folder is missing or empty."""
        is_absent = not self.folder.is_dir() or not any(self.folder.iterdir())
        if is_absent and self.table in known_tables():
            download_table(self.table, self.folder)
        self._require(*_TABLE_FILES)

    def _read(self) -> tuple[Rows, Rows]:
        self._require(*_TABLE_FILES)
        num_splits = self._count_splits()
        if not 0 <= self.split < num_splits:
            raise ArgumentError(
                f"split={self.split}: table {self.table} has {num_splits} splits; "
                f"choose 0 to {num_splits - 1}",
                "split",
            )
        data_path = self.folder / "data.txt"
        data = _read_numbers(data_path)
        if not np.isfinite(data).all():
            row, column = np.argwhere(~np.isfinite(data))[0]
            raise ValueError(
                f"{data_path}: row {row}, column {column} (from 0) is {data[row, column]}; "
                "every number must be finite, remove or correct this row"
            )
        features, target = self._read_columns(data.shape[1])
        train, test = self._read_split(len(data))
        inputs, targets = torch.from_numpy(data[:, features]), torch.from_numpy(data[:, target])
        rows = Rows(inputs, targets)
        return rows.take(torch.from_numpy(train)), rows.take(torch.from_numpy(test))

    def _require(self, *names: str) -> None:
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"table={short(self.table)}: {self.folder} has no {', '.join(missing)}. It must "
                f"contain {', '.join(_TABLE_FILES)} and, for each split k, index_train_k.txt and "
                "index_test_k.txt: copy them there, or set data_dir to the folder that contains "
                "uci/<table>. If the folder does not exist, these tables are downloaded: "
                f"{', '.join(known_tables())}"
            )

    def _count_splits(self) -> int:
        path = self.folder / "n_splits.txt"
        values = _read_numbers(path).ravel()
        if len(values) != 1 or values[0] < 1 or not values[0].is_integer():
            raise ValueError(f"{path}: expected the number of splits, an integer of 1 or more")
        return int(values[0])

    def _read_columns(self, num_columns: int) -> tuple[np.ndarray, int]:
        features = _read_index(self.folder / "index_features.txt", num_columns, "columns")
        path = self.folder / "index_target.txt"
        target = _read_index(path, num_columns, "columns")
        if len(target) != 1:
            raise ValueError(f"{path}: {counted(len(target), 'column')} listed; list one target")
        if target[0] in features:
            raise ValueError(
                f"{path}: column {target[0]} is also listed in index_features.txt; a target cannot "
                "be an input, remove it from one of the files"
            )
        return features, int(target[0])

    def _read_split(self, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        self._require(f"index_train_{self.split}.txt", f"index_test_{self.split}.txt")
        train_path = self.folder / f"index_train_{self.split}.txt"
        test_path = self.folder / f"index_test_{self.split}.txt"
        train = _read_index(train_path, num_rows, "rows")
        test = _read_index(test_path, num_rows, "rows")
        shared = np.intersect1d(train, test)
        if len(shared):
            raise ValueError(
                f"{test_path}: row {shared[0]} is also listed in {train_path.name} ({len(shared)} "
                "such rows); remove these rows from one of the files"
            )
        num_absent = num_rows - len(train) - len(test)
        if num_absent:
            log.warning(
                "%d of %d rows of %s are neither in %s nor in %s",
                *(num_absent, num_rows, self.folder / "data.txt", train_path.name, test_path.name),
            )
        return train, test


def _read_numbers(path: Path) -> np.ndarray:
    try:
        with open_regular(path) as file:
            lines = file.read().decode("utf-8-sig").splitlines()
        if not any(line.partition("#")[0].strip() for line in lines):
            raise ValueError("the file is empty")
        return np.loadtxt(lines, ndmin=2)
    except ValueError as error:  # a ragged row, a word, or binary data
        raise ValueError(
            f"{path}: expected rows with equal numbers of columns, separated by spaces: "
            f"{one_line(str(error))[:300]}"
        ) from error


def _read_index(path: Path, limit: int, what: str) -> np.ndarray:
    values = _read_numbers(path).ravel()
    wrong = np.flatnonzero((values != np.floor(values)) | (values < 0) | (values >= limit))
    if len(wrong):
        raise ValueError(
            f"{path}: entry {wrong[0]} (from 0) is {values[wrong[0]]:g}, but data.txt has {limit} "
            f"{what}; expected an integer from 0 to {limit - 1}"
        )
    unique, counts = np.unique(values, return_counts=True)
    if len(unique) < len(values):
        raise ValueError(
            f"{path}: {unique[counts > 1][0]:g} is listed twice; list each of the {what} only once"
        )
    return values.astype(np.int64)
