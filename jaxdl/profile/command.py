"""`jaxdl profile`: an experiment as it is run, stopped after a few steps, and the tables of where their time went."""

import argparse
import contextlib
import dataclasses
import importlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxdl.command import run_command
from jaxdl.compilation import Compiled
from jaxdl.config import ConfigError, Parsed
from jaxdl.config.files import config_type_of
from jaxdl.config.flags import split_flags
from jaxdl.loop import Loop, intercepted
from jaxdl.parallel.exact import ExactStep
from jaxdl.paths import nearest
from jaxdl.plan.flops import of_jaxpr
from jaxdl.profile.folder import claim_folder
from jaxdl.profile.recording import Recorder, make_profile, naming_failure
from jaxdl.profile.result import StepProfile
from jaxdl.profile.trace import ProfileError, read
from jaxdl.tracing import Tracer


class Profiled(Exception):
    """Ends an experiment whose profile is taken."""

    def __init__(self, profile: StepProfile) -> None:
        super().__init__("profiled")
        self.profile = profile


def run(words: Sequence[str]) -> int:
    """Runs `jaxdl profile`.

    Args:
      words: after `profile`.

    Returns:
      0 where a profile was taken; 1 where the step failed or the trace shows nothing, 2 where something was refused.

    Raises:
      JaxdlError: what the user gave does not fit.
    """
    options, rest = _parser().parse_known_args(words)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it: config files import their experiment
    problems = [f"--{name} {n} must be at least 1." for name, n in _counts(options) if n < 1]
    experiment, kind = find_experiment(options.module, rest, problems)
    folder = claim_folder(Path(options.folder or _default_folder(rest)))
    taken: list[StepProfile] = []

    def profiled(parsed: Parsed) -> None:
        with tempfile.TemporaryDirectory(prefix="jaxdl-profile-") as out:
            taken.append(profile_experiment(experiment, with_out(parsed, out), options.steps, folder))

    code = run_command(kind, profiled, rest, prog="jaxdl profile")
    if taken:
        shown = dataclasses.replace(taken[0], top=options.top)
        print(shown, flush=True)
        for file in [folder / "profile.json", *([Path(options.json)] if options.json else [])]:
            file.write_text(shown.to_json() + "\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxdl profile",
        description="Runs an experiment for a few steps with jax.profiler and shows where the time of a step goes: by "
        "kind of operation, the host and waiting for input among them, and the largest operations with what limits "
        "each. Nothing of the experiment's run folder is touched. Exit code 0: done, 1: the step failed, 2: refused.",
        epilog="All other flags are those of the experiment: --config=FILE, --config.section.field=value.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-m", dest="module", metavar="MODULE", help="the experiment; that of the config file if not given"
    )
    parser.add_argument("--steps", type=int, default=10, help="to trace (default 10)")
    parser.add_argument("--top", type=int, default=15, help="rows of operations (default 15)")
    parser.add_argument("--folder", metavar="DIR", help="of the trace and the tables; runs/profile/NAME if not given")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON, too; DIR/profile.json has it anyway")
    return parser


def _counts(options: argparse.Namespace) -> list[tuple[str, int]]:
    return [("steps", options.steps), ("top", options.top)]


def _default_folder(words: Sequence[str]) -> Path:
    return Path("runs") / "profile" / Path(_config_file(words)).stem


def _config_file(words: Sequence[str]) -> str:
    flags, _ = split_flags(words)
    return next((flag.words[0] for flag in flags if flag.name == "config" and flag.words), "")


def find_experiment(
    module_name: str | None, words: Sequence[str], problems: Sequence[str] = ()
) -> tuple[Callable[[Parsed], Any], type]:
    """The function `experiment(parsed)` and the `Config` of a module, or of the module that a config file is of.

    Raises:
      JaxdlError: no config file, none that is there, no such module, or one of another experiment: all at once.
    """
    problems, file, kind = list(problems), _config_file(words), None
    if not file:
        problems.append("a profile needs a configuration: give --config=configs/NAME.py.")
    else:
        kind, more = config_type_of(file)
        problems += more
    name = module_name or (kind.__module__ if kind else "")
    experiment = None
    if name:
        experiment, own, more = _of_module(name)
        problems += more
        if kind is not None and own is not None and kind is not own:
            problems.append(f"{file} is of {kind.__module__} and -m is {name}; leave -m out, or give its own config.")
    if problems or experiment is None or kind is None:
        raise ConfigError(problems[0]) if len(problems) == 1 else ConfigError.listing("profile", problems)
    return experiment, kind


def _of_module(name: str) -> tuple[Callable[[Parsed], Any] | None, type | None, list[str]]:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name and not name.startswith(f"{error.name}."):
            return None, None, [f"-m {name} cannot be imported: {error}."]
        beside = Path(*name.split(".")).parent
        near = nearest(name, [".".join([*beside.parts, file.stem]) for file in beside.glob("[a-z]*.py")])
        return None, None, [f"there is no module {name!r}; nearest: {', '.join(near) or 'none'}."]
    experiment = getattr(module, "experiment", None)
    if experiment is None:
        return None, None, [f"-m {name} has no function experiment(parsed), so there is nothing to run."]
    return experiment, getattr(module, "Config", None), []


def with_out(parsed: Parsed, out: str) -> Parsed:
    """The same configuration, with another run folder where it has one."""
    config = parsed.config
    if not hasattr(config, "out"):
        return parsed
    return dataclasses.replace(parsed, config=dataclasses.replace(config, out=out))


def profile_experiment(experiment: Callable[[Parsed], Any], parsed: Parsed, steps: int, folder: Path) -> StepProfile:
    """Runs an experiment until its loop has made the steps that are needed; what it prints is not shown.

    Raises:
      ProfileError: it ended without a training loop, or failed.
    """
    printed = io.StringIO()
    with intercepted(taking(steps, folder)), naming_failure():
        try:
            with contextlib.redirect_stdout(printed):
                experiment(parsed)
        except Profiled as done:
            return done.profile
    raise ProfileError("the experiment ended without a call of jaxdl.loop.fit, so there is no step to profile.")


def taking(steps: int, folder: Path) -> Callable[[Loop, Any], Any]:
    """Runs a loop of `fit` that evaluates and saves nothing; it ends with `Profiled`."""

    def take(loop: Loop, stop: Any) -> Any:
        loop.store, loop.resumed, loop.evaluators = None, None, {}
        loop.tracer = tracer = _Tracer(loop, steps, folder)
        loop.steps = loop.stop_at = loop.eval_every = loop.checkpoint_every = tracer.last_step
        result = loop.run(stop)
        raise ProfileError(f"{result.stopped_by or 'the loop'} ended the run before {steps} steps were traced.")

    return take


class _Tracer(Tracer):
    """Traces as a profile wants it, and ends the run."""

    def __init__(self, loop: Loop, steps: int, folder: Path) -> None:
        n = loop.feed.steps_per_call
        self._loop = loop
        self._recorder = Recorder(steps, folder, lambda: jax.block_until_ready(loop.state), steps_per_call=n)
        self.last_step = int(loop.state.step) + n * self._recorder.n_all_calls

    def at(self, n_done: int, state: Any) -> None:
        if self._recorder.before_call():
            raise Profiled(_profile(self._loop, self._recorder))

    def stop(self, state: Any) -> None:
        self._recorder.close()


def _profile(loop: Any, recorder: Recorder) -> StepProfile:
    n = recorder.steps_per_call
    programs = list(_programs(loop.feed.program(n)))
    counted = None
    if len(programs) == 1:  # a step in several programs is counted by what ran
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), programs[0].executable.args_info[0])
        counted = {name: count / n for name, count in of_jaxpr(programs[0].jitted.trace(*shapes).jaxpr.jaxpr).items()}
    leaf = jax.tree.leaves(loop.state.params)[0]
    return make_profile(
        read(recorder.folder),
        recorder,
        [program.executable.as_text() or "" for program in programs],
        devices=sorted(leaf.devices(), key=lambda device: device.id),
        flops=counted,
        batch=loop.data[0],
        trace_kept=str(recorder.folder),
    )


def _programs(program: Compiled | ExactStep) -> Iterator[Compiled]:
    if isinstance(program, Compiled):
        yield program
    else:
        for one in program._programs[:1]:
            yield from one[:2]
