"""One step on any number of devices: meshes, sharding rules, runners."""

from jaxdl.parallel.exact import ExactStep, exact_step
from jaxdl.parallel.mesh import ShardingError, batch_shardings, make_mesh, parse_mesh, put_batch
from jaxdl.parallel.presets import REPLICATED, column_parallel, tensor_parallel, with_fsdp, zero
from jaxdl.parallel.processes import agree, exchange, initialize, is_first, led
from jaxdl.parallel.runners import jit_step, mapped, pmap_step, shard_map_step, unused_axes
from jaxdl.parallel.sharding import Fsdp, Split, bytes_per_device, constrained, fsdp, state_shardings
from jaxdl.parallel.watchdog import ProcessError

__all__ = [
    "REPLICATED",
    "ExactStep",
    "Fsdp",
    "ProcessError",
    "ShardingError",
    "Split",
    "agree",
    "batch_shardings",
    "bytes_per_device",
    "column_parallel",
    "constrained",
    "exact_step",
    "exchange",
    "fsdp",
    "initialize",
    "is_first",
    "jit_step",
    "led",
    "make_mesh",
    "mapped",
    "parse_mesh",
    "pmap_step",
    "put_batch",
    "shard_map_step",
    "state_shardings",
    "tensor_parallel",
    "unused_axes",
    "with_fsdp",
    "zero",
]
