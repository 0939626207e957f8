"""From the command line to an exit code."""

import dataclasses
import logging

import pytest

from jaxdl.choices import tell
from jaxdl.command import run_command
from jaxdl.errors import JaxdlError
from jaxdl.nonfinite import NonFiniteError


@dataclasses.dataclass(frozen=True)
class Config:
    n: int = 1
    rate: float = 0.5

    def problems(self):
        if self.n < 0:
            yield f"n={self.n} must not be negative."


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setattr("jaxdl.command.enable_compile_cache", lambda: tmp_path)


def raising(error):
    def experiment(parsed):
        raise error

    return experiment


def test_an_experiment_that_returns_gives_zero_and_gets_the_parsed_configuration(capsys):
    seen = []
    assert run_command(Config, seen.append, ["--config.n=3"]) == 0
    assert seen[0].config == Config(n=3)
    assert seen[0].sources == {"n": "command line", "rate": "default"}
    assert capsys.readouterr() == ("", "")


def test_all_problems_of_the_command_line_come_at_once_and_nothing_runs(capsys):
    assert run_command(Config, raising(AssertionError("it ran")), ["--config.m=3", "--config.rate=x", "--x"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: config: 3 problem(s)\n")
    assert all(word in err for word in ("--config.m", "--config.rate='x'", "--x: no such flag"))
    assert "Traceback" not in err


def test_a_combination_that_the_configuration_itself_refuses(capsys):
    assert run_command(Config, raising(AssertionError("it ran")), ["--config.n=-1"]) == 2
    assert capsys.readouterr().err == "error: config: 1 problem(s)\n  - config: n=-1 must not be negative.\n"


def test_choices_are_shown_while_an_experiment_runs_unless_the_logger_is_the_users_own(capsys, caplog):
    logger = logging.getLogger("jaxdl")
    before = logger.handlers[:], logger.level, logger.propagate
    assert run_command(Config, lambda parsed: tell("attention", "xla", "a first reason"), []) == 0
    assert capsys.readouterr() == ("", "attention: xla (a first reason)\n")
    assert caplog.records == []  # the root logger does not say it again
    assert (logger.handlers, logger.level, logger.propagate) == before
    tell("attention", "xla", "a second reason")
    with caplog.at_level("WARNING", logger="jaxdl"):
        assert run_command(Config, lambda parsed: tell("attention", "xla", "a third reason"), []) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("error", "code"), [(JaxdlError("no rows"), 2), (NonFiniteError("no rows"), 1)])
def test_an_error_of_jaxdl_is_one_message_and_its_own_exit_code(capsys, error, code):
    assert run_command(Config, raising(error), []) == code
    assert capsys.readouterr() == ("", "error: no rows\n")


def test_an_exit_code_that_was_set_on_the_error_counts():
    error = JaxdlError("the save failed")
    error.exit_code = 1
    assert run_command(Config, raising(error), []) == 1
    assert JaxdlError.exit_code == 2


def test_notes_of_an_error_are_part_of_the_message(capsys):
    """A save that fails while another error is on its way is a note of that."""
    error = JaxdlError("the step failed")
    error.add_note("and so did the save")
    assert run_command(Config, raising(error), []) == 2
    assert capsys.readouterr().err == "error: the step failed\nand so did the save\n"


def test_an_error_of_the_disk_is_one_message(capsys):
    assert run_command(Config, raising(OSError(28, "No space left on device", "run/metrics.jsonl")), []) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: [Errno 28] No space left on device: 'run/metrics.jsonl'. ")
    assert "saved checkpoints are intact" in err
    assert err.count("\n") == 1


def test_a_ctrl_c_that_nobody_caught(capsys):
    assert run_command(Config, raising(KeyboardInterrupt()), []) == 130
    err = capsys.readouterr().err
    assert "Ctrl-C" in err
    assert "intact" in err
    assert err.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    """Only what the user can mend is turned into a message."""
    with pytest.raises(ZeroDivisionError):
        run_command(Config, lambda parsed: parsed.config.n / 0, [])


def test_help_exits_with_zero_and_shows_the_program(capsys):
    with pytest.raises(SystemExit) as end:
        run_command(Config, raising(AssertionError("it ran")), ["--help"], prog="python -m experiments.x")
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "python -m experiments.x" in out
    assert "--config.rate" in out


def test_without_argv_the_words_of_the_process_are_read(monkeypatch):
    seen = []
    monkeypatch.setattr("sys.argv", ["program", "--config.n", "7"])
    assert run_command(Config, seen.append) == 0
    assert seen[0].config.n == 7


def test_hardware_is_initialized_before_the_experiment_and_after_parallel():
    order = []

    class Section:
        def __init__(self, name):
            self.name = name

        def initialize(self):
            order.append(self.name)

    @dataclasses.dataclass(frozen=True)
    class Sections(Config):
        @property
        def parallel(self):
            return Section("parallel")

        @property
        def hardware(self):
            return Section("hardware")

    assert run_command(Sections, lambda parsed: order.append("experiment"), []) == 0
    assert order == ["parallel", "hardware", "experiment"]
