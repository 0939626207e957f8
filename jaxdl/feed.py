"""How batches reach the step: from the host, read ahead, or as row numbers into arrays that live on the device."""

from typing import Any

import jax
import numpy as np

from jaxdl.compilation import Compiled
from jaxdl.data.prefetch import prefetch
from jaxdl.errors import JaxdlError
from jaxdl.parallel.exact import ExactStep, exact_step
from jaxdl.parallel.mesh import put, put_batch
from jaxdl.parallel.rows import WHOLE, own_block, put_block, settled
from jaxdl.parallel.sharding import constrained
from jaxdl.paths import Tree
from jaxdl.state import TrainState
from jaxdl.step import Step, on_rows, repeat
from jaxdl.steplog import Packing
from jaxdl.tracing import INPUT

RESIDENT_LIMIT_BYTES = 512 * 2**20


def make_feed(
    step: Step,
    data: Any,
    *,
    steps_per_call: int = 1,
    is_resident: bool | None = None,
    mesh: jax.sharding.Mesh | None = None,
    shardings: Tree | None = None,
    exact_shards: int | None = None,
) -> "Feed":
    """Chooses how batches reach the device.

    Args:
      step: a pure train step.
      data: a pipeline; one whose source holds arrays and that has no transforms may live on the device.
      steps_per_call: updates in one call.
      is_resident: True or False to insist; None decides by size (512 MiB).
      mesh: cuts batches, see `parallel.batch_shardings`.
      shardings: where the state lies on the mesh.
      exact_shards: virtual shards of exact mode, see `parallel.exact_step`; None compiles the step whole.

    Raises:
      JaxdlError: `is_resident=True` for data that cannot be, or a step that exact mode cannot take apart.
    """
    if exact_shards is not None:
        return ExactFeed(step, data, mesh, shardings, exact_shards)
    step = step if mesh is None else constrained(step, mesh, shardings)
    arrays = resident_arrays(data)
    if is_resident and arrays is None:
        raise JaxdlError("is_resident=True needs a source of arrays and no transforms on the host; drop either.")
    if is_resident is None:
        size = 0 if arrays is None else sum(array.nbytes for array in arrays.values())
        is_resident = arrays is not None and mesh is None and size <= RESIDENT_LIMIT_BYTES
    if is_resident:
        return ResidentFeed(step, data, steps_per_call, mesh, shardings, arrays=arrays)
    return Feed(step, data, steps_per_call, mesh, shardings)


def resident_arrays(data: Any) -> dict[str, np.ndarray] | None:
    """The arrays of a pipeline that gathers rows from memory and does nothing else to them, else None."""
    if getattr(data, "transforms", ()) or getattr(data, "batch_transforms", ()):
        return None
    return getattr(getattr(data, "source", None), "arrays", None)


class Feed:
    """Host batches: read ahead by a thread, placed on the device before they are needed."""

    def __init__(
        self, step: Step, data: Any, steps_per_call: int, mesh: jax.sharding.Mesh | None, shardings: Tree | None
    ) -> None:
        self.data, self.steps_per_call, self._mesh = data, steps_per_call, mesh
        self._block = own_block(mesh, data.batch_size) if hasattr(data, "shard") else WHOLE
        self.packing = Packing()
        step = self.packing.packed(step)
        self.compiled = Compiled(settled(step, mesh, shardings), donate_argnums=(0,), name="train_step")
        repeated = repeat(step, steps_per_call)
        self._repeated = Compiled(settled(repeated, mesh, shardings), donate_argnums=(0,), name="repeated train_step")
        self._batches: Any = None

    @property
    def description(self) -> str:
        return f"batches of {self.data.batch_size} from the host" + self._calls()

    def _calls(self) -> str:
        return f", {self.steps_per_call} steps a call" if self.steps_per_call > 1 else ""

    def start(self, first: int, stop: int) -> None:
        put = self._put if self.steps_per_call == 1 else (lambda batch: batch)
        data = self.data if self._block == WHOLE else self.data.shard(*self._block)
        self._batches = prefetch(data, first, stop, put=put)

    def _put(self, batch: Any, n_leading: int = 0) -> Any:
        if self._mesh is None:
            return jax.device_put(batch)
        if self._block == WHOLE:
            return put_batch(batch, self._mesh, n_leading=n_leading)
        return put_block(batch, self._mesh, self._block, n_leading=n_leading)

    def program(self, n: int) -> Compiled | ExactStep:
        """What a call of n steps runs."""
        return self.compiled if n == 1 else self._repeated

    def chunk(self, limit: int) -> int:
        """How many steps the next call makes when `limit` are left to the next boundary."""
        return self.steps_per_call if limit >= self.steps_per_call else 1

    def call(self, state: TrainState, step: int, n: int) -> tuple[TrainState, jax.Array]:
        if n == 1:
            batch = self._next()
            return self.compiled(state, batch if self.steps_per_call == 1 else self._put(batch))
        batches = [self._next() for _ in range(n)]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
        return self._repeated(state, self._put(stacked, 1))

    def _next(self) -> Any:
        with jax.profiler.TraceAnnotation(INPUT):
            return next(self._batches)

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()


class ExactFeed(Feed):
    """Host batches for exact mode, whose step is several programs; one update a call."""

    def __init__(self, step: Step, data: Any, mesh: jax.sharding.Mesh | None, shardings: Any, n_shards: int) -> None:
        super().__init__(step, data, 1, mesh, shardings)
        self._block = WHOLE
        self.compiled: Any = exact_step(self.packing.packed(step), mesh, shardings, n_shards=n_shards)

    @property
    def description(self) -> str:
        n, devices = self.compiled.n_shards, self.compiled.mesh.size
        rows = f"{n} virtual shards of {self.data.batch_size // n} rows"
        return f"exact mode: batches of {self.data.batch_size} from the host, {rows}, {devices} device(s)"

    def _put(self, batch: Any, n_leading: int = 0) -> Any:
        return self.compiled.put(batch)


class ResidentFeed(Feed):
    """The whole dataset on the device: a call sends row numbers only."""

    def __init__(
        self,
        step: Step,
        data: Any,
        steps_per_call: int,
        mesh: jax.sharding.Mesh | None,
        shardings: Tree | None,
        *,
        arrays: Any,
    ) -> None:
        super().__init__(step, data, steps_per_call, mesh, shardings)
        self._block = WHOLE
        step = self.packing.packed(step)
        whole = None if mesh is None else jax.NamedSharding(mesh, jax.P())
        self._dataset = jax.tree.map(lambda x: put(x, whole), dict(arrays))
        self.compiled = Compiled(
            settled(lambda state, dataset, rows: on_rows(step, dataset)(state, rows), mesh, shardings),
            donate_argnums=(0,),
            name="train_step",
        )

        def repeated(state: TrainState, dataset: Any, rows: jax.Array) -> Any:
            return repeat(on_rows(step, dataset), steps_per_call)(state, rows)

        self._repeated = Compiled(
            settled(repeated, mesh, shardings),
            donate_argnums=(0,),
            name="repeated train_step",
        )

    @property
    def description(self) -> str:
        return f"{self.data.n_rows} rows live on the device, batches of {self.data.batch_size}" + self._calls()

    def start(self, first: int, stop: int) -> None:
        """Nothing to read ahead."""

    def call(self, state: TrainState, step: int, n: int) -> tuple[TrainState, jax.Array]:
        if n == 1:
            return self.compiled(state, self._dataset, self._put(self.data.rows(step).astype(np.int32)))
        rows = np.stack([self.data.rows(step + i) for i in range(n)]).astype(np.int32)
        return self._repeated(state, self._dataset, self._put(rows, 1))
