"""Trains a language model on running text and lets it write.

    python -m experiments.language_model --config configs/python_gpt.py

Without a file of your own the text is the source of Python's standard library, which is on every machine. Whole files
are held out. The figure is bits per byte: how many bits a byte of the held-out text costs under the model, which
makes models with different tokenizers comparable.
"""

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments import sketching, text, text_models
from experiments.text_rows import TextRows, about, byte_counts, load_parts
from experiments.training import Supervised, Task, train
from jaxdl.command import run_command
from jaxdl.config import Parsed
from jaxdl.data import ArraySource, Pipeline
from jaxdl.data.text import Documents, StreamWindows, TokenStream
from jaxdl.errors import JaxdlError
from jaxdl.generate import generate
from jaxdl.loop import FitResult
from jaxdl.models.language import make_language_loss_fn
from jaxdl.optim import eval_params
from jaxdl.parallel import is_first
from jaxdl.plan import Sketch, array
from jaxdl.report import write_report


@dataclass(frozen=True)
class Config(Supervised):
    """A language model: text, network, optimizer, loop, hardware."""

    corpus: text.Corpus = field(default_factory=text.Corpus)
    tokenizer: text.TokenizerChoice = field(default_factory=text.TokenizerChoice)
    data: TextRows = field(default_factory=lambda: TextRows(length=256, batch_size=16, validation=0.02, test=0.02))
    model: text_models.LanguageModel = field(default_factory=text_models.GPT)
    prompt: str = "def"  # what the model goes on from at the end; without a last blank, which most tokens begin with
    new_tokens: int = 200  # how many tokens it writes
    temperature: float = 0.7  # of the writing; 0 takes the most likely token

    def problems(self) -> Iterator[str]:
        yield from self.shared_problems(self.data.batch_size, self.data.validation)
        if self.tokenizer.kind in ("bpe", "wordpiece"):
            yield f"tokenizer.kind={self.tokenizer.kind!r} does not keep every byte; use bytes, byte_level or load."
        if not self.prompt:
            yield "prompt='' is empty; give at least one character."
        if self.new_tokens < 1:
            yield f"new_tokens={self.new_tokens} must be at least 1."
        if self.temperature < 0:
            yield f"temperature={self.temperature} must not be negative."
        if self.new_tokens >= self.data.length and not isinstance(self.model, text_models.RNN):
            yield f"new_tokens={self.new_tokens} must be below data.length={self.data.length}, the longest context."

    def sketch(self) -> Sketch:
        """The step, for `jaxdl plan`."""
        vocab_size, notes = sketching.vocabulary(self.tokenizer)
        model = self.model.build(vocab_size, self.data.length, self.hardware.dtype)
        rows = self.data.batch_size
        batch = sketching.tokens(rows, self.data.length, "tokens", "targets")
        return sketching.sketch(
            self,
            model=model,
            inputs="tokens",
            batch={**batch, "n_bytes": array((rows,), "float32")},
            loss_fn=make_language_loss_fn(model, train=True),
            notes=notes,
        )


def experiment(parsed: Parsed) -> None:
    """Reads the text, trains, measures, writes and reports."""
    config = parsed.config
    parts = load_parts(config.corpus, config.data)
    tokenizer = text.make_tokenizer(config.tokenizer, parts["train"], config.out)
    rows = {name: windows(part, tokenizer, config.data.length) for name, part in parts.items()}
    model = config.model.build(tokenizer.vocab_size, config.data.length, config.hardware.dtype)
    task = Task(
        model=model,
        inputs="tokens",
        train=Pipeline(rows.pop("train"), config.data.batch_size, config.seed),
        evaluated=rows,
        train_loss_fn=make_language_loss_fn(model, train=True),
        eval_loss_fn=make_language_loss_fn(model, train=False),
        best_metric="validation/bits_per_byte",
        best_mode="min",
        eval_batch_size=config.data.eval_batch_size,
    )
    done = train(parsed, task)
    if done is None:
        return
    result, report = done
    sample = write_text(config, model, result, tokenizer)
    metrics = {name.removeprefix("test/"): result.evaluations[name] for name in _HEADLINE}
    page = write_report(
        Path(config.out) / "report.html",
        dataclasses.replace(report, metrics=metrics, environment={**report.environment, **about(parts["train"])}),
    )
    if is_first():
        (Path(config.out) / "sample.txt").write_text(sample, encoding="utf-8")
    print(f"{sample}\n")
    print(f"test bits per byte {metrics['bits_per_byte']:.4f}  (loss {metrics['loss']:.4f} nats a token)")
    print(f"checkpoint    {config.out}/checkpoints/{report.steps}")
    print(f"report        {page}")


_HEADLINE = ("test/bits_per_byte", "test/loss", "test/perplexity", "test/accuracy")


def windows(documents: Documents, tokenizer: Any, length: int) -> ArraySource:
    """Rows of running text, each with the number of bytes that its targets stand for."""
    source = StreamWindows(TokenStream.build(documents, tokenizer), length).in_memory()
    sizes = byte_counts(tokenizer)
    return source.map(lambda arrays: {**arrays, "n_bytes": sizes[arrays["targets"]].sum(1).astype(np.float32)})


def write_text(config: Config, model: Any, result: FitResult, tokenizer: Any) -> str:
    """The prompt and what the model goes on with."""
    params = eval_params(result.state.opt_state, result.state.params)
    prompt = tokenizer.encode(config.prompt).tolist()
    room = config.data.length - len(prompt)
    if room < 1:
        raise JaxdlError(f"prompt has {len(prompt)} tokens and data.length={config.data.length}; shorten it.")
    n = min(config.new_tokens, room)
    (new,) = generate(
        model,
        params,
        [prompt],
        max_new_tokens=n,
        temperature=config.temperature,
        top_p=0.95 if config.temperature else None,
        stop_tokens=[tokenizer.id_of("eos")],
        seed=config.seed,
    )
    return config.prompt + tokenizer.decode(new)


if __name__ == "__main__":
    sys.exit(run_command(Config, experiment, prog="python -m experiments.language_model"))
