import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl import choices, compiler_options
from jaxdl.compilation import Compiled

TRITON, MERGER, ORDER = "xla_gpu_enable_triton_gemm", "xla_gpu_dot_merger_threshold_mb", "xla_cpu_scheduler_type"
X = jnp.ones((2, 5, 5, 3))


def convolved(x):
    return jax.lax.conv_general_dilated(x, jnp.ones((3, 3, 3, 2)), (1, 1), "SAME", None, None, ("NHWC", "HWIO", "NHWC"))


def hidden_in_a_loop(x):
    return jax.lax.fori_loop(0, 2, lambda i, y: y + jax.checkpoint(lambda z: jnp.sum(convolved(z)))(x), 0.0)


@pytest.mark.parametrize(
    ("platform", "flags", "expected"),
    [
        ("cpu", "", {ORDER: "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}),
        ("cpu", f"--{ORDER}=CPU_SCHEDULER_TYPE_DEFAULT", {}),
        ("gpu", "", {TRITON: False, MERGER: 8}),
        ("gpu", f"--xla_dump_to=x --{TRITON}=true", {MERGER: 8}),
        ("gpu", f"--{TRITON}=true --{MERGER}=32", {}),
        ("tpu", "", {}),
    ],
)
def test_flags_come_first_and_the_log_says_what_was_chosen(platform, flags, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setenv("XLA_FLAGS", flags)
    with choices.heard() as told:
        assert compiler_options(jnp.sin, X) == expected
    assert len(told) == bool(expected)
    for name, value in expected.items():
        assert f"--{name}={'false' if value is False else value}" in told[0]


@pytest.mark.parametrize(("fn", "n"), [(jnp.sin, 1), (convolved, 0), (hidden_in_a_loop, 0)])
def test_convolutions_keep_the_order_of_xla(fn, n):
    assert len(compiler_options(fn, X)) == n
    assert compiler_options() == {}


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(
        "jaxdl.xla_options._LEAST_MEMORY", {"xla_no_such_option": True, ORDER: "CPU_SCHEDULER_TYPE_DEFAULT"}
    )
    assert compiler_options(jnp.sin, X) == {ORDER: "CPU_SCHEDULER_TYPE_DEFAULT"}


def test_options_reach_the_compiler_unless_others_are_given(monkeypatch):
    monkeypatch.setattr("jaxdl.compilation.options_of", lambda jaxpr: {"xla_no_such_option": len(jaxpr.eqns)})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        Compiled(jnp.sin)(jnp.ones(2))
    assert Compiled(jnp.sin, compiler_options={})(jnp.zeros(2)).tolist() == [0.0, 0.0]


def test_the_order_changes_no_number():
    def step(w, x):
        for _ in range(4):
            x = jnp.tanh(x @ w)
        return w - 0.1 * jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(w)

    w, x = np.random.default_rng(0).standard_normal((2, 32, 32)).astype(np.float32)
    plain, ordered = Compiled(step, compiler_options={}), Compiled(step)
    np.testing.assert_array_equal(plain(w, x), ordered(w, x))
