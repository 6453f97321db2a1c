"""Write the status.json of a Job, and read that of a Run."""

import os
import uuid
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from bqnn.files import write_json
from bqnn.jobs.identity import config_hash, input_digest
from bqnn.jobs.provenance import Provenance
from bqnn.jobs.records import instant, read_record
from bqnn.jobs.terminal import say_once
from bqnn.text import printable, short, valid_name

STATES = ("RUNNING", "DONE", "FAILED", "INTERRUPTED")
LONG_AGO = datetime.min.replace(tzinfo=UTC)  # orders Runs of unknown start before all others

T = TypeVar("T")


@dataclass
class JobStatus:
    """The status of a Job in this process, as written to status.json.

    Args:
        state: One of `STATES`.
        error: Why the Job is not done, in one line, or None.
        start: The local time of the start, with its UTC offset.
        id: The name of the Run in Weights & Biases. It is unchanged when the Job is resumed.
        config_hash: The hash of the first configuration, which identifies the Run, or None.
        input_sha256: The SHA-256 of the checkpoint that the Job starts from, or None.
        resumed_from_epoch: The first epoch of a resumed training, from 0, or None.
        parts: The names of the folders of the parts.
    """

    state: str = "RUNNING"
    error: str | None = None
    start: datetime = field(default_factory=lambda: datetime.now().astimezone())
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    config_hash: str | None = None
    input_sha256: str | None = None
    resumed_from_epoch: int | None = None
    parts: list[str] = field(default_factory=list)

    def identify(self, config: dict[str, Any]) -> None:
        """Set the hashes of the configuration, unless an earlier configuration has set them.

        Args:
            config: The resolved configuration.
        """
        if self.config_hash is None:
            self.config_hash, self.input_sha256 = config_hash(config), input_digest(config)

    def keep_id(self, earlier: "RunStatus | None") -> None:
        """Keep the id of an earlier process of the Job, if there is one and it is valid.

        Args:
            earlier: What that process recorded, or None.
        """
        if earlier is not None and earlier.id and earlier.id == valid_name(earlier.id):
            self.id = earlier.id

    def write(self, folder: Path) -> None:
        """Write status.json, with the provenance of this process.

        Args:
            folder: The folder of the Job.
        """
        ended = None if self.state == "RUNNING" else datetime.now().astimezone().isoformat()
        record: dict[str, Any] = {
            "state": self.state,
            "start": self.start.isoformat(),
            "end": ended,
            "error": self.error,
            "resumed_from_epoch": self.resumed_from_epoch,
            "id": self.id,
            "config_hash": self.config_hash,
            "input_sha256": self.input_sha256,
            **asdict(Provenance.of_this_process()),
        }
        if self.parts:
            record["parts"] = self.parts
        write_json(folder / "status.json", record)


@dataclass(frozen=True)
class RunStatus:
    """The status of a Run, as read from status.json. Another program may have written it.

    An entry that is missing or has another type has its default here.

    Args:
        state: One of `STATES`.
        error: Why the Run is not done, or None.
        start: The start in UTC, or None if it is unknown.
        end: The end in UTC, or None if it is unknown.
        id: The name of the Run in Weights & Biases; empty if it is unknown.
        config_hash: The hash of its configuration, or None if there was none yet.
        git_commit: The commit of the code, or None if it is unknown.
        versions: The versions of packages, by name.
        has_parts: Whether the Run has parts, one per checkpoint.
        is_unreadable: Whether the file cannot be read; `error` is the reason.
    """

    state: str
    error: str | None = None
    start: datetime | None = None
    end: datetime | None = None
    id: str = ""
    config_hash: str | None = None
    git_commit: str | None = None
    versions: dict[str, Any] = field(default_factory=dict)
    has_parts: bool = False
    is_unreadable: bool = False


def read_status(folder: Path) -> RunStatus | None:
    """Read the status.json of a Run.

    An unreadable file must not stop a search through many folders. It reads as a Run that FAILED,
    with the reason as its `error` and the hash of its config.yaml; the reason is printed once.

    Args:
        folder: The folder of the Run.

    Returns:
        The status, or None if there is no Run.
    """
    path = folder / "status.json"
    try:
        record = read_record(path)
        state = record.get("state")
        if state not in STATES:
            raise ValueError(f"status.json has the state {short(state)}")
    except FileNotFoundError:
        return None
    except ValueError as error:
        if not os.path.lexists(path):  # the path is not a folder
            return None
        tell_unreadable(folder, error)
        return RunStatus(
            "FAILED", str(error), config_hash=_hash_of_config(folder), is_unreadable=True
        )
    return RunStatus(
        state,
        error=_entry(record, "error", str),
        start=instant(record.get("start")),
        end=instant(record.get("end")),
        id=_entry(record, "id", str) or "",
        config_hash=_entry(record, "config_hash", str),
        git_commit=_entry(record, "git_commit", str),
        versions=_entry(record, "versions", dict) or {},
        has_parts=bool(_entry(record, "parts", list)),
    )


def tell_unreadable(folder: Path, error: ValueError) -> None:
    """Print once per process that a record cannot be read.

    Args:
        folder: The folder of the record.
        error: The reason.
    """
    say_once(printable(f"{folder}: {error}"))


def _entry(record: dict[str, Any], key: str, kind: type[T]) -> T | None:
    value = record.get(key)
    return value if isinstance(value, kind) else None


def _hash_of_config(folder: Path) -> str | None:
    try:
        return config_hash(read_record(folder / "config.yaml"))
    except (OSError, ValueError, TypeError, RecursionError):  # a date, or thousands of brackets
        return None
