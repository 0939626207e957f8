"""What a classifier does, as pictures: confusion, calibration, the most wrong examples."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxdl.report.canvas import COLORS, GREY, INK, PlotError, make_axes, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_N_CONFUSED = 6
_N_NUMBERED = 20  # a confusion matrix of more classes has colours only


class Mistake(NamedTuple):
    """One wrongly classified example.

    Attributes:
      image: `(H, W)`, `(H, W, 1)` or `(H, W, 3)`, floats or uint8.
      true: the name of its class.
      predicted: the name of the class it was taken for.
      probability: what the model gave the predicted class.
      row: where to find it in the data set.

    Example:
      >>> Mistake(np.zeros((8, 8)), "3", "8", 0.97).predicted
      '8'
    """

    image: np.ndarray
    true: str
    predicted: str
    probability: float
    row: int | None = None


def plot_confusion(confusion: np.ndarray, names: Sequence[str] | None = None) -> "Figure":
    """How often each true class was called what. Colours are shares of the true class, numbers are counts.

    Args:
      confusion: `(C, C)` counts, rows = true, columns = predicted.
      names: the C classes; their numbers if `None`. Beyond 20 classes there are no counts, beyond 50 only some names.

    Raises:
      PlotError: the matrix is not square, or the names are not C.

    Example:
      >>> plot_confusion(np.array([[9, 1], [0, 10]]), ["cat", "dog"]).axes[0].get_ylabel()
      'true'
    """
    counts, labels = checked_confusion(confusion, names)
    from matplotlib.colors import PowerNorm

    n = len(labels)
    side = min(11.0, 2.0 + 0.34 * n)
    with style():
        figure, (axes,) = make_axes(1, 1, width=side + 0.6, height=side)
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        norm = PowerNorm(0.5, vmin=0, vmax=1)  # so that a few mistakes in a hundred can be seen
        image = axes.imshow(share, cmap="Blues", norm=norm, interpolation="nearest")
        ticks = np.arange(0, n, 1 if n <= 50 else -(-n // 50))
        is_wide = max(map(len, labels)) > 3 or n > 25
        shown, size = [_short(labels[i]) for i in ticks], 9 if n <= 30 else 7
        axes.set_xticks(ticks, shown, rotation=90 if is_wide else 0, fontsize=size)
        axes.set_yticks(ticks, shown, fontsize=size)
        axes.set(xlabel="predicted", ylabel="true", title=f"{int(counts.sum()):,} examples")
        axes.grid(False)
        if n <= _N_NUMBERED:
            _number_cells(axes, counts, share)
        bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=30, label="share of the true class")
        bar.outline.set_visible(False)
    return figure


def _short(label: str) -> str:
    return label if len(label) <= 18 else label[:17] + "…"


def _number_cells(axes: "Axes", counts: np.ndarray, share: np.ndarray) -> None:
    size = 9.5 if len(counts) <= 12 else 7
    for row, column in zip(*np.nonzero(counts), strict=True):
        ink = "white" if share[row, column] > 0.35 else INK
        axes.text(column, row, f"{int(counts[row, column]):,}", ha="center", va="center", color=ink, fontsize=size)


def checked_confusion(confusion: np.ndarray, names: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
    """The matrix and one name for each of its classes, or a `PlotError` that says what does not fit.

    Example:
      >>> checked_confusion(np.eye(2, dtype=int), None)[1]
      ['0', '1']
    """
    counts = np.asarray(confusion)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise PlotError(f"confusion has shape {counts.shape}; it must be (C, C), rows = true, columns = predicted.")
    labels = [str(name) for name in (range(len(counts)) if names is None else names)]
    if len(labels) != len(counts):
        raise PlotError(f"{len(labels)} class names for a confusion matrix of {len(counts)} classes; give one each.")
    return counts, labels


def class_rows(confusion: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and the number of examples of each class; a share of nothing is `None`.

    Args:
      confusion: `(C, C)` counts, rows = true, columns = predicted.
      names: the C classes.

    Example:
      >>> class_rows(np.array([[8, 2], [0, 10]]), ["cat", "dog"])[0]
      {'class': 'cat', 'precision': '1.000', 'recall': '0.800', 'F1': '0.889', 'examples': 10}
    """
    hits, true, said = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)

    def share(part: float, whole: float) -> str | None:
        return f"{part / whole:.3f}" if whole else None

    return [
        {
            "class": name,
            "precision": share(hits[i], said[i]),
            "recall": share(hits[i], true[i]),
            "F1": share(2 * hits[i], said[i] + true[i]),
            "examples": int(true[i]),
        }
        for i, name in enumerate(names)
    ]


def most_confused(confusion: np.ndarray, names: Sequence[str]) -> list[str]:
    """The six largest counts off the diagonal, in words.

    Example:
      >>> most_confused(np.array([[8, 2], [0, 10]]), ["cat", "dog"])
      ['cat taken for dog: 2 of 10']
    """
    wrong = confusion - np.diag(np.diag(confusion))
    cells = [np.unravel_index(i, wrong.shape) for i in np.argsort(-wrong, axis=None, kind="stable")[:_N_CONFUSED]]
    return [
        f"{names[row]} taken for {names[column]}: {int(wrong[row, column]):,} of {int(confusion[row].sum()):,}"
        for row, column in cells
        if wrong[row, column] > 0
    ]


def plot_calibration(counts: np.ndarray, confidence: np.ndarray, correct: np.ndarray) -> "Figure":
    """Reliability diagram: how often the model was right where it was that sure.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", figure 1 and equation 3.

    Args:
      counts: `(B,)` examples in each confidence bin.
      confidence: `(B,)` sums of the predicted probability in each bin.
      correct: `(B,)` right predictions in each bin.

    Raises:
      PlotError: the three are not vectors of one length.

    Example:
      >>> figure = plot_calibration(np.array([0, 10]), np.array([0.0, 9.0]), np.array([0, 7]))
      >>> figure.axes[0].get_title("left")
      'ECE 0.200'
    """
    counts, sure, right = _bins(counts, confidence, correct)
    ece = calibration_error(counts, sure * counts, right * counts)
    with style():
        figure, (top, bottom) = make_axes(2, 1, width=4.8, height=5.4, sharex=True, height_ratios=[3, 1])
        used, n_bins = counts > 0, len(counts)
        edges = np.arange(n_bins) / n_bins
        top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfect")
        bars: dict[str, Any] = {"width": 1 / n_bins, "align": "edge", "color": COLORS[0], "edgecolor": "white"}
        top.bar(edges[used], right[used], label="accuracy", **bars)
        top.scatter(sure[used], right[used], color=INK, s=14, zorder=3, label="mean confidence")
        top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy", title=f"ECE {ece:.3f}")
        top.legend(loc="upper left")
        bottom.bar(edges, counts, alpha=0.45, **bars)
        bottom.set(xlabel="confidence", ylabel="examples")
    return figure


def calibration_error(counts: np.ndarray, confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error: sum over bins of `n_b / N * |accuracy_b - confidence_b|`; 0 without examples.

    Source: Guo et al. 2017, equation 3. Arguments as `plot_calibration`.

    Example:
      >>> calibration_error(np.array([10, 30]), np.array([5.0, 30.0]), np.array([10, 15]))
      0.5
    """
    counts, sure, right = _bins(counts, confidence, correct)
    return float(np.sum(counts * np.abs(right - sure)) / max(counts.sum(), 1))


def _bins(counts: np.ndarray, confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, mean confidence and accuracy of each bin, zero where a bin is empty."""
    arrays = [np.asarray(array, np.float64) for array in (counts, confidence, correct)]
    if arrays[0].ndim != 1 or len({array.shape for array in arrays}) != 1:
        shapes = [array.shape for array in arrays]
        raise PlotError(f"calibration has shapes {shapes}; counts, confidence and correct must be (B,) each.")
    n = np.maximum(arrays[0], 1)
    return arrays[0], arrays[1] / n, arrays[2] / n


def plot_examples(mistakes: Sequence[Mistake], *, n_columns: int = 6) -> "Figure":
    """A grid of pictures with what they are, what they were taken for and how sure the model was.

    Args:
      mistakes: the examples, the worst first.
      n_columns: pictures in a row.

    Raises:
      PlotError: there are none, or one is not a grey or RGB picture.

    Example:
      >>> figure = plot_examples([Mistake(np.zeros((8, 8)), "3", "8", 0.97)])
      >>> figure.axes[0].get_title()
      '3 taken for 8\\n97%'
    """
    if not mistakes:
        raise PlotError("there are no examples to draw; leave the plot out.")
    n_columns = min(n_columns, len(mistakes))
    n_rows = -(-len(mistakes) // n_columns)
    with style():
        figure, grid = make_axes(n_rows, n_columns, width=1.7 * n_columns, height=2.15 * n_rows)
        for axes, mistake in zip(grid, mistakes, strict=False):
            axes.imshow(to_pixels(mistake.image), interpolation="nearest")
            title = f"{mistake.true} taken for {mistake.predicted}\n{mistake.probability:.0%}"
            axes.set_title(title, fontsize=9, fontweight="normal", loc="center")
        for axes in grid:
            axes.set_axis_off()
    return figure


def to_pixels(image: np.ndarray) -> np.ndarray:
    """A picture of any range as `(H, W, 3)` uint8.

    Args:
      image: `(H, W)`, `(H, W, 1)` or `(H, W, 3)`. uint8 stays as it is; floats within [0, 1] are taken for shares of
        white; any other range (normalised pictures) is stretched from its least to its greatest finite value.

    Raises:
      PlotError: another shape.

    Example:
      >>> to_pixels(np.array([[0.0, 1.0]]))[0].tolist()
      [[0, 0, 0], [255, 255, 255]]
    """
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3) or not pixels.size:
        raise PlotError(f"an example has shape {np.shape(image)}; a picture is (H, W), (H, W, 1) or (H, W, 3).")
    if pixels.dtype != np.uint8:
        pixels = np.nan_to_num(pixels.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        low, high = min(0.0, pixels.min()), max(1.0, pixels.max())
        if low < 0 or high > 1:
            low, high = pixels.min(), pixels.max()
        pixels = np.rint(255 * (pixels - low) / max(high - low, 1e-12)).astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)) if pixels.shape[-1] == 1 else pixels


def worst_rows(logits: np.ndarray, labels: np.ndarray, n: int) -> list[tuple[int, int, float]]:
    """The rows that a classifier is wrong about with the most confidence, most confident first.

    Args:
      logits: (B, C) float.
      labels: (B,) int.
      n: how many at the most.

    Returns:
      `(row, predicted class, its probability)` triples.

    Example:
      >>> worst_rows(np.array([[2.0, 0.0], [0.0, 9.0], [5.0, 0.0]]), np.array([1, 1, 1]), 5)[0][:2]
      (2, 0)
    """
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    probability = (shifted / shifted.sum(1, keepdims=True)).max(1)
    predicted = logits.argmax(1)
    wrong = np.flatnonzero(predicted != labels)
    order = wrong[np.argsort(-probability[wrong], kind="stable")][:n]
    return [(int(row), int(predicted[row]), float(probability[row])) for row in order]
