"""Trains CLIP (Radford et al. 2021) on pictures and captions, and classifies by captions alone.

    python -m experiments.contrast_image_text --config configs/fashion_clip.py --config.data.batch_size 256

Each picture gets a caption: the name of its class in a template that is drawn anew for every row, "a photo of a coat",
"this is a small coat". The model learns which caption belongs to which picture and never sees a label. Test pictures
are then classified by their nearest class name, of all templates averaged. The names were seen in captions, so this
is the mechanism of zero-shot classification, not a test of unseen classes.

Several rows of a batch have one and the same caption. Such rows are no negatives of each other: the target is spread
over all equal captions (`jaxdl.contrastive.info_nce`), by the tokens alone. Two captions that differ in the template
only stay apart as targets; since the template is drawn at random, the best a picture can do is to give all templates
of its class the same probability, which is what a classifier by class names needs.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments import images, settings, sketching
from experiments.training import Supervised, Task, predict, train
from jaxdl.command import run_command
from jaxdl.config import Parsed
from jaxdl.contrastive import contrast
from jaxdl.loop import FitResult
from jaxdl.models.apply import make_loss_fn
from jaxdl.models.clip import CLIP, CLIPText, clip_block
from jaxdl.objectives import classification
from jaxdl.plan import Sketch
from jaxdl.report import Mistake, write_report
from jaxdl.report.outcomes import worst_rows

TEMPLATES = (
    "a photo of a {}",
    "a picture of a {}",
    "this is a {}",
    "a small {}",
    "a photo of a small {}",
    "one {} in a shop",
    "a {} for sale",
    "an image of one {}",
)


@dataclass(frozen=True)
class Text:
    """The text tower."""

    width: int = 64  # of the tower; a multiple of n_heads
    n_layers: int = 2  # transformer layers
    n_heads: int = 4  # attention heads of a layer
    dropout_rate: float = 0.0  # share of each branch's outputs dropped in training

    def problems(self) -> Iterator[str]:
        counts = {"width": self.width, "n_layers": self.n_layers, "n_heads": self.n_heads}
        yield from (f"{name}={n} must be at least 1." for name, n in counts.items() if n < 1)
        if self.n_heads > 0 and self.width % self.n_heads:
            yield f"width={self.width} is no multiple of n_heads={self.n_heads}."
        if not 0.0 <= self.dropout_rate < 1.0:
            yield f"dropout_rate={self.dropout_rate} must lie in [0, 1)."


@dataclass(frozen=True)
class Config(Supervised):
    """Two towers: data, networks, optimizer, loop, hardware."""

    data: images.Images = field(default_factory=lambda: images.Images(name="fashion_mnist"))
    text: Text = field(default_factory=Text)
    vision: settings.Model = field(default_factory=settings.CNN)
    width: int = 64  # of the space that both towers share
    loss: str = "info_nce"  # info_nce, or sigmoid as in SigLIP

    def problems(self) -> Iterator[str]:
        yield from self.shared_problems(self.data.batch_size, self.data.validation)
        if self.hardware.microbatches > 1:
            yield "hardware.microbatches must be 1: a part would be compared with itself only, which is another loss."
        if self.parallel.exact:
            yield "parallel.exact must be False: a virtual shard would be compared with itself only."
        if self.data.batch_size < 2:
            yield f"data.batch_size={self.data.batch_size} has no negatives; use at least 2."
        if self.data.mixup_alpha or self.data.cutmix_alpha:
            yield "data.mixup_alpha and data.cutmix_alpha mix labels, and a caption names one class; leave them 0."
        if self.width < 1:
            yield f"width={self.width} must be at least 1."
        if self.loss not in ("info_nce", "sigmoid"):
            yield f"loss={self.loss!r} is unknown; use 'info_nce' or 'sigmoid'."

    def sketch(self) -> Sketch:
        """The step, for `jaxdl plan`."""
        batch, class_names, n_rows, notes = sketching.pictures(self.data)
        captions = Captions(class_names)
        model, length = build(self, captions), captions.tokens.shape[2]
        return sketching.sketch(
            self,
            model=model,
            inputs=INPUTS,
            batch={"image": batch["image"], **sketching.tokens(self.data.batch_size, length, "tokens")},
            loss_fn=make_loss_fn(model, contrast(loss=self.loss), inputs=INPUTS, train=True),
            n_rows=n_rows,
            notes=notes,
        )


INPUTS = ("image", "tokens")


class Captions:
    """A caption for each class and template, as ids of words.

    Args:
      class_names: such as `ankle boot`.
      templates: each with one `{}`.

    Attributes:
      words: the vocabulary; the id of a word is its place. The last one ends a text, the first is padding.
      tokens: (classes, templates, T) int32.

    Example:
      >>> captions = Captions(["coat", "bag"], ["a {}", "one small {}"])
      >>> captions.words, captions.tokens[1].tolist()
      (('<padding>', 'a', 'bag', 'coat', 'one', 'small', '<end>'), [[1, 2, 6, 0], [4, 5, 2, 6]])
    """

    def __init__(self, class_names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> None:
        texts = [[template.format(name).lower().split() for template in templates] for name in class_names]
        words = sorted({word for row in texts for text in row for word in text})
        self.words = ("<padding>", *words, "<end>")
        ids = {word: i for i, word in enumerate(self.words)}
        length = 1 + max(len(text) for row in texts for text in row)
        self.tokens = np.zeros((len(class_names), len(templates), length), np.int32)
        for i, row in enumerate(texts):
            for j, text in enumerate(row):
                self.tokens[i, j, : len(text) + 1] = [ids[word] for word in (*text, "<end>")]

    def add(self, batch: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Draws a caption for each row of a batch, which loses its labels."""
        template = rng.integers(0, self.tokens.shape[1], len(batch["label"]))
        rest = {name: x for name, x in batch.items() if name != "label"}
        return {**rest, "tokens": self.tokens[batch["label"], template]}


class ZeroShot(nn.Module):
    """CLIP in training; without texts, a classifier whose classes are the mean embeddings of their prompts.

    Args:
      clip: the model, whose parameter paths are those of this module.
      prompts: ids, by class and template.
    """

    clip: CLIP
    prompts: tuple[tuple[tuple[int, ...], ...], ...]

    def setup(self) -> None:
        nn.share_scope(self, self.clip)

    def __call__(self, image: Array, *, tokens: Array | None = None, train: bool = False) -> Any:
        if tokens is not None:
            return self.clip(tokens, image=image, train=train)
        prompts = jnp.asarray(self.prompts)
        n_classes, n_templates, length = prompts.shape
        embeds = self.clip.embed_text(prompts.reshape(-1, length)).reshape(n_classes, n_templates, -1).mean(axis=1)
        embeds = embeds / jnp.linalg.norm(embeds, axis=-1, keepdims=True)
        return self.clip.logits(embeds, self.clip.embed_image(image))


def build(config: Config, captions: Captions) -> ZeroShot:
    """Puts the towers together."""
    text, dtype = config.text, config.hardware.dtype
    tower = CLIPText(
        clip_block(text.width, text.n_heads, text.n_layers, dropout_rate=text.dropout_rate, dtype=dtype),
        n_layers=text.n_layers,
        vocab_size=len(captions.words),
        n_positions=captions.tokens.shape[2],
        end_token=len(captions.words) - 1,
    )
    n_captions = captions.tokens.shape[0] * captions.tokens.shape[1]
    bias = -math.log(n_captions - 1)  # the logit of the share of pairs that belong together
    start: dict[str, Any] = {"scale_init": 10.0, "bias_init": bias} if config.loss == "sigmoid" else {}
    clip = CLIP(tower, config.vision.build(config.width, dtype), config.width, **start)
    prompts = tuple(tuple(tuple(text) for text in row) for row in captions.tokens.tolist())
    return ZeroShot(clip, prompts)


def experiment(parsed: Parsed) -> None:
    """Loads pictures, writes captions, trains, and writes the report."""
    config = parsed.config
    pictures = images.load(config.data, config.seed)
    captions = Captions(pictures.class_names)
    model, inputs = build(config, captions), INPUTS
    task = Task(
        model=model,
        inputs=inputs,
        train=dataclasses.replace(pictures.train, batch_transforms=(captions.add,)),
        evaluated=pictures.evaluated,
        train_loss_fn=make_loss_fn(model, contrast(loss=config.loss), inputs=inputs, train=True),
        eval_loss_fn=make_loss_fn(model, classification(is_detailed=True), inputs=inputs, train=False),
        best_metric="validation/accuracy",
        best_mode="max",
        eval_batch_size=config.data.eval_batch_size,
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
            summary=f"CLIP, {task.train.n_rows:,} captioned pictures, batches of {task.train.batch_size}",
            metrics={name.removeprefix("test/"): found[name] for name in ("test/accuracy", "test/confusion/f1")},
            confusion=found["test/confusion/matrix"],
            class_names=pictures.class_names,
            mistakes=_mistakes(task, result, pictures),
        ),
    )
    print(f"zero-shot test accuracy {100 * found['test/accuracy']:.2f} %  ({report.steps} steps)")
    print(f"checkpoint    {config.out}/checkpoints/{report.steps}")
    print(f"report        {page}")


def _mistakes(task: Task, result: FitResult, pictures: images.ImageData, n: int = 18) -> list[Mistake]:
    source, names = pictures.pictures, pictures.class_names
    labels = np.array([source[row]["label"] for row in range(len(source))])
    return [
        Mistake(source[row]["image"], names[labels[row]], names[predicted], probability, row)
        for row, predicted, probability in worst_rows(predict(task, result), labels, n)
    ]


if __name__ == "__main__":
    sys.exit(run_command(Config, experiment, prog="python -m experiments.contrast_image_text"))
