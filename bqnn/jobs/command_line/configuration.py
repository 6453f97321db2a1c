"""Compose configurations, and turn them into plain dictionaries."""

import itertools
import warnings
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from bqnn.jobs.locate import canonical
from bqnn.jobs.secrets import refuse_secrets
from bqnn.settings.conf import CONF
from bqnn.settings.options import check_options
from bqnn.text import valid_name

# Registered at import, so that each process that unpickles the callback has them.
OmegaConf.register_new_resolver("valid_name", lambda text: valid_name(str(text)), replace=True)
OmegaConf.register_new_resolver(
    "class_name", lambda path: str(path).rpartition(".")[2], replace=True
)
warnings.filterwarnings(  # conf/hydra/launcher reuses the names of the plugins on purpose
    "ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema"
)


def config_dir() -> Path:
    """Return the folder with <verb>.yaml and the groups that Hydra composes."""
    return CONF


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Resolve a configuration and convert it to plain types.

    Args:
        cfg: The composed configuration.

    Returns:
        Nested dictionaries and lists.

    Raises:
        ValueError: A value is missing, holds a secret, or is not allowed for its key.
    """
    try:
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, MissingMandatoryValue):
            reason = f"{error.full_key} is missing"
        raise ValueError(f"{reason}; give it on the command line") from error
    assert isinstance(config, dict)
    refuse_secrets(config)
    check_options(config)  # type: ignore[arg-type]
    return config  # type: ignore[return-value]


def located(cfg: DictConfig) -> dict[str, Any]:
    """Return `plain(cfg)` with canonical paths of checkpoints (see `bqnn.jobs.locate`).

    Args:
        cfg: The composed configuration.

    Returns:
        Nested dictionaries and lists.

    Raises:
        ValueError: See `plain`.
        FileNotFoundError: A checkpoint does not exist. A resumed Job may lack it.
    """
    config = plain(cfg)
    for key, node, name in (
        ("checkpoint", config, "checkpoint"),
        ("method.init_from", config.get("method", {}), "init_from"),
    ):
        if node.get(name) is not None:
            try:
                node[name] = canonical(key, node[name])
            except FileNotFoundError:
                if not config.get("resume"):
                    raise
    return config


def unresolved(config: DictConfig) -> dict[str, Any]:
    """Return an unresolved configuration in plain types, without parts that vary per call.

    Args:
        config: The composed configuration, with its Hydra part.
    """
    values: Any = OmegaConf.to_container(config, resolve=False)
    for key in ("runtime", "overrides"):
        values["hydra"].pop(key, None)
    return dict(values)


def loader() -> Any:
    """Return the loader of Hydra, which composes configurations."""
    return GlobalHydra.instance().config_loader()


def is_choice(override: str) -> bool:
    """Return whether an override selects a file of a group rather than a value.

    Args:
        override: An override, such as `method=bbb`.
    """
    key = override.lstrip("+~").partition("=")[0].partition("@")[0]
    return bool(loader().get_group_options(key))


def is_given(key: str, hydra_config: Any) -> bool:
    """Return whether the command line has an override of this key of Hydra.

    Args:
        key: A key such as `hydra.run.dir`.
        hydra_config: The Hydra part of the configuration.
    """
    return any(override.startswith(f"{key}=") for override in hydra_config.overrides.hydra)


def names_sweep_folder(config: DictConfig) -> bool:
    """Return whether the command line or a preset names the folder of a sweep, without the time.

    Args:
        config: The composed configuration, with its Hydra part.
    """
    named = str(unresolved(config)["hydra"]["sweep"]["dir"])
    return is_given("hydra.sweep.dir", config.hydra) or "${now:" not in named


def sweep_jobs(config: DictConfig) -> list[list[str]] | None:
    """Return the overrides of each Job of a multirun.

    Args:
        config: The composed configuration, with its Hydra part.

    Returns:
        One list per Job; None with a sweeper other than Basic, or if the sweeper will refuse them.
    """
    if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
        return None
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=loader())
    values: dict[str, list[str]] = {}  # the last override of a key wins
    for override in parser.parse_overrides([*params, *config.hydra.overrides.task]):
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            return None
    return [list(job) for job in itertools.product(*values.values())]
