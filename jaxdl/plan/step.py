"""The training step of a sketch on the devices of a topology: where everything lies, and what XLA makes of it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdl import paths
from jaxdl.errors import JaxdlError
from jaxdl.nonfinite import guard
from jaxdl.parallel import batch_shardings, bytes_per_device, constrained, make_mesh, state_shardings, unused_axes
from jaxdl.parallel.sharding import n_bytes
from jaxdl.plan import collectives, flops, program
from jaxdl.plan.sketch import Sketch
from jaxdl.plan.topology import Topology
from jaxdl.run import parameter_rows
from jaxdl.state import TrainState, create_state
from jaxdl.step import Step, make_train_step
from jaxdl.xla_options import options_of


class PlanError(JaxdlError):
    """A plan that cannot be made; the message lists every problem at once."""


@dataclass(frozen=True)
class Placed:
    """A step, and where its arguments lie; nothing of it holds memory.

    Attributes:
      step: `(state, batch) -> (state, metrics)`.
      state, batch: shapes, with their shardings.
      shardings: of the state.
      mesh: the devices.
    """

    step: Step
    state: TrainState
    batch: Mapping[str, Any]
    shardings: Any
    mesh: Mesh


def abstract_state(sketch: Sketch) -> TrainState:
    """Shapes and dtypes of the state before the first update.

    Raises:
      RuleError: a rule list does not fit the parameters.
    """

    def start(key: jax.Array) -> TrainState:
        params, extra = sketch.init(key)
        return create_state(params, extra, sketch.tx, rng=key, trainable=sketch.trainable)

    return jax.eval_shape(start, jax.random.key(0))


def make_step(sketch: Sketch) -> Step:
    """The step that the run would take."""
    step = make_train_step(sketch.loss_fn, sketch.tx, trainable=sketch.trainable, microbatches=sketch.microbatches)
    return guard(step, sketch.guard)


def place(sketch: Sketch, devices: list[Any]) -> Placed:
    """Lays a step out on devices.

    Raises:
      PlanError: a mesh larger than the devices, a batch or a state that does not fit it, an axis that nothing lies
        over: all at once, before anything is compiled.
    """
    state = abstract_state(sketch)
    axes: Any = dict(sketch.mesh)
    mesh = make_mesh(devices=devices, **axes)
    problems: list[str] = []
    placed: list[Any] = [None, None]
    for i, find in enumerate(
        (
            lambda: state_shardings(sketch.sharding(state), state, mesh),
            lambda: batch_shardings(dict(sketch.batch), mesh),
        )
    ):
        try:
            placed[i] = find()
        except JaxdlError as error:
            problems.append(str(error))
    shardings, rows = placed
    if shardings is not None and (unused := unused_axes(mesh, shardings)):
        problems.append(
            f"the mesh has the axes {', '.join(mesh.axis_names)} and nothing lies over {', '.join(map(repr, unused))}: "
            "its devices would do the same work twice. A batch lies over 'data' and 'sequence'; give rules for others."
        )
    if problems:
        raise PlanError(problems[0]) if len(problems) == 1 else PlanError.listing("the plan", problems)
    return Placed(make_step(sketch), _with(state, shardings), _with(dict(sketch.batch), rows), shardings, mesh)


def _with(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def parameter_table(sketch: Sketch, placed: Placed) -> list[dict[str, Any]]:
    """A row for each parameter: path, shape, dtype, sharding, trainable, decay, rate, source."""
    params = placed.state.params
    rows = parameter_rows(
        params,
        trainable=sketch.trainable,
        weight_decay_rules=sketch.weight_decay_rules,
        lr_scale_rules=sketch.lr_scale_rules,
    )
    specs = paths.flatten(placed.shardings.params)
    source = paths.flatten(paths.match(sketch.source, params, what="source"))
    return [{**row, "sharding": _spec(specs[row["path"]].spec), "source": source[row["path"]]} for row in rows]


def _spec(spec: P) -> str:
    names = ["-" if axes is None else axes if isinstance(axes, str) else "+".join(axes) for axes in spec]
    return ", ".join(names) if any(name != "-" for name in names) else "whole"


def batch_table(placed: Placed) -> list[dict[str, Any]]:
    """A row for each array of a batch: name, shape, dtype, sharding."""
    return [
        {"name": path, "shape": list(leaf.shape), "dtype": str(leaf.dtype), "sharding": _spec(leaf.sharding.spec)}
        for path, leaf in paths.flatten(placed.batch).items()
    ]


def held(sketch: Sketch, placed: Placed) -> dict[str, int]:
    """Bytes on one device by group, from shapes and shardings alone.

    `gradients` are those of all leaves that train, once; the compiler may free some before it has made the others.
    """
    state, shardings = placed.state, placed.shardings
    moving, _ = paths.split(state.params, paths.match(sketch.trainable, state.params, what="trainable"))
    where, _ = paths.split(shardings.params, paths.match(sketch.trainable, state.params, what="trainable"))
    rest = (state.step, state.rng, state.extra)
    return {
        "parameters": bytes_per_device(state.params, shardings.params),
        "optimizer": bytes_per_device(state.opt_state, shardings.opt_state),
        "other state": bytes_per_device(rest, (shardings.step, shardings.rng, shardings.extra)),
        "batch": bytes_per_device(placed.batch, jax.tree.map(lambda x: x.sharding, placed.batch)),
        "gradients": bytes_per_device(moving, where),
    }


def left_whole(placed: Placed, least: int = 2**20) -> list[str]:
    """Paths of large arrays of the state that every device holds whole, though there are several."""
    if placed.mesh.size == 1:
        return []
    leaves = paths.flatten(placed.state)
    return [path for path, leaf in leaves.items() if n_bytes(leaf) >= least and leaf.sharding.is_fully_replicated]


def trace(topology: Topology, placed: Placed) -> Any:
    """The step as JAX's `Traced`, with the choices that the library makes on that platform."""
    whole = NamedSharding(placed.mesh, P())
    with flops.tracing_for(topology.chip.platform):
        jitted = jax.jit(
            constrained(placed.step, placed.mesh, placed.shardings),
            out_shardings=(placed.shardings, whole),
            donate_argnums=0,
        )
        return jitted.trace(placed.state, placed.batch)


def count(sketch: Sketch, topology: Topology, traced: Any) -> dict[str, Any]:
    """Operations of a step on all devices: what the model needs, and what this program does, more under remat."""
    # On a platform with no habits of its own attention is plain products, none left out.
    with flops.tracing_for("tpu" if topology.chip.platform == "tpu" else "plain"), flops.without_remat():
        state = abstract_state(sketch)
        needed = flops.count_flops(make_step(sketch), state, dict(sketch.batch))
    return {"model": needed.total(), "program": dict(flops.of_jaxpr(traced.jaxpr.jaxpr))}


def compile_step(topology: Topology, placed: Placed, traced: Any) -> dict[str, Any]:
    """Compiles the step and reads the program: memory, collectives, traffic.

    Returns:
      `seconds`, and either the compiler's own bytes a device (`arguments`, `outputs`, `temporaries`, `peak`, `host`)
      with `collectives` and `traffic`, or `refused`: why it did not compile, with `needed` bytes where it says so.
    """
    started = time.perf_counter()
    with flops.tracing_for(topology.chip.platform):
        lowered, options = traced.lower(), options_of(traced.jaxpr.jaxpr)
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        return {"seconds": time.perf_counter() - started, **_refused(str(error))}
    memory: Any = compiled.memory_analysis()
    read = program.parse(compiled.as_text() or "")
    return {
        "seconds": time.perf_counter() - started,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "host": memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes,
        "peak": _peak(topology, memory),
        "collectives": collectives.summary(collectives.collectives(read, placed.mesh.shape)),
        "traffic": program.traffic(read),
    }


def _peak(topology: Topology, memory: Any) -> int:
    """On a TPU the compiler's own. On a CPU or a GPU all temporaries are one block, taken whole."""
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    whole += memory.temp_size_in_bytes
    return memory.peak_memory_in_bytes if topology.chip.platform == "tpu" else whole


def _refused(message: str) -> dict[str, Any]:
    """What a compiler says that finds no room; its numbers, in GiB or MiB."""
    import re

    if "RESOURCE_EXHAUSTED" not in message:
        raise PlanError(f"the compiler refuses the step: {message.splitlines()[0][:300]}")
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    sizes = [int(float(n) * units[unit]) for n, unit in re.findall(r"([\d.]+)([KMGT])i?B?\b", message)]
    return {"refused": " ".join(message.split())[:400], "needed": sizes[0] if sizes else 0}
