"""What is refused before anything is begun: exit code 2, one message, nothing on the disk changed."""

import gzip
import shutil
import socket
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import regress_table
from jaxdl.command import run_command
from tests.faults import evidence
from tests.faults.conftest import Ended, ended


def refused(done: Ended, *words: str, code: int = 2) -> None:
    """One message with all these words, no traceback, and this exit code."""
    assert done.code == code, done.err
    assert "Traceback" not in done.err + done.out
    assert done.err.count("error: ") == 1, done.err
    missing = [word for word in words if word not in done.err]
    assert not missing, f"{missing} not in {done.err}"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.loop.lenght", "5"], ["--config.loop.lenght", "no such field", "--config.loop.length", "--help"]),
        (["--confg.seed", "5"], ["--confg.seed", "no such flag", "--config.seed"]),
        (["--config.data.batch_size", "many"], ["--config.data.batch_size='many'", "int"]),
        (["--config.loop.length", "banana"], ["banana", "500 steps", "0.5 epochs"]),
        (["--config.data.name", "imagenet"], ["'imagenet'", "'digits'", "'fashion_mnist'", "'folder'"]),
        (["--config.hardware.microbatches", "5"], ["batch_size=32", "microbatches=5", "does not divide"]),
        (["--config.data.validation", "1"], ["validation=1.0", "[0, 1)"]),
        (["--config.optimizer.name", "adamm"], ["adamm", "adam"]),
        (["--config.data.name", "folder"], ["needs directory and test_directory"]),
        (["--config.data.directory", "nowhere"], ["'nowhere'", "is not a folder"]),
    ],
)
def test_the_command_line_is_checked_before_any_data_is_read(command, empty, flags, words):
    refused(command(*flags), *words)
    assert not empty.exists()


def test_every_problem_is_listed_at_once(command, empty):
    done = command("--config.sed", "1", "--config.seed", "-1", "--config.hardware.microbatches", "5", "--config.out")
    refused(done, "--config.sed", "seed=-1", "microbatches=5", "4 problem(s)")


def test_a_rule_that_matches_nothing_names_the_nearest_path(command, empty):
    done = command("--config.trainable", "(('haed/.*', True), ('.*', False))")
    refused(done, "'haed/.*' matches nothing", "head/kernel")
    assert not empty.exists()


def test_a_batch_that_does_not_divide_over_devices_leaves_no_configuration_behind(command, empty):
    refused(command("--config.parallel.mesh", "data=3"), "batch_size=32", "3 devices", "multiple")
    assert not (empty / "config.json").exists()
    assert command("--config.loop.length", "5 steps").code == 0


def test_more_devices_than_there_are(command, empty):
    refused(command("--config.parallel.mesh", "data=64"), "data=64", "needs 64 devices and there are 8")


def test_a_held_out_part_without_rows(command, empty):
    refused(command("--config.data.validation", "0.0001"), "fraction=0.0001 of 1442 rows", "neither side may be empty")
    assert not empty.exists()


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_run_folder_that_cannot_be_written(command, empty, place):
    Path("file").write_text("in the way")
    refused(command("--config.out", place), f"the run folder {place} cannot be written", "choose another")
    assert Path("file").read_text() == "in the way"


def test_a_missing_config_file_in_a_real_process(start):
    name = str(evidence.ROOT / "configs" / "digits_cn.py")
    refused(ended(start("--config", name)), name, "it is not there", "digits_cnn.py")


# Data that is not there, or not what it should be.


def write_idx(folder: Path, part: str, n: int, labels: list[int]) -> None:
    """Two gzipped IDX files of `n` images of 4 x 4 pixels."""
    image = np.random.default_rng(0).integers(0, 256, (n, 4, 4), np.uint8)
    for kind, array in (("images-idx3", image), ("labels-idx1", np.array(labels, np.uint8))):
        header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        with gzip.open(folder / f"{part}-{kind}-ubyte.gz", "wb") as file:
            file.write(header + array.tobytes())


@pytest.fixture
def idx(tmp_path, monkeypatch):
    folder = tmp_path / "idx"
    folder.mkdir()
    monkeypatch.setenv("JAXDL_FASHION_MNIST_DIR", str(folder))
    write_idx(folder, "train", 64, [i % 10 for i in range(64)])
    write_idx(folder, "t10k", 8, list(range(8)))
    return folder


FASHION = ("--config.data.name", "fashion_mnist")


def test_the_generated_files_train_when_nothing_is_wrong_with_them(command, empty, idx):
    assert command(*FASHION, "--config.loop.length", "2").code == 0


def test_files_that_are_missing(command, empty, idx):
    (idx / "t10k-labels-idx1-ubyte.gz").unlink()
    done = command(*FASHION)
    refused(done, "t10k-labels-idx1-ubyte.gz not found", str(idx), "dataset-fashion-mnist", "JAXDL_FASHION_MNIST_DIR")
    assert not empty.exists()


def test_a_truncated_file(command, empty, idx):
    path = idx / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:200])
    refused(command(*FASHION), str(path), "truncated", "get it again")


@pytest.mark.parametrize("part", ["train", "t10k"])
def test_labels_out_of_range(command, empty, idx, part):
    n = 64 if part == "train" else 8
    write_idx(idx, part, n, [0] * (n - 1) + [17])
    refused(command(*FASHION), "label 17", f"row {n - 1}", "0..9", "correct the labels")
    assert not empty.exists()


@pytest.mark.parametrize("part", ["train", "t10k"])
def test_a_part_without_rows(command, empty, idx, part):
    write_idx(idx, part, 0, [])
    refused(command(*FASHION), "empty")
    assert not empty.exists()


def pictures(folder: Path, classes: dict[str, int]) -> None:
    from PIL import Image

    for name, n in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(np.full((4, 4, 3), 40 * i, np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture
def images(empty):
    """Flags for two folders of images with the classes `cat` and `dog`."""
    pictures(Path("train"), {"cat": 4, "dog": 4})
    pictures(Path("test"), {"cat": 2, "dog": 2})
    words = "--config.data.name folder --config.data.directory train --config.data.test_directory test"
    return (*words.split(), "--config.data.batch_size", "4", "--config.loop.length", "2")


def test_image_folders_train_when_nothing_is_wrong_with_them(command, images):
    assert command(*images).code == 0


def test_an_image_folder_with_a_class_that_was_not_trained(command, images):
    pictures(Path("test"), {"eel": 1})
    refused(command(*images), "('cat', 'dog')", "('cat', 'dog', 'eel')", "use the same names")


def test_an_image_folder_with_an_empty_class(command, images):
    Path("train/eel").mkdir()
    refused(command(*images), "no images in eel", "add some or remove the folder")


def test_an_image_that_is_broken(command, images, empty):
    Path("train/dog/3.png").write_bytes(b"not an image")
    refused(command(*images), "train/dog/3.png", "repair or remove")
    assert not (empty / "checkpoints").exists()


def table(command, text: str) -> Ended:
    Path("prices.csv").write_text(text)
    flags = "--config.data.train prices.csv --config.data.target price --config.out run --config.loop.length 2"

    def entry() -> int:
        return run_command(regress_table.Config, regress_table.experiment, flags.split())

    return command(entry=entry)


HEADER, ROWS = "size,price\n", "".join(f"{i},{2 * i}\n" for i in range(1, 41))


@pytest.mark.parametrize("value", ["nan", ""])
def test_a_target_that_is_missing(command, empty, value):
    refused(table(command, f"{HEADER}{ROWS}7,{value}\n"), "price", "40")
    assert not empty.exists()


def test_a_feature_that_is_infinite(command, empty):
    refused(table(command, f"{HEADER}{ROWS}inf,7\n"), "size", "40")
    assert not empty.exists()


def test_a_table_without_rows(command, empty):
    refused(table(command, HEADER), "prices.csv")
    assert not empty.exists()


def test_no_network_and_a_data_set_that_is_not_prepared(command, empty, tmp_path, monkeypatch):
    """Nothing even tries to connect; a connection would hang longer than the test allows."""
    tried: list[object] = []

    def hang(*args: object, **_: object) -> None:
        tried.append(args)
        time.sleep(30)
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", hang)
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    directory = tmp_path / "tfds"
    directory.mkdir()
    flags = ("--config.data.name", "tfds", "--config.data.directory", str(directory), "--config.data.tfds_name")
    done = command(*flags, "mnist")
    refused(done, "'mnist' is not prepared", str(directory), "tfds build mnist", "downloads nothing")
    assert done.seconds < 15
    done = command(*flags, "mnits")
    refused(done, "knows no data set 'mnits'", "mnist")
    assert done.seconds < 15
    assert not tried
    assert not empty.exists()


# A run folder with another configuration or another model.


def test_another_configuration_is_refused_field_by_field(command, run):
    before = (run / "config.json").read_bytes()
    done = command("--config.seed", "3", "--config.optimizer.learning_rate", "0.5")
    refused(done, "0.001 -> 0.5", "--resume.allow optimizer.learning_rate seed")
    assert "0 -> 3" in " ".join(done.err.split())
    assert (run / "config.json").read_bytes() == before


def test_a_checkpoint_of_another_model_keeps_the_run_as_it_was(command, run, trained):
    done = command("--config.model.widths", "9", "--resume.allow", "model")
    refused(done, "not a checkpoint of this model", "params/dense_0/kernel is float32[64,8]", "float32[64,9]")
    assert (run / "config.json").read_bytes() == (trained / "config.json").read_bytes()
    assert evidence.damage(run) == {}
    shutil.rmtree(run / "checkpoints" / "20")
    assert command().code == 0, "the first command goes on as if the second had not been given"
    assert evidence.state(run) == evidence.state(trained)


def test_a_config_file_that_is_damaged(command, run):
    (run / "config.json").write_text('{"seed": ')
    refused(command(), "run/config.json", "Restore it from a backup")
    assert evidence.steps(run) == [10, 15, 20]
