"""Exact mode: the same bits of the state and of the metrics on any number of devices.

XLA fuses a program differently for another number of devices, another number of rows on each, or another neighbour in
the same program, and floating-point sums depend on their order. So nothing of that may change:

- a batch is cut into a fixed number of virtual shards, each with a key of its own; a device computes its shards one
  after the other, with one program for one shard on one device;
- the sums of shards are added by neighbours, then the sums of those, and so on. A device adds its own shards; devices
  go on with theirs over `ppermute`. An addition of two numbers has one result, whoever makes it;
- the update is a program of its own for one device, and each device makes it.

Where the state lies changes no bits: a state that is spread over devices is gathered for the step.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdl.compilation import Compiled
from jaxdl.errors import JaxdlError
from jaxdl.losses import LossFn, LossOut
from jaxdl.parallel.mesh import DATA, ShardingError, put_batch
from jaxdl.parallel.pairwise import TreeSum, add, join, make_exchange, pack, unpack, views
from jaxdl.paths import Tree, flatten
from jaxdl.state import TrainState
from jaxdl.step import Halves, Step, Sums

Array = jax.Array
N_SHARDS = 8

# A product of Eigen with many threads may cut its sum by their number, which follows that of the devices; a GPU chooses
# its algorithms by how fast they are, and some of them add in the order in which threads come.
_OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {"xla_cpu_multi_thread_eigen": False},
    "gpu": {"xla_gpu_exclude_nondeterministic_ops": True, "xla_gpu_autotune_level": 0},
}


def exact_step(
    step: Step, mesh: Mesh | None = None, shardings: Tree = None, *, n_shards: int = N_SHARDS
) -> "ExactStep":
    """Compiles a step so that its results do not depend on the number of devices, to the last bit.

    The results do depend on `n_shards`, on the kind of device, and on the versions of JAX and XLA. They are not those
    of `jit_step` to the last bit, and dropout draws other masks than there.

    Args:
      step: of `make_train_step`, made without `axis_name`; perhaps in `guard`.
      mesh: the devices; all its axes share the rows. The first device where None.
      shardings: where the state lies between steps, from `state_shardings`; whole on every device where None.
      n_shards: virtual shards, a power of two; the number of devices must divide it, and it the rows of a batch.

    Returns:
      `(state, batch) -> (state, metrics)`; the state is donated. Metrics lie on the first device of this process.

    Raises:
      ShardingError: a number of shards, devices, rows or microbatches that does not fit, all at once.
      JaxdlError: a step that is no such step, or a loss that changes `extra`, as BatchNorm does: its statistics cross
        the rows of all shards.

    Example:
      >>> import optax
      >>> from jaxdl import create_state, losses, make_train_step
      >>> from jaxdl.parallel import make_mesh
      >>> def loss_fn(params, extra, batch, rng):
      ...     return LossOut(*losses.squared_error(batch["x"] * params["w"], batch["y"]))
      >>> state = create_state({"w": jnp.float32(0)}, {}, optax.sgd(0.5), rng=jax.random.key(0))
      >>> run = exact_step(make_train_step(loss_fn, optax.sgd(0.5)), make_mesh(data=4))
      >>> state, metrics = run(state, {"x": np.ones(16, np.float32), "y": np.ones(16, np.float32)})
      >>> float(state.params["w"]), metrics["loss"].finish()
      (1.0, 1.0)
    """
    halves = getattr(step, "halves", None)
    if halves is None:
        raise JaxdlError(
            "exact_step needs a step of make_train_step, perhaps in guard: it compiles the gradient and the update "
            "apart. Apply repeat, constrained and the like not at all: exact mode makes one update a call."
        )
    return ExactStep(halves, mesh, shardings, n_shards=n_shards)


class ExactStep:
    """What `exact_step` returns.

    Attributes:
      compile_s: seconds of compiling all programs, None before the first call.
      is_cached: whether all came from the compile cache on disk.
    """

    def __init__(
        self, halves: Halves, mesh: Mesh | None = None, shardings: Tree = None, *, n_shards: int = N_SHARDS
    ) -> None:
        devices = np.array(jax.devices()[:1]) if mesh is None else mesh.devices.reshape(-1)
        _check(n_shards, devices.size)
        self.mesh = Mesh(devices, (DATA,), axis_types=(jax.sharding.AxisType.Auto,))
        self._halves, self._shardings, self.n_shards = halves, shardings, n_shards
        self._whole = NamedSharding(self.mesh, P())
        self._local = [(i, device) for i, device in enumerate(devices) if device in self._whole.addressable_devices]
        self._split = jax.jit(_split, static_argnums=1)
        self._add = jax.jit(add, donate_argnums=0)
        self._exchange = jax.jit(make_exchange(self.mesh), donate_argnums=0)
        self._programs: list[_Programs] = []

    @property
    def compile_s(self) -> float | None:
        parts = [part.compile_s or 0.0 for programs in self._programs for part in programs[:2]]
        return sum(parts) if parts else None

    @property
    def is_cached(self) -> bool:
        return all(part.is_cached for programs in self._programs for part in programs[:2])

    def put(self, batch: Tree) -> Tree:
        """Rows of the host on the devices, as `__call__` wants them; it does this itself where it was not done."""
        rows = {path: np.shape(leaf)[0] for path, leaf in flatten(batch).items()}
        _check(self.n_shards, self.mesh.size, rows, self._halves.microbatches)
        return put_batch(batch, self.mesh)

    def __call__(self, state: TrainState, batch: Tree) -> tuple[TrainState, Any]:
        replicas, blocks = views(jax.device_put(state, self._whole)), views(self.put(batch))
        if not self._programs:
            self._compile(replicas[0], blocks[0])
        n = self.n_shards // self.mesh.size
        shards = [self._split(block, n) for block in blocks]
        sums, scales = [TreeSum(self._add) for _ in replicas], [None for _ in replicas]
        for j in range(n):  # the outer loop: every device has something to do before any gets its second shard
            for k, programs in enumerate(self._programs):
                vectors, scales[k] = programs.gradient(replicas[k], shards[k][j], programs.numbers[j])
                sums[k].push(vectors)
        totals = self._sum_over_devices([part.finish() for part in sums])
        results = [
            programs.update(old.replace(rng=None), old.rng, total, scale)
            for programs, old, total, scale in zip(self._programs, replicas, totals, scales, strict=True)
        ]
        return self._joined(state, [new for new, _ in results]), results[0][1]

    def _sum_over_devices(self, sums: list[Any]) -> list[Any]:
        if self.mesh.size == 1:
            return sums
        rows = NamedSharding(self.mesh, P(DATA))
        return views(self._exchange(join(sums, rows, lambda shape: (self.mesh.size, *shape[1:]))))

    def _joined(self, state: TrainState, replicas: list[TrainState]) -> TrainState:
        rng = state.rng  # it never changes
        if self.mesh.size == 1 and self._shardings is None:
            return replicas[0].replace(rng=rng)
        joined = join(replicas, self._whole, lambda shape: shape).replace(rng=rng)
        return jax.device_put(joined, self._whole if self._shardings is None else self._shardings)

    def _compile(self, state: TrainState, block: Tree) -> None:
        n = self.n_shards // self.mesh.size
        rows = jax.eval_shape(lambda block: _split(block, n)[0], block)
        _check_extra(self._halves.loss_fn, state, rows)
        gradient, update = _make_functions(self._halves, state, rows)
        shapes = jax.eval_shape(gradient, state, rows, jax.ShapeDtypeStruct((), jnp.int32))
        rest = (state.replace(rng=None), state.rng, *shapes)
        is_alone = len(self._local) == 1
        first: tuple[Any, ...] = (None, None)
        for i, device in self._local:
            numbers = [jax.device_put(np.int32(i * n + j), device) for j in range(n)]
            programs = _Programs(
                _compiled(gradient, (state, rows, numbers[0]), device, first[0], is_alone),
                _compiled(update, rest, device, first[1], is_alone, donate_argnums=(0,)),
                numbers,
            )
            first = first if self._programs else programs
            self._programs.append(programs)


class _Programs(NamedTuple):
    """Of one device; `numbers` are those of its shards."""

    gradient: Compiled
    update: Compiled
    numbers: list[Array]


def _compiled(fn: Any, args: Any, device: Any, first: Any, is_alone: bool, **options: Any) -> Compiled:
    """For this device: the code of the first device's program where that can be moved."""
    moved = None if first is None else first.moved(device)
    if moved is not None:
        return moved
    platform = jax.default_backend()
    is_kept = is_alone or platform != "cpu"  # the cache of a CPU knows a program by its device, and would never hit
    fn.__name__ += "" if is_kept else "_moved"  # else it would hit what a process with one device has kept
    options = {"name": f"{fn.__name__} of exact_step", "compiler_options": _OPTIONS.get(platform, {}), **options}
    program = Compiled(fn, is_kept=is_kept, **options)
    there = jax.sharding.SingleDeviceSharding(device)
    program.compile(*jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), args))
    return program


def _check(n_shards: int, n_devices: int, n_rows: Mapping[str, int] = MappingProxyType({}), parts: int = 1) -> None:
    problems = exact_problems(n_shards, n_devices, n_rows, parts)
    if problems:
        raise ShardingError.listing("exact mode", problems)


def exact_problems(n_shards: int, n_devices: int, n_rows: Mapping[str, int], microbatches: int) -> list[str]:
    """What does not divide.

    Args:
      n_shards: virtual shards.
      n_devices: of the mesh.
      n_rows: of each array of a batch, by name.
      microbatches: parts of a shard.

    Example:
      >>> exact_problems(8, 3, {"a batch": 16}, 2)
      ['3 devices do not divide into 8 virtual shards; use 1, 2, 4, 8 devices.']
    """
    if n_shards < 1 or n_shards & (n_shards - 1):
        return [f"{n_shards} virtual shards are not a power of two, and sums are added in pairs; use 8, 16, ..."]
    problems = []
    if n_shards % n_devices:
        fitting = ", ".join(str(2**i) for i in range(n_shards.bit_length()))
        more = f", or {n_devices} virtual shards from the first step on" if n_devices > n_shards else ""
        problems.append(
            f"{n_devices} devices do not divide into {n_shards} virtual shards; use {fitting} devices{more}."
        )
    unit = n_shards * microbatches
    parts = "" if microbatches == 1 else f" of microbatches={microbatches} parts each"
    problems += [
        f"{name} has {n} rows, which do not divide into {n_shards} virtual shards{parts}; use a multiple of {unit}, or "
        "fewer shards."
        for name, n in n_rows.items()
        if n % unit
    ]
    return problems


def _check_extra(loss_fn: LossFn, state: TrainState, rows: Tree) -> None:
    """Refuses a loss that changes `extra`; at tracing. A leaf counts as unchanged if it is the same object."""
    changed: list[str] = []

    def trace(params: Tree, extra: Tree, rows: Tree, rng: Array) -> Array:
        out = loss_fn(params, extra, rows, rng)
        old, new = flatten(extra), flatten(extra if out.extra is None else out.extra)
        changed.extend(path for path, leaf in new.items() if old.get(path) is not leaf)
        return out.total

    jax.eval_shape(trace, state.params, state.extra, rows, state.rng)
    if changed:
        raise JaxdlError.listing(
            "exact mode cannot keep statistics over rows",
            [
                f"{path} is changed by the loss; its value would depend on the rows of a shard. Use norm='group' or "
                "'layer' in place of batch norm, or freeze the module, whose averages then stay."
                for path in changed
            ],
        )


def _make_functions(halves: Halves, state: TrainState, rows: Tree) -> tuple[Any, Any]:
    """The two functions of a device.

    Returns:
      `gradient(state, rows, shard) -> (sums, scale)`, the sums as one vector (1, N) a dtype, and
      `update(state, rng, sums, scale) -> (state, metrics)`, whose states have no rng.
    """

    def of_shard(state: TrainState, rows: Tree, shard: Array) -> Sums:
        rng = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), shard)
        return halves.gradient(state, rows, rng)

    def gradient(state: TrainState, rows: Tree, shard: Array) -> tuple[dict[str, Array], Array | None]:
        grads, out, scale = of_shard(state, rows, shard)
        return pack((grads, out.total, out.weight, out.sums)), scale

    like = jax.eval_shape(of_shard, state, rows, jax.ShapeDtypeStruct((), jnp.int32))
    shapes = (like.grads, like.out.total, like.out.weight, like.out.sums)

    def update(rest: TrainState, rng: Array, vectors: dict[str, Array], scale: Array | None) -> tuple[Any, Any]:
        grads, total, weight, sums = unpack(vectors, shapes)
        new, metrics = halves.update(
            rest.replace(rng=rng), Sums(grads, LossOut(total, weight, sums, rest.extra), scale)
        )
        return new.replace(rng=None), metrics

    return gradient, update


def _split(block: Tree, n: int) -> list[Tree]:
    """The rows of a device by shard."""
    parts = jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), block)
    return [jax.tree.map(lambda x, j=j: x[j], parts) for j in range(n)]


def replica(state: TrainState) -> TrainState:
    """The whole state on the first device of this process, for programs that must be the same on any number of them.

    Example:
      >>> from jaxdl.parallel import make_mesh
      >>> spread = jax.device_put(jnp.arange(8), NamedSharding(make_mesh(data=8), P("data")))
      >>> len(replica(spread).sharding.device_set)
      1
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    whole = jax.tree.map(lambda s: NamedSharding(s.mesh, P()) if isinstance(s, NamedSharding) else s, shardings)
    return jax.tree.map(lambda x: x.addressable_data(0), jax.device_put(state, whole))
