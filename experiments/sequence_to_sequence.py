"""Trains a recurrent encoder and decoder with attention to write spelled-out dates in digits.

    python -m experiments.sequence_to_sequence --config configs/dates_lstm.py --config.model.attention multiplicative

The reported exact match is of decoded test rows, none of whose dates occurs in the training rows.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments import dates, sketching
from experiments.training import Supervised, Task, train
from jaxdl import losses, metrics
from jaxdl.command import run_command
from jaxdl.config import Parsed
from jaxdl.data import Pipeline, eval_batches
from jaxdl.loop import FitResult
from jaxdl.losses import LossOut
from jaxdl.models.apply import make_loss_fn
from jaxdl.models.seq2seq import Seq2Seq
from jaxdl.models.seq2seq_decode import make_translator
from jaxdl.objectives import Objective
from jaxdl.optim import eval_params
from jaxdl.plan import Sketch, array
from jaxdl.report import write_report


@dataclass(frozen=True)
class Network:
    """A recurrent encoder and decoder with attention."""

    width: int = 128  # of a state
    embed_width: int = 64  # of the characters' embeddings
    cell: Literal["lstm", "gru", "rnn", "rnn_relu"] = "lstm"  # the kind of recurrence
    n_encoder_layers: int = 1  # bidirectional layers that read
    n_decoder_layers: int = 1  # layers that write
    attention: Literal["additive", "multiplicative"] = "additive"  # how a state and a source position are scored
    dropout_rate: float = 0.0  # share of features dropped in training

    def build(self, dtype: Any) -> Seq2Seq:
        sizes = len(dates.SOURCE_CHARACTERS) + 3, len(dates.TARGET_CHARACTERS) + 3
        return Seq2Seq(
            *sizes, dtype=dtype, **{entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        )


@dataclass(frozen=True)
class Config(Supervised):
    """A translation of dates: data, network, decoding, optimizer, loop, hardware."""

    data: dates.Dates = field(default_factory=dates.Dates)
    model: Network = field(default_factory=Network)
    beam_width: int = 1  # hypotheses kept when the test rows are decoded; 1 is greedy
    length_penalty: float = 0.0  # exponent that favours long outputs in beam search
    label_smoothing: float = 0.0  # share of the probability spread over all characters

    def problems(self) -> Iterator[str]:
        yield from self.shared_problems(self.data.batch_size, self.data.n_validation)
        if self.beam_width < 1:
            yield f"beam_width={self.beam_width} must be at least 1."
        if self.length_penalty < 0:
            yield f"length_penalty={self.length_penalty} must not be negative."
        if not 0.0 <= self.label_smoothing < 1.0:
            yield f"label_smoothing={self.label_smoothing} must lie in [0, 1)."

    def sketch(self) -> Sketch:
        """The step, for `jaxdl plan`."""
        model, rows = self.model.build(self.hardware.dtype), self.data.batch_size
        objective = translation(label_smoothing=self.label_smoothing)
        return sketching.sketch(
            self,
            model=model,
            inputs=INPUTS,
            batch={
                "source": array((rows, dates.SOURCE_LENGTH), "int32"),
                "lengths": array((rows,), "int32"),
                **sketching.tokens(rows, dates.TARGET_LENGTH, "previous", "targets"),
            },
            loss_fn=make_loss_fn(model, objective, inputs=INPUTS, train=True),
            n_rows=self.data.n_train,
        )


INPUTS = ("source", "lengths", "previous")


def experiment(parsed: Parsed) -> None:
    """Writes the dates down, trains, decodes the test rows, and writes the report."""
    config = parsed.config
    sources = dates.load(config.data, config.seed)
    model, inputs = config.model.build(config.hardware.dtype), INPUTS
    objective = translation(label_smoothing=config.label_smoothing)
    task = Task(
        model=model,
        inputs=inputs,
        train=Pipeline(sources.pop("train"), config.data.batch_size, config.seed),
        evaluated=sources,
        train_loss_fn=make_loss_fn(model, objective, inputs=inputs, train=True),
        eval_loss_fn=make_loss_fn(model, translation(), inputs=inputs, train=False),
        best_metric="validation/exact_match",
        best_mode="max",
        eval_batch_size=config.data.eval_batch_size,
    )
    done = train(parsed, task)
    if done is None:
        return
    result, report = done
    rows = translate(task, result, config)
    exact = float(np.mean([row["written"] == row["right"] for row in rows]))
    mistakes = [row for row in rows if row["written"] != row["right"]]
    page = write_report(
        Path(config.out) / "report.html",
        dataclasses.replace(
            report,
            metrics={"exact match, decoded": exact, "loss": result.evaluations["test/loss"]},
            tables={"Translations": rows[:10], "Mistakes": mistakes[:20]},
        ),
    )
    for row in rows[:5]:
        print(f"{row['phrase']} -> {row['written']}")
    print(f"test exact match {100 * exact:.2f} %  ({len(mistakes)} of {len(rows)} wrong, {report.steps} steps)")
    print(f"checkpoint    {config.out}/checkpoints/{report.steps}")
    print(f"report        {page}")


def translation(*, label_smoothing: float = 0.0) -> Objective:
    """Cross-entropy and accuracy of `batch["targets"]`, (B, T) int, and the share of rows without a mistake.

    Padding counts nothing. Where all characters of a row are right given the right ones before them, greedy decoding
    writes the same row: this share is its exact match.

    Example:
      >>> import jax.numpy as jnp
      >>> batch = {"targets": jnp.array([[5, 2, 0]])}
      >>> out = translation()(9 * jax.nn.one_hot(jnp.array([[5, 2, 7]]), 8), batch)
      >>> float(out.weight), out.sums["exact_match"].finish()
      (2.0, 1.0)
    """

    def objective(logits_BTV: jax.Array, batch: Mapping[str, jax.Array]) -> LossOut:
        targets_BT, weight_B = batch["targets"], batch.get("weight")
        is_real_BT = targets_BT != dates.PAD
        weight_BT = metrics.spread_weight(weight_B, targets_BT.shape) * is_real_BT
        is_right_B = ((logits_BTV.argmax(-1) == targets_BT) | ~is_real_BT).all(1)
        loss = losses.cross_entropy(logits_BTV, targets_BT, weight_BT, label_smoothing=label_smoothing)
        sums = {
            "accuracy": metrics.accuracy(logits_BTV, targets_BT, weight_BT),
            "exact_match": metrics.mean(is_right_B, weight_B),
        }
        return LossOut(*loss, sums)

    return objective


def translate(task: Task, result: FitResult, config: Config) -> list[dict[str, str]]:
    """The test rows, decoded: what was said, what the network wrote, what is right."""
    assert isinstance(task.model, Seq2Seq)
    decode = make_translator(
        task.model,
        max_length=dates.TARGET_LENGTH,
        bos=dates.BOS,
        eos=dates.EOS,
        pad=dates.PAD,
        beam_width=config.beam_width,
        length_penalty=config.length_penalty,
    )
    source = task.evaluated["test"]
    variables = {"params": eval_params(result.state.opt_state, result.state.params)}
    batches = eval_batches(source, task.eval_batch_size)
    written = np.concatenate([np.asarray(decode(variables, batch["source"], batch["lengths"])) for batch in batches])
    return [
        {
            "phrase": dates.decode(row["source"], dates.SOURCE_CHARACTERS),
            "written": dates.decode(tokens, dates.TARGET_CHARACTERS),
            "right": dates.decode(row["targets"], dates.TARGET_CHARACTERS),
        }
        for row, tokens in zip((source[i] for i in range(len(source))), written, strict=False)
    ]


if __name__ == "__main__":
    sys.exit(run_command(Config, experiment, prog="python -m experiments.sequence_to_sequence"))
