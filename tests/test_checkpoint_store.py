"""Saving, restoring, retention and every way in which a disk or a process can fail in between."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdl.checkpoint import CheckpointCorrupt, CheckpointError, CheckpointMismatch, Store, verify
from jaxdl.checkpoint import arrays as disk
from jaxdl.checkpoint.folders import retained
from jaxdl.errors import JaxdlError
from jaxdl.paths import flatten

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
EMPTY = {"w": jnp.zeros(3)}


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    extra: dict
    opt_state: tuple
    rng: jax.Array


def create(seed=0, *, impl="threefry2x32", width=4):
    key = jax.random.key(seed, impl=impl)
    kernel = jax.random.normal(key, (3, width))
    params = {
        "body": {"kernel": kernel, "bias": jnp.zeros(width), "frozen": None},
        "head": {"kernel": kernel.T.astype(jnp.bfloat16), "scale": jnp.float32(-0.0)},
    }
    extra = {"batch_stats": {"count": jnp.int32(7), "seen": jnp.array([True, False])}, "none": jnp.zeros((0, 3))}
    return State(jnp.int32(0), params, extra, TX.init(params), jax.random.fold_in(key, 1))


def update(state):
    def loss(params):
        return sum(jnp.sum(jnp.square(leaf.astype(jnp.float32) - 1.0)) for leaf in jax.tree.leaves(params))

    updates, opt_state = TX.update(jax.grad(loss)(state.params), state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state)


def bits(tree):
    """Every leaf as bytes, so that -0.0 and 0.0 differ."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    raw = {path: jax.random.key_data(leaf) if is_key(leaf) else leaf for path, leaf in flatten(tree).items()}
    return {path: (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for path, leaf in raw.items()}


def weights(value):
    return {"w": jnp.full(3, value, jnp.float32)}


def filled(directory, steps, **options):
    """A closed store whose step n holds the value n."""
    with Store(directory, **options) as store:
        for step in steps:
            store.save(step, weights(step))
    return store


def flip(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(bytes(content))


def child(directory, body, **options):
    """Starts a Python process that runs `body` with `store` at hand."""
    imports = "import jax, jax.numpy as jnp, os, sys\nfrom jaxdl.checkpoint import Store"
    code = f"{imports}\nstore = Store({str(directory)!r})\n{body}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **options)


# Round trips


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_round_trip_of_a_train_state_is_exact(tmp_path, impl):
    state = update(create(impl=impl))
    with Store(tmp_path) as store:
        store.save(3, state, metadata={"epoch": 1.5, "names": ["a"]})
        restored = store.restore(jax.eval_shape(lambda: create(1, impl=impl)))
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert bits(restored.state) == bits(state)
    assert restored.state.rng.dtype == state.rng.dtype
    assert jax.random.bits(restored.state.rng) == jax.random.bits(state.rng)
    assert (restored.step, restored.metadata, restored.skipped) == (3, {"epoch": 1.5, "names": ["a"]}, ())


DTYPES = [
    "bool",
    "int4",
    "int8",
    "uint8",
    "int16",
    "uint32",
    "float16",
    "bfloat16",
    "float32",
    "complex64",
    "float8_e4m3fn",
]


def test_every_dtype_shape_and_awkward_name_round_trips(tmp_path):
    tree = {dtype: jnp.arange(6).reshape(2, 3).astype(dtype) for dtype in DTYPES}
    tree |= {"a.b c": jnp.zeros(()), "ünï": (jnp.ones((1, 1, 1)), [jnp.zeros((2, 0))]), "minus": jnp.full((50,), -0.0)}
    tree |= {"host": np.arange(3, dtype=np.int64), "scalar": np.float64(1 / 3), "int": 3, "float": 0.5, "flag": True}
    with Store(tmp_path) as store:
        store.save(0, tree)
        found = store.restore(tree).state
    as_arrays = lambda tree: bits(jax.tree.map(np.asarray, tree))  # noqa: E731
    assert as_arrays(found) == as_arrays(tree)
    assert [type(a) for a in jax.tree.leaves(found)] == [type(a) for a in jax.tree.leaves(tree)]


def test_batch_of_keys_round_trips(tmp_path):
    keys = {"rng": jax.random.split(jax.random.key(1), (2, 3))}
    with Store(tmp_path) as store:
        store.save(0, keys)
        assert bits(store.restore(keys).state) == bits(keys)
        with pytest.raises(CheckpointMismatch, match=r"rng is key<fry>\[2,3\] in the checkpoint, key<rbg>\[2,3\]"):
            store.restore({"rng": jax.random.split(jax.random.key(1, impl="rbg"), (2, 3))})


def test_restored_state_is_as_good_as_a_fresh_one_to_a_compiled_step(tmp_path):
    step = jax.jit(chex.assert_max_traces(update, 1), donate_argnums=0)
    weak = {"lr": jnp.asarray(0.1), "count": jnp.asarray(2)}
    fresh = create().replace(extra=weak)
    assert fresh.extra["lr"].weak_type
    with Store(tmp_path) as store:
        store.save(0, fresh)
        abstract = jax.eval_shape(lambda: create().replace(extra={"lr": jnp.asarray(0.1), "count": jnp.asarray(2)}))
        restored = store.restore(abstract).state
        from_concrete = store.restore(fresh).state
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(fresh), strict=True):
        assert (a.aval, a.committed, a.sharding) == (b.aval, b.committed, b.sharding)
    expected = bits(step(fresh))
    assert bits(step(restored)) == expected == bits(step(from_concrete))
    assert step._cache_size() == 1


def test_shardings_of_like_are_respected(tmp_path):
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    split, copied = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    values = jnp.arange(8.0)
    sharded = {"w": jax.device_put(values, split)}
    with Store(tmp_path) as store:
        store.save(0, sharded)
        assert store.restore({"w": values}).state["w"].committed is False
        for sharding in (split, copied):
            like = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}
            found = store.restore(like).state["w"]
            assert found.sharding == sharding
            np.testing.assert_array_equal(found, values)
        assert store.restore(sharded).state["w"].sharding == split


def test_plain_orbax_reads_the_arrays_as_nested_dicts(tmp_path):
    import orbax.checkpoint as ocp

    state = create()
    with Store(tmp_path) as store:
        store.save(0, state)
    with ocp.PyTreeCheckpointer() as plain:
        found = plain.restore(tmp_path / "0")
    np.testing.assert_array_equal(found["params"]["body"]["kernel"], state.params["body"]["kernel"])


def test_donation_right_after_save_does_not_reach_the_disk(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    tree = {"w": jnp.arange(200_000.0), "host": np.arange(10.0)}
    expected = bits(tree)
    like = jax.tree.map(jnp.zeros_like, {"w": tree["w"]}) | {"host": np.zeros(10)}
    with Store(tmp_path) as store:
        store.save(0, tree)
        w = {"w": tree["w"]}
        for _ in range(5):
            w = step(w)
        tree["host"][:] = -1
        jax.block_until_ready(w)
        assert bits(store.restore(like).state) == expected


def test_normal_use_is_silent(tmp_path, capfd):
    root, absl = logging.getLogger(), logging.getLogger("absl")
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append((record.name, record.getMessage()))
    levels, filters = (root.level, absl.level), list(absl.filters)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    absl.setLevel(logging.INFO)
    try:
        with Store(tmp_path, keep_last=1) as store:
            for step in range(3):
                store.save(step, create())
            logging.getLogger("absl").info("of the user")
            store.restore(create())
    finally:
        root.removeHandler(handler)
        root.setLevel(levels[0])
        absl.setLevel(levels[1])
    assert [pair for pair in seen if not pair[0].startswith("jax.")] == [
        ("absl", "of the user")
    ]  # JAX logs compilations
    assert absl.filters == filters
    assert capfd.readouterr() == ("", "")


# Refusals


def test_non_finite_states_are_refused_and_harm_nothing(tmp_path):
    with Store(tmp_path) as store:
        store.save(1, weights(1))
        bad = {"w": jnp.array([1.0, jnp.nan, 2.0]), "h": {"b": jnp.array([jnp.inf], jnp.bfloat16)}, "n": jnp.int32(1)}
        with pytest.raises(JaxdlError) as error:
            store.save(2, bad)
        assert "step 2 is not saved" in str(error.value)
        assert "w: 1 of 3 values" in str(error.value)
        assert "h/b: 1 of 1 values" in str(error.value)
        assert not bad["w"].is_deleted()
        assert (store.steps(), sorted(os.listdir(tmp_path))) == ([1], ["1"])
        store.save(2, weights(2))
        assert store.restore(EMPTY).step == 2


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"name": "resnet"}, "name is a str, not an array of numbers"),
        ({"w": np.array(["a"])}, "w is a ndarray, not an array of numbers"),
        ({"w": jax.ShapeDtypeStruct((3,), np.float32)}, "w is abstract"),
        ({"w": np.zeros(3, ">f4")}, "w has the foreign byte order >f4"),
        ({"a.b": np.zeros(1), "a": {"b": np.zeros(1)}}, "these paths clash on disk"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path, tree, message):
    with Store(tmp_path) as store, pytest.raises(CheckpointError, match=message):
        store.save(0, tree)
    assert store.steps() == []


def test_donated_state_is_named(tmp_path):
    tree = {"w": jnp.zeros(3)}
    tree["w"].delete()
    with Store(tmp_path) as store, pytest.raises(CheckpointError, match="w was donated"):
        store.save(0, tree)


@pytest.mark.parametrize("metadata", [{"f": print}, {1: "a"}, {"a": {2: 3}}, {"a": object()}])
def test_metadata_must_be_json(tmp_path, metadata):
    with Store(tmp_path) as store, pytest.raises(CheckpointError, match="metadata must be JSON"):
        store.save(0, weights(0), metadata=metadata)


def test_saved_steps_wrong_steps_and_closed_stores_are_refused(tmp_path):
    with Store(tmp_path) as store:
        store.save(1, weights(1))
        with pytest.raises(CheckpointError, match=r"step 1 is in .* already"):
            store.save(1, weights(2))
        for step in (-1, 1.5):
            with pytest.raises(CheckpointError, match="must be a whole number"):
                store.save(step, weights(1))
        assert store.restore(EMPTY).state["w"][0] == 1
    with pytest.raises(CheckpointError, match="closed"):
        store.save(2, weights(2))
    assert store.restore(EMPTY).step == 1


def test_bad_options_are_listed_at_once(tmp_path):
    with pytest.raises(CheckpointError, match=r"3 problem\(s\)"):
        Store(tmp_path, keep_last=0, keep_best=-1, best_mode="up")


def test_another_model_is_a_mismatch_with_all_differences_and_no_walk_back(tmp_path):
    store = filled(tmp_path, [1])
    with Store(tmp_path) as more:
        more.save(2, {"dense": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}, "old": jnp.zeros(1)})
    like = {"dense": {"kernel": jnp.zeros((2, 4)), "bias": jnp.zeros(3, jnp.bfloat16), "scale": jnp.zeros(3)}}
    notes = []
    with pytest.raises(CheckpointMismatch) as error:
        store.restore(like, on_note=notes.append)
    text = str(error.value)
    assert "4 problem(s)" in text
    assert "dense/kernel is float32[2,3] in the checkpoint, float32[2,4] in the model." in text
    assert "dense/bias is float32[3] in the checkpoint, bfloat16[3] in the model." in text
    assert "dense/scale float32[3] is not in the checkpoint; nearest there: dense/bias" in text
    assert "old float32[1] is only in the checkpoint" in text
    assert notes == []
    assert not isinstance(error.value, CheckpointCorrupt)


def test_the_structure_may_depend_on_the_step(tmp_path):
    """A damaged step of another structure is passed over like any other."""
    like = {1: {"w": np.zeros(3)}, 2: {"w": np.zeros(3), "m": np.zeros(2)}}
    with Store(tmp_path) as store:
        for step in (1, 2):
            store.save(step, jax.tree.map(lambda x, step=step: x + step, like[step]))
        store.wait()
        assert store.restore(like.get).state["m"].tolist() == [2, 2]
        (tmp_path / "2" / "manifest.json").unlink()
        restored = store.restore(like.get, on_note=lambda text: None)
        assert (restored.step, [step for step, _ in restored.skipped]) == (1, [2])
        assert jax.tree.map(list, restored.state) == {"w": [1, 1, 1]}
        with pytest.raises(CheckpointMismatch, match="m float64"):
            store.restore(like[2], step=1)


def test_missing_checkpoints_are_said_plainly(tmp_path):
    with Store(tmp_path / "none") as store:
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            store.restore(EMPTY)
        assert (store.steps(), store.best_step(), store.damaged()) == ([], None, {})
    store = filled(tmp_path, [1, 2])
    with pytest.raises(CheckpointError, match=r"step 7 is not in .*; steps there: 1, 2"):
        store.restore(EMPTY, step=7)
    assert store.restore(EMPTY, step=1).state["w"][0] == 1


# Retention


@pytest.mark.parametrize(
    ("scores", "keep_last", "keep_best", "mode", "kept"),
    [
        ({1: 0.5, 2: 0.9, 3: 0.7, 4: 0.6}, 1, 1, "max", {2, 4}),
        ({1: 0.5, 2: 0.9, 3: 0.7, 4: 0.6}, 1, 1, "min", {1, 4}),
        ({1: 0.5, 2: 0.9, 3: 0.7, 4: 0.6}, 2, 2, "max", {2, 3, 4}),
        ({1: 0.5, 2: 0.9, 3: 0.7, 4: 0.6}, 2, 0, "max", {3, 4}),
        ({1: None, 2: None, 3: None}, 2, 3, "max", {2, 3}),
        ({1: 0.9, 2: None, 3: 0.9}, 1, 1, "max", {3}),
        ({5: 1.0, 10: 0.0}, None, 0, "max", {5, 10}),
        ({}, 3, 1, "max", set()),
    ],
)
def test_retention_table(scores, keep_last, keep_best, mode, kept):
    assert retained(scores, keep_last=keep_last, keep_best=keep_best, best_mode=mode) == kept


def test_last_and_best_are_kept_on_disk_and_after_reopening(tmp_path):
    options = {"keep_last": 1, "keep_best": 1, "best_metric": "accuracy"}
    with Store(tmp_path, **options) as store:
        for step, accuracy in enumerate([0.5, 0.9, float("nan"), 0.6], start=1):
            store.save(step, weights(step), metrics={"accuracy": np.float32(accuracy), "matrix": np.eye(2)})
        store.wait()
        assert (store.steps(), store.best_step()) == ([2, 4], 2)
    with Store(tmp_path, **options) as again:
        assert again.best_step() == 2
        again.save(5, weights(5))
        again.wait()
        assert again.steps() == [2, 5]
    assert sorted(os.listdir(tmp_path)) == ["2", "5"]
    assert verify(tmp_path / "2").metrics == {"accuracy": float(np.float32(0.9)), "matrix": [[1.0, 0.0], [0.0, 1.0]]}


def test_best_metric_must_be_among_the_metrics(tmp_path):
    with Store(tmp_path, best_metric="acuracy") as store:
        with pytest.raises(CheckpointError, match=r"best_metric='acuracy' is not a number .*nearest: accuracy"):
            store.save(1, weights(1), metrics={"accuracy": 0.5, "loss": 1.0})
        store.save(1, weights(1))


def test_a_damaged_checkpoint_is_not_counted_as_kept(tmp_path):
    filled(tmp_path, [1, 2, 3])
    flip(next((tmp_path / "3" / "d").iterdir()), 5)
    with Store(tmp_path, keep_last=2) as store:  # another process: it must find the damage itself before it deletes
        store.save(4, weights(4))
        store.wait()
        assert store.steps() == [2, 4]
        assert sorted(os.listdir(tmp_path)) == ["2", "3", "4"]
        assert list(store.damaged()) == [3]


def test_a_damaged_step_is_replaced_when_it_is_saved_again(tmp_path):
    filled(tmp_path, [1, 2])
    flip(next((tmp_path / "2" / "d").iterdir()), 5)
    with Store(tmp_path) as store:
        assert store.restore(EMPTY, on_note=lambda note: None).step == 1
        assert store.steps() == [1]
        store.save(2, weights(22))
        assert store.restore(EMPTY).state["w"][0] == 22
        assert store.steps() == [1, 2]
    with Store(tmp_path) as again:
        shutil.rmtree(tmp_path / "2" / "d")
        again.save(2, weights(23))  # nobody has restored it: the save looks for itself
        assert again.restore(EMPTY).state["w"][0] == 23


def test_saving_below_the_newest_step_never_deletes_what_was_just_saved(tmp_path):
    filled(tmp_path, [10, 20])
    with Store(tmp_path, keep_last=1) as store:
        store.save(15, weights(15))
        store.wait()
        assert store.steps() == [15, 20]


def test_leftovers_of_killed_processes_are_swept(tmp_path):
    for name in (
        "1.deleting",
        "2.orbax-checkpoint-tmp",
        "9.orbax-checkpoint-tmp",
        "notes.deleting",
        "3.txt.deleting.d",
    ):
        (tmp_path / name / "d").mkdir(parents=True)
    filled(tmp_path, [2, 3])
    assert sorted(os.listdir(tmp_path)) == ["2", "3", "3.txt.deleting.d", "9.orbax-checkpoint-tmp", "notes.deleting"]


# Damage


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Steps 1 and 2 of a realistic state."""
    directory = tmp_path_factory.mktemp("pristine")
    with Store(directory) as store:
        store.save(1, create(1), metadata={"note": "one"})
        store.save(2, create(2), metadata={"note": "two"}, metrics={"loss": 0.5})
    return directory


def copy_of(pristine, directory):
    shutil.copytree(pristine, directory, dirs_exist_ok=True)
    return directory / "2"


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def assert_falls_back(directory, *, damaged=2):
    notes = []
    store = Store(directory)
    restored = store.restore(jax.eval_shape(create), on_note=notes.append)
    assert (restored.step, restored.metadata) == (1, {"note": "one"})
    assert bits(restored.state) == bits(create(1))
    assert [step for step, _ in restored.skipped] == [damaged]
    assert len(notes) == 1
    assert notes[0].startswith(f"The checkpoint of step {damaged} in {directory} is damaged")
    assert store.steps() == [1]
    return restored.skipped[0][1]


def test_every_one_of_100_flipped_bytes_is_detected(pristine, tmp_path):
    folder, like = copy_of(pristine, tmp_path), jax.eval_shape(create)
    random = np.random.default_rng(0)
    files = [path for path in files_of(folder) if path.stat().st_size]
    for i in range(100):
        path = files[i % len(files)]
        original = path.read_bytes()
        flip(path, int(random.integers(len(original))), int(random.integers(8)))
        with pytest.raises(CheckpointCorrupt, match=path.name):
            verify(folder)
        if i < len(files):
            assert path.name in assert_falls_back(tmp_path)
        path.write_bytes(original)
    assert Store(tmp_path).restore(like).step == 2


def test_flips_that_only_the_leaf_hashes_can_see(pristine, tmp_path, monkeypatch):
    """Memory that differs from what Orbax reads back, with every file intact."""
    copy_of(pristine, tmp_path)
    real = disk.read

    def wrong(folder, records):
        arrays = real(folder, records)
        if folder.name == "2":
            arrays["params/body/kernel"][1, 1] += 1e-6
        return arrays

    monkeypatch.setattr(disk, "read", wrong)
    assert assert_falls_back(tmp_path) == "not the values that were saved: params/body/kernel"


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_and_empty_files_are_detected(pristine, tmp_path, keep):
    for i in range(len(files_of(pristine / "2"))):
        folder = copy_of(pristine, tmp_path)
        path = files_of(folder)[i]
        os.truncate(path, int(path.stat().st_size * keep))
        with pytest.raises(CheckpointCorrupt, match=path.name):
            verify(folder)
    assert_falls_back(tmp_path)


def test_deleted_files_and_folders_are_detected(pristine, tmp_path):
    for name in [path.relative_to(pristine / "2") for path in files_of(pristine / "2")]:
        folder = copy_of(pristine, tmp_path)
        (folder / name).unlink()
        with pytest.raises(CheckpointCorrupt, match=name.name):
            verify(folder)
    assert_falls_back(tmp_path)
    shutil.rmtree(folder)
    folder.mkdir()
    assert assert_falls_back(tmp_path).startswith("no manifest.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"digest": 3}', "{}\n", "\x00" * 40, '{"a":' * 5000])
def test_garbled_manifests_are_damage(pristine, tmp_path, text):
    (copy_of(pristine, tmp_path) / "manifest.json").write_text(text)
    assert "manifest.json" in assert_falls_back(tmp_path)


def test_manifests_that_are_not_text_or_not_files_are_damage(pristine, tmp_path):
    manifest = copy_of(pristine, tmp_path) / "manifest.json"
    manifest.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in assert_falls_back(tmp_path)
    manifest.unlink()
    manifest.mkdir()
    assert "cannot be read" in assert_falls_back(tmp_path)


def test_stray_entries_are_ignored(pristine, tmp_path):
    copy_of(pristine, tmp_path)
    (tmp_path / "3").write_text("a file")
    (tmp_path / "007").mkdir()
    (tmp_path / "best").mkdir()
    (tmp_path / "2" / ".DS_Store").write_text("x")
    assert Store(tmp_path).restore(jax.eval_shape(create), on_note=pytest.fail).step == 2
    (tmp_path / "11").mkdir()
    assert assert_newest(tmp_path) == (2, [11])


def assert_newest(directory):
    restored = Store(directory).restore(jax.eval_shape(create), on_note=lambda note: None)
    return restored.step, [step for step, _ in restored.skipped]


def test_a_half_copied_and_a_renamed_folder_do_not_count(pristine, tmp_path):
    copy_of(pristine, tmp_path)
    half = files_of(pristine / "2")[::2]
    for path in half:
        target = tmp_path / "5" / path.relative_to(pristine / "2")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    shutil.copytree(pristine / "1", tmp_path / "4")
    restored = Store(tmp_path).restore(jax.eval_shape(create), on_note=lambda note: None)
    assert restored.step == 2
    assert dict(restored.skipped)[4] == "the folder 4 holds step 1"
    assert 5 in dict(restored.skipped)


def test_no_intact_step_left_is_one_error_that_lists_each(pristine, tmp_path):
    folder = copy_of(pristine, tmp_path)
    (folder / "manifest.json").unlink()
    flip(files_of(tmp_path / "1")[-1], 0)
    with pytest.raises(CheckpointCorrupt) as error:
        Store(tmp_path).restore(jax.eval_shape(create), on_note=lambda note: None)
    assert "2 problem(s)" in str(error.value)
    assert "step 2: no manifest.json" in str(error.value)
    assert f"step 1: {files_of(tmp_path / '1')[-1].relative_to(tmp_path / '1')}" in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None


def test_a_named_step_is_not_replaced_by_another(pristine, tmp_path):
    folder = copy_of(pristine, tmp_path)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointCorrupt, match=r"step 2 in .*no manifest.json.* Other steps there: 1\."):
        Store(tmp_path).restore(jax.eval_shape(create), step=2)


def test_any_error_of_orbax_is_damage(pristine, tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    def explode(self, folder, **_):
        if folder.name == "2":
            raise Exception("Encountered error while reading array index (0, 0)")
        return original(self, folder, **_)

    original = ocp.Checkpointer.restore
    copy_of(pristine, tmp_path)
    monkeypatch.setattr(ocp.Checkpointer, "restore", explode)
    assert "Encountered error while reading" in assert_falls_back(tmp_path)


# Failing saves


def test_a_failed_background_save_is_raised_once_and_later_saves_work(tmp_path, monkeypatch):
    def full(folder, manifest):
        raise OSError(28, "No space left on device")

    with Store(tmp_path) as store:
        store.save(1, weights(1))
        store.wait()
        for raiser in (store.wait, store.check, lambda: store.save(3, weights(3))):
            with monkeypatch.context() as patch:
                patch.setattr("jaxdl.checkpoint.manifest.write", full)
                store.save(2, weights(2))
                store._settle()
            with pytest.raises(
                JaxdlError, match=r"step 2 .*No space left on device.* Earlier checkpoints are intact"
            ) as error:
                raiser()
            assert error.value.__suppress_context__
            store.check()
            assert sorted(os.listdir(tmp_path)) == ["1"]
        store.save(2, weights(22))
        assert store.restore(EMPTY).state["w"][0] == 22
        assert store.steps() == [1, 2]


def test_the_only_checkpoint_is_deleted_only_when_the_next_is_complete(tmp_path, monkeypatch):
    existing = []
    real = disk.Writer.wait

    def look(writer):
        real(writer)
        existing.append(sorted(os.listdir(tmp_path)))

    monkeypatch.setattr(disk.Writer, "wait", look)
    filled(tmp_path, [1, 2, 3], keep_last=1)
    assert existing == [["1"], ["1", "2"], ["2", "3"]]
    assert os.listdir(tmp_path) == ["3"]


def test_a_deletion_that_fails_is_said_and_the_new_step_counts(tmp_path, monkeypatch):
    def refuse(directory, **_):
        raise OSError("busy")

    with Store(tmp_path, keep_last=1) as store:
        monkeypatch.setattr("jaxdl.checkpoint.folders.sweep", refuse)
        store.save(1, weights(1))
        with pytest.raises(CheckpointError, match="step 1 is saved, but an older one cannot be deleted: busy"):
            store.wait()
        assert store.steps() == [1]


FULL = """
import resource, warnings
small, big = {"w": jnp.ones(3)}, {"w": jax.random.normal(jax.random.key(0), (300_000,))}
store.save(1, small); store.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
store.save(2, big)
try:
    store.wait()
except Exception as error:
    print(type(error).__name__, error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.save(3, big); store.wait()
print(store.steps(), sorted(os.listdir(store.directory)))
store.close()
"""


def test_a_file_that_cannot_grow_is_a_clear_error_and_the_process_goes_on(tmp_path):
    process = child(tmp_path, FULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    first, second = out.splitlines()
    assert first.startswith("CheckpointError step 2 could not be saved in")
    assert "Earlier checkpoints are intact" in first
    assert second == "[1, 3] ['1', '3']"
    assert (process.returncode, err) == (0, "")


def test_a_file_in_place_of_the_directory_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("x")
    with Store(tmp_path / "file") as store:
        with pytest.raises(JaxdlError, match="step 0 could not be saved"):
            store.save(0, weights(0))
        (tmp_path / "file").unlink()
        store.save(0, weights(0))
        store.wait()
        assert store.steps() == [0]


def test_a_directory_that_vanishes_while_saving_does_not_stop_later_saves(tmp_path):
    with Store(tmp_path / "runs") as store:
        store.save(0, weights(0))
        store.wait()
        shutil.rmtree(tmp_path / "runs")
        store.save(1, weights(1))
        assert store.restore(EMPTY).step == 1


def test_an_error_in_the_block_is_not_hidden_by_a_failed_save(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxdl.checkpoint.manifest.write", lambda *_: (_ for _ in ()).throw(OSError("full")))

    def fail_inside():
        with Store(tmp_path) as store:
            store.save(0, weights(0))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as error:
        fail_inside()
    assert "step 0 could not be saved" in error.value.__notes__[0]
    with pytest.raises(CheckpointError, match="full"), Store(tmp_path) as store:
        store.save(0, weights(0))


SAVING = """
for step in range(1, 1000):
    store.save(step, {"w": jnp.full(300_000, step, jnp.float32), "v": jnp.full(10, step, jnp.float32)})
    print(step, flush=True)
"""


@pytest.mark.parametrize("delay_ms", [0, 10, 25, 60])
def test_kill_during_saves_leaves_a_restorable_store(tmp_path, delay_ms):
    with child(tmp_path, SAVING, stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            if int(line) == 3:  # saves 1 and 2 are complete, as each waits for the one before
                break
        time.sleep(delay_ms / 1000)
        process.send_signal(signal.SIGKILL)
    like = {"w": jnp.zeros(300_000), "v": jnp.zeros(10)}
    with Store(tmp_path) as store:
        restored = store.restore(like, on_note=lambda note: None)
        assert restored.step >= 2
        np.testing.assert_array_equal(restored.state["w"], restored.step)
        store.save(restored.step + 1, weights(0))
        store.wait()
        assert restored.step + 1 in store.steps()
        assert all(step > restored.step for step in store.damaged())


def test_leaving_without_close_loses_at_most_the_last_save(tmp_path):
    body = 'store.save(1, {"w": jnp.ones(3)}); store.save(2, {"w": jnp.ones(3)})'
    process = child(tmp_path, body)
    assert process.wait(timeout=60) == 0
    assert Store(tmp_path).restore(EMPTY, on_note=lambda note: None).step in (1, 2)


def test_paths_of_any_kind_name_the_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled("relative", [1])
    assert Store(Path("relative")).restore(EMPTY).step == 1
