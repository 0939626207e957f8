"""The whole training loop of a tiny MLP, 64-64-64-10 in batches of 32, where the loop costs more than the products.

jaxdl's is `fit` with everything on but evaluation and checkpoints, as in `loop_overhead`. PyTorch's idiomatic loop has
a `DataLoader` and `loss.item()` every step; its best one gathers rows by index on one thread and fetches losses as
seldom as `fit` does. The order of the rows was drawn beforehand and is the same for all.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.harness import Competitor, Result, Settings, check_same_losses, fastest, measure, speed_up, spread
from benchmarks.loop_overhead import LOG_EVERY
from benchmarks.machine import n_cores
from benchmarks.mlp import Batches
from benchmarks.network import LEARNING_RATE, WEIGHT_DECAY, make_torch
from benchmarks.table import Aim, Table, judge, not_run, ratio_cell, time_cell
from benchmarks.training import TOLERANCE, timed

SIZES, BATCH_SIZE = (64, 64, 64, 10), 32
STEPS_PER_CALL = 50
FIT, REPEATED = "jaxdl, fit", f"jaxdl, fit, steps_per_call={STEPS_PER_CALL}"
IDIOMATIC, BEST, COMPILED = "PyTorch, idiomatic loop", "PyTorch, best loop", "PyTorch, best loop, torch.compile"
AIMS = {"best": Aim(2.0, 3.2), "idiomatic": Aim(4.0, 6.0)}


class Torch:
    """A loop of PyTorch; `first_losses` holds the mean loss of the first LOG_EVERY steps.

    Args:
      sizes, batch_size: of the MLP.
      is_idiomatic: see above.
      is_compiled: model and loss go through `torch.compile`.
    """

    def __init__(
        self, sizes: Sequence[int], batch_size: int, is_idiomatic: bool = False, is_compiled: bool = False
    ) -> None:
        import torch

        torch.set_num_threads(n_cores() if is_idiomatic else 1)
        model = make_torch(sizes)

        def loss_fn(features: Any, label: Any) -> Any:
            return torch.nn.functional.cross_entropy(model(features), label)

        self.loss_fn = torch.compile(loss_fn) if is_compiled else loss_fn
        fused = None if is_idiomatic else True
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=fused)
        data = Batches(sizes, batch_size)
        self.is_idiomatic = is_idiomatic
        self.batches = (self._loaded if is_idiomatic else self._gathered)(data, batch_size)
        self.losses: list[float] = []
        self._run(LOG_EVERY)
        self.facts = {"first_losses": [float(np.mean(self.losses))]}

    def _loaded(self, data: Batches, batch_size: int) -> Iterator[Any]:
        import torch

        rows = torch.utils.data.TensorDataset(torch.from_numpy(data.features), torch.from_numpy(data.label).long())
        loader = torch.utils.data.DataLoader(rows, batch_size=batch_size, sampler=data.rows.ravel().tolist())
        return itertools.chain.from_iterable(itertools.repeat(loader))

    def _gathered(self, data: Batches, batch_size: int) -> Iterator[Any]:
        import torch

        features, label = torch.from_numpy(data.features), torch.from_numpy(data.label).long()
        for rows in itertools.cycle(torch.from_numpy(data.rows).long()):
            yield features[rows], label[rows]

    def round(self, steps: int) -> float:
        """Seconds of a step."""
        return timed(self._run, steps)

    def _run(self, steps: int) -> None:
        kept = []
        for features, label in itertools.islice(self.batches, steps):
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss_fn(features, label)
            loss.backward()
            self.optimizer.step()
            kept.append(loss.item() if self.is_idiomatic else loss.detach())
            if len(kept) == LOG_EVERY:
                self._log(kept)
                kept = []

    def _log(self, kept: list[Any]) -> None:
        import torch

        self.losses = kept if self.is_idiomatic else torch.stack(kept).tolist()


def run(settings: Settings) -> list[Table]:
    """One table."""
    sizes = {"sizes": SIZES, "batch_size": BATCH_SIZE}
    shrink: Callable[[int], int] = lambda steps: steps // 10 if settings.is_quick else steps  # noqa: E731
    round_ = {"steps": shrink(2000)}
    with tempfile.TemporaryDirectory() as directory:
        fit = {**sizes, "directory": directory, "is_saving": False, "is_resident": True}
        terminal = {"TERM": "xterm-256color", "COLUMNS": "100"}
        target = "benchmarks.loop_overhead:Fit"
        repeated = {**fit, "steps": shrink(10_000), "steps_per_call": STEPS_PER_CALL}
        results = measure(
            [
                Competitor(IDIOMATIC, "benchmarks.tiny_loop:Torch", {**sizes, "is_idiomatic": True}, round_),
                Competitor(FIT, target, {**fit, "steps": shrink(2500)}, environment=terminal),
                Competitor(BEST, "benchmarks.tiny_loop:Torch", sizes, round_),
                Competitor(REPEATED, target, repeated, environment=terminal),
                Competitor(COMPILED, "benchmarks.tiny_loop:Torch", {**sizes, "is_compiled": True}, round_),
            ],
            settings,
        )
    return [to_table(results)]


def to_table(results: Sequence[Result]) -> Table:
    """The table, and how it stands to the aims.

    Raises:
      BenchmarkError: the loops compute different losses.
    """
    check_same_losses(results, TOLERANCE)
    found = {result.name: result for result in results}
    best, idiomatic = fastest([found[BEST], found[COMPILED]]), found[IDIOMATIC]
    columns = ["", "time of a step", "speed against the best of PyTorch", "against its idiomatic loop"]
    made = Table(
        f"The whole loop of a tiny MLP, {'-'.join(map(str, SIZES))}, batch {BATCH_SIZE}", columns, results=results
    )
    for result in results:
        if result.failure:
            made.rows.append(not_run(result.name, result.failure, len(columns)))
            continue
        ratios = [ratio_cell(speed_up(result, other)) for other in (best, idiomatic)]
        made.rows.append([result.name, time_cell(spread(result.seconds)), *ratios])
    ours = fastest([found[FIT], found[REPEATED]])
    for other, (name, aim) in zip((best, idiomatic), AIMS.items(), strict=True):
        word = judge(speed_up(ours, other), aim)
        made.notes.append(f"{ours.name}, against the {name} loop of PyTorch: floor {aim.floor}, aim {aim.aim}: {word}.")
    return made
