"""The branch of LoRA (Hu et al. 2021), of rank-stabilised LoRA (Kalajdzievski 2023) and of DoRA (Liu et al. 2024).

A module of kernel W gets `a` (inputs..., r) and `b` (r, outputs...): it multiplies with `W + scale * a b`. DoRA adds
`magnitude` (outputs...), the length of each column. Under `nn.scan` all have the leading axis of the kernel.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxdl import paths
from jaxdl.finetune.adapters import AdapterError, Call, base_leaf, kernel_of
from jaxdl.finetune.sites import LEAVES, Site, Survey, join, key_of
from jaxdl.models.checks import count_problem, rate_problem
from jaxdl.paths import Rules, Tree


@dataclass(frozen=True)
class Lora:
    """Which matrices get a branch of which rank, and what it is multiplied by.

    Attributes:
      rules: `(regex, rank or None)` over the paths of the base's kernels and embeddings, such as
        `[(".*attention/(query|value)/kernel", 8), (".*", None)]`.
      alpha: the branch is multiplied by `alpha / rank`.
      is_rank_stabilized: by `alpha / sqrt(rank)` (Kalajdzievski 2023, arXiv:2312.03732), for large ranks.
      has_magnitude: DoRA (Liu et al. 2024, arXiv:2402.09353, eq. 5): `magnitude * V / |V|` with `V = W + scale * a b`,
        where `|V|` is the length over the inputs, a constant for the gradient (section 4.3). Not for embeddings.
      dropout_rate: of the branch's input, where the call has a `dropout` key; embeddings have none. With DoRA the base
        still reads its input whole.

    Raises:
      AdapterError: numbers out of range.

    Example:
      >>> Lora([("head/kernel", 4), (".*", None)], alpha=8).scale(4)
      2.0
    """

    rules: Rules
    _: KW_ONLY
    alpha: float = 16.0
    is_rank_stabilized: bool = False
    has_magnitude: bool = False
    dropout_rate: float = 0.0

    order: ClassVar[int] = 0
    names: ClassVar[tuple[str, ...]] = ("a", "b", "magnitude")

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(tuple(rule) for rule in self.rules))
        problems = [
            None if self.alpha > 0 else f"alpha={self.alpha} must be positive.",
            rate_problem("dropout_rate", self.dropout_rate),
            *(count_problem(f"the rank of {rule[0]!r}", rule[1]) for rule in self.rules if rule[1:] != (None,)),
        ]
        if found := [problem for problem in problems if problem]:
            raise AdapterError.listing("Lora", found)

    def scale(self, rank: int) -> float:
        """The factor of a branch of this rank."""
        return self.alpha / (rank**0.5 if self.is_rank_stabilized else rank)

    def init(self, key: Array, survey: Survey, params: Tree) -> dict[str, Array]:
        """As PEFT draws: `a` uniform within 1 / sqrt(inputs), `b` zero; for embeddings `a` zero, `b` normal."""
        ranks = {path: rank for path, rank in self._ranks(survey.leaves).items() if rank is not None}
        modules = {path: path.rpartition("/")[0] for path in ranks}
        problems = [(path, self._problem(survey.sites.get(modules[path]), rank)) for path, rank in ranks.items()]
        if found := [f"{path} {problem}" for path, problem in problems if problem]:
            raise AdapterError.listing("lora", found)
        flat = {}
        for path, rank in ranks.items():
            site = survey.sites[modules[path]]
            leaves = _fresh(key, site, rank)
            if self.has_magnitude:
                leaves["magnitude"] = length_of(base_leaf(params, path), len(site.stack), len(site.inputs))
            flat.update({join(site.path, name): leaf for name, leaf in leaves.items()})
        return flat

    def _ranks(self, leaves: Mapping[str, Any]) -> dict[str, int | None]:
        domain = [path for path in leaves if path.split("/")[-1] in LEAVES.values()]
        others = [path for path in leaves if path not in domain]
        strays = []
        for pattern, rank in self.rules:
            hits, _ = paths.claim([pattern], others)
            if hits and rank is not None and not paths.claim([pattern], domain)[0]:
                strays.append(
                    f"rule {pattern!r} only matches what is no matrix of a module: {', '.join(list(hits)[:3])}."
                )
        if strays:
            raise AdapterError.listing("lora: rules speak of kernels and embeddings", strays)
        return paths.match(self.rules, {path: path for path in domain}, what="lora")

    def _problem(self, site: Site | None, rank: int) -> str | None:
        if site is None:
            return "is of a module that this call of the model does not reach; exempt it by (regex, None)."
        if site.leaf is None:
            known = ", ".join(f"nn.{kind.__name__}" for kind in LEAVES)
            return f"is of {site.kind.__name__}; lora adapts {known}. Exempt it by (regex, None)."
        if site.problem:
            return f"{site.problem}; exempt it by (regex, None)."
        if rank > site.largest_rank:
            return f"has rank {site.largest_rank} at most, less than {rank}; use a smaller rank or exempt it."
        if self.has_magnitude and site.leaf == "embedding":
            return "is an embedding, and DoRA has none; exempt it by (regex, None), or use has_magnitude=False."
        return None

    def run(self, call: Call, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's output and that of the branch."""
        y, leaves = inner(*args, **kwargs), call.read(self.names)
        if not leaves:
            return y
        a, b = leaves["a"], leaves["b"]
        x, scale = (*args, *kwargs.values())[0], self.scale(a.shape[-1])
        added = _branch(call, self._dropped(x, call.module), a.astype(y.dtype), b.astype(y.dtype), scale)
        y = y + added[..., : y.shape[-1]]  # logits may lack the padding of their table
        return _directed(call.module, y, a, b, scale, leaves["magnitude"]) if "magnitude" in leaves else y

    def _dropped(self, x: Array, module: nn.Module) -> Array:
        if not self.dropout_rate or isinstance(module, nn.Embed) or not module.has_rng("dropout"):
            return x
        is_kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - self.dropout_rate, x.shape)
        return jnp.where(is_kept, x / (1 - self.dropout_rate), jnp.zeros_like(x))


def _fresh(key: Array, site: Site, rank: int) -> dict[str, Array]:
    a_shape, b_shape = (*site.stack, *site.inputs, rank), (*site.stack, rank, *site.outputs)
    key = key_of(key, site.path)
    if site.leaf == "embedding":
        return {"a": jnp.zeros(a_shape), "b": jax.random.normal(key, b_shape)}
    bound = math.prod(site.inputs) ** -0.5
    return {"a": jax.random.uniform(key, a_shape, minval=-bound, maxval=bound), "b": jnp.zeros(b_shape)}


def _branch(call: Call, x: Array, a: Array, b: Array, scale: float) -> Array:
    """The output of the branch: `scale * (x a) b`, where the module says what its product with `a` is."""
    module: Any = call.module
    last = b
    if isinstance(module, nn.Embed) and call.method == "attend":  # x times the transposed table
        low, last = jnp.tensordot(x.astype(b.dtype), b.T, 1), a.T
    elif isinstance(module, nn.Embed):
        low = jnp.take(a, x, axis=0)
    else:
        plain: dict[str, Any] = {"features": a.shape[-1], "use_bias": False}
        if not isinstance(module, nn.Conv):
            plain |= {"dot_general": None, "dot_general_cls": None}
        low = module.clone(parent=None, **plain).apply({"params": {"kernel": a}}, x)
    return jnp.tensordot(low * jnp.asarray(scale, low.dtype), last, 1, precision=getattr(module, "precision", None))


def _directed(module: nn.Module, y: Array, a: Array, b: Array, scale: float, magnitude: Array) -> Array:
    """DoRA's output: all but the bias times `magnitude / |V|` (Liu et al. 2024, eq. 5 and 11)."""
    n_inputs = a.ndim - 1
    v = wide(kernel_of(module)) + scale * product(a, b)
    ratio = magnitude / jax.lax.stop_gradient(length_of(v, 0, n_inputs))
    bias = module.get_variable("params", "bias") if module.use_bias else jnp.zeros(())
    ratio, bias = (part.astype(y.dtype).reshape((1,) * (y.ndim - part.ndim) + part.shape) for part in (ratio, bias))
    return ratio * y + (1 - ratio) * bias


def product(a: Array, b: Array) -> Array:
    """`a b` in float32 at least: (inputs..., r), (r, outputs...) -> (inputs..., outputs...)."""
    return jnp.tensordot(wide(a), wide(b), 1, precision="highest")


def wide(x: Array) -> Array:
    """`x` in float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def length_of(kernel: Array, n_stack: int, n_inputs: int) -> Array:
    """The Euclidean length over the inputs, in float32 at least: (stack..., outputs...); 1 in the place of 0."""
    kernel = wide(kernel)
    length = jnp.sqrt(jnp.sum(kernel * kernel, axis=tuple(range(n_stack, n_stack + n_inputs))))
    return jnp.where(length == 0, 1.0, length)
