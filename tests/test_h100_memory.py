"""The memory benchmark at a small size on this machine: its counts, its table, and what it says without the plugin."""

import jax
import pytest

from benchmarks import h100_memory as h
from jaxdl import paths

SMALL = h.Sizes(n_layers=1, width=64, n_heads=2, n_kv_heads=2, hidden=128, vocab_size=256, n_rows=2, n_tokens=4)
FULL, LORA, NF4 = h.CASES[0], h.CASES[2], h.CASES[5]


def test_what_trains_and_what_is_held():
    matrices = 2 * 256 * 64 + 4 * 64 * 64 + 3 * 64 * 128
    norms = 3 * 64
    rank = 16 * ((64 + 64) * 4 + (64 + 128) * 3)
    held = {}
    for case, a_number in ((FULL, 4), (LORA, 2), (NF4, 0.5625)):
        _, state, batch = h.abstract_step(case, SMALL)
        moments = paths.flatten(state.opt_state)
        n_moving = matrices + norms if case.rank is None else rank
        assert sum(leaf.size for path, leaf in moments.items() if "/mu/" in path or "/nu/" in path) == 2 * n_moving
        held[case.name] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params))
        base = matrices * a_number + norms * (4 if case is FULL else 2)
        assert held[case.name] == base + (0 if case.rank is None else 4 * rank)
        assert batch["tokens"].shape == (2, 4)


def test_a_compiled_case_is_counted():
    memory = h.measure(LORA, SMALL)
    plain = 2 * 256 * 64 + 4 * 64 * 64 + 3 * 64 * 128 + 3 * 64
    assert memory.n_parameters == plain + memory.n_trainable
    assert memory.state > 2 * plain + 12 * memory.n_trainable
    assert memory.peak > memory.state / 2


def test_the_table_divides_by_the_first():
    results = {"all": h.Memory(10**9, 10**9, 2**30, 8 * 2**30, 60.0), "few": h.Memory(10**9, 10**6, 2**29, 2**31, 30.4)}
    text = h.to_table(results, h.Sizes()).to_markdown()
    assert "1.00 billion parameters, 8 rows of 2048 tokens" in text
    assert "| all | 1000.0 M | 1.00 | 8.00 | 1.000 | 60 s |" in text
    assert "| few | 1.0 M | 0.50 | 2.00 | 0.250 | 30 s |" in text


def test_without_the_plugin_it_says_in_one_line_what_to_install(monkeypatch, capsys):
    versions = {"jax": "0.10.2", "jax-cuda13-pjrt": "0.10.1"}

    def version(name):
        if name not in versions:
            raise h.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(h.importlib.metadata, "version", version)
    assert h.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "h100_memory: this needs the CUDA plugin; in an environment apart: pip install jax==0.10.2 "
        "jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 nvidia-cudnn-cu12"
    ]
    versions.update({"jax-cuda13-plugin": "0.10.2", "jax-cuda13-pjrt": "0.10.2", "nvidia-cudnn-cu13": "9.1"})
    assert h.missing() is None


def test_the_library_chooses_as_on_a_gpu():
    with h.tracing_for_gpu():
        assert jax.default_backend() == "gpu"
    assert jax.default_backend() == "cpu"
    assert "H100" in h.TARGET.read_text()


def test_unknown_arguments_are_refused():
    with pytest.raises(SystemExit):
        h.main(["--speed"])
