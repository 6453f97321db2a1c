"""Texts that are parsed entry by entry have the values, and the errors, of whole texts."""

import random

import pytest
import yaml

from bqnn.jobs.plain_yaml import parse_similar_yaml, parse_yaml

PARTS = (
    *("a: 1", "b: [1, x]", "a: 2", "'a': 3", "b:", "- 1", "  c: x", "c: 'x", "y': 2", 'd: "'),
    *("yes: 1", "true: 2", "e: |", "# a: 1", "---", "...", "%YAML 1.1", "? f", ": 2", "x", ""),
    *("g: {h: 1", "}", "i: &j 1", "k: *j", "!!str l: 1", "<<: {m: 1}", "n: >-", "p: 1: 2"),
    *("\ufeffo: 1", "\tq: 1", "]"),
)
BREAKS = ("\n", "\n", "\n", "\n", "\r", "\r\n", "\x85", "\u2028", "\n\n")


def _answer(parse, text):
    try:
        return repr(parse(text))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        return type(error), str(error)


def test_entries_are_parsed_as_in_the_whole_text():
    rng = random.Random(0)
    parsed = 0
    for _ in range(4000):
        chosen = rng.choices(PARTS, k=rng.randint(1, 5))
        text = "".join(part + rng.choice(BREAKS) for part in chosen)
        assert _answer(parse_similar_yaml, text) == _answer(parse_yaml, text), text
        parsed += isinstance(_answer(parse_yaml, text), str)
    assert parsed > 200


@pytest.mark.parametrize("text", ["seed: 1\nnet: {a: 2}\n", "net:\n  a: 2\nseed: 3\n"])
def test_equal_entries_are_parsed_once(text):
    again = parse_similar_yaml(text)
    assert parse_similar_yaml(text + "more: 1\n")["net"] is again["net"]
