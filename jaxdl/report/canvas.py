"""The house style of figures: colours, fonts, layout, and saving.

Figures are made without pyplot, so that there is no window, no global list of figures and nothing to close.
"""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from jaxdl.errors import JaxdlError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#4269d0", "#ff725c", "#3ca951", "#a463f2", "#efb118", "#6cc5b0", "#ff8ab7", "#9c6b4e")
INK, GREY, FAINT, ALARM = "#333a45", "#8a93a1", "#d7dbe2", "#c0392b"

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


class PlotError(JaxdlError):
    """An array that does not have the shape of what it is said to be."""


def style() -> AbstractContextManager[None]:
    """The house style, for the length of a `with` block around everything that draws.

    Example:
      >>> import matplotlib as mpl
      >>> with style():
      ...     mpl.rcParams["axes.spines.top"]
      False
    """
    import matplotlib as mpl

    return mpl.rc_context(_STYLE)


def make_axes(n_rows: int, n_columns: int, *, width: float, height: float, **grid: Any) -> "tuple[Figure, list[Axes]]":
    """A figure on an Agg canvas and its axes in reading order.

    Args:
      n_rows: rows of axes.
      n_columns: columns of axes.
      width: of the figure, in inches.
      height: of the figure, in inches.
      grid: further keywords of `Figure.subplots`.

    Example:
      >>> figure, axes = make_axes(2, 3, width=9, height=4)
      >>> len(axes)
      6
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(n_rows, n_columns, squeeze=False, **grid).ravel())


def save_png(figure: "Figure", target: str | os.PathLike[str] | IO[bytes], *, transparent: bool = False) -> None:
    """Writes a figure at 144 dots an inch; the bytes depend on the figure alone.

    Args:
      figure: any matplotlib figure.
      target: a path, whose folders are made, or a binary file.
      transparent: leave the background out, for a page that brings its own.

    Example:
      >>> import io
      >>> file = io.BytesIO()
      >>> save_png(make_axes(1, 1, width=2, height=1)[0], file)
      >>> file.getvalue()[1:4]
      b'PNG'
    """
    if isinstance(target, (str, os.PathLike)):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(
        target, format="png", dpi=144, facecolor="none" if transparent else "white", metadata={"Software": None}
    )
