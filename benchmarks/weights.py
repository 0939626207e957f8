"""The same random weights in both libraries, without a file between them: a tensor is a function of its name and shape.

PyTorch modules of `torch_models` are named as jaxdl's paths, and their tensors are drawn in jaxdl's layout; models of
`transformers` have the names of their checkpoints, which `jaxdl.pretrained` maps.
"""

import zlib
from typing import Any

import numpy as np


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 numbers that depend on the name and the shape alone.

    A name that ends in "bias" gets small numbers, any other vector (the scale of a norm) numbers around 1, and the rest
    is scaled by its fan-in as jaxdl lays it out: all axes but the last.

    Example:
      >>> bool((draw("a/kernel", (2, 3)) == draw("a/kernel", (2, 3))).all()), draw("a/bias", (3,)).dtype
      (True, dtype('float32'))
    """
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if len(shape) > 1:
        return values / np.float32(np.sqrt(np.prod(shape[:-1])))
    return values * np.float32(0.02) if name.endswith("bias") else 1 + np.float32(0.1) * values


def fill_tree(shapes: Any) -> Any:
    """A tree of drawn arrays: each leaf by its path.

    Args:
      shapes: arrays, or what `jax.eval_shape` returns.
    """
    import jax

    from jaxdl.paths import flatten

    leaves = [jax.numpy.asarray(draw(path, leaf.shape)) for path, leaf in flatten(shapes).items()]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def fill_pretrained(family: Any, model: Any) -> Any:
    """Parameters of a jaxdl model, drawn by the names of its tensors in a checkpoint of `transformers`."""
    import jax

    from jaxdl.pretrained import to_params, to_tensors
    from jaxdl.pretrained.folder import abstract_params

    like, lines = abstract_params(family, model), family.entries(model)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), like)
    tensors = {name: draw(name, tensor.shape) for name, tensor in to_tensors(lines, zeros, names=family.names).items()}
    params, _ = to_params(lines, tensors, like, names=family.names)
    return jax.tree.map(jax.numpy.asarray, params)


def fill_named(model: Any) -> None:
    """Draws every parameter of a PyTorch model by its own name."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(draw(name, tuple(parameter.shape))))


def fill_module(model: Any) -> None:
    """Draws every parameter of a PyTorch model whose modules are named as jaxdl's paths, with dots for slashes.

    Raises:
      TypeError: a module with parameters of a kind that is not known here.
    """
    import torch

    with torch.no_grad():
        for name, module in model.named_modules():
            for theirs, path, layout in _leaves(module):
                target = getattr(module, theirs)
                target.copy_(torch.from_numpy(layout(draw, f"{name}/{path}".replace(".", "/"), tuple(target.shape))))


def _leaves(module: Any) -> list[tuple[str, str, Any]]:
    """(name of a parameter, jaxdl's, how it is drawn) of a module itself, without its children."""
    import torch.nn as nn

    if isinstance(module, nn.RNNBase):
        return _recurrent_leaves(module)
    named = {name for name, _ in module.named_parameters(recurse=False)}
    bias = [("bias", "bias", _as_it_is)] if "bias" in named else []
    kinds: dict[Any, tuple[str, Any]] = {
        nn.Linear: ("kernel", _transposed),
        nn.Conv2d: ("kernel", _convolution),
        nn.Embedding: ("embedding", _as_it_is),
        (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d): ("scale", _as_it_is),
    }
    found = [("weight", *leaf) for kind, leaf in kinds.items() if isinstance(module, kind)] + bias
    if named != {theirs for theirs, *_ in found}:
        raise TypeError(f"{type(module).__name__} has parameters {sorted(named)}, of which only {found} are known.")
    return found


def _recurrent_leaves(module: Any) -> list[tuple[str, str, Any]]:
    parts = {"weight_ih": ("input/kernel", _transposed), "weight_hh": ("recurrent/kernel", _transposed)}
    parts |= {"bias_ih": ("input/bias", _as_it_is), "bias_hh": ("recurrent/bias", _as_it_is)}
    sides = {"": "forward", "_reverse": "backward"} if module.bidirectional else {"": "forward"}
    return [
        (f"{theirs}_l{i}{suffix}", f"layer_{i}/{side}/{path}", layout)
        for i in range(module.num_layers)
        for suffix, side in sides.items()
        for theirs, (path, layout) in parts.items()
    ]


def _as_it_is(draw: Any, path: str, shape: tuple[int, ...]) -> np.ndarray:
    return draw(path, shape)


def _transposed(draw: Any, path: str, shape: tuple[int, ...]) -> np.ndarray:
    return draw(path, shape[::-1]).T


def _convolution(draw: Any, path: str, shape: tuple[int, ...]) -> np.ndarray:
    n_out, n_in, height, width = shape
    return draw(path, (height, width, n_in, n_out)).transpose(3, 2, 0, 1)
