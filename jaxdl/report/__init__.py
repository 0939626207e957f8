"""What a run tells people: metric files, a progress bar, plots, a diagnosis and a one-file report."""

from jaxdl.report.canvas import PlotError, save_png
from jaxdl.report.diagnosis import VERDICTS, Diagnosis, diagnose
from jaxdl.report.environment import environment
from jaxdl.report.history import WriterError, read_history, series
from jaxdl.report.outcomes import Mistake, calibration_error, plot_calibration, plot_confusion, plot_examples
from jaxdl.report.page import RunReport, write_report
from jaxdl.report.plots import plot_curves, plot_histogram, plot_predictions
from jaxdl.report.progress import Progress
from jaxdl.report.table import format_bytes, format_count, format_duration, format_number, parameter_table
from jaxdl.report.writers import CsvWriter, JsonlWriter, MlflowWriter, TensorBoardWriter, WandbWriter, Writer

__all__ = [
    "VERDICTS",
    "CsvWriter",
    "Diagnosis",
    "JsonlWriter",
    "Mistake",
    "MlflowWriter",
    "PlotError",
    "Progress",
    "RunReport",
    "TensorBoardWriter",
    "WandbWriter",
    "Writer",
    "WriterError",
    "calibration_error",
    "diagnose",
    "environment",
    "format_bytes",
    "format_count",
    "format_duration",
    "format_number",
    "parameter_table",
    "plot_calibration",
    "plot_confusion",
    "plot_curves",
    "plot_examples",
    "plot_histogram",
    "plot_predictions",
    "read_history",
    "save_png",
    "series",
    "write_report",
]
