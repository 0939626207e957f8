"""Measures competitors as `benchmarks.harness` does, within a given time.

All prepare at once (imports, weights), then compile one after the other, then work in turn, never two at a time.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import monotonic
from typing import Any

from benchmarks.harness import BenchmarkError, Child, Competitor, Result

LEAST_ROUNDS, MOST_ROUNDS = 3, 7
OUT_OF_TIME = "out of time"
MOST_OF_WHAT_IS_LEFT = 0.6  # for one competitor to compile, so that another that waits has its turn, ...
MOST_FOR_THE_LAST = 0.85  # ... and for the last one, so that there is time for rounds
GRACE_S = 5.0  # for a round that takes longer than those before, and to ask for the memory


def measure(
    competitors: Sequence[Competitor], deadline: float, note: Callable[[str], object], most_rounds: int = MOST_ROUNDS
) -> list[Result]:
    """Times the competitors until `deadline`, of `time.monotonic`, or through `most_rounds`.

    Returns:
      A result for each, in their order; one that failed, or was not through LEAST_ROUNDS rounds in time, says why.
      Rounds that not all went through are left out. The facts are those of `warm_up`, with `warm_up_s` and
      `peak_bytes`.
    """
    children = {competitor.name: Child(competitor) for competitor in competitors}
    facts: dict[str, dict[str, Any]] = {name: {} for name in children}
    seconds: dict[str, list[float]] = {name: [] for name in children}
    failures: dict[str, str] = {}

    def ask(name: str, work: Callable[[], Any], last: float = deadline + GRACE_S) -> Any:
        if name in failures:
            return None
        try:
            with _killed_at(last, children[name]):
                return work()
        except BenchmarkError as error:
            failures[name] = OUT_OF_TIME if monotonic() >= last else str(error)
            note(f"{name}: {failures[name]}")

    try:
        note(f"prepare: {', '.join(children)}")
        with ThreadPoolExecutor(len(children)) as pool:
            list(pool.map(lambda name: ask(name, children[name].set_up, deadline), children))
        for i, (name, child) in enumerate(children.items(), 1):
            started, share = monotonic(), MOST_FOR_THE_LAST if i == len(children) else MOST_OF_WHAT_IS_LEFT
            last = started + share * (deadline - started)
            facts[name] = ask(name, partial(child.call, "warm_up"), last) or {}
            facts[name]["warm_up_s"] = monotonic() - started
            note(f"{name}: compiled and warm after {facts[name]['warm_up_s']:.0f} s")
        _take_turns(competitors, children, seconds, failures, ask, deadline, most_rounds)
        for name, child in children.items():
            facts[name]["peak_bytes"] = ask(name, partial(child.call, "memory"))
    finally:
        for child in children.values():
            child.__exit__()
    n = min((len(taken) for name, taken in seconds.items() if name not in failures), default=0)
    late = {name: OUT_OF_TIME for name in children if name not in failures and n < min(LEAST_ROUNDS, most_rounds)}
    failures |= late
    return [
        Result(name, failure=failures[name], facts=facts[name])
        if name in failures
        else Result(name, tuple(seconds[name][:n]), facts[name])
        for name in children
    ]


def _take_turns(
    competitors: Sequence[Competitor],
    children: dict[str, Child],
    seconds: dict[str, list[float]],
    failures: dict[str, str],
    ask: Callable[..., Any],
    deadline: float,
    most_rounds: int,
) -> None:
    longest = 0.0
    for _ in range(most_rounds):
        started = monotonic()
        if started + longest > deadline or len(failures) == len(children):
            return
        for one in competitors:
            taken = ask(one.name, partial(children[one.name].call, "round", **one.arguments))
            if taken is not None:
                seconds[one.name].append(taken)
        longest = max(longest, monotonic() - started)


@contextlib.contextmanager
def _killed_at(last: float, child: Child) -> Iterator[None]:
    timer = threading.Timer(max(0.0, last - monotonic()), child.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
