"""Kills a training run with `kill -9` at random moments, and shows that it ends with the bits of one never killed.

    python -m tests.faults.prove_kill [--kills 20] [--seed 0]

The run is `short_cnn.py`: a CNN with dropout and augmentation, 10.7 epochs, a checkpoint every ten steps. It is trained
once straight through. Then it is trained again while the process is killed, each time after a random part of the
seconds that a process lives (so also in the middle of imports, of compiling, of saving and of the report), and started
anew, until it is complete; and all that again in a new folder until the wished number of kills has happened. A run
that is killed with its last checkpoint saved is started once more and left to end. Every completed run is compared
with the first one: each leaf of the restored final checkpoint (sha256), `metrics.jsonl` byte for byte, and what the
steps were given (see `logged_rows`): every life's batches, rows and pixels, are those of the straight run.

Compiled programs come from a cache on disk, so that a restart is quick; it starts empty and is killed along with the
process. The exit code is 1 if anything differs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdl.checkpoint import folders
from tests.faults import evidence

ASPECTS = ("parameters", "optimizer state", "extra", "metric log", "row order")


class Kill(NamedTuple):
    """What a kill interrupted.

    Attributes:
      seconds: after the start of the process.
      newest: the step of the checkpoint that the next start goes on from; None where it begins anew.
      taken: batches that this process had given to the device.
      is_saving: a save was cut off, a step folder is there without a manifest.
    """

    run: int
    seconds: float
    newest: int | None
    taken: int
    is_saving: bool


class Life:
    """One process that trains in `folder`."""

    def __init__(self, folder: Path, cache: Path, config: str) -> None:
        self.folder, self.log = folder, folder / "rows.log"
        folder.mkdir(exist_ok=True)
        self._n_before = self._n_lines()
        words = [sys.executable, "-m", "tests.faults.logged_rows", str(self.log), "--config", config]
        environment = {**os.environ, "PYTHONPATH": str(evidence.ROOT), "JAX_COMPILATION_CACHE_DIR": str(cache)}
        environment["JAX_PLATFORMS"] = "cpu"
        self._output = (folder / "output.txt").open("a")
        self.begin = time.perf_counter()
        self.process = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=self._output, stderr=self._output, stdin=subprocess.DEVNULL
        )

    def _n_lines(self) -> int:
        return self.log.read_bytes().count(b"\n") if self.log.exists() else 0

    def end(self) -> float:
        """Waits for the end; returns the seconds that the process lived."""
        code = self.process.wait(timeout=300)
        self._output.close()
        if code:
            tail = "\n".join((self.folder / "output.txt").read_text().splitlines()[-20:])
            raise SystemExit(f"a run ended with exit code {code}:\n{tail}")
        return time.perf_counter() - self.begin

    def kill(self, seconds: float, number: int) -> Kill | None:
        """Kills the process after so many seconds; None if it had ended before."""
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self._output.close()
            return self._report(number)
        self.end()
        return None

    def _report(self, number: int) -> Kill:
        directory = self.folder / "run" / "checkpoints"
        whole = folders.complete(directory)
        entries = [path.name for path in directory.iterdir()] if directory.is_dir() else []
        is_saving = any(not (name.isdecimal() and int(name) in whole) for name in entries)
        seconds, taken = time.perf_counter() - self.begin, self._n_lines() - self._n_before
        return Kill(number, seconds, max(whole, default=None), taken, is_saving)


def train_killed(
    folder: Path, number: int, start: Callable[[Path], Life], delays: Iterator[float], last_step: int
) -> Iterator[Kill]:
    """Trains to the end, killed after each of `delays` until there are none left or the last step is saved."""
    while True:
        life, delay = start(folder), next(delays, None)
        if delay is None:
            life.end()
            return
        kill = life.kill(delay, number)
        if kill is None:
            return
        yield kill
        if kill.newest == last_step:
            delays = iter(())


def rows(folder: Path) -> dict[int, set[str]]:
    """The distinct lines `rows<TAB>digest` of each step, over all lives of a run."""
    found: dict[int, set[str]] = {}
    for line in (folder / "rows.log").read_text().splitlines():
        step, _, given = line.partition("\t")
        found.setdefault(int(step), set()).add(given)
    return found


def differences(straight: Path, killed: Path) -> dict[str, bool]:
    """Which of `ASPECTS` differ between two completed runs."""
    one, other = (evidence.state(folder / "run") for folder in (straight, killed))
    parts = ("params", "opt_state", "extra")
    by_part = {
        aspect: one.step != other.step or one.parts.get(part, {}) != other.parts.get(part, {})
        for aspect, part in zip(ASPECTS, parts, strict=False)
    }
    is_damaged = bool(evidence.damage(killed / "run")) or one.parts.keys() != other.parts.keys()
    logs = [evidence.metric_log(folder / "run") for folder in (straight, killed)]
    return {
        **by_part,
        "parameters": by_part["parameters"] or is_damaged or not one.parts["params"],
        "metric log": logs[0] != logs[1] or not logs[0],
        "row order": rows(straight) != rows(killed) or sorted(rows(straight)) != list(range(one.step)),
    }


def table(kills: Sequence[Kill]) -> str:
    """A Markdown table, one row a kill."""
    lines = [
        "| kill | run | seconds after start | steps made | save cut off | newest step on restart |",
        "|---:|---:|---:|---:|---|---:|",
    ]
    for number, kill in enumerate(kills, 1):
        newest = "none" if kill.newest is None else kill.newest
        saving = "yes" if kill.is_saving else ""
        lines.append(f"| {number} | {kill.run} | {kill.seconds:.2f} | {kill.taken} | {saving} | {newest} |")
    return "\n".join(lines)


def verdict(found: Sequence[dict[str, bool]]) -> str:
    """The last line of the proof.

    Example:
      >>> verdict([{"parameters": False, "metric log": False}, {"parameters": False, "metric log": True}])
      'different: metric log'
    """
    wrong = [aspect for aspect in found[0] if any(run[aspect] for run in found)]
    if wrong:
        return f"different: {', '.join(wrong)}"
    return "identical: parameters, optimizer state, metric log, row order"


def prove(
    workspace: Path, n_kills: int, seed: int, *, config: str = evidence.SHORT_CNN, cache: Path | None = None
) -> tuple[list[Kill], list[dict[str, bool]]]:
    """Trains straight, then killed until `n_kills` have happened.

    Args:
      workspace: an empty folder.
      n_kills: how many.
      seed: of the moments.
      config: what is trained.
      cache: of compiled programs; None starts an empty one.

    Returns:
      The kills, and the differences of each completed run from the straight one.
    """

    def start(folder: Path) -> Life:
        return Life(folder, cache or workspace / "cache", config)

    straight = workspace / "straight"
    is_cold = cache is None or not cache.exists()
    life_s = start(straight).end()
    if is_cold:
        life_s = start(workspace / "compiled").end()
    rng = np.random.default_rng(seed)
    kills: list[Kill] = []
    found: list[dict[str, bool]] = []
    while len(kills) < n_kills:
        number = len(found) + 1
        folder = workspace / f"killed-{number}"
        delays = iter(rng.uniform(0, life_s, n_kills - len(kills)).tolist())
        kills += train_killed(folder, number, start, delays, evidence.steps(straight / "run")[-1])
        found.append(differences(straight, folder))
    return kills, found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="kill -9 at random moments")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        kills, found = prove(Path(folder), options.kills, options.seed)
    print(f"{table(kills)}\n\n{len(kills)} kills over {len(found)} completed run(s)\n{verdict(found)}")
    return 1 if any(any(run.values()) for run in found) else 0


if __name__ == "__main__":
    sys.exit(main())
