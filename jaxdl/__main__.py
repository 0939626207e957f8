"""`python -m jaxdl verify-parity FOLDER`: exit code 0 where jaxdl and transformers agree, 1 where not, 2 if refused."""

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
    words = parser.parse_args(argv)
    try:
        return _verify(words)
    except JaxdlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _verify(words: argparse.Namespace) -> int:
    from jaxdl.pretrained.verify import verify_parity

    settings = {"dtype": words.dtype, "tolerance": words.tolerance, "seed": words.seed}
    report = verify_parity(words.folder, learning_rate=words.learning_rate, **settings)
    print(report)
    return 0 if report.is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
