"""One run, trained once, that every fault test copies and breaks; commands end in an exit code and two texts."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from experiments import classify_images
from jaxdl.command import run_command
from tests.faults.evidence import ROOT, TINY_MLP

CACHE = str(ROOT / ".pytest_cache" / "xla")


class Ended(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float


def classify(*flags: str) -> int:
    return run_command(classify_images.Config, classify_images.experiment, ["--config", TINY_MLP, *flags])


@pytest.fixture(autouse=True)
def compile_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", CACHE)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `tiny_mlp.py` that nothing disturbed; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", CACHE)
        assert classify() == 0
    return folder / "run"


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run folder of a command that has not been given yet; the working directory is its parent."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.fixture
def run(empty: Path, trained: Path) -> Path:
    """A copy of the trained run, complete at step 20 with the checkpoints 10, 15 and 20."""
    shutil.copytree(trained, empty)
    return empty


@pytest.fixture
def half(run: Path) -> Path:
    """A run that was killed after the checkpoint of step 10."""
    for step in ("15", "20"):
        shutil.rmtree(run / "checkpoints" / step)
    return run


@pytest.fixture
def command(empty: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs `classify_images` on `tiny_mlp.py` in this process."""

    def call(*flags: str, entry: Callable[..., int] = classify) -> Ended:
        capfd.readouterr()
        start = time.perf_counter()
        code = entry(*flags)
        return Ended(code, *capfd.readouterr(), time.perf_counter() - start)

    return call


@pytest.fixture
def start(empty: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `python -m experiments.classify_images` as a user does; `before` is put in front of the command."""
    started: list[subprocess.Popen[str]] = []

    def call(*flags: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        words = [*before, sys.executable, "-m", "experiments.classify_images", *flags]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(words, cwd=empty.parent, env=environment, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield call
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def ended(process: subprocess.Popen[str], timeout: float = 60) -> Ended:
    begin = time.perf_counter()
    out, err = process.communicate(timeout=timeout)
    return Ended(process.returncode, out, err, time.perf_counter() - begin)


@pytest.fixture
def stray_signals() -> Iterator[list[int]]:
    """Catches signals that nobody in the library caught, so that a fault there is a failed test and not a dead one."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    strays: list[int] = []
    before = [signal.signal(number, lambda got, _: strays.append(got)) for number in numbers]
    yield strays
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
