"""What the processes of one run tell each other beside their arrays: signs of life, small values, when to stop.

Every process holds one connection to process 0. A process that dies closes it, one that hangs falls silent; process 0
tells the others, and each of them ends itself with a message and exit code 1, whatever its main thread waits for.
"""

import os
import selectors
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from jaxdl.errors import JaxdlError
from jaxdl.parallel.coordinator import Coordinator, Peer

EXIT_CODE = 1
LEAVE_S = 10.0  # that process 0, where JAX's own service runs, gives the others to be gone at the end
GRACE_S = 1.0  # for a process to say its own error when another fails with, most likely, the same


class ProcessError(JaxdlError):
    """Processes that do not find each other, do not agree, or are gone; the message names them."""

    exit_code = EXIT_CODE


def end_process(text: str) -> None:
    """Prints a message and ends this process at once, without waiting for any thread."""
    os.write(2, f"error: {text}\n".encode())
    flush = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), daemon=True)
    flush.start()
    flush.join(0.5)  # another thread may hold the stream for ever
    os._exit(EXIT_CODE)


class Link:
    """One process's end of the connections of a run, kept by a thread.

    Args:
      index: of this process.
      names: what messages call each process, such as `process 1 (host7, pid 99)`.
      sockets: `{index: connection}`; process 0 has one to each other process, those have one to process 0.
      heartbeat_s: a process that says nothing for so long is taken for dead.
      deadline_s: how long `exchange` waits for the last process.
      on_lost: called with a message, in the thread, when the run cannot go on.

    Example:
      >>> ours, theirs = socket.socketpair()
      >>> links = [Link(0, ["process 0", "process 1"], {1: ours}), Link(1, ["process 0", "process 1"], {0: theirs})]
      >>> threads = [threading.Thread(target=link.exchange, args=("ready", link.index)) for link in links]
      >>> links[1].request_stop("SIGTERM")
      >>> for thread in threads: thread.start()
      >>> for thread in threads: thread.join()
      >>> while links[0].poll() is None: time.sleep(0.01)
      >>> links[0].poll()
      'SIGTERM'
      >>> for link, end in zip(reversed(links), (theirs, ours)): link.close(wait_s=0.2); end.close()
    """

    def __init__(
        self,
        index: int,
        names: list[str],
        sockets: dict[int, socket.socket],
        *,
        heartbeat_s: float = 30.0,
        deadline_s: float = 300.0,
        on_lost: Callable[[str], Any] = end_process,
    ) -> None:
        self.index, self.names, self.phase = index, names, "the start"
        self.heartbeat_s, self._deadline_s, self._on_lost = heartbeat_s, deadline_s, on_lost
        self._head = Coordinator(self) if index == 0 else None
        self.peers = {peer: Peer(connection) for peer, connection in sockets.items()}
        self._changed = threading.Condition()
        self._posted: deque[list[Any]] = deque()
        self._answers: dict[int, tuple[list[Any] | None, str | None]] = {}
        self._n_exchanges = self._n_polls = 0
        self._is_asked, self._stop_name = False, ""
        self._stop_after: int | None = None
        self._is_closing = self._is_over = False
        self._leave_by: float | None = None
        self._wake_in, self._wake_out = os.pipe()
        for end in (self._wake_in, self._wake_out):
            os.set_blocking(end, False)
        self._thread = threading.Thread(target=self._run, name="jaxdl-watchdog", daemon=True)
        self._thread.start()

    # ---- for the main thread ----

    def exchange(self, name: str, value: Any = None, *, deadline_s: float | None = None) -> list[Any]:
        """Gives every process the values of all, in their order; all must come here, and so it is a barrier.

        Args:
          name: what messages call it; the same in all processes.
          value: JSON.
          deadline_s: between the first process that comes and the last; None is that of the link.

        Raises:
          ProcessError: a process did not come in time, or came to another exchange.
        """
        with self._changed:
            number = self._n_exchanges
            self._n_exchanges += 1
            self._post(["at", number, name, value, deadline_s or self._deadline_s])
            self._changed.wait_for(lambda: number in self._answers or self._is_over)
            values, problem = self._answers.pop(number, (None, f"{name}: the connection is closed."))
        if values is None:
            raise ProcessError(str(problem))
        return values

    def poll(self) -> str | None:
        """Whether the processes have agreed to stop: the same answer to the same call, counted from the start.

        Costs a lock (about a microsecond) until a process asks to stop; then it waits once for all to agree.
        """
        with self._changed:
            self._n_polls += 1
            if not self._is_asked:
                return None
            self._changed.wait_for(lambda: self._stop_after is not None or self._is_over)
            is_stopped = self._stop_after is not None and self._n_polls > self._stop_after
            return self._stop_name if is_stopped else None

    def request_stop(self, name: str) -> None:
        """Asks all processes to stop at one of the next polls; may be called by a signal handler."""
        self._post(["stop", name])

    def fail(self, text: str) -> None:
        """Tells the others that this process ends with an error."""
        self._post(["failed", text])
        self.close(wait_s=GRACE_S)

    def close(self, *, wait_s: float | None = None) -> None:
        """Says goodbye, and returns when all have; in process 0, when all others are gone.

        Args:
          wait_s: returns after so many seconds in any case; the deadline where None.
        """
        with self._changed:
            if self._is_closing:
                return
            self._is_closing = True
            self._post(["bye"])
            self._changed.wait_for(lambda: self._is_over, self._deadline_s if wait_s is None else wait_s)

    def _post(self, message: list[Any]) -> None:
        self._posted.append(message)
        with suppress(BlockingIOError):  # the pipe is full of wake-ups already
            os.write(self._wake_out, b"x")

    # ---- the thread ----

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_in, selectors.EVENT_READ)
            for index, peer in self.peers.items():
                selector.register(peer.socket, selectors.EVENT_READ, index)
            interval_s, next_beat = min(1.0, self.heartbeat_s / 5), 0.0
            while not self._is_over:
                for key, _ in selector.select(max(0.0, min(interval_s, next_beat - time.monotonic()))):
                    if key.data is None:
                        os.read(self._wake_in, 4096)
                    elif not self._read(key.data):
                        selector.unregister(key.fileobj)
                while self._posted:
                    self._up(self._posted.popleft())
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + interval_s
                    self._beat()
                self._end_last()

    def _read(self, index: int) -> bool:
        peer = self.peers[index]
        messages = peer.read()
        for message in messages or []:
            peer.heard = time.monotonic()
            if message[0] == "beat":
                peer.phase = message[1]
            elif self._head is not None:
                self._head.hear(index, message)
            else:
                self._receive(message)
        peer.is_closed = messages is None
        if peer.is_closed and not peer.is_done and not self._is_over:
            self._lose(index, "its connection closed")
        return not peer.is_closed

    def _beat(self) -> None:
        for index, peer in self.peers.items():
            peer.send(["beat", self.phase])
            silent_s = time.monotonic() - peer.heard
            if silent_s > self.heartbeat_s and not peer.is_done:
                self._lose(index, f"it has said nothing for {silent_s:.0f} s")
        if self._head is not None:
            self._head.check_deadlines()

    def _end_last(self) -> None:
        """After all goodbyes process 0 waits until the others have left."""
        is_late = self._leave_by is not None and time.monotonic() > self._leave_by
        if is_late or (self._leave_by is not None and all(peer.is_closed for peer in self.peers.values())):
            self._finish()

    def _finish(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _lose(self, index: int, how: str) -> None:
        peer = self.peers[index]
        age_s = time.monotonic() - peer.heard
        text = f"{self.names[index]} is gone: {how}. Its last word, {age_s:.1f} s before, came from {peer.phase}."
        if self._head is not None:
            self.down(["lost", text])
        else:
            self._receive(["lost", text])

    def _up(self, message: list[Any]) -> None:
        """To process 0."""
        if self._head is not None:
            self._head.hear(0, message)
        else:
            self.peers[0].send(message)

    def down(self, message: list[Any]) -> None:
        """From process 0 to all, this one last."""
        for peer in self.peers.values():
            peer.send(message)
        self._receive(message)

    def _receive(self, message: list[Any]) -> None:
        kind, *rest = message
        with self._changed:
            if kind == "ask":
                self._is_asked = True
                self._post(["polls", self._n_polls])
            elif kind == "sync":
                self._stop_after, self._stop_name = rest
            elif kind == "all":
                self._answers[rest[0]] = (rest[1], rest[2])
            elif kind == "end" and self._head is not None:
                self._leave_by = time.monotonic() + LEAVE_S
            elif kind == "end":
                self._is_over = True
            self._changed.notify_all()
        if kind in ("lost", "failed"):
            self._give_up(rest[0], GRACE_S if kind == "failed" else 0.0)

    def _give_up(self, text: str, grace_s: float) -> None:
        """Ends the process, unless it ends itself within the grace or is about to."""
        end = time.monotonic() + grace_s
        while time.monotonic() < end and not self._is_closing:
            time.sleep(0.02)
        if not self._is_closing:
            self._on_lost(
                f"{text} {self.names[self.index]} ends too, in {self.phase}. Start all processes again to go on from "
                "the last checkpoint."
            )
        self._finish()


_current: Link | None = None


def current() -> Link | None:
    """The link of this process; None where it is alone."""
    return _current


def use(link: Link | None) -> None:
    """Makes a link that of this process."""
    global _current
    _current = link


def enter(phase: str) -> None:
    """Says what this process does, for messages in the others, should it end."""
    if _current is not None:
        _current.phase = phase


def tell_failure(text: str) -> None:
    """Tells the other processes, where there are some, that this one ends with an error."""
    if _current is not None:
        _current.fail(text)
