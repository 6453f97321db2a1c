"""Start a run of Weights & Biases, offline if there is no network or key."""

import contextlib
import logging
import netrc
import os
import ssl
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from bqnn.text import one_line

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0  # time limit for the answer of a server
RETRY_SECONDS = 900.0  # time until a later job of the process tries a failed server again
# Settings of W&B, unless WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT are set.
INIT_SECONDS = 30.0
FINISH_SECONDS = 60.0
FINISH_SECONDS_WITH_ARTIFACTS = 300.0

_asked_again_at: dict[str, float] = {}  # by failed server, in seconds of time.monotonic


def start_run(folder: Path, has_artifacts: bool, **options: Any) -> "wandb.Run":
    """Start a run, online if possible and otherwise offline.

    The environment variable WANDB_MODE takes precedence. Without it, the run is offline if there is
    no key, or if the server does not answer within a few seconds or rejects the key. In the last
    two cases, the reason is logged in one line.

    Args:
        folder: The folder of the job, in which W&B keeps the files of the run.
        has_artifacts: Whether the run uploads large files, which allows more time at its end.
        options: Arguments of `wandb.init`.

    Returns:
        The run.
    """
    _find_folders(folder / "wandb")
    import wandb

    quiet: dict[str, Any] = {"silent": True, "console": "off"}
    given = wandb.setup(wandb.Settings(**quiet)).settings
    limits = {
        "init_timeout": INIT_SECONDS,
        "finish_timeout": FINISH_SECONDS_WITH_ARTIFACTS if has_artifacts else FINISH_SECONDS,
        "finish_timeout_raises": True,
    }
    known = wandb.Settings.model_fields  # older versions of W&B lack some
    for name, value in limits.items():
        if name in known and f"WANDB_{name.upper()}" not in os.environ:
            quiet[name] = value

    def init(**mode: Any) -> "wandb.Run":
        return wandb.init(dir=folder, settings=wandb.Settings(**quiet, **mode), **options)

    def init_again(**mode: Any) -> "wandb.Run":
        try:
            return init(**mode)
        except Exception:  # the service that W&B started for an earlier job may have died
            end_service()
            return init(**mode)

    if "WANDB_MODE" in os.environ:
        is_online = os.environ["WANDB_MODE"] in ("online", "run", "shared")
        return init() if is_online else init_again()
    server = given.base_url
    if not _has_key(given) or time.monotonic() < _asked_again_at.get(server, 0):
        return init_again(mode="offline")
    why = _why_silent(server)
    if why is None:
        try:
            return init(mode="online")
        except Exception as error:  # W&B raises many types
            why = one_line(str(error)).partition(" Consider increasing")[0] or type(error).__name__
            end_service()  # otherwise W&B treats the id of the run as in use
    _asked_again_at[server] = time.monotonic() + RETRY_SECONDS
    log.warning(
        "Weights & Biases at %s: %s; runs are stored offline, and wandb sync uploads them; set "
        "WANDB_MODE=offline or logger=none to skip this check",
        *(server, why),
    )
    return init_again(mode="offline")


def end_service() -> None:
    """End the service process of W&B, in any state. The next run starts a new one."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):  # the service may have died
        wandb.teardown()


def _why_silent(server: str) -> str | None:
    """Return why a server does not answer, or None if it does."""
    found: list[str | None] = [f"no answer in {ANSWER_SECONDS:g} s"]

    def ask() -> None:
        found[0] = _ask(server)

    # In a thread, because name resolution has no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return found[0]


def _ask(server: str) -> str | None:
    try:
        with urlopen(server, timeout=ANSWER_SECONDS):
            return None
    except HTTPError as error:  # the page may not exist, but the server has answered
        return f"it answers {error.code}" if error.code >= 500 else None
    except URLError as error:
        # W&B may use other certificates than urlopen.
        is_there = isinstance(error.reason, ssl.SSLError)
        return None if is_there else f"no connection ({one_line(str(error.reason))})"
    except (OSError, ValueError) as error:
        return f"no connection ({one_line(str(error))})"


def _has_key(settings: Any) -> bool:
    """Return whether there is an API key. Without one, W&B would prompt for it."""
    if settings.api_key or getattr(settings, "identity_token_file", None):
        return True
    hosts = [urlsplit(settings.base_url).netloc]
    if settings.base_url == type(settings)().base_url:
        hosts.append("api.wandb.ai")  # keys of older versions are under this host
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
        return any(known.authenticators(host) for host in hosts)
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


def _find_folders(instead: Path, environment: Mapping[str, str] = os.environ) -> None:
    """Move the cache, data and configuration of W&B below `instead` if home is not writable.

    This also holds for later jobs of the process, because W&B reads its environment once.
    """
    home = environment.get("HOME" if os.name == "posix" else "USERPROFILE")
    for name, moved, inside in (
        ("WANDB_CACHE_DIR", "XDG_CACHE_HOME", ".cache"),
        ("WANDB_DATA_DIR", "XDG_DATA_HOME", ".local/share"),
        ("WANDB_CONFIG_DIR", "XDG_CONFIG_HOME", ".config"),
    ):
        usual = environment.get(moved) or (home and os.path.join(home, inside))
        if not (usual and _takes_files(Path(usual))):
            folder = str(instead.absolute() / name.split("_")[1].lower())
            os.environ.setdefault(name, folder)
            if not os.path.isabs(os.path.expanduser("~")):  # W&B looks up the home folder even then
                os.environ.setdefault(moved, folder)


def _takes_files(folder: Path) -> bool:
    """Return whether a folder can be written to or created."""
    existing = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)
    return folder.is_absolute() and existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
