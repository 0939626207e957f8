"""Prints what fine-tuning runs came to as one Markdown table.

python -m experiments.finetuning_table runs/minilm_full runs/minilm_lora
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.finetuning import OUTCOME, Outcome
from jaxdl import JaxdlError
from jaxdl.report.table import format_bytes

COLUMNS = ("run", "test accuracy", "moved parameters", "share", "delta on disk", "time", "peak memory of the process")


def main(folders: Sequence[str]) -> int:
    """Returns 0, or 2 where a folder holds no finished fine-tuning run."""
    try:
        rows = [_cells(_read(Path(folder))) for folder in folders]
        if not rows:
            raise JaxdlError("name the run folders: python -m experiments.finetuning_table runs/minilm_full ...")
    except JaxdlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for cells in (COLUMNS, ("---",) + ("---:",) * (len(COLUMNS) - 1), *rows):
        print(f"| {' | '.join(cells)} |")
    return 0


def _read(folder: Path) -> Outcome:
    try:
        return Outcome(**json.loads((folder / OUTCOME).read_text()))
    except OSError:
        raise JaxdlError(f"{folder} has no {OUTCOME}; name the folder of a fine-tuning run that ended.") from None
    except (TypeError, ValueError) as error:
        raise JaxdlError(f"{folder / OUTCOME} cannot be read ({error}); run it anew.") from None


def _cells(row: Outcome) -> tuple[str, ...]:
    return (
        row.run,
        f"{100 * row.accuracy:.2f} %",
        f"{row.n_moved:,}",
        f"{100 * row.n_moved / row.n_params:.2f} %",
        format_bytes(row.delta_bytes),
        f"{row.seconds:.0f} s",
        f"{row.peak_mib:.0f} MiB",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
