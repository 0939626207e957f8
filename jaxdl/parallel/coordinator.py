"""Process 0's side of `watchdog.Link`: what it knows of the other processes, and how it answers them."""

import json
import socket
import time
from contextlib import suppress
from typing import Any


class Peer:
    """The other end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self.phase, self.heard = connection, "the start", time.monotonic()
        self.is_done = self.is_closed = False  # it has said goodbye; it is gone
        self._rest = b""
        connection.settimeout(5.0)

    def send(self, message: list[Any]) -> None:
        with suppress(OSError):  # what reads from it will say so
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[list[Any]] | None:
        """The messages that have come; None where there will be no more."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            data = b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None


class Coordinator:
    """What process 0 knows of the others, and how it answers them."""

    def __init__(self, link: Any) -> None:
        self._link = link
        self._arrived: dict[int, dict[int, tuple[str, Any]]] = {}
        self._deadlines: dict[int, float] = {}
        self._polls: dict[int, int] = {}
        self._stop_name: str | None = None
        self._done: set[int] = set()

    def hear(self, index: int, message: list[Any]) -> None:
        kind, *rest = message
        everyone = set(range(len(self._link.names)))
        if kind == "stop" and self._stop_name is None:
            self._stop_name = rest[0]
            self._link.down(["ask"])
        elif kind == "polls":
            self._polls[index] = rest[0]
            if self._polls.keys() == everyone:
                self._link.down(["sync", max(self._polls.values()), self._stop_name])
        elif kind == "at":
            self._arrive(index, *rest)
        elif kind in ("bye", "failed"):
            self._done.add(index)
            if index:
                self._link.peers[index].is_done = True
            if kind == "failed":
                self._link.down(["failed", f"{self._link.names[index]} failed: {rest[0]}"])
            elif self._done == everyone:
                self._link.down(["end"])

    def _arrive(self, index: int, number: int, name: str, value: Any, deadline_s: float) -> None:
        here = self._arrived.setdefault(number, {})
        here[index] = (name, value)
        self._deadlines.setdefault(number, time.monotonic() + deadline_s)
        if len({name for name, _ in here.values()}) > 1:
            listed = ", ".join(f"{self._link.names[i]} at {here[i][0]!r}" for i in sorted(here))
            self._answer(number, None, f"the processes do not run the same program: {listed}.")
        elif len(here) == len(self._link.names):
            self._answer(number, [here[i][1] for i in sorted(here)], None)

    def _answer(self, number: int, values: list[Any] | None, problem: str | None) -> None:
        self._deadlines.pop(number, None)
        self._arrived.pop(number, None)
        self._link.down(["all", number, values, problem])

    def check_deadlines(self) -> None:
        for number in [number for number, end in self._deadlines.items() if time.monotonic() > end]:
            here = self._arrived[number]
            name = next(iter(here.values()))[0]
            phases = {peer: state.phase for peer, state in self._link.peers.items()} | {0: self._link.phase}
            missing = [i for i in range(len(self._link.names)) if i not in here]
            listed = ", ".join(f"{self._link.names[i]} (in {phases[i]})" for i in missing)
            self._answer(number, None, f"{name}: {listed} did not come in time.")
