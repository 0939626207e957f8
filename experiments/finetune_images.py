"""Fine-tunes an image classifier of an earlier run on other classes: all of it, a part of it, or adapters beside it.

    python -m experiments.classify_images --config configs/fashion_clothes.py
    python -m experiments.finetune_images --config configs/fashion_shoes_head.py

The network is that of the earlier run, with a new head. Checkpoints hold only what moved; statistics of frozen norms do
not move either. At the end stand a statement that nothing else did, and the change alone (`delta`).
"""

import dataclasses
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import classify_images, images, sketching
from experiments.finetuning import HEADLINE, Finetune, prepare, write_outcome
from experiments.training import Supervised, Task, train
from jaxdl import JaxdlError
from jaxdl.checkpoint import restore_params
from jaxdl.command import run_command
from jaxdl.config import ConfigError, Parsed, from_json
from jaxdl.models.apply import init_model, make_loss_fn
from jaxdl.objectives import Objective, classification
from jaxdl.plan import Sketch
from jaxdl.report import write_report


@dataclass(frozen=True)
class Config(Supervised):
    """Fine-tuning of an image classifier: what it starts from, what moves, images, optimizer, loop, hardware."""

    base: str = "runs/fashion_clothes"  # the run folder of `experiments.classify_images` to start from
    finetune: Finetune = field(default_factory=Finetune)
    data: images.Images = field(default_factory=images.Images)
    label_smoothing: float = 0.0  # share of the probability spread over all classes

    def problems(self) -> Iterator[str]:
        yield from self.shared_problems(self.data.batch_size, self.data.validation)
        yield from self.finetune.clashes(self)
        if not 0.0 <= self.label_smoothing < 1.0:
            yield f"label_smoothing={self.label_smoothing} must lie in [0, 1)."
        if not (Path(self.base) / "config.json").is_file():
            yield f"base={self.base!r} is no run folder with a config.json; train it first (see the docs)."

    def sketch(self) -> Sketch:
        """The step, for `jaxdl plan`."""
        batch, class_names, n_rows, notes = sketching.pictures(self.data)
        model = earlier(self.base).model.build(len(class_names), self.hardware.dtype)
        row = jax.ShapeDtypeStruct((1, *batch["image"].shape[1:]), jnp.float32)
        like = jax.eval_shape(lambda key, x: init_model(model, key, x), jax.random.key(0), row)
        objective = classification(label_smoothing=self.label_smoothing)
        return sketching.tuned(
            self,
            model=model,
            inputs="image",
            batch=batch,
            loss_fn=make_loss_fn(model, objective, inputs="image", train=True),
            like=like,
            fresh=FRESH,
            base=self.base,
            n_rows=n_rows,
            notes=notes,
        )


FRESH = ("head/.*",)
_NOT_PARAMETERS = ("opt_state/.*", "rng", "step")


def experiment(parsed: Parsed) -> None:
    """Loads the earlier network and the images, trains, and writes the report and what the run leaves behind."""
    config, start = parsed.config, time.perf_counter()
    pictures = images.load(config.data, config.seed)
    model = earlier(config.base).model.build(len(pictures.class_names), config.hardware.dtype)
    params, extra = init_model(model, jax.random.key(config.seed), jnp.zeros((1, *pictures.image_shape)))
    like = {"params": params, **({"extra": extra} if extra else {})}
    restored, ledger = restore_params(
        Path(config.base) / "checkpoints", like, fresh=["params/head/.*"], drop=_NOT_PARAMETERS
    )
    print(ledger)
    tuning = prepare(
        config.finetune,
        restored["params"],
        model,
        pictures.train,
        "image",
        steps=config.loop.length.to_steps(pictures.train.batch_size, pictures.train.n_rows),
        fresh=FRESH,
        seed=config.seed,
    )

    def loss_fn(objective: Objective, *, is_training: bool) -> Any:
        plain = make_loss_fn(model, objective, inputs="image", train=is_training)
        return tuning.adapt(plain)

    task = Task(
        model=model,
        inputs="image",
        train=pictures.train,
        evaluated=pictures.evaluated,
        train_loss_fn=loss_fn(classification(label_smoothing=config.label_smoothing), is_training=True),
        eval_loss_fn=loss_fn(classification(is_detailed=True), is_training=False),
        best_metric="validation/accuracy",
        best_mode="max",
        eval_batch_size=config.data.eval_batch_size,
        params=tuning.params,
        extra=restored.get("extra", {}),
        tuning=tuning,
    )
    done = train(parsed, task)
    if done is None:
        return
    result, report = done
    found = result.evaluations
    page = write_report(
        Path(config.out) / "report.html",
        dataclasses.replace(
            report,
            metrics={name.removeprefix("test/"): found[name] for name in HEADLINE},
            confusion=found["test/confusion/matrix"],
            class_names=pictures.class_names,
        ),
    )
    print(f"test accuracy {100 * found['test/accuracy']:.2f} %  (loss {found['test/loss']:.4f}, {report.steps} steps)")
    write_outcome(config.out, found["test/accuracy"], tuning, result.state.params, time.perf_counter() - start)
    print(f"report        {page}")


def earlier(folder: str) -> classify_images.Config:
    """The configuration of the run that the base is from.

    Raises:
      JaxdlError: it is no run of `experiments.classify_images`.
    """
    try:
        return from_json(classify_images.Config, (Path(folder) / "config.json").read_text())
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise JaxdlError(f"base={folder!r} is no run of experiments.classify_images: {error}") from None


if __name__ == "__main__":
    sys.exit(run_command(Config, experiment, prog="python -m experiments.finetune_images"))
