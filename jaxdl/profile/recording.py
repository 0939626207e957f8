"""Runs a step some times without and some times with `jax.profiler`, and makes a profile of it."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdl.errors import JaxdlError
from jaxdl.plan.flops import of_jaxpr
from jaxdl.profile.folder import trace_folder
from jaxdl.profile.operations import Operation, read_operations
from jaxdl.profile.peaks import Peaks, peaks_of
from jaxdl.profile.result import StepProfile, counted, find, tables
from jaxdl.profile.timeline import shares
from jaxdl.profile.trace import ProfileError, Trace, read
from jaxdl.tracing import INPUT
from jaxdl.xla_options import compiler_options

WARM_UP = 3


class Recorder:
    """Counts calls: the first ones warm up, then as many are timed without a trace, then with one.

    Args:
      steps: to trace, at least 1.
      folder: for the trace.
      wait: returns when the device has done all.
      steps_per_call: of `repeat`.
      warm_up: calls before anything is timed.

    Attributes:
      n_calls: that make `steps` steps, or a few more.
      n_all_calls: after which `before_call` has said True.
      plain_s: seconds of a step without a trace.
    """

    def __init__(
        self,
        steps: int,
        folder: Path,
        wait: Callable[[], Any],
        *,
        steps_per_call: int = 1,
        warm_up: int = WARM_UP,
    ) -> None:
        self.n_calls, self.steps_per_call = -(-steps // steps_per_call), steps_per_call
        self.folder, self._wait, self._warm_up = folder, wait, warm_up
        self.n_all_calls = warm_up + 2 * self.n_calls + 2
        self.plain_s = 0.0
        self._n, self._start, self._is_tracing = 0, 0.0, False

    def before_call(self) -> bool:
        """To be asked before each call; whether the trace is complete and no further call is needed."""
        n, self._n = self._n, self._n + 1
        if n == self._warm_up:
            self._wait()
            self._start = time.perf_counter()
        elif n == self._warm_up + self.n_calls:
            self._wait()
            self.plain_s = (time.perf_counter() - self._start) / (self.n_calls * self.steps_per_call)
            start_trace(self.folder)
            self._is_tracing = True
        elif n == self.n_all_calls - 1:  # the first of these calls is measured to the start of the last
            self._wait()
            self.close()
            return True
        return False

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()


def start_trace(folder: Path) -> None:
    """As `jax.profiler.start_trace`, without an event for each Python call, which would slow the host down.

    Raises:
      ProfileError: another trace is under way, or the folder cannot be written.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    try:
        jax.profiler.start_trace(str(folder), profiler_options=options)
    except (RuntimeError, OSError) as error:
        raise ProfileError(f"a trace cannot be begun: {str(error).splitlines()[0]}.") from None


def waited(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches; the trace shows how long each was waited for."""
    try:
        while True:
            with jax.profiler.TraceAnnotation(INPUT):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch
    finally:
        if hasattr(batches, "close"):
            batches.close()


def profile_step(
    step_fn: Callable[..., Any],
    state: Any,
    batches: Iterable[Any],
    *,
    steps: int = 10,
    steps_per_call: int = 1,
    folder: str | Path | None = None,
    peaks: Peaks | None = None,
) -> StepProfile:
    """Shows where the time of a step goes: by kind, and the largest operations with what limits each.

    Runs the step 3 times to compile and warm up, `steps` times without and `steps + 1` times with `jax.profiler`.

    Args:
      step_fn: `(state, batch) -> (state, metrics)`, under `jax.jit` or not; of any module, jaxdl's or not. Where it
        donates the state, `state` is used up.
      state: the first argument.
      batches: as many as there are; used again and again. How long an iterator lets the loop wait is shown. Where
        devices share a batch, put it there.
      steps: to trace.
      steps_per_call: of `repeat`; leaves of a batch then have that many steps in front of rows.
      folder: keeps the trace; None removes it.
      peaks: of one device; None takes them from `peaks_of`.

    Raises:
      JaxdlError: steps < 1, no batches, a folder that is none of a profile or cannot be written.
      ProfileError: a step that fails, or a trace without operations.

    Example:
      >>> import jax.numpy as jnp
      >>> step = jax.jit(lambda w, x: (w - 0.1 * x.T @ (x @ w), {}))
      >>> told = profile_step(step, jnp.ones((8, 4)), [jnp.ones((16, 8))], steps=2, peaks=Peaks({"": 1e9}, 1e9, ""))
      >>> dict(told.flops), told.rows, told.kinds["products"] > 0
      ({'float32': 2048.0}, 16, True)
    """
    first, following = _checked(batches, steps, steps_per_call)
    with trace_folder(folder) as where, naming_failure():
        jitted: Any = step_fn
        if not hasattr(step_fn, "trace"):
            jitted = jax.jit(step_fn, compiler_options=compiler_options(step_fn, state, first))
        traced = jitted.trace(state, first)
        text = traced.lower().compile().as_text() or ""
        recorder = Recorder(steps, where, lambda: jax.block_until_ready(state), steps_per_call=steps_per_call)
        try:
            for batch in waited(following):
                if recorder.before_call():
                    break
                state = jitted(state, batch)[0]
            else:
                raise JaxdlError(f"the batches ended before {steps} steps were traced; give a list, or more of them.")
        finally:
            recorder.close()
        return make_profile(
            read(where),
            recorder,
            [text],
            devices=_devices(state),
            flops={name: n / steps_per_call for name, n in of_jaxpr(traced.jaxpr.jaxpr).items()},
            batch=jax.tree.map(lambda x: x[0], first) if steps_per_call > 1 else first,
            peaks=peaks,
            trace_kept=None if folder is None else str(where),
        )


def _checked(batches: Iterable[Any], steps: int, steps_per_call: int) -> tuple[Any, Iterator[Any]]:
    """The first batch, and all of them from the first one on."""
    counts = {"steps": steps, "steps_per_call": steps_per_call}
    problems = [f"{name}={n} must be at least 1." for name, n in counts.items() if n < 1]
    following = itertools.cycle(batches) if isinstance(batches, (list, tuple)) else iter(batches)
    first = next(following, None)
    if first is None:
        problems.append("there are no batches; give one at least.")
    if problems:
        raise JaxdlError.listing("profile", problems)
    return first, itertools.chain([first], following)


def _devices(tree: Any) -> list[Any]:
    """Those that hold any leaf; the first of all where none does."""
    found = {device for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array) for device in leaf.devices()}
    return sorted(found, key=lambda device: device.id) or jax.devices()[:1]


def make_profile(
    trace: Trace,
    recorder: Recorder,
    texts: Iterable[str],
    *,
    devices: list[Any],
    flops: Mapping[str, float] | None,
    batch: Any,
    peaks: Peaks | None = None,
    trace_kept: str | None = None,
    top: int = 15,
) -> StepProfile:
    """A profile of what was recorded.

    Args:
      trace: of the recorder's calls.
      recorder: after its last call.
      texts: of the compiled programs.
      devices: that took part.
      flops: of a step on all devices by dtype; None counts those of the operations.
      batch: of one step.
      peaks: of one device.
      trace_kept: the folder of the trace.
      top: rows of operations to show.
    """
    programs: dict[str, dict[str, Operation]] = dict(read_operations(text) for text in texts)
    peaks = peaks or peaks_of(devices[0], len(devices))
    divided = shares(trace, recorder.n_calls, lambda key: find(programs, key).is_container)
    kinds, parts, rows = tables(divided, programs, len(divided.usual) * recorder.steps_per_call, peaks)
    n_rows, n_tokens = sizes_of(batch)
    return StepProfile(
        device=devices[0].device_kind,
        n_devices=len(devices),
        steps=recorder.n_calls * recorder.steps_per_call,
        step_s=[time / recorder.steps_per_call / 1e9 for time in divided.calls],
        plain_s=recorder.plain_s,
        flops=counted(rows, len(devices)) if flops is None else flops,
        rows=n_rows,
        tokens=n_tokens,
        peaks=peaks,
        kinds=kinds,
        parts=parts,
        operations=rows,
        trace=trace_kept,
        top=top,
    )


def sizes_of(batch: Any) -> tuple[int | None, int | None]:
    """Rows and tokens of a batch: its first axis, and the size of what is called tokens."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    rows = next((shape[0] for shape in shapes if shape), None)
    tokens = batch.get("tokens") if isinstance(batch, Mapping) else None
    return rows, None if tokens is None else int(np.size(tokens))


@contextlib.contextmanager
def naming_failure() -> Iterator[None]:
    """What goes wrong while a step runs, as an error of the profile that says what it was."""
    try:
        yield
    except JaxdlError:
        raise
    except Exception as error:
        said = (str(error).strip() or "no reason given").splitlines()[0]
        raise ProfileError(f"the step failed: {type(error).__name__}: {said}") from error
