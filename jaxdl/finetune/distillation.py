"""Knowledge distillation: a small model learns what a large one says of each row.

The teacher's variables stand in the tree of parameters, under the key `teacher` beside the student's own, and the rule
`("teacher/.*", False)` freezes them. So the student's paths stay as they are, the compiled step holds no teacher as a
constant (as it would a closed-over one), the rules that shard, quantise and cast reach it, and a frozen leaf meets no
optimizer and no delta. In `extra` it would be averaged over devices in every step.

Dimensions: `B` rows (any number of leading axes, so tokens too), `C` classes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxdl import paths
from jaxdl.errors import JaxdlError
from jaxdl.losses import LossFn, LossOut
from jaxdl.metrics import Mean, mean
from jaxdl.objectives import Objective
from jaxdl.paths import Tree

TEACHER = "teacher"
LOGITS = "teacher_logits"


def soft_cross_entropy(
    logits_BC: Array, teacher_logits_BC: Array, weight: Array | None = None, *, temperature: float = 1.0
) -> Mean:
    """`T**2` times the divergence of the student from the teacher, both softened by T (Hinton et al. 2015, section 2).

    The divergence is the cross-entropy less the teacher's own entropy, which no gradient sees: it is 0 where both
    agree. The factor keeps gradients of one size whatever the temperature.

    Args:
      logits_BC: (B..., C) float; computed in float32.
      teacher_logits_BC: the same shape; no gradient reaches it.
      weight: (B...) float or None; a row of weight 0 adds exactly nothing.
      temperature: T.

    Raises:
      JaxdlError: the shapes differ, or T is not positive.

    Example:
      >>> round(soft_cross_entropy(jnp.zeros((1, 2)), jnp.log(jnp.array([[9.0, 1.0]])), temperature=2.0).finish(), 4)
      0.5232
    """
    problems = _temperature_problems(temperature)
    if logits_BC.shape != teacher_logits_BC.shape:
        shapes = f"{list(logits_BC.shape)} and the teacher's {list(teacher_logits_BC.shape)}"
        problems.append(f"the student's logits have the shape {shapes}; both must speak of the same rows and classes.")
    if problems:
        raise JaxdlError.listing("distillation", problems)
    teacher_logits_BC = jax.lax.stop_gradient(teacher_logits_BC)
    log_p_BC, log_q_BC = (
        jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (teacher_logits_BC, logits_BC)
    )
    p_BC = jnp.exp(log_p_BC)
    apart_BC = jnp.where(p_BC > 0, p_BC * (log_p_BC - log_q_BC), 0.0)  # a class at -inf is impossible for both
    return mean(temperature**2 * jnp.sum(apart_BC, axis=-1), weight)


def _temperature_problems(temperature: float) -> list[str]:
    return [] if temperature > 0 else [f"temperature={temperature} must be positive."]


def distillation(hard: Objective | None = None, *, temperature: float = 2.0, hard_share: float = 0.5) -> Objective:
    """What a student is judged by: the teacher's soft targets in `batch["teacher_logits"]`, and perhaps the labels.

    Args:
      hard: the objective of the labels, such as `objectives.classification()`; None to learn from the teacher alone.
      temperature: T; the higher, the more the small probabilities count.
      hard_share: the loss is `hard_share * hard + (1 - hard_share) * soft`. Both are divided by the summed weight of
        the rows, also where `hard` has class weights.

    Returns:
      `(logits, batch) -> LossOut` with the sums of `hard`, and `soft_loss` and `hard_loss`.

    Raises:
      JaxdlError: numbers out of range; in the call, a batch without `teacher_logits`.

    Example:
      >>> from jaxdl.objectives import classification
      >>> batch = {"label": jnp.array([0]), "teacher_logits": jnp.array([[2.0, 0.0]])}
      >>> out = distillation(classification(), hard_share=0.25)(jnp.array([[2.0, 0.0]]), batch)
      >>> round(float(out.total), 4), sorted(out.sums)
      (0.0317, ['accuracy', 'hard_loss', 'soft_loss'])
    """
    problems = _temperature_problems(temperature)
    if not 0 <= hard_share < 1:
        problems.append(f"hard_share={hard_share} must be in [0, 1); at 1 there is no teacher.")
    if problems:
        raise JaxdlError.listing("distillation", problems)

    def objective(logits_BC: Array, batch: Mapping[str, Array]) -> LossOut:
        if LOGITS not in batch:
            has = ", ".join(sorted(batch))
            raise JaxdlError(f"the batch has no {LOGITS!r}, only {has}; wrap the loss in with_teacher, or add them.")
        soft = soft_cross_entropy(logits_BC, batch[LOGITS], batch.get("weight"), temperature=temperature)
        if hard is None:
            return LossOut(*soft)
        out = hard(logits_BC, batch)
        total = hard_share * out.total + (1 - hard_share) * soft.total
        return LossOut(total, soft.weight, {**out.sums, "soft_loss": soft, "hard_loss": Mean(out.total, soft.weight)})

    return objective


def with_teacher(loss_fn: LossFn, teacher_fn: Callable[[Tree, Any], Array]) -> LossFn:
    """Makes the loss of a student into one that asks a frozen teacher, whose variables are `params["teacher"]`.

    Args:
      loss_fn: of the student; it finds the teacher's answer in `batch["teacher_logits"]`.
      teacher_fn: `(params["teacher"], batch) -> logits`, with dropout off.

    Returns:
      `(params, extra, batch, rng) -> LossOut`, to be trained with the rule `("teacher/.*", False)`. Give the evaluation
      the plain loss of the student, which does not read the teacher.

    Raises:
      JaxdlError: in the call, there is no teacher, or a leaf of it trains. Nothing compiles then.

    Example:
      >>> def loss_fn(params, extra, batch, rng):
      ...     return distillation()(batch["x"] @ params["w"], batch)
      >>> taught = with_teacher(loss_fn, lambda teacher, batch: batch["x"] @ teacher["w"])
      >>> params = {"w": jnp.zeros((3, 2)), "teacher": {"w": jnp.eye(3, 2)}}
      >>> out = taught(params, {}, {"x": jnp.ones((4, 3))}, None)
      >>> float(out.total), float(out.weight)
      (0.0, 4.0)
    """

    def taught_loss_fn(params: Tree, extra: Tree, batch: Any, rng: Array) -> LossOut:
        student, teacher = part(params, TEACHER)
        logits = teacher_fn(refuse_gradient(teacher, f"{TEACHER}/"), batch)
        return loss_fn(student, extra, {**batch, LOGITS: jax.lax.stop_gradient(logits)}, rng)

    return taught_loss_fn


def part(params: Tree, name: str) -> tuple[Tree, Tree]:
    """The parameters without those under `name`, and those.

    Raises:
      JaxdlError: there are none.

    Example:
      >>> part({"w": 1, "teacher": {"w": 2}}, "teacher")
      ({'w': 1}, {'w': 2})
    """
    if name not in params:
        near = ", ".join(paths.nearest(name, params)) or "none"
        raise JaxdlError(f"params have no {name!r}; nearest: {near}. Give {{**params, {name!r}: its parameters}}.")
    return {key: tree for key, tree in params.items() if key != name}, params[name]


def refuse_gradient(tree: Tree, prefix: str = "", *, remedy: str | None = None) -> Tree:
    """The tree itself; an error while a gradient is traced that would reach a leaf of it.

    Args:
      tree: parameters that must be frozen.
      prefix: of their paths, for the message.
      remedy: what to do instead; by default a rule for the prefix.

    Raises:
      JaxdlError: names the leaves that a gradient is taken of.

    Example:
      >>> jax.grad(lambda w: refuse_gradient({"w": w}, "teacher/")["w"])(1.0)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      jaxdl.errors.JaxdlError: teacher/w must be frozen; put ('teacher/.*', False) first in trainable...
    """

    pattern = f"{prefix}.*"

    @jax.custom_vjp
    def same(tree: Tree) -> Tree:
        return tree

    def forward(tree: Tree) -> Any:
        moving = [f"{prefix}{path}" for path, leaf in paths.flatten(tree).items() if leaf.perturbed]
        if moving:
            shown = ", ".join(moving[:8]) + (f" and {len(moving) - 8} more" if len(moving) > 8 else "")
            raise JaxdlError(f"{shown} must be frozen; {remedy or f'put ({pattern!r}, False) first in trainable'}.")
        return jax.tree.map(lambda leaf: leaf.value, tree), None

    same.defvjp(forward, lambda _, cotangent: (cotangent,), symbolic_zeros=True)
    return same(tree)
