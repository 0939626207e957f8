"""Many processes, one run: how they find each other, and what they do together.

`initialize` comes first. Then `jax.devices()` are those of all processes, and the same program runs in each of them.
"""

import atexit
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

import jax

from jaxdl.errors import JaxdlError
from jaxdl.parallel import watchdog
from jaxdl.parallel.roll_call import Place, call_the_roll
from jaxdl.parallel.watchdog import Link, ProcessError

COORDINATOR, COUNT, INDEX = "JAXDL_COORDINATOR", "JAXDL_PROCESS_COUNT", "JAXDL_PROCESS_INDEX"
VERDICT_S = 3.0  # what the watchdog is given to name a dead process before JAX's own error is shown

Result = TypeVar("Result")
_handlers: list[Any] = []  # what C calls must stay


def initialize(
    coordinator: str | None = None,
    process_count: int | None = None,
    process_index: int | None = None,
    *,
    deadline_s: float = 300.0,
    heartbeat_s: float = 30.0,
) -> bool:
    """Joins the processes of a run; call it in each of them before anything touches JAX's devices.

    What is None comes from `JAXDL_COORDINATOR`, `JAXDL_PROCESS_COUNT` and `JAXDL_PROCESS_INDEX`, which `jaxdl launch`
    sets, else from what JAX finds on Cloud TPU, SLURM, Open MPI and Kubernetes. A single process needs nothing and
    gets nothing.

    From then on a watchdog ends every process with exit code 1 and a message that names the one that died (at once) or
    hangs (after `heartbeat_s`), and what it was last doing.

    Args:
      coordinator: `host:port` of process 0, reachable from all; the port must be free there.
      process_count: how many processes there are.
      process_index: which one this is, from 0.
      deadline_s: how long the processes wait for each other, at the start and at later meetings.
      heartbeat_s: a process that is silent for so long is taken for dead.

    Returns:
      Whether there are several processes.

    Raises:
      ProcessError: settings that make no sense; a process that did not come in time, by number; a coordinator address
        that is taken or does not answer; two processes with one number.

    Example:
      >>> initialize()
      False
    """
    if watchdog.current() is not None:
        return True
    place = find_place(coordinator, process_count, process_index, deadline_s=deadline_s)
    _check_times(deadline_s, heartbeat_s)
    if place is None or place.count == 1:
        return False
    names, sockets = call_the_roll(place, deadline_s)
    watchdog.use(Link(place.index, names, sockets, heartbeat_s=heartbeat_s, deadline_s=deadline_s))
    atexit.register(_leave)
    _abort_late()
    _join_jax(place, deadline_s, heartbeat_s)
    sys.excepthook = _Patient(sys.excepthook)
    return True


def _check_times(deadline_s: float, heartbeat_s: float) -> None:
    times = {"deadline_s": deadline_s, "heartbeat_s": heartbeat_s}
    problems = [f"{name}={value} must be at least 1 second." for name, value in times.items() if value < 1]
    if problems:
        raise ProcessError.listing("processes", problems)


def find_place(
    coordinator: str | None, process_count: int | None, process_index: int | None, *, deadline_s: float = 300.0
) -> Place | None:
    """Which process this is, from arguments, the environment or the cluster; None where nothing says so.

    Raises:
      ProcessError: see `initialize`.

    Example:
      >>> find_place("10.0.0.1:1234", 4, 2)
      Place(coordinator='10.0.0.1:1234', count=4, index=2)
      >>> find_place(None, 4, 2)
      Traceback (most recent call last):
      jaxdl.parallel.watchdog.ProcessError: processes: 1 problem(s)
        - coordinator is missing; give coordinator, process_count and process_index, all three, or none.
    """
    given = {"coordinator": coordinator, "process_count": process_count, "process_index": process_index}
    if all(value is None for value in given.values()):
        given = dict(zip(given, map(os.environ.get, (COORDINATOR, COUNT, INDEX)), strict=True))
    if all(value is None for value in given.values()):
        given = dict(zip(given, _of_cluster(deadline_s), strict=True))
    if all(value is None for value in given.values()):
        return None
    problems = [
        f"{name} is missing; give coordinator, process_count and process_index, all three, or none."
        for name, value in given.items()
        if value is None
    ]
    if not problems:
        problems = _place_problems(**given)
    if problems:
        raise ProcessError.listing("processes", problems)
    return Place(str(given["coordinator"]), int(given["process_count"] or 0), int(given["process_index"] or 0))


def _of_cluster(deadline_s: float) -> tuple[Any, Any, Any]:
    """What JAX finds; it has no public function that tells without joining."""
    from jax._src.clusters import ClusterEnv

    marks = ("JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
    if "KUBERNETES_SERVICE_HOST" in os.environ and not any(mark in os.environ for mark in marks):
        return None, None, None  # a pod that belongs to no indexed job is alone; JAX would refuse it
    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(deadline_s))
    return found[0], found[1], found[2]


def _place_problems(coordinator: Any, process_count: Any, process_index: Any) -> list[str]:
    problems = []
    host, _, port = str(coordinator).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        problems.append(f"coordinator={coordinator!r} is not of the form host:port.")
    counts = {"process_count": process_count, "process_index": process_index}
    wrong = [f"{name}={value!r} is not a number." for name, value in counts.items() if not str(value).isdecimal()]
    if not wrong and not 0 <= int(process_index) < int(process_count):
        wrong = [f"process_index={process_index} must lie in 0 .. {int(process_count) - 1} (process_count - 1)."]
    return problems + wrong


# ---- JAX's own service, and the end ----


def _join_jax(place: Place, deadline_s: float, heartbeat_s: float) -> None:
    jax.config.update("jax_enable_recoverability", True)  # a dead process is an error in the others, not an abort
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `signals.StopFlag`
    host, _, port = place.coordinator.rpartition(":")
    is_told = os.environ.get(COORDINATOR) == place.coordinator
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            cluster_detection_method="deactivate" if is_told else None,
            coordinator_bind_address=f"127.0.0.1:{port}" if host in ("localhost", "127.0.0.1") else None,
            initialization_timeout=int(deadline_s) + 1,
            heartbeat_timeout_seconds=int(2 * heartbeat_s) + 10,  # the watchdog, which names, comes first
            shutdown_timeout_seconds=10,
        )
    except RuntimeError as error:
        raise ProcessError(f"process {place.index} could not join JAX's service: {error}") from None


def _leave() -> None:
    """At exit: all processes wait for each other, so that none takes the end of another for a death."""
    link, error = watchdog.current(), getattr(sys, "last_value", None)
    if link is not None:
        if error is None:
            watchdog.enter("the end")
            link.close()
        else:
            link.fail(f"{type(error).__name__}: {error}"[:300])


def _abort_late() -> None:
    """When process 0 dies, JAX's client aborts the others within milliseconds; the watchdog is to be first.

    JAX takes no other answer: it cannot call a Python function with the error it found.
    """
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: time.sleep(VERDICT_S))
    with suppress(OSError, TypeError, AttributeError):  # a system without such a C library aborts at once
        ctypes.CDLL(None).signal(signal.SIGABRT, handler)
        _handlers.append(handler)


class _Patient:
    """An `excepthook` that lets the watchdog name a dead process before the error that it caused in JAX is shown."""

    def __init__(self, before: Callable[..., Any]) -> None:
        self._before = before

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(VERDICT_S)
        self._before(kind, error, trace)


# ---- together ----


def is_first() -> bool:
    """Whether this process is the one that writes: the first of `jax.process_index()`, or the only one.

    Example:
      >>> is_first()
      True
    """
    return jax.process_index() == 0


def exchange(name: str, value: Any = None, *, deadline_s: float | None = None) -> list[Any]:
    """The values of all processes, in their order; a barrier too.

    Args:
      name: what messages call this meeting.
      value: JSON.
      deadline_s: see `watchdog.Link.exchange`.

    Raises:
      ProcessError: a process did not come in time, by name.

    Example:
      >>> exchange("seeds", 7)
      [7]
    """
    link = watchdog.current()
    return [value] if link is None else link.exchange(name, value, deadline_s=deadline_s)


def agree(name: str, value: Any, remedy: str) -> None:
    """Refuses to go on where the processes have different values.

    Raises:
      ProcessError: the values, by process.

    Example:
      >>> agree("the seed", 7, "give all the same.")
    """
    values = exchange(name, value)
    if any(other != value for other in values):
        listed = ", ".join(f"process {i}: {other}" for i, other in enumerate(values))
        raise ProcessError(f"{name} differs between processes ({listed}); {remedy}")


def led(
    name: str,
    call: Callable[[], Result],
    *,
    error: type[JaxdlError] = ProcessError,
    deadline_s: float | None = None,
) -> Result | None:
    """Runs something in process 0 alone; where it raises a `JaxdlError` there, all processes raise.

    Args:
      name: what messages call this meeting.
      call: writes, say; process 0 gets what it returns.
      error: what the other processes raise, with the message of process 0.
      deadline_s: see `watchdog.Link.exchange`.

    Example:
      >>> led("the sum", lambda: 1 + 1)
      2
    """
    if watchdog.current() is None:
        return call()
    if not is_first():
        problems = [problem for problem in exchange(name, deadline_s=deadline_s) if problem is not None]
        if problems:
            raise error(problems[0])
        return None
    try:
        result = call()
    except JaxdlError as problem:
        exchange(name, str(problem), deadline_s=deadline_s)
        raise
    exchange(name, deadline_s=deadline_s)
    return result
