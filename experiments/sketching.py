"""How an experiment says its step without reading data, for `jaxdl plan`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import images, text
from experiments.finetuning import Tuning, prepare
from jaxdl import data, parallel
from jaxdl.data.text import ByteTokenizer, Tokenizer
from jaxdl.finetune.statistics import freeze_statistics
from jaxdl.losses import LossFn
from jaxdl.models.apply import select_inputs
from jaxdl.paths import REST, Tree, claim, flatten
from jaxdl.plan import NoSketch, Remedy, Sketch, array

UNKNOWN_STEPS = 1_000_000


def sketch(
    config: Any,
    *,
    model: Any,
    inputs: str | Sequence[str],
    batch: Mapping[str, Any],
    loss_fn: LossFn,
    n_rows: int | None = None,
    notes: Sequence[str] = (),
    **more: Any,
) -> Sketch:
    """What the sections of a supervised configuration say, and what its experiment adds.

    Args:
      config: a `Supervised`.
      model, inputs, loss_fn: as for `training.Task`; `loss_fn` is that of training.
      batch: global shapes.
      n_rows: of the training set, where it is known.
      notes: what is assumed of the data.
      more: further fields of `Sketch`.
    """
    if getattr(config.parallel, "exact", False):
        notes = [*notes, "parallel.exact compiles a step in two parts; this is the step in one"]
    steps = _steps(config.loop.length, config.data.batch_size, n_rows)
    warmup = _steps(config.optimizer.warmup, config.data.batch_size, n_rows)
    tx = config.optimizer.build(steps=steps or UNKNOWN_STEPS, warmup_steps=0 if warmup is None else warmup)

    def init(key: jax.Array) -> tuple[Tree, Tree]:
        row = {name: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype) for name, leaf in batch.items()}
        first, others = select_inputs(row, inputs)
        variables = dict(model.init(key, first, **others))
        return variables.pop("params", {}), variables

    return Sketch(
        **{
            "init": init,
            "loss_fn": loss_fn,
            "tx": config.hardware.scaled(tx),
            "batch": batch,
            "trainable": config.trainable,
            "microbatches": config.hardware.microbatches,
            "guard": config.loop.guard,
            "mesh": parallel.parse_mesh(config.parallel.mesh),
            "sharding": config.parallel.rules,
            "weight_decay_rules": config.optimizer.weight_decay_rules,
            "lr_scale_rules": config.optimizer.lr_scale_rules,
            "n_rows": n_rows,
            "steps": steps,
            "remedies": tuple(_remedies(config)),
            "notes": tuple(notes),
            **more,
        }
    )


def _steps(duration: Any, batch_size: int, n_rows: int | None) -> int | None:
    if n_rows is None and duration.unit == "epochs" and duration.amount:
        return None
    return int(duration.to_steps(batch_size, n_rows or batch_size))


def _remedies(config: Any) -> Iterator[Remedy]:
    """What changes least comes first: the layout, then what is computed twice, then the training itself."""
    spread = {"replicated": "fsdp", "zero1": "fsdp", "tensor": "fsdp_tensor"}.get(config.parallel.sharding)
    if spread is not None:
        yield Remedy(f"an FSDP axis: {spread}", (f"--config.parallel.sharding={spread}",))
    remat = getattr(getattr(config, "model", None), "remat", None)
    if remat is not None and remat != "full":
        yield Remedy("remat of whole layers", ("--config.model.remat=full",))
    parts, rows = config.hardware.microbatches, config.data.batch_size
    n_data = max(1, parallel.parse_mesh(config.parallel.mesh).get("data", 1))
    for more in (2 * parts, 4 * parts):
        if rows % (more * n_data) == 0:  # each part still has a row for every device
            yield Remedy(f"{more} microbatches", (f"--config.hardware.microbatches={more}",))
    if config.hardware.compute_dtype == "float32":
        yield Remedy("computing in bfloat16", ("--config.hardware.compute_dtype=bfloat16",))
    if config.optimizer.name in ("adam", "adamw", "lamb"):
        flags = ("--config.optimizer.name=lion", "--config.optimizer.options={}")
        yield Remedy("one moment: lion, another update", flags)


# ---- fine-tuning ----


class _Row(NamedTuple):
    """As much of a pipeline as `finetuning.prepare` looks at: the first batch, and how many rows there are."""

    batch: Mapping[str, Any]
    batch_size: int
    n_rows: int

    def __getitem__(self, step: Any) -> Any:
        return {name: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype) for name, leaf in self.batch.items()}


def tuned(
    config: Any,
    *,
    model: Any,
    inputs: str | Sequence[str],
    batch: Mapping[str, Any],
    loss_fn: LossFn,
    like: Tree,
    fresh: tuple[str, ...],
    base: str,
    n_rows: int | None = None,
    notes: Sequence[str] = (),
) -> Sketch:
    """The sketch of a fine-tuning run: what moves, and what the rest is held in.

    Args:
      config: a `Supervised` with a section `finetune`.
      model, inputs, batch, n_rows, notes: as for `sketch`.
      loss_fn: of the plain model.
      like: shapes of its parameters and other collections, `(params, extra)`.
      fresh: regexes of the leaves that are not of the base.
      base: where the others are from.
    """
    steps = _steps(config.loop.length, config.data.batch_size, n_rows) or UNKNOWN_STEPS
    decided: list[Tuning] = []

    def init(key: jax.Array) -> tuple[Tree, Tree]:
        params, extra = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        rows = _Row(batch, config.data.batch_size, n_rows or steps * config.data.batch_size)
        pipeline: Any = rows
        tuning = prepare(config.finetune, params, model, pipeline, inputs, steps=steps, fresh=fresh, seed=config.seed)
        decided.append(tuning._replace(params=None))
        return tuning.params, extra

    shapes, _ = jax.eval_shape(init, jax.random.key(0))
    tuning = decided[0]
    from_seed = [regex for regex in ("adapters/.*", *fresh) if claim([regex], flatten(shapes))[0]]
    return sketch(
        config,
        model=model,
        inputs=inputs,
        batch=batch,
        loss_fn=freeze_statistics(tuning.adapt(loss_fn), tuning.trainable),
        n_rows=n_rows,
        notes=notes,
        init=init,
        trainable=tuning.trainable,
        lr_scale_rules=tuning.lr_scale_rules or config.optimizer.lr_scale_rules,
        source=(*((regex, "seed") for regex in from_seed), (REST, base)),
    )


# ---- images ----

_KNOWN = {
    "digits": ((8, 8, 1), images.DIGITS, 1442),
    "fashion_mnist": ((28, 28, 1), images.FASHION, 60_000),
    "cifar10": ((32, 32, 3), data.CIFAR10_CLASSES, 50_000),
}


def pictures(settings: images.Images) -> tuple[dict[str, Any], tuple[str, ...], int | None, list[str]]:
    """The batch, the names of the classes, the training rows and what is assumed, without a picture being read.

    Raises:
      NoSketch: a data set whose sizes are only known once it has been read.
    """
    if settings.name not in _KNOWN:
        raise NoSketch(
            f"data.name={settings.name!r}: the size and the classes of its images are known only once it is read; plan "
            f"with one of {', '.join(_KNOWN)} in its place."
        )
    shape, names, n = _KNOWN[settings.name]
    notes: list[str] = []
    rows: int | None = n
    if settings.classes:
        names, rows = tuple(names[i] for i in settings.classes if i < len(names)), None
    if rows is not None and settings.validation:
        rows -= round(rows * settings.validation)
    size = settings.batch_size
    is_mixed = settings.mixup_alpha or settings.cutmix_alpha
    label = array((size, len(names)), "float32") if is_mixed else array((size,), "int32")
    return {"image": array((size, *shape), "float32"), "label": label}, names, rows, notes


# ---- text ----


def vocabulary(choice: text.TokenizerChoice) -> tuple[int, list[str]]:
    """The size of the vocabulary, and what is assumed: a trained one gets as many tokens as were asked for.

    Raises:
      JaxdlError: a tokenizer that cannot be read.
    """
    if choice.kind == "bytes":
        return ByteTokenizer().vocab_size, []
    if choice.kind == "load" and choice.path is not None:
        return Tokenizer.load(choice.path).vocab_size, []
    return choice.vocab_size, [f"the tokenizer is taken to reach tokenizer.vocab_size={choice.vocab_size}"]


def encoded(rows: int, length: int) -> dict[str, Any]:
    """What `encode_rows` and `encode_tags` make of texts."""
    return {**tokens(rows, length, "tokens", "token_types"), **tokens(rows, length, "mask", dtype="bool")}


def tokens(rows: int, length: int, *names: str, dtype: str = "int32") -> dict[str, Any]:
    """Arrays of a batch of rows of tokens."""
    return {name: array((rows, length), dtype) for name in names}
