"""How long something lasts: `10 epochs`, `500 steps` or `60000 examples`."""

import functools
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from jaxdl.errors import JaxdlError

_WRITTEN = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:[eE]\+?\d{1,2})?)\s*(steps?|epochs?|examples?)?")
_HOW = "write '500 steps' (or 500), '0.5 epochs' or '60000 examples'"


@functools.total_ordering
@dataclass(frozen=True, init=False, repr=False)
class Duration:
    """A length of training, in the unit its author thinks in.

    Two durations are equal if they are the same number of the same unit; they have an order if the unit is the same.

    Args:
      text: a number and a unit (`steps`, `epochs`, `examples`, or their singular); a number alone counts steps.
        Steps and examples are whole numbers, epochs may be fractions. `60_000` and `6e4` are understood too.

    Raises:
      JaxdlError: the text is no duration, is negative, or counts a fraction of a step or an example.

    Example:
      >>> Duration("10 epochs").to_steps(batch_size=128, n_rows=60000)
      4688
      >>> str(Duration(500)), Duration("1 epoch") == Duration("1.0 epochs")
      ('500 steps', True)
    """

    amount: Decimal
    unit: str

    def __init__(self, text: str | int) -> None:
        amount, unit = _read(text)
        object.__setattr__(self, "amount", amount)
        object.__setattr__(self, "unit", unit)

    def to_steps(self, batch_size: int, n_rows: int) -> int:
        """The number of optimizer steps, rounded up, so that a positive duration is at least one step.

        Args:
          batch_size: global batch size, rows.
          n_rows: rows of the data set, the length of an epoch.

        Raises:
          JaxdlError: `batch_size` or `n_rows` is below 1.

        Example:
          >>> Duration("0.1 epochs").to_steps(batch_size=10, n_rows=1000), Duration("1 example").to_steps(32, 1000)
          (10, 1)
        """
        sizes = {"batch_size": batch_size, "n_rows": n_rows}
        problems = [f"{name}={size} must be at least 1." for name, size in sizes.items() if size < 1]
        if problems:
            raise JaxdlError.listing(f"steps of {self}", problems)
        # Fractions: in floats 0.1 * 3 / 0.3 rounds up to one step too many.
        rows = Fraction(self.amount) * {"steps": batch_size, "epochs": n_rows, "examples": 1}[self.unit]
        return math.ceil(rows / batch_size)

    def __lt__(self, other: "Duration") -> bool:
        if not isinstance(other, Duration):
            return NotImplemented
        if self.unit != other.unit:
            raise JaxdlError(f"{self} and {other} have no order by themselves; compare their to_steps().")
        return self.amount < other.amount

    def __str__(self) -> str:
        is_whole = self.amount == self.amount.to_integral_value()
        number = str(int(self.amount)) if is_whole else format(self.amount.normalize(), "f")
        return f"{number} {self.unit.removesuffix('s') if self.amount == 1 else self.unit}"

    def __repr__(self) -> str:
        return f"Duration({str(self)!r})"


def _read(text: str | int) -> tuple[Decimal, str]:
    written = _WRITTEN.fullmatch(str(text).strip())
    if isinstance(text, bool) or not isinstance(text, (str, int)) or written is None:
        raise JaxdlError(f"{text!r} is not a duration; {_HOW}.")
    amount = Decimal(written[1].replace("_", ""))
    unit = (written[2] or "steps").removesuffix("s") + "s"
    if unit != "epochs" and amount != amount.to_integral_value():
        raise JaxdlError(f"{text!r} counts a fraction of {unit}; they are whole, only epochs may be fractions.")
    return amount, unit
