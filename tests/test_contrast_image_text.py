"""The CLIP experiment: captions, the zero-shot classifier, its shipped configs on small data, and what it refuses."""

import dataclasses
import gzip
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import contrast_image_text as module
from experiments import images, settings
from experiments.contrast_image_text import TEMPLATES, Captions, Config, build
from jaxdl.command import run_command
from jaxdl.config import ConfigError, parse
from jaxdl.models.apply import init_model
from jaxdl.paths import flatten
from jaxdl.report import read_history

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("fashion_clip*.py"))


def idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def dark_and_bright(n):
    """Classes that differ in their mean brightness by rows: a picture of class c is bright in row 2 c."""
    labels = np.arange(n) % 10
    pictures = np.random.default_rng(n).integers(0, 60, (n, 28, 28))
    for row, label in enumerate(labels):
        pictures[row, 2 * label : 2 * label + 3] += 190
    return pictures.astype(np.uint8), labels.astype(np.uint8)


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stripes")
    for part, n in (("train", 640), ("t10k", 100)):
        pictures, labels = dark_and_bright(n)
        idx(folder / f"{part}-images-idx3-ubyte.gz", pictures)
        idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder


def run(config, data, out, *flags):
    common = [f"--config={config}", f"--config.out={out}", f"--config.data.directory={data}"]
    return run_command(module.Config, module.experiment, [*common, "--config.parallel.mesh=data=1", *flags])


SMALL = ["--config.data.batch_size=64", "--config.data.eval_batch_size=50", "--config.vision.features=8,8"]
SMALL += [
    "--config.text.width=16",
    "--config.text.n_layers=1",
    "--config.optimizer.warmup=1",
    "--config.loop.log_every=1",
]


def marked(path):
    return pytest.param(path, id=path.stem, marks=[] if path.stem == "fashion_clip" else pytest.mark.proof)


@pytest.mark.parametrize("config", [marked(path) for path in CONFIGS])
def test_the_shipped_configs_run(config, stripes, tmp_path, capsys):
    assert run(config, stripes, tmp_path, *SMALL, "--config.loop.length=2", "--config.loop.eval_every=100") == 0
    assert "zero-shot test accuracy" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()
    losses = [row["train/loss"] for row in read_history(tmp_path / "metrics.jsonl") if "train/loss" in row]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("loss", ["info_nce", pytest.param("sigmoid", marks=pytest.mark.proof)])
def test_captions_alone_teach_the_classes(loss, stripes, tmp_path, capsys):
    """Ten classes of stripes: a tenth would be luck."""
    flags = [
        *SMALL,
        "--config.loop.length=120",
        "--config.loop.eval_every=200",
        "--config.optimizer.learning_rate=3e-3",
    ]
    assert run(CONFIGS[0], stripes, tmp_path, *flags, f"--config.loss={loss}") == 0
    accuracy = float(re.search(r"zero-shot test accuracy ([\d.]+) %", capsys.readouterr().out)[1])
    assert accuracy >= 80


def test_captions_are_drawn_anew_and_hide_the_label():
    captions = Captions(images.FASHION)
    batch = {"image": np.zeros((500, 2, 2, 1)), "label": np.full(500, 9)}
    out = captions.add(batch, np.random.default_rng(0))
    assert sorted(out) == ["image", "tokens"]
    texts = {" ".join(captions.words[i] for i in row if i) for row in out["tokens"].tolist()}
    assert texts == {template.format("ankle boot") + " <end>" for template in TEMPLATES}
    assert captions.words[-1] == "<end>"
    assert (out["tokens"].max(axis=1) == len(captions.words) - 1).all()
    again = captions.add(batch, np.random.default_rng(0))
    np.testing.assert_array_equal(out["tokens"], again["tokens"])


@pytest.fixture(scope="module")
def small():
    config = Config(text=module.Text(width=16, n_layers=1), vision=settings.CNN(features=(4,)), width=8)
    captions = Captions(("coat", "bag", "ankle boot"), TEMPLATES[:2])
    model = build(config, captions)
    image = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8, 8, 1)), jnp.float32)
    params, _ = init_model(model, jax.random.key(0), image, tokens=captions.tokens[:, 0])
    return model, params, image, captions


def test_the_classifier_has_clips_paths_and_mean_prompts(small):
    model, params, image, captions = small
    assert {path.split("/")[0] for path in flatten(params)} == {
        "logit_scale",
        "text",
        "text_projection",
        "vision",
        "vision_projection",
    }
    text, pictures = (
        model.clip.apply({"params": params}, x, method=name)
        for name, x in (("embed_text", captions.tokens.reshape(6, -1)), ("embed_image", image))
    )
    mean = np.asarray(text).reshape(3, 2, 8).mean(1)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    logits = model.apply({"params": params}, image)
    assert logits.shape == (5, 3)
    np.testing.assert_allclose(logits, np.exp(params["logit_scale"]) * np.asarray(pictures) @ mean.T, rtol=1e-4)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.hardware.microbatches=2"], "compared with itself only"),
        (["--config.data.mixup_alpha=0.2"], "a caption names one class"),
        (["--config.data.batch_size=1"], "no negatives"),
        (["--config.loss=clip"], "use 'info_nce' or 'sigmoid'"),
        (["--config.text.width=63"], "no multiple of n_heads=4"),
    ],
)
def test_what_is_refused(flags, said):
    with pytest.raises(ConfigError, match=said):
        parse(Config, [f"--config={CONFIGS[0]}", *flags], prog="contrast")


def test_the_configs_differ_in_size_only():
    loaded = []
    for path in CONFIGS:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        config_module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(config_module)
        loaded.append(config_module.get_config())
    assert [config.out for config in loaded] == [f"runs/{path.stem}" for path in CONFIGS]
    assert all(dataclasses.replace(config.data, batch_size=1).name == "fashion_mnist" for config in loaded)
