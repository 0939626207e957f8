"""Compiling once, knowing what it cost, and refusing to do it twice by accident."""

import contextlib
import copy
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxdl.errors import JaxdlError
from jaxdl.paths import flatten
from jaxdl.xla_options import options_of

_HITS, _MISSES = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"
_counts = {_HITS: 0, _MISSES: 0}


class RetraceError(JaxdlError):
    """A compiled function was called with arguments of another shape, dtype, weak type, structure or sharding."""


def enable_compile_cache(directory: str | Path | None = None) -> Path:
    """Keeps compiled programs on disk, so that the second start of a program does not compile.

    That includes what `jax.jit` compiles, yours or that of a runner such as `jit_step`. On a CPU that shows itself as
    several devices make the first call under `unkept`: jaxlib 0.10.2 may run collectives that it reads back in an order
    that makes the devices wait for ever.

    Args:
      directory: where; `$JAX_COMPILATION_CACHE_DIR` or `~/.cache/jaxdl/xla` where None.

    Returns:
      The directory in use.

    Example:
      >>> enable_compile_cache("/tmp/jaxdl_doctest_cache").name
      'jaxdl_doctest_cache'
    """
    default = os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path.home() / ".cache" / "jaxdl" / "xla"
    path = Path(directory or default)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


def _count(event: str, **_: Any) -> None:
    if event in _counts:
        _counts[event] += 1


jax.monitoring.register_event_listener(_count)


class Compiled:
    """A function that is compiled at its first call and never again.

    Args:
      fn: a pure function of trees of arrays.
      donate_argnums: arguments whose buffers the result may reuse.
      name: how messages call it.
      compiler_options: XLA's, as of `jax.jit`; those of `xla_options.compiler_options` where None.
      is_kept: whether the compile cache may keep the program; one that came from there cannot be `moved`. One over
        several devices of a CPU is not kept, see `compile`.

    Attributes:
      compile_s: seconds of tracing and compiling, None before the first call.
      is_cached: whether the program came from the compile cache on disk.

    Example:
      >>> import jax.numpy as jnp
      >>> double = Compiled(lambda x: 2 * x, name="double")
      >>> double(jnp.ones(2)).tolist()
      [2.0, 2.0]
      >>> double(jnp.ones(3))
      Traceback (most recent call last):
      jaxdl.compilation.RetraceError: double: 1 problem(s)
        - argument 0 was float32[2] and is now float32[3]
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        donate_argnums: tuple[int, ...] = (),
        name: str = "step",
        compiler_options: dict[str, Any] | None = None,
        is_kept: bool = True,
    ) -> None:
        self._jitted = jax.jit(fn, donate_argnums=donate_argnums)
        self._options = compiler_options
        self._is_kept = is_kept
        self._executable: Any = None
        self._signature: dict[str, str] = {}
        self.name = name
        self.compile_s: float | None = None
        self.is_cached = False

    def compile(self, *args: Any) -> None:
        """Compiles for the shapes of these arguments (arrays or `jax.ShapeDtypeStruct`s) without running.

        A program over several devices of a CPU is never kept: what XLA reads back from the cache may run collectives in
        another order on each device, which then wait for each other until XLA ends the process.
        """
        start, self._signature = time.perf_counter(), _signature(args)
        traced = self._jitted.trace(*args)
        options = options_of(traced.jaxpr.jaxpr) if self._options is None else self._options
        hits, misses = _counts[_HITS], _counts[_MISSES]
        is_kept = self._is_kept and not _is_over_cpus(args)
        with contextlib.nullcontext() if is_kept else unkept():
            self._executable = traced.lower().compile(compiler_options=options)
        self.compile_s = time.perf_counter() - start
        self.is_cached = _counts[_HITS] > hits and _counts[_MISSES] == misses

    @property
    def jitted(self) -> Any:
        """The function under `jax.jit`, without the compiler's options."""
        return self._jitted

    @property
    def executable(self) -> Any:
        """JAX's compiled program, None before the first call."""
        return self._executable

    def moved(self, device: Any) -> "Compiled | None":
        """The same machine code on another device, see `parallel.portable`; None where that cannot be."""
        from jaxdl.parallel.portable import move

        executable = None if self.is_cached else move(self._executable, device)
        if executable is None:
            return None
        other = copy.copy(self)
        other._executable, other.compile_s = executable, 0.0
        return other

    def __call__(self, *args: Any) -> Any:
        if self._executable is None:
            self.compile(*args)
        try:
            return self._executable(*args)
        except (TypeError, ValueError) as error:
            changed = _changes(self._signature, _signature(args))
            if not changed:
                raise
            raise RetraceError.listing(self.name, changed) from error


@contextlib.contextmanager
def unkept() -> Iterator[None]:
    """What is compiled meanwhile does not go to the compile cache on disk.

    Example:
      >>> with unkept():
      ...     double = jax.jit(lambda x: 2 * x).lower(1.0).compile()
    """
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def _is_over_cpus(args: tuple[Any, ...]) -> bool:
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(args)]
    over = (sharding.device_set for sharding in shardings if sharding is not None)
    return any(len(devices) > 1 and next(iter(devices)).platform == "cpu" for devices in over)


def _signature(args: tuple[Any, ...]) -> dict[str, str]:
    flat = flatten({f"argument {i}": arg for i, arg in enumerate(args)})
    return {path: _describe(leaf) for path, leaf in flat.items()}


def _describe(leaf: Any) -> str:
    if not hasattr(leaf, "dtype"):
        return f"the Python {type(leaf).__name__} {leaf!r}"
    weak = " (weak)" if getattr(leaf, "weak_type", False) else ""
    sharding = getattr(leaf, "sharding", None)
    over = "" if sharding is None or len(sharding.device_set) == 1 else f" sharded {sharding}"
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]{weak}{over}"


def _changes(old: dict[str, str], new: dict[str, str]) -> list[str]:
    gone = [f"{path} ({old[path]}) is missing now" for path in old.keys() - new.keys()]
    added = [f"{path} ({new[path]}) is new" for path in new.keys() - old.keys()]
    both = [path for path in old if path in new and old[path] != new[path]]
    return sorted(gone) + sorted(added) + [f"{path} was {old[path]} and is now {new[path]}" for path in both]
