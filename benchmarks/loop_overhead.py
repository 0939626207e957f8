"""What `jaxdl.loop.fit` adds to a step: a bare `for` loop over the same jitted step and the same host batches.

`fit` runs with everything on but evaluation: a progress bar on a terminal, JSONL, CSV and TensorBoard rows every
LOG_EVERY steps, the metrics of every step, one asynchronous checkpoint a round. The bare loop is the fastest honest
one: `jax.jit` with donation, `jax.device_put` of each batch, no metrics fetched. The step is guarded in both.
"""

import json
import os
import queue
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Competitor, Result, Settings, check_same_losses, measure, speed_up, spread
from benchmarks.machine import use_full_float32
from benchmarks.mlp import Batches
from benchmarks.network import flops_per_step, make_jaxdl
from benchmarks.table import Table, not_run, ratio_cell, time_cell
from benchmarks.training import TOLERANCE

LOG_EVERY = 50
AIM, AIM_FROM_S = 0.98, 0.004  # of the bare loop's throughput, for steps of about 5 ms and longer
# about what a step takes on two cores -> (layer sizes, batch size, steps of a round)
WORKLOADS = {
    "1 ms": ((784, 128, 128, 10), 128, 1000),
    "5 ms": ((784, 512, 512, 10), 160, 1000),
}


class Bare:
    """The bare loop; `first_losses` holds the mean loss of the first LOG_EVERY steps."""

    def __init__(self, sizes: Sequence[int], batch_size: int, steps: int) -> None:
        import jax

        from jaxdl import compiler_options, guard

        use_full_float32()
        self.batches, self.steps, self.done = Batches(sizes, batch_size), steps, 0
        step, self.state = make_jaxdl(sizes)
        step = guard(step)
        options = compiler_options(step, self.state, self.batches[0])
        self.call = jax.jit(step, donate_argnums=0, compiler_options=options)
        losses = [self._step()["loss"].finish() for _ in range(LOG_EVERY)]
        self.facts = {"first_losses": [float(np.mean(losses))]}

    def _step(self) -> Any:
        import jax

        self.state, metrics = self.call(self.state, jax.device_put(self.batches[self.done]))
        self.done += 1
        return metrics

    def round(self) -> float:
        """Seconds of a step."""
        import jax

        start = time.perf_counter()
        for _ in range(self.steps):
            self._step()
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / self.steps


class InMemory:
    """The same batches as `fit` takes them; with `is_resident`, it keeps their rows on the device."""

    def __init__(self, sizes: Sequence[int], batch_size: int, is_resident: bool = False) -> None:
        self.batches, self.batch_size = Batches(sizes, batch_size), batch_size
        self.n_rows = self.batches.rows.size
        if is_resident:
            from jaxdl.data import ArraySource

            self.source = ArraySource({"features": self.batches.features, "label": self.batches.label})

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.batches[step]

    def rows(self, step: int) -> np.ndarray:
        return self.batches.rows[step % len(self.batches.rows)]


class Fit:
    """One long `fit` in a thread; an evaluator that evaluates nothing holds it between two rounds.

    A round lasts from the moment it is let go until the state after its last update is finished. `fit` saves after it
    evaluates, so each round begins with a checkpoint, and its writing competes with the steps of the round. The first
    interval, which compiles, is not timed and checks the losses: `first_losses` is the first row of the metric log.

    Args:
      sizes, batch_size: of the MLP.
      steps: of a round.
      directory: of logs and checkpoints.
      is_saving: with a checkpoint a round.
      is_resident: the rows lie on the device.
      steps_per_call: of `fit`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        steps: int,
        directory: str,
        is_saving: bool = True,
        is_resident: bool = False,
        steps_per_call: int = 1,
    ) -> None:
        use_full_float32()
        self.sizes, self.batch_size, self.steps = sizes, batch_size, steps
        self.is_resident, self.steps_per_call = is_resident, steps_per_call
        self.directory, self.is_saving = Path(tempfile.mkdtemp(dir=directory)), is_saving
        self.go: queue.Queue[None] = queue.Queue()
        self.arrived: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()
        self._wait()
        row = json.loads((self.directory / "metrics.jsonl").read_text().splitlines()[0])
        self.facts = {"first_losses": [row["train/loss"]]}

    def round(self) -> float:
        """Seconds of a step."""
        start = time.perf_counter()
        self.go.put(None)
        return (self._wait() - start) / self.steps

    def _wait(self) -> float:
        arrived = self.arrived.get()
        if isinstance(arrived, BaseException):
            raise arrived
        return arrived

    def _work(self) -> None:
        try:
            self._fit()
        except BaseException as error:  # goes to the thread that waits
            self.arrived.put(error)

    def _fit(self) -> None:
        from jaxdl import guard
        from jaxdl.checkpoint import Store
        from jaxdl.loop import fit
        from jaxdl.report.progress import Progress
        from jaxdl.report.writers import CsvWriter, JsonlWriter, TensorBoardWriter

        step, state = make_jaxdl(self.sizes)
        fit(
            state,
            guard(step),
            InMemory(self.sizes, self.batch_size, self.is_resident),
            steps=10**9,
            steps_per_call=self.steps_per_call,
            evaluators={"gate": self._gate},
            eval_every=self.steps,
            store=Store(self.directory / "checkpoints") if self.is_saving else None,
            checkpoint_every=self.steps,
            writers=[
                JsonlWriter(self.directory / "metrics.jsonl"),
                CsvWriter(self.directory / "metrics.csv"),
                TensorBoardWriter(self.directory / "tensorboard"),
            ],
            log_every=LOG_EVERY,
            progress=Progress(10**9, stream=open_terminal(), examples_per_step=self.batch_size),
        )

    def _gate(self, state: Any, stop: Any) -> dict[str, Any]:
        import jax

        jax.block_until_ready(state)
        self.arrived.put(time.perf_counter())
        self.go.get()
        return {}


def open_terminal() -> Any:
    """A text stream into a pseudo-terminal that somebody reads: the progress bar is drawn as for a person."""
    import pty

    reader, writer = pty.openpty()

    def read() -> None:
        with suppress(OSError):  # the other end is closed
            while os.read(reader, 1 << 16):
                pass

    threading.Thread(target=read, daemon=True).start()
    return os.fdopen(writer, "w", buffering=1)


BARE, FIT, NOT_SAVING, PEAK = "bare loop", "fit", "fit without checkpoints", "matrix product"


def run(settings: Settings) -> list[Table]:
    """One table; each step time is measured on its own."""
    table = Table(
        "What `fit` adds to a step",
        ["step", "bare loop", "fit", "throughput against the bare loop", "without checkpoints", "bare, of the peak"],
    )
    results: list[Result] = []
    for name, (sizes, batch_size, steps) in WORKLOADS.items():
        steps = max(2 * LOG_EVERY, steps // 10) if settings.is_quick else steps
        with tempfile.TemporaryDirectory() as directory:
            found = _measure(settings, sizes, batch_size, directory, steps)
        _add(table, name, found, (sizes, batch_size, steps))
        results += [replace(result, name=f"{name}: {result.name}") for result in found]
    table.results = results
    return [table]


def _measure(settings: Settings, sizes: Sequence[int], batch_size: int, directory: str, steps: int) -> list[Result]:
    work = {"sizes": sizes, "batch_size": batch_size, "steps": steps}
    terminal = {"TERM": "xterm-256color", "COLUMNS": "100"}
    fit = "benchmarks.loop_overhead:Fit"
    results = measure(
        [
            Competitor(BARE, "benchmarks.loop_overhead:Bare", work),
            Competitor(FIT, fit, {**work, "directory": directory}, environment=terminal),
            Competitor(NOT_SAVING, fit, {**work, "directory": directory, "is_saving": False}, environment=terminal),
            Competitor(PEAK, "benchmarks.machine:Matmul"),
        ],
        settings,
    )
    check_same_losses(results[:3], TOLERANCE)
    return results


def _add(table: Table, name: str, results: Sequence[Result], work: tuple[Sequence[int], int, int]) -> None:
    bare, fit, not_saving, peak = results
    sizes, batch_size, steps = work
    if bare.failure or fit.failure:
        table.rows.append(not_run(name, bare.failure or fit.failure or "", len(table.columns)))
        return
    ratio = speed_up(fit, bare)
    share = flops_per_step(sizes, batch_size) / bare.median_s * peak.median_s
    shape = f"MLP {'-'.join(map(str, sizes))}, batch {batch_size}"
    table.rows.append(
        [
            f"about {name}: {shape}",
            time_cell(spread(bare.seconds)),
            time_cell(spread(fit.seconds)),
            ratio_cell(ratio, digits=3),
            ratio_cell(speed_up(not_saving, bare), digits=3),
            "-" if peak.failure else f"{100 * share:.0f} %",
        ]
    )
    if ratio is not None:
        table.notes.append(verdict(name, bare.median_s, ratio.median) + f" One checkpoint every {steps} steps.")


def verdict(name: str, step_s: float, ratio: float) -> str:
    """How a row stands to the aim, in words.

    Example:
      >>> verdict("5 ms", 0.005, 0.97)
      '5 ms: 0.970, the aim of 0.98 is missed.'
    """
    if step_s < AIM_FROM_S:
        return f"{name}: {ratio:.3f}, without an aim."
    return f"{name}: {ratio:.3f}, the aim of {AIM} is {'reached' if ratio >= AIM else 'missed'}."
