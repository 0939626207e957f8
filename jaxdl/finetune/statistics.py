"""A frozen module freezes its statistics: BatchNorm under a frozen backbone uses its running averages and keeps them.

A leaf of `extra` such as `batch_stats/stage_0/norm/mean` belongs to the module `stage_0/norm`. It is frozen where every
parameter under `stage_0/norm/` is; where the module has none, its parent decides, and so on.
"""

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax

from jaxdl import paths
from jaxdl.errors import JaxdlError
from jaxdl.losses import LossFn, LossOut
from jaxdl.paths import Rules, Tree

Array = jax.Array

COLLECTION = "batch_stats"


def frozen_statistics(params: Tree, extra: Tree, trainable: Rules) -> Tree:
    """Which leaves of `extra` belong to a frozen module.

    The first name of a path is the collection, unless `batch_stats` comes later in it; the last is the leaf; what lies
    between is the module. A leaf of no module, such as a counter at the top, is not frozen.

    Args:
      params: the parameters; only their paths are read. Adapters beside a module do not count as its parameters.
      extra: the other collections.
      trainable: the rules over `params`. Leaves that they do not cover count as trainable: `make_train_step` is who
        holds them to the two laws.

    Returns:
      A tree like `extra` with bool leaves.

    Example:
      >>> params = {"body": {"conv": {"kernel": 1.0}}, "head": {"kernel": 1.0}}
      >>> extra = {"batch_stats": {"body": {"norm": {"mean": 0.0}}}, "n_seen": 0}
      >>> frozen_statistics(params, extra, [("head/.*", True), (".*", False)])
      {'batch_stats': {'body': {'norm': {'mean': True}}}, 'n_seen': False}
    """
    flat = paths.flatten(params)
    claimed, _ = paths.claim([regex for regex, _ in trainable], flat)
    is_moving = {path: path not in claimed or trainable[claimed[path][0]][1] is not False for path in flat}
    modules: dict[str, bool] = {}  # whether every parameter below it is frozen
    for path, moves in is_moving.items():
        for module in _ancestors(path.rpartition("/")[0]):
            modules[module] = modules.get(module, True) and not moves
    frozen = [_is_frozen(module_of(path), modules) for path in paths.flatten(extra)]
    return jax.tree.unflatten(jax.tree.structure(extra), frozen)


def module_of(path: str) -> str:
    """The module that a statistic belongs to; "" for the model itself.

    Example:
      >>> module_of("batch_stats/stage_0/norm/mean"), module_of("vision/batch_stats/norm/mean"), module_of("n_seen")
      ('stage_0/norm', 'vision/norm', '')
    """
    names = path.split("/")
    at = names.index(COLLECTION) if COLLECTION in names[:-1] else 0
    return "/".join(names[:at] + names[at + 1 : -1])


def _ancestors(module: str) -> Iterable[str]:
    """The module, and the modules that it lies in; not the model itself, part of which always trains."""
    while module:
        yield module
        module = module.rpartition("/")[0]


def _is_frozen(module: str, modules: dict[str, bool]) -> bool:
    return next((modules[name] for name in _ancestors(module) if name in modules), False)


def freeze_statistics(loss_fn: LossFn, trainable: Rules) -> LossFn:
    """Makes the loss of a Linen model into one that leaves the statistics of frozen modules alone.

    `nn.BatchNorm` in a frozen module normalizes with its running averages, whatever the model asks for, and the loss
    hands back the very arrays that it was given. `make_loss_fn` has this built in. Transformations that add
    parameters, such as `with_adapters`, may stand on either side of it.

    Args:
      loss_fn: `(params, extra, batch, rng) -> LossOut`.
      trainable: the rules given to `make_train_step`.

    Example:
      >>> import jax.numpy as jnp
      >>> model = nn.Sequential([nn.BatchNorm(use_running_average=False), nn.Dense(1)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((2, 3)))
      >>> def loss_fn(params, extra, batch, rng):
      ...     y, changed = model.apply({"params": params, **extra}, batch, mutable=list(extra))
      ...     return LossOut(jnp.sum(y), jnp.float32(2), {}, changed)
      >>> params, extra = variables["params"], {"batch_stats": variables["batch_stats"]}
      >>> frozen = freeze_statistics(loss_fn, [("layers_1/.*", True), ("layers_0/.*", False)])
      >>> out = frozen(params, extra, 5 * jnp.ones((2, 3)), None)
      >>> out.extra["batch_stats"]["layers_0"]["mean"].tolist()
      [0.0, 0.0, 0.0]
    """

    def frozen_loss_fn(params: Tree, extra: Tree, batch: Any, rng: Array) -> LossOut:
        verdicts = paths.flatten(frozen_statistics(params, extra, trainable))
        old = {path: leaf for path, leaf in paths.flatten(extra).items() if verdicts[path]}
        if not old:
            return loss_fn(params, extra, batch, rng)
        kept: set[str] = set()
        with nn.intercept_methods(_keep_averages({module_of(path) for path in old}, kept)):
            out = loss_fn(params, extra, batch, rng)
        kept_leaves = {path: leaf for path, leaf in old.items() if module_of(path) in kept}
        return out if out.extra is None else out._replace(extra=_put(kept_leaves, out.extra))

    return frozen_loss_fn


def _keep_averages(frozen: set[str], kept: set[str]) -> Callable[..., Any]:
    """An interceptor that has the BatchNorm of these modules use its averages, and adds those it met to `kept`."""

    def interceptor(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        is_norm = isinstance(module, nn.BatchNorm) and type(module).__call__ is nn.BatchNorm.__call__
        path = "/".join(module.path) if is_norm and context.method_name == "__call__" else ""
        if path not in frozen:
            return next_fun(*args, **kwargs)
        kept.add(path)
        kwargs = {**kwargs, "use_running_average": True}
        asked = module.use_running_average  # a BatchNorm wants to be told once: as a field, or in the call
        object.__setattr__(module, "use_running_average", None)
        try:
            return next_fun(*args[:1], **kwargs)
        finally:
            object.__setattr__(module, "use_running_average", asked)

    return interceptor


def _put(leaves: dict[str, Any], tree: Tree) -> Tree:
    new = [leaves.get(path, leaf) for path, leaf in paths.flatten(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), new)


def keep_statistics(params: Tree, before: Tree, after: Tree, trainable: Rules) -> Tree:
    """Puts the leaves of frozen modules back, after an average over devices that might round them.

    Args:
      params: the parameters; only their paths are read.
      before: the `extra` before the step.
      after: the one after it.
      trainable: the rules over `params`.

    Returns:
      `after`, with those leaves of `before`.

    Example:
      >>> params, rules = {"norm": {"scale": 1.0}, "head": {"kernel": 1.0}}, [("head/.*", True), (".*", False)]
      >>> before, after = ({"batch_stats": {"norm": {"mean": mean}}} for mean in (0.1, 0.2))
      >>> keep_statistics(params, before, after, rules)
      {'batch_stats': {'norm': {'mean': 0.1}}}
    """
    verdicts = paths.flatten(frozen_statistics(params, before, trainable))
    return _put({path: leaf for path, leaf in paths.flatten(before).items() if verdicts[path]}, after)


def check_statistics(params: Tree, before: Tree, after: Tree, trainable: Rules) -> None:
    """Refuses a loss that changes statistics of a frozen module; at tracing, when nothing is compiled yet.

    Args:
      params: the parameters, abstract or traced.
      before: the `extra` that the loss was given.
      after: the one that it returned. A leaf counts as unchanged if it is the same object.
      trainable: the rules over `params`.

    Raises:
      JaxdlError: every such leaf, its module, and the remedy.

    Example:
      >>> params, rules = {"norm": {"scale": 1.0}, "head": {"kernel": 1.0}}, [("head/.*", True), (".*", False)]
      >>> extra = {"batch_stats": {"norm": {"mean": 2.0}}}
      >>> check_statistics(params, extra, {"batch_stats": {"norm": {"mean": 2.0 * 2}}}, rules)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      jaxdl.errors.JaxdlError: the loss changes statistics of frozen modules: 1 problem(s)
        - batch_stats/norm/mean belongs to norm, whose parameters are frozen.
        Remedy: ...
    """
    old, new = paths.flatten(before), paths.flatten(after)
    if all(new.get(path, leaf) is leaf for path, leaf in old.items()):
        return
    frozen = paths.flatten(frozen_statistics(params, before, trainable))
    changed = [path for path, leaf in old.items() if frozen[path] and new.get(path, leaf) is not leaf]
    if changed:
        lines = [f"{path} belongs to {module_of(path)}, whose parameters are frozen." for path in changed[:6]]
        more = f"\n  - and {len(changed) - 6} more." if len(changed) > 6 else ""
        raise JaxdlError(
            f"{JaxdlError.listing('the loss changes statistics of frozen modules', lines)}{more}\n  Remedy: give the "
            "rules to the loss too, make_loss_fn(..., trainable=rules) or freeze_statistics(loss_fn, rules). A norm of "
            "your own must use its averages and hand them back as they are."
        )
