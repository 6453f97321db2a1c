"""Secrets of the environment are in no file of a Job."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from bqnn.jobs.job import Job
from bqnn.jobs.secrets import is_secret_name, refuse_secrets
from bqnn.jobs.terminal import PresentableFormatter

ScriptHere = Callable[..., tuple[int, str]]
KEY = "5ec12e7" + 33 * "a"  # as long as those of Weights & Biases
RUN = ["logger=wandb", "trainer=smoke", "task=synthetic", "plots=false", "method.num_samples=2"]


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("SOME_VARIABLE", "5ec12e7-of-the-environment")


def files_with(folder: Path, text: str) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if text.encode() in path.read_bytes()]


def test_a_run_and_a_failed_one_leave_no_key_and_no_environment(
    keys: None, script_here: ScriptHere, tmp_path: Path
) -> None:
    code, errors = script_here("train", *RUN, "hydra.run.dir=run")
    assert code == 0, errors
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    code, _ = script_here("train", *RUN, "method.optimizer.lr=1e30", "hydra.run.dir=failed")
    assert code == 1  # not finite: its log has a traceback
    assert "Traceback" in (tmp_path / "failed" / "train.log").read_text()
    assert files_with(tmp_path, "5ec12e7") == []


def test_a_configuration_with_a_key_is_refused(
    keys: None, script_here: ScriptHere, tmp_path: Path
) -> None:
    code, errors = script_here(
        "train", *RUN, "logger.tags=['${oc.env:WANDB_API_KEY}']", "hydra.run.dir=run"
    )
    assert code == 1
    assert "logger.tags holds the environment's WANDB_API_KEY" in errors
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_with_a_key_is_refused_before_anything_is_written(
    keys: None, script_here: ScriptHere, tmp_path: Path
) -> None:
    code, errors = script_here("train", "-m", *RUN, f"logger.entity={KEY}", "seed=0,1")
    assert code == 1
    assert "the command line holds the environment's WANDB_API_KEY" in errors
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


ENCODED = "%35ec1" + KEY[4:]
HOLDING = [
    [f"nokey={KEY}"],  # which is refused for another reason, too
    [f"+{KEY}=1"],
    [f"+task.{KEY}=1"],
    [f"logger.tags=[before{KEY}after]"],
    [f"logger.project={ENCODED}"],
    [f"hydra.job.env_set.OTHER={KEY}"],
    [f"+hydra.job.env_set.OTHER={KEY}"],
    ["+hydra.job.env_set.ANY_PASSWORD=of_no_variable"],
    ["hydra.job.env_copy=[WANDB_API_KEY]"],
    [f"hydra.run.dir={KEY}", f"hydra.sweep.dir={KEY}"],
    ["hydra.run.dir=${oc.env:WANDB_API_KEY}", "hydra.sweep.dir=${oc.env:WANDB_API_KEY}"],
    ["hydra.run.dir=${oc.env:WANDB_API_KEY}", "hydra.sweep.subdir=${oc.env:WANDB_API_KEY}"],
    ['seed="${oc.decode:${oc.env:NUMERIC_TOKEN}}"'],
    ["seed=1234567890"],
    ["task.save_every=1234567890"],
    ["logger.entity=${oc.env:DB_PASS}"],
    ["logger.entity=hunter-2-hunter"],
    [f"--config-dir={KEY}"],
    ["logger.project=correct-horse-battery"],  # the password in an address
]


@pytest.mark.parametrize("mode", [[], ["-m"]], ids=["run", "sweep"])
@pytest.mark.parametrize("arguments", HOLDING, ids=lambda a: a[0].replace(KEY, "KEY")[:50])
def test_a_secret_anywhere_on_the_command_line_leaves_nothing(
    arguments: list[str],
    mode: list[str],
    keys: None,
    script_here: ScriptHere,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NUMERIC_TOKEN", "1234567890")
    monkeypatch.setenv("DB_PASS", "hunter-2-hunter")
    monkeypatch.setenv("PIP_INDEX_URL", "https://me:correct-horse-battery@host/simple")
    code, errors = script_here("train", *mode, *RUN, "+hydra.output_subdir=.hydra", *arguments)
    assert code == 1
    assert len(errors.strip().splitlines()) == 1, errors
    assert any(word in errors for word in ("environment", "no such key")), errors
    for secret in (KEY, "1234567890", "hunter-2", "correct-horse"):
        assert secret not in errors
    assert [path.name for path in tmp_path.iterdir()] == []


def test_secrets_in_error_messages_are_masked(
    keys: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_PASS", 'with space/"quote')
    (tmp_path / "run").mkdir()
    with Job(tmp_path / "run", "train") as job:
        job.claim()
        raise ValueError(f"https://host/?key={ENCODED}&db=with+space%2F%22quote {KEY}")
    assert job.status.error == "https://host/?key=<WANDB_API_KEY>&db=<DB_PASS> <WANDB_API_KEY>"
    assert "<WANDB_API_KEY>" in capsys.readouterr().err
    assert files_with(tmp_path, "5ec12e7") == []


def test_log_lines_and_tracebacks_hold_no_secret_and_no_escape(keys: None) -> None:
    formatter = PresentableFormatter("%(message)s")
    try:
        raise RuntimeError(f"{KEY} \x1b[2J")
    except RuntimeError as error:
        record = logging.LogRecord("bqnn", 20, "", 0, "of \x1b[31m%s", (KEY,), None)
        record.exc_info = (type(error), error, error.__traceback__)
    text = formatter.format(record)
    assert text.startswith("of \\x1b[31m<WANDB_API_KEY>\nTraceback")
    assert "\x1b" not in text
    assert KEY not in text


NAMES = {
    "secret": [
        *("WANDB_API_KEY", "apikey", "HF_TOKEN", "DB_PASS", "DB_PASSWD", "MYSQL_PWD", "PGPASSWORD"),
        *(
            "AWS_SECRET_ACCESS_KEY",
            "BASIC_AUTH",
            "GITHUB_PAT",
            "MY_CREDENTIALS",
            "KEY1",
            "SENTRY_DSN",
        ),
    ],
    "none": ["PATH", "PWD", "OLDPWD", "KEYBOARD", "XDG_SESSION_ID", "HOME", "AUTHOR", "COMPAT"],
}


def test_names_of_secrets_are_recognized() -> None:
    assert [name for name in NAMES["secret"] if not is_secret_name(name)] == []
    assert [name for name in NAMES["none"] if is_secret_name(name)] == []


def test_paths_short_values_and_words_of_the_configuration_are_no_secrets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/user/1000/keyring")
    monkeypatch.setenv("PASSWORD_STORE_DIR", "/somewhere/else")
    monkeypatch.setenv("SOME_KEY", str(tmp_path))
    monkeypatch.setenv("OTHER_KEY", "pointwise")
    monkeypatch.setenv("SHORT_KEY", "digits2")
    refuse_secrets(
        {
            "data_dir": str(tmp_path / "data"),
            "roots": ["/run/user/1000/keyring/x", "/somewhere/else/x", "digits2"],
            "method": {"name": "pointwise"},
        }
    )


def test_secrets_need_a_matching_name_and_a_minimum_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHORT_KEY", "data")
    monkeypatch.setenv("BQNN_DATA_DIR", "/a/long/folder")
    monkeypatch.setenv("DB_PASSWORD", "correct horse")
    refuse_secrets({"task": {"root": "data"}, "data_dir": "/a/long/folder", "seed": 0})
    with pytest.raises(ValueError, match=r"task\.roots holds the environment's DB_PASSWORD"):
        refuse_secrets({"task": {"roots": ["/x", "x correct horse y"]}})
