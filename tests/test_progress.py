"""The progress display: plain lines, a terminal, cost, and what is left after an exception."""

import io
import itertools
import subprocess
import sys
import time

import pytest

from jaxdl.report.progress import Progress

SHOW_CURSOR, HIDE_CURSOR, CLEAR_LINE = "\x1b[?25h", "\x1b[?25l", "\x1b[2K"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    return Terminal()


def screen(text):
    """The lines that a terminal shows after `text`, as far as carriage return, clear and cursor-up go."""
    lines, row, place = [""], 0, 0
    while text:
        if text[0] == "\x1b":
            end = next(i for i in range(2, len(text)) if text[i].isalpha())
            code, text = text[: end + 1], text[end + 1 :]
            if code == CLEAR_LINE:
                lines[row] = ""
            elif code.endswith("A"):
                row -= int(code[2:-1])
            continue
        letter, text = text[0], text[1:]
        if letter == "\n":
            row, place = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif letter == "\r":
            place = 0
        else:
            lines[row] = lines[row][:place].ljust(place) + letter + lines[row][place + 1 :]
            place += 1
    return [line.rstrip() for line in lines if line.strip()]


def test_plain_lines_come_at_most_once_an_interval():
    clock, stream = Clock(), io.StringIO()
    with Progress(1000, stream=stream, interval_s=5, clock=clock) as progress:
        for step in range(1, 1001):
            clock.now += 0.1
            progress.update(step, {"loss": 1 / step})
    lines = stream.getvalue().splitlines()
    steps = [int(line.split()[1].split("/")[0].replace(",", "")) for line in lines]
    assert steps[0] == 1
    assert steps[-1] == 1000
    assert all(49 <= b - a <= 51 for a, b in itertools.pairwise(steps[:-1]))
    assert lines[-1] == "step 1,000/1,000 (100%)  loss 0.001  10 steps/s"


def test_rate_and_time_left_are_closed_forms():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(10_000, start_step=1000, stream=stream, examples_per_step=256, interval_s=1, clock=clock)
    clock.now += 60  # compilation: before the first update and so not in the rate
    progress.update(1001)
    assert progress.steps_per_second() is None
    clock.now += 10
    progress.update(1201)
    assert progress.steps_per_second() == 20.0
    assert stream.getvalue().splitlines()[-1] == "step 1,201/10,000 (12%)  20 steps/s  5.12K examples/s  ETA 7m 20s"


def test_forced_lines_and_the_last_step_ignore_the_clock():
    stream = io.StringIO()
    progress = Progress(10, stream=stream, clock=Clock())
    for step in (1, 2, 3):
        progress.update(step)
    progress.update(4, {"loss": 0.5}, force=True)
    progress.update(10)
    progress.update(10)
    progress.close()
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines == ["step 1/10 (10%)", "step 4/10 (40%)  loss 0.5", "step 10/10 (100%)  loss 0.5"]


def test_close_draws_the_last_state_of_a_run_that_ended_early():
    stream = io.StringIO()
    with Progress(10, stream=stream, clock=Clock()) as progress:
        progress.update(1)
        progress.update(2)
    assert stream.getvalue().splitlines() == ["step 1/10 (10%)", "step 2/10 (20%)"]


def test_an_unused_progress_says_nothing():
    stream = io.StringIO()
    with Progress(10, stream=stream):
        pass
    assert stream.getvalue() == ""


def test_notes_are_lines_of_their_own_and_markup_is_text():
    stream = io.StringIO()
    Progress(10, stream=stream).note("saved [bold]runs/3[/bold]")
    assert stream.getvalue() == "saved [bold]runs/3[/bold]\n"


def test_captured_standard_error(capsys):
    with Progress(3) as progress:
        progress.update(3, {"loss": float("nan")})
    assert capsys.readouterr().err == "step 3/3 (100%)  loss nan\n"


def test_no_steps_at_all(capsys):
    with Progress(0) as progress:
        progress.update(0)
    assert capsys.readouterr().err == "step 0/0 (100%)\n"


def test_a_broken_stream_does_not_end_the_run():
    stream = io.StringIO()
    progress = Progress(10, stream=stream)
    stream.close()
    progress.update(1)
    progress.note("x")
    progress.update(10)
    progress.close()
    assert progress.step == 10


def test_update_costs_little_when_nothing_is_drawn():
    with Progress(10**9, stream=io.StringIO(), interval_s=3600) as progress:
        metrics = {"loss": 0.5}
        progress.update(0, metrics)
        best = min(_seconds_for(progress, metrics) for _ in range(5))
    assert best / 1000 < 50e-6


def _seconds_for(progress, metrics):
    start = time.perf_counter()
    for step in range(1000):
        progress.update(step, metrics)
    return time.perf_counter() - start


def test_a_pipe_gets_plain_lines():
    code = "from jaxdl.report.progress import Progress\nwith Progress(2) as p:\n  p.update(2, {'loss': 1.5})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == "step 2/2 (100%)  loss 1.5\n"
    assert result.stdout == ""


def test_a_terminal_shows_one_bar_below_the_notes(terminal):
    clock = Clock()
    with Progress(200, stream=terminal, examples_per_step=10, clock=clock) as progress:
        for step in range(1, 201):
            clock.now += 0.05
            progress.update(step, {"loss": 0.25})
            if step in (50, 100):
                progress.note(f"evaluated at {step}: [accuracy] 0.9")
    lines = screen(terminal.getvalue())
    assert lines[:2] == ["evaluated at 50: [accuracy] 0.9", "evaluated at 100: [accuracy] 0.9"]
    assert len(lines) == 3
    assert all(text in lines[2] for text in ("━", "200/200 (100%)", "loss 0.25", "20 steps/s", "200 examples/s"))
    assert terminal.getvalue().count(HIDE_CURSOR) == terminal.getvalue().count(SHOW_CURSOR) == 1


def test_a_terminal_is_drawn_at_most_ten_times_a_second(terminal):
    clock = Clock()
    with Progress(10_001, stream=terminal, clock=clock) as progress:
        progress.update(0)
        start = terminal.tell()
        for step in range(1, 10_001):
            clock.now += 1e-4
            progress.update(step)
        draws = terminal.getvalue()[start:].count("10,001")
    assert 9 <= draws <= 10


def test_nothing_is_left_after_an_exception(terminal):
    clock = Clock()
    progress = Progress(10, stream=terminal, clock=clock)

    def run():
        with progress:
            progress.update(1, {"loss": 0.5})
            progress.note("kept")
            clock.now += 1
            progress.update(2)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        run()
    assert screen(terminal.getvalue()) == ["kept"]
    assert terminal.getvalue().rfind(SHOW_CURSOR) > terminal.getvalue().rfind(HIDE_CURSOR)
    progress.update(3)
    assert screen(terminal.getvalue()) == ["kept"]


def test_a_forgotten_progress_gives_the_cursor_back(terminal):
    progress = Progress(10, stream=terminal)
    progress.update(1)
    assert SHOW_CURSOR not in terminal.getvalue()
    del progress
    assert SHOW_CURSOR in terminal.getvalue()
    assert screen(terminal.getvalue()) == []


def test_printing_on_a_dumb_terminal_is_plain(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with Progress(1, stream=terminal) as progress:
        progress.update(1)
    assert terminal.getvalue() == "step 1/1 (100%)\n"


def test_what_is_printed_to_a_file_goes_there_while_the_bar_is_shown(terminal, monkeypatch, capsys):
    with Progress(10, stream=terminal) as progress:
        progress.update(1)
        print("result")
    assert capsys.readouterr().out == "result\n"
    assert "result" not in terminal.getvalue()


def test_what_is_printed_to_the_terminal_stands_above_the_bar(terminal, monkeypatch):
    monkeypatch.setattr("sys.stdout", terminal)
    with Progress(10, stream=terminal) as progress:
        progress.update(1)
        print("result")
        progress.update(2)
    lines = screen(terminal.getvalue())
    assert lines[0] == "result"
    assert [("2/10" in line) for line in lines] == [False, True]
