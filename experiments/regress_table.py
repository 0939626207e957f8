"""Trains a network to predict a number from the columns of a table.

    python -m experiments.regress_table --config configs/diabetes_mlp.py
    python -m experiments.regress_table --config configs/diabetes_mlp.py --config.data.train prices.csv \
        --config.data.target price --config.data.categorical city

Missing values are filled with the column's mean in the training rows, columns and target are standardised with the
training rows' statistics; the reported errors are in the target's own unit.
"""

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments import settings, sketching
from experiments.training import Supervised, Task, predict, train
from jaxdl import data
from jaxdl.command import run_command
from jaxdl.config import Parsed
from jaxdl.models.apply import make_loss_fn
from jaxdl.objectives import regression
from jaxdl.plan import NoSketch, Sketch, array
from jaxdl.report import write_report


@dataclass(frozen=True)
class Rows:
    """Which table, and how it is split."""

    train: str | None = None  # a CSV or Parquet file; the diabetes table inside the package where None
    test: str | None = None  # a second file of the same columns; a fifth of the first where None
    target: str = "progression"  # the column to predict
    categorical: tuple[str, ...] = ()  # columns of names; each becomes one column a name
    drop: tuple[str, ...] = ()  # columns to leave out
    batch_size: int = 32  # rows of a global batch; the number of rows makes it full-batch gradient descent
    eval_batch_size: int = 256  # rows of an evaluation batch
    validation: float = 0.0  # share of the training rows held out to choose the best checkpoint by

    def problems(self) -> Iterator[str]:
        counts = {"batch_size": self.batch_size, "eval_batch_size": self.eval_batch_size}
        yield from (f"{name}={n} must be at least 1." for name, n in counts.items() if n < 1)
        if not 0.0 <= self.validation < 1.0:
            yield f"validation={self.validation} must lie in [0, 1)."
        if self.test is not None and self.train is None:
            yield "test needs train: give both files, or train alone."
        for name, file in (("train", self.train), ("test", self.test)):
            if file is not None and not Path(file).is_file():
                yield f"{name}={file!r} is not a file."


@dataclass(frozen=True)
class Config(Supervised):
    """A regression: data, network, optimizer, loop, hardware."""

    data: Rows = field(default_factory=Rows)
    model: settings.MLP = field(default_factory=settings.MLP)
    loss: Literal["squared_error", "absolute_error", "huber"] = "squared_error"  # what is minimised

    def problems(self) -> Iterator[str]:
        yield from self.shared_problems(self.data.batch_size, self.data.validation)

    def sketch(self) -> Sketch:
        """The step, for `jaxdl plan`."""
        if self.data.train is not None:
            raise NoSketch(f"data.train={self.data.train!r}: its columns are known only once it is read; leave it out.")
        n_rows, n_columns = DIABETES
        size = self.data.batch_size
        model = self.model.build(1, self.hardware.dtype)
        return sketching.sketch(
            self,
            model=model,
            inputs="features",
            batch={"features": array((size, n_columns), "float32"), "target": array((size,), "float32")},
            loss_fn=make_loss_fn(model, regression(loss=self.loss), inputs="features", train=True),
            n_rows=n_rows - round(n_rows * self.data.validation),
        )


DIABETES = (354, 10)  # training rows and columns of the table inside the package


def experiment(parsed: Parsed) -> None:
    """Loads the table, trains, and writes the report."""
    config = parsed.config
    pipeline, evaluated, target = load(config.data, config.seed)
    model = config.model.build(1, config.hardware.dtype)
    train_objective, eval_objective = (regression(loss=config.loss, is_detailed=detailed) for detailed in (False, True))
    task = Task(
        model=model,
        inputs="features",
        train=pipeline,
        evaluated=evaluated,
        train_loss_fn=make_loss_fn(model, train_objective, inputs="features", train=True),
        eval_loss_fn=make_loss_fn(model, eval_objective, inputs="features", train=False),
        best_metric="validation/loss",
        best_mode="min",
        eval_batch_size=config.data.eval_batch_size,
    )
    done = train(parsed, task)
    if done is None:
        return
    result, report = done
    predicted = target.inverse(predict(task, result)[:, 0])
    true = target.inverse(evaluated["test"].arrays["target"])
    metrics = {
        "r2": float(result.evaluations["test/r2"]),
        "root mean squared error": float(np.sqrt(np.mean((predicted - true) ** 2))),
        "mean absolute error": float(np.mean(np.abs(predicted - true))),
    }
    page = write_report(
        Path(config.out) / "report.html",
        dataclasses.replace(report, metrics=metrics, predictions=(true, predicted)),
    )
    print("  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    print(f"checkpoint    {config.out}/checkpoints/{report.steps}")
    print(f"report        {page}")


def load(settings: Rows, seed: int) -> tuple[data.Pipeline, dict[str, data.ArraySource], Any]:
    """The training pipeline, the sources to evaluate on, and the standardisation of the target.

    Raises:
      JaxdlError: a table that is not there or not as it should be.
    """
    sources = dict(zip(("train", "test"), _read(settings, seed), strict=True))
    if settings.validation:
        kept, held_out = data.split_rows(len(sources["train"]), settings.validation, seed)
        sources["validation"] = sources["train"].select(held_out)
        sources["train"] = sources["train"].select(kept)
    for fit in (
        data.fit_fill_missing,
        lambda train: data.fit_standardize(train, "features"),
        lambda train: data.fit_standardize(train, "target", axis=None),
    ):
        transform = fit(sources["train"])
        sources = {name: source.map(transform) for name, source in sources.items()}
    pipeline = data.Pipeline(sources.pop("train"), settings.batch_size, seed)
    return pipeline, sources, transform


def _read(settings: Rows, seed: int) -> tuple[data.ArraySource, data.ArraySource]:
    if settings.train is None:
        return data.load_diabetes()
    columns: dict[str, Any] = {"target": settings.target, "categorical": settings.categorical, "drop": settings.drop}
    table = data.read_table(settings.train, **columns)
    if settings.test is not None:
        test = data.read_table(settings.test, **columns, categories=table.categories)
        return table.one_hot().source, test.one_hot().source
    source = table.one_hot().source
    kept, held_out = data.split_rows(len(source), 0.2, seed)
    return source.select(kept), source.select(held_out)


if __name__ == "__main__":
    sys.exit(run_command(Config, experiment, prog="python -m experiments.regress_table"))
