"""UCI tables: reading, splitting, standardizing, and downloading."""

import hashlib
import io
import json
import os
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from bqnn.data import download
from bqnn.data.uci import UCIData

TABLE = np.array([[float(i), i * i / 7, -2.0 * i, 3.0 * i + 1] for i in range(10)])
DATA_DIR = os.environ.get("BQNN_DATA_DIR", "")


def write_table(data_dir: Path, table: np.ndarray = TABLE, **files: str) -> Path:
    """Write a table `t` with two splits, whose last column is the target; `files` override it."""
    folder = data_dir / "uci" / "t" / "data"
    folder.mkdir(parents=True)
    np.savetxt(folder / "data.txt", table)
    np.savetxt(folder / "index_features.txt", np.arange(table.shape[1] - 1))
    np.savetxt(folder / "index_target.txt", [table.shape[1] - 1])
    (folder / "n_splits.txt").write_text("2\n")
    for split in range(2):
        test = np.array([split, 5])
        np.savetxt(folder / f"index_test_{split}.txt", test, fmt="%d")
        np.savetxt(folder / f"index_train_{split}.txt", np.setdiff1d(np.arange(len(table)), test))
    for stem, text in files.items():
        (folder / f"{stem}.txt").write_text(text)
    return folder


def read(data_dir: Path, **options: object) -> UCIData:
    data = UCIData(**{"table": "t", "validation_share": 0.0, "data_dir": str(data_dir), **options})
    data.prepare_data()
    data.setup()
    return data


def standardized(values: np.ndarray, by: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(((values - by.mean(0)) / by.std(0)).astype(np.float32))


def test_standardization_is_that_of_the_training_rows(tmp_path):
    write_table(tmp_path)
    data = read(tmp_path, split=1)
    test, train = TABLE[[1, 5]], TABLE[[0, 2, 3, 4, 6, 7, 8, 9]]
    for rows, expected in ((data.train, train), (data.test, test)):
        torch.testing.assert_close(rows.inputs, standardized(expected, train)[:, :3])
        torch.testing.assert_close(rows.targets, standardized(expected, train)[:, 3])
    facts = data.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["target_mean"] == pytest.approx(train[:, 3].mean())
    assert facts["target_std"] == pytest.approx(train[:, 3].std())
    assert (facts["input_shape"], facts["num_train"]) == ([3], 8)


def test_validation_rows_do_not_enter_the_standardization(tmp_path):
    write_table(tmp_path)
    data = read(tmp_path, validation_share=0.25, seed=3)
    targets = [rows.targets * data.target_std + data.target_mean for rows in (data.train, data.val)]
    train, val = ([round((y - 1) / 3) for y in part.tolist()] for part in targets)
    assert sorted(train + val) == [1, 2, 3, 4, 6, 7, 8, 9]
    assert len(val) == 2
    assert data.target_mean.item() == pytest.approx(TABLE[train, 3].mean())
    torch.testing.assert_close(data.val.inputs, standardized(TABLE[val], TABLE[train])[:, :3])


def test_constant_columns_and_targets_keep_a_std_of_one(tmp_path):
    table = TABLE.copy()
    table[:, 1] = table[:, 3] = 0.1
    table[0, 1] = 2.1  # a test row
    write_table(tmp_path, table)
    data = read(tmp_path)
    assert data.input_std[1] == data.target_std == 1
    assert not data.train.inputs[:, 1].any()
    assert not data.train.targets.any()
    assert data.test.inputs[0, 1].item() == pytest.approx(2.0)


def test_one_feature_and_duplicate_rows(tmp_path):
    table = np.repeat(TABLE[:5, 2:], 2, axis=0)
    write_table(tmp_path, table)
    data = read(tmp_path)
    assert data.train.inputs.shape == (8, 1)
    assert data.train.targets.shape == (8,)
    torch.testing.assert_close(data.train.inputs[1], data.train.inputs[2])


NUMBERS = "\n".join(" ".join(map(str, row)) for row in TABLE)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("data", NUMBERS.replace("-6.0", "nan"), "row 3, column 2.*nan"),
        ("data", NUMBERS.replace("28.0", "inf"), "row 9, column 3.*inf"),
        ("data", NUMBERS.replace("-6.0", "1e400"), "row 3, column 2.*inf"),
        ("data", NUMBERS.replace("-6.0", "\x1b[2J"), r"\\x1b\[2J"),
        ("data", NUMBERS[:-12], "row 10"),
        ("data", NUMBERS.replace("-6.0", "six"), "six"),
        ("data", "", "empty"),
        ("data", " \n\n", "empty"),
        ("index_features", "", "empty"),
        ("index_features", "0 1 7", "entry 2 .* is 7"),
        ("index_features", "0 1 3", "column 3 is also listed"),
        ("index_features", "0 0 1", "0 is listed twice"),
        ("index_target", "2 3", "2 columns listed"),
        ("index_train_0", "1 2 3 4 6 7 8 10", "entry 7 .* is 10"),
        ("index_train_0", "1 2 3 4 6 7 8 -1", "entry 7 .* is -1"),
        ("index_train_0", "1 2 3 4 6 7 8 8.5", "entry 7 .* is 8.5"),
        ("index_train_0", "1 2 3 4 6 7 8 nan", "entry 7 .* is nan"),
        ("index_test_0", "0 5 6", "row 6 is also listed in index_train_0.txt"),
        ("n_splits", "0", "the number of splits"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, text, message):
    folder = write_table(tmp_path, **{file: text})
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path)
    assert str(error.value).startswith(f"{folder}/")
    assert str(error.value).isprintable()
    assert f"{file}.txt" in str(error.value)


def test_a_data_file_cut_at_a_row_is_noticed(tmp_path):
    write_table(tmp_path, data="\n".join(NUMBERS.splitlines()[:8]))
    with pytest.raises(ValueError, match=r"is 8, but data.txt has 8 rows"):
        read(tmp_path)


def test_bytes_that_are_not_text_are_refused(tmp_path):
    folder = write_table(tmp_path)
    (folder / "data.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match=r"data\.txt"):
        read(tmp_path)


def test_a_byte_order_mark_is_not_a_number(tmp_path):
    write_table(tmp_path, data="\ufeff" + NUMBERS)
    assert len(read(tmp_path).train) == 8


@pytest.mark.parametrize("name", ["data.txt", "index_target.txt", "index_train_0.txt"])
def test_a_fifo_in_place_of_a_file_is_not_waited_for(tmp_path, name):
    folder = write_table(tmp_path)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(FileNotFoundError, match=f"{folder} has no {name}"):
        read(tmp_path)


@pytest.mark.parametrize("split", [-1, 2])
def test_a_split_that_does_not_exist_says_how_many_there_are(tmp_path, split):
    write_table(tmp_path)
    with pytest.raises(ValueError, match=f"split={split}: .* 2 splits; choose 0 to 1"):
        read(tmp_path, split=split)


@pytest.mark.parametrize("table", ["../t", "/t", "a/b", "..", ".", ""])
def test_a_table_stays_inside_its_folder(tmp_path, table):
    with pytest.raises(ValueError, match="table="):
        UCIData(table, data_dir=str(tmp_path))


@pytest.mark.parametrize("name", ["data.txt", "n_splits.txt", "index_test_0.txt"])
def test_a_missing_file_is_named_with_its_folder(tmp_path, name):
    folder = write_table(tmp_path)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{folder} has no {name}"):
        read(tmp_path)


def test_an_unknown_table_is_not_looked_for_on_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "urlopen", None)
    with pytest.raises(FileNotFoundError, match=r"uci/mine/data has no data.txt.*index_train_k"):
        read(tmp_path, table="mine")


def test_a_read_only_folder_works(tmp_path):
    folder = write_table(tmp_path)
    folders = [folder, folder.parent, folder.parent.parent, tmp_path]
    before = [path.stat().st_mtime_ns for path in folders]
    for path in folders:
        path.chmod(0o555)
    try:
        assert len(read(tmp_path).train) == 8
    finally:
        for path in folders:
            path.chmod(0o755)
    assert [path.stat().st_mtime_ns for path in folders] == before


@pytest.fixture
def served(tmp_path, monkeypatch) -> dict[str, bytes]:
    """Serve the files of a table `yacht`, and a manifest that lists them."""
    folder = write_table(tmp_path / "served")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    lines = [f"{hashlib.sha256(data).hexdigest()}  yacht/{name}" for name, data in files.items()]
    (tmp_path / "manifest.txt").write_text("\n".join(lines))

    def open_url(url: str, timeout: float) -> io.BytesIO:
        assert url.startswith("https://raw.githubusercontent.com/yaringal/")
        assert "/UCI_Datasets/yacht/data/" in url
        assert timeout > 0
        if (name := url.rsplit("/", 1)[1]) not in files:
            raise URLError("no route to host")
        return io.BytesIO(files[name])

    monkeypatch.setattr(download, "urlopen", open_url)
    monkeypatch.setattr(download, "_MANIFEST", tmp_path / "manifest.txt")
    return files


def test_a_known_table_is_downloaded_once(tmp_path, served, monkeypatch):
    home = tmp_path / "home"
    first = read(home, table="yacht")
    folder = home / "uci" / "yacht" / "data"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == served
    assert [path.name for path in folder.parent.iterdir()] == ["data"]
    monkeypatch.setattr(download, "urlopen", None)
    assert torch.equal(read(home, table="yacht").train.inputs, first.train.inputs)


def test_a_wrong_hash_leaves_nothing_behind(tmp_path, served):
    served["index_test_1.txt"] = b"0 1\n"
    home = tmp_path / "home"
    with pytest.raises(
        ValueError, match=r"yacht/data/index_test_1.txt has changed or is damaged"
    ) as error:
        read(home, table="yacht")
    assert f"{home}/uci/yacht/data" in str(error.value)
    assert "data_dir" in str(error.value)
    assert not home.exists()


def test_a_failed_download_says_where_to_put_the_files(tmp_path, served):
    del served["data.txt"]
    home = tmp_path / "home"
    with pytest.raises(FileNotFoundError, match="no route to host") as error:
        read(home, table="yacht")
    for part in ("https://", "yacht/data/data.txt", f"{home}/uci/yacht/data", "data_dir"):
        assert part in str(error.value)
    assert not home.exists()


def test_a_failed_write_leaves_no_half_table(tmp_path, served, monkeypatch):
    def fail(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(download.os, "rename", fail)
    with pytest.raises(FileNotFoundError, match="disk full"):
        read(tmp_path / "home", table="yacht")
    assert not any((tmp_path / "home" / "uci" / "yacht").iterdir())


def test_a_partly_filled_folder_is_left_as_it_is(tmp_path, served):
    folder = tmp_path / "uci" / "yacht" / "data"
    folder.mkdir(parents=True)
    (folder / "data.txt").write_text("mine")
    with pytest.raises(FileNotFoundError, match=r"has no index_features.txt"):
        read(tmp_path, table="yacht")
    assert [path.name for path in folder.iterdir()] == ["data.txt"]


def test_the_manifest_lists_six_tables_of_44_files():
    assert download.known_tables() == [
        "bostonHousing",
        "concrete",
        "energy",
        "power-plant",
        "wine-quality-red",
        "yacht",
    ]
    assert {len(files) for files in download._manifest().values()} == {44}


@pytest.mark.skipif(not DATA_DIR, reason="BQNN_DATA_DIR is not set: no copy of the real data")
@pytest.mark.parametrize(
    ("table", "num_rows", "num_features"),
    [
        ("bostonHousing", 506, 13),
        ("concrete", 1030, 8),
        ("energy", 768, 8),
        ("power-plant", 9568, 4),
        ("wine-quality-red", 1599, 11),
        ("yacht", 308, 6),
    ],
)
def test_the_real_tables_have_the_published_sizes_and_hashes(table, num_rows, num_features):
    data = read(Path(DATA_DIR), table=table, split=19)
    assert len(data.train) + len(data.test) == num_rows
    assert data.train.inputs.shape[1] == num_features
    for name, sha256 in download._manifest()[table].items():
        assert hashlib.sha256((data.folder / name).read_bytes()).hexdigest() == sha256
