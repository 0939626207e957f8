"""How the processes of a run find each other, and say within a deadline who is missing.

Before JAX's own service starts, process 0 listens at the coordinator address and every other process connects. The
connections stay: they are the watchdog's.
"""

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jaxdl.parallel.watchdog import ProcessError

HELLO = "jaxdl-process"
RETRY_S = 0.1


@dataclass(frozen=True)
class Place:
    """A process among others: the address of process 0, how many there are, which it is."""

    coordinator: str
    count: int
    index: int


def call_the_roll(place: Place, deadline_s: float) -> tuple[list[str], dict[int, socket.socket]]:
    """Connects all processes with process 0, on the port that JAX's own service takes over afterwards.

    Returns:
      What each process is called in messages, and this one's connections by the process at the other end.

    Raises:
      ProcessError: see `initialize`; every process gets the same message, process 0 sends it.
    """
    me = [HELLO, place.index, place.count, socket.gethostname(), os.getpid()]
    return _call(place, me, deadline_s) if place.index == 0 else _answer(place, me, deadline_s)


def _call(place: Place, me: list[Any], deadline_s: float) -> tuple[list[str], dict[int, socket.socket]]:
    end, here, sockets = time.monotonic() + deadline_s, {0: me}, dict[int, socket.socket]()
    problem = None
    with _listen(place.coordinator) as server:
        while len(here) < place.count and problem is None:
            server.settimeout(max(end - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = [i for i in range(place.count) if i not in here]
                problem = (
                    f"of {place.count} processes {', '.join(map(str, missing))} did not come within {deadline_s:g} s; "
                    f"here: {', '.join(_name(here[i]) for i in sorted(here))}. Look at their output, or raise "
                    "deadline_s."
                )
                continue
            hello = _receive(connection, min(5.0, max(end - time.monotonic(), 0.1)))
            if not isinstance(hello, list) or hello[:1] != [HELLO] or len(hello) != len(me):
                connection.close()  # a stranger
                continue
            problem = _refusal(hello, here, place.count)
            here.setdefault(hello[1], hello)
            sockets[hello[1] if problem is None else -1] = connection  # who is refused is told why
    names = [_name(here[i]) for i in range(place.count) if i in here]
    for connection in sockets.values():
        with suppress(OSError):  # the watchdog will tell
            _send(connection, {"names": names, "problem": problem})
    if problem is not None:
        for connection in sockets.values():
            connection.close()
        raise ProcessError(problem)
    return names, sockets


def _refusal(hello: list[Any], here: dict[int, list[Any]], count: int) -> str | None:
    if hello[2] != count:
        return f"{_name(hello)} was started with process_count={hello[2]}, process 0 with {count}; give all the same."
    if hello[1] in here:
        return f"two processes have process_index={hello[1]}: {_name(here[hello[1]])} and {_name(hello)}."
    return None


def _name(hello: list[Any]) -> str:
    return f"process {hello[1]} (host {hello[3]}, pid {hello[4]})"


def _listen(coordinator: str) -> socket.socket:
    """A listener that, unlike JAX's, does not share its port with one that is there."""
    host, _, port = coordinator.rpartition(":")
    is_local = host in ("localhost", "127.0.0.1")
    try:
        if is_local or not socket.has_dualstack_ipv6():
            return socket.create_server(("127.0.0.1" if is_local else "", int(port)))
        return socket.create_server(("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True)
    except OSError as error:
        raise ProcessError(
            f"process 0 cannot listen at the coordinator address {coordinator}: {error.strerror}. Is another run, or "
            "what is left of one, using the port? Choose another."
        ) from None


def _answer(place: Place, me: list[Any], deadline_s: float) -> tuple[list[str], dict[int, socket.socket]]:
    host, _, port = place.coordinator.rpartition(":")
    end, reason = time.monotonic() + deadline_s, ""
    while time.monotonic() < end:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=5.0)
            _send(connection, me)
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(RETRY_S)
            continue
        answer = _receive(connection, deadline_s + 5.0)
        if isinstance(answer, dict) and answer["problem"] is None:
            return answer["names"], {0: connection}
        connection.close()
        if isinstance(answer, dict):
            raise ProcessError(answer["problem"])
        reason = "what listens there is not process 0 of a jaxdl run"
        time.sleep(RETRY_S)
    raise ProcessError(
        f"process {place.index} did not find process 0 at {place.coordinator} within {deadline_s:g} s: {reason}. Is "
        "process 0 running, and its port open to this host?"
    )


def _send(connection: socket.socket, message: Any) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, timeout_s: float) -> Any:
    """One line of JSON; None where none comes. Nothing is read beyond it: what follows is the watchdog's."""
    connection.settimeout(timeout_s)
    line = b""
    with suppress(OSError, ValueError):
        while not line.endswith(b"\n") and len(line) < 1 << 20:
            byte = connection.recv(1)
            if not byte:
                return None
            line += byte
        return json.loads(line)
    return None
