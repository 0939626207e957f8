"""Adapters: small parameters beside a frozen model, which reach its modules without a change to them.

`params = {**base, "adapters": {...}}`: the base tree, its paths and its checkpoints stay as they are. Below `adapters`
the leaves stand at the path of the module that they adapt (`adapters/encoder/layer_0/attention/query/a`), so rules over
paths say what moves: `[("adapters/.*", True), (".*", False)]`. In the model they are a Flax collection of that name,
which an interceptor of method calls reads. A model with `nn.scan` of its own needs `variable_axes={"adapters": 0}`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import flax.linen as nn
from jax import Array

from jaxdl.errors import JaxdlError
from jaxdl.finetune.quantize import dequantize, run_quantized
from jaxdl.finetune.sites import Survey, nest, survey
from jaxdl.losses import LossFn, LossOut
from jaxdl.paths import Tree, flatten, nearest

COLLECTION = "adapters"
METHODS = ("__call__", "attend")


class AdapterError(JaxdlError):
    """Adapters do not fit the model or the call; the message lists every problem."""


class Call(NamedTuple):
    """The call of a module's method, as a kind of adapter sees it.

    Attributes:
      module: bound; `module.path` tells which one.
      method: "__call__" or "attend".
      trace: what is shared by all calls of one run of the model.
    """

    module: nn.Module
    method: str
    trace: "Trace"

    def read(self, names: Sequence[str]) -> dict[str, Array]:
        """The adapter leaves of these names; none where the module lacks the first. They count as read."""
        if not self.module.has_variable(COLLECTION, names[0]):
            return {}
        found: dict[str, Any] = {name: self.module.get_variable(COLLECTION, name) for name in names}
        leaves = {name: leaf for name, leaf in found.items() if leaf is not None and not isinstance(leaf, Mapping)}
        self.trace.read.update("/".join((*self.module.path, name)) for name in leaves)
        return leaves


class Kind(Protocol):
    """Settings of one kind of adapter, such as `lora.Lora`: a hashable value.

    Attributes:
      order: kinds of a higher order see the output of those of a lower one.
      names: of its leaves at a module.
    """

    order: ClassVar[int]
    names: ClassVar[tuple[str, ...]]

    def init(self, key: Array, survey: "Survey", params: Tree) -> dict[str, Array]:
        """Leaves by path, without `adapters/`; raises an AdapterError with all that does not fit."""

    def run(self, call: Call, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The output of the adapted method, where `inner(*args, **kwargs)` is that of the one without this adapter."""


Settings = Kind | Sequence[Kind]


class Trace:
    """One run of a model with adapters: the interceptor, and what modules tell each other.

    Attributes:
      read: paths of the leaves that were read.
      slots: (B, T) int, the number of the slot that stands at a token, -1 at real tokens; None before they are known.
    """

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self.kinds = kinds
        self.read: set[str] = set()
        self.slots: Array | None = None

    def intercept(self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        """To be given to `flax.linen.intercept_methods`."""
        if context.method_name not in METHODS:
            return next_fun(*args, **kwargs)
        call = Call(context.module, context.method_name, self)
        run = next_fun
        for kind in self.kinds:
            run = functools.partial(kind.run, call, run)
        return run(*args, **kwargs)


def kernel_of(module: nn.Module, name: str = "kernel") -> Array:
    """The kernel that a bound module multiplies with; that of a quantised one in float32."""
    kernel: Array = dequantize(module.get_variable("params", name))
    return kernel


def base_leaf(params: Tree, path: str) -> Array:
    """A leaf of the base by its path, such as `head/kernel`; a quantised one in float32."""
    leaf: Array = dequantize(functools.reduce(lambda tree, name: tree[name], path.split("/"), params))
    return leaf


def with_adapters(loss_fn: LossFn, settings: Settings) -> LossFn:
    """Makes a loss of a model into the loss of the model with adapters.

    Args:
      loss_fn: `(params, extra, batch, rng) -> LossOut`; it must hand `extra` on to the model, as in
        `model.apply({"params": params, **extra}, ...)`. `make_loss_fn` does.
      settings: of the adapters in `params["adapters"]`, one or several kinds.

    Returns:
      A loss whose `params` have the adapters beside the base; `extra` stays that of the base.

    Raises:
      AdapterError: in the call, `params` have no adapters, or one of them was never read. Nothing compiles then.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxdl.finetune.lora import Lora, add
      >>> model, settings = nn.Dense(3), Lora([("kernel", 2)])
      >>> x = jnp.ones((4, 5))
      >>> params = add(jax.random.key(1), model.init(jax.random.key(0), x)["params"], settings, model, x)
      >>> def loss_fn(params, extra, batch, rng):
      ...     return LossOut(model.apply({"params": params, **extra}, batch).sum(), jnp.float32(4))
      >>> gradient = jax.grad(lambda params: with_adapters(loss_fn, settings)(params, {}, x, None).total)(params)
      >>> jax.tree.map(jnp.shape, gradient["adapters"])
      {'a': (5, 2), 'b': (2, 3)}
    """
    kinds = _kinds(settings)

    def adapted_loss_fn(params: Tree, extra: Tree, batch: Any, rng: Array) -> LossOut:
        base, adapters = _part(params, kinds)
        with _running(kinds, adapters, is_whole=True):
            out = loss_fn(base, {**extra, **adapters}, batch, rng)
        if out.extra is None:
            return out
        return out._replace(extra={name: tree for name, tree in out.extra.items() if name != COLLECTION})

    return adapted_loss_fn


def adapted(apply_fn: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    """Makes `model.apply` into that of the model with adapters, for predictions.

    Args:
      apply_fn: `model.apply`.
      settings: as for `with_adapters`.

    Returns:
      A function of the same arguments, where `variables["params"]` have the adapters beside the base. A call with a
      `method` runs a part of the model; only a call without one must read all adapters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxdl.finetune.lora import Lora, add
      >>> model, settings = nn.Dense(3), Lora([("kernel", 2)])
      >>> x = jnp.ones((4, 5))
      >>> params = add(jax.random.key(1), model.init(jax.random.key(0), x)["params"], settings, model, x)
      >>> adapted(model.apply, settings)({"params": params}, x).shape
      (4, 3)
    """
    kinds = _kinds(settings)

    def apply(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        base, adapters = _part(variables["params"], kinds)
        with _running(kinds, adapters, is_whole=kwargs.get("method") is None):
            return apply_fn({**variables, "params": base, **adapters}, *args, **kwargs)

    return apply


@dataclass(frozen=True)
class AdaptedModel:
    """A model whose `apply` reads adapters; all else is the model's. For `generate`, and whoever else takes a model.

    Args:
      model: a Linen module.
      settings: as for `with_adapters`; of several kinds a tuple.

    Example:
      >>> from jaxdl.finetune.lora import Lora
      >>> AdaptedModel(nn.Dense(3), Lora([("kernel", 2)])).features
      3
    """

    model: nn.Module
    settings: Any

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """See `adapted`."""
        return adapted(self.model.apply, self.settings)(variables, *args, **kwargs)

    @property
    def slot_ids(self) -> range:
        """Ids that the model reads beside its tokens, see `prompts.Slots`."""
        return next((kind.slot_ids for kind in _kinds(self.settings) if hasattr(kind, "slot_ids")), range(0))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "model":  # copy and pickle ask before there is a model
            raise AttributeError(name)
        return getattr(self.model, name)


def _kinds(settings: Settings) -> list[Kind]:
    """The kinds in the order in which they see an output."""
    given: Any = settings if isinstance(settings, (list, tuple)) else [settings]
    kinds: list[Kind] = list(given)
    names = [type(kind).__name__ for kind in kinds]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AdapterError(f"settings hold {', '.join(twice)} twice; give one of a kind, such as that of lora.combine.")
    return sorted(kinds, key=lambda kind: kind.order)


def _part(params: Tree, kinds: Sequence[Kind]) -> tuple[Tree, dict[str, Tree]]:
    """The base, and `{"adapters": ...}`, which is empty where there are no kinds."""
    base = {name: tree for name, tree in params.items() if name != COLLECTION}
    if COLLECTION not in params:
        if kinds:
            raise AdapterError(f"params have no {COLLECTION!r}; make them with lora.add, or use the loss as it is.")
        return base, {}
    known = [name for kind in kinds for name in kind.names]
    strange = [path for path in flatten(params[COLLECTION]) if path.split("/")[-1] not in known]
    if strange:
        given = ", ".join(type(kind).__name__ for kind in kinds) or "nothing"
        problems = [
            f"{COLLECTION}/{path} is of no kind in settings ({given}); give its settings too." for path in strange
        ]
        raise AdapterError.listing("adapters", problems)
    return base, {COLLECTION: params[COLLECTION]}


@contextlib.contextmanager
def _running(kinds: Sequence[Kind], adapters: Tree, *, is_whole: bool) -> Iterator[None]:
    trace = Trace(kinds)
    with nn.intercept_methods(trace.intercept), nn.intercept_methods(run_quantized):  # the last one stands innermost
        yield
    unread = [path for path in flatten(adapters.get(COLLECTION, {})) if path not in trace.read]
    if unread and is_whole:
        raise AdapterError.listing("adapters that the model never read", [_unread(path, trace) for path in unread])


def _unread(path: str, trace: Trace) -> str:
    near = ", ".join(nearest(path, trace.read)) or "none was"
    return (
        f"{COLLECTION}/{path} (read: {near}): is the module called, is `extra` handed on to `model.apply`, does an "
        f"nn.scan around it have variable_axes={{{COLLECTION!r}: 0}}, is the model called outside of a jit of its own?"
    )


def add(key: Array, params: Tree, settings: Settings, model: nn.Module, *inputs: Any, **kw: Any) -> Tree:
    """Adds fresh adapters to the parameters of a model, all kinds at once.

    Args:
      key: typed key. What a leaf gets depends on the key and its path alone, not on what else is adapted.
      params: the base; it is not copied.
      settings: one or several kinds.
      model: the Linen module of `params`; its modules are found in an abstract call.
      inputs: arrays or shapes that the model can be called with; `kw` likewise.
      kw: see there.

    Returns:
      `{**params, "adapters": {...}}`, with float32 leaves.

    Raises:
      RuleError: rules that do not fit the paths.
      AdapterError: `params` have adapters already, or modules cannot be adapted.
    """
    if COLLECTION in params:
        raise AdapterError(
            f"params already have {COLLECTION!r}; give all kinds to one call of add, merge the old ones (lora.merge), "
            "or rename a module of that name."
        )
    found = survey(model, *inputs, **kw)
    if problems := _base_problems(found.leaves, params):
        raise AdapterError.listing("add", problems)
    flat: dict[str, Array] = {}
    for kind in _kinds(settings):
        try:
            flat.update(kind.init(key, found, params))
        except AdapterError as error:
            problems.append(str(error))
    if problems:
        raise AdapterError.listing("add", problems)
    return {**params, COLLECTION: nest(flat)}


def _base_problems(leaves: Mapping[str, Any], params: Tree) -> list[str]:
    real = flatten(params)
    return [
        f"params lack {path}, which the model has; nearest: {', '.join(nearest(path, real)) or 'none'}."
        for path in leaves
        if path not in real and not any(name.startswith(f"{path}/") for name in real)
    ]
