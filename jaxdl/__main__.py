"""Commands that compare or plan: exit code 0 where both sides agree or a step fits, 1 where not, 2 if refused.

python -m jaxdl verify-parity FOLDER
python -m jaxdl diff A B
python -m jaxdl plan --config FILE --topology v5e:16x16
python -m jaxdl profile --config FILE --steps 10
python -m jaxdl launch -n 4 -- python -m experiments.classify_images --config FILE
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from jaxdl.errors import JaxdlError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command of jaxdl.

    Args:
      argv: the words after the program's name; None takes those of the process.

    Returns:
      The exit code.
    """
    parser = argparse.ArgumentParser(prog="jaxdl", description="jaxdl's commands.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser(
        "verify-parity",
        help="compare a pretrained folder with transformers",
        description="Loads a folder with jaxdl and with transformers and compares outputs, gradients and AdamW steps.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    verify.add_argument("folder", help="holds config.json and safetensors")
    verify.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="of both sides")
    verify.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference that passes")
    verify.add_argument("--learning-rate", type=float, default=1e-4, help="of the AdamW steps")
    verify.add_argument("--seed", type=int, default=0, help="of inputs and targets")
    verify.set_defaults(run=_verify)
    diff = commands.add_parser(
        "diff",
        help="compare the leaves of two models",
        description="Shows which leaves of two models on disk differ, and how far: the parameters and the other "
        "collections, not the optimizers' states. A and B are each a run folder or a folder of checkpoints (its newest "
        "intact step), a step folder, a delta, or safetensors. Exit code 0: equal bit for bit, 1: not, 2: refused.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    diff.add_argument("a", metavar="A", help="the side that changes are relative to")
    diff.add_argument("b", metavar="B", help="the other side")
    diff.add_argument("--json", action="store_true", help="everything as JSON")
    diff.add_argument("--rows", type=int, default=40, help="at most so many leaves in a table; 0 for all")
    diff.set_defaults(run=_diff)
    _add_launch(commands)
    commands.add_parser("plan", help="what a run would do on devices that are not here", add_help=False)
    commands.add_parser("profile", help="where the time of a step goes", add_help=False)
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        if given[:1] == ["plan"]:  # its flags are also those of the experiment
            return _plan(given[1:])
        if given[:1] == ["profile"]:
            return _profile(given[1:])
        words = parser.parse_args(given)
        code: int = words.run(words)
        return code
    except JaxdlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _verify(words: argparse.Namespace) -> int:
    from jaxdl.pretrained.verify import verify_parity

    settings = {"dtype": words.dtype, "tolerance": words.tolerance, "seed": words.seed}
    report = verify_parity(words.folder, learning_rate=words.learning_rate, **settings)
    print(report)
    return 0 if report.is_equal else 1


def _diff(words: argparse.Namespace) -> int:
    from jaxdl.finetune.diff import compare

    found = compare(words.a, words.b, on_note=lambda text: print(text, file=sys.stderr))
    print(found.to_json() if words.json else found.table(words.rows if words.rows > 0 else None))
    return 0 if found.is_equal else 1


def _add_launch(commands: Any) -> None:
    parser = commands.add_parser(
        "launch",
        help="start n processes of one run on this machine",
        description="Runs a command n times over loopback, as the processes of one run. Output comes behind the number "
        "of its process; SIGTERM and Ctrl-C go on to all. Exit code: that of the process that failed first, else 0.",
        usage="jaxdl launch -n N [--cpu-devices K] [--port PORT] -- COMMAND ...",
    )
    parser.add_argument("-n", type=int, required=True, metavar="N", help="processes")
    parser.add_argument("--cpu-devices", type=int, metavar="K", help="CPU devices of each; JAX's choice if not given")
    parser.add_argument("--port", type=int, help="of the coordinator; a free one if not given")
    parser.add_argument("command_line", nargs=argparse.REMAINDER, metavar="COMMAND", help="what each process runs")
    parser.set_defaults(run=_launch)


def _launch(words: argparse.Namespace) -> int:
    from jaxdl.parallel.launch import launch

    command = words.command_line[words.command_line[:1] == ["--"] :]
    return launch(command, words.n, cpu_devices=words.cpu_devices, port=words.port)


def _plan(words: Sequence[str]) -> int:
    from jaxdl.plan.command import run

    return run(words)


def _profile(words: Sequence[str]) -> int:
    from jaxdl.profile.command import run

    return run(words)


if __name__ == "__main__":
    sys.exit(main())
