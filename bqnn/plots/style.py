"""How figures look and are written: colours, line widths, and files that are whole or not there.

Matplotlib is imported when a figure is drawn, without pyplot: no backend, no global state.
Colours are those of Okabe and Ito, apart for every eye.
"""

import io
import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bqnn.files import written_beside

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

BLUE, ORANGE, VERMILION = "#0072B2", "#E69F00", "#D55E00"
COLORS = (BLUE, VERMILION, "#009E73", ORANGE, "#CC79A7", "#56B4E9")
INK, GREY = "#222222", "#8A8A8A"


def save(figure: "Figure", path: str | Path) -> Path:
    """Write the figure in the format of the path's suffix, whole or not at all; returns the path.

    It is written beside and renamed: if drawing fails, an older file stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as beside:
        figure.savefig(beside, format=path.suffix.removeprefix("."), dpi=160)
    return path


def save_small(figure: "Figure", path: Path) -> Path:
    """As `save`, a PNG of at most 256 colours: a third of the size, for pages and repositories."""
    from PIL import Image

    full = io.BytesIO()
    figure.savefig(full, format="png", dpi=160)
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(full) as image, written_beside(path) as beside:
        palette = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        palette.save(beside, format="png", optimize=True)
    return path


def style() -> AbstractContextManager[None]:
    """A context in which what is drawn gets this look."""
    # What it remarks on a home without room for its caches concerns no figure.
    logger = logging.getLogger("matplotlib")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.ERROR)
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure; sizes are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def plain_labels(axis: "Axis", minor: str = "") -> None:
    """Label a logarithmic axis in plain numbers.

    Matplotlib's own labels are mathematical text, which is off in this style. `minor` is the format
    of the labels between powers of ten, none by default.
    """
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(minor)


_STYLE: "dict[RcKeyType, Any]" = {
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.color": "#E9E9E9",
    "grid.linewidth": 0.7,
    "hatch.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "text.color": INK,
    "text.parse_math": False,  # names may hold dollar signs
    "xtick.color": INK,
    "ytick.color": INK,
}
