"""Generate docs/configuration.md: every key with its default, accepted values and meaning.

python -m bqnn.settings.reference > docs/configuration.md
"""

import re
from collections.abc import Iterator
from pathlib import Path

from bqnn.settings.conf import CONF
from bqnn.settings.options import TABLES

HEAD = """# Configuration

Every key of the configuration with its default, the values that it accepts, and its meaning.
`python train.py --cfg job` prints the configuration of a job. Defaults and meanings come from the
files in `conf/`, accepted values from `bqnn/settings/options.py`.
`python -m bqnn.settings.reference > docs/configuration.md` makes this page.
"""
NOT_DEFAULTS = ("hydra", "tuned", "bits", "experiment")  # folders of conf/ that override others
LINE = re.compile(
    r"^(?P<indent> *)(?P<key>[a-z_0-9]+):(?: (?P<value>[^#]*?))? *(?:# (?P<meaning>.*))?$"
)


def reference() -> str:
    """Return the page in Markdown."""
    defaults: dict[str, dict[str, list[str]]] = {}
    meanings: dict[str, str] = {}
    for file, key, value, meaning in _entries():
        defaults.setdefault(key, {}).setdefault(value, []).append(file)
        if meaning:
            meanings.setdefault(key, meaning)
    lines = [HEAD]
    for group, table in TABLES.items():
        lines.append(f"## {f'`{group}`' if group else 'Jobs'}\n")
        lines.append("| key | default | accepted | meaning |\n|---|---|---|---|")
        for name, rule in table.items():
            key = f"{group}.{name}".lstrip(".")
            cells = (f"`{key}`", _default(defaults.get(key, {})), rule.words, meanings.get(key, ""))
            lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def _entries() -> Iterator[tuple[str, str, str, str]]:
    """Yield file, key, value and comment of every line with a value in conf/."""
    for path in sorted(CONF.rglob("*.yaml")):
        folder = path.relative_to(CONF).parts[0] if path.parent != CONF else ""
        if folder not in NOT_DEFAULTS:
            yield from _entries_of(path, folder)


def _entries_of(path: Path, folder: str) -> Iterator[tuple[str, str, str, str]]:
    above: list[str] = []  # the parent keys of a line, from its indent
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := LINE.match(line):
            above = [*above[: len(match["indent"]) // 2], match["key"]]
            if match["value"]:
                key = ".".join(filter(None, [folder, *above]))
                yield path.stem, key, match["value"], match["meaning"] or ""


def _default(values: dict[str, list[str]]) -> str:
    """Format the default, or each default with its files if there are several."""
    shown = {value: "none: required" if value == "???" else f"`{value}`" for value in values}
    if len(values) <= 1:
        return "".join(shown.values())
    return "; ".join(f"{shown[value]} ({', '.join(files)})" for value, files in values.items())


if __name__ == "__main__":
    print(reference(), end="")
