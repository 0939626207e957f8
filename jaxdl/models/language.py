"""The loss of a language model, which never holds the logits of a whole batch.

Dimensions: `B` batch, `T` time, `D` width, `V` vocabulary, `N` chunks of the time axis, `C` tokens of a row in a chunk.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxdl import losses
from jaxdl.choices import tell
from jaxdl.errors import JaxdlError
from jaxdl.label_scores import score_labels
from jaxdl.losses import LossFn, LossOut
from jaxdl.metrics import Mean, Perplexity, mean, spread_weight, total_where
from jaxdl.models.checks import check, count_problem
from jaxdl.paths import Tree

INPUTS = ("mask", "token_types", "positions", "documents")
MOST_LOGIT_BYTES = 256 * 2**20
LogProbFn = Callable[[Tree, Tree, Any, Any], Array]


def make_language_loss_fn(
    model: nn.Module,
    *,
    train: bool,
    chunk_tokens: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> LossFn:
    """Makes the `loss_fn` of a language model: cross-entropy of `batch["targets"]`, in nats a token.

    The hidden states are cut along time into chunks; the logits of a chunk are made, used and forgotten, and made
    again in the backward pass. The loss and its gradients are those of the plain computation.

    The batch holds `tokens` (B, T) and `targets` (B, T) int, aligned: `targets[b, t]` is what the model should say at
    `tokens[b, t]`. It may hold `mask`, `token_types`, `positions` and `documents`, which the model gets; `weight`,
    (B, T) or (B,); and `n_bytes`, (B,), the bytes of text that the targets of a row stand for. Padding (`mask` 0,
    `documents` 0) weighs nothing, whatever `weight` says.

    Args:
      model: a module with the methods `hidden` and `logits`.
      train: passed on to the model; with True it gets a `dropout` key.
      chunk_tokens: tokens of all rows together in a chunk, rounded to whole columns of the batch. None: as many as make
        256 MiB of logits a device, and no chunks where the whole batch makes less; the log says which.
      label_smoothing, z_loss: as for `losses.cross_entropy`.

    Returns:
      `loss_fn(params, extra, batch, rng) -> LossOut` with the sums `accuracy`, `perplexity` (of the likelihood alone,
      without smoothing and z-loss) and, where the batch has `n_bytes`, `bits_per_byte`.

    Raises:
      JaxdlError: the model has no such methods, or the batch lacks a key or has shapes that do not fit.

    Example:
      >>> from jaxdl.models.apply import init_model
      >>> from jaxdl.models.gpt2 import GPT2, gpt2_block
      >>> model = GPT2(gpt2_block(width=8, n_heads=2), n_layers=1, vocab_size=11, n_positions=4)
      >>> batch = {"tokens": jnp.array([[1, 2, 3]]), "targets": jnp.array([[2, 3, 4]])}
      >>> params, extra = init_model(model, jax.random.key(0), batch["tokens"])
      >>> out = make_language_loss_fn(model, train=False, chunk_tokens=1)(params, extra, batch, None)
      >>> float(out.weight), round(float(out.total) / 3) == round(math.log(11)), sorted(out.sums)
      (3.0, True, ['accuracy', 'perplexity'])
    """
    _check_model("make_language_loss_fn", model, chunk_tokens)
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss}

    def loss_fn(params: Tree, extra: Tree, batch: Mapping[str, Array], rng: Array) -> LossOut:
        _check_batch(model, batch)
        variables = {"params": params, **extra}
        hidden_BTD, changed = _hidden(model, variables, extra, batch, rng, train)
        targets_BT, weight_BT = batch["targets"], _weight(batch)

        def sums_of(hidden: Array, targets: Array, weight: Array) -> dict[str, Array]:
            logits: Any = model.apply(variables, hidden, method="logits")
            return _sums(logits, targets, weight, options)

        n = _n_chunks_of(model, variables, hidden_BTD, chunk_tokens)
        sums = _in_chunks(sums_of, n, hidden_BTD, targets_BT, weight_BT)
        return _finish(sums, jnp.sum(weight_BT), weight_BT, batch)._replace(extra=changed)

    return loss_fn


def make_sequence_log_prob_fn(model: nn.Module, *, train: bool, chunk_tokens: int | None = None) -> LogProbFn:
    """Makes the function that says how likely whole sequences are, without ever holding the logits of a batch.

    Args:
      model: as for `make_language_loss_fn`.
      train: passed on to the model; with True it gets a `dropout` key.
      chunk_tokens: as for `make_language_loss_fn`.

    Returns:
      `(params, extra, batch, rng) -> log_prob`, (B,) float32: the sum over a row's tokens of the log-probability of
      its target, in nats, each times its `weight` of the batch. A prompt weighs nothing where its weight is 0. The
      batch is that of `make_language_loss_fn`.

    Raises:
      JaxdlError: as `make_language_loss_fn`.

    Example:
      >>> from jaxdl.models.apply import init_model
      >>> from jaxdl.models.gpt2 import GPT2, gpt2_block
      >>> model = GPT2(gpt2_block(width=8, n_heads=2), n_layers=1, vocab_size=11, n_positions=4)
      >>> rows = {"tokens": jnp.array([[1, 2]]), "targets": jnp.array([[2, 3]]), "weight": jnp.array([[0.0, 1.0]])}
      >>> params, extra = init_model(model, jax.random.key(0), rows["tokens"])
      >>> log_prob = make_sequence_log_prob_fn(model, train=False)(params, extra, rows, None)
      >>> log_prob.shape, round(float(log_prob[0])) == round(-math.log(11))
      ((1,), True)
    """
    _check_model("make_sequence_log_prob_fn", model, chunk_tokens)

    def log_prob_fn(params: Tree, extra: Tree, batch: Mapping[str, Array], rng: Array) -> Array:
        _check_batch(model, batch)
        variables = {"params": params, **extra}
        hidden_BTD, _ = _hidden(model, variables, extra, batch, rng, train)

        def sums_of(hidden: Array, targets: Array, weight: Array) -> Array:
            logits: Any = model.apply(variables, hidden, method="logits")
            log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
            return jnp.sum(jnp.where(weight == 0, 0.0, log_p) * weight, axis=1)

        n = _n_chunks_of(model, variables, hidden_BTD, chunk_tokens)
        log_prob_B: Array = _in_chunks(sums_of, n, hidden_BTD, batch["targets"], _weight(batch))
        return log_prob_B

    return log_prob_fn


def _check_model(title: str, model: nn.Module, chunk_tokens: int | None) -> None:
    problems = [
        f"{type(model).__name__} has no method {name!r}; give a language model, such as jaxdl.models.gpt2.GPT2."
        for name in ("hidden", "logits")
        if not callable(getattr(model, name, None))
    ]
    check(title, *problems, None if chunk_tokens is None else count_problem("chunk_tokens", chunk_tokens))


def _check_batch(model: nn.Module, batch: Mapping[str, Array]) -> None:
    problems: list[str | None] = [
        f"the batch has no {key!r}; it has {', '.join(sorted(batch))}."
        for key in ("tokens", "targets")
        if key not in batch
    ]
    taken = inspect.signature(model.hidden).parameters
    problems += [
        f"the batch has {key!r}, which {type(model).__name__} does not take; leave it out."
        for key in INPUTS
        if key in batch and key not in taken
    ]
    if "targets" in batch and not jnp.issubdtype(batch["targets"].dtype, jnp.integer):
        problems.append(f"targets are {batch['targets'].dtype}; they must be integers.")
    shapes = {key: batch[key].shape for key in ("tokens", "targets", "mask", "documents") if key in batch}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        problems.append(f"shapes are {shapes}; all must be one (batch, time).")
    check("batch", *problems)


def _hidden(
    model: nn.Module, variables: Tree, extra: Tree, batch: Mapping[str, Array], rng: Array, train: bool
) -> tuple[Array, Tree]:
    given: dict[str, Any] = {key: batch[key] for key in INPUTS if key in batch}
    if not train:
        return cast(Array, model.apply(variables, batch["tokens"], **given, method="hidden")), None
    hidden: Any
    hidden, changed = model.apply(
        variables, batch["tokens"], **given, train=True, rngs={"dropout": rng}, mutable=list(extra), method="hidden"
    )
    return hidden, dict(changed) if extra else None


def _weight(batch: Mapping[str, Array]) -> Array:
    weight_BT = spread_weight(batch.get("weight"), batch["targets"].shape)
    for key in ("mask", "documents"):
        if key in batch:
            weight_BT = jnp.where(batch[key] != 0, weight_BT, 0.0)
    return weight_BT


def _n_chunks_of(model: nn.Module, variables: Tree, hidden_BTD: Array, chunk_tokens: int | None) -> int:
    logits: Any = jax.eval_shape(lambda x: model.apply(variables, x, method="logits"), hidden_BTD[:, :1])
    kept = hidden_BTD if jax.default_backend() == "gpu" else logits  # a GPU widens them as it reads them
    return _n_chunks(hidden_BTD.shape[:2], logits.shape[-1] * kept.dtype.itemsize, chunk_tokens)


def _n_chunks(shape: tuple[int, ...], token_bytes: int, chunk_tokens: int | None) -> int:
    (n_rows, length), n_bytes = shape, math.prod(shape) * token_bytes
    if chunk_tokens is None:
        most = MOST_LOGIT_BYTES * _n_shards()
        chunk_tokens = max(1, most // token_bytes)
        is_small = n_bytes <= most
        choice = "the whole batch" if is_small else f"{chunk_tokens} tokens"
        tell("logits at a time", choice, f"{n_bytes / 2**20:.0f} MiB in all, at most {most // 2**20} at once")
        if is_small:
            return 1
    return -(-length // max(1, chunk_tokens // n_rows))


def _n_shards() -> int:
    """Devices that share the tokens of a batch, where a step is compiled for a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in ("data", "sequence"))


def _in_chunks(fn: Any, n: int, *arrays: Array) -> Any:
    """Sums `fn` over n pieces of the time axis, every piece of all rows, so that a sharded batch stays so."""
    if n == 1:
        return fn(*arrays)
    length = arrays[0].shape[1]
    size = -(-length // n)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, n * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], n, size, *x.shape[2:]), 1, 0)

    def step(sums: Any, piece: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, jax.checkpoint(fn, prevent_cse=False)(*piece)), None

    pieces = tuple(cut(x) for x in arrays)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, *(x[0] for x in pieces)))
    return jax.lax.scan(step, zeros, pieces)[0]


def _sums(logits: Array, targets: Array, weight: Array, options: dict[str, Any]) -> dict[str, Array]:
    """Sums over one chunk: the loss, the negative log-likelihood, and how often the largest logit was right."""
    scores = score_labels(logits, targets)
    plain = mean(scores.log_z - scores.at_label, weight).total
    loss = losses.cross_entropy(logits, targets, weight, **options).total if any(options.values()) else plain
    right = scores.is_likeliest.astype(jnp.float32)
    return {"loss": loss, "nats": jax.lax.stop_gradient(plain), "right": total_where(right, weight)}


def _finish(sums: Mapping[str, Array], weight: Array, weight_BT: Array, batch: Mapping[str, Array]) -> LossOut:
    metrics: dict[str, Any] = {
        "accuracy": Mean(sums["right"], weight),
        "perplexity": Perplexity(sums["nats"], weight),
    }
    if "n_bytes" in batch:
        n_bytes = batch["n_bytes"]
        if n_bytes.shape != weight_BT.shape[:1]:
            raise JaxdlError(f"n_bytes has shape {n_bytes.shape}; it must be {weight_BT.shape[:1]}, one a row.")
        counted = jnp.where(jnp.any(weight_BT != 0, axis=1), n_bytes, 0).astype(jnp.float32)
        metrics["bits_per_byte"] = Mean(sums["nats"] / math.log(2), jnp.sum(counted))
    return LossOut(sums["loss"], weight, metrics)
