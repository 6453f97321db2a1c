"""Untrusted text is shown safely, and converted to valid names."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bqnn.text import LONGEST_NAME, one_line, printable, short, valid_name


@given(st.text(st.characters()))
def test_nothing_printed_can_move_a_cursor(given_text):
    assert printable(given_text).isprintable()
    assert one_line(given_text).isprintable()


@pytest.mark.parametrize("odd", ["\x1b[2J", "\u202egnp.exe", "\udcff", "\x9b31m", "\u2028"])
def test_escapes_bidi_marks_and_odd_bytes_are_spelled_out(odd):
    assert printable(f"a{odd}b").startswith("a\\")
    assert printable(f"a{odd}b").endswith("b")


def test_printable_text_stays_as_it_is():
    assert printable("naïve Größe, 東京") == "naïve Größe, 東京"


def test_a_value_that_holds_itself_many_times_is_described_at_once():
    nested: object = "x"
    for _ in range(200):
        nested = [nested, nested]
    assert short(nested) == "a list of 2"


def test_long_numbers_and_texts_are_cut():
    assert short(10**400) == "a number of 1329 bits"
    assert short("é" * 200) == f"'{'é' * 57}...'"
    assert short("\x1b" * 200, length=10) == "'" + "\\x1b" * 7 + "...'"


@given(st.text(st.characters(), max_size=300))
def test_any_text_becomes_a_name_that_wandb_and_file_systems_take(given_text):
    name = valid_name(given_text)
    assert 0 < len(name) <= LONGEST_NAME
    assert set(name) <= set(string.ascii_letters + string.digits + "._-")
    assert name[0] not in ".-"
    assert valid_name(name) == name


@pytest.mark.parametrize("name", ["bbb-digits-w4a7-s0", "my_table", "v1.2"])
def test_valid_names_are_kept(name):
    assert valid_name(name) == name
