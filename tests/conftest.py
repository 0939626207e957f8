"""Every test runs on eight CPU devices, with the strictest settings JAX has."""

import os
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = os.environ.get("JAXDL_TEST_PLATFORM", "cpu")

import jax

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_numpy_rank_promotion", "raise")

from jaxdl import host_memory  # noqa: E402

# Experiments on a CPU keep freed memory; a process that runs hundreds of tests would hold that of the largest of all.
host_memory._SETTINGS.clear()

OPTIMIZES = pytest.StashKey[bool]()


def is_optimized(item: pytest.Item) -> bool:
    """Whether XLA optimizes the test's programs as for users, and not hardly: that takes most of the suite's time."""
    return item.path.parent.name in ("parity", "faults") or item.get_closest_marker("optimized") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those go last: a change of the setting costs all that was compiled."""
    items.sort(key=is_optimized)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.session.stash.get(OPTIMIZES, True) != is_optimized(item):
        item.session.stash[OPTIMIZES] = is_optimized(item)
        jax.config.update("jax_disable_most_optimizations", not is_optimized(item))
        jax.clear_caches()  # it keeps programs whatever the setting
