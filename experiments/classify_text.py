"""Trains or fine-tunes a text classifier.

    python -m experiments.classify_text --config configs/python_packages.py

With `pretrained` it starts from a folder of Hugging Face files; its tokenizer is taken along, and `trainable` says
which parameters move. Without labels of your own it tells which package of Python's standard library a few lines of
source are from.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from experiments import sketching, text, text_models
from experiments.text_rows import TextRows, load_parts
from experiments.training import Supervised, Task, train
from jaxdl import JaxdlError
from jaxdl.command import run_command
from jaxdl.config import Parsed
from jaxdl.data import Pipeline, check_labels
from jaxdl.data.text import Documents, check_fits, encode_rows
from jaxdl.models.apply import make_loss_fn
from jaxdl.objectives import classification
from jaxdl.plan import NoSketch, Sketch, array
from jaxdl.pretrained import load
from jaxdl.report import write_report

INPUTS = ("tokens", "mask", "token_types")


@dataclass(frozen=True)
class Config(Supervised):
    """A text classifier: corpus, network, optimizer, loop, hardware."""

    corpus: text.Corpus = field(default_factory=text.Corpus)
    tokenizer: text.TokenizerChoice = field(default_factory=text.TokenizerChoice)
    data: TextRows = field(default_factory=TextRows)
    model: text_models.Encoder = field(default_factory=text_models.Encoder)
    pretrained: str | None = None  # a folder, or a hub name, to start from instead of `model`
    fresh: tuple[str, ...] = ("head/.*",)  # with pretrained: regexes of the leaves that start anew
    drop: tuple[str, ...] = ()  # with pretrained: regexes of tensors left out, such as those of another head
    snippet_lines: int = 12  # with corpus.name=python: lines of source in a row
    n_packages: int = 8  # with corpus.name=python: the packages with the most source are the classes
    label_smoothing: float = 0.0  # share of the probability spread over all classes

    def problems(self) -> Iterator[str]:
        yield from self.shared_problems(self.data.batch_size, self.data.validation)
        if not 0.0 <= self.label_smoothing < 1.0:
            yield f"label_smoothing={self.label_smoothing} must lie in [0, 1)."
        if self.snippet_lines < 1 or self.n_packages < 2:
            yield f"snippet_lines={self.snippet_lines} must be at least 1 and n_packages={self.n_packages} at least 2."

    def sketch(self) -> Sketch:
        """The step, for `jaxdl plan`."""
        if self.pretrained is not None or self.corpus.name != "python":
            raise NoSketch("the classes of a corpus and the sizes of pretrained weights are known once they are read.")
        vocab_size, notes = sketching.vocabulary(self.tokenizer)
        size: tuple[int, int] = (self.data.batch_size, self.data.length)
        outputs: dict[str, Any] = {"head": "classify", "n_outputs": self.n_packages}
        model = self.model.build(vocab_size, self.data.length, self.hardware.dtype, **outputs)
        label = {"label": array(size[:1], "int32")}
        objective = classification(label_smoothing=self.label_smoothing)
        return sketching.sketch(
            self,
            model=model,
            inputs=INPUTS,
            batch={**sketching.encoded(*size), **label},
            loss_fn=_loss_fn(model, objective, train=True),
            notes=notes,
        )


def experiment(parsed: Parsed) -> None:
    """Reads the text, trains, and writes the report."""
    config = parsed.config
    parts = load_parts(config.corpus, config.data)
    if config.corpus.name == "python":
        names = largest_packages(parts["train"], config.n_packages)
        parts = {name: snippets(part, names, config.snippet_lines) for name, part in parts.items()}
    names = class_names(parts)
    start = begin(config, parts["train"], "classify", len(names))
    rows = {name: encode_rows(part, start.tokenizer, config.data.length) for name, part in parts.items()}
    for part in rows.values():
        check_labels(part.arrays["label"], len(names))
    task = Task(
        model=start.model,
        inputs=INPUTS,
        train=Pipeline(rows.pop("train"), config.data.batch_size, config.seed),
        evaluated=rows,
        train_loss_fn=_loss_fn(start.model, classification(label_smoothing=config.label_smoothing), train=True),
        eval_loss_fn=_loss_fn(start.model, classification(is_detailed=True), train=False),
        best_metric="validation/accuracy",
        best_mode="max",
        eval_batch_size=config.data.eval_batch_size,
        params=start.params,
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
            metrics={name.removeprefix("test/"): found[name] for name in _HEADLINE},
            confusion=found["test/confusion/matrix"],
            class_names=names,
        ),
    )
    print(f"test accuracy {100 * found['test/accuracy']:.2f} %  (loss {found['test/loss']:.4f}, {report.steps} steps)")
    print(f"checkpoint    {config.out}/checkpoints/{report.steps}")
    print(f"report        {page}")


_HEADLINE = ("test/accuracy", "test/loss", "test/confusion/f1", "test/calibration/ece")


def _loss_fn(model: Any, objective: Any, *, train: bool) -> Any:
    return make_loss_fn(model, objective, inputs=INPUTS, train=train)


class Start(NamedTuple):
    """What training starts from; `params` is None where they are drawn from the seed."""

    model: Any
    params: Any
    tokenizer: Any


def begin(config: Any, documents: Documents, head: str, n_outputs: int) -> Start:
    """The model of the configuration, or a pretrained one with a fresh head.

    Raises:
      JaxdlError: a folder that cannot be loaded, or a tokenizer that does not fit.
    """
    if config.pretrained is None:
        tokenizer = text.make_tokenizer(config.tokenizer, documents, config.out)
        length, dtype = config.data.length, config.hardware.dtype
        model = config.model.build(tokenizer.vocab_size, length, dtype, head=head, n_outputs=n_outputs)
        return Start(model, None, tokenizer)
    found = load(
        config.pretrained,
        head=head,
        n_outputs=n_outputs,
        dtype=config.hardware.dtype,
        param_dtype="float32",
        fresh=config.fresh,
        drop=config.drop,
        seed=config.seed,
    )
    print(found.ledger)
    tokenizer = found.tokenizer or text.make_tokenizer(config.tokenizer, documents, config.out)
    check_fits(tokenizer, found.model.vocab_size)
    return Start(found.model, found.params, tokenizer)


def class_names(parts: dict[str, Documents]) -> tuple[str, ...]:
    """The names of the classes; numbers where the corpus has none.

    Raises:
      JaxdlError: there are no labels.
    """
    train = parts["train"]
    if "label" not in train.columns:
        raise JaxdlError(f"the corpus has no column 'label', only {', '.join(train.columns)}; use one with labels.")
    return train.class_names or tuple(map(str, range(max(train.columns["label"]) + 1)))


def largest_packages(documents: Documents, n: int) -> tuple[str, ...]:
    """The packages of the standard library with the most source, in alphabetical order."""
    sizes: Counter[str] = Counter()
    for row in range(len(documents)):
        package, *inside = documents[row]["path"].split("/")
        sizes[package] += len(documents[row]["text"]) if inside else 0
    return tuple(sorted(name for name, _ in sizes.most_common(n)))


def snippets(documents: Documents, packages: tuple[str, ...], n_lines: int) -> Documents:
    """A few lines of source each, labelled with the package that they are from."""
    rows: list[tuple[str, int]] = []
    for row in range(len(documents)):
        package = documents[row]["path"].split("/")[0]
        if package in packages:
            lines = [line for line in documents[row]["text"].splitlines() if line.strip()]
            pieces = ["\n".join(lines[i : i + n_lines]) for i in range(0, len(lines), n_lines)]
            rows += [(piece, packages.index(package)) for piece in pieces]
    columns: dict[str, Any] = {"text": [piece for piece, _ in rows], "label": [label for _, label in rows]}
    return Documents(columns, class_names=packages, about=documents.about)


if __name__ == "__main__":
    sys.exit(run_command(Config, experiment, prog="python -m experiments.classify_text"))
