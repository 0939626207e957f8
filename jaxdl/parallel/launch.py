"""Starts n processes of one program on this machine, as the processes of one run."""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO

from jaxdl.errors import JaxdlError
from jaxdl.parallel.processes import COORDINATOR, COUNT, INDEX

OWN_END_S = 3.0  # that the others are given to end by themselves after a failure: they say more than a signal would
KILL_AFTER_S = 10.0  # from SIGTERM to SIGKILL
POLL_S = 0.05


def launch(command: Sequence[str], n_processes: int, *, cpu_devices: int | None = None, port: int | None = None) -> int:
    """Runs a command n times over loopback, with what `parallel.initialize` needs in the environment.

    Output comes line by line, behind the number of its process. SIGTERM and Ctrl-C go on to all processes. When one
    fails, the others end: by themselves, else by SIGTERM, else by SIGKILL.

    Args:
      command: the program and its words.
      n_processes: how many, at least 1.
      cpu_devices: CPU devices of each process; None leaves the choice of devices to JAX.
      port: of the coordinator; a free one where None.

    Returns:
      The exit code of the process that failed first (128 + n where signal n ended it), 0 where all succeeded.

    Raises:
      JaxdlError: arguments that make no sense, a command that cannot be started.

    Example:
      >>> launch([sys.executable, "-c", "import os; print(os.environ['JAXDL_PROCESS_COUNT'])"], 1)
      [0] 1
      0
    """
    counts = {"n_processes": n_processes, "cpu_devices": 1 if cpu_devices is None else cpu_devices}
    problems = [f"{name}={n} must be at least 1." for name, n in counts.items() if n < 1]
    if not command:
        problems.append("there is no command; give it after --, as in jaxdl launch -n 2 -- python train.py.")
    if problems:
        raise JaxdlError.listing("launch", problems)
    address = f"127.0.0.1:{_free_port() if port is None else port}"
    processes: list[subprocess.Popen[str]] = []
    with _forwarded(processes):
        try:
            for index in range(n_processes):
                environment = {COORDINATOR: address, COUNT: str(n_processes), INDEX: str(index)}
                processes.append(_start(command, environment, cpu_devices))
            copies = [thread for index, process in enumerate(processes) for thread in _copies(index, process)]
            code = _wait(processes)
        finally:
            _end(processes)
    for thread in copies:
        thread.join(1.0)
    for process in processes:
        for stream in filter(None, (process.stdout, process.stderr)):
            stream.close()
    return code


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _start(command: Sequence[str], environment: dict[str, str], cpu_devices: int | None) -> "subprocess.Popen[str]":
    if cpu_devices is not None:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(cpu_devices)}
    try:
        return subprocess.Popen(
            command,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches it once, from here
        )
    except OSError as error:
        raise JaxdlError(f"cannot start {command[0]!r}: {error.strerror}.") from None


def _copies(index: int, process: "subprocess.Popen[str]") -> list[threading.Thread]:
    def copy(source: IO[str], target: IO[str]) -> None:
        for line in source:
            target.write(f"[{index}] {line.rstrip()}\n")
            target.flush()

    streams = [(process.stdout, sys.stdout), (process.stderr, sys.stderr)]
    threads = [threading.Thread(target=copy, args=pair, daemon=True) for pair in streams]
    for thread in threads:
        thread.start()
    return threads


@contextmanager
def _forwarded(processes: "list[subprocess.Popen[str]]") -> Iterator[None]:
    """Hands SIGTERM and Ctrl-C on, where this is the main thread."""

    def forward(number: int, frame: FrameType | None) -> None:
        _signal(processes, number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal(processes: "list[subprocess.Popen[str]]", number: int) -> None:
    for process in processes:
        if process.poll() is None and number == signal.SIGKILL:
            os.killpg(process.pid, number)  # with what it has started
        elif process.poll() is None:
            process.send_signal(number)


def _wait(processes: "list[subprocess.Popen[str]]") -> int:
    """Until all have ended or one has failed; the code of the first failure."""
    codes: queue.SimpleQueue[int] = queue.SimpleQueue()
    for process in processes:
        threading.Thread(target=lambda process=process: codes.put(process.wait()), daemon=True).start()
    for _ in processes:
        if code := codes.get():
            return code if code > 0 else 128 - code
    return 0


def _end(processes: "list[subprocess.Popen[str]]") -> None:
    for number, wait_s in ((None, OWN_END_S), (signal.SIGTERM, KILL_AFTER_S), (signal.SIGKILL, KILL_AFTER_S)):
        if number is not None:
            _signal(processes, number)
        end = time.monotonic() + wait_s
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            time.sleep(POLL_S)
