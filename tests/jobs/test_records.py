"""Records are read safely, whatever file is in their place."""

import os
import threading

import pytest

from bqnn.jobs.records import LARGEST_JSON, LARGEST_YAML, instant, read_record

ODD = {
    "empty.json": b"",
    "list.json": b"[]",
    "number.json": b"5",
    "cut.json": b'{"state": "DO',
    "latin.json": b'{"state": "\xe9"}',
    "deep.json": b"[" * 100_000,
    "digits.json": b'{"n": ' + b"9" * 5000 + b"}",
    "negative.json": b'{"n": -' + b"9" * 5000 + b"}",
    "twice.json": b'{"state": "DONE", "parts": {"a": 1, "a": 2}}',
    "mark.json": b'\xef\xbb\xbf{"state": "DONE"}',
    "zero.json": b'{"state": "DONE\0"}',
    "large.json": b" " * (LARGEST_JSON + 1),
    "large.yaml": b"- 1\n" * (LARGEST_YAML // 4 + 1),
    "empty.yaml": b"",
    "scalar.yaml": b"seed",
    "cut.yaml": b"{seed: 0",
    "tag.yaml": b"!!python/object/apply:os.system ['true']",
    "self.yaml": b"a: &a\n  b: *a\n",
    "bomb.yaml": b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n",
    "deep.yaml": b"[" * 100_000,
    "digits.yaml": b"n: " + b"9" * 5000,
    "base.yaml": b"n: 0x" + b"f" * 5000,
    "hours.yaml": b"n: 1" + b":59" * 250_000,
    "minutes.yaml": b"n: 1" + b":59" * 5000 + b".5",
    "truth.yaml": b"a: !!bool perhaps",
    "time.yaml": b"a: !!timestamp yesterday",
    "day.yaml": b"a: 2026-13-45",
    "set.yaml": b"a: !!set {x}",
    "twice.yaml": b"a:\n- {b: 1, b: 2}\n",
    "merge.yaml": b"<<: [1]",
    "zero.yaml": b"a: \0",
    "two.yaml": b"a: 1\n---\nb: 2\n",
    "number_key.yaml": b"5: seed\n",
    "list_key.yaml": b"[1, 2]: seed\n",
}


@pytest.mark.parametrize("name", ODD)
def test_invalid_records_are_a_value_error_of_one_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(ODD[name])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        read_record(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["digits.json", "negative.json", "digits.yaml", "base.yaml"])
def test_a_number_that_is_too_long_is_called_so(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(ODD[name])
    with pytest.raises(ValueError, match=r"it has a number of 500\d characters$"):
        read_record(path)


def test_a_folder_and_a_fifo_are_refused_as_records(tmp_path):
    (tmp_path / "status.json").mkdir()
    with pytest.raises(ValueError, match=r"regular file|directory"):
        read_record(tmp_path / "status.json")
    os.mkfifo(tmp_path / "fifo.json")
    done = threading.Event()

    def read() -> None:
        with pytest.raises(ValueError, match="not a regular file"):
            read_record(tmp_path / "fifo.json")
        done.set()

    threading.Thread(target=read, daemon=True).start()
    assert done.wait(10), "reading a FIFO waits for its writer"


def test_a_missing_record_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "status.json")


def test_records_are_read(tmp_path):
    (tmp_path / "a.json").write_text('{"state": "DONE", "n": 1.5}')
    (tmp_path / "a.yaml").write_text("state: DONE\nn: 1.5\n")
    assert read_record(tmp_path / "a.json") == read_record(tmp_path / "a.yaml")


def test_instants_compare_across_a_change_of_utc_offset():
    earlier = instant("2026-10-25T02:30:00+02:00")
    later = instant("2026-10-25T02:15:00+01:00")
    assert earlier < later


@pytest.mark.parametrize("odd", [None, 5, "", "yesterday", "9999-12-31T23:59:59-23:00", [], {}])
def test_invalid_timestamps_are_none(odd):
    assert instant(odd) is None
