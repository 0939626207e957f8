"""`jaxdl plan`: each compile in a process of its own, with a limit of time; then a page of tables and a verdict."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxdl.config.flags import split_flags
from jaxdl.errors import JaxdlError
from jaxdl.plan import text
from jaxdl.plan.topology import Topology, TopologyError, environment, missing, parse_topology

TIME_LIMIT_S = 900.0


class ChildFailed(JaxdlError):
    """The process that compiles ran out of time or died."""

    exit_code = 1


def run(words: Sequence[str]) -> int:
    """Runs `jaxdl plan`.

    Args:
      words: after `plan`.

    Returns:
      0 where the step fits, 1 where it does not.

    Raises:
      JaxdlError: what the user gave does not fit, or a compile that failed.
    """
    options, rest = _parser().parse_known_args(words)
    topology = parse_topology(options.topology)
    if told := missing(topology):
        raise TopologyError(told)
    deadline = time.monotonic() + options.time_limit
    result = compile_apart(rest, topology, options.time_limit)
    print(text.page(result, max_rows=options.rows or None), flush=True)
    code = 0
    if not text.fits(result):
        code = 1
        result["tried"] = [] if options.no_remedies else try_remedies(result, rest, topology, deadline)
        print(text.remedies(result), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxdl plan",
        description="Says what a run would do on devices that are not here: every error, every parameter, memory, "
        "operations and messages of a step, compiled for them. Exit code 0: it fits, 1: it does not, 2: refused.",
        epilog="All other flags are those of the experiment: --config=FILE, --config.section.field=value.",
        allow_abbrev=False,
    )
    parser.add_argument("--topology", default="cpu:1", help="cpu:8, h100:8, v5e:16x16, v5p-128, v6e-256; default cpu:1")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON, too")
    parser.add_argument("--rows", type=int, default=40, help="at most so many parameters in the table; 0 for all")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, help="seconds for all compiles together")
    parser.add_argument("--no-remedies", action="store_true", help="where it does not fit, try nothing else")
    return parser


def compile_apart(words: Sequence[str], topology: Topology, seconds: float) -> dict[str, Any]:
    """What `child.plan` finds in a process of its own.

    Raises:
      JaxdlError: what it raised, or that it ran out of time or died.
    """
    with tempfile.TemporaryDirectory(prefix="jaxdl-plan-") as folder:
        request, target, errors = (Path(folder) / name for name in ("request.json", "result.json", "errors.txt"))
        request.write_text(json.dumps({"words": list(words), "topology": topology.name}))
        command = [sys.executable, "-m", "jaxdl.plan.child", str(request), str(target)]
        with errors.open("wb") as sink:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env={**os.environ, **environment(topology)},
                start_new_session=True,
            )
            how = _wait(process, seconds)
        result = json.loads(target.read_text()) if target.exists() else {}
        if "error" in result:
            error = JaxdlError(result["error"])
            error.exit_code = result["exit_code"]
            raise error
        if how is not None or "seconds" not in result:
            last = errors.read_text(errors="replace").strip().splitlines()[-1:]
            where = "while it compiled the step" if result else "before it compiled anything"
            raise ChildFailed(f"the plan for {topology.name} ended {where}: {how or ' '.join(last) or 'no reason'}.")
        return dict(result)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> str | None:
    try:
        code = process.wait(timeout=max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        return f"{seconds:.0f} s were not enough; give more with --time-limit"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}; it may lack memory"
    return None


def try_remedies(
    result: dict[str, Any], words: Sequence[str], topology: Topology, deadline: float
) -> list[dict[str, Any]]:
    """Compiles each remedy, and then the best together until it fits; the one that saves most first."""
    tried: list[dict[str, Any]] = []
    for remedy in result["remedies"]:
        one = _try(remedy["what"], remedy["flags"], words, topology, deadline)
        if one is not None:
            tried.append(one)
    tried.sort(key=lambda one: one["peak"] or float("inf"))
    together: list[dict[str, Any]] = []
    if not any(one["fits"] for one in tried):
        before = text.peak(result) or float("inf")
        for one in tried:
            if one["peak"] and one["peak"] < before:
                together.append(one)
            if len(together) > 1:
                flags = [flag for part in together for flag in part["flags"]]
                both = _try(" and ".join(part["what"] for part in together), flags, words, topology, deadline)
                if both is not None:
                    tried.append(both)
                    if both["fits"]:
                        break
    return tried


def _try(
    what: str, flags: Sequence[str], words: Sequence[str], topology: Topology, deadline: float
) -> dict[str, Any] | None:
    left = deadline - time.monotonic()
    if left <= 0:
        return None
    print(f"trying {what} ...", file=sys.stderr, flush=True)
    changed = {flag.name for flag in split_flags(flags)[0]}
    given = [flag for flag in split_flags(words)[0] if flag.name not in changed]
    kept = [
        word
        for flag in given
        for word in ([f"{flag.written}={flag.words[0]}"] if len(flag.words) == 1 else [flag.written, *flag.words])
    ]
    try:
        found = compile_apart([*kept, *flags], topology, left)
    except JaxdlError:
        return None
    return {"what": what, "flags": list(flags), "peak": text.peak(found), "fits": text.fits(found)}
