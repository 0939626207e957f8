"""What fine-tuning experiments share: what moves, what the frozen part is held in, and what is left behind."""

import dataclasses
import json
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxdl import paths
from jaxdl.config import Duration
from jaxdl.data import Pipeline
from jaxdl.finetune import lora, presets
from jaxdl.finetune.adapters import with_adapters
from jaxdl.finetune.anatomy import dissect
from jaxdl.finetune.lora import Lora
from jaxdl.finetune.quantize import dequantize, quantize, with_quantized
from jaxdl.finetune.unfreeze import Stages
from jaxdl.losses import LossFn
from jaxdl.models.apply import select_inputs
from jaxdl.parallel import is_first
from jaxdl.paths import Rules, Tree
from jaxdl.run import replace_text
from jaxdl.state import ALL, split_trainable


@dataclass(frozen=True)
class Finetune:
    """Which parameters move."""

    method: Literal["full", "head", "last_layers", "bitfit", "norm", "no_embeddings", "lora"] = "full"  # a preset
    trainable: tuple[
        str, ...
    ] = ()  # regexes over parameter paths: these move instead of a preset's, all else is frozen
    n_layers: int = 1  # with method=last_layers: how many layers move
    open_every: Duration | None = (
        None  # gradual unfreezing: at first the head moves, after each such time one more layer
    )
    layer_decay: float = 1.0  # the learning rate of each layer is this factor times that of the layer after it (LLRD)
    targets: tuple[str, ...] = (".*attention/(query|key|value|output)/kernel",)  # with method=lora: regexes of matrices
    rank: int = 8  # with method=lora: of each branch
    alpha: float = 16.0  # with method=lora: a branch counts alpha / rank
    is_rank_stabilized: bool = False  # with method=lora: alpha / sqrt(rank) instead
    has_magnitude: bool = False  # with method=lora: DoRA
    adapter_dropout_rate: float = 0.0  # with method=lora: share of a branch's inputs dropped in training
    base: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"  # what frozen kernels are held in

    def problems(self) -> Iterator[str]:
        counts = {"n_layers": self.n_layers, "rank": self.rank}
        yield from (f"{name}={n} must be at least 1." for name, n in counts.items() if n < 1)
        if not self.alpha > 0:
            yield f"alpha={self.alpha} must be positive."
        if not 0 < self.layer_decay <= 1:
            yield f"layer_decay={self.layer_decay} must lie in (0, 1]; 1 is one rate for all layers."
        if not 0 <= self.adapter_dropout_rate < 1:
            yield f"adapter_dropout_rate={self.adapter_dropout_rate} must lie in [0, 1)."
        if self.method == "lora" and self.trainable:
            yield f"trainable={self.trainable} and method='lora' exclude each other; use another method, or drop one."
        if self.method == "lora" and not self.targets:
            yield "method='lora' needs targets, such as '.*attention/(query|value)/kernel'."
        if self.open_every is not None and (self.method != "full" or self.trainable):
            yield "open_every needs method='full' and no trainable: it opens the model from the head down."
        if self.open_every is not None and not self.open_every.amount:
            yield f"open_every={str(self.open_every)!r} must be longer than nothing."
        if self.base in ("int8", "nf4") and self.method != "lora":
            yield f"base={self.base!r} needs method='lora': codes cannot train."

    def adapters(self) -> Lora:
        """The adapters of method=lora."""
        return Lora(
            [*((regex, self.rank) for regex in self.targets), (".*", None)],
            alpha=self.alpha,
            is_rank_stabilized=self.is_rank_stabilized,
            has_magnitude=self.has_magnitude,
            dropout_rate=self.adapter_dropout_rate,
        )

    def clashes(self, config: Any) -> Iterator[str]:
        """What of the other sections says the same as this one."""
        if config.trainable != ALL:
            yield "trainable has no use here; say what moves by finetune.method or finetune.trainable."
        if self.layer_decay < 1 and config.optimizer.lr_scale_rules is not None:
            yield "finetune.layer_decay and optimizer.lr_scale_rules exclude each other; drop one."


class Tuning(NamedTuple):
    """What `prepare` decided.

    Attributes:
      params: what training starts from, adapters included.
      stages: `[(first step, trainable rules), ...]`, one where nothing opens later.
      lr_scale_rules: as for `make_optimizer`.
      lora: the settings of the adapters, or None.
    """

    params: Tree
    stages: Stages
    lr_scale_rules: Rules | None
    lora: Lora | None

    @property
    def trainable(self) -> Rules:
        """What ever moves: stages only open."""
        return self.stages[-1][1]

    def adapt(self, loss_fn: LossFn) -> LossFn:
        """Makes a loss of the model into that of the model with its adapters and quantised kernels."""
        return with_quantized(loss_fn) if self.lora is None else with_adapters(loss_fn, self.lora)

    def whole(self, params: Tree) -> Tree:
        """The parameters of the plain model: quantised kernels decoded, adapters added in."""
        params = dequantize(params)
        return params if self.lora is None else lora.merge(params, self.lora)


def prepare(
    settings: Finetune,
    params: Tree,
    model: Any,
    data: Pipeline,
    inputs: str | Sequence[str],
    *,
    steps: int,
    fresh: tuple[str, ...],
    seed: int,
) -> Tuning:
    """Turns the settings into rules, and adds what they ask for to the parameters.

    Args:
      settings: of the configuration.
      params: of the pretrained model, with the fresh leaves in place.
      model: the module.
      data, inputs: what the model is called with, as for `make_loss_fn`.
      steps: of the whole run; stages that would open later are left out.
      fresh: regexes of the leaves that are not pretrained; they always move.
      seed: of the adapters.

    Raises:
      JaxdlError: rules that do not fit the model.
    """
    chosen = None
    if settings.method == "lora":
        chosen = settings.adapters()
        first, others = select_inputs(data[0], inputs)
        params = lora.add(jax.random.key(seed), params, chosen, model, first, **others)
    trainable, scales = _trainable(settings, params, fresh), None
    if settings.layer_decay < 1:
        scales = presets.layerwise_decay(params, settings.layer_decay, trainable=trainable)
    stages: Stages = [(0, trainable)]
    if settings.open_every is not None:
        every = settings.open_every.to_steps(data.batch_size, data.n_rows)
        opening = [presets.head_only(params), *_growing(params), trainable]
        rules = [_with_fresh(rules, params, fresh) for rules in opening]
        stages = [(k * every, one) for k, one in enumerate(rules) if k * every < steps]
    return Tuning(_held_in(settings.base, params, stages[-1][1]), stages, scales, chosen)


def _growing(params: Tree) -> list[Rules]:
    """The last layer, the last two, and so on, but for all."""
    most = min(map(len, dissect(params, "open_every").stacks.values()))
    return [presets.last_layers(params, n) for n in range(1, most + 1)]


def _trainable(settings: Finetune, params: Tree, fresh: tuple[str, ...]) -> Rules:
    if settings.trainable:
        return presets.only(*settings.trainable)
    if settings.method == "lora":
        return presets.only("adapters/.*", *fresh)
    if settings.method == "full":
        return presets.only(".*")
    chosen = {
        "head": lambda: presets.head_only(params),
        "last_layers": lambda: presets.last_layers(params, settings.n_layers),
        "bitfit": lambda: presets.bitfit(params),
        "norm": lambda: presets.norm_only(params),
        "no_embeddings": lambda: presets.freeze_embeddings(params),
    }[settings.method]()
    return _with_fresh(chosen, params, fresh)


def _with_fresh(rules: Rules, params: Tree, fresh: tuple[str, ...]) -> Rules:
    moves = paths.flatten(paths.match(rules, params, what="trainable"))
    frozen = [regex for regex in fresh if not all(moves[path] for path in paths.claim([regex], moves)[0])]
    return [*((regex, True) for regex in frozen), *rules]


def _held_in(kind: str, params: Tree, trainable: Rules) -> Tree:
    """The parameters with the frozen ones in fewer bytes: all of them as bfloat16, or the kernels as codes."""
    if kind == "float32":
        return params
    moves = paths.match(trainable, params, what="trainable")
    if kind == "bfloat16":
        return jax.tree.map(lambda leaf, is_moving: leaf if is_moving else leaf.astype(jnp.bfloat16), params, moves)
    keep = [(regex, None) for regex, is_moving in trainable if is_moving]
    return quantize(params, [*keep, (".*/kernel", kind), (".*", None)])


@dataclass(frozen=True)
class Outcome:
    """What a fine-tuning run comes to, a row of the table that `experiments.finetuning_table` prints."""

    run: str
    accuracy: float  # on the test rows
    n_moved: int  # parameters that moved
    n_params: int
    delta_bytes: int  # the change on disk
    seconds: float
    peak_mib: float  # of the process, data and libraries included


OUTCOME = "finetuning.json"
HEADLINE = ("test/accuracy", "test/loss", "test/confusion/f1", "test/calibration/ece")


def write_outcome(out: str, accuracy: float, tuning: Tuning, params: Tree, seconds: float) -> None:
    """Writes `finetuning.json` into the run folder.

    Args:
      out: the run folder; `delta` in it is what changed.
      accuracy: on the test rows.
      tuning: of the run.
      params: the parameters at its end.
      seconds: since the experiment began.
    """
    if not is_first():
        return
    moving, frozen = split_trainable(params, tuning.trainable)
    n_moved, n_frozen = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (moving, frozen))
    found = Outcome(
        run=Path(out).name,
        accuracy=accuracy,
        n_moved=n_moved,
        n_params=n_moved + n_frozen,
        delta_bytes=sum(path.stat().st_size for path in (Path(out) / "delta").iterdir()),
        seconds=seconds,
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )
    replace_text(Path(out) / OUTCOME, json.dumps(dataclasses.asdict(found), indent=2) + "\n")
