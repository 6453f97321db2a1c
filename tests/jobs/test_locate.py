"""Checkpoint files of a path or a pattern on the command line."""

from pathlib import Path

import pytest

from bqnn.checkpoints.file import read_checkpoint
from bqnn.jobs.locate import canonical, is_pattern, locate, locate_all


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a sweep of two runs, one without a checkpoint, and a file beside them."""
    for name in ("a", "b=1,(x) [y]", "empty"):
        (tmp_path / "sweep" / name).mkdir(parents=True)
    for name in ("a/checkpoint.ckpt", "a/best.ckpt", "b=1,(x) [y]/checkpoint.ckpt", "sweep.json"):
        (tmp_path / "sweep" / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "sweep"


def test_a_folder_of_a_run_stands_for_its_checkpoint(runs: Path) -> None:
    file = Path("sweep/a/checkpoint.ckpt")
    for path in ("sweep/a", "sweep/a/", str(file), "~/sweep/a", "~/sweep/a/checkpoint.ckpt"):
        assert locate("checkpoint", path).samefile(file)
        assert locate_all("checkpoint", path) == [locate("checkpoint", path)]
        assert Path(canonical("checkpoint", path)).samefile(file)
        assert not is_pattern(path)
    assert canonical("checkpoint", "sweep/a") == str(file)
    odd = "sweep/b=1,(x) [y]"
    assert locate("checkpoint", odd) == Path(odd, "checkpoint.ckpt")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("sweep/*/checkpoint.ckpt", {"a", "b=1,(x) [y]"}),
        ("sweep/*", {"a", "b=1,(x) [y]"}),
        ("~/sweep/?", {"a"}),
        ("~/sweep/[a]*", {"a"}),
    ],
)
def test_a_pattern_may_be_one_of_folders(runs: Path, pattern: str, names: set[str]) -> None:
    found = locate_all("checkpoint", pattern)
    assert {path.parent.name for path in found} == names
    assert {path.name for path in found} == {"checkpoint.ckpt"}
    assert canonical("checkpoint", pattern) == pattern.replace("~", str(runs.parent))


def test_all_below_a_folder_are_its_checkpoints_each_once(runs: Path) -> None:
    names = [path.name for path in locate_all("checkpoint", "sweep/**")]
    assert sorted(names) == ["best.ckpt", "checkpoint.ckpt", "checkpoint.ckpt"]


@pytest.mark.parametrize("path", ["nowhere", "sweep/empty", "nowhere/*", "sweep/empty/*", "~/x"])
def test_missing_checkpoints_are_named_by_key_and_path(runs: Path, path: str) -> None:
    for find in (locate_all, canonical):
        with pytest.raises(FileNotFoundError) as error:
            find("method.init_from", path)
        assert path in str(error.value)
        assert "method.init_from" in str(error.value)


def test_a_pattern_enters_each_folder_once_whatever_links_there_are(runs: Path) -> None:
    for name in ("b=1", "b=2"):  # with two links to itself a folder has 2^40 paths
        (runs / "a" / name).symlink_to(runs, target_is_directory=True)
    (runs / "elsewhere").symlink_to("a", target_is_directory=True)
    assert locate_all("checkpoint", "sweep/**/best.ckpt") == [Path("sweep/a/best.ckpt")]
    assert len(locate_all("checkpoint", "**/checkpoint.ckpt")) == 2
    assert len(locate_all("checkpoint", "**/a/**/checkpoint.ckpt")) == 2


def test_a_pattern_goes_through_a_link_to_runs_elsewhere(runs: Path) -> None:
    outputs = runs.parent / "outputs"
    outputs.mkdir()
    (outputs / "linked").symlink_to(runs, target_is_directory=True)
    found = locate_all("checkpoint", "outputs/**/best.ckpt")
    assert found == [Path("outputs/linked/a/best.ckpt")]


def test_a_checkpoint_that_is_a_link_to_nowhere_is_not_dropped(runs: Path) -> None:
    (runs / "empty" / "checkpoint.ckpt").symlink_to("gone.ckpt")
    (runs / "round").mkdir()
    (runs / "round" / "checkpoint.ckpt").symlink_to("checkpoint.ckpt")
    for pattern in ("sweep/*", "sweep/**", "sweep/*/checkpoint.ckpt"):
        found = {path for path in locate_all("checkpoint", pattern) if path.name[0] == "c"}
        assert {path.parent.name for path in found} == {"a", "b=1,(x) [y]", "empty", "round"}
    with pytest.raises(FileNotFoundError, match="it is a broken link"):
        read_checkpoint(locate("checkpoint", "sweep/empty"))
    with pytest.raises(ValueError, match=r"round/checkpoint.ckpt cannot be read"):
        read_checkpoint(locate("checkpoint", "sweep/round"))


@pytest.mark.parametrize("path", ["x" * 5000, "x" * 300, "x" * 300 + "*", "a\0b", "a\0*"])
def test_an_invalid_path_does_not_exist(runs: Path, path: str) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoint: no checkpoint at"):
        locate_all("checkpoint", path)
