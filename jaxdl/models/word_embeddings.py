"""Word embeddings by negative sampling: skip-gram and CBOW.

Dimensions: `B` rows of running text, `T` centre words of a row, `S = T + 2 W` words of a row with the `W` on either
side, `M` noise words of a step, `D` width, `V` vocabulary.

A row's centres and contexts are gathered once and meet in a batched product, so a word costs two gathers and not two
for each of its pairs; noise words are shared by the whole step.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdl.losses import LossFn, LossOut
from jaxdl.metrics import Mean
from jaxdl.models.checks import check, count_problem, name_problem
from jaxdl.nonfinite import is_finite
from jaxdl.paths import Tree
from jaxdl.state import TrainState
from jaxdl.step import Step

Array = jax.Array
Batch = Mapping[str, Array]
Schedule = Callable[[Array], Array]

OBJECTIVES = ("skip_gram", "cbow")


class WordEmbeddings(nn.Module):
    """Two tables: the vectors of words (those one keeps) and of contexts.

    Paths: `embed/word/embedding`, `embed/context/embedding`, both (V, D).

    Args:
      vocab_size: V.
      width: D.

    Raises:
      ModelError: a size below 1.

    Example:
      >>> model = WordEmbeddings(vocab_size=5, width=3)
      >>> variables = model.init(jax.random.key(0), jnp.zeros((2,), jnp.int32), jnp.zeros((4,), jnp.int32))
      >>> [rows.shape for rows in model.apply(variables, jnp.zeros((2,), jnp.int32), jnp.zeros((4,), jnp.int32))]
      [(2, 3), (4, 3)]
    """

    vocab_size: int
    width: int

    def __post_init__(self) -> None:
        check("WordEmbeddings", count_problem("vocab_size", self.vocab_size), count_problem("width", self.width))
        super().__post_init__()

    @nn.compact
    def __call__(self, words: Array, contexts: Array) -> tuple[Array, Array]:
        """Ids (...,) of words and of contexts -> their rows (..., D) in either table."""
        return _Tables(self.vocab_size, self.width, name="embed")(words, contexts)


class _Tables(nn.Module):
    vocab_size: int
    width: int

    @nn.compact
    def __call__(self, words: Array, contexts: Array) -> tuple[Array, Array]:
        def start(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return jax.random.uniform(key, shape, dtype, -0.5, 0.5) / self.width

        word = nn.Embed(self.vocab_size, self.width, embedding_init=start, name="word")
        context = nn.Embed(self.vocab_size, self.width, embedding_init=nn.initializers.zeros, name="context")
        return word(words), context(contexts)


class Noise(NamedTuple):
    """The distribution of the negative words, and how many are drawn.

    Attributes:
      cumulative: float32 (V,), rising to 1; see `noise_cdf`.
      n_shared: M, drawn anew each step and shared by all pairs of the step.
      n_negatives: how many negatives a pair counts for; each of the M weighs `n_negatives / M`, so that the expected
        gradient is that of as many own draws.
    """

    cumulative: Array
    n_shared: int = 64
    n_negatives: float = 5.0

    def draw(self, rng: Array) -> Array:
        """int32 (M,)."""
        uniform = jax.random.uniform(rng, (self.n_shared,))
        found = jnp.searchsorted(self.cumulative, uniform, side="right")
        return jnp.minimum(found, len(self.cumulative) - 1).astype(jnp.int32)


def noise_cdf(counts: Any, power: float = 0.75) -> Array:
    """The cumulative distribution of noise words, proportional to `counts ** power`.

    Args:
      counts: (V,), how often each word occurs.
      power: 0.75 in the paper; 0 is uniform.

    Example:
      >>> noise_cdf([1, 16]).tolist()
      [0.1111111119389534, 1.0]
    """
    shares = np.asarray(counts, np.float64) ** power
    return jnp.asarray(np.cumsum(shares) / shares.sum(), jnp.float32)


def make_embedding_loss(model: WordEmbeddings, noise: Noise, *, objective: str = "skip_gram") -> LossFn:
    """Makes the `loss_fn` of negative sampling; its gradient is dense over both tables.

    With x a centre, y a word of its window, u and v their rows: `-log s(u v) - k E[log s(-u n)]` over noise n, summed
    over pairs ("skip_gram"); or with u the mean of the window's rows, once a centre ("cbow").

    Args:
      model: the tables.
      noise: the negative words, drawn on the device from the step's rng.
      objective: "skip_gram" or "cbow".

    Returns:
      A loss over batches of "tokens" (B, S), "documents" (B, S) and "window" (B, T), as `WordWindows` gives: its weight
      is the number of pairs (of centres for "cbow").

    Raises:
      ModelError: an unknown objective.

    Source: Mikolov et al. 2013, "Distributed representations of words and phrases", arXiv:1310.4546, eq. 4.

    Example:
      >>> model, noise = WordEmbeddings(4, 2), Noise(noise_cdf([1, 1, 1, 1]), n_shared=3, n_negatives=5)
      >>> batch = {"tokens": jnp.array([[0, 1, 2]]), "documents": jnp.ones((1, 3), int), "window": jnp.array([[1]])}
      >>> params = model.init(jax.random.key(0), jnp.arange(1), jnp.arange(1))["params"]
      >>> out = make_embedding_loss(model, noise)(params, {}, batch, jax.random.key(1))
      >>> float(out.weight), round(float(out.total / out.weight / jnp.log(2.0)), 4)  # zero scores: 1 + 5 negatives
      (2.0, 6.0)
    """
    check("make_embedding_loss", name_problem("objective", objective, OBJECTIVES))

    def loss_fn(params: Tree, extra: Tree, batch: Batch, rng: Array) -> LossOut:
        words, contexts = _ids(batch, noise.draw(rng), objective)
        rows: Any = model.apply({"params": params}, words, contexts)
        return _rows_loss(rows[0], rows[1], batch, noise, objective)

    return loss_fn


def _ids(batch: Batch, negatives: Array, objective: str) -> tuple[Array, Array]:
    """Which rows of the word and of the context table a step reads: flat ids, noise last."""
    centres = _centres(batch)
    words, contexts = (centres, batch["tokens"]) if objective == "skip_gram" else (batch["tokens"], centres)
    return words.reshape(-1), jnp.concatenate([contexts.reshape(-1), negatives])


def _centres(batch: Batch) -> Array:
    side = (batch["tokens"].shape[1] - batch["window"].shape[1]) // 2
    return batch["tokens"][:, side : batch["tokens"].shape[1] - side]


def _rows_loss(word_ND: Array, context_ND: Array, batch: Batch, noise: Noise, objective: str) -> LossOut:
    (b, s), t, d = batch["tokens"].shape, batch["window"].shape[1], word_ND.shape[-1]
    noise_MD, context_ND = context_ND[-noise.n_shared :], context_ND[: -noise.n_shared]
    is_pair_BTS = pairs_of(batch)
    n_pairs_BT = jnp.sum(is_pair_BTS, -1)
    if objective == "skip_gram":
        query_BTD, weight_BT = word_ND.reshape(b, t, d), n_pairs_BT
        scores_BTS = jnp.einsum("btd,bsd->bts", query_BTD, context_ND.reshape(b, s, d))
        attracted = jnp.sum(jax.nn.softplus(-scores_BTS) * is_pair_BTS)
    else:
        mean_BTS = is_pair_BTS / jnp.maximum(n_pairs_BT, 1.0)[..., None]
        query_BTD = jnp.einsum("bts,bsd->btd", mean_BTS, word_ND.reshape(b, s, d))
        weight_BT = (n_pairs_BT > 0).astype(query_BTD.dtype)
        scores_BT = jnp.sum(query_BTD * context_ND.reshape(b, t, d), -1)
        attracted = jnp.sum(jax.nn.softplus(-scores_BT) * weight_BT)
    noise_scores_BTM = query_BTD.reshape(b * t, d) @ noise_MD.T
    repelled_BT = jnp.sum(jax.nn.softplus(noise_scores_BTM), -1) * weight_BT.reshape(-1)
    each = noise.n_negatives / noise.n_shared
    return LossOut(attracted + each * jnp.sum(repelled_BT), jnp.sum(weight_BT))


def pairs_of(batch: Batch) -> Array:
    """Which words of a row are in the window of which centre: float32 (B, T, S).

    A pair lies at most `window` words apart and in one document; no word pairs with its own place.

    Example:
      >>> batch = {"tokens": jnp.arange(5)[None], "documents": jnp.array([[1, 1, 1, 2, 2]]), "window": jnp.array([[2]])}
      >>> pairs_of(batch).tolist()
      [[[1.0, 1.0, 0.0, 0.0, 0.0]]]
    """
    documents_BS, window_BT = batch["documents"], batch["window"].astype(jnp.int32)
    (_, s), t = documents_BS.shape, window_BT.shape[1]
    side = (s - t) // 2
    apart_TS = np.abs(np.arange(s)[None, :] - np.arange(t)[:, None] - side)
    own_BT = documents_BS[:, side : s - side]
    is_near_BTS = jnp.asarray(apart_TS)[None] <= window_BT[..., None]
    is_same_BTS = (documents_BS[:, None, :] == own_BT[..., None]) & (own_BT > 0)[..., None]
    return (is_near_BTS & is_same_BTS & jnp.asarray(apart_TS > 0)[None]).astype(jnp.float32)


def create_row_state(params: Tree, rng: Array) -> TrainState:
    """The state of `make_row_step`: parameters and one accumulator a row of each table.

    Args:
      params: of a `WordEmbeddings`.
      rng: typed key; the noise of a step is a function of it and the step.
    """
    sums = jax.tree.map(lambda table: jnp.zeros(table.shape[0], jnp.float32), params)
    return TrainState(jnp.int32(0), jax.tree.map(jnp.array, params), {}, sums, rng)


def make_row_step(noise: Noise, *, learning_rate: Schedule, objective: str = "skip_gram", eps: float = 1e-8) -> Step:
    """Makes a train step whose cost does not grow with the vocabulary: only the rows that a batch reads are changed.

    Row-wise Adagrad: row i keeps the sum a_i of the mean squares of the gradients of all its occurrences, and moves by
    `-rate * g / (sqrt(a_i) + eps)` for each of them, g the gradient of the summed loss. A non-finite step stops the
    run as `guard(step, "stop")` does, without its copy of the tables.

    Args:
      noise, objective: as for `make_embedding_loss`, whose gradient it uses.
      learning_rate: `step -> rate`.
      eps: keeps the first step of a row finite.

    Returns:
      `(state, batch) -> (state, metrics)` on the state of `create_row_state`.

    Raises:
      ModelError: an unknown objective.

    Source: Duchi et al. 2011 (Adagrad); one accumulator a row as in Naumov et al. 2019, "DLRM", arXiv:1906.00091.
    """
    check("make_row_step", name_problem("objective", objective, OBJECTIVES))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        is_held = state.step < 0
        negatives = noise.draw(jax.random.fold_in(state.rng, state.step))
        ids = dict(zip(("word", "context"), _ids(batch, negatives, objective), strict=True))
        tables, sums = state.params["embed"], state.opt_state["embed"]

        def loss(rows: dict[str, Array]) -> tuple[Array, LossOut]:
            out = _rows_loss(rows["word"], rows["context"], batch, noise, objective)
            return out.total, out

        rows = {name: tables[name]["embedding"][ids[name]] for name in ids}
        grads, out = jax.grad(loss, has_aux=True)(rows)
        is_good = is_finite((out.total, grads)) & ~is_held
        rate = learning_rate(state.step)
        new_tables, new_sums = {}, {}
        for name, grad in grads.items():
            grad = jnp.where(is_good, grad, 0.0)
            total = sums[name]["embedding"].at[ids[name]].add(jnp.mean(grad**2, -1))
            scale = rate / (jnp.sqrt(total[ids[name]]) + eps)
            new_tables[name] = {"embedding": tables[name]["embedding"].at[ids[name]].add(-scale[:, None] * grad)}
            new_sums[name] = {"embedding": total}
        held = jnp.where(is_held, state.step, ~state.step)
        new = state.replace(
            step=jnp.where(is_good, state.step + 1, held),
            params={"embed": new_tables},
            opt_state={"embed": new_sums},
        )
        return new, {"loss": Mean(out.total, out.weight), "learning_rate": rate}

    return step
