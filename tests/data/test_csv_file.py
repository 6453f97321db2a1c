"""CSV files as text: separators, quotes, encodings and invalid files."""

import hashlib
import os
from pathlib import Path

import pytest

from bqnn.data.csv_file import read_csv, read_names

FLATS = {"area": ["70", "62.5"], "city": ["Ghent", "Aalst, north"]}


def written(folder: Path, content: str | bytes, name: str = "flats.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [
        'area,city\n70,Ghent\n62.5,"Aalst, north"\n',
        'area, city\r\n70, Ghent\r\n62.5, "Aalst, north"',
        'area;city\n70;Ghent\n62.5;"Aalst, north"\n',
        "area\tcity\n70\tGhent\n62.5\tAalst, north\n",
        "area|city\n 70 |Ghent\n62.5| Aalst, north\n",
        '"area","city"\r"70","Ghent"\r"62.5","Aalst, north"\r',
        '\ufeffarea,city\n70,Ghent\n62.5,"Aalst, north"\n',
        '\n\narea,city\n\n70,Ghent\n,\n62.5,"Aalst, north"\n\n',
        'area,city\n70,Ghent\n62.5,"Aalst, north"\n'.encode("utf-16"),
    ],
)
def test_the_usual_ways_to_write_a_table_are_one(tmp_path, content):
    path = written(tmp_path, content)
    assert read_csv(path).columns == FLATS
    assert list(read_names(path).columns) == list(FLATS)


def test_lines_are_those_of_the_file(tmp_path):
    content = 'a,b\n\n1,"two\nlines"\n3,4\n'
    file = read_csv(written(tmp_path, content))
    assert file.columns == {"a": ["1", "3"], "b": ["two\nlines", "4"]}
    assert file.lines == [4, 5]
    assert file.place(1, "b").endswith("flats.csv: line 5, column 'b' has '4'")
    assert file.sha256 == hashlib.sha256(content.encode()).hexdigest()
    assert file.take([1]).columns == {"a": ["3"], "b": ["4"]}


def test_quotes_hold_quotes_and_separators(tmp_path):
    file = read_csv(written(tmp_path, 'a,b\n"5"" pipe; 3,2 m",x"y\n'))
    assert file.columns == {"a": ['5" pipe; 3,2 m'], "b": ['x"y']}


def test_columns_without_a_name_are_left_out(tmp_path, caplog):
    file = read_csv(written(tmp_path, ",a,b,\n0,1,2,\n1,3,4,\n"))
    assert file.columns == {"a": ["1", "3"], "b": ["2", "4"]}
    assert "columns without a name are left out (2)" in caplog.text


def test_a_table_without_rows_has_its_columns(tmp_path):
    assert read_csv(written(tmp_path, "a,b\n")).columns == {"a": [], "b": []}


@pytest.mark.parametrize("names", ["0,1,2", "2001,2002,name"])
def test_names_may_be_numbers(tmp_path, names):
    assert list(read_csv(written(tmp_path, f"{names}\n5,6,7\n")).columns) == names.split(",")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("1.5,2,3\n4,5,6\n", "line 1 has only numbers; add a line with the names"),
        ("a,b,a\n1,2,3\n", "line 1 has the name 'a' twice; rename"),
        ("a,b\n1,2\n\n3,4,5\n", "line 4 has 3 cells, but line 1 names 2 columns"),
        ("a,b\n1\n", "line 2 has 1 cell, but line 1 names 2 columns"),
        ('a,b\n1,"2\n3,4\n', r"line \d cannot be split into cells .*; close each quote"),
        ('a,b\n1,"2"x\n', "line 2 cannot be split into cells"),
        ("a,b\n1," + "x" * 200_000 + "\n", "line 2 cannot be split into cells .*field limit"),
        ("x" * 300 + ",b\n1,2\n", "line 1 has a name of 300 characters"),
        ("a,b\n1,2\n".encode("utf-16-le"), "is not a text file"),
        ("a,b\n1,Lièges\n".encode("latin-1"), "line 2 is not UTF-8; save the file as UTF-8"),
        (b"a,b\n1,\x00\n", "is not a text file"),
        (b"\x1f\x8b\x08\0", r"is compressed; unpack it \(gunzip\)"),
        (b"PK\x03\x04", "is an Excel file or a zip archive"),
        (b"PAR1", "is a Parquet file; convert it"),
        ("a,\x1b[2J\n1,2,3\n", "line 2 has 3 cells"),
        ("a,a\x1b[2J,a\x1b[2J\n1,2,3\n", r"has the name 'a\\x1b\[2J' twice"),
    ],
)
def test_files_that_are_not_tables_are_refused_in_one_line(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=message) as error:
        read_csv(path)
    assert str(error.value).startswith(str(path))
    assert str(error.value).isprintable()


def test_names_are_read_without_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("bqnn.data.csv_file._START", 20)
    for encoding in ("utf-8", "utf-16"):
        path = written(tmp_path, ('a,b\n1,"é' + "é" * 50).encode(encoding))
        assert read_names(path).columns == {"a": [], "b": []}


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(ValueError, match=r"cannot be read \(.*\); give a CSV file"):
            read_csv(tmp_path / name)
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    for name in ("gone", "nothing"):
        with pytest.raises(FileNotFoundError, match=f"no file {tmp_path / name}: give the path"):
            read_csv(tmp_path / name)
    (tmp_path / "link").symlink_to(written(tmp_path, "a,b\n1,2\n"))
    assert read_csv(tmp_path / "link").columns == {"a": ["1"], "b": ["2"]}
