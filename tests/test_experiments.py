"""Every shipped config, run for a few steps on data of its own shape; and what a run leaves behind."""

import ast
import gzip
import inspect
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import classify_images, images, regress_table, settings
from jaxdl import models
from jaxdl.command import run_command
from jaxdl.config import ConfigError, parse
from jaxdl.report import read_history

CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
    if "experiments.classify_images import" in path.read_text()
    or "experiments.regress_table import" in path.read_text()
]
RNG = np.random.default_rng(0)


def idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """Fashion-MNIST and CIFAR-10 of a few random pictures, in their real file formats."""
    folder = tmp_path_factory.mktemp("data")
    for part, n in (("train", 64), ("t10k", 32)):
        idx(folder / f"{part}-images-idx3-ubyte.gz", RNG.integers(0, 256, (n, 28, 28), np.uint8))
        idx(folder / f"{part}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8) % 10)
    record = np.concatenate([np.arange(20)[:, None] % 10, RNG.integers(0, 256, (20, 3072))], 1).astype(np.uint8)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / f"{name}.bin").write_bytes(record.tobytes())
    return folder


def module_of(config):
    return regress_table if "regress_table" in config.read_text() else classify_images


def run(module, flags):
    return run_command(module.Config, module.experiment, [*flags, "--config.parallel.mesh=data=1"])


DIGITS_MLP = Path(__file__).parents[1] / "configs" / "digits_mlp.py"


def flags_of(config, data, out):
    flags = [f"--config={config}", f"--config.out={out}", "--config.loop.length=2", "--config.optimizer.warmup=1"]
    flags += ["--config.loop.eval_every=100", "--config.loop.checkpoint_every=100"]
    flags += ["--config.loop.log_every=1", "--config.data.batch_size=16", "--config.data.eval_batch_size=32"]
    if "cifar10" in config.name:
        flags += [f"--config.data.directory={data}", "--config.model.width=8"]
    if "resnet" in config.name:
        flags += ["--config.model.stage_sizes=1,1", "--config.model.width=8"]
    return list(dict.fromkeys(flags))


def marked(path):
    return pytest.param(path, id=path.stem, marks=[] if path.stem.startswith("digits") else pytest.mark.proof)


@pytest.mark.parametrize("config", [marked(path) for path in CONFIGS])
def test_the_shipped_config_runs(config, small_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXDL_FASHION_MNIST_DIR", str(small_data))
    module = module_of(config)
    assert run(module, flags_of(config, small_data, tmp_path)) == 0
    out = capsys.readouterr().out
    assert f"report        {tmp_path}/report.html" in out
    assert (tmp_path / "checkpoints" / "2" / "manifest.json").exists()
    history = read_history(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in history if "train/loss" in row] == [1, 2]
    assert np.isfinite([row["train/loss"] for row in history if "train/loss" in row]).all()
    assert json.loads((tmp_path / "config.json").read_text())["loop"]["length"] == "2 steps"
    assert {"jax", "python", "git"} <= json.loads((tmp_path / "environment.json").read_text()).keys()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_docstring_says_how_to_run_it(config):
    text = ast.get_docstring(ast.parse(config.read_text()))
    module = module_of(config).__name__
    assert f"python -m {module} --config configs/{config.name}" in text


@pytest.mark.parametrize(
    "flags",
    [
        "data.flip=true data.cutout_size=2 data.mixup_alpha=0.2",
        "data.cutmix_alpha=1.0 optimizer.ema_decay=0.9 data.validation=0.1",
        "hardware.compute_dtype=bfloat16 hardware.microbatches=2 optimizer.l1=1e-4",
        "hardware.compute_dtype=float16 loop.guard=skip optimizer.clip_norm=1.0",
        "optimizer.name=sgd optimizer.weight_decay=0 optimizer.plateau_patience=2",
        "trainable=(('head/.*',True),('.*',False)) focal_gamma=2.0 loop.profile=true",
        "data.validation=0.2 loop.early_stopping_patience=1 optimizer.schedule=one_cycle",
    ],
)
def test_options_work_together(flags, tmp_path, capsys):
    sections = [f"--config.{flag}" for flag in flags.split()]
    assert run(classify_images, [*flags_of(DIGITS_MLP, None, tmp_path), *sections]) == 0


def test_frozen_parameters_are_in_the_table_and_the_checkpoint_as_they_were(tmp_path, capsys):
    rule = "--config.trainable=(('head/.*', True), ('.*', False))"
    assert run(classify_images, [*flags_of(DIGITS_MLP, None, tmp_path), rule]) == 0
    table = capsys.readouterr().out
    assert re.search(r"dense_0/kernel +\(64, 256\) +float32 +16,384 +no", table)
    assert re.search(r"head/kernel +\(128, 10\) +float32 +1,280 +yes", table)
    saved = json.loads((tmp_path / "checkpoints/2/manifest.json").read_text())["leaves"]
    assert sorted(path for path in saved if "mu/" in path and path.endswith("kernel")) == [
        path for path in sorted(saved) if path.endswith("mu/head/kernel")
    ]


def test_a_regression_of_a_users_own_table(tmp_path, capsys):
    rows = ["size,city,note,price"]
    for i in range(60):
        size, city = RNG.uniform(1, 9), "ab"[i % 2]
        rows.append(f"{'' if i == 7 else round(size, 3)},{city},x{i},{round(3 * size + 10 * (i % 2), 3)}")
    (tmp_path / "prices.csv").write_text("\n".join(rows) + "\n")
    flags = [
        f"--config.data.train={tmp_path / 'prices.csv'}",
        "--config.data.target=price",
        "--config.data.categorical=city",
        "--config.data.drop=note",
        "--config.data.batch_size=48",
        "--config.loop.length=300",
        "--config.loop.steps_per_call=50",
        "--config.loop.eval_every=100",
        "--config.loop.checkpoint_every=100",
        "--config.optimizer.learning_rate=0.01",
        f"--config.out={tmp_path / 'run'}",
    ]
    assert run(regress_table, flags) == 0
    assert float(re.search(r"r2 ([\d.]+)", capsys.readouterr().out)[1]) > 0.9


def test_standardisation_uses_the_training_rows_only():
    loaded = images.load(images.Images(validation=0.25), seed=0)
    train = loaded.train.source.arrays["image"]
    assert abs(train.mean()) < 1e-5
    assert abs(train.std() - 1) < 1e-4
    for source in loaded.evaluated.values():
        assert abs(source.arrays["image"].mean()) > 1e-5
    assert len(loaded.train.source) + len(loaded.evaluated["validation"]) == 1442


def test_settings_and_models_share_one_default():
    for section in (settings.MLP, settings.CNN, settings.ResNet, settings.ConvNeXt):
        model = getattr(models, section.__name__)
        defaults = inspect.signature(model).parameters
        for name, value in vars(section()).items():
            theirs = defaults[name].default
            if theirs is not inspect.Parameter.empty and name != "block":
                assert value == (tuple(theirs) if isinstance(theirs, list) else theirs), (section.__name__, name)


def test_impossible_combinations_come_at_once_before_any_data():
    flags = [
        "--config.data.name=folder",
        "--config.data.batch_size=30",
        "--config.hardware.microbatches=4",
        "--config.loop.early_stopping_patience=3",
        "--config.optimizer.learning_rate=-1",
        "--config.label_smoothing=2",
        "--config.loop.length=0",
    ]
    with pytest.raises(ConfigError) as caught:
        parse(classify_images.Config, flags)
    text = str(caught.value)
    for part in (
        "name='folder' needs directory and test_directory",
        "data.batch_size=30 does not divide into hardware.microbatches=4",
        "early_stopping_patience needs data.validation > 0",
        "label_smoothing=2.0 must lie in [0, 1)",
        "length='0 steps' must be longer than nothing",
        "peak=-1",
    ):
        assert part in text, text


@pytest.mark.parametrize(("is_kept", "platform", "n_calls"), [(True, "cpu", 1), (False, "cpu", 0), (True, "gpu", 0)])
def test_a_cpu_keeps_freed_memory_unless_told_otherwise(is_kept, platform, n_calls, monkeypatch):
    reasons = []
    monkeypatch.setattr(settings, "keep_freed_memory", reasons.append)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    settings.Hardware(keep_freed_memory=is_kept).initialize()
    assert len(reasons) == n_calls
    assert all("keep_freed_memory=False" in reason for reason in reasons)
