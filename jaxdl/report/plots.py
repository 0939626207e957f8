"""Pictures of a run: curves over the steps, predictions, weights; and, from `outcomes`, of what a classifier does."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxdl.report.canvas import ALARM, COLORS, GREY, PlotError, make_axes, save_png, style
from jaxdl.report.history import series
from jaxdl.report.outcomes import calibration_error, plot_calibration, plot_confusion, plot_examples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "PlotError",
    "calibration_error",
    "curve_panels",
    "plot_calibration",
    "plot_confusion",
    "plot_curves",
    "plot_examples",
    "plot_histogram",
    "plot_predictions",
    "save_png",
]

_DATA = ("train", "eval", "val", "valid", "validation", "dev", "test")
_FIRST, _LAST = ("loss",), ("learning_rate", "grad_norm")
_N_SMOOTHED = 120  # a curve of more points is drawn faint under its moving average
_LOG_SPAN = 30.0  # positive values that span more than this go on a logarithmic axis


def plot_curves(history: Sequence[Mapping[str, Any]], *, names: Sequence[str] | None = None) -> "Figure":
    """One panel for each quantity over the steps, its training and evaluation curves together.

    A name's first part is the data if it is `train`, `eval`, `val`, `valid`, `validation`, `dev` or `test`, and the
    rest the quantity: `loss` and `train/loss` are the training curve, `eval/loss` the evaluation curve of the same
    panel. Where a value is not finite a red line says so; the last panels are the learning rate and gradient norm.

    Args:
      history: rows as `read_history` gives them.
      names: the quantities to draw, in order (`["loss", "accuracy"]`); all if `None`.

    Raises:
      PlotError: the history has none of the names.

    Example:
      >>> figure = plot_curves([{"step": 1, "loss": 2.0, "eval/loss": 2.1}, {"step": 2, "loss": 1.0}])
      >>> [axes.get_title("left") for axes in figure.axes]
      ['loss']
    """
    panels = curve_panels(history)
    if names is not None:
        panels = {name: panels[name] for name in names if name in panels}
    if not panels:
        raise PlotError(f"nothing to draw: the history has no values of {list(names or [])}; log some first.")
    n_columns = min(2, len(panels))
    n_rows = -(-len(panels) // n_columns)
    with style():
        figure, grid = make_axes(n_rows, n_columns, width=5.4 * n_columns, height=2.9 * n_rows)
        for axes, (quantity, curves) in zip(grid, panels.items(), strict=False):
            _panel(axes, quantity, curves, history)
        for axes in grid[len(panels) :]:
            axes.remove()
    return figure


def curve_panels(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """The quantities of a history and their curves, in the order in which they are drawn.

    Returns:
      quantity -> (data -> full name).

    Example:
      >>> curve_panels([{"step": 1, "grad_norm": 1.0, "eval/loss": 2.0, "loss": 1.0}])
      {'loss': {'train': 'loss', 'eval': 'eval/loss'}, 'grad_norm': {'train': 'grad_norm'}}
    """
    found: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(name for row in history for name in row if name != "step"):
        data, _, quantity = name.partition("/")
        if data not in _DATA or not quantity:
            data, quantity = "train", name
        found.setdefault(quantity, {})[data] = name
    order = sorted(
        found, key=lambda name: (name not in _FIRST, name in _LAST, _LAST.index(name) if name in _LAST else 0)
    )
    return {name: dict(sorted(found[name].items(), key=lambda item: item[0] != "train")) for name in order}


def _panel(axes: "Axes", quantity: str, curves: Mapping[str, str], history: Sequence[Mapping[str, Any]]) -> None:
    finite_values, broken_steps = [], []
    for i, (data, name) in enumerate(curves.items()):
        steps, values = series(history, name)
        is_finite = np.isfinite(values)
        broken_steps += list(steps[~is_finite][:1])
        finite_values.append(values[is_finite])
        _curve(axes, steps[is_finite], values[is_finite], COLORS[i % len(COLORS)], data)
    everything = np.concatenate(finite_values)
    if everything.size and everything.min() > 0 and everything.max() / everything.min() > _LOG_SPAN:
        axes.set_yscale("log")
    if broken_steps:
        axes.axvline(
            min(broken_steps), color=ALARM, linestyle="--", linewidth=1.2, label=f"not finite: {min(broken_steps)}"
        )
    axes.set_title(quantity.replace("_", " "))
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}" if float(x).is_integer() else "")
    if len(curves) > 1 or broken_steps or "train" not in curves:
        axes.legend(loc="best")


def _curve(axes: "Axes", steps: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    if len(values) > _N_SMOOTHED:
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.28)
        values = _moving_average(values, len(values) // 40)
    marker = "o" if len(values) <= 25 else ""
    axes.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=3.5, label=label)


def _moving_average(values: np.ndarray, n_side: int) -> np.ndarray:
    """Means over the `2 * n_side + 1` neighbours, over fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    low, high = np.maximum(place - n_side, 0), np.minimum(place + n_side + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def plot_predictions(true: np.ndarray, predicted: np.ndarray) -> "Figure":
    """Regression: predicted against true, with the diagonal, the RMSE and R².

    Args:
      true: `(N,)` or `(N, T)` targets.
      predicted: the same shape.

    Raises:
      PlotError: the shapes differ or there are no values.

    Example:
      >>> plot_predictions(np.array([0.0, 2.0]), np.array([0.0, 1.0])).axes[0].get_title("left")
      'RMSE 0.7071, R² 0.500'
    """
    x, y = np.asarray(true, np.float64), np.asarray(predicted, np.float64)
    if x.shape != y.shape or not x.size:
        raise PlotError(f"true has shape {x.shape} and predicted {y.shape}; they must be equal and not empty.")
    x, y = x.ravel(), y.ravel()
    with style():
        figure, (axes,) = make_axes(1, 1, width=4.8, height=4.6)
        span = [np.nanmin([x, y]), np.nanmax([x, y])]
        axes.plot(span, span, color=GREY, linestyle="--", linewidth=1)
        axes.scatter(x, y, s=14, color=COLORS[0], alpha=float(np.clip(40 / np.sqrt(len(x)), 0.1, 0.8)), linewidths=0)
        spread = np.sum((x - x.mean()) ** 2)
        fit = f", R² {1 - np.sum((x - y) ** 2) / spread:.3f}" if spread > 0 else ""
        axes.set(xlabel="true", ylabel="predicted", title=f"RMSE {np.sqrt(np.mean((x - y) ** 2)):.4g}{fit}")
    return figure


def plot_histogram(values: np.ndarray, *, name: str = "weight", n_bins: int = 60) -> "Figure":
    """How the values of one array are spread, with their number, mean and standard deviation.

    Args:
      values: an array of any shape; values that are not finite are counted in the title and left out.
      name: the label of the axis.
      n_bins: bars.

    Example:
      >>> plot_histogram(np.zeros((3, 4)), name="dense/kernel").axes[0].get_title("left")
      '12 values, mean 0, std 0'
    """
    flat = np.asarray(values, np.float64).ravel()
    finite = flat[np.isfinite(flat)]
    mean, std = (finite.mean(), finite.std()) if finite.size else (np.nan, np.nan)
    broken = f", {flat.size - finite.size:,} not finite" if finite.size < flat.size else ""
    with style():
        figure, (axes,) = make_axes(1, 1, width=5.4, height=2.9)
        axes.hist(finite, bins=n_bins, color=COLORS[0])
        axes.set(xlabel=name, ylabel="values", title=f"{flat.size:,} values, mean {mean:.3g}, std {std:.3g}{broken}")
    return figure
