"""Memory of the host that a CPU computes in."""

import ctypes

from jaxdl.choices import tell

# Parameters of glibc's mallopt(3), and what makes it keep all that it ever got: no mapping of its own for large arrays,
# one arena for all threads, nothing trimmed.
_SETTINGS = {"M_MMAP_MAX": (-4, 0), "M_ARENA_MAX": (-8, 1), "M_TRIM_THRESHOLD": (-1, -1)}


def keep_freed_memory(reason: str = "asked for") -> bool:
    """Makes glibc keep freed memory instead of handing it back to the system; call it before JAX is first used.

    On a CPU, XLA asks the C library for the temporary arrays of each call and frees them after it. By default glibc
    returns large arrays to the system at once, and at the next call the system hands out every page anew and clears it:
    a GPT's step (1.7 GB of temporary arrays) spends 15 % of its processor time on this, an LSTM's as much. Kept, the
    process holds at any time as much memory as it ever held at once.

    Args:
      reason: for the log.

    Returns:
      Whether it is so; False where the C library is another than glibc (macOS, Windows, musl).

    Example:
      >>> import subprocess, sys
      >>> code = "from jaxdl.host_memory import keep_freed_memory; print(keep_freed_memory() in (True, False))"
      >>> subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
      'True'
    """
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 (glibc has it)
    except (OSError, TypeError, AttributeError):
        return False
    is_kept = all(library.mallopt(number, value) == 1 for number, value in _SETTINGS.values())
    if is_kept:
        tell("freed memory", "kept", reason)
    return is_kept
