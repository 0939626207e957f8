"""Prompt tuning (Lester et al. 2021) and prefix tuning (Li & Liang 2021): trained vectors at slots among the tokens.

A slot is an id beyond the vocabulary, which `InsertSlots` puts into the rows of a batch. At a slot the token embedding
is a trained row (a prompt), or the keys and values of each layer are trained rows (a prefix), or both.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdl import paths
from jaxdl.errors import JaxdlError
from jaxdl.finetune.adapters import AdapterError, Call, base_leaf
from jaxdl.finetune.sites import Site, Survey, join, key_of
from jaxdl.models.checks import count_problem
from jaxdl.paths import Rules, Tree


@dataclass(frozen=True)
class Slots:
    """How many slots there are, and what stands at them.

    Leaves: `prompt` (n_slots, D) at the table; `prefix` (n_slots, outputs...) at each module that the rules name.
    Outside of `jit`, BERT and its kin refuse ids beyond their vocabulary, slots included.

    Attributes:
      n_slots: slots of a row.
      first_id: the id of the first; it and the next are no rows of the table, so that a model without the adapters
        gives NaN. The table of a model of this library has `models.embedding.padded_size(vocab_size)` rows.
      has_prompt: rows in the place of the token embedding (Lester et al. 2021, arXiv:2104.08691); what is added to
        that, such as positions, still is. By default where there is no prefix: no token would see a prompt below a
        prefix in every layer.
      prefix: `(regex, bool)` over paths of modules: rows in the place of their outputs (Li & Liang 2021,
        arXiv:2101.00190, eq. 3), as `[(".*/attention/(key|value)", True), (".*", False)]`. Rotary positions turn them
        like any key. Not for cross-attention, whose keys are not those of the tokens.
      table: the path of the token embedding.
      tokens: the prompt begins as the embedding of these, over and over; by default as noise of the table's spread.

    Raises:
      AdapterError: numbers out of range, or neither prompt nor prefix.

    Example:
      >>> from jaxdl.finetune.adapters import add
      >>> model, settings = nn.Embed(10, 4), Slots(3, first_id=10, table="")
      >>> params = {"embedding": jnp.ones((10, 4))}
      >>> add(jax.random.key(0), params, settings, model, jnp.array([[1, 2]]))["adapters"]["prompt"].shape
      (3, 4)
    """

    n_slots: int
    _: KW_ONLY
    first_id: int
    has_prompt: bool | None = None
    prefix: Rules = ()
    table: str = "embed/token"
    tokens: Sequence[int] = ()

    order: ClassVar[int] = 2
    names: ClassVar[tuple[str, ...]] = ("prompt", "prefix")

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", tuple(tuple(rule) for rule in self.prefix))
        object.__setattr__(self, "tokens", tuple(self.tokens))
        if self.has_prompt is None:
            object.__setattr__(self, "has_prompt", not self.prefix)
        problems = [
            count_problem("n_slots", self.n_slots),
            count_problem("first_id", self.first_id),
            None
            if self.has_prompt or self.prefix
            else "there is neither a prompt nor a prefix; set has_prompt or prefix.",
            "tokens begin a prompt, and has_prompt=False; drop them." if self.tokens and not self.has_prompt else None,
            *(
                f"prefix rule {rule!r} must be (regex, True) or (regex, False)."
                for rule in self.prefix
                if len(rule) != 2 or not isinstance(rule[1], bool)
            ),
        ]
        if found := [problem for problem in problems if problem]:
            raise AdapterError.listing("Slots", found)

    @property
    def slot_ids(self) -> range:
        """The ids of the slots, to be put in front of the tokens of a prompt for `generate`."""
        return range(self.first_id, self.first_id + self.n_slots)

    def init(self, key: Array, survey: Survey, params: Tree) -> dict[str, Array]:
        """The prompt as said; prefixes standard normal, as PEFT draws both."""
        table = survey.sites.get(self.table)
        chosen = paths.match(self.prefix, {path: path for path in survey.sites}, what="prefix") if self.prefix else {}
        sites = [survey.sites[path] for path, is_chosen in chosen.items() if is_chosen]
        if problems := [*self._table_problems(table, survey), *(p for site in sites if (p := _prefix_problem(site)))]:
            raise AdapterError.listing("slots", problems)
        flat = {}
        if self.has_prompt:
            flat[join(self.table, "prompt")] = self._prompt(key, base_leaf(params, join(self.table, "embedding")))
        for site in sites:
            path = join(site.path, "prefix")
            flat[path] = jax.random.normal(key_of(key, path), (*site.stack, self.n_slots, *site.outputs))
        return flat

    def _prompt(self, key: Array, embedding: Array) -> Array:
        if self.tokens:
            return jnp.take(embedding, jnp.resize(jnp.array(self.tokens), (self.n_slots,)), axis=0).astype(jnp.float32)
        noise = jax.random.normal(key_of(key, self.table), (self.n_slots, embedding.shape[1]))
        return noise * jnp.std(embedding.astype(jnp.float32))

    def _table_problems(self, table: Site | None, survey: Survey) -> Iterator[str]:
        if table is None or table.leaf != "embedding":
            known = [path for path, site in survey.sites.items() if site.leaf == "embedding"]
            yield f"table={self.table!r} is no nn.Embed that the model calls; there is {', '.join(known) or 'none'}."
        elif self.first_id < table.inputs[0]:
            yield f"first_id={self.first_id} is a row of {self.table}; use {table.inputs[0]}, or more."
        elif outside := [token for token in self.tokens if not 0 <= token < table.inputs[0]]:
            yield f"tokens have {outside}, and {self.table} has {table.inputs[0]} rows."

    def run(self, call: Call, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The output with the trained rows at the slots."""
        if call.method != "__call__":
            return inner(*args, **kwargs)
        if "/".join(call.module.path) == self.table:
            return self._embed(call, inner, *args, **kwargs)
        y = inner(*args, **kwargs)
        leaves = call.read(("prefix",))
        return self._put(call, leaves["prefix"], y) if leaves else y

    def _embed(self, call: Call, inner: Callable[..., Any], inputs: Array) -> Array:
        is_slot = inputs >= self.first_id
        call.trace.slots = jnp.where(is_slot, inputs - self.first_id, -1)
        y = inner(jnp.where(is_slot, 0, inputs))
        return self._put(call, call.read(("prompt",)).get("prompt", jnp.zeros((self.n_slots, y.shape[-1]))), y)

    def _put(self, call: Call, rows: Array, y: Array) -> Array:
        slots, path = call.trace.slots, "/".join(call.module.path)
        if slots is None:
            raise AdapterError(
                f"{path} has a prefix and is called before {self.table!r}, which tells the slots; set table."
            )
        if y.shape[: slots.ndim] != slots.shape:
            raise AdapterError(
                f"{path} has a prefix and an output {y.shape}, but the tokens are {slots.shape}; a prefix is for keys "
                "and values of the tokens themselves, not of a memory."
            )
        is_slot = (slots >= 0).reshape(slots.shape + (1,) * (y.ndim - slots.ndim))
        return jnp.where(is_slot, jnp.take(rows, jnp.maximum(slots, 0), axis=0).astype(y.dtype), y)


def _prefix_problem(site: Site) -> str | None:
    if site.leaf != "kernel" or site.problem or issubclass(site.kind, nn.Conv):
        return f"{site.path} ({site.kind.__name__}) can have no prefix; that stands at nn.Dense or nn.DenseGeneral."
    return None


_FILL: dict[str, Any] = {"mask": 1, "weight": 0, "targets": 0, "label": 0, "word_ids": -1}
_COPIED = ("token_types", "documents")
_DECODER = ("decoder_tokens", "targets", "weight", "label")


@dataclass(frozen=True)
class InsertSlots:
    """A transform of examples or batches that puts slots into the rows, each time at the same place.

    Every array of the shape of "tokens" grows: "tokens" by the slots' ids, "mask" by 1, "weight" by 0 (it is made where
    there are "targets" or a "label" a token), "positions" are counted on, "token_types" and "documents" are those of
    the token that follows. Where there are "decoder_tokens", targets and weights are the decoder's and do not grow.

    Attributes:
      settings: says the number and the ids.
      at: tokens before the slots: 0 for a decoder; 1 for BERT, whose classifier reads the first token.
      place_keys: keys that hold places of tokens, such as the "label" of spans; they move with their token.
      fill: values at the slots of keys that are not named above.

    Raises:
      JaxdlError: at the call, several documents in a row (none would see slots outside of it), a key of the tokens'
        shape that is not known, or fewer tokens than `at`.

    Example:
      >>> insert = InsertSlots(Slots(2, first_id=50), at=1)
      >>> out = insert({"tokens": np.array([[7, 8, 0]]), "mask": np.array([[1, 1, 0]]), "label": np.array([1])})
      >>> out["tokens"].tolist(), out["mask"].tolist(), out["label"].tolist()
      ([[7, 50, 51, 8, 0]], [[1, 1, 1, 1, 0]], [1])
    """

    settings: Slots
    at: int = 0
    place_keys: Sequence[str] = ()
    fill: Mapping[str, Any] = field(default_factory=dict)
    is_batched: ClassVar[bool] = True

    def __call__(self, arrays: dict[str, Any], rng: np.random.Generator | None = None) -> dict[str, Any]:
        tokens = np.asarray(arrays["tokens"])
        kept = {*self.place_keys, *(_DECODER if "decoder_tokens" in arrays else ())}
        mine = {key: np.asarray(x) for key, x in arrays.items() if np.shape(x) == tokens.shape and key not in kept}
        if problems := list(self._problems(tokens, mine)):
            raise JaxdlError.listing("InsertSlots", problems)
        if mine.keys() & {"targets", "label"}:
            mine["weight"] = self._weight(arrays, tokens)
        grown = {key: self._grow(key, value) for key, value in mine.items()}
        moved = {
            key: np.where((x := np.asarray(arrays[key])) >= self.at, x + self.settings.n_slots, x)
            for key in self.place_keys
        }
        return {**arrays, **grown, **moved}

    def _problems(self, tokens: np.ndarray, mine: Mapping[str, np.ndarray]) -> Iterator[str]:
        if not 0 <= self.at <= tokens.shape[-1]:
            yield f"at={self.at} must lie within the {tokens.shape[-1]} tokens of a row."
        known = {"tokens", "positions", *_FILL, *_COPIED, *self.fill}
        for key in sorted(mine.keys() - known):
            yield f"{key} has a value a token and is not known; say what stands at slots, as in fill={{{key!r}: 0}}."
        documents = mine.get("documents", np.zeros_like(tokens))
        if np.any((documents != documents.max(axis=-1, keepdims=True)) & (documents != 0)):
            yield "a row packs several documents, and only one of them would see the slots; use rows of one document."

    def _weight(self, arrays: Mapping[str, Any], tokens: np.ndarray) -> np.ndarray:
        weight = np.asarray(arrays.get("weight", 1.0), np.float32)
        return np.broadcast_to(weight[..., None] if weight.ndim == tokens.ndim - 1 else weight, tokens.shape)

    def _grow(self, key: str, value: np.ndarray) -> np.ndarray:
        n, before, after = self.settings.n_slots, value[..., : self.at], value[..., self.at :]
        next_value = value[..., min(self.at, value.shape[-1] - 1), None]
        if key == "tokens":
            here: Any = np.array(self.settings.slot_ids)
        elif key == "positions":
            here, after = next_value + np.arange(n), after + n
        else:
            here = next_value if key in _COPIED else {**_FILL, **self.fill}[key]
        here = np.broadcast_to(here, (*value.shape[:-1], n)).astype(value.dtype)
        return np.concatenate([before, here, after], axis=-1)
