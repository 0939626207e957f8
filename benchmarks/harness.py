"""Measures competitors side by side: each in a process of its own, kept alive, and in a round only one at work.

A competitor is a class. Its constructor sets up and warms up; `round(**arguments)` does one timed round and returns the
seconds that one unit of work took, or a dict of them and of other figures of the round; `facts`, if there is one, is a
dict that JSON can hold (such as the first losses), read after the last round.
The rounds are interleaved, A B A B, so that a machine that gets slower gets slower for all.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
LONG = "torch.compile"  # in the names of competitors that take longest to set up, so that none has to wait for them


class BenchmarkError(Exception):
    """A competitor could not be measured, or two that should do the same work did not."""


@dataclass(frozen=True)
class Settings:
    """What the command line asks for.

    Attributes:
      rounds: timed rounds of each competitor.
      is_quick: short rounds, to try the benchmarks out; the figures mean little.
      note: is told what is going on.
      n_set_ups: competitors that are set up at a time. On a GPU one: compilers try out there what is fastest.
    """

    rounds: int = 7
    is_quick: bool = False
    note: Callable[[str], object] = lambda text: None
    n_set_ups: int = 1


@dataclass(frozen=True)
class Competitor:
    """What to measure.

    Attributes:
      name: how tables call it.
      target: `"module:Class"`.
      options: keywords of the class, as JSON can hold them.
      arguments: keywords of its `round`.
      environment: variables of the process, added to the parent's.
    """

    name: str
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What came out of it.

    Attributes:
      name: of the competitor.
      seconds: of one unit of work, one entry a round.
      facts: what the competitor told at the end.
      failure: why there are no figures, else None.
      rounds: what each round returned, where that was a dict; `seconds` are its "seconds".
    """

    name: str
    seconds: tuple[float, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    failure: str | None = None
    rounds: tuple[Mapping[str, float], ...] = ()

    @property
    def median_s(self) -> float:
        """Median of the rounds; infinite where it failed."""
        return math.inf if self.failure else statistics.median(self.seconds)

    def figures(self, name: str) -> list[float]:
        """One of the figures of each round.

        Example:
          >>> Result("a", (1.0,), rounds=({"seconds": 1.0, "stall_s": 0.25},)).figures("stall_s")
          [0.25]
        """
        return [figures[name] for figures in self.rounds]


class Spread(NamedTuple):
    """The middle and the ends of some numbers."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest.

    Example:
      >>> spread([3.0, 1.0, 2.0])
      Spread(median=2.0, low=1.0, high=3.0)
    """
    return Spread(statistics.median(values), min(values), max(values))


def speed_up(ours: Result, theirs: Result) -> Spread | None:
    """Throughput of `ours` over that of `theirs`, from rounds that ran one after the other; None if one failed.

    Example:
      >>> speed_up(Result("a", (1.0, 2.0)), Result("b", (2.0, 3.0)))
      Spread(median=1.75, low=1.5, high=2.0)
    """
    if ours.failure or theirs.failure:
        return None
    return spread([b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)])


def fastest(results: Sequence[Result]) -> Result:
    """The one with the smallest median; a failed one only where all failed."""
    return min(results, key=lambda result: result.median_s)


def check_same_losses(results: Sequence[Result], tolerance: float) -> float:
    """Asserts that all that ran told the same `first_losses`, and returns the largest relative difference.

    Raises:
      BenchmarkError: they differ by more than `tolerance`, relative to the first competitor's.
    """
    told = {result.name: result.facts["first_losses"] for result in results if not result.failure}
    reference: Sequence[float] = next(iter(told.values()), [])
    furthest = 0.0
    for name, losses in told.items():
        pairs = zip(losses, reference, strict=True)
        difference = max((abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in pairs), default=0.0)
        furthest = max(furthest, difference)
        if not difference <= tolerance:
            raise BenchmarkError(
                f"{name} does other maths than {next(iter(told))}: first losses {losses} and {reference}, "
                f"relative difference {difference:.1e}, allowed {tolerance:.0e}."
            )
    return furthest


class Child:
    """A competitor in its own process; use it as a context manager.

    Raises:
      BenchmarkError: from `call`, what went wrong in the child, in one line.
    """

    def __init__(self, competitor: Competitor) -> None:
        self._competitor = competitor
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
        # Several processes share one GPU: none may take all of its memory.
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **competitor.environment}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def set_up(self) -> None:
        """Makes the competitor in the child."""
        self._ask({"call": "set_up", "target": self._competitor.target, "arguments": self._competitor.options})

    def facts(self) -> Any:
        """What the competitor in the child tells of itself."""
        return self._ask({"call": "facts"})

    def call(self, method: str, **arguments: Any) -> Any:
        """Calls a method in the child and returns what it returned."""
        return self._ask({"call": method, "arguments": arguments})

    def kill(self) -> None:
        """Ends the process at once; a call under way raises."""
        self._process.kill()

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise BenchmarkError(self._last_words()) from None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise BenchmarkError(answer["error"])
        return answer["ok"]

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["it said nothing"]
        return f"the process ended with {code}: {lines[-1]}"

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=20)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def measure(competitors: Sequence[Competitor], settings: Settings) -> list[Result]:
    """Sets all competitors up and then times them in turn, one at a time.

    Returns:
      A result for each competitor, in their order; one that failed says why and the others go on.
    """
    children = {competitor.name: Child(competitor) for competitor in competitors}
    told: dict[str, list[Any]] = {name: [] for name in children}
    failures: dict[str, str] = {}

    def attempt(name: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except BenchmarkError as error:
            settings.note(f"{name}: {error}")
            failures[name] = str(error)

    def set_up(name: str, child: Child) -> None:
        start = time.perf_counter()
        attempt(name, child.set_up)
        settings.note(f"set up in {time.perf_counter() - start:.1f} s: {name}")

    try:
        with ThreadPoolExecutor(settings.n_set_ups) as pool:
            slow_first = sorted(children, key=lambda name: LONG not in name)
            list(pool.map(set_up, slow_first, map(children.__getitem__, slow_first)))
        for i in range(settings.rounds):
            settings.note(f"round {i + 1} of {settings.rounds}")
            for competitor in competitors:
                if competitor.name not in failures:
                    _time(competitor, children[competitor.name], told[competitor.name], attempt)
        facts = {name: attempt(name, child.facts) for name, child in children.items() if name not in failures}
    finally:
        for child in children.values():
            child.__exit__()
    return [
        Result(name, failure=failures[name]) if name in failures else _to_result(name, told[name], facts[name])
        for name in children
    ]


def _time(competitor: Competitor, child: Child, told: list[Any], attempt: Any) -> None:
    taken = attempt(competitor.name, lambda: child.call("round", **competitor.arguments))
    if taken is not None:
        told.append(taken)


def _to_result(name: str, told: Sequence[Any], facts: Mapping[str, Any]) -> Result:
    rounds = tuple(figures for figures in told if isinstance(figures, dict))
    return Result(name, tuple(figures["seconds"] for figures in rounds) or tuple(told), facts, rounds=rounds)
