"""What the library chose by device and shape is said in the log, once: the logger `jaxdl`, level INFO."""

import functools
import logging


@functools.cache
def tell(what: str, choice: str, reason: str) -> None:
    """Logs a choice the first time that it is made for this reason.

    Args:
      what: what was chosen, such as `attention`.
      choice: the alternative taken, such as `cudnn`.
      reason: why.

    Example:
      >>> tell("attention", "xla", "the platform is cpu")
    """
    logging.getLogger("jaxdl").info("%s: %s (%s)", what, choice, reason)
