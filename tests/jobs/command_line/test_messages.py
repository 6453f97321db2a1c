"""Errors of Hydra in one line."""

import pytest
from hydra.errors import HydraException

from bqnn.jobs.command_line.messages import explain


@pytest.mark.parametrize(
    ("plugin", "extra"), [("joblib", "joblib"), ("ray", "ray"), ("submitit", "slurm")]
)
def test_a_launcher_that_is_not_installed_names_its_extra(plugin: str, extra: str) -> None:
    error = HydraException(
        f"Unknown plugin class : 'hydra_plugins.hydra_{plugin}_launcher.launcher.Launcher'"
    )
    assert explain(error, "train").endswith(f'pip install "bqnn[{extra}]"')
