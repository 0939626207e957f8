"""Metric files: exact floats, torn lines, resuming, widening, event files, and the two services."""

import importlib.util
import json
import math
import struct
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdl.errors import JaxdlError
from jaxdl.report.history import WriterError, read_history, series
from jaxdl.report.writers import CsvWriter, JsonlWriter, MlflowWriter, TensorBoardWriter, WandbWriter, Writer

FILE_WRITERS = [(JsonlWriter, "metrics.jsonl"), (CsvWriter, "metrics.csv")]
AWKWARD = [0.1 + 0.2, 1e-320, -0.0, 5e-324, 1.7976931348623157e308, math.pi, 1 / 3, math.inf, -math.inf, math.nan]


def bits(value):
    """The eight bytes of a float; text keeps no sign of a NaN."""
    return "nan" if math.isnan(value) else struct.pack("<d", value)


def same(a, b):
    """Equal rows, NaN and the sign of zero included."""
    return [list(row) for row in a] == [list(row) for row in b] and all(
        bits(x[name]) == bits(y[name]) if name != "step" else x[name] == y[name]
        for x, y in zip(a, b, strict=True)
        for name in x
    )


def write_run(writer, steps):
    """Rows of a pretend run; from step 4 on there is an evaluation every second step."""
    for step in steps:
        writer.write(step, {"loss": 1 / (step + 0.1), "grad_norm": math.nan if step == 3 else float(step)})
        if step >= 4 and step % 2 == 0:
            writer.write(step, {"eval/loss": 2 / step})
    writer.close()


@pytest.mark.parametrize(("make", "name"), FILE_WRITERS)
def test_every_float_reads_back_bit_for_bit(make, name, tmp_path):
    writer = make(tmp_path / name)
    for step, value in enumerate(AWKWARD):
        writer.write(step, {"a": value, "b": -value})
    writer.close()
    assert same(read_history(tmp_path / name), [{"step": i, "a": v, "b": -v} for i, v in enumerate(AWKWARD)])


@given(st.lists(st.floats(), min_size=1, max_size=5))
def test_floats_survive_one_line_of_json(values):
    from jaxdl.report.history import json_line

    row = {"step": 1, **{f"m{i}": value for i, value in enumerate(values)}}
    line = json_line(row)
    json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    from jaxdl.report.history import _parse_row

    assert all(np.array_equal(_parse_row(line)[name], row[name], equal_nan=True) for name in row)


def test_what_is_not_finite_is_valid_json(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    writer.close()
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}\n'


@pytest.mark.parametrize(("make", "name"), FILE_WRITERS)
@pytest.mark.parametrize("crash_at", [1, 3, 4, 5, 9])
def test_killed_and_resumed_equals_uninterrupted(make, name, crash_at, tmp_path):
    write_run(make(tmp_path / f"straight_{name}"), range(10))
    write_run(make(tmp_path / name), range(crash_at + 1))
    resumed = make(tmp_path / name)
    resumed.resume(2)
    write_run(resumed, range(3, 10) if crash_at >= 2 else range(crash_at + 1, 10))
    assert (tmp_path / name).read_bytes() == (tmp_path / f"straight_{name}").read_bytes()


@pytest.mark.parametrize(("make", "name"), FILE_WRITERS)
def test_a_torn_line_at_every_byte(make, name, tmp_path):
    write_run(make(tmp_path / name), range(6))
    whole = (tmp_path / name).read_bytes()
    rows = read_history(tmp_path / name)
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(start, len(whole) - 1):  # the whole last line but for its last byte and newline is the last case
        (tmp_path / name).write_bytes(whole[:end])
        assert same(read_history(tmp_path / name), rows[:-1])
        writer = make(tmp_path / name)
        writer.write(99, {"loss": 0.5})
        writer.close()
        assert same(read_history(tmp_path / name), [*rows[:-1], {"step": 99, "loss": 0.5}])


@pytest.mark.parametrize(("make", "name"), FILE_WRITERS)
def test_resume_drops_a_torn_line_and_leaves_nothing_beside(make, name, tmp_path):
    write_run(make(tmp_path / name), range(6))
    with (tmp_path / name).open("a") as file:
        file.write('{"step": 1, "lo' if name.endswith("jsonl") else "1,0.")
    make(tmp_path / name).resume(3)
    assert [row["step"] for row in read_history(tmp_path / name)] == [0, 1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("make", "name"), FILE_WRITERS)
def test_resume_keeps_the_step_itself_and_can_drop_all(make, name, tmp_path):
    write_run(make(tmp_path / name), range(6))
    make(tmp_path / name).resume(4)
    assert max(row["step"] for row in read_history(tmp_path / name)) == 4
    make(tmp_path / name).resume(-1)
    assert read_history(tmp_path / name) == []
    write_run(make(tmp_path / name), range(6))
    write_run(make(tmp_path / f"fresh_{name}"), range(6))
    assert (tmp_path / name).read_bytes() == (tmp_path / f"fresh_{name}").read_bytes()


@pytest.mark.parametrize(("make", "name"), FILE_WRITERS)
def test_a_row_is_on_disk_before_flush(make, name, tmp_path):
    writer = make(tmp_path / name)
    writer.write(1, {"loss": 0.5})
    assert read_history(tmp_path / name) == [{"step": 1, "loss": 0.5}]
    writer.flush()
    writer.close()
    writer.close()


@pytest.mark.parametrize(("make", "name"), FILE_WRITERS)
def test_resume_without_a_file_makes_none(make, name, tmp_path):
    make(tmp_path / name).resume(5)
    assert list(tmp_path.iterdir()) == []


def test_csv_widens_and_keeps_old_rows_blank(tmp_path):
    writer = CsvWriter(tmp_path / "m.csv")
    writer.write(1, {"loss": 0.1})
    writer.write(2, {"loss": 0.2, "a,b": 1.0})
    writer.write(3, {'say "c"': math.nan})
    writer.write(4, {"loss": 0.4})
    writer.close()
    assert (tmp_path / "m.csv").read_text().splitlines() == [
        'step,loss,"a,b","say ""c"""',
        "1,0.1,,",
        "2,0.2,1.0,",
        "3,,,nan",
        "4,0.4,,",
    ]
    assert [list(row) for row in read_history(tmp_path / "m.csv")][2] == ["step", 'say "c"']


def test_csv_goes_on_with_the_columns_of_the_file(tmp_path):
    for step, row in ((1, {"a": 1.0, "b": 2.0}), (2, {"b": 3.0})):
        writer = CsvWriter(tmp_path / "m.csv")
        writer.write(step, row)
        writer.close()
    assert (tmp_path / "m.csv").read_text() == "step,a,b\n1,1.0,2.0\n2,,3.0\n"


@pytest.mark.parametrize("value", [np.float32(0.1), jnp.float32(0.1), np.array([0.1], np.float32)])
def test_arrays_of_one_number_are_numbers(value, tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(np.int64(1), {"a": value, "b": jnp.bfloat16(0.5), "c": 3, "d": True})
    assert read_history(tmp_path / "m.jsonl") == [
        {"step": 1, "a": float(np.float32(0.1)), "b": 0.5, "c": 3.0, "d": 1.0}
    ]
    writer.close()


def test_all_bad_values_and_names_are_listed_at_once(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    bad = {"ok": 1.0, "matrix": np.eye(2), "word": "x", "none": None, "step": 1.0, "": 2.0, "two\nlines": 3.0}
    with pytest.raises(JaxdlError) as caught:
        writer.write(7, bad)
    text = str(caught.value)
    assert "metrics of step 7: 6 problem(s)" in text
    assert all(name in text for name in ("matrix", "word", "none", "'step'", "''", "two\\nlines"))
    assert not (tmp_path / "m.jsonl").exists()


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(WriterError, match=r"m\.jsonl:2 is not a metric row"):
        read_history(tmp_path / "m.jsonl")
    (tmp_path / "m.csv").write_text("step,a\n1,2.0\n2\n3,4.0\n")
    with pytest.raises(WriterError, match=r"m\.csv:3 does not fit the header"):
        read_history(tmp_path / "m.csv")
    with pytest.raises(WriterError, match="no metrics file"):
        read_history(tmp_path / "absent.jsonl")


def test_empty_files_are_empty_histories(tmp_path):
    for name in ("m.csv", "m.jsonl"):
        (tmp_path / name).touch()
        assert read_history(tmp_path / name) == []


def test_series_passes_over_rows_without_the_metric():
    steps, values = series(
        [{"step": 5, "a": 1.0}, {"step": 6}, {"step": 7, "a": math.nan}, {"step": 8, "a": None}], "a"
    )
    assert steps.tolist() == [5, 7, 8]
    np.testing.assert_array_equal(values, [1.0, math.nan, math.nan])


def read_events(directory):
    """All records of a folder's event files in name order, with both checksums verified."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    events = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            record = data[12 : 12 + length]
            assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
            assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked_crc32c(record)
            events.append(Event.FromString(record))
            data = data[16 + length :]
    return events


def scalars(events):
    return [
        (event.step, {v.tag: v.simple_value for v in event.summary.value}) for event in events if event.summary.value
    ]


def test_tensorboard_files_read_back(tmp_path):
    writer = TensorBoardWriter(tmp_path / "tb")
    writer.write(1, {"loss": 0.5, "eval/loss": 0.75})
    writer.write(2, {"loss": math.inf})
    writer.flush()
    expected = [(1, {"loss": 0.5, "eval/loss": 0.75}), (2, {"loss": math.inf})]
    assert scalars(read_events(tmp_path / "tb")) == expected  # flushed means there, before close
    writer.close()
    writer.close()
    assert read_events(tmp_path / "tb")[0].file_version == "brain.Event:2"


def test_tensorboard_resume_purges_and_never_overwrites(tmp_path):
    from tensorboardX.proto.event_pb2 import SessionLog

    for _ in range(3):  # within one second, after which the library names its files
        writer = TensorBoardWriter(tmp_path)
        writer.resume(10)
        writer.write(11, {"loss": 1.0})
        writer.close()
    events = read_events(tmp_path)
    purges = [event.step for event in events if event.session_log.status == SessionLog.START]
    assert purges == [11, 11, 11]
    assert scalars(events) == [(11, {"loss": 1.0})] * 3


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_event_files_are_written_without_pytorch_and_others_get_all_of_tensorboardx(tmp_path):
    code = """
import sys
from jaxdl.report.writers import TensorBoardWriter
writer = TensorBoardWriter(sys.argv[1])
writer.write(1, {"loss": 0.5})
writer.close()
print("torch" in sys.modules, "tensorboardX" in sys.modules)
import tensorboardX, torch
with tensorboardX.SummaryWriter(sys.argv[1], filename_suffix=".theirs") as theirs:
    theirs.add_histogram("weights", torch.ones(3), 2)
writer.write(3, {"loss": 0.25})
writer.close()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert result.stdout.split()[:2] == ["False", "False"]
    values = [value for event in read_events(tmp_path) for value in event.summary.value]
    assert {value.tag for value in values} == {"loss", "weights"}
    assert sorted(value.simple_value for value in values if value.tag == "loss") == [0.25, 0.5]


def test_tensorboard_makes_no_file_for_an_empty_run(tmp_path):
    writer = TensorBoardWriter(tmp_path / "tb")
    writer.resume(0)
    writer.flush()
    writer.close()
    assert not (tmp_path / "tb").exists()


@pytest.mark.parametrize(("make", "package"), [(WandbWriter, "wandb"), (MlflowWriter, "mlflow")])
def test_a_missing_package_names_the_extra(make, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(JaxdlError, match=rf"{package} is not installed; pip install 'jaxdl\[{package}\]'"):
        make("project")


def test_wandb_gets_rows_with_their_step(monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        define_metric=lambda *args, **keywords: calls.append(("define", args, keywords)),
        log=lambda row: calls.append(("log", row)),
        finish=lambda: calls.append("finish"),
    )
    fake = types.SimpleNamespace(init=lambda **settings: calls.append(("init", settings)) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = WandbWriter("digits", mode="offline")
    writer.resume(3)
    writer.write(4, {"loss": np.float32(0.5)})
    writer.flush()
    writer.close()
    assert calls == [
        ("init", {"project": "digits", "mode": "offline"}),
        ("define", ("*",), {"step_metric": "step"}),
        ("log", {"step": 4, "loss": 0.5}),
        "finish",
    ]


@pytest.mark.parametrize("exists", [True, False])
def test_mlflow_makes_or_finds_the_experiment(exists, monkeypatch):
    calls = []

    class Client:
        def __init__(self, tracking_uri):
            calls.append(tracking_uri)

        def get_experiment_by_name(self, name):
            return types.SimpleNamespace(experiment_id="old") if exists else None

        def create_experiment(self, name):
            return "new"

        def create_run(self, experiment_id):
            calls.append(experiment_id)
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

        def log_metric(self, run_id, name, value, step):
            calls.append((run_id, name, value, step))

        def set_terminated(self, run_id):
            calls.append(f"end {run_id}")

    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=Client))
    writer = MlflowWriter("digits", tracking_uri="db")
    writer.write(4, {"loss": 0.5, "accuracy": 1})
    writer.close()
    assert calls == ["db", "old" if exists else "new", ("r1", "loss", 0.5, 4), ("r1", "accuracy", 1.0, 4), "end r1"]
    assert MlflowWriter("digits", run_id="r0").run_id == "r0"


def test_all_are_writers(tmp_path):
    for writer in (JsonlWriter(tmp_path / "a"), CsvWriter(tmp_path / "b.csv"), TensorBoardWriter(tmp_path / "c")):
        assert isinstance(writer, Writer)
    assert issubclass(WandbWriter, Writer)
    assert issubclass(MlflowWriter, Writer)
