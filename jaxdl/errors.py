"""The one base class of every error that jaxdl raises on purpose."""

from collections.abc import Iterable
from typing import Self


class JaxdlError(ValueError):
    """A problem with what the user gave; the message names the value, the rule and the remedy.

    The command line prints such an error without a traceback.

    Attributes:
      exit_code: 2 where nothing was begun, 1 where work was under way.
    """

    exit_code = 2

    @classmethod
    def listing(cls, title: str, problems: Iterable[str]) -> Self:
        """Builds one error out of several problems.

        Example:
          >>> print(JaxdlError.listing("config", ["batch_size=0 must be at least 1.", "steps=-1 must be positive."]))
          config: 2 problem(s)
            - batch_size=0 must be at least 1.
            - steps=-1 must be positive.
        """
        problems = list(problems)
        lines = "".join(f"\n  - {problem}" for problem in problems)
        return cls(f"{title}: {len(problems)} problem(s){lines}")
