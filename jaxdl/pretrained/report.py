"""What a comparison with transformers found."""

from typing import NamedTuple

from jaxdl.pretrained.ledger import shortened


class Line(NamedTuple):
    """One compared array: its name, how many values, the largest value, the largest relative difference."""

    name: str
    n_values: int
    largest: float
    error: float


class Report(NamedTuple):
    """What a comparison found; `str` is a table.

    Attributes:
      folder: that was compared.
      dtype: of both sides.
      tolerance: of relative differences.
      lines: an entry for each output, gradient leaf, loss, and leaf's way over all steps.
      losses: ours before each step and after the last.
      problems: why the two are not the same, or the comparison proves nothing; empty if all is well.
    """

    folder: str
    dtype: str
    tolerance: float
    lines: tuple[Line, ...]
    losses: tuple[float, ...]
    problems: tuple[str, ...]

    @property
    def is_equal(self) -> bool:
        """True where nothing differs and the comparison means something."""
        return not self.problems

    def __str__(self) -> str:
        kinds = dict.fromkeys(line.name.split(" ")[0] for line in self.lines)
        rows = [f"{'compared':12}{'arrays':>8}{'values':>14}{'max relative error':>20}  worst"]
        for kind in kinds:
            of_kind = [line for line in self.lines if line.name.split(" ")[0] == kind]
            worst = max(of_kind, key=lambda line: line.error)
            n_values = sum(line.n_values for line in of_kind)
            where = worst.name.partition(" ")[2]
            rows.append(f"{kind:12}{len(of_kind):>8}{n_values:>14,}{worst.error:>20.1e}  {where}")
        curve = " -> ".join(f"{loss:.6g}" for loss in self.losses)
        verdict = "equal" if self.is_equal else "NOT equal"
        head = f"{self.folder} in {self.dtype}: {verdict} within {self.tolerance:g}; loss {curve}"
        problems = [f"  - {problem}" for problem in shortened(self.problems, "problems")]
        return "\n".join([head, *rows, *problems])
