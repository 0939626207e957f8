import jax
import jax.numpy as jnp
import pytest

from jaxdl import choices, compiler_options
from jaxdl.compilation import Compiled

TRITON, MERGER = "xla_gpu_enable_triton_gemm", "xla_gpu_dot_merger_threshold_mb"


@pytest.mark.parametrize(
    ("platform", "flags", "expected"),
    [
        ("cpu", "", {}),
        ("gpu", "", {TRITON: False, MERGER: 8}),
        ("gpu", f"--xla_dump_to=x --{TRITON}=true", {MERGER: 8}),
        ("gpu", f"--{TRITON}=true --{MERGER}=32", {}),
    ],
)
def test_flags_come_first_and_the_log_says_what_was_chosen(platform, flags, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setenv("XLA_FLAGS", flags)
    with choices.heard() as told:
        assert compiler_options() == expected
    assert len(told) == bool(expected)
    assert all(f"--{name}={str(value).lower()}" in told[0] for name, value in expected.items())


def test_options_reach_the_compiler_unless_others_are_given(monkeypatch):
    monkeypatch.setattr("jaxdl.compilation.usual_options", lambda: {"xla_no_such_option": True})
    with pytest.raises(Exception, match="xla_no_such_option"):
        Compiled(jnp.sin)(jnp.ones(2))
    assert Compiled(jnp.sin, compiler_options={})(jnp.zeros(2)).tolist() == [0.0, 0.0]
