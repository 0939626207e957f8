"""The report of a run: one HTML file that needs nothing else, and its plots as PNG files beside it."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxdl.parallel.processes import is_first
from jaxdl.report.diagnosis import Diagnosis
from jaxdl.report.markup import bullets, embed_figure, embed_picture, escape, fold, frame, html_table, tag
from jaxdl.report.outcomes import (
    Mistake,
    checked_confusion,
    class_rows,
    most_confused,
    plot_calibration,
    plot_confusion,
    plot_examples,
    to_pixels,
)
from jaxdl.report.plots import curve_panels, plot_curves, plot_predictions, save_png
from jaxdl.report.table import format_count, format_duration, n_parameters, parameter_columns, parameter_totals

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TONE = {"a good fit": "good", "diverging": "bad", "overfitting": "warn", "underfitting": "warn", "noisy": "warn"}
_N_OPEN = 20  # longer tables are folded
_N_BESIDE = 12  # a confusion matrix of more classes takes the page's width


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunReport:
    """What is known about a run. Whatever is left out has no section.

    Attributes:
      title: the name of the run.
      summary: a sentence under the title: the task, the command.
      metrics: final metrics, name -> number.
      steps: optimizer steps done.
      seconds: time the run took.
      steps_per_second: throughput.
      examples_per_second: throughput.
      diagnosis: what `diagnose` found.
      history: rows as `read_history` gives them.
      confusion: `(C, C)` counts, rows = true, columns = predicted.
      class_names: the C names; numbers if `None`.
      calibration: `(counts, confidence, correct)`, each `(B,)`, as `plot_calibration` takes them.
      mistakes: wrongly classified pictures, the worst first.
      predictions: `(true, predicted)` of a regression, each `(N,)` or `(N, T)`.
      parameters: rows as `parameter_table` takes them.
      config: name -> value; nested mappings are shown with dotted names.
      config_sources: dotted name -> where the value came from ("default", "config file", "command line").
      environment: name -> text, as `environment` gives it.
      checkpoints: rows of any columns (step, path, loss).
      tables: further sections, heading -> rows of any columns (metrics by group, suspicious labels).
      figures: further sections, heading -> matplotlib figure (attributions).

    Example:
      >>> RunReport(title="digits", metrics={"accuracy": 0.97}).steps is None
      True
    """

    title: str = "Training run"
    summary: str = ""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    steps: int | None = None
    seconds: float | None = None
    steps_per_second: float | None = None
    examples_per_second: float | None = None
    diagnosis: Diagnosis | None = None
    history: Sequence[Mapping[str, Any]] = ()
    confusion: np.ndarray | None = None
    class_names: Sequence[str] | None = None
    calibration: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    mistakes: Sequence[Mistake] = ()
    predictions: tuple[np.ndarray, np.ndarray] | None = None
    parameters: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config_sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    checkpoints: Sequence[Mapping[str, Any]] = ()
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    figures: "Mapping[str, Figure]" = dataclasses.field(default_factory=dict)


def write_report(path: str | os.PathLike[str], report: RunReport) -> Path:
    """Writes the page, and its plots as `plots/*.png` in the same folder.

    The page has no scripts and loads nothing: pictures and style are inside it. All text is escaped. The file appears
    whole or not at all. Of many processes the first one writes it.

    Args:
      path: the HTML file; its folders are made.
      report: what to show.

    Returns:
      The path of the page.

    Raises:
      PlotError: an array of the report does not have the shape it should.

    Example:
      >>> import tempfile
      >>> page = write_report(Path(tempfile.mkdtemp()) / "report.html", RunReport(title="<digits>", steps=100))
      >>> "&lt;digits&gt;" in page.read_text(encoding="utf-8")
      True
    """
    path = Path(path)
    if not is_first():
        return path
    plots = path.parent / "plots"
    sections = (_diagnosis, _curves, _predictions, _confusion, _calibration, _mistakes, _further, _parameters, _config)
    body = "\n".join([_headline(report), *(make(report, plots) for make in sections), _footing(report)])
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(frame(report.title, body), encoding="utf-8")
    return beside.replace(path)


def _section(heading: str, *content: str) -> str:
    return tag("section", tag("h2", escape(heading)), *content)


def _plot(figure: "Figure", file: Path, alt: str) -> str:
    save_png(figure, file)
    return embed_figure(figure, alt=alt)


def _headline(report: RunReport) -> str:
    tiles = [_tile(name, value) for name, value in report.metrics.items()]
    facts = {
        "steps": None if report.steps is None else f"{report.steps:,}",
        "time": None if report.seconds is None else format_duration(report.seconds),
        "steps/s": None if report.steps_per_second is None else f"{report.steps_per_second:.3g}",
        "examples/s": None if report.examples_per_second is None else format_count(report.examples_per_second),
        "parameters": format_count(sum(map(n_parameters, report.parameters))) if report.parameters else None,
    }
    shown = [tag("span", tag("b", escape(text)), " ", escape(name)) for name, text in facts.items() if text is not None]
    parts = [tag("h1", escape(report.title))]
    parts += [tag("p", escape(report.summary), class_="soft")] if report.summary else []
    parts += [tag("div", *tiles, class_="tiles")] if tiles else []
    parts += [tag("div", *shown, class_="facts")] if shown else []
    return tag("header", *parts)


def _tile(name: str, value: float) -> str:
    return tag("div", tag("b", escape(value)), tag("span", escape(name)), class_="tile")


def _diagnosis(report: RunReport, plots: Path) -> str:
    found = report.diagnosis
    if found is None:
        return ""
    verdict = tag("div", escape(found.verdict), class_=f"verdict {_TONE.get(found.verdict, '')}".strip())
    evidence = tag("div", tag("h3", "What the curves say"), bullets(found.evidence))
    advice = tag("div", tag("h3", "What to try"), bullets(found.suggestions))
    return _section("Diagnosis", verdict, tag("div", evidence, advice, class_="columns"))


def _curves(report: RunReport, plots: Path) -> str:
    panels = curve_panels(report.history)
    if not panels:
        return ""
    save_png(plot_curves(report.history), plots / "curves.png")
    images = [embed_figure(plot_curves(report.history, names=[name]), alt=f"{name} over the steps") for name in panels]
    return _section("Curves", tag("div", *images, class_="narrow" if len(images) == 1 else "columns"))


def _predictions(report: RunReport, plots: Path) -> str:
    if report.predictions is None:
        return ""
    image = _plot(plot_predictions(*report.predictions), plots / "predictions.png", "predicted against true values")
    return _section("Predicted and true", tag("div", image, class_="narrow"))


def _confusion(report: RunReport, plots: Path) -> str:
    if report.confusion is None:
        return ""
    counts, names = checked_confusion(report.confusion, report.class_names)
    image = _plot(
        plot_confusion(counts, names), plots / "confusion.png", "confusion matrix, rows true, columns predicted"
    )
    table = html_table(class_rows(counts, names), numbers=("precision", "recall", "F1"))
    if len(names) > _N_OPEN:
        table = fold(f"Precision, recall and F1 of {len(names)} classes", table)
    confused = most_confused(counts, names)
    list_ = tag("h3", "Most confused") + bullets(confused) if confused else ""
    layout = {"class_": "columns"} if len(names) <= _N_BESIDE else {}
    return _section("Confusion", tag("div", image, tag("div", table, list_), **layout))


def _calibration(report: RunReport, plots: Path) -> str:
    if report.calibration is None:
        return ""
    image = _plot(plot_calibration(*report.calibration), plots / "calibration.png", "reliability diagram")
    text = (
        "Where a bar stands below the diagonal the model is surer than it is right. ECE, the expected calibration "
        "error, is the mean distance between the two, weighted by the number of examples."
    )
    parts = tag("div", image, class_="narrow"), tag("p", escape(text), class_="soft")
    return _section("Calibration", tag("div", *parts, class_="columns"))


def _mistakes(report: RunReport, plots: Path) -> str:
    if not report.mistakes:
        return ""
    save_png(plot_examples(report.mistakes), plots / "mistakes.png")
    return _section("Most wrong", tag("div", *map(_mistake, report.mistakes), class_="pictures"))


def _mistake(mistake: Mistake) -> str:
    image = embed_picture(to_pixels(mistake.image), alt=f"{mistake.true} taken for {mistake.predicted}")
    row = "" if mistake.row is None else tag("span", escape(f"row {mistake.row}"), class_="soft")
    true, predicted = tag("b", escape(mistake.true)), tag("b", escape(mistake.predicted))
    says = f"{true} taken for {predicted}, {mistake.probability:.0%}<br>"
    return tag("figure", image, tag("figcaption", says, row))


def _further(report: RunReport, plots: Path) -> str:
    tables = [_section(heading, html_table(rows)) for heading, rows in report.tables.items() if rows]
    figures = []
    for i, (heading, figure) in enumerate(report.figures.items()):
        save_png(figure, plots / f"figure_{i}.png")
        figures.append(_section(heading, embed_figure(figure, alt=heading, has_colors=True)))
    return "\n".join(tables + figures)


def _parameters(report: RunReport, plots: Path) -> str:
    if not report.parameters:
        return ""
    rows = [{**row, "parameters": n_parameters(row)} for row in report.parameters]
    columns = parameter_columns(rows)
    table = html_table([{name: row.get(name) for name in columns} for row in rows], code=("path", "shape"))
    return _section("Parameters", tag("p", escape(parameter_totals(rows))), fold("Every array", table))


def _config(report: RunReport, plots: Path) -> str:
    flat = _dotted(report.config)
    if not flat:
        return ""
    rows = [{"option": name, "value": _literal(value)} for name, value in flat.items()]
    if report.config_sources:
        rows = [{**row, "source": report.config_sources.get(row["option"], "")} for row in rows]
    return _section("Configuration", html_table(rows, code=("option", "value")))


def _dotted(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        is_group = isinstance(value, Mapping) and len(value) > 0
        flat.update(_dotted(value, f"{prefix}{name}.") if is_group else {f"{prefix}{name}": value})
    return flat


def _literal(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _footing(report: RunReport) -> str:
    rows = [{"": name, " ": text} for name, text in report.environment.items()]
    parts = [_section("Checkpoints", html_table(report.checkpoints))] if report.checkpoints else []
    parts += [_section("Environment", html_table(rows))] if rows else []
    return "\n".join([*parts, tag("footer", "Written by jaxdl")])
