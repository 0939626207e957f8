"""Trains or fine-tunes a tagger: one tag a word.

    python -m experiments.tag_tokens --config configs/python_tags.py

The Brown corpus (`--config.corpus.name brown`) comes with parts of speech. Without it the words are those of Python's
own library, and the tags are what they do there: a keyword, the name of a function that is defined, a call, ...
"""

import dataclasses
import io
import keyword
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import sketching, text, text_models
from experiments.classify_text import INPUTS, begin
from experiments.text_rows import TextRows, load_parts
from experiments.training import Supervised, Task, train
from jaxdl import JaxdlError
from jaxdl.command import run_command
from jaxdl.config import Parsed
from jaxdl.data import ArraySource, Pipeline
from jaxdl.data.text import Documents, encode_tags
from jaxdl.models.apply import make_loss_fn
from jaxdl.objectives import classification
from jaxdl.plan import NoSketch, Sketch, array
from jaxdl.report import write_report

PYTHON_TAGS = ("attribute", "call", "class", "function", "keyword", "name", "number", "operator", "string")


@dataclass(frozen=True)
class Config(Supervised):
    """A tagger: corpus, network, optimizer, loop, hardware."""

    corpus: text.Corpus = field(default_factory=text.Corpus)
    tokenizer: text.TokenizerChoice = field(default_factory=lambda: text.TokenizerChoice("byte_level", 2048))
    data: TextRows = field(default_factory=TextRows)
    model: text_models.Encoder = field(default_factory=text_models.Encoder)
    pretrained: str | None = None  # a folder, or a hub name, to start from instead of `model`
    fresh: tuple[str, ...] = ("head/.*",)  # with pretrained: regexes of the leaves that start anew
    drop: tuple[str, ...] = ()  # with pretrained: regexes of tensors left out, such as those of another head
    max_rows: int | None = None  # sentences of each part at most; all where None

    def problems(self) -> Iterator[str]:
        yield from self.shared_problems(self.data.batch_size, self.data.validation)
        if self.corpus.name not in ("python", "brown"):
            yield f"corpus.name={self.corpus.name!r} has no tags; use python or brown."
        if self.max_rows is not None and self.max_rows < 1:
            yield f"max_rows={self.max_rows} must be at least 1."

    def sketch(self) -> Sketch:
        """The step, for `jaxdl plan`."""
        if self.pretrained is not None or self.corpus.name != "python":
            raise NoSketch("the tags of a corpus and the sizes of pretrained weights are known once they are read.")
        vocab_size, notes = sketching.vocabulary(self.tokenizer)
        size: tuple[int, int] = (self.data.batch_size, self.data.length)
        outputs: dict[str, Any] = {"head": "tag", "n_outputs": len(PYTHON_TAGS)}
        model = self.model.build(vocab_size, self.data.length, self.hardware.dtype, **outputs)
        batch = {**sketching.encoded(*size), "label": array(size, "int32"), "weight": array(size, "float32")}
        loss_fn = make_loss_fn(model, classification(), inputs=INPUTS, train=True)
        return sketching.sketch(self, model=model, inputs=INPUTS, batch=batch, loss_fn=loss_fn, notes=notes)


def experiment(parsed: Parsed) -> None:
    """Reads the text, trains, and writes the report."""
    config = parsed.config
    parts = load_parts(config.corpus, config.data)
    if config.corpus.name == "python":
        parts = {name: statements(part, config.max_rows) for name, part in parts.items()}
    tags = parts["train"].about["tag_names"]
    start = begin(config, parts["train"], "tag", len(tags))
    rows = {
        name: encode_tags(part, start.tokenizer, config.data.length, tag_names=tags) for name, part in parts.items()
    }
    objective = classification()
    task = Task(
        model=start.model,
        inputs=INPUTS,
        train=Pipeline(rows.pop("train"), config.data.batch_size, config.seed),
        evaluated=rows,
        train_loss_fn=make_loss_fn(start.model, objective, inputs=INPUTS, train=True),
        eval_loss_fn=make_loss_fn(start.model, objective, inputs=INPUTS, train=False),
        best_metric="validation/accuracy",
        best_mode="max",
        eval_batch_size=config.data.eval_batch_size,
        params=start.params,
    )
    done = train(parsed, task)
    if done is None:
        return
    result, report = done
    metrics = {name: result.evaluations[f"test/{name}"] for name in ("accuracy", "loss")}
    metrics["words scored"] = share_scored(rows["test"], parts["test"])
    page = write_report(Path(config.out) / "report.html", dataclasses.replace(report, metrics=metrics))
    print(f"test accuracy {100 * metrics['accuracy']:.2f} % of words  (loss {metrics['loss']:.4f})")
    print(f"words scored  {100 * metrics['words scored']:.2f} %; the rest lie beyond data.length={config.data.length}")
    print(f"checkpoint    {config.out}/checkpoints/{report.steps}")
    print(f"report        {page}")


def share_scored(rows: ArraySource, documents: Documents) -> float:
    """The share of the words whose tag is judged: those that lie within the length of a row."""
    return float(rows.arrays["weight"].sum()) / sum(map(len, documents.columns["words"]))


def statements(documents: Documents, most: int | None) -> Documents:
    """The logical lines of Python files as sentences, with a tag for each word.

    Raises:
      JaxdlError: no file could be parsed.
    """
    words: list[tuple[str, ...]] = []
    tags: list[tuple[str, ...]] = []
    for row in range(len(documents)):
        for line in tagged_lines(documents[row]["text"]):
            words.append(tuple(word for word, _ in line))
            tags.append(tuple(tag for _, tag in line))
    if not words:
        raise JaxdlError("no file of the corpus is Python source that can be parsed.")
    stride = 1 if most is None else max(1, len(words) // most)  # spread over all files
    columns: dict[str, Any] = {"text": [" ".join(line) for line in words], "words": words, "tags": tags}
    columns = {name: values[::stride][:most] for name, values in columns.items()}
    return Documents(columns, about={**documents.about, "tag_names": PYTHON_TAGS})


def tagged_lines(source: str) -> Iterator[list[tuple[str, str]]]:
    """The words of each logical line with their tags; nothing of a file that is not Python.

    Example:
      >>> list(tagged_lines("def f(x):\\n    return x.y\\n"))[1]
      [('return', 'keyword'), ('x', 'name'), ('.', 'operator'), ('y', 'attribute')]
    """
    line: list[tokenize.TokenInfo] = []
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return
    for token in tokens:
        if token.type == tokenize.NEWLINE and line:
            yield [(word.string[:40], _tag(line, i)) for i, word in enumerate(line)]
            line = []
        elif token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING) and token.string.strip():
            line.append(token)


def _tag(line: list[tokenize.TokenInfo], i: int) -> str:
    token = line[i]
    if token.type != tokenize.NAME:
        return {tokenize.OP: "operator", tokenize.NUMBER: "number", tokenize.STRING: "string"}[token.type]
    before, after = line[i - 1].string if i else "", line[i + 1].string if i + 1 < len(line) else ""
    if keyword.iskeyword(token.string):
        return "keyword"
    if before in ("def", "class"):
        return "function" if before == "def" else "class"
    if after == "(":
        return "call"
    return "attribute" if before == "." else "name"


if __name__ == "__main__":
    sys.exit(run_command(Config, experiment, prog="python -m experiments.tag_tokens"))
