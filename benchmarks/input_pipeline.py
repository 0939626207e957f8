"""Rows a second of the input pipeline over arrays in memory: what a batch costs the host before any training."""

import time
from typing import Any

import numpy as np

from benchmarks.harness import Competitor, Settings, measure, spread
from benchmarks.table import Table, not_run, time_cell

N_ROWS, BATCH_SIZE = 20_000, 128
# name -> (shape of an image, crop and flip it, batches of a round)
WORKLOADS = {
    "28x28x1 uint8, gather": ((28, 28, 1), False, 2000),
    "28x28x1 uint8, crop and flip": ((28, 28, 1), True, 60),
    "32x32x3 uint8, gather": ((32, 32, 3), False, 2000),
    "32x32x3 uint8, crop and flip": ((32, 32, 3), True, 60),
}


class Reader:
    """Reads batches with shuffled rows, in the foreground or through `prefetch`; a unit of work is one row."""

    def __init__(self, shape: list[int], is_augmented: bool, is_ahead: bool) -> None:
        from jaxdl.data import ArraySource, Pipeline
        from jaxdl.data.augment import random_crop, random_flip

        rng = np.random.default_rng(0)
        source = ArraySource(
            {
                "image": rng.integers(0, 256, (N_ROWS, *shape), dtype=np.uint8),
                "label": rng.integers(0, 10, N_ROWS, dtype=np.int32),
            }
        )
        transforms = (random_crop(shape[0] // 8), random_flip()) if is_augmented else ()
        self.data = Pipeline(source, batch_size=BATCH_SIZE, transforms=transforms)
        self.is_ahead, self.done = is_ahead, 0

    def round(self, batches: int) -> float:
        """Seconds of a row, over consecutive batches; the first few are not timed."""
        self._read(max(2, batches // 10))
        start = time.perf_counter()
        self._read(batches)
        return (time.perf_counter() - start) / (batches * BATCH_SIZE)

    def _read(self, batches: int) -> None:
        from jaxdl.data import prefetch

        first, self.done = self.done, self.done + batches
        window: Any = range(first, self.done)
        read = prefetch(self.data, first, self.done) if self.is_ahead else (self.data[step] for step in window)
        n_rows = sum(len(batch["label"]) for batch in read)
        if n_rows != batches * BATCH_SIZE:
            raise RuntimeError(f"{n_rows} rows were read, not {batches * BATCH_SIZE}")


def run(settings: Settings) -> list[Table]:
    """One table, a line for each workload with and without `prefetch`."""
    competitors = [
        Competitor(
            f"{name}{', prefetch' if is_ahead else ''}",
            "benchmarks.input_pipeline:Reader",
            {"shape": shape, "is_augmented": is_augmented, "is_ahead": is_ahead},
            {"batches": max(5, batches // 10) if settings.is_quick else batches},
        )
        for name, (shape, is_augmented, batches) in WORKLOADS.items()
        for is_ahead in (False, True)
    ]
    results = measure(competitors, settings)
    table = Table(
        f"Input pipeline: {N_ROWS:,} rows in memory, batches of {BATCH_SIZE}",
        ["", "rows a second", "time of a batch"],
        results=results,
        notes=["The consumer does nothing, so `prefetch` shows what handing a batch over costs, not what it hides."],
    )
    for result in results:
        if result.failure:
            table.rows.append(not_run(result.name, result.failure, 3))
            continue
        rates = spread([1 / seconds for seconds in result.seconds])
        batch = spread([BATCH_SIZE * seconds for seconds in result.seconds])
        rate = f"{rates.median:,.0f} ({rates.low:,.0f} .. {rates.high:,.0f})"
        table.rows.append([result.name, rate, time_cell(batch)])
    return [table]
