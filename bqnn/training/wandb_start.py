"""Start a run of Weights & Biases, offline where there is no network, key or home folder."""

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

ANSWER_SECONDS = 5.0  # in which a server has to answer
RETRY_SECONDS = 900.0  # until one that did not is asked again, by a later job of the process
# W&B's settings, unless the environment has them (WANDB_INIT_TIMEOUT, WANDB_FINISH_TIMEOUT).
INIT_SECONDS = 30.0
FINISH_SECONDS = 60.0
FINISH_SECONDS_WITH_ARTIFACTS = 300.0

_asked_again_at: dict[str, float] = {}  # of servers that failed


def start_run(folder: Path, has_artifacts: bool, **options: Any) -> "wandb.Run":
    """Start a run that keeps its files in `folder`, online where that works and else offline.

    A mode in the environment (WANDB_MODE) is the user's word. Without one the run is offline, and
    the log says why in one line, where the server does not answer in a few seconds, or does not
    take the key. It is quietly offline where there is no key.

    Args:
        folder: The job's.
        has_artifacts: Whether large files will be uploaded, which may take longer at the end.
        options: For `wandb.init`.
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
    known = wandb.Settings.model_fields  # an older W&B lacks some
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
        except Exception as error:  # of its own kinds, of its service's, and of what it imports
            why = one_line(str(error)).partition(" Consider increasing")[0] or type(error).__name__
            end_service()  # else the run would count as one that is in use
    _asked_again_at[server] = time.monotonic() + RETRY_SECONDS
    log.warning(
        "Weights & Biases at %s: %s; runs are kept offline, to be uploaded with wandb "
        "sync; with WANDB_MODE=offline or logger=none nothing is asked",
        *(server, why),
    )
    return init_again(mode="offline")


def end_service() -> None:
    """End W&B's process, whatever state it is in; the next run starts another one."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):  # that it is dead is known
        wandb.teardown()


def _why_silent(server: str) -> str | None:
    """What keeps a server from answering, or None."""
    found: list[str | None] = [f"no answer in {ANSWER_SECONDS:g} s"]

    def ask() -> None:
        found[0] = _ask(server)

    # In a thread, because looking up a name takes as long as it takes.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return found[0]


def _ask(server: str) -> str | None:
    try:
        with urlopen(server, timeout=ANSWER_SECONDS):
            return None
    except HTTPError as error:  # it need not have such a page, but it has answered
        return f"it answers {error.code}" if error.code >= 500 else None
    except URLError as error:
        # W&B has certificates of its own.
        is_there = isinstance(error.reason, ssl.SSLError)
        return None if is_there else f"no connection ({one_line(str(error.reason))})"
    except (OSError, ValueError) as error:
        return f"no connection ({one_line(str(error))})"


def _has_key(settings: Any) -> bool:
    """Whether a key is at hand; without one W&B would stop and ask."""
    if settings.api_key or getattr(settings, "identity_token_file", None):
        return True
    hosts = [urlsplit(settings.base_url).netloc]
    if settings.base_url == type(settings)().base_url:
        hosts.append("api.wandb.ai")  # where the key is for, from before the address was another
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
        return any(known.authenticators(host) for host in hosts)
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


def _find_folders(instead: Path, environment: Mapping[str, str] = os.environ) -> None:
    """Where the home folder takes no files, have W&B keep its own ones below `instead`.

    They stay there for later jobs of the process, since W&B looks at its environment once.
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
            if not os.path.isabs(os.path.expanduser("~")):  # W&B asks for a home even so
                os.environ.setdefault(moved, folder)


def _takes_files(folder: Path) -> bool:
    """Whether a folder can be written to, or made."""
    existing = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)
    return folder.is_absolute() and existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
