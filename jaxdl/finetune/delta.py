"""Checkpoints of a fine-tuning run that leave out what is frozen; `delta_folder` is the model to give away."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from jaxdl import paths
from jaxdl.checkpoint import CheckpointError, Restored
from jaxdl.finetune.contract import Frozen
from jaxdl.finetune.delta_folder import KEY, base_record, check_base, load_delta, read_delta, save_delta
from jaxdl.paths import Tree

__all__ = ["DeltaStore", "load_delta", "read_delta", "save_delta"]


class DeltaStore:
    """A `checkpoint.Store` that leaves out what is frozen, and takes it from the base again.

    A step holds the leaves that move, the optimizer's state (which speaks of them only), the moving part of `extra`,
    the step and the key; and, in its metadata, the hash of the base and of each of its leaves, so that a wrong base is
    refused by name. For a run that unfreezes gradually, make `frozen` with the rules of the last stage.

    Args:
      store: keeps the steps; close it, or use this as a context manager.
      frozen: the contract of the run: the hashes of everything that stays as it is.

    Example:
      >>> import tempfile, optax, jax.numpy as jnp
      >>> from jaxdl import create_state
      >>> from jaxdl.checkpoint import Store, manifest
      >>> params, rules = {"body": jnp.ones(2), "head": jnp.ones(1)}, [("head", True), (".*", False)]
      >>> state = create_state(params, {}, optax.sgd(0.1), rng=jax.random.key(0), trainable=rules)
      >>> with tempfile.TemporaryDirectory() as name, DeltaStore(Store(name), Frozen(params, {}, rules)) as store:
      ...     store.save(7, state)
      ...     store.wait()
      ...     print(sorted(manifest.read(Path(name, "7")).leaves), store.restore(state).step)
      ['params/head', 'rng', 'step'] 7
    """

    def __init__(self, store: Any, frozen: Frozen) -> None:
        self._store, self._frozen = store, frozen
        self._is_checked = False

    @property
    def directory(self) -> Path:
        """That of the store."""
        return Path(self._store.directory)

    def save(
        self,
        step: int,
        state: Any,
        *,
        metadata: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves what moves, as `Store.save`.

        The first save of a process hashes the frozen leaves once more: a step that moves them is found before it is
        trusted. After that it is the contract's last check, at the end of the run, that speaks for them.

        Raises:
          ContractError: a frozen leaf is not what it was.
          CheckpointError: see `Store.save`; or `metadata` has the key of this class.
        """
        if KEY in (metadata or {}):
            raise CheckpointError(f"metadata has the key {KEY!r}, which a delta needs for itself; rename it.")
        if not self._is_checked:
            self._frozen.check(state.params, state.extra)
            self._is_checked = True
        moving = _without(state, self._frozen.hashes)
        self._store.save(step, moving, metadata={**(metadata or {}), KEY: base_record(self._frozen)}, metrics=metrics)

    def restore(self, like: Any, *, step: int | None = None, on_note: Callable[[str], object] = print) -> Restored:
        """Reads the newest intact checkpoint, as `Store.restore`, and puts the frozen leaves of `like` beside it.

        Args:
          like: a state whose frozen leaves are those of the base, or a function that gives it by step.
          step: read this step only.
          on_note: is told of every damaged step that is passed over.

        Raises:
          CheckpointMismatch: the checkpoint was made on another base, with the names of the leaves that differ; or it
            is one of another model, or of the whole state.
          ContractError: the frozen leaves of `like` are not those of the contract.
          CheckpointCorrupt, CheckpointError: see `Store.restore`.
        """
        like_at = like if callable(like) else lambda _: like
        got = self._store.restore(lambda step: _without(like_at(step), self._frozen.hashes), step=step, on_note=on_note)
        metadata = dict(got.metadata)
        where = f"step {got.step} in {self.directory}"
        check_base(where, metadata.pop(KEY, None), self._frozen.hashes)
        base = like_at(got.step)
        self._frozen.check(base.params, base.extra)
        return got._replace(state=_merged(got.state, base), metadata=metadata)

    def steps(self) -> list[int]:
        """As `Store.steps`."""
        return list(self._store.steps())

    def damaged(self) -> dict[int, str]:
        """As `Store.damaged`."""
        return dict(self._store.damaged())

    def best_step(self) -> int | None:
        """As `Store.best_step`."""
        step: int | None = self._store.best_step()
        return step

    def check(self) -> None:
        """As `Store.check`."""
        self._store.check()

    def wait(self) -> None:
        """As `Store.wait`."""
        self._store.wait()

    def close(self) -> None:
        """Closes the store."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.__exit__(kind, error, trace)


def _without(state: Any, frozen: Mapping[str, str]) -> Any:
    """A state with `None` in place of what is frozen."""
    both = {"params": state.params, "extra": state.extra}
    mask = [path not in frozen for path in paths.flatten(both)]
    moving, _ = paths.split(both, jax.tree.unflatten(jax.tree.structure(both), mask))
    return state.replace(**moving)


def _merged(moving: Any, base: Any) -> Any:
    def fill(some: Tree, all_: Tree) -> Tree:
        flat = {**paths.flatten(all_), **paths.flatten(some)}
        return jax.tree.unflatten(jax.tree.structure(all_), list(flat.values()))

    return moving.replace(params=fill(moving.params, base.params), extra=fill(moving.extra, base.extra))
