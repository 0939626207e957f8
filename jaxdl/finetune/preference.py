"""Learning from preferences without a reward model: the chosen completion of a prompt against the rejected one.

The policy makes the chosen one more likely than the other, measured by what a frozen reference model says of both.

A batch holds `chosen` and `rejected`, each the rows of a language model: `tokens`, `targets` and `weight` (B, T), 1 on
the completion and 0 on the prompt and the padding, and what else the model takes. It may hold `weight` (B,), of pairs.

Dimensions: `B` pairs, `T` tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxdl import paths
from jaxdl.errors import JaxdlError
from jaxdl.finetune.adapters import COLLECTION
from jaxdl.finetune.distillation import part, refuse_gradient
from jaxdl.losses import LossFn, LossOut
from jaxdl.metrics import Mean, mean
from jaxdl.paths import Tree

REFERENCE = "reference"
SIDES = ("chosen", "rejected")
LogProbFn = Callable[[Tree, Tree, Any, Any], Array]


def dpo(margin_B: Array, weight: Array | None = None, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Mean:
    """Direct preference optimization (Rafailov et al. 2023, eq. 7): `-log sigmoid(beta * margin)`.

    Args:
      margin_B: (B,) float, `log p(chosen) - log p(rejected)` of the policy less that of the reference.
      weight: (B,) float or None.
      beta: how strongly the policy is held to the reference.
      label_smoothing: the share of pairs that are taken to be the wrong way round (Mitchell 2023, "conservative DPO").

    Raises:
      JaxdlError: numbers out of range.

    Example:
      >>> round(dpo(jnp.array([0.0, 20.0]), beta=0.5).finish(), 4)
      0.3466
    """
    _check_numbers(beta, label_smoothing)
    logits_B = beta * margin_B.astype(jnp.float32)
    wrong, right = jax.nn.softplus(logits_B), jax.nn.softplus(-logits_B)
    return mean((1 - label_smoothing) * right + label_smoothing * wrong, weight)


def ipo(margin_B: Array, weight: Array | None = None, *, beta: float = 0.1) -> Mean:
    """Identity preference optimization (Azar et al. 2023, eq. 17): `(margin - 1 / (2 beta))**2`, which has an end.

    Args:
      margin_B, weight: as for `dpo`; the margin is of whole sequences, as in the paper, not a mean over tokens.
      beta: the paper's tau.

    Example:
      >>> ipo(jnp.array([0.0, 5.0]), beta=0.1).finish()
      12.5
    """
    _check_numbers(beta, 0.0)
    return mean((margin_B.astype(jnp.float32) - 1 / (2 * beta)) ** 2, weight)


def _check_numbers(beta: float, label_smoothing: float) -> None:
    problems = [] if beta > 0 else [f"beta={beta} must be positive."]
    if not 0 <= label_smoothing < 0.5:
        problems.append(f"label_smoothing={label_smoothing} must be in [0, 0.5); at a half nothing is preferred.")
    if problems:
        raise JaxdlError.listing("preference", problems)


def make_preference_loss_fn(
    log_prob_fn: LogProbFn,
    reference_fn: LogProbFn | None = None,
    *,
    loss: str = "dpo",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> LossFn:
    """Makes the loss of a policy over chosen and rejected completions.

    Args:
      log_prob_fn: `(params, extra, rows, rng) -> (B,)`, such as `language.make_sequence_log_prob_fn` gives.
      reference_fn: the same of the frozen reference, with dropout off: `base_reference` for adapters,
        `copied_reference` for a copy in `params["reference"]`. None: the batch has `reference`, as of `score_pairs`.
      loss: "dpo" or "ipo".
      beta, label_smoothing: see there; IPO has no label smoothing.

    Returns:
      `(params, extra, batch, rng) -> LossOut` with the sums `preference_accuracy` (how often the margin is above 0),
      `reward_margin`, `chosen_reward` and `rejected_reward`, where a reward is `beta * (policy - reference)`.

    Raises:
      JaxdlError: settings that make no sense; in the call, a batch that lacks something.

    Example:
      >>> def log_prob_fn(params, extra, rows, rng):
      ...     return params["w"] * rows["x"]
      >>> loss_fn = make_preference_loss_fn(log_prob_fn, copied_reference(log_prob_fn), beta=1.0)
      >>> params = {"w": jnp.float32(3), "reference": {"w": jnp.float32(1)}}
      >>> out = loss_fn(params, {}, {"chosen": {"x": jnp.ones(1)}, "rejected": {"x": -jnp.ones(1)}}, None)
      >>> out.sums["reward_margin"].finish(), round(float(out.total), 4)
      (4.0, 0.0181)
    """
    _check_numbers(beta, label_smoothing)
    if loss not in ("dpo", "ipo"):
        near = " or ".join(repr(name) for name in paths.nearest(loss, ("dpo", "ipo"), n=2))
        raise JaxdlError(f"loss={loss!r} is unknown; did you mean {near}?")
    if loss == "ipo" and label_smoothing:
        raise JaxdlError(f"label_smoothing={label_smoothing} is of loss='dpo'; IPO has none, leave it at 0.")

    def loss_fn(params: Tree, extra: Tree, batch: Mapping[str, Any], rng: Array) -> LossOut:
        _check_batch(batch)
        reference: Mapping[str, Array] = batch.get(REFERENCE, {})
        if reference_fn is not None:
            reference = score_pairs(reference_fn, params, extra, batch, rng)
        policy = {name: tree for name, tree in params.items() if name != REFERENCE}
        scores = score_pairs(log_prob_fn, policy, extra, batch, rng)
        _check_reference(reference, scores)
        ratio = {side: scores[side] - jax.lax.stop_gradient(reference[side]) for side in SIDES}
        margin_B, weight = ratio["chosen"] - ratio["rejected"], batch.get("weight")
        total = ipo(margin_B, weight, beta=beta)
        if loss == "dpo":
            total = dpo(margin_B, weight, beta=beta, label_smoothing=label_smoothing)
        return LossOut(*total, _metrics(ratio, margin_B, weight, beta))

    return loss_fn


def _metrics(ratio: Mapping[str, Array], margin_B: Array, weight: Array | None, beta: float) -> dict[str, Mean]:
    return {
        "preference_accuracy": mean(margin_B > 0, weight),
        "reward_margin": mean(beta * margin_B, weight),
        **{f"{side}_reward": mean(beta * ratio[side], weight) for side in SIDES},
    }


def _check_reference(reference: Mapping[str, Array], scores: Mapping[str, Array]) -> None:
    found = {side: getattr(reference.get(side), "shape", "missing") for side in SIDES}
    if wrong := {side: found[side] for side in SIDES if found[side] != scores[side].shape}:
        told = " and ".join(f"{side} {shape}" for side, shape in wrong.items())
        shape = scores["chosen"].shape
        raise JaxdlError(f"batch['reference'] has {told}; make it {shape} by score_pairs, or give a reference_fn.")


def _check_batch(batch: Mapping[str, Any]) -> None:
    has = ", ".join(sorted(batch))
    problems = [f"the batch has no {name!r}; it has {has}." for name in SIDES if name not in batch]
    sides = [] if problems else [paths.flatten(batch[side]) for side in SIDES]
    for path in sorted({path for side in sides for path in side}):
        one, other = (getattr(side.get(path), "shape", "missing") for side in sides)
        if one != other:
            problems.append(f"{path} is {one} in 'chosen' and {other} in 'rejected'; pad both to one length.")
    if problems:
        raise JaxdlError.listing("preference batch", problems)


def score_pairs(log_prob_fn: LogProbFn, params: Tree, extra: Tree, batch: Mapping[str, Any], rng: Any) -> Tree:
    """Log-probabilities of both completions, in one call of the model.

    Done once for a data set, with the reference's parameters, it spares the reference in training:
    `batch | {"reference": score_pairs(...)}`.

    Returns:
      `{"chosen": (B,), "rejected": (B,)}`.

    Example:
      >>> batch = {"chosen": {"x": jnp.array([1.0, 2.0])}, "rejected": {"x": jnp.array([3.0, 4.0])}}
      >>> scores = score_pairs(lambda params, extra, rows, rng: 10 * rows["x"], {}, {}, batch, None)
      >>> scores["chosen"].tolist(), scores["rejected"].tolist()
      ([10.0, 20.0], [30.0, 40.0])
    """
    _check_batch(batch)

    def side_by_side(a: Array, b: Array) -> Array:  # a pair stays on its device where the batch is sharded
        return jnp.stack([a, b], axis=1).reshape(2 * a.shape[0], *a.shape[1:])

    rows = jax.tree.map(side_by_side, *(dict(batch[side]) for side in SIDES))
    log_prob_B2 = log_prob_fn(params, extra, rows, rng).reshape(-1, 2)
    return {side: log_prob_B2[:, i] for i, side in enumerate(SIDES)}


def base_reference(log_prob_fn: LogProbFn) -> LogProbFn:
    """The reference of a policy that is a frozen base with adapters: the base without them, which costs no memory.

    Args:
      log_prob_fn: with dropout off. Wrap the loss made of it in `with_adapters`, whose adapters it leaves out.

    Raises:
      JaxdlError: in the call, a leaf of the base trains, so that it is no reference.

    Example:
      >>> reference_fn = base_reference(lambda params, extra, rows, rng: (float(params["w"]), extra))
      >>> reference_fn({"w": 1.0}, {"adapters": {"a": 2.0}}, None, None)
      (1.0, {})
    """
    remedy = "train the adapters alone: [('adapters/.*', True), ('.*', False)]"

    def reference_fn(params: Tree, extra: Tree, rows: Any, rng: Any) -> Array:
        rest = {name: tree for name, tree in extra.items() if name != COLLECTION}
        return log_prob_fn(refuse_gradient(params, remedy=remedy), rest, rows, rng)

    return reference_fn


def copied_reference(log_prob_fn: LogProbFn) -> LogProbFn:
    """The reference of a policy that trains as a whole: the parameters in `params["reference"]`.

    Args:
      log_prob_fn: with dropout off. Train with the rule `("reference/.*", False)`.

    Raises:
      JaxdlError: in the call, there is no reference, or a leaf of it trains.

    Example:
      >>> reference_fn = copied_reference(lambda params, extra, rows, rng: float(params["w"]))
      >>> reference_fn({"w": 1.0, "reference": {"w": 2.0}}, {}, None, None)
      2.0
    """

    def reference_fn(params: Tree, extra: Tree, rows: Any, rng: Any) -> Array:
        return log_prob_fn(refuse_gradient(part(params, REFERENCE)[1], f"{REFERENCE}/"), extra, rows, rng)

    return reference_fn
