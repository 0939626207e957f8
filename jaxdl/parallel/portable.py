"""A program that was compiled for one device, as the same machine code on another: compiled once, equal everywhere."""

import io
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable


def move(executable: jax.stages.Compiled, device: Any) -> jax.stages.Compiled | None:
    """Loads a compiled program of one device on another device of the same kind.

    JAX has no public way: what it writes and reads again is asked here to read for another device.

    Args:
      executable: from `jax.jit(fn).lower(...).compile()`, for a single device. Not one that came from the compile
        cache: XLA loses functions of what it writes a second time.
      device: of this process.

    Returns:
      A program that takes and returns arrays on `device`, or None where this JAX cannot: compile again then.

    Example:
      >>> import os, jax.numpy as jnp
      >>> add = jax.jit(lambda x: x + os.getpid()).lower(jnp.ones(2)).compile()  # in no cache
      >>> move(add, jax.devices()[1])(jax.device_put(jnp.ones(2), jax.devices()[1])).device
      CpuDevice(id=1)
    """
    try:
        written, in_tree, out_tree = serialize_executable.serialize(executable)
        unloaded, info, no_kwargs = _Reader(written, device).load()
        return jax.stages.Compiled(unloaded.load(), [], in_tree.unflatten(info), out_tree, no_kwargs=no_kwargs)
    except (AttributeError, ImportError, KeyError, NotImplementedError, TypeError, ValueError, RuntimeError):
        return None


class _Reader(serialize_executable._JaxPjrtUnpickler):
    """Reads every device as this one."""

    def __init__(self, written: bytes, device: Any) -> None:
        super().__init__(io.BytesIO(written), device.client, [device])
        self._device = device

    def persistent_load(self, pid: tuple[Any, ...]) -> Any:
        if pid[0] == "device":
            return self._device
        if pid[0] != "exec":
            return super().persistent_load(pid)
        from jax._src.compiler import get_compile_options

        options = get_compile_options(1, 1, device_assignment=np.array([[self._device.id]]))
        return self.backend.deserialize_executable(pid[1], self.execution_devices, options)
