"""Read and change a status.json, as other programs may."""

import json
from pathlib import Path
from typing import Any


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


def change_status(folder: Path, **changes: object) -> None:
    (folder / "status.json").write_text(json.dumps({**status(folder), **changes}))
