"""The provenance of results: versions, the commit and the hardware."""

import functools
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bqnn.text import short

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchmetrics", "hydra-core")


@dataclass(frozen=True)
class Provenance:
    """The machine and the software of a Job.

    Args:
        host: The name of the machine.
        versions: See `versions`.
        cpu_capability: The CPU features that torch detects; None if torch is not imported.
        cpu_vnni: Whether the CPU has VNNI, and thus multiplies 8-bit integers without saturation;
            None if torch is not imported.
        gpu: The name of the GPU; None if none is used.
        git_commit: See `git_commit`.
    """

    host: str
    versions: dict[str, str]
    cpu_capability: str | None
    cpu_vnni: bool | None
    gpu: str | None
    git_commit: str | None

    @classmethod
    def of_this_process(cls) -> "Provenance":
        """Return the provenance of this process as it is now."""
        # Query torch only if it is imported already: the import takes seconds.
        torch = sys.modules.get("torch")
        if torch is None:
            cpu_capability = cpu_vnni = gpu = None
        else:
            cpu_capability = torch.backends.cpu.get_cpu_capability()
            cpu_vnni = torch.cpu._is_vnni_supported()
            gpu = torch.cuda.get_device_name() if torch.cuda.is_initialized() else None
        return cls(socket.gethostname(), versions(), cpu_capability, cpu_vnni, gpu, git_commit())


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of bqnn, Python and the packages that affect results, by name."""
    installed = {package: _version(package) for package in ("bqnn", *PACKAGES)}
    return {**installed, "python": platform.python_version()}


@functools.cache
def git_commit() -> str | None:
    """Return the commit of the code, or None without a checkout or git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed package may be inside another repository
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def changes_since(earlier_versions: Mapping[str, object], earlier_commit: str | None) -> str:
    """Describe the versions that differ from those of the earlier process of a Run.

    Args:
        earlier_versions: The recorded versions, by name. Missing ones are ignored.
        earlier_commit: The recorded commit, or None if it is unknown.

    Returns:
        The differences in words; empty if there are none.

    Examples:
        >>> changes_since({**versions(), "torch": "1.0"}, None)  # doctest: +ELLIPSIS
        "torch ... instead of '1.0'"
    """
    before = {**earlier_versions, "commit": earlier_commit}
    now = {**versions(), "commit": git_commit()}
    return ", ".join(
        f"{name} {now[name] or 'unknown'} instead of {short(before[name])}"
        for name in now
        if before.get(name) not in (None, now[name])
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a script may run from a checkout that is not installed
        return "not installed"
