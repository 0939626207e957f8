"""What the compile cache on disk keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdl.compilation import Compiled, enable_compile_cache, unkept
from jaxdl.parallel import make_mesh

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def n_kept(tmp_path):
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    enable_compile_cache(tmp_path)
    compilation_cache.reset_cache()
    yield lambda: len(list(tmp_path.glob("*-cache")))
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_second_start_reads_what_the_first_compiled(n_kept):
    row = jax.device_put(jnp.ones(8))
    made = n_kept()
    programs = [Compiled(lambda x: jnp.sin(x) + 1), Compiled(lambda x: jnp.sin(x) + 1)]
    for program in programs:
        assert program(row).shape == (8,)
    assert [program.is_cached for program in programs] == [False, True]
    assert n_kept() == made + 1


def test_a_program_over_devices_of_a_cpu_is_compiled_at_every_start(n_kept):
    """Read back, XLA may run its collectives in another order on each device: `lstm-tensor` of test_layouts hung."""
    rows = jax.device_put(jnp.ones(8), NamedSharding(make_mesh(data=2, devices=jax.devices()[:2]), P("data")))
    made = n_kept()
    for like in (rows, jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=rows.sharding)):
        program = Compiled(lambda x: x / x.sum())
        program.compile(like)
        assert np.asarray(program(rows)).sum() == 1.0
        assert not program.is_cached
    with unkept():
        jax.jit(lambda x: jnp.cos(x) + 1)(np.ones(3, np.float32))
    assert n_kept() == made
