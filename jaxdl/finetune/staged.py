"""An optimizer whose state grows while a run unfreezes its parameters: one group of leaves a stage.

The state is `{"stage_0": ..., "stage_1": ...}`, each the state of one transformation for the leaves that opened there.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxdl.errors import JaxdlError
from jaxdl.optim.learning_rate import LearningRateState, find_states
from jaxdl.optim.loss_scale import DynamicLossScaleState
from jaxdl.paths import Rules, Tree, flatten
from jaxdl.state import TrainState, split_trainable

Stages: TypeAlias = Sequence[tuple[int, Rules]]
Tx: TypeAlias = optax.GradientTransformation


def groups_of(stages: Stages, params: Tree) -> dict[str, int]:
    """The stage at which every leaf opens; leaves that no stage trains are left out.

    Args:
      stages: `[(first step, trainable rules), ...]`.
      params: tree of arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      JaxdlError: steps that do not begin at 0 or do not increase, rules that do not fit, a stage that freezes what an
        earlier one trained or that opens nothing; all in one message.

    Example:
      >>> params = {"body": jnp.ones(1), "head": jnp.ones(1)}
      >>> groups_of([(0, [("head", True), (".*", False)]), (100, [(".*", True)])], params)
      {'body': 1, 'head': 0}
    """
    problems = step_problems(stages)
    groups: dict[str, int] = {}
    for k, rules in enumerate([] if problems else [rules for _, rules in stages]):
        try:
            moving = flatten(split_trainable(params, rules)[0])
        except JaxdlError as error:
            problems.append(f"stage {k}: {error}")
            continue
        closed = [path for path in groups if path not in moving]
        opened = {path: k for path in moving if path not in groups}
        if closed:
            problems.append(
                f"stage {k} freezes {', '.join(closed[:8])} again; stages only open (Howard and Ruder 2018, section "
                "3.3): let it train what the stage before trains."
            )
        if not opened:
            problems.append(f"stage {k} opens nothing that stage {k - 1} does not train; drop it or widen its rules.")
        groups.update(opened)
    if problems:
        raise JaxdlError.listing("stages", problems)
    return {path: groups[path] for path in flatten(params) if path in groups}


def step_problems(stages: Stages) -> list[str]:
    """What is wrong with the steps of stages, a line each.

    Example:
      >>> step_problems([(0, []), (10, []), (10, [])])
      ['stage 2 begins at step 10, stage 1 at 10; the steps must increase.']
    """
    pairs = [i for i, stage in enumerate(stages) if not (isinstance(stage, (tuple, list)) and len(stage) == 2)]
    if pairs or not stages:
        return [f"stages={stages!r} must be a list of pairs (first step, trainable rules)."]
    firsts = [first for first, _ in stages]
    wrong = [first for first in firsts if isinstance(first, bool) or not isinstance(first, int)]
    if wrong:
        return [f"stages begin at {wrong}; steps must be whole numbers."]
    problems = [] if firsts[0] == 0 else [f"stage 0 begins at step {firsts[0]}; it must begin at 0."]
    return problems + [
        f"stage {k} begins at step {firsts[k]}, stage {k - 1} at {firsts[k - 1]}; the steps must increase."
        for k in range(1, len(firsts))
        if firsts[k] <= firsts[k - 1]
    ]


def staged(
    tx: Tx, stages: Stages, params: Tree, *, wrap: Callable[[Tx], Tx] | None = None
) -> list[optax.GradientTransformationExtraArgs]:
    """Makes of one optimizer the optimizer of every stage; `txs[k]` belongs to the trainable rules of stage k.

    Each group of leaves has its own state of `tx`, made when it opens, with its own moments and Adam count. `tx` sees
    the other groups' leaves as arrays of no elements, so that its rules (decay, `lr_scale_rules`) are over all leaves
    that ever train. The `clip_norm` of `make_optimizer` clips by the norm over all open groups; that of another
    transformation only if it stands in `wrap`.

    Args:
      tx: the optimizer, as for a run without stages.
      stages: `[(first step, trainable rules), ...]`.
      params: all parameters, or their shapes.
      wrap: what stands around all groups: `dynamic_loss_scale`, or
        `lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx)`. It must keep no state of its own for leaves.

    Raises:
      JaxdlError: see `groups_of`; or `tx` scales the loss, which groups cannot do each on its own.
      RuleError: a rule list of `tx` that does not fit.

    Example:
      >>> params = {"body": jnp.ones(1), "head": jnp.ones(1)}
      >>> stages = [(0, [("head", True), (".*", False)]), (100, [(".*", True)])]
      >>> first, second = staged(optax.adam(0.1), stages, params)
      >>> sorted(flatten(first.init({"body": None, "head": params["head"]})))
      ['stage_0/0/count', 'stage_0/0/mu/head', 'stage_0/0/nu/head']
    """
    groups = groups_of(stages, params)
    tree = _Tree(jax.tree.structure(params), list(flatten(params)), {p: flatten(params)[p].dtype for p in groups})
    tx = optax.with_extra_args_support(tx)
    parts = []
    for k in range(len(stages)):
        chosen = [path for path, group in groups.items() if group == k]
        shapes = jax.eval_shape(lambda flat, chosen=chosen: tx.init(tree.fill(flat, chosen)), flatten(params))
        parts.append(_Part(f"stage_{k}", chosen, shapes))
    if find_states(parts[0].shapes, lambda node: isinstance(node, DynamicLossScaleState)):
        raise JaxdlError("each group would scale the loss on its own; give the optimizer and wrap=dynamic_loss_scale.")
    made = [_of_stage(tx, parts[: k + 1], tree) for k in range(len(stages))]
    return [optax.with_extra_args_support(one if wrap is None else wrap(one)) for one in made]


class _Tree(NamedTuple):
    """The shape of the parameters, and the dtype of every leaf that ever trains."""

    structure: Any
    paths: list[str]
    dtypes: dict[str, Any]

    def fill(self, flat: dict[str, Any], chosen: Collection[str]) -> Tree:
        """A tree with the chosen leaves, nothing in place of the others of the group, `None` for what never trains."""
        empty = {path: jnp.zeros(0, dtype) for path, dtype in self.dtypes.items()}
        leaves = {**empty, **{path: flat[path] for path in chosen}}
        return jax.tree.unflatten(self.structure, [leaves.get(path) for path in self.paths])


class _Part(NamedTuple):
    name: str
    paths: list[str]
    shapes: Any  # of the state of `tx`, with the arrays of no elements


def _of_stage(tx: optax.GradientTransformationExtraArgs, parts: list[_Part], tree: _Tree) -> Tx:
    opened = [path for part in parts for path in part.paths]

    def checked(given: Tree) -> dict[str, Any]:
        flat = flatten(given)
        if flat.keys() != set(opened):
            raise JaxdlError(
                f"the optimizer of stage {len(parts) - 1} was given the leaves {sorted(flat)}, but {sorted(opened)} "
                f"train there; use trainable=stages[{len(parts) - 1}][1]."
            )
        return flat

    def init(params: Tree) -> dict[str, Any]:
        flat = checked(params)
        return {part.name: _without_empty(tx.init(tree.fill(flat, part.paths))) for part in parts}

    def update(updates: Tree, state: dict[str, Any], params: Tree = None, **extra_args: Any) -> tuple[Tree, Any]:
        grads = checked(updates)
        values = None if params is None else flatten(params)
        new_updates, new_state, all_grads = {}, {}, tree.fill(grads, opened)
        for part in parts:
            mine = None if values is None else tree.fill(values, part.paths)
            before = _with_empty(state[part.name], part.shapes)
            got, after = tx.update(tree.fill(grads, part.paths), before, mine, **{"all_grads": all_grads, **extra_args})
            new_updates.update({path: flatten(got)[path] for path in part.paths})
            new_state[part.name] = _without_empty(after)
        return jax.tree.unflatten(tree.structure, [new_updates.get(path) for path in tree.paths]), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _without_empty(state: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf if math.prod(jnp.shape(leaf)) else None, state)


def _with_empty(state: Tree, shapes: Tree) -> Tree:
    kept = iter(jax.tree.leaves(state))
    leaves = [next(kept) if leaf.size else jnp.zeros(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def open_stage(state: TrainState, tx: Tx, *, trainable: Rules) -> TrainState:
    """Makes the state of a stage from the last one of the stage before: nothing changes but the new group's state.

    The new group's moments are fresh, and so is its Adam count. Its learning-rate clock (`LearningRateState`, Optax's
    schedule counts and `inject_hyperparams`) is that of the run.

    Args:
      state: the last state of the stage before.
      tx: the optimizer of the new stage, of `staged`.
      trainable: the rules of the new stage.

    Raises:
      JaxdlError: `state` is not one of a stage before, or `wrap` of `staged` keeps a state for leaves.

    Example:
      >>> from jaxdl import create_state
      >>> head = [("head", True), (".*", False)]
      >>> params = {"body": jnp.ones(1), "head": jnp.ones(1)}
      >>> txs = staged(optax.adam(0.1), [(0, head), (100, [(".*", True)])], params)
      >>> state = create_state(params, {}, txs[0], rng=jax.random.key(0), trainable=head)
      >>> list(open_stage(state, txs[1], trainable=[(".*", True)]).opt_state)
      ['stage_0', 'stage_1']
    """
    moving, _ = split_trainable(state.params, trainable)
    shapes = jax.eval_shape(tx.init, moving)
    found = [find_states(tree, _is_groups) for tree in (state.opt_state, shapes)]
    if [len(nodes) for nodes in found] != [1, 1]:
        raise JaxdlError("open_stage needs an optimizer and a state that `staged` made; see its example.")
    (before,), (after,) = found
    fresh = jax.jit(lambda moving: find_states(tx.init(moving), _is_groups)[0])(moving)
    added = {name: _wound(fresh[name], before["stage_0"]) for name in after if name not in before}
    opt_state = jax.tree.map(
        lambda node: {**node, **added} if _is_groups(node) else node, state.opt_state, is_leaf=_is_groups
    )
    if list(flatten(opt_state)) != list(flatten(shapes)):
        raise JaxdlError(
            f"the state has the groups {sorted(before)} and the stage {sorted(after)}, or what stands in wrap= keeps a "
            "state for leaves; open the stages one after the other, and put such a transformation inside."
        )
    return state.replace(opt_state=opt_state)


_CLOCKS: dict[type, tuple[str, ...]] = {  # and the fields that are not the clock
    LearningRateState: ("inner",),
    optax.ScaleByScheduleState: (),
    optax.InjectStatefulHyperparamsState: ("inner_state",),
}


def _is_groups(node: Any) -> bool:
    return isinstance(node, dict) and "stage_0" in node


def _wound(state: Tree, running: Tree) -> Tree:
    """A new state whose clocks show what those of a running one do; it shares no buffer with that."""
    clocks = iter(find_states(running, lambda node: type(node) in _CLOCKS))

    def wind(node: Any) -> Any:
        if type(node) not in _CLOCKS:
            return node
        clock = next(clocks)
        kept = {name: _wound(getattr(node, name), getattr(clock, name)) for name in _CLOCKS[type(node)]}
        return clock._replace(**kept)

    return jax.tree.map(jnp.copy, jax.tree.map(wind, state, is_leaf=lambda node: type(node) in _CLOCKS))
