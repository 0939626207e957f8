"""Commands that compare: exit code 0 where both sides agree, 1 where not, 2 if refused.

python -m jaxdl verify-parity FOLDER
python -m jaxdl diff A B
"""

import argparse
import sys
from collections.abc import Sequence

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
    words = parser.parse_args(argv)
    try:
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


if __name__ == "__main__":
    sys.exit(main())
