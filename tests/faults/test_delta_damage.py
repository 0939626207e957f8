"""What breaks a delta: single flipped bits, lost files, a save that was cut off, a base that is not the one."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl import create_state
from jaxdl.checkpoint import CheckpointCorrupt, CheckpointMismatch, Store
from jaxdl.finetune import delta_folder
from jaxdl.finetune.contract import Frozen
from jaxdl.finetune.delta import DeltaStore, load_delta, save_delta
from jaxdl.paths import flatten
from tests.faults.prove_flips import Flip, draw, flip

RULES = [("head", True), (".*", False)]
PARAMS = {"body": jnp.asarray(np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)), "head": jnp.ones(64)}
FROZEN = Frozen(PARAMS, {}, RULES)
STATE = create_state(PARAMS, {}, optax.adam(0.1), rng=jax.random.key(0), trainable=RULES)


def at(step):
    head = jnp.asarray(np.random.default_rng(step).normal(size=64).astype(np.float32))
    return STATE.replace(step=jnp.int32(step), params={**PARAMS, "head": head})


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Two delta checkpoints, not to be changed."""
    folder = tmp_path_factory.mktemp("steps")
    with DeltaStore(Store(folder), FROZEN) as store:
        for step in (1, 2):
            store.save(step, at(step))
    return folder


@pytest.fixture(scope="module")
def delta(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given") / "delta"
    save_delta(folder, at(1).params, {}, FROZEN)
    return folder


def restored(folder, **options):
    notes = []
    got = DeltaStore(Store(folder), FROZEN).restore(STATE, on_note=notes.append, **options)
    for path, leaf in flatten(got.state.params).items():
        np.testing.assert_array_equal(leaf, flatten(at(got.step).params)[path])
    return got, "".join(notes)


@pytest.mark.parametrize("one", range(30))
def test_a_flipped_bit_of_a_delta_checkpoint_is_found_and_the_step_before_is_restored(steps, tmp_path, one):
    change = draw(steps / "2", 30, seed=3)[one]
    shutil.copytree(steps, tmp_path, dirs_exist_ok=True)
    flip(tmp_path / "2" / change.name, offset=change.offset, bit=change.bit)
    got, notes = restored(tmp_path)
    assert (got.step, [step for step, _ in got.skipped]) == (1, [2])
    assert "checkpoint of step 2" in notes
    with pytest.raises(CheckpointCorrupt, match="step 2 in"):
        restored(tmp_path, step=2)


def test_without_a_flip_the_newest_step_is_restored(steps):
    got, notes = restored(steps)
    assert (got.step, got.skipped, notes) == (2, (), "")


def test_flips_in_both_steps_end_in_one_error(steps, tmp_path):
    shutil.copytree(steps, tmp_path, dirs_exist_ok=True)
    for step in ("1", "2"):
        (tmp_path / step / "manifest.json").unlink()
    with pytest.raises(CheckpointCorrupt, match=r"no intact checkpoint: 2 problem[\s\S]*step 2[\s\S]*step 1"):
        restored(tmp_path)
    assert set(DeltaStore(Store(tmp_path), FROZEN).damaged()) == {1, 2}


@pytest.mark.parametrize("one", range(20))
def test_a_flipped_bit_of_a_delta_folder_is_found(delta, tmp_path, one):
    """A flip in the recorded base, too, is damage and not another base."""
    change = draw(delta, 20, seed=5)[one]
    copy = Path(shutil.copytree(delta, tmp_path / "delta"))
    flip(copy / change.name, offset=change.offset, bit=change.bit)
    with pytest.raises(CheckpointCorrupt, match=r"delta: .*Fetch the delta again"):
        load_delta(copy, PARAMS)


def test_the_flips_hit_every_file(delta, steps):
    for folder, n, seed in ((delta, 20, 5), (steps / "2", 30, 3)):
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert {change.name for change in draw(folder, n, seed=seed)} == files
        assert isinstance(draw(folder, n, seed=seed)[0], Flip)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [cut, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_short_and_lost_files_are_found(delta, tmp_path, harm, name):
    copy = Path(shutil.copytree(delta, tmp_path / "delta"))
    harm(copy / name)
    with pytest.raises(CheckpointCorrupt, match="Fetch the delta again"):
        load_delta(copy, PARAMS)


def test_a_delta_that_could_not_be_finished_leaves_nothing(tmp_path, monkeypatch):
    """A full disk while the manifest, the last file, is written; then the same call again."""

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(delta_folder.manifests, "write", full)
        with pytest.raises(OSError, match="No space left"):
            save_delta(tmp_path / "delta", PARAMS, {}, FROZEN)
    assert list(tmp_path.iterdir()) == []
    save_delta(tmp_path / "delta", PARAMS, {}, FROZEN)
    assert load_delta(tmp_path / "delta", PARAMS)[0].keys() == PARAMS.keys()


@pytest.mark.parametrize("bit", [0, 31])
def test_one_bit_of_the_base_is_another_base(steps, delta, bit):
    """The least and the most significant bit of one weight: the leaf is named, and nothing is walked back over."""
    flipped = np.array(PARAMS["body"]).view(np.uint32)
    flipped[3, 5] ^= np.uint32(1) << np.uint32(bit)
    base = {**PARAMS, "body": jnp.asarray(flipped.view(np.float32))}
    other = DeltaStore(Store(steps), Frozen(base, {}, RULES))
    with pytest.raises(CheckpointMismatch, match=r"step 2 .* another base: 1 problem[\s\S]*params/body has sha256"):
        other.restore(STATE.replace(params=base))
    with pytest.raises(CheckpointMismatch, match="params/body has sha256"):
        load_delta(delta, base)
