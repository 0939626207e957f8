"""Trains an image classifier.

    python -m experiments.classify_images --config configs/digits_cnn.py --config.optimizer.learning_rate 3e-4

The run folder holds the configuration, the environment, the metric log, verified checkpoints and `report.html`.
"""

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from experiments import images, settings, sketching
from experiments.training import Supervised, Task, predict, train
from jaxdl.command import run_command
from jaxdl.config import Parsed
from jaxdl.loop import FitResult
from jaxdl.models.apply import make_loss_fn
from jaxdl.objectives import Objective, classification
from jaxdl.plan import Sketch
from jaxdl.report import Mistake, write_report
from jaxdl.report.outcomes import worst_rows


@dataclass(frozen=True)
class Config(Supervised):
    """An image classifier: data, network, optimizer, loop, hardware."""

    data: images.Images = field(default_factory=images.Images)
    model: settings.Model = field(default_factory=settings.CNN)
    label_smoothing: float = 0.0  # share of the probability spread over all classes
    focal_gamma: float = 0.0  # weight of hard rows in the loss

    def problems(self) -> Iterator[str]:
        yield from self.shared_problems(self.data.batch_size, self.data.validation)
        if not 0.0 <= self.label_smoothing < 1.0:
            yield f"label_smoothing={self.label_smoothing} must lie in [0, 1)."
        if self.focal_gamma < 0:
            yield f"focal_gamma={self.focal_gamma} must not be negative."

    def objective(self) -> Objective:
        """What is minimised."""
        return classification(label_smoothing=self.label_smoothing, focal_gamma=self.focal_gamma)

    def sketch(self) -> Sketch:
        """The step, for `jaxdl plan`."""
        batch, class_names, n_rows, notes = sketching.pictures(self.data)
        model = self.model.build(len(class_names), self.hardware.dtype)
        loss_fn = make_loss_fn(model, self.objective(), inputs="image", train=True)
        return sketching.sketch(
            self, model=model, inputs="image", batch=batch, loss_fn=loss_fn, n_rows=n_rows, notes=notes
        )


def experiment(parsed: Parsed) -> None:
    """Loads the images, trains, and writes the report."""
    config = parsed.config
    pictures = images.load(config.data, config.seed)
    model = config.model.build(len(pictures.class_names), config.hardware.dtype)
    task = Task(
        model=model,
        inputs="image",
        train=pictures.train,
        evaluated=pictures.evaluated,
        train_loss_fn=make_loss_fn(model, config.objective(), inputs="image", train=True),
        eval_loss_fn=make_loss_fn(model, classification(is_detailed=True), inputs="image", train=False),
        best_metric="validation/accuracy",
        best_mode="max",
        eval_batch_size=config.data.eval_batch_size,
    )
    done = train(parsed, task)
    if done is None:
        return
    result, report = done
    found, weight = result.evaluations, result.evaluations["test/calibration/bin_weight"]
    page = write_report(
        Path(config.out) / "report.html",
        dataclasses.replace(
            report,
            metrics={name.removeprefix("test/"): found[name] for name in _HEADLINE},
            confusion=found["test/confusion/matrix"],
            class_names=pictures.class_names,
            calibration=(
                weight,
                weight * found["test/calibration/bin_confidence"],
                weight * found["test/calibration/bin_accuracy"],
            ),
            mistakes=_mistakes(task, result, pictures),
        ),
    )
    print(f"test accuracy {100 * found['test/accuracy']:.2f} %  (loss {found['test/loss']:.4f}, {report.steps} steps)")
    print(f"checkpoint    {config.out}/checkpoints/{report.steps}")
    print(f"report        {page}")


_HEADLINE = ("test/accuracy", "test/loss", "test/confusion/f1", "test/calibration/ece", "test/calibration/brier")


def _mistakes(task: Task, result: FitResult, pictures: images.ImageData, n: int = 18) -> list[Mistake]:
    source, names = pictures.pictures, pictures.class_names
    labels = images.labels(source)
    return [
        Mistake(source[row]["image"], names[labels[row]], names[predicted], probability, row)
        for row, predicted, probability in worst_rows(predict(task, result), labels, n)
    ]


if __name__ == "__main__":
    sys.exit(run_command(Config, experiment, prog="python -m experiments.classify_images"))
