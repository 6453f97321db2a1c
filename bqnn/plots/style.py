"""The style of figures, and atomic writes of their files.

Matplotlib is imported when the first figure is drawn, and without pyplot, which needs a backend and
global state. The colours are those of Okabe and Ito, which people with colour blindness can
distinguish.
"""

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bqnn.files import written_beside

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from matplotlib.typing import RcKeyType

BLUE, ORANGE, VERMILION = "#0072B2", "#E69F00", "#D55E00"
COLORS = (BLUE, VERMILION, "#009E73", ORANGE, "#CC79A7", "#56B4E9")
LONGEST_LABEL, LONGEST_TICK = 60, 24  # characters of a label, and of a tick label
INK, GREY = "#222222", "#8A8A8A"


def save(figure: "Figure", path: str | Path) -> Path:
    """Write a figure atomically.

    Args:
        figure: The figure. Long texts in it are shortened.
        path: The file, whose suffix is the format. Its folder is created if necessary.

    Returns:
        The path.

    Raises:
        OSError: The file cannot be written. An existing file is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _spell_out(figure)
    with written_beside(path) as beside:
        figure.savefig(beside, format=path.suffix.removeprefix("."), dpi=160)
    return path


def save_small(figure: "Figure", path: Path) -> Path:
    """Write a figure atomically as a PNG of at most 256 colours, a third of the size of `save`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    _spell_out(figure)
    figure.set_dpi(160)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # once; savefig draws twice, the first time for the layout alone
    image = Image.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba()))
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as beside:
        palette = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        palette.save(beside, format="png", optimize=True)
    return path


def style() -> AbstractContextManager[None]:
    """Return a context that applies the style to everything that is drawn in it."""
    # Silence Matplotlib's warnings about a home folder that is read-only.
    logger = logging.getLogger("matplotlib")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.ERROR)
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def new_figure(width: float, height: float) -> "Figure":
    """Create an empty figure. The sizes are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def legend_name(name: str) -> str:
    """Return a label that legends show. Matplotlib hides labels that start with an underscore."""
    return f" {name}" if name.startswith("_") else name


def plain_labels(axis: "Axis", minor: str = "") -> None:
    """Label a logarithmic axis with plain numbers.

    The default labels of Matplotlib are mathematical text, which this style disables.

    Args:
        axis: The axis.
        minor: The format of labels between powers of ten; empty for no labels.
    """
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(minor)


def _spell_out(figure: "Figure") -> None:
    """Shorten long texts of a figure in the middle, and escape characters without a glyph."""
    from matplotlib.text import Text
    from matplotlib.ticker import FixedLocator

    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_locator(), FixedLocator):
                ticks = axis.get_ticklabels()  # recreated at each drawing
                names = [_drawable(tick.get_text(), tick, LONGEST_TICK) for tick in ticks]
                if names != [tick.get_text() for tick in ticks]:
                    axis.set_ticklabels(names)
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_text(_drawable(text.get_text(), text, LONGEST_LABEL))


def _drawable(text: str, like: "Text", longest: int) -> str:
    from matplotlib.font_manager import findfont, get_font

    if len(text) > longest:
        text = f"{text[: longest - 15]}...{text[-12:]}"
    if text.isascii():
        return text
    font = get_font(findfont(like.get_fontproperties()))
    return "".join(
        character
        if character.isspace() or font.get_char_index(ord(character))
        else character.encode("unicode_escape").decode()
        for character in text
    )


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
    "text.parse_math": False,  # names may contain dollar signs
    "xtick.color": INK,
    "ytick.color": INK,
}
