"""A process of several dies or hangs in mid-run: all others end in time and say who; the next start goes on."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxdl.checkpoint import folders
from jaxdl.report import read_history
from tests import many_processes
from tests.faults import evidence
from tests.test_processes import (
    CACHED,
    assert_same_losses,
    free_port,
    launched,
    program,
    running,
    started,
    until,
    wait_for,
)

__all__ = ["running"]  # a fixture

HEARTBEAT_S = 2.0
DEAD_S, HANGING_S = 5.0, HEARTBEAT_S + 5.0  # within which the others are gone, on a busy machine of two cores


def interrupted(tmp_path, running, number, victim, count=2, mesh="data=-1"):
    """Runs `count` processes, sends one a signal after the first checkpoint, and gives what the others said."""
    words = program("mlp", "--folder", tmp_path, "--mesh", mesh, "--pause-s", 0.1, "--heartbeat-s", HEARTBEAT_S)
    port = free_port()
    running += [started(i, count, port, words) for i in range(count)]
    wait_for(tmp_path / "mlp" / "losses.jsonl", '"step": 7,')
    start = time.monotonic()
    running[victim].send_signal(number)
    others = [process for i, process in enumerate(running) if i != victim]
    said = [process.communicate(timeout=30)[1] for process in others]
    return [process.returncode for process in others], said, time.monotonic() - start


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    many_processes.train("mlp", folder / "mlp", mesh="data=1", steps=20)
    return folder


@pytest.mark.parametrize(
    ("number", "victim", "within_s"),
    [(signal.SIGKILL, 1, DEAD_S), (signal.SIGKILL, 0, DEAD_S), (signal.SIGSTOP, 1, HANGING_S)],
    ids=["killed", "the first killed", "hanging"],
)
def test_the_other_process_ends_and_says_who(tmp_path, running, straight, number, victim, within_s):
    codes, [said], seconds = interrupted(tmp_path, running, number, victim)
    assert codes == [1], said
    assert seconds < within_s
    assert f"error: process {victim} (host " in said
    assert f", pid {running[victim].pid}) is gone: " in said
    assert re.search(r"Its last word, \d\.\d s before, came from (step|the save of step) \d+\. process", said), said
    assert f"process {1 - victim} (host " in said
    assert "Start all processes again to go on from the last checkpoint." in said
    assert "Traceback" not in said
    assert folders.damage(tmp_path / "mlp" / "checkpoints" / "5") is None
    many_processes.train("mlp", tmp_path / "mlp", mesh="data=1", steps=20)
    assert_same_losses(tmp_path / "mlp", straight / "mlp")


@pytest.mark.proof
def test_one_of_four_killed_ends_all_and_four_go_on(tmp_path, running, straight):
    codes, said, seconds = interrupted(tmp_path, running, signal.SIGKILL, 2, count=4)
    assert codes == [1, 1, 1], said
    assert seconds < DEAD_S
    assert all("error: process 2 (host " in text for text in said)
    port, words = free_port(), program("mlp", "--folder", tmp_path)
    again = [started(i, 4, port, words) for i in range(4)]
    running += again
    ended = [process.communicate(timeout=90) for process in again]
    assert [process.returncode for process in again] == [0] * 4, ended
    assert_same_losses(tmp_path / "mlp", straight / "mlp")


def experiment(run, *flags):
    words = [sys.executable, "-m", "experiments.classify_images", "--config", evidence.TINY_MLP]
    return [*words, "--config.parallel.mesh", "data=2", "--config.out", str(run), *flags]


def test_two_processes_go_on_with_an_experiment_that_one_began(half, trained):
    done = launched(2, experiment(half))
    assert done.returncode == 0, done.stderr
    assert "[0] resumed from the checkpoint of step 10" in done.stderr
    assert done.stdout.count("test accuracy") == 1
    assert "[1] test accuracy" not in done.stdout
    assert (half / "report.html").exists()
    assert evidence.damage(half) == {}
    ours, theirs = (read_history(run / "metrics.jsonl") for run in (half, trained))
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(list(mine.values()), list(other.values()), rtol=1e-5, atol=1e-7)


def test_a_signal_to_the_launcher_saves_and_stops_all(empty):
    words = [sys.executable, "-m", "jaxdl", "launch", "-n", "2", "--cpu-devices", "1", "--"]
    flags = ("--config.loop.length", "1000000", "--config.loop.eval_every", "1000000")
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [*words, *experiment(empty, *flags)], cwd=evidence.ROOT, env={**os.environ, **CACHED}, stdout=pipe, stderr=pipe
    )
    try:
        assert until(lambda: evidence.steps(empty), 90)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, err.decode()
    assert out.decode().count("stopped by SIGTERM; saved in ") == 1
    assert "Traceback" not in err.decode()
    assert evidence.damage(empty) == {}


def test_a_process_that_never_comes_is_named_by_an_experiment(command, empty):
    place = f"--config.parallel.coordinator=127.0.0.1:{free_port()} --config.parallel.process_count=2"
    done = command(*place.split(), "--config.parallel.process_index=0", "--config.parallel.deadline_s=1")
    assert done.code == 1
    assert "error: of 2 processes 1 did not come within 1 s; here: process 0 (host " in done.err
    assert done.seconds < 5
    assert not empty.exists()
