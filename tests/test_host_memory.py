"""Freed memory that stays: the page faults of a second allocation."""

import subprocess
import sys

import pytest

CODE = """
import ctypes, resource, sys
from jaxdl.host_memory import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "kept" else None)
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    at = library.malloc(64 << 20)
    ctypes.memset(at, 1, 64 << 20)
    library.free(at)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_used_again_without_page_faults():
    said = {
        mode: subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True).stdout
        for mode in ("kept", "default")
    }
    (is_kept, kept), (_, default) = (text.split() for text in said.values())
    if is_kept == "False":
        pytest.skip("the C library is not glibc")
    assert int(kept) < 0.1 * int(default)
