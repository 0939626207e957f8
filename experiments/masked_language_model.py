"""Trains an encoder to guess hidden tokens.

    python -m experiments.masked_language_model --config configs/python_bert.py

Of the chosen 15 % of tokens (or words) 80 % are hidden, 10 % replaced and 10 % left (Devlin et al. 2019). The
validation and test rows are hidden once, so that their figures can be compared from step to step.
"""

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import sketching, text, text_models
from experiments.text_rows import TextRows, about, load_parts
from experiments.training import Supervised, Task, train
from jaxdl.command import run_command
from jaxdl.config import Parsed
from jaxdl.data import ArraySource, Pipeline
from jaxdl.data.text import Documents, StreamWindows, TokenStream, mask_tokens
from jaxdl.loop import FitResult
from jaxdl.models.language import make_language_loss_fn
from jaxdl.optim import eval_params
from jaxdl.plan import Sketch, array
from jaxdl.report import write_report

BLANK = "___"


@dataclass(frozen=True)
class Config(Supervised):
    """A masked language model: text, network, optimizer, loop, hardware."""

    corpus: text.Corpus = field(default_factory=text.Corpus)
    tokenizer: text.TokenizerChoice = field(default_factory=lambda: text.TokenizerChoice("byte_level", 2048))
    data: TextRows = field(default_factory=lambda: TextRows(validation=0.02, test=0.02))
    model: text_models.Encoder = field(default_factory=text_models.Encoder)
    probability: float = 0.15  # of a token to be chosen
    prompt: str = f"for i{BLANK} range(10):"  # its blank is filled in at the end

    def problems(self) -> Iterator[str]:
        yield from self.shared_problems(self.data.batch_size, self.data.validation)
        if not 0.0 < self.probability < 1.0:
            yield f"probability={self.probability} must lie between 0 and 1."
        if self.prompt.count(BLANK) != 1:
            yield f"prompt={self.prompt!r} must hold one blank, {BLANK}."

    def sketch(self) -> Sketch:
        """The step, for `jaxdl plan`."""
        vocab_size, notes = sketching.vocabulary(self.tokenizer)
        model = self.model.build(vocab_size, self.data.length, self.hardware.dtype, head="masked_lm")
        size = self.data.batch_size, self.data.length
        batch = {**sketching.tokens(*size, "tokens", "targets"), "weight": array(size, "float32")}
        loss_fn = make_language_loss_fn(model, train=True)
        return sketching.sketch(self, model=model, inputs="tokens", batch=batch, loss_fn=loss_fn, notes=notes)


def experiment(parsed: Parsed) -> None:
    """Reads the text, trains, fills a blank, and writes the report."""
    config = parsed.config
    parts = load_parts(config.corpus, config.data)
    tokenizer = text.make_tokenizer(config.tokenizer, parts["train"], config.out)
    corrupt = mask_tokens(tokenizer, probability=config.probability)
    rows = {name: windows(part, tokenizer, config.data.length) for name, part in parts.items()}
    source = rows.pop("train")
    fixed = {name: part.map(lambda arrays: corrupt(arrays, np.random.default_rng(0))) for name, part in rows.items()}
    model = config.model.build(tokenizer.vocab_size, config.data.length, config.hardware.dtype, head="masked_lm")
    task = Task(
        model=model,
        inputs="tokens",
        train=Pipeline(source, config.data.batch_size, config.seed, batch_transforms=(corrupt,)),
        evaluated=fixed,
        train_loss_fn=make_language_loss_fn(model, train=True),
        eval_loss_fn=make_language_loss_fn(model, train=False),
        best_metric="validation/loss",
        best_mode="min",
        eval_batch_size=config.data.eval_batch_size,
    )
    done = train(parsed, task)
    if done is None:
        return
    result, report = done
    metrics = {name: result.evaluations[f"test/{name}"] for name in ("accuracy", "loss", "perplexity")}
    environment = {**report.environment, **about(parts["train"])}
    page = write_report(
        Path(config.out) / "report.html", dataclasses.replace(report, metrics=metrics, environment=environment)
    )
    print(f"{config.prompt}  {BLANK} = {', '.join(map(repr, guesses(config.prompt, model, result, tokenizer)))}")
    print(f"test accuracy {100 * metrics['accuracy']:.2f} % of hidden tokens  (perplexity {metrics['perplexity']:.2f})")
    print(f"checkpoint    {config.out}/checkpoints/{report.steps}")
    print(f"report        {page}")


def windows(documents: Documents, tokenizer: Any, length: int) -> ArraySource:
    """Rows of running text."""
    source = StreamWindows(TokenStream.build(documents, tokenizer), length).in_memory()
    return source.map(lambda arrays: {"tokens": arrays["tokens"]})


def guesses(prompt: str, model: Any, result: FitResult, tokenizer: Any, n: int = 5) -> list[str]:
    """The most likely tokens for the blank."""
    before, after = (tokenizer.encode(part).tolist() if part else [] for part in prompt.split(BLANK))
    tokens = jnp.array([[*before, tokenizer.id_of("mask"), *after]])
    params = eval_params(result.state.opt_state, result.state.params)
    logits = model.apply({"params": params}, tokens)[0, len(before)]
    return [tokenizer.decode([int(token)]) for token in np.argsort(-np.asarray(logits))[:n]]


if __name__ == "__main__":
    sys.exit(run_command(Config, experiment, prog="python -m experiments.masked_language_model"))
