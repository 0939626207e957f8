"""The proof that a folder means the same here and in transformers: outputs, every gradient leaf, three AdamW steps.

Both sides run in the same dtype (float64 by default) on the same random inputs of odd sizes, with padding and masks.
PyTorch's gradients and weights come through the family's own map, so that a wrong transpose cannot hide.
"""

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdl import paths
from jaxdl.paths import Tree, flatten
from jaxdl.pretrained.family import Family, find_family
from jaxdl.pretrained.folder import Pretrained, load, read_config, unrolled
from jaxdl.pretrained.ledger import PretrainedError
from jaxdl.pretrained.mapping import to_params
from jaxdl.pretrained.registry import FAMILIES
from jaxdl.pretrained.report import Line, Report

N_STEPS = 3
FLOOR = 1e-6  # values this far below the largest of their kind are compared in units of that


def verify_parity(
    folder: str | os.PathLike[str],
    *,
    dtype: str = "float64",
    tolerance: float = 1e-5,
    learning_rate: float = 1e-4,
    seed: int = 0,
    family: Family | None = None,
    theirs: Any = None,
    **overrides: Any,
) -> Report:
    """Compares jaxdl with transformers on one folder; dropout is off on both sides.

    Args:
      folder: config.json and safetensors.
      dtype: of parameters and computation, "float64" or "float32" (a large model; give a wider tolerance).
      tolerance: the largest relative difference that passes, for outputs, gradients and updates alike.
      learning_rate: of AdamW.
      seed: of the inputs and targets.
      family: a `Family` of your own.
      theirs: the PyTorch module; by default the class that config.json names, from transformers.
      **overrides: fields of our module, such as another layout.

    Returns:
      A report; `is_equal` is the verdict.

    Raises:
      PretrainedError: the folder does not load, or torch or transformers is absent.
    """
    torch = _torch()
    folder = Path(folder)
    config = read_config(folder)
    family = family or find_family(config, FAMILIES)
    with jax.enable_x64(dtype == "float64"):
        ours = load(folder, dtype=jnp.dtype(dtype), family=family, **overrides)
        theirs = _load_theirs(folder, config) if theirs is None else theirs
        theirs = theirs.to(getattr(torch, dtype)).eval()
        inputs, their_inputs = family.inputs(np.random.default_rng(seed), ours.model)
        return _compare(_Sides(family, ours, theirs, inputs, their_inputs, dtype), folder, tolerance, learning_rate)


class _Sides(NamedTuple):
    family: Family
    ours: Pretrained
    theirs: Any
    inputs: dict[str, Any]
    their_inputs: dict[str, Any]
    dtype: str


def _torch() -> Any:
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise PretrainedError(
            f"{error.name} is not installed, and verify-parity compares with it: pip install torch transformers."
        ) from None
    return torch


def _load_theirs(folder: Path, config: Mapping[str, Any]) -> Any:
    import transformers

    name = config["architectures"][0]
    transformers.utils.logging.disable_progress_bar()
    return getattr(transformers, name).from_pretrained(folder, attn_implementation="eager", local_files_only=True)


def _compare(sides: _Sides, folder: Path, tolerance: float, learning_rate: float) -> Report:
    outputs, their_outputs = _our_outputs(sides, sides.ours.params), _their_outputs(sides)
    problems = _same_outputs(outputs, their_outputs)
    lines: list[Line] = []
    losses: list[float] = []
    if not problems:
        targets = _targets(outputs)
        for name, value in their_outputs.items():
            lines.append(_line(f"output {name}", outputs[name], value.detach().numpy()))
        params, gradients, losses = _train_ours(sides, targets, learning_rate)
        their_params, their_gradients, their_losses = _train_theirs(sides, targets, learning_rate)
        problems += _dead(sides.family, gradients)
        lines += _lines("gradient", gradients, their_gradients)
        lines += [_line(f"loss {i}", *pair) for i, pair in enumerate(zip(losses, their_losses, strict=True))]
        start = unrolled(sides.ours.params)
        lines += _lines("update", _minus(params, start), _minus(their_params, start))
        if not all(after < before for before, after in itertools.pairwise(losses)):
            problems.append(f"the loss does not fall: {losses}; the models may be dead, or the learning rate too high.")
    problems += [
        f"{line.name} differs by {line.error:.1e} of its largest value {line.largest:.1e}."
        for line in lines
        if not line.error <= tolerance
    ]
    return Report(str(folder), sides.dtype, tolerance, tuple(lines), tuple(losses), tuple(problems))


def _our_outputs(sides: _Sides, params: Tree) -> dict[str, Any]:
    out = sides.ours.model.apply({"params": params}, **sides.inputs)
    return dict(sides.family.our_outputs(out, sides.inputs))


def _their_outputs(sides: _Sides) -> dict[str, Any]:
    import torch

    def tensor(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        is_float = np.issubdtype(value.dtype, np.floating)
        return torch.tensor(value, dtype=getattr(torch, sides.dtype) if is_float else None)

    out = sides.theirs(**{name: tensor(value) for name, value in sides.their_inputs.items()})
    return dict(sides.family.their_outputs(out, sides.their_inputs))


def _same_outputs(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    if ours.keys() != theirs.keys():
        return [f"outputs differ in name: {sorted(ours)} here, {sorted(theirs)} there; mend the family's outputs."]
    return [
        f"output {name} has shape {ours[name].shape} here and {tuple(theirs[name].shape)} there."
        for name in ours
        if ours[name].shape != tuple(theirs[name].shape)
    ]


def _targets(outputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=value.shape).astype(value.dtype) for name, value in outputs.items()}


def _train_ours(
    sides: _Sides, targets: Mapping[str, np.ndarray], learning_rate: float
) -> tuple[Tree, Tree, list[float]]:
    """The loss, summed over outputs, is the mean squared distance from random targets."""
    tx = optax.adamw(learning_rate, eps=1e-6, weight_decay=0.01)

    @jax.jit
    def evaluate(params: Tree) -> tuple[jax.Array, Tree]:
        def loss_fn(params: Tree) -> jax.Array:
            outputs = _our_outputs(sides, params)
            return sum((jnp.mean((outputs[name] - targets[name]) ** 2) for name in targets), jnp.zeros(()))

        return jax.value_and_grad(loss_fn)(params)

    @jax.jit
    def update(params: Tree, gradients: Tree, opt_state: Any) -> tuple[Tree, Any]:
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, losses, first = sides.ours.params, [], None
    opt_state = tx.init(params)
    for _ in range(N_STEPS):
        loss, gradients = evaluate(params)
        first = gradients if first is None else first
        losses.append(float(loss))
        params, opt_state = update(params, gradients, opt_state)
    return unrolled(params), unrolled(first), [*losses, float(evaluate(params)[0])]


def _train_theirs(
    sides: _Sides, targets: Mapping[str, np.ndarray], learning_rate: float
) -> tuple[Tree, Tree, list[float]]:
    import torch

    parameters = dict(sides.theirs.named_parameters())
    tx = torch.optim.AdamW(parameters.values(), lr=learning_rate, eps=1e-6, weight_decay=0.01)

    def evaluate() -> Any:
        outputs = _their_outputs(sides)
        return sum(((outputs[name] - torch.tensor(target)) ** 2).mean() for name, target in targets.items())

    losses, gradients = [], {}
    for step in range(N_STEPS):
        tx.zero_grad()
        loss = evaluate()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            gradients = {name: _gradient(p) for name, p in parameters.items()}
        tx.step()
    with torch.no_grad():
        losses.append(evaluate().item())
    weights = {name: p.detach().numpy() for name, p in parameters.items()}
    return _through_map(sides, weights), _through_map(sides, gradients), losses


def _gradient(parameter: Any) -> np.ndarray:
    if parameter.grad is None:
        return np.zeros(tuple(parameter.shape), parameter.detach().numpy().dtype)
    gradient: np.ndarray = parameter.grad.numpy().copy()
    return gradient


def _through_map(sides: _Sides, tensors: Mapping[str, np.ndarray]) -> Tree:
    family, model = sides.family, sides.ours.model
    like = jax.tree.map(np.asarray, unrolled(sides.ours.params))
    params, _ = to_params(family.entries(model), tensors, like, names=family.names, source="the PyTorch module")
    return params


def _dead(family: Family, gradients: Tree) -> list[str]:
    """Leaves that a comparison of gradients says nothing about, and leaves wrongly said to be such."""
    flat = {path: float(np.abs(leaf).max()) for path, leaf in flatten(gradients).items()}
    largest = max(flat.values())
    excused, _ = paths.claim(family.zero_gradients, flat)
    problems = [f"gradient {path} is zero on both sides: nothing is proved of it." for path in flat if flat[path] == 0]
    problems = [problem for problem in problems if problem.split(" ")[1] not in excused]
    return problems + [
        f"gradient {path} is said to be zero, but is {flat[path]:.1e}."
        for path in excused
        if flat[path] > 1e-4 * largest
    ]


def _lines(kind: str, ours: Tree, theirs: Tree) -> list[Line]:
    flat, other = flatten(ours), flatten(theirs)
    floor = FLOOR * max(float(np.abs(leaf).max()) for leaf in other.values())
    return [_line(f"{kind} {path}", flat[path], other[path], floor=floor) for path in flat]


def _minus(after: Tree, before: Tree) -> Tree:
    return jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), after, before)


def _line(name: str, ours: Any, theirs: Any, *, floor: float = 1e-300) -> Line:
    x, y = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    largest = float(np.abs(y).max())
    return Line(name, x.size, largest, float(np.abs(x - y).max()) / max(largest, floor))
