"""SIGTERM and Ctrl-C in every phase: exit code 0, a message, and the same end as a run that nothing disturbed."""

import pkgutil
import signal
import time

import pytest

from tests.faults import evidence
from tests.faults.conftest import ended


def at_call(monkeypatch, target: str, number: int, which: int) -> list[int]:
    """Sends a signal to this process just before call number `which` of a function; returns where the calls count."""
    path, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(path)
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(len(calls))
        if len(calls) == which:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)
    return calls


# What is called when, how often before the signal, and the step at which the run stops.
PHASES = {
    "compile": ("jaxdl.compilation:Compiled.compile", 1, 1),
    "steps": ("jaxdl.feed:ResidentFeed.call", 7, 7),
    "evaluation": ("jaxdl.data.pipeline:EvalBatches.__getitem__", 2, 10),
    "last evaluation": ("jaxdl.data.pipeline:EvalBatches.__getitem__", 7, 20),
    "save": ("jaxdl.checkpoint.store:Store.save", 2, 10),
    "background save": ("jaxdl.checkpoint.manifest.write", 1, None),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_saves_and_the_next_start_ends_with_the_same_bits(
    command, empty, trained, monkeypatch, stray_signals, phase, number
):
    target, which, stops_at = PHASES[phase]
    monkeypatch.setattr("experiments.classify_images.write_report", lambda path, report: path)
    with monkeypatch.context() as patch:
        calls = at_call(patch, target, number, which)
        done = command()
    assert len(calls) >= which, "the signal was never sent"
    assert done.code == 0, done.err
    assert not stray_signals
    assert f"{number.name}: saving and stopping" in done.err or stops_at is None
    assert f"stopped by {number.name}; saved in run. Run the same command to go on." in done.out
    assert "Traceback" not in done.err
    assert evidence.damage(empty) == {}
    assert stops_at in (None, evidence.steps(empty)[-1])
    again = command()
    assert again.code == 0, again.err
    assert "resumed from the checkpoint of step" in again.err
    assert evidence.state(empty) == evidence.state(trained)
    assert evidence.metric_log(empty) == evidence.metric_log(trained)


def test_starting_a_complete_run_again_changes_nothing(command, run, trained, monkeypatch):
    monkeypatch.setattr("experiments.classify_images.write_report", lambda path, report: path)
    for _ in range(2):
        assert command().code == 0
    assert evidence.metric_log(run) == evidence.metric_log(trained)
    assert (run / "metrics.csv").read_bytes() == (trained / "metrics.csv").read_bytes()
    assert evidence.state(run) == evidence.state(trained)


def test_a_run_that_stopped_early_is_over_when_it_is_started_again(command, empty, monkeypatch):
    monkeypatch.setattr("experiments.classify_images.write_report", lambda path, report: path)
    flags = "--config.data.validation 0.2 --config.loop.early_stopping_patience 1 --config.optimizer.learning_rate 0.9"
    flags += " --config.loop.eval_every 2 --config.loop.length 40"
    assert command(*flags.split()).code == 0
    state, log = evidence.state(empty), evidence.metric_log(empty)
    assert state.step < 40, "the rate is too high for the validation loss to fall at every evaluation"
    assert command(*flags.split()).code == 0
    assert evidence.state(empty) == state
    assert evidence.metric_log(empty) == log


def test_a_second_ctrl_c_ends_at_once_and_keeps_what_is_saved(command, half, monkeypatch, stray_signals):
    def twice(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("jaxdl.feed.ResidentFeed.call", twice)
    done = command()
    assert done.code == 130
    assert "Traceback" not in done.err
    assert "checkpoint is intact" in done.err
    assert evidence.steps(half) == [10]
    assert evidence.damage(half) == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_from_outside_to_a_real_process(empty, start, number):
    """As `kill` or Ctrl-C sends it, after the first checkpoint of a run of many steps."""
    flags = ("--config", evidence.TINY_MLP, "--config.loop.length", "1000000", "--config.loop.eval_every", "1000000")
    process = start(*flags)
    deadline = time.monotonic() + 60
    while not evidence.steps(empty) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    done = ended(process)
    assert done.code == 0, done.err
    assert f"stopped by {number.name}" in done.out
    assert "Traceback" not in done.err
    assert done.seconds < 20
    assert evidence.damage(empty) == {}
    step = evidence.steps(empty)[-1]
    assert f"step {step}" in done.err or step % 5, "it saved where it stood"
