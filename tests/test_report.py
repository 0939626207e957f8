"""The page, its plots, the tables and the environment."""

import base64
import io
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from PIL import Image

from jaxdl.report import (
    Diagnosis,
    Mistake,
    PlotError,
    RunReport,
    calibration_error,
    diagnose,
    environment,
    format_bytes,
    format_count,
    format_duration,
    parameter_table,
    plot_calibration,
    plot_confusion,
    plot_curves,
    plot_examples,
    plot_histogram,
    plot_predictions,
    save_png,
    write_report,
)
from jaxdl.report.outcomes import class_rows, most_confused, to_pixels
from jaxdl.report.plots import curve_panels

EVIL = '<script>alert("x")</script>&\'"'
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Reads a page; fails where a tag is not closed in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data + "\n"

    def headings(self):
        lines = self.text.splitlines()
        return [name for name in SECTIONS if name in lines]

    def images(self):
        found = []
        for tag, name, value in self.attributes:
            if (tag, name) == ("img", "src"):
                kind, _, data = value.partition(",")
                assert kind == "data:image/png;base64"
                image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
                image.load()
                found.append(image)
        return found


SECTIONS = (
    "Diagnosis",
    "Curves",
    "Predicted and true",
    "Confusion",
    "Calibration",
    "Most wrong",
    "Parameters",
    "Configuration",
    "Checkpoints",
    "Environment",
)
HISTORY = [
    {"step": i, "loss": 2.0 / i, "accuracy": 1 - 1 / i, "learning_rate": 0.1, "grad_norm": 1.0} for i in range(1, 40)
]
HISTORY += [{"step": i, "eval/loss": 2.2 / i, "eval/accuracy": 0.9 - 0.9 / i} for i in range(5, 40, 5)]
CONFUSION = np.array([[8, 2, 0], [0, 10, 0], [1, 0, 0]])
CALIBRATION = (np.array([10, 30]), np.array([4.0, 27.0]), np.array([5, 24]))
PARAMETERS = [
    {"path": "dense/kernel", "shape": (64, 10), "dtype": "float32", "trainable": True, "decay": 0.1, "lr_scale": 1.0},
    {"path": "dense/bias", "shape": (10,), "dtype": "float32", "trainable": False, "decay": 0.0, "lr_scale": 1.0},
]


def picture(shape=(8, 8)):
    return np.linspace(0, 1, int(np.prod(shape))).reshape(shape)


def full_report(name="digits"):
    return RunReport(
        title=name,
        summary=name,
        metrics={name: 0.9712, "eval/loss": float("nan")},
        steps=12_345,
        seconds=75.0,
        steps_per_second=812.0,
        examples_per_second=51_968.0,
        diagnosis=Diagnosis("noisy", (name,), (name,), 3),
        history=[*HISTORY, {"step": 40, name: 1.0}],
        confusion=CONFUSION,
        class_names=[name, "b", "c"],
        calibration=CALIBRATION,
        mistakes=[Mistake(picture(), name, name, 0.97, 7), Mistake(picture((8, 8, 3)), "1", "2", 0.5)],
        predictions=(np.arange(5.0), np.arange(5.0) + 0.1),
        parameters=[*PARAMETERS, {**PARAMETERS[0], "path": name}],
        config={"optimizer": {"name": name, "learning_rate": 1e-3}, name: [1, 2], "empty": {}},
        config_sources={"optimizer.learning_rate": name},
        environment={name: name},
        checkpoints=[{"step": 100, "path": name, name: 1}],
        tables={name: [{name: name}]},
        figures={name: plot_histogram(np.arange(9.0), name="weight")},
    )


def test_the_full_page_is_whole_and_loads_nothing(tmp_path):
    path = write_report(tmp_path / "deep" / "report.html", full_report())
    page = Page(path)
    assert page.headings() == list(SECTIONS)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert all(
        value.startswith("data:image/png;base64,") for _, name, value in page.attributes if name in ("src", "href")
    )
    text = path.read_text(encoding="utf-8")
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme:dark" in text
    assert [value for tag, name, value in page.attributes if (tag, name) == ("img", "class")].count("sheet") == 1
    assert len(page.images()) == 5 + 1 + 1 + 1 + 2 + 1  # curves, scatter, confusion, calibration, examples, further
    assert all(value for _, name, value in page.attributes if name == "alt")
    assert [file.name for file in path.parent.iterdir() if file.is_file()] == ["report.html"]


def test_the_page_shows_the_numbers(tmp_path):
    page = Page(write_report(tmp_path / "r.html", full_report()))
    lines = page.text.splitlines()
    for text in (
        "0.9712",
        "nan",
        "12,345",
        "1m 15s",
        "812",
        "52.0K",
        "noisy",
        "1 of 1",
        "row 7",
        "optimizer.learning_rate",
    ):
        assert any(text in line for line in lines), text
    assert "3 arrays, 1,290 parameters (1.29K), 1,280 trainable (99.2%), 5.04 KiB" in lines
    assert "details" in page.tags


def test_every_text_is_escaped(tmp_path):
    path = write_report(tmp_path / "r.html", full_report(EVIL))
    page = Page(path)
    assert "script" not in page.tags
    assert "<script" not in path.read_text(encoding="utf-8")
    assert page.text.count(EVIL) >= 18
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_an_empty_run_has_no_sections(tmp_path):
    page = Page(write_report(tmp_path / "r.html", RunReport()))
    assert page.headings() == []
    assert "section" not in page.tags
    assert page.images() == []
    assert "Training run" in page.text
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize(
    ("heading", "fields", "plots"),
    [
        ("Diagnosis", {"diagnosis": diagnose([])}, []),
        ("Curves", {"history": HISTORY}, ["curves.png"]),
        ("Predicted and true", {"predictions": (np.ones((3, 2)), np.ones((3, 2)))}, ["predictions.png"]),
        ("Confusion", {"confusion": CONFUSION}, ["confusion.png"]),
        ("Calibration", {"calibration": CALIBRATION}, ["calibration.png"]),
        ("Most wrong", {"mistakes": [Mistake(picture(), "1", "2", 0.9)]}, ["mistakes.png"]),
        ("Parameters", {"parameters": PARAMETERS}, []),
        ("Configuration", {"config": {"a": 1}}, []),
        ("Checkpoints", {"checkpoints": [{"step": 1}]}, []),
        ("Environment", {"environment": {"jax": "1"}}, []),
    ],
)
def test_each_section_stands_alone_with_its_png(heading, fields, plots, tmp_path):
    page = Page(write_report(tmp_path / "r.html", RunReport(**fields)))
    assert page.headings() == [heading]
    saved = sorted(path.name for path in (tmp_path / "plots").iterdir()) if plots else []
    assert saved == plots
    for name in saved:
        assert Image.open(tmp_path / "plots" / name).convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_a_history_without_metrics_has_no_curves(tmp_path):
    assert Page(write_report(tmp_path / "r.html", RunReport(history=[{"step": 1}]))).headings() == []


def test_many_classes_are_folded_and_no_name_is_lost_in_the_table(tmp_path):
    names = [f"class {i}" for i in range(100)]
    page = Page(write_report(tmp_path / "r.html", RunReport(confusion=np.eye(100, dtype=int), class_names=names)))
    assert "details" in page.tags
    assert set(names) <= set(page.text.splitlines())


def test_an_old_page_is_replaced(tmp_path):
    for title in ("first", "second"):
        write_report(tmp_path / "r.html", RunReport(title=title))
    assert "second" in Page(tmp_path / "r.html").text
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_class_rows_are_the_scores_of_scikit_learn():
    from sklearn.metrics import precision_recall_fscore_support

    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    confusion = np.zeros((4, 4), int)
    np.add.at(confusion, (true, predicted), 1)
    expected = precision_recall_fscore_support(true, predicted)
    rows = class_rows(confusion, list("abcd"))
    for name, values in zip(("precision", "recall", "F1"), expected, strict=False):
        assert [row[name] for row in rows] == [f"{value:.3f}" for value in values]
    assert [row["examples"] for row in rows] == expected[3].tolist()


def test_a_class_without_examples_or_predictions_has_no_scores():
    rows = class_rows(np.array([[3, 0], [0, 0]]), ["a", "b"])
    assert rows[1] == {"class": "b", "precision": None, "recall": None, "F1": None, "examples": 0}
    assert most_confused(np.eye(3, dtype=int), "abc") == []


def test_panels_pair_training_and_evaluation():
    assert list(curve_panels(HISTORY)) == ["loss", "accuracy", "learning_rate", "grad_norm"]
    rows = [{"step": 1, "train/loss": 1, "val/loss": 2, "calibration/ece": 3, "eval/calibration/ece": 4}]
    assert curve_panels(rows) == {
        "loss": {"train": "train/loss", "val": "val/loss"},
        "calibration/ece": {"train": "calibration/ece", "eval": "eval/calibration/ece"},
    }


def test_curves_draw_the_values_and_mark_what_is_not_finite():
    rows = [{"step": i, "loss": 1.0 + i, "eval/loss": 2.0} for i in range(4)] + [{"step": 4, "loss": float("nan")}]
    (axes,) = plot_curves(rows).axes
    train, evaluation, mark = axes.lines
    assert train.get_ydata().tolist() == [1, 2, 3, 4]
    assert evaluation.get_xdata().tolist() == [0, 1, 2, 3]
    assert list(mark.get_xdata()) == [4, 4]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["train", "eval", "not finite: 4"]
    assert axes.get_yscale() == "linear"


def test_long_curves_are_smoothed_by_a_mean_that_keeps_constants():
    (axes,) = plot_curves([{"step": i, "loss": 3.0 + (-1) ** i} for i in range(400)]).axes
    raw, smooth = (line.get_ydata() for line in axes.lines)
    assert set(raw.tolist()) == {2.0, 4.0}
    assert np.abs(smooth[20:-20] - 3.0).max() < 0.1
    (axes,) = plot_curves([{"step": i, "loss": 7.0} for i in range(400)]).axes
    np.testing.assert_allclose(axes.lines[1].get_ydata(), 7.0, rtol=1e-12)


def test_wide_ranges_are_logarithmic():
    (axes,) = plot_curves([{"step": i, "loss": 10.0**-i} for i in range(4)]).axes
    assert axes.get_yscale() == "log"


def test_only_broken_values_still_draw():
    (axes,) = plot_curves([{"step": 3, "loss": float("inf")}]).axes
    assert axes.get_legend().get_texts()[-1].get_text() == "not finite: 3"
    save_png(axes.figure, io.BytesIO())


def test_chosen_curves_only():
    figure = plot_curves(HISTORY, names=["accuracy", "absent"])
    assert [axes.get_title("left") for axes in figure.axes] == ["accuracy"]
    with pytest.raises(PlotError, match="no values of \\['absent'\\]"):
        plot_curves(HISTORY, names=["absent"])


def test_confusion_colours_are_rows_and_numbers_are_counts():
    axes = plot_confusion(CONFUSION, ["a", "b", "c"]).axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.8, 0.2, 0], [0, 1, 0], [1, 0, 0]])
    assert sorted(text.get_text() for text in axes.texts) == ["1", "10", "2", "8"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert list(plot_confusion(np.eye(100, dtype=int)).axes[0].texts) == []


@pytest.mark.parametrize(
    ("shape", "names", "message"),
    [((2, 3), None, "must be \\(C, C\\)"), ((0, 0), None, "must be \\(C, C\\)"), ((2, 2), ["a"], "1 class names")],
)
def test_confusion_of_a_wrong_shape(shape, names, message):
    with pytest.raises(PlotError, match=message):
        plot_confusion(np.ones(shape), names)


def test_calibration_bars_and_error_are_the_closed_form():
    figure = plot_calibration(*CALIBRATION)
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0.5, 0.8]
    assert [bar.get_height() for bar in figure.axes[1].patches] == [10, 30]
    expected = 0.25 * abs(0.5 - 0.4) + 0.75 * abs(0.8 - 0.9)
    assert calibration_error(*CALIBRATION) == pytest.approx(expected, abs=1e-15)
    assert calibration_error(np.zeros(3), np.zeros(3), np.zeros(3)) == 0.0
    with pytest.raises(PlotError, match=r"\(B,\) each"):
        plot_calibration(np.ones(3), np.ones(2), np.ones(3))


def test_predictions_say_rmse_and_r2():
    true = np.array([[0.0, 1.0], [2.0, 3.0]])
    assert plot_predictions(true, true + 0.5).axes[0].get_title("left") == "RMSE 0.5, R² 0.800"
    assert plot_predictions(np.ones(3), np.ones(3)).axes[0].get_title("left") == "RMSE 0"
    with pytest.raises(PlotError, match="must be equal"):
        plot_predictions(np.ones(3), np.ones((3, 1)))


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3)])
def test_pictures_of_any_range_become_bytes(shape):
    pixels = to_pixels(picture(shape))
    assert pixels.shape == (8, 8, 3)
    assert (pixels.dtype, pixels.min(), pixels.max()) == (np.uint8, 0, 255)
    normalised = to_pixels(6 * picture(shape) - 3)  # mean and deviation were taken out
    np.testing.assert_array_equal(normalised, pixels)
    np.testing.assert_array_equal(to_pixels(pixels), pixels)
    assert to_pixels(np.full(shape, 0.5)).max() == 128


def test_pictures_survive_nan_and_constants_but_not_other_shapes():
    assert to_pixels(np.full((2, 2), np.nan)).max() == 0
    assert to_pixels(np.full((2, 2), 5.0)).max() == 0
    for shape in [(8,), (2, 8, 8, 3), (8, 8, 4), (0, 0)]:
        with pytest.raises(PlotError, match="a picture is"):
            to_pixels(np.zeros(shape))


def test_examples_fill_a_grid():
    figure = plot_examples([Mistake(picture(), str(i), "9", 0.5) for i in range(8)], n_columns=3)
    assert len(figure.axes) == 9
    assert sum(bool(axes.images) for axes in figure.axes) == 8
    with pytest.raises(PlotError, match="no examples"):
        plot_examples([])


def test_histograms_count_everything():
    axes = plot_histogram(np.array([1.0, 2.0, 3.0, np.nan]), n_bins=3).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [1, 1, 1]
    assert axes.get_title("left") == "4 values, mean 2, std 0.816, 1 not finite"
    save_png(plot_histogram(np.array([np.nan])), io.BytesIO())


def test_plots_leave_pyplot_and_the_settings_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    save_png(plot_curves(HISTORY), tmp_path / "new" / "a.png")
    assert dict(matplotlib.rcParams) == before
    code = "import sys; from jaxdl.report import *; plot_histogram([1.0]); print('matplotlib.pyplot' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout == "False\n"


def test_importing_the_report_imports_nothing_heavy():
    code = "import sys, jaxdl; before = set(sys.modules); import jaxdl.report; print(*(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"matplotlib", "PIL", "rich", "tensorboardX"} & set(result.stdout.split())


def test_equal_figures_are_equal_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        save_png(plot_confusion(CONFUSION), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_parameter_table_is_aligned_and_totals_are_right():
    lines = parameter_table(PARAMETERS).splitlines()
    assert lines[0].split() == ["path", "shape", "dtype", "parameters", "trainable", "decay", "lr_scale"]
    starts = {line.index("float32") for line in (lines[2], lines[3])}
    assert len(starts) == 1
    assert lines[-1] == "2 arrays, 650 parameters, 640 trainable (98.5%), 2.54 KiB"
    assert parameter_table([]).splitlines()[-1] == "0 arrays, 0 parameters"


def layers(n, **different):
    return [
        {"path": f"encoder/layer_{i}/{name}", "shape": shape, "dtype": "bfloat16", "trainable": True}
        for i in range(n)
        for name, shape in (("kernel", (8, 8)), ("bias", (8,)))
    ]


def test_equal_layers_are_merged_where_the_table_is_long():
    rows = [{"path": "embed2d", "shape": (3,), "dtype": "bfloat16", "trainable": False}, *layers(30)]
    lines = parameter_table(rows, max_rows=20).splitlines()
    assert [line.split("  ")[0] for line in lines[2:-2]] == [
        "embed2d",
        "encoder/layer_*/kernel x30",
        "encoder/layer_*/bias x30",
    ]
    assert "1,920" in lines[3]
    assert len(parameter_table(rows, max_rows=None).splitlines()) == 61 + 4
    assert lines[-1] == parameter_table(rows, max_rows=None).splitlines()[-1]


def test_rows_that_differ_are_not_merged_but_left_out():
    rows = [{**row, "lr_scale": 0.9**i} for i, row in enumerate(layers(30))]
    lines = parameter_table(rows, max_rows=10).splitlines()[2:-2]
    assert len(lines) == 10
    gap = next(line for line in lines if line.startswith("..."))
    assert gap.split() == ["...", "51", "more", "rows", f"{sum(np.prod(r['shape']) for r in rows[6:-3]):,}"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_count(999), "999"),
        (format_count(999_499), "999K"),
        (format_count(999_999), "1.00M"),
        (format_count(-2500), "-2.50K"),
        (format_bytes(1023), "1023 B"),
        (format_bytes(1024**4), "1.00 TiB"),
        (format_duration(0), "0 ms"),
        (format_duration(59.96), "1m 00s"),
        (format_duration(3599.9), "1h 00m"),
        (format_duration(86_400), "1d 00h"),
    ],
)
def test_formats_at_their_edges(text, expected):
    assert text == expected


def test_environment_of_a_folder_that_is_no_repository(tmp_path):
    found = environment(tmp_path)
    assert found["git"] == "not a git repository"
    assert found["jax"] == __import__("jax").__version__
    assert found["devices"].startswith(f"{__import__('jax').device_count()} x ")


def test_environment_tells_commit_and_dirt(tmp_path):
    def git(*words):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    assert environment(tmp_path)["git"] == "no commit yet"
    git("commit", "--quiet", "--allow-empty", "--message", "x")
    commit = git("rev-parse", "HEAD")
    assert environment(tmp_path)["git"] == commit
    (tmp_path / "new.txt").touch()
    assert environment(tmp_path)["git"] == f"{commit} with uncommitted changes"


def test_environment_never_raises(monkeypatch, tmp_path):
    def broken(*args, **keywords):
        raise RuntimeError("broken")

    for name in (
        "jax.devices",
        "jax.process_count",
        "platform.platform",
        "subprocess.run",
        "importlib.metadata.version",
    ):
        monkeypatch.setattr(name, broken)
    found = environment(tmp_path / "absent")
    assert (found["devices"], found["platform"], found["jax"]) == ("unknown", "unknown", "not installed")
    assert found["git"] == "not a git repository"
