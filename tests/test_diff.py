"""`jaxdl diff`: which leaves of two models on disk moved, and how far."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl import create_state, pretrained
from jaxdl.__main__ import main
from jaxdl.checkpoint import CheckpointCorrupt, Store
from jaxdl.finetune.contract import Frozen
from jaxdl.finetune.delta import DeltaStore, save_delta
from jaxdl.finetune.diff import compare
from jaxdl.models.bert import Bert, bert_block
from jaxdl.models.transformer import stack_layers
from jaxdl.paths import flatten
from jaxdl.pretrained.tensors import write_folder
from tests.faults.prove_flips import flip

RULES = [("head/.*", True), (".*", False)]
PARAMS = {
    "body": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.zeros(4)},
    "head": {"kernel": jnp.array([[3.0], [4.0], [0.0], [0.0]])},
}
EXTRA = {"batch_stats": {"body": {"mean": jnp.ones(4)}}}
TX = optax.adam(0.1)


def state_of(params=PARAMS, extra=EXTRA, rules=RULES):
    return create_state(params, extra, TX, rng=jax.random.key(0), trainable=rules)


def moved_head(by=0.5):
    return {**PARAMS, "head": {"kernel": PARAMS["head"]["kernel"] + jnp.array([[0.0], [by], [0.0], [0.0]])}}


def saved(folder, *states, **options):
    with Store(folder, **options) as store:
        for step, state in enumerate(states):
            store.save(step, state.replace(step=jnp.int32(step)))
    return folder


def test_a_moved_leaf_is_measured_in_closed_form(tmp_path):
    """(3, 4, 0, 0) to (3, 4.5, 0, 0): half at the most, a tenth of the norm 5."""
    a, b = saved(tmp_path / "a", state_of()), saved(tmp_path / "b", state_of(moved_head()))
    found = compare(a, b)
    (row,) = found.moved
    assert (row.path, row.shape, row.dtype) == ("head/kernel", "(4, 1)", "float32")
    assert (row.max_abs, row.relative) == (0.5, 0.1)
    assert sorted(found.identical) == ["body/bias", "body/kernel", "extra/batch_stats/body/mean"]
    assert (found.only_a, found.only_b, found.is_equal) == ([], [], False)
    back = compare(b, a).moved[0]
    assert back.relative == pytest.approx(0.5 / np.hypot(3, 4.5))


def test_the_command_prints_a_table_and_ends_in_an_exit_code(tmp_path, capsys):
    a, b = saved(tmp_path / "a", state_of()), saved(tmp_path / "b", state_of(moved_head()))
    assert main(["diff", str(a), str(b)]) == 1
    assert capsys.readouterr().out.replace(str(tmp_path), ".").splitlines() == [
        "a: step 0 in ./a",
        "b: step 0 in ./b",
        "path         shape   dtype    max abs  relative",
        "-----------------------------------------------",
        "head/kernel  (4, 1)  float32      0.5       0.1",
        "-----------------------------------------------",
        "1 moved, 3 identical, 0 only in a, 0 only in b",
    ]
    assert main(["diff", str(a), str(a)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 moved, 4 identical, 0 only in a, 0 only in b"
    assert main(["diff", str(a), str(tmp_path / "c")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.startswith("error: "), "does not exist" in err) == ("", True, True)
    with pytest.raises(SystemExit, match="2"):
        main(["diff", str(a)])


def test_the_installed_module_runs(tmp_path):
    a = saved(tmp_path / "a", state_of())
    done = subprocess.run([sys.executable, "-m", "jaxdl", "diff", a, a, "--json"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["is_equal"] is True


def test_json_has_everything(tmp_path, capsys):
    """A change of a leaf of zeros is infinitely large beside it, and JSON has no infinity."""
    grown = {**moved_head(), "body": {**PARAMS["body"], "bias": jnp.full(4, 2.0)}, "new": {"a": jnp.ones((2, 3))}}
    shrunk = {name: PARAMS[name] for name in ("body", "head")}
    a = saved(tmp_path / "a", state_of({**shrunk, "old": jnp.ones(1)}))
    b = saved(tmp_path / "b", state_of(grown))
    assert main(["diff", str(a), str(b), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found.pop("a") == f"step 0 in {tmp_path / 'a'}"
    assert found.pop("b") == f"step 0 in {tmp_path / 'b'}"
    assert found == {
        "moved": [
            {"path": "body/bias", "shape": "(4,)", "dtype": "float32", "max_abs": 2.0, "relative": "inf"},
            {"path": "head/kernel", "shape": "(4, 1)", "dtype": "float32", "max_abs": 0.5, "relative": 0.1},
        ],
        "identical": 2,
        "only_a": ["old float32[1]"],
        "only_b": ["new/a float32[2,3]"],
        "is_equal": False,
    }


def test_long_tables_are_cut_and_sorted_by_the_relative_change(tmp_path, capsys):
    rng = np.random.default_rng(0)
    params = {f"w{i}": rng.normal(size=5).astype(np.float32) for i in range(6)}
    scales = [0.3, 0.1, 0.6, 0.2, 0.5, 0.4]
    other = {name: leaf * np.float32(1 + scales[i]) for i, (name, leaf) in enumerate(params.items())}
    a, b = (saved(tmp_path / n, state_of(p, {}, [(".*", True)])) for n, p in (("a", params), ("b", other)))
    found = compare(a, b)
    assert [row.path for row in found.moved] == ["w2", "w4", "w5", "w0", "w3", "w1"]
    np.testing.assert_allclose([row.relative for row in found.moved], [0.6, 0.5, 0.4, 0.3, 0.2, 0.1], rtol=1e-6)
    assert main(["diff", str(a), str(b), "--rows", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[4:6]] == ["w2", "w4"]
    assert lines[6] == "... 4 more"
    assert main(["diff", str(a), str(b), "--rows", "0"]) == 1
    assert "more" not in capsys.readouterr().out


def test_shapes_dtypes_and_bits(tmp_path):
    """Another shape cannot be measured; another dtype can; minus zero is another bit pattern of the same number."""
    a = {"shape": jnp.ones(3), "dtype": jnp.ones(2), "zero": jnp.zeros(1), "n": jnp.int32([1, 2]), "b": jnp.bool_(True)}
    b = {"shape": jnp.ones(4), "dtype": jnp.bfloat16([1, 1.5]), "zero": -jnp.zeros(1), "n": jnp.int32([1, 4])}
    write_folder_of(tmp_path / "a", a)
    write_folder_of(tmp_path / "b", {**b, "b": jnp.bool_(False)})
    rows = {row.path: row[1:] for row in compare(tmp_path / "a", tmp_path / "b").moved}
    assert rows["shape"] == ("(3,) -> (4,)", "float32", None, None)
    assert rows["dtype"] == ("(2,)", "float32 -> bfloat16", 0.5, pytest.approx(0.5 / 2**0.5))
    assert rows["zero"] == ("(1,)", "float32", 0.0, 0.0)
    assert rows["n"] == ("(2,)", "int32", 2.0, pytest.approx(2 / 5**0.5))
    assert rows["b"] == ("()", "bool", 1.0, 1.0)
    assert compare(tmp_path / "a", tmp_path / "b").moved[0].path == "shape", "what cannot be measured comes first"


def write_folder_of(folder, leaves):
    folder.mkdir()
    write_folder(folder, {name: np.asarray(leaf) for name, leaf in leaves.items()})


def test_a_run_a_store_a_step_and_a_run_with_a_damaged_end(tmp_path, capsys):
    """A run is its newest intact step; a damaged step that was named is refused."""
    states = [state_of(), state_of(moved_head(0.25)), state_of(moved_head(0.5))]
    run = saved(tmp_path / "run" / "checkpoints", *states).parent
    for path in (run, run / "checkpoints", run / "checkpoints" / "2"):
        assert compare(path, run / "checkpoints" / "0").moved[0].max_abs == 0.5
    name = next(path for path in (run / "checkpoints" / "2").rglob("d/*") if path.is_file())
    flip(name, offset=5, bit=0)
    assert main(["diff", str(run), str(run / "checkpoints" / "0")]) == 1
    out, err = capsys.readouterr()
    assert "checkpoint of step 2" in err
    assert f"a: step 1 in {run / 'checkpoints'}" in out
    with pytest.raises(CheckpointCorrupt, match="checkpoints/2: "):
        compare(run / "checkpoints" / "2", run)
    shutil.copytree(run / "checkpoints" / "0", run / "checkpoints" / "7")
    assert compare(run, run, on_note=lambda text: None).a.startswith("step 1 in")


def test_a_delta_against_its_base_and_another(tmp_path):
    """What a delta takes from its base is known by hash: equal or not, but not how far."""
    frozen = Frozen(PARAMS, EXTRA, RULES)
    save_delta(tmp_path / "delta", moved_head(), EXTRA, frozen)
    with DeltaStore(Store(tmp_path / "run"), frozen) as store:
        store.save(0, state_of(moved_head(0.25)))
    base = saved(tmp_path / "base", state_of())
    found = compare(base, tmp_path / "delta")
    assert [(row.path, row.max_abs) for row in found.moved] == [("head/kernel", 0.5)]
    assert (len(found.identical), found.only_a, found.only_b) == (3, [], [])
    assert [row.max_abs for row in compare(tmp_path / "run", tmp_path / "delta").moved] == [0.25]
    assert compare(tmp_path / "delta", tmp_path / "delta").is_equal
    other = {**PARAMS, "body": {**PARAMS["body"], "bias": jnp.ones(4)}}
    found = compare(saved(tmp_path / "other", state_of(other)), tmp_path / "delta")
    assert [row[:4] for row in found.moved] == [
        ("body/bias", "(4,)", "float32", None),
        ("head/kernel", "(4, 1)", "float32", 0.5),
    ]
    assert "body/bias    (4,)    float32        ?         ?" in str(found)
    smaller = {"head": PARAMS["head"]}
    found = compare(tmp_path / "delta", saved(tmp_path / "small", state_of(smaller, {}, [(".*", True)])))
    assert "body/kernel (in the base of the delta)" in found.only_a


@pytest.fixture(scope="module")
def bert():
    model = Bert(bert_block(8, 2, 16), n_layers=2, vocab_size=30, n_positions=16, has_pooler=True)
    return model, model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]


def test_a_run_against_the_pretrained_folder_it_came_from(tmp_path, bert):
    """The folder has the names of transformers; the run those of jaxdl, and its layers in one array."""
    model, params = bert
    pretrained.save(tmp_path / "bert", model, params)
    assert compare(tmp_path / "bert", tmp_path / "bert").is_equal
    names = compare(tmp_path / "bert", tmp_path / "bert").identical
    assert "embeddings.word_embeddings.weight" in names
    params = pretrained.load(tmp_path / "bert").params  # the rows that pad the vocabulary are zero now
    tuned = {**params, "head": {"kernel": jnp.ones((8, 3))}}
    for folder, tree in (("run", tuned), ("scanned", stack_layers(tuned))):
        found = compare(tmp_path / "bert", saved(tmp_path / folder, state_of(tree, {}, [(".*", True)])))
        assert (found.moved, found.only_a, found.only_b) == ([], [], ["head/kernel float32[8,3]"])
        assert len(found.identical) == len(flatten(params))


def test_one_file_of_safetensors_and_what_is_nothing(tmp_path):
    write_folder_of(tmp_path / "a", {"w": jnp.ones(2)})
    (tmp_path / "empty").mkdir()
    assert compare(tmp_path / "a" / "model.safetensors", tmp_path / "a").is_equal
    with pytest.raises(ValueError, match="is no run"):
        compare(tmp_path / "a", tmp_path / "empty")
    (tmp_path / "text").write_text("a")
    with pytest.raises(ValueError, match="is no run"):
        compare(tmp_path / "a", tmp_path / "text")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"a")
    with pytest.raises(ValueError, match="is damaged"):
        compare(tmp_path / "a", tmp_path / "a")


def test_large_models_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxdl.finetune.diff._BATCH_BYTES", 40)
    params = {f"w{i}": jnp.full(4, float(i + 1)) for i in range(5)}
    other = {name: 2 * leaf for name, leaf in params.items()}
    a, b = (saved(tmp_path / n, state_of(p, {}, [(".*", True)])) for n, p in (("a", params), ("b", other)))
    assert [row.relative for row in compare(a, b).moved] == [1.0] * 5
