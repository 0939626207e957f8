"""A frozen base in 8 or 4 bits: matrices as codes, made whole one layer at a time.

A quantised leaf is a `Quantized` node in the place of the array, so that `.../kernel` becomes `.../kernel/codes` and
`.../kernel/absmax`, and rules such as `".*"` or `"encoder/.*"` still cover it. Both are whole numbers: no rule can
train them by mistake, and no cast to bfloat16 reaches them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdl import paths
from jaxdl.errors import JaxdlError
from jaxdl.finetune.codes import NF4, SMALLEST_BLOCK, Quantized, block_size, decode, encode, is_quantized
from jaxdl.paths import Rules, Tree, nearest

KINDS = ("int8", "nf4", "bfloat16")
NAMES = ("kernel", "embedding")
__all__ = ["NF4", "Quantized", "bytes_held", "dequantize", "quantize", "run_quantized", "with_quantized"]


def quantize(params: Tree, rules: Rules) -> Tree:
    """Replaces kernels and embeddings by 8- or 4-bit codes; a leaf costs 1 + 4/64 or 0.5 + 4/64 bytes a number.

    Blocks have 64 numbers (QLoRA's size), or the largest power of two below that divides the last axis.

    Args:
      params: a tree of arrays, concrete or abstract under `jax.eval_shape`.
      rules: `(regex, kind)` over the paths of `params`. "int8": the nearest of 255 even steps. "nf4": the nearest of
        16 steps that suit normally distributed numbers (Dettmers et al. 2023, section 3). "bfloat16": a plain cast.
        None: left as it is.

    Returns:
      The tree with `Quantized` nodes. A loss reads it through `with_quantized` or `adapters.with_adapters`.

    Raises:
      JaxdlError: an unknown kind, or a rule that hits what cannot be quantised: all problems at once.
      RuleError: the rules do not fit the tree.

    Example:
      >>> params = {"dense": {"kernel": jnp.ones((3, 64)), "bias": jnp.zeros(64)}}
      >>> small = quantize(params, [(".*/kernel", "nf4"), (".*", None)])
      >>> {path: leaf.shape for path, leaf in paths.flatten(small).items()}
      {'dense/bias': (64,), 'dense/kernel/codes': (3, 32), 'dense/kernel/absmax': (3, 1)}
    """
    treedef: Any
    keys_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    kinds = treedef.flatten_up_to(paths.match(rules, params, what="quantize"))
    named = [(paths.path_of(keys), leaf, kind) for (keys, leaf), kind in zip(keys_and_leaves, kinds, strict=True)]
    problems = [problem for path, leaf, kind in named if (problem := _problem(path, leaf, kind))]
    if problems:
        raise JaxdlError.listing("quantize", problems)
    return treedef.unflatten([leaf if kind is None else encode(leaf, kind) for _, leaf, kind in named])


def _problem(path: str, leaf: Any, kind: Any) -> str | None:
    if kind is None:
        return None
    if kind not in KINDS:
        near = " or ".join(repr(name) for name in nearest(str(kind), KINDS, n=2))
        return f"{path} has the kind {kind!r}, which is unknown; did you mean {near}? None leaves a leaf as it is."
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"{path} is {leaf.dtype}; only floating leaves can be quantised. Give it None."
    if kind == "bfloat16":
        return None
    if path.startswith("adapters/"):
        return f"{path} belongs to an adapter, which trains, and codes cannot. Put ('adapters/.*', None) first."
    if path.rpartition("/")[2] not in NAMES or len(leaf.shape) < 2:
        return f"{path} {list(leaf.shape)} is no matrix named kernel or embedding. Give it None or 'bfloat16'."
    if (block := block_size(leaf.shape[-1])) < SMALLEST_BLOCK:
        rule = f"it must be a multiple of {SMALLEST_BLOCK}"
        return f"{path} has a last axis of {leaf.shape[-1]}, in blocks of {block}; {rule}. Give it None or 'bfloat16'."
    return None


def dequantize(tree: Tree, dtype: Any = jnp.float32) -> Tree:
    """Makes plain arrays of all `Quantized` nodes; other leaves stay as they are.

    Args:
      tree: a tree, or one node.
      dtype: of the arrays made.

    Example:
      >>> params = {"kernel": jnp.array([[-2.0, 0.5, 0, 0, 0, 0, 0, 1.0]])}
      >>> [round(float(x), 2) for x in dequantize(quantize(params, [("kernel", "nf4")]))["kernel"][0]]
      [-2.0, 0.49, 0.0, 0.0, 0.0, 0.0, 0.0, 0.88]
    """
    return jax.tree.map(lambda x: decode(x, dtype) if is_quantized(x) else x, tree, is_leaf=is_quantized)


def bytes_held(tree: Tree) -> int:
    """The bytes of all leaves, concrete or abstract.

    Example:
      >>> bytes_held(quantize({"kernel": jnp.ones((64, 64))}, [(".*", "nf4")])) / 64**2
      0.5625
    """
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def with_quantized(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a function read a quantised base: a loss, or anything else that applies Linen modules.

    Args:
      fn: such as a `loss_fn`, or `model.apply`. Wrap it before `jax.jit`. Not one of `with_adapters` or `adapted`: they
        read a quantised base by themselves, and this would stand in front of the adapters.

    Example:
      >>> model = nn.Dense(64)
      >>> params = quantize({"kernel": jnp.ones((3, 64)), "bias": jnp.ones(64)}, [("kernel", "int8"), ("bias", None)])
      >>> float(with_quantized(model.apply)({"params": params}, jnp.ones((1, 3)))[0, 0])
      4.0
    """

    @functools.wraps(fn)
    def reads_quantized(*args: Any, **kw: Any) -> Any:
        with nn.intercept_methods(run_quantized):
            return fn(*args, **kw)

    return reads_quantized


def run_quantized(next_fn: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """The interceptor of `with_quantized`: a module whose kernel or embedding is quantised gets the plain one.

    The plain one is forgotten after the call and made again in the backward pass, so no two modules need theirs at
    once. It has the module's dtype, or that of its input where the module has none. An `nn.Embed` looks up the codes of
    its rows first. Gradients work in reverse mode only.
    """
    module, method = context.module, context.method_name
    held = {name: value for name in NAMES if (value := _variable(module, name)) is not None}
    if not any(map(is_quantized, held.values())):
        return next_fn(*args, **kwargs)
    if isinstance(module, nn.Embed):
        return _run_embed(module, method, held["embedding"], args)
    if method == "setup":
        return next_fn()
    return _run_plain(module, method, args, kwargs)


def _variable(module: nn.Module, name: str) -> Any:
    is_there = module.scope is not None and module.has_variable("params", name)
    return module.get_variable("params", name) if is_there else None


def _run_plain(module: nn.Module, method: str, args: Any, kwargs: Any) -> Any:
    bare, own = module.clone(parent=None), getattr(module, "dtype", None)
    dtype = jnp.result_type(args[0]) if own is None else own
    treedef: Any
    given, treedef = jax.tree.flatten((args, kwargs))
    arrays = {str(i): x for i, x in enumerate(given) if isinstance(x, (jax.Array, np.ndarray))}

    def apply(params: Tree, arrays: Tree, after: Any) -> Any:
        args, kwargs = treedef.unflatten([arrays.get(str(i), x) for i, x in enumerate(given)])
        return bare.apply({"params": dequantize(_wait(params, after), dtype)}, *args, **kwargs, method=method)

    return _forgetful(apply)(dict(module.variables["params"]), arrays)


def _forgetful(apply: Callable[..., Any]) -> Callable[..., Any]:
    """`apply(params, arrays, after)`, as `jax.checkpoint` would run it, where `after` is what must be there before."""

    @jax.custom_vjp
    def run(params: Tree, arrays: Tree) -> Any:
        return apply(params, arrays, arrays)

    def forward(params: Tree, arrays: Tree) -> Any:
        return run(params, arrays), (params, arrays)

    def backward(saved: Any, cotangent: Any) -> Any:
        saved, cotangent = jax.lax.optimization_barrier((saved, cotangent))
        floats, rest = paths.split(saved, jax.tree.map(lambda x: bool(jnp.issubdtype(x.dtype, jnp.inexact)), saved))
        _, pull = jax.vjp(lambda floats: apply(*paths.merge(floats, rest), cotangent), floats)
        return pull(cotangent)[0]

    run.defvjp(forward, backward)
    return run


def _wait(params: Tree, after: Any) -> Tree:
    """On a CPU, makes the codes depend on an array.

    XLA:CPU drops barriers and starts with whatever can be computed from the arguments alone: all layers' matrices. It
    cannot know that no number is on both sides of zero.
    """
    first = next((x for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.inexact) and x.size), None)
    if first is None or jax.default_backend() != "cpu":
        return params
    number = first.reshape(-1)[0]
    never = (number > 0) & (number < 0)

    def wait(leaf: Any) -> Any:
        return leaf.replace(codes=jnp.where(never, 0, leaf.codes)) if is_quantized(leaf) else leaf

    return jax.tree.map(wait, params, is_leaf=is_quantized)


def _run_embed(module: nn.Embed, method: str, table: Quantized, args: Any) -> Any:
    if method == "setup":  # for tied logits that read the table itself; unused, it is never computed under jit
        module.embedding = dequantize(table)
        return None
    if method != "__call__":
        return _run_plain(module, method, args, {})
    ids = args[0]
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise JaxdlError(f"{module.name} got {ids.dtype} tokens; they must be integers.")
    rows = jax.tree.map(lambda x: jnp.take(x, ids, axis=0), table)  # beyond the table absmax is all ones: a NaN
    return dequantize(rows, jnp.float32 if module.dtype is None else module.dtype)
