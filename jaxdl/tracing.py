"""A trace of some steps of a run, for TensorBoard, XProf or Perfetto."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

INPUT = "jaxdl: next batch"  # in a trace, what the loop does while it waits for a batch


@dataclass(frozen=True)
class Profile:
    """A trace for TensorBoard or Perfetto of the steps `start .. start + n_steps` of this process."""

    directory: Path
    start: int = 10
    n_steps: int = 10


class Tracer:
    """Starts and stops the profiler.

    Args:
      profile: what to trace; None traces nothing.
      note: is told where the trace lies.
    """

    def __init__(self, profile: Profile | None, note: Callable[[str], object]) -> None:
        self._profile, self._note = profile, note
        self._is_on = self._is_done = False

    def at(self, n_done: int, state: Any) -> None:
        """Before a call, `n_done` steps after the first: starts and stops at the first call at or after its steps."""
        if self._profile is None or self._is_done:
            return
        if not self._is_on and n_done >= self._profile.start:
            jax.profiler.start_trace(str(self._profile.directory))
            self._is_on = True
        elif self._is_on and n_done >= self._profile.start + self._profile.n_steps:
            self.stop(state)

    def stop(self, state: Any) -> None:
        """Ends a trace that is being taken, once `state` has been computed."""
        if self._profile is not None and self._is_on:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._is_on, self._is_done = False, True
            self._note(f"profiler trace written to {self._profile.directory}")
