"""A sweep continues after failures, records them, and runs only these when it is resumed."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bqnn.files import write_json
from bqnn.jobs.folder import FolderLock
from bqnn.jobs.job import Job
from bqnn.jobs.runs import ELSEWHERE
from bqnn.jobs.sweep import Sweep, find_sweep
from bqnn.settings.conf import CONF
from tests.jobs.status_file import change_status

ROOT = Path(__file__).resolve().parents[2]
ScriptHere = Callable[..., tuple[int, str]]
QUICK = ["logger=none", "trainer=smoke", "plots=false", "task=synthetic"]


def record(sweep: Path) -> dict[str, Any]:
    return json.loads((sweep / "sweep.json").read_text())


def states(sweep: Path) -> dict[str, str]:
    return {Path(job["folder"]).name: job["state"] for job in record(sweep)["jobs"]}


def test_a_sweep_continues_after_failures_and_reports_them(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = ["-m", *QUICK, "method=mcdropout", "method.rate=7,0.1,0.2", "hydra.sweep.dir=s"]
    code, errors = script_here("train", *arguments, "hydra.sweeper.max_batch_size=1")
    assert code == 1
    assert "method.rate=7" in errors
    name = "{}_mcdropout_synthetic_s0".format
    assert states(tmp_path / "s") == {name(0): "failed", name(1): "done", name(2): "done"}
    assert record(tmp_path / "s")["state"] == "FAILED"
    assert "method.rate=7" in record(tmp_path / "s")["jobs"][0]["error"]
    assert "Traceback" in (tmp_path / "s" / name(0) / "train.log").read_text()
    assert len(list((tmp_path / "s").rglob("status.json"))) == 3


def test_each_job_of_a_sweep_is_checked_before_it_starts(
    script_here: ScriptHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def refuse_seed_1(config: dict[str, Any], is_sweep: bool) -> None:
        if config["seed"] == 1:
            raise ValueError("seed=1: refused")

    monkeypatch.setattr("bqnn.commands.train.check", refuse_seed_1)
    monkeypatch.setattr("bqnn.commands.train.run", lambda job: started.append(job.config["seed"]))
    arguments = ["-m", *QUICK, "method=pointwise", "seed=0,1,2", "hydra.sweep.dir=s"]
    code, errors = script_here("train", *arguments)
    assert code == 1
    assert "seed=1: refused" in errors
    assert started == [0, 2]
    assert list(states(tmp_path / "s").values()) == ["done", "failed", "done"]


def test_a_key_that_only_swept_choices_have_is_refused_with_a_way_to_write_it(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    # The default method, bbb, has no such key, and no job of this sweep is of it.
    arguments = ["-m", *QUICK, "method=mcdropout,mcdropout", "hydra.sweep.dir=s"]
    code, errors = script_here("train", *arguments, "method.rate=0.1")
    assert code == 1
    assert "method.rate=choice(<value>)" in errors
    assert script_here("train", *arguments, "method.rate=choice(0.1)")[0] == 0


def test_a_resumed_sweep_runs_only_unfinished_jobs(
    script_here: ScriptHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "s"
    arguments = ["-m", *QUICK, "method=pointwise", "hydra.sweep.dir=s"]
    assert script_here("train", *arguments, "seed=0,1,2")[0] == 0
    change_status(sweep / "1_pointwise_synthetic_s1", state="RUNNING", end=None)  # it was killed
    change_status(sweep / "2_pointwise_synthetic_s2", state="RUNNING", end=None)
    with FolderLock(sweep / "2_pointwise_synthetic_s2"):  # it still runs
        code, errors = script_here("train", *arguments, "seed=0,1,2", "resume=true")
    assert code == 1
    assert "being run by another process" in errors
    name = "{0}_pointwise_synthetic_s{0}".format
    assert states(sweep) == {name(0): "skipped", name(1): "done", name(2): "running"}

    # Other jobs, in another order: their numbers change, their folders do not.
    code, errors = script_here("train", *arguments, "seed=3,2,1", "resume=true", "data_dir=x")
    assert code == 0, errors
    assert states(sweep) == {
        name(0): "skipped",
        "0_pointwise_synthetic_s3": "done",
        name(1): "skipped",
        name(2): "done",
    }


def test_a_folder_of_other_jobs_is_no_sweep_that_is_done(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = ["-m", *QUICK, "method=pointwise", "seed=0,1", "hydra.sweep.dir=s"]
    assert script_here("train", *arguments)[0] == 0
    code, _ = script_here("train", *arguments, "method.optimizer.lr=0.5")  # resume is forgotten
    assert code == 1
    assert record(tmp_path / "s")["state"] == "FAILED"
    assert set(states(tmp_path / "s").values()) == {"refused"}


def test_an_unreadable_status_stops_no_search(script_here: ScriptHere, tmp_path: Path) -> None:
    arguments = [*QUICK, "method=pointwise"]
    assert script_here("train", *arguments, "hydra.run.dir=outputs/train/a")[0] == 0
    (tmp_path / "outputs" / "train" / "b").mkdir()
    (tmp_path / "outputs" / "train" / "b" / "status.json").write_text("")
    code, errors = script_here("train", *arguments, "resume=true")
    assert code == 0, errors
    assert "outputs/train/b: status.json cannot be read" in errors
    assert sorted(path.name for path in (tmp_path / "outputs" / "train").iterdir()) == ["a", "b"]


def test_an_interrupted_run_that_was_found_goes_on_in_its_folder(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = [*QUICK, "method=pointwise", "trainer.save_every=0"]
    assert script_here("train", *arguments, "hydra.run.dir=outputs/train/a")[0] == 0
    run = tmp_path / "outputs" / "train" / "a"
    change_status(run, state="INTERRUPTED", git_commit="abcdef")
    (run / "checkpoint.ckpt").unlink()  # killed before the first one
    code, errors = script_here("train", *arguments, "resume=true")
    assert code == 0, errors
    assert "instead of 'abcdef'" in (run / "train.log").read_text()
    assert list(run.parent.iterdir()) == [run]


@pytest.mark.parametrize("content", ["", "[]", "{}", "5", '{"start": 5, "jobs": {}}'])
def test_an_invalid_record_of_a_sweep_is_reported_and_another_one_is_resumed(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"state": "FAILED", "verb": "train", "overrides": ["seed=0,1"]}
    starts = {"a": "2026-10-25T02:30:00+02:00", "b": "2026-10-25T02:15:00+01:00", "c": "soon"}
    for name, start in starts.items():  # b is the newest; c does not tell
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "sweep.json", {**record, "start": start})
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "sweep.json").write_text(content)
    (tmp_path / "e" / "sweep.json").mkdir(parents=True)
    assert find_sweep(tmp_path, "train", ["seed=0,1"]) == tmp_path / "b"
    said = capsys.readouterr().err
    assert f"{tmp_path}/d: sweep.json" in said
    assert f"{tmp_path}/e: sweep.json" in said


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"folder": 5}', '{"folder": "\\u0000"}'])
def test_an_invalid_link_to_a_job_is_reported_and_the_job_is_not_done(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "0_a").mkdir()
    (tmp_path / "0_a" / ELSEWHERE).write_text(content)
    sweep = Sweep(tmp_path, "train", [], 1, resume=True)
    assert not sweep.finish()
    assert sweep.jobs[0].state == "interrupted"
    assert (sweep.jobs[0].error or "").startswith(ELSEWHERE)
    told = capsys.readouterr()
    assert f"{tmp_path}/0_a: {ELSEWHERE}" in told.err
    assert str(sweep.jobs[0].error) in told.out  # in the table


def test_the_table_counts_seconds_between_instants(tmp_path: Path) -> None:
    times = {
        "0": ("2026-10-25T02:59:00+02:00", "2026-10-25T02:01:00+01:00", 120.0),
        "1": ("2026-10-25T02:00:00", "2026-10-25T02:00:30+00:00", 30.0),
        "2": ("yesterday", "2026-10-25T02:00:30+00:00", None),
        "3": (5, None, None),
    }
    sweep = Sweep(tmp_path, "train", [], 4, resume=False)
    for name, (start, end, _) in times.items():
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "status.json", {"state": "DONE", "start": start, "end": end})
    assert sweep.finish()
    assert [job.seconds for job in sweep.jobs] == [seconds for _, _, seconds in times.values()]


def test_no_next_job_runs_after_a_signal_to_one_whose_folder_is_gone(
    script_here: ScriptHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_the_folder(job: Job, *_: object) -> None:
        shutil.rmtree(job.folder)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("bqnn.commands.train.fit", lose_the_folder)
    arguments = ["-m", *QUICK, "method=pointwise", "seed=0,1", "hydra.sweep.dir=s"]
    code, errors = script_here("train", *arguments)
    assert code == 130
    assert "Traceback" not in errors
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"multirun.yaml", "sweep.json"}
    assert record(tmp_path / "s")["state"] == "FAILED"


@pytest.mark.parametrize(("writes", "jobs"), [(0, 0), (1, 2)], ids=["start", "end"])
def test_a_sweep_whose_record_cannot_be_written_fails_in_one_line(
    writes: int,
    jobs: int,
    script_here: ScriptHere,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[Path] = []

    def full_after_some(path: Path, content: object) -> None:
        written.append(path)
        if len(written) > writes:
            raise OSError(f"{path} cannot be written (No space left on device)")
        write_json(path, content)

    monkeypatch.setattr("bqnn.jobs.sweep.write_json", full_after_some)
    arguments = ["-m", *QUICK, "method=pointwise", "seed=0,1", "hydra.sweep.dir=s"]
    code, errors = script_here("train", *arguments)
    assert code == 1
    lines = [line for line in errors.splitlines() if "sweep.json cannot be written" in line]
    assert len(lines) == 1
    assert lines[0].startswith("train.py: ")
    assert "Traceback" not in errors
    assert len(list((tmp_path / "s").glob("*/metrics.json"))) == jobs


def test_a_retrained_checkpoint_is_evaluated_again(script_here: ScriptHere, tmp_path: Path) -> None:
    for seed in (0, 1):
        trained = [*QUICK, "method=pointwise", f"seed={seed}", f"hydra.run.dir=f{seed}"]
        assert script_here("train", *trained)[0] == 0
    arguments = ["suite=test", "logger=none", "plots=false", "resume=true"]
    one = [*arguments, "checkpoint=f0/checkpoint.ckpt"]
    every = [*arguments, "checkpoint=f*/checkpoint.ckpt", "hydra.run.dir=every"]

    def runs() -> dict[str, float]:
        assert script_here("evaluate", *one)[0] == 0
        assert script_here("evaluate", *every)[0] == 0
        found = sorted((tmp_path / "outputs" / "evaluate").glob("*/metrics.json"))
        found += sorted((tmp_path / "every").glob("*/metrics.json"))
        return {str(path): json.loads(path.read_text())["test/nll"] for path in found}

    before = runs()
    assert runs() == before
    (tmp_path / "f0" / "checkpoint.ckpt").write_bytes(
        (tmp_path / "f1" / "checkpoint.ckpt").read_bytes()
    )
    after = runs()
    new = {path: nll for path, nll in after.items() if path not in before}
    assert len(new) == 2  # alone, and as a part
    trained_nll = json.loads((tmp_path / "f1" / "metrics.json").read_text())["test/nll"]
    assert list(new.values()) == pytest.approx([trained_nll] * 2, rel=1e-5)
    (old,) = {nll for path, nll in before.items() if "f1" not in path and "/1_" not in path}
    assert old != pytest.approx(trained_nll, rel=1e-5)
    assert before.items() <= after.items()
    code, errors = script_here("evaluate", *one, f"hydra.run.dir={Path(next(iter(before))).parent}")
    assert code == 1
    assert "a checkpoint that has changed since" in errors


def test_without_a_folder_the_newest_like_it_is_resumed(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = [*QUICK, "method=pointwise"]
    assert script_here("train", *arguments, "seed=1")[0] == 0
    outputs = tmp_path / "outputs" / "train"
    (single,) = outputs.iterdir()
    assert script_here("train", *arguments, "seed=1", "resume=true")[0] == 0
    assert list(outputs.iterdir()) == [single]

    assert script_here("train", "-m", *arguments, "seed=0,1", "resume=true")[0] == 0
    (sweep,) = set(outputs.iterdir()) - {single}
    jobs = record(sweep)["jobs"]
    assert [job["state"] for job in jobs] == ["done", "skipped"]
    assert jobs[1]["folder"] == str(single)
    assert len(list(outputs.rglob("status.json"))) == 2

    assert script_here("train", "-m", *arguments, "seed=0,1", "resume=true")[0] == 0
    assert set(outputs.iterdir()) == {single, sweep}  # the same command, the same sweep
    assert {job["state"] for job in record(sweep)["jobs"]} == {"skipped"}


def test_a_folder_with_another_job_is_never_resumed(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = [*QUICK, "method=pointwise", "hydra.run.dir=run"]
    assert script_here("train", *arguments)[0] == 0
    code, errors = script_here("train", *arguments, "seed=1", "resume=true")
    assert code == 1
    assert "another configuration" in errors


def test_a_pattern_is_resumed_part_by_part(script_here: ScriptHere, tmp_path: Path) -> None:
    trained = [*QUICK, "method=pointwise"]
    for seed in (0, 1):
        assert script_here("train", *trained, f"seed={seed}", f"hydra.run.dir=f{seed}")[0] == 0
    change_status(tmp_path / "f1", state="INTERRUPTED")
    arguments = ["checkpoint=f*/checkpoint.ckpt", "quant.mode=ptq", "logger=none", "plots=false"]
    arguments += ["num_samples=1", "hydra.run.dir=q"]
    assert script_here("quantize", *arguments)[0] == 0
    parts = [path for path in (tmp_path / "q").iterdir() if path.is_dir()]
    assert [path.name for path in parts] == [
        "0_pointwise_synthetic"
    ]  # what is not done is left out
    before = (parts[0] / "status.json").read_text()

    change_status(tmp_path / "f1", state="DONE")
    assert script_here("quantize", *arguments, "resume=true")[0] == 0
    assert (parts[0] / "status.json").read_text() == before
    assert (tmp_path / "q" / "1_pointwise_synthetic" / "metrics.json").exists()

    shutil.rmtree(parts[0])  # to be done again
    assert script_here("quantize", *arguments, "resume=true")[0] == 0
    assert (tmp_path / "q" / "2_pointwise_synthetic" / "metrics.json").exists()


def test_seeds_of_a_fine_tuning_change_the_batches_and_not_the_data(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    assert script_here("train", *QUICK, "method=pointwise", "hydra.run.dir=f")[0] == 0
    arguments = ["checkpoint=f/checkpoint.ckpt", "quant.fine_tuning.max_epochs=2", "logger=none"]
    arguments += ["plots=false", "quant.fine_tuning.optimizer.lr=1e-2"]
    results = {}
    for seed in ("null", "0", "5"):
        run = [f"quant.fine_tuning.seed={seed}", f"hydra.run.dir=q{seed}"]
        assert script_here("quantize", *arguments, *run)[0] == 0
        results[seed] = json.loads((tmp_path / f"q{seed}" / "metrics.json").read_text())
    for seed in ("0", "5"):
        same = results[seed]["int8/test/nll"] == results["null"]["int8/test/nll"]
        assert same == (seed == "0")
        assert results[seed]["float/test/nll"] == results["null"]["float/test/nll"]


# What has to be installed for a launcher, and how it is told to run two jobs at a time.
LAUNCHERS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
    "ray": ("hydra_plugins.hydra_ray_launcher", ["+hydra.launcher.ray.init.num_cpus=2"]),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", []),
}


@pytest.mark.parametrize(
    "launcher",
    ["joblib", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ray", "submitit_local"))],
)
def test_a_sweep_ends_alike_under_every_launcher(
    launcher: str, script_here: ScriptHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin, options = LAUNCHERS[launcher]
    pytest.importorskip(plugin, reason=f"{launcher}: pip install bqnn[{launcher.split('_')[0]}]")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["-m", *QUICK, "method=mcdropout", "method.rate=7,0.1", "hydra.sweep.dir=s"]
    arguments += [f"hydra/launcher={launcher}", *options]
    code, _ = script_here("train", *arguments)
    assert code == 1
    name = "{}_mcdropout_synthetic_s0".format
    assert states(tmp_path / "s") == {name(0): "failed", name(1): "done"}
    assert "CPU threads: 1" in (tmp_path / "s" / name(1) / "train.log").read_text()
    if launcher == "joblib":
        assert script_here("train", *arguments, "resume=true")[0] == 1
        assert states(tmp_path / "s") == {name(0): "failed", name(1): "skipped"}


def test_the_slurm_launcher_requests_the_configured_resources(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install bqnn[slurm]")
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["hydra/launcher=submitit_slurm", f"hydra.sweep.dir={tmp_path}"]
        overrides += ["hydra.launcher.partition=gpu"]
        config = compose("train", overrides, return_hydra_config=True)
        launcher = instantiate(config.hydra.launcher)
    assert launcher.params["partition"] == "gpu"
    assert launcher.params["submitit_folder"] == f"{tmp_path}/.submitit/%j"


STUDY = ["task=digits", "seed=0", "trainer=smoke", "plots=false", "logger=none"]
TUNING = ["quant.fine_tuning.seed=0", "num_samples=1", "plots=false", "logger=none"]


def test_a_preset_is_a_sweep_that_overrides_change_and_that_goes_on(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    arguments = ["experiment=paper", "method=pointwise", *STUDY]
    for state in ("done", "skipped"):
        code, errors = script_here("train", *arguments)
        assert code == 0, errors
        (job,) = json.loads((tmp_path / "outputs/study/float/sweep.json").read_text())["jobs"]
        assert (job["folder"], job["state"]) == ("0_pointwise_digits_s0", state)
    assert [path.name for path in (tmp_path / "outputs/study").iterdir()] == ["float"]


def test_a_preset_of_another_verb_is_named(script_here: ScriptHere, tmp_path: Path) -> None:
    code, errors = script_here("train", "experiment=paper_bits")
    assert code == 1
    assert "experiment=paper_bits may be a preset of another verb" in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_lists_its_targets_and_studies_by_presets() -> None:
    def make(*arguments: str) -> list[str]:
        command = ["make", "--no-print-directory", *arguments]
        made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return made.stdout.splitlines()

    assert {line.split()[0] for line in make()} >= {"help", "demo", "study", "test", "lint"}
    assert [shlex.split(line)[1:] for line in make("--dry-run", "study")[-3:]] == [
        ["train", "experiment=paper"],
        ["quantize", "experiment=paper_bits"],
        ["report", "outputs/study"],
    ]


@pytest.mark.slow
def test_the_study_trains_all_and_quantizes_the_best_of_each(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    tuning = [*TUNING, "bits=w3a7,w8a4", "quant.fine_tuning.max_epochs=1"]
    for name, preset, options in (
        ("train", "paper", STUDY),
        ("quantize", "paper_bits", tuning),
    ):
        code, errors = script_here(name, f"experiment={preset}", *options)
        assert code == 0, errors
    study = tmp_path / "outputs" / "study"
    assert len(states(study / "float")) == 4
    parts = list((study / "quantized").glob("*/*/metrics.json"))
    assert len(parts) == 2 * 4
    assert len(list((study / "quantized").glob("*_w8a4/*_sghmc_digits"))) == 1
