"""What breaks a run under way, or what it has saved: exit code 1 or none, and no saved work is lost."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults import evidence
from tests.faults.conftest import ended
from tests.faults.prove_flips import flip
from tests.faults.test_refused import refused


def largest(folder: Path) -> Path:
    return max((path for path in (folder / "ocdbt.process_0" / "d").iterdir()), key=lambda path: path.stat().st_size)


def flip_data(folder: Path) -> None:
    flip(largest(folder), offset=largest(folder).stat().st_size // 2, bit=3)


def flip_manifest(folder: Path) -> None:
    flip(folder / "manifest.json", offset=700, bit=0)


def truncate_data(folder: Path) -> None:
    path = largest(folder)
    path.write_bytes(path.read_bytes()[:-1])


def remove_data(folder: Path) -> None:
    largest(folder).unlink()


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = [flip_data, flip_manifest, truncate_data, remove_data, remove_manifest, empty_folder]


@pytest.mark.parametrize("harm", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_step_before_goes_on(command, run, trained, harm, monkeypatch):
    """The end is that of the run that nothing disturbed, and the damaged folder is replaced by a good one."""
    monkeypatch.setattr("experiments.classify_images.write_report", lambda path, report: path)
    harm(run / "checkpoints" / "20")
    done = command()
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    assert "checkpoint of step 20" in done.err
    assert "damaged, going back to an older one" in done.err
    assert "resumed from the checkpoint of step 15" in done.err
    assert evidence.state(run) == evidence.state(trained)
    assert evidence.metric_log(run) == evidence.metric_log(trained)
    assert evidence.damage(run) == {}


def test_the_only_checkpoint_left_is_damaged(command, half):
    """Every damaged step is listed with its damage; nothing is deleted, so that it can be repaired from a copy."""
    flip_data(half / "checkpoints" / "10")
    done = command()
    refused(done, "holds no intact checkpoint", "step 10")
    assert (half / "checkpoints" / "10" / "manifest.json").exists()


def test_the_damaged_metric_log_is_named(command, half):
    path = half / "metrics.jsonl"
    path.write_text("not a row\n" + path.read_text())
    refused(command(), "metrics.jsonl")
    assert evidence.damage(half) == {}


def test_a_torn_last_line_of_the_metric_log_is_cut_off(command, half, trained):
    """What `kill -9` leaves in the middle of a write."""
    with (half / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "trai')
    assert command().code == 0
    assert evidence.metric_log(half) == evidence.metric_log(trained)


def test_a_full_file_system_while_saving(half, trained, start, monkeypatch):
    """Files beyond 4 KiB fail, as on a full disk: the array data and the manifest of the next checkpoint do not fit."""
    before = evidence.state(half)
    limited = ("sh", "-c", 'ulimit -f 8; exec "$@"', "sh")
    with monkeypatch.context() as patch:
        patch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")  # the limit would cut its entries off
        done = ended(start("--config", evidence.TINY_MLP, before=limited))
    refused(done, "step 15 could not be saved in", "Earlier checkpoints are intact", "full disk", code=1)
    assert evidence.steps(half) == [10]
    assert evidence.damage(half) == {}
    assert evidence.state(half) == before
    again = ended(start("--config", evidence.TINY_MLP))
    assert again.code == 0, again.err
    assert "resumed from the checkpoint of step 10" in again.err
    assert evidence.state(half) == evidence.state(trained)


@pytest.fixture
def small_disk(empty):
    """The run folder's parent, on a file system of its own with room for two checkpoints."""
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=176k", "none", str(empty.parent)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield empty
    subprocess.run(["umount", "-l", str(empty.parent)], check=True)


def test_a_full_disk_while_saving(small_disk, start):
    """The real thing, ENOSPC, where the machine lets a test mount a small file system."""
    done = ended(
        start("--config", evidence.TINY_MLP, "--config.loop.checkpoint_every", "1", "--config.loop.keep_last=9")
    )
    refused(done, "could not be saved in", "Earlier checkpoints are intact", "full disk", code=1)
    assert evidence.steps(small_disk)
    assert evidence.damage(small_disk) == {}


def test_a_disk_that_is_full_when_a_metric_row_is_written(command, half, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxdl.report.writers.JsonlWriter.write", full)
    refused(command(), "No space left on device", "Free space", "intact", code=1)
    assert evidence.damage(half) == {}
    monkeypatch.undo()


def test_a_parameter_that_becomes_nan_in_a_real_process(empty, start):
    """The state before the step is kept, and the message names the step, the rows and the leaves."""
    done = ended(start("--config", evidence.TINY_MLP, "--config.optimizer.learning_rate", "1e38"))
    refused(done, "step 1 produced a non-finite value", "for rows", "head/kernel", "Remedy", code=1)
    assert evidence.steps(empty) == [1]
    assert evidence.damage(empty) == {}


def test_a_nan_run_goes_on_from_the_kept_state_when_the_guard_may_skip(command, empty):
    """Only the guard may change here: the rate is so high that every step from the kept one on is skipped."""
    assert command("--config.optimizer.learning_rate", "1e38").code == 1
    before = evidence.state(empty)
    flags = ("--config.optimizer.learning_rate", "1e38", "--config.loop.guard", "skip", "--resume.allow", "loop.guard")
    done = command(*flags)
    assert "Traceback" not in done.err
    assert "resumed from the checkpoint of step 1" in done.err
    after = evidence.state(empty)
    assert after.step == 20
    assert after.parts["params"] == before.parts["params"]
    assert after.parts["opt_state"] == before.parts["opt_state"]


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
def test_a_cache_entry_that_a_kill_cut_off_is_compiled_again(command, empty, tmp_path, monkeypatch):
    """The cache of compiled programs is no saved work: half an entry costs a compilation and a warning, not the run."""
    from jax.experimental.compilation_cache import compilation_cache

    cache = tmp_path / "cache"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    monkeypatch.setattr("experiments.classify_images.write_report", lambda path, report: path)
    for out in ("one", "two"):
        compilation_cache.reset_cache()
        assert command("--config.loop.length", "1", "--config.out", out).code == 0
        entries = list(cache.glob("*-cache"))
        for path in entries:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    compilation_cache.reset_cache()
    assert entries
    assert evidence.state(tmp_path / "one") == evidence.state(tmp_path / "two")
