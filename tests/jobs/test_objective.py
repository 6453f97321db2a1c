"""The metrics that a sweeper gets from its jobs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from bqnn.jobs.command_line.refusals import _refuse_objectives
from bqnn.jobs.objective import objective_values

ScriptHere = Callable[..., tuple[int, str]]
QUICK = ["task=synthetic", "trainer=smoke", "logger=none", "plots=false"]


def test_objectives_are_metrics_and_sizes_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({"val/nll": 0.5, "test/nll": 0.25}))
    assert objective_values(tmp_path, []) == []
    with pytest.raises(ValueError, match="no metric 'size/packed_bytes'"):
        objective_values(tmp_path, ["size/packed_bytes"])
    (tmp_path / "size.json").write_text(json.dumps({"packed_bytes": 7}))
    assert objective_values(tmp_path, ["size/packed_bytes", "val/nll"]) == [7.0, 0.5]
    with pytest.raises(ValueError, match="objective: the run has no metric 'val/nl'; did you mean"):
        objective_values(tmp_path, ["val/nl"])


@pytest.mark.parametrize(
    ("direction", "objective", "is_refused"),
    [
        ("minimize", [], True),
        ("minimize", ["val/nll"], False),
        (["minimize", "minimize"], ["val/nll"], True),
        (["minimize", "maximize"], ["val/nll", "ood/uniform/auroc_entropy"], False),
        (None, [], False),
    ],
)
def test_a_search_has_one_metric_for_each_direction(
    direction: object, objective: list[str], is_refused: bool
) -> None:
    sweeper = {} if direction is None else {"direction": direction}
    config = OmegaConf.create({"hydra": {"sweeper": sweeper}, "objective": objective})
    if is_refused:
        with pytest.raises(ValueError, match=r"^objective=.* name as many metrics, such as"):
            _refuse_objectives(config)
    else:
        _refuse_objectives(config)


def test_a_metric_that_is_not_there_fails_the_job(script_here: ScriptHere, tmp_path: Path) -> None:
    run = ["-m", *QUICK, "method=pointwise", "seed=0", "hydra.sweep.dir=s"]
    code, errors = script_here("train", *run, "objective=[val/nl]")
    assert code == 1
    assert "objective: the run has no metric 'val/nl'; did you mean val/nll?" in errors
    (status,) = (tmp_path / "s").glob("*/status.json")
    assert json.loads(status.read_text())["state"] == "FAILED"


def test_a_search_needs_its_extra(script_here: ScriptHere) -> None:
    try:
        import hydra_plugins.hydra_optuna_sweeper  # noqa: F401
    except ImportError:
        for name in ("search", "optuna"):
            code, errors = script_here("train", "-m", *QUICK, f"hydra/sweeper={name}")
            assert code == 1
            assert 'pip install "bqnn[optuna]"' in errors


def test_a_search_with_two_objectives_is_stored_and_resumed(
    script_here: ScriptHere, tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    import optuna

    run = ["-m", "hydra/sweeper=search", *QUICK, "method=pointwise", "hydra.sweep.dir=s"]
    run += ["objective=[val/nll,val/rmse]", "hydra.sweeper.n_trials=2"]
    run += ["method.optimizer.lr=choice(1e-3,1e30)"]  # the second one fails
    for number in (2, 4):
        script_here("train", *run, "resume=true")
        study = optuna.load_study(study_name="bqnn", storage=f"sqlite:///{tmp_path}/s/study.db")
        assert len(study.trials) == number
    best = yaml.safe_load((tmp_path / "s" / "optimization_results.yaml").read_text())
    assert all(each["params"] == {"method.optimizer.lr": 1e-3} for each in best["solutions"])
