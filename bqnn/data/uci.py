"""UCIData: regression tables with their standard splits, as files of plain numbers."""

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
from bqnn.text import one_line, short

log = logging.getLogger(__name__)

_TABLE_FILES = ("data.txt", "index_features.txt", "index_target.txt", "n_splits.txt")


class UCIData(TableData):
    """One split of the table in `<data_dir>/uci/<table>/data`.

    The folder holds data.txt, index_features.txt, index_target.txt, n_splits.txt and, for each
    split k, index_train_k.txt and index_test_k.txt, which share out the rows; columns and rows
    count from 0. The six standard tables are downloaded where the folder is missing.

    Raises ValueError, with the file and the row, for anything but such a table of finite numbers,
    and FileNotFoundError, with the folder, for missing files.
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
                f"table={short(table)}: it names one folder inside {self.data_dir / 'uci'}; "
                "choose a name without slashes or dots alone",
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
                "every number must be finite, drop or fill that row"
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
                f"hold {', '.join(_TABLE_FILES)} and index_train_k.txt, index_test_k.txt for each "
                "split k: put them there or set data_dir to the folder that has uci/<table>. "
                f"Without the folder, these are downloaded: {', '.join(known_tables())}"
            )

    def _count_splits(self) -> int:
        path = self.folder / "n_splits.txt"
        values = _read_numbers(path).ravel()
        if len(values) != 1 or values[0] < 1 or not values[0].is_integer():
            raise ValueError(f"{path}: expected one whole number, 1 or more: how many splits exist")
        return int(values[0])

    def _read_columns(self, num_columns: int) -> tuple[np.ndarray, int]:
        features = _read_index(self.folder / "index_features.txt", num_columns, "columns")
        path = self.folder / "index_target.txt"
        target = _read_index(path, num_columns, "columns")
        if len(target) != 1:
            raise ValueError(f"{path}: {len(target)} columns listed; a table has one target")
        if target[0] in features:
            raise ValueError(
                f"{path}: column {target[0]} is also listed in index_features.txt; a target "
                "cannot be its own input, remove it from one of them"
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
                "such rows); a row is for training or for the test"
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
    except ValueError as error:  # a ragged row, a word, bytes that are no text
        raise ValueError(
            f"{path}: expected rows of equally many numbers, separated by spaces: "
            f"{one_line(str(error))[:300]}"
        ) from error


def _read_index(path: Path, limit: int, what: str) -> np.ndarray:
    values = _read_numbers(path).ravel()
    wrong = np.flatnonzero((values != np.floor(values)) | (values < 0) | (values >= limit))
    if len(wrong):
        raise ValueError(
            f"{path}: entry {wrong[0]} (from 0) is {values[wrong[0]]:g}, but data.txt has {limit} "
            f"{what}; expected a whole number from 0 to {limit - 1}"
        )
    unique, counts = np.unique(values, return_counts=True)
    if len(unique) < len(values):
        raise ValueError(
            f"{path}: {unique[counts > 1][0]:g} is listed twice; list every one of the {what} once"
        )
    return values.astype(np.int64)
