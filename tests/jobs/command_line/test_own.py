"""Overrides that name a plug-in are completed, and all others are unchanged."""

import pytest

from bqnn.jobs.command_line.own import choose_own

TARGET = "net._target_=a.B"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([TARGET], ["net=own", f"++{TARGET}"]),
        (["-m", "seed=1,2", TARGET], ["-m", "seed=1,2", "net=own", f"++{TARGET}"]),
        (["net.width=3", TARGET], ["net=own", "++net.width=3", f"++{TARGET}"]),
        (["net=mine", TARGET, "+net.x=1"], ["net=mine", f"++{TARGET}", "++net.x=1"]),
        (["net.name=b"], ["net=own", "++net.name=b"]),
        (["net.name=mlp,b"], ["net=own", "++net.name=mlp,b"]),
        (["net.name='b'"], ["net=own", "++net.name='b'"]),
        (["task.dataset=b", "task.rows=3"], ["task=own", "++task.dataset=b", "++task.rows=3"]),
        (
            ["method._target_=a.B", "net.width=3", "--config-dir", "c"],
            ["method=own", "++method._target_=a.B", "net.width=3", "--config-dir", "c"],
        ),
        (["~net.width", TARGET], ["~net.width", "net=own", f"++{TARGET}"]),
    ],
)
def test_a_group_with_a_plug_in_is_composed_from_own(
    arguments: list[str], expected: list[str]
) -> None:
    assert choose_own(arguments) == expected
    assert choose_own(expected) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-m", "net=mlp,lenet", "net.width=3", "+net.depth=3"],
        ["net.name=mlp", "method.name='bbb'", "task.name=mine", "task.dataset=uci"],
        ["network.name=x", "hydra.job.name=x", "x", "=", "net", "net._target"],
    ],
)
def test_other_command_lines_stay_with_non_finite(arguments: list[str]) -> None:
    assert choose_own(arguments) == arguments
