"""Rows a second of input pipelines over arrays in memory: what a batch costs the host before any training.

Every loader shuffles the same source, which jaxdl, PyTorch and Grain all take as it is. jaxdl crops and flips all rows
of a batch at once, the others one by one, in the few lines of NumPy that one writes for it. That each row comes once in
the first epoch is checked. A core's rate is the rows over the processor time that reading them took, in all threads and
workers.

Dimensions: `T` time.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.harness import BenchmarkError, Competitor, Result, Settings, measure, spread
from benchmarks.table import Table, not_run, time_cell

BATCH_SIZE = 128
LENGTH, DOCUMENT_TOKENS = 256, (20, 200)
# name -> (source, rows, transforms, batches of a round by the class that reads them)
WORKLOADS = {
    "32x32x3 uint8": ("images", 160 * BATCH_SIZE, False, {"Jaxdl": 5000, "Torch": 160, "Grain": 160}),
    "32x32x3 uint8, crop and flip": ("images", 160 * BATCH_SIZE, True, {"Jaxdl": 160, "Torch": 160, "Grain": 40}),
    f"documents packed to {LENGTH} tokens": ("text", 40 * BATCH_SIZE, False, {"Jaxdl": 200, "Torch": 200, "Grain": 50}),
}


def make_source(kind: str, n_rows: int) -> Any:
    """`images`: "image" uint8 and "label"; `text`: documents of random lengths, packed side by side."""
    from jaxdl.data import ArraySource
    from jaxdl.data.text import PackedDocuments, TokenStream

    rng = np.random.default_rng(0)
    if kind == "images":
        image = rng.integers(0, 256, (n_rows, 32, 32, 3), dtype=np.uint8)
        return ArraySource({"image": image, "label": np.arange(n_rows, dtype=np.int32)})
    n_documents = n_rows * LENGTH // DOCUMENT_TOKENS[0]
    starts = np.concatenate([[0], np.cumsum(rng.integers(*DOCUMENT_TOKENS, n_documents))])
    starts = starts[: np.searchsorted(starts, n_rows * LENGTH)]
    ids = rng.integers(1, 30_000, starts[-1], dtype=np.uint16)
    return Sized(PackedDocuments(TokenStream(ids, starts), LENGTH, pad_id=0))


class Sized:
    """The rows of a packed source, cut to whole batches: `[row]` and `take`."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source) // BATCH_SIZE * BATCH_SIZE

    def __getitem__(self, row: int) -> Any:
        return self.source[row]

    def take(self, rows: np.ndarray) -> Any:
        return self.source.take(rows)


PADDING = 4


def crop_and_flip(example: Any, rng: np.random.Generator) -> Any:
    """A crop of one image after padding by PADDING, and a flip of half of them."""
    image = example["image"]
    height, width, _ = image.shape
    top, left = rng.integers(0, 2 * PADDING + 1, size=2)
    image = np.pad(image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))[top : top + height, left : left + width]
    return {**example, "image": image[:, ::-1] if rng.random() < 0.5 else image}


class _Reader:
    """Reads batches one after the other, over and over; a unit of work is one row."""

    def __init__(self, source: str, n_rows: int, is_augmented: bool, **options: Any) -> None:
        data = make_source(source, n_rows)
        self.batches = self.open(data, self.transforms() if is_augmented else [], **options)
        key, n_batches = "label" if source == "images" else "tokens", len(data) // BATCH_SIZE
        epoch = [next(self.batches)[key] for _ in range(n_batches)]
        self.facts = {"checksum": sum(int(np.asarray(part).astype(np.int64).sum()) for part in epoch)}

    def transforms(self) -> list[Any]:
        """`(example, rng) -> example`."""
        return [crop_and_flip]

    open: Callable[..., Iterator[Any]]  # (source, transforms, **options) -> batches without end, epoch after epoch

    def round(self, batches: int) -> dict[str, float]:
        """Seconds of a row, and processor seconds of a row, over consecutive batches."""
        start, cpu = time.perf_counter(), cpu_seconds()
        for batch in itertools.islice(self.batches, batches):
            if len(next(iter(batch.values()))) != BATCH_SIZE:
                raise RuntimeError(f"a batch has not {BATCH_SIZE} rows")
        n_rows = batches * BATCH_SIZE
        return {
            "seconds": (time.perf_counter() - start) / n_rows,
            "cpu_s": (cpu_seconds() - cpu) / n_rows,
        }


def cpu_seconds() -> float:
    """Processor time of this process and, where `psutil` is there, of the workers that it has started."""
    try:
        import psutil
    except ModuleNotFoundError:
        return time.process_time()
    workers = [child.cpu_times() for child in psutil.Process(os.getpid()).children(recursive=True)]
    return time.process_time() + sum(times.user + times.system for times in workers)


class Jaxdl(_Reader):
    """`jaxdl.data.Pipeline`, in the foreground or through `prefetch`."""

    def transforms(self) -> list[Any]:
        """The same, of jaxdl."""
        from jaxdl.data.augment import random_crop, random_flip

        return [random_crop(PADDING), random_flip()]

    def open(self, source: Any, transforms: Sequence[Any], is_ahead: bool = False) -> Iterator[Any]:
        from jaxdl.data import Pipeline, prefetch

        data = Pipeline(source, batch_size=BATCH_SIZE, transforms=tuple(transforms))
        if is_ahead:
            return iter(prefetch(data, 0, 10**9))
        return (data[step] for step in itertools.count())


class Torch(_Reader):
    """`torch.utils.data.DataLoader` with its own shuffling and collation."""

    def open(self, source: Any, transforms: Sequence[Any], n_workers: int) -> Iterator[Any]:
        import torch

        rows: Any = Transformed(source, transforms)
        loader: Any = torch.utils.data.DataLoader(
            rows,
            batch_size=BATCH_SIZE,
            shuffle=True,
            num_workers=n_workers,
            persistent_workers=n_workers > 0,
        )
        return itertools.chain.from_iterable(itertools.repeat(loader))


class Transformed:
    """A source whose rows go through transforms as they are read, as a PyTorch `Dataset` does it.

    PyTorch takes no views that run backwards, which a flip gives.
    """

    def __init__(self, source: Any, transforms: Sequence[Any]) -> None:
        self.source, self.transforms, self.rng = source, transforms, np.random.default_rng()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> Any:
        example = self.source[row]
        for transform in self.transforms:
            example = transform(example, self.rng)
        return {name: np.ascontiguousarray(value) for name, value in example.items()} if self.transforms else example


class Grain(_Reader):
    """`grain.MapDataset` of batches, read ahead by threads; its default of 16 threads is slower on a few cores."""

    def open(self, source: Any, transforms: Sequence[Any], n_threads: int) -> Iterator[Any]:
        import grain

        rows = grain.MapDataset.source(source).seed(0).shuffle().repeat()
        for transform in transforms:
            rows = rows.random_map(transform)
        options = grain.ReadOptions(num_threads=n_threads, prefetch_buffer_size=2 * n_threads)
        return iter(rows.batch(BATCH_SIZE, drop_remainder=True).to_iter_dataset(options))


SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "jaxdl": ("Jaxdl", {}),
    "jaxdl, prefetch": ("Jaxdl", {"is_ahead": True}),
    "PyTorch DataLoader": ("Torch", {"n_workers": 0}),
    "PyTorch DataLoader, 2 workers": ("Torch", {"n_workers": 2}),
    "Grain, 2 threads": ("Grain", {"n_threads": 2}),
}


def run(settings: Settings) -> list[Table]:
    """One table, a row for each workload and loader."""
    made = Table(
        f"Input pipeline: rows in memory, shuffled, batches of {BATCH_SIZE}",
        ["", "rows a second", "rows a second a core", "time of a batch"],
        notes=[
            "The consumer does nothing, so `prefetch` and workers show what handing a batch over costs, not what they "
            "hide. All loaders read the same source; PyTorch and Grain take, crop and flip it row by row."
        ],
    )
    for name, (source, n_rows, is_augmented, batches) in WORKLOADS.items():
        options = {"source": source, "n_rows": n_rows, "is_augmented": is_augmented}
        rows = []
        for side, (class_name, more) in SIDES.items():
            n = batches[class_name]
            round_ = {"batches": max(5, n // 10) if settings.is_quick else n}
            rows.append(Competitor(side, f"benchmarks.input_pipeline:{class_name}", {**options, **more}, round_))
        results = measure(rows, settings)
        check_same_rows(results)
        made.rows += [to_row(f"{name}: {result.name}", result) for result in results]
        made.results = [*made.results, *results]
    return [made]


def check_same_rows(results: Sequence[Result]) -> None:
    """Asserts that the first epochs of all that ran held the same rows.

    Raises:
      BenchmarkError: they did not.
    """
    told = {result.name: result.facts["checksum"] for result in results if not result.failure}
    if len(set(told.values())) > 1:
        raise BenchmarkError(f"the loaders read other rows, by the sums of an epoch: {told}.")


def to_row(name: str, result: Result) -> list[str]:
    """The cells of one loader."""
    if result.failure:
        return not_run(name, result.failure, 4)
    batch = spread([BATCH_SIZE * seconds for seconds in result.seconds])
    return [name, _rates(result.seconds), _rates(result.figures("cpu_s")), time_cell(batch)]


def _rates(seconds: Sequence[float]) -> str:
    rates = spread([1 / value for value in seconds])
    return f"{rates.median:,.0f} ({rates.low:,.0f} .. {rates.high:,.0f})"
