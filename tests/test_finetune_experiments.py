"""The fine-tuning experiments: every shipped config on small data of its own form, and what a run leaves behind."""

import ast
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import classify_images, finetune_images, finetune_text, finetuning_table
from jaxdl import paths
from jaxdl.checkpoint import manifest
from jaxdl.command import run_command
from jaxdl.config import ConfigError, parse
from jaxdl.finetune.delta import load_delta
from jaxdl.models.bert import Bert, bert_block
from jaxdl.pretrained import load, save

pytest.importorskip("tokenizers")
from jaxdl.data.text import Tokenizer

ROOT = Path(__file__).parents[1]
TEXT = sorted((ROOT / "configs").glob("minilm_*.py"))
IMAGES = sorted((ROOT / "configs").glob("fashion_shoes_*.py"))
QUICK = ("minilm_lora", "fashion_shoes_lora")
GOOD, BAD = ("a fine film", "great fun", "it moves and delights"), ("a dull film", "no fun", "it bores and annoys")
LABELS = {"good": GOOD, "bad": BAD}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small BERT with a WordPiece tokenizer, as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("pretrained") / "bert"
    tokenizer = Tokenizer.train([*GOOD, *BAD] * 20, kind="wordpiece", vocab_size=300)
    block = bert_block(16, 2, 32)
    model = Bert(block, n_layers=6, vocab_size=tokenizer.vocab_size, n_positions=32, has_pooler=True)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    save(path, model, params, tokenizer)
    return path


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """Texts and labels in VADER's form: id, rating, text."""
    path = tmp_path_factory.mktemp("reviews")
    rng, lines = np.random.default_rng(0), []
    for i in range(120):
        kind = "good" if i % 2 else "bad"
        words = " ".join(rng.choice(LABELS[kind], 2))
        lines.append(f"{i}\t{2.5 if kind == 'good' else -2.5}\t{words}")
    (path / "movieReviewSnippets_GroundTruth.txt").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def base_run(tmp_path_factory):
    """A narrow ResNet with BatchNorm, trained for a few steps on the digits 0 to 4."""
    out = tmp_path_factory.mktemp("base") / "run"
    flags = [f"--config={ROOT / 'configs' / 'fashion_clothes.py'}", f"--config.out={out}", "--config.data.name=digits"]
    flags += [
        "--config.model.width=8",
        "--config.model.stem=small",
        "--config.loop.length=10",
        "--config.data.flip=false",
    ]
    flags += ["--config.optimizer.warmup=1", "--config.parallel.mesh=data=1", "--config.data.batch_size=32"]
    assert run_command(classify_images.Config, classify_images.experiment, flags) == 0
    return out


def text_flags(config, folder, reviews, out, *more):
    flags = {
        "pretrained": folder,
        "corpus.path": reviews,
        "out": out,
        "data.length": 16,
        "data.batch_size": 16,
        "loop.length": 6,
        "loop.eval_every": 100,
        "loop.checkpoint_every": 3,
        "loop.log_every": 1,
        "optimizer.warmup": 1,
        "parallel.mesh": "data=1",
    }
    return [f"--config={config}", *(f"--config.{name}={value}" for name, value in flags.items()), *more]


def run_text(flags):
    return run_command(finetune_text.Config, finetune_text.experiment, flags)


def run_images(flags):
    return run_command(finetune_images.Config, finetune_images.experiment, flags)


def proofs(files):
    """Parameters of a test: the configurations that are not quick are left to `make prove`."""
    quick, proof = (), pytest.mark.proof
    return [pytest.param(file, id=file.stem, marks=quick if file.stem in QUICK else proof) for file in files]


@pytest.mark.parametrize("config", proofs(TEXT))
def test_the_text_config_runs_and_leaves_a_model_behind(config, folder, reviews, tmp_path, capsys):
    out = tmp_path / "run"
    assert run_text(text_flags(config, folder, reviews, out)) == 0
    said = capsys.readouterr().out
    assert "fresh 2: head/bias, head/kernel" in said
    assert ("bit-identical to the base" in said) == (config.stem not in ("minilm_full", "minilm_llrd"))
    row = json.loads((out / "finetuning.json").read_text())
    saved = manifest.read(out / "checkpoints" / "6").leaves
    moved = [path for path in saved if path.startswith("params/")]
    assert sum(int(np.prod(saved[path].shape)) for path in moved) == row["n_moved"] <= row["n_params"]
    exported = load(out / "export")
    assert exported.model.head == "classify"
    base = load(folder, head="classify", n_outputs=2, labels=("negative", "positive"), fresh=["head/.*"])
    if "lora" not in config.stem:
        params, _ = load_delta(out / "delta", base.params)
        flat, tuned = paths.flatten(exported.params), paths.flatten(params)
        assert all((np.asarray(flat[path]) == np.asarray(tuned[path])).all() for path in flat)
    assert (out / "adapter" / "adapter_config.json").exists() == ("lora" in config.stem)


@pytest.mark.parametrize("config", proofs(IMAGES))
def test_the_image_config_runs_on_an_earlier_run(config, base_run, tmp_path, capsys):
    flags = {"data.name": "digits", "base": base_run, "out": tmp_path / "run", "loop.length": 4, "optimizer.warmup": 1}
    flags |= {"data.batch_size": 32, "data.flip": "false", "parallel.mesh": "data=1"}
    assert run_images([f"--config={config}", *(f"--config.{name}={value}" for name, value in flags.items())]) == 0
    said = capsys.readouterr().out
    assert "fresh 2: params/head/bias, params/head/kernel" in said
    assert ("bit-identical to the base" in said) == (config.stem not in ("fashion_shoes_full", "fashion_shoes_llrd"))
    saved = manifest.read(tmp_path / "run" / "checkpoints" / "4").leaves
    statistics = [path for path in saved if path.startswith("extra/")]
    assert bool(statistics) == (config.stem in ("fashion_shoes_full", "fashion_shoes_llrd", "fashion_shoes_bitfit"))


@pytest.mark.parametrize("config", [*TEXT, *IMAGES], ids=lambda path: path.stem)
def test_the_docstring_says_how_to_run_it(config):
    text = ast.get_docstring(ast.parse(config.read_text()))
    module = "experiments.finetune_text" if config in TEXT else "experiments.finetune_images"
    assert f"python -m {module} --config configs/{config.name}" in text
    out = importlib.import_module(f"configs.{config.stem}").get_config().out
    assert out == f"runs/{config.stem}"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads a deprecated name of transformers
def test_the_export_gives_the_same_predictions_in_transformers(folder, reviews, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    out = tmp_path / "run"
    flags = text_flags(ROOT / "configs" / "minilm_lora.py", folder, reviews, out, "--config.loop.length=12")
    assert run_text([flag for flag in flags if flag != "--config.loop.length=6"]) == 0
    ours = load(out / "export", dropout_rate=0.0)
    tokens = np.array([[2, 7, 8, 9, 3], [2, 11, 12, 3, 0]], np.int32)
    mask = tokens != 0
    expected = np.asarray(ours.model.apply({"params": ours.params}, tokens, mask=mask))
    inputs = {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(mask).long()}
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out / "export").eval()
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    adapted = peft.PeftModel.from_pretrained(plain, out / "adapter").eval()
    with torch.no_grad():
        for model in (theirs, adapted):
            np.testing.assert_allclose(model(**inputs).logits.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert theirs.config.id2label == {0: "negative", 1: "positive"}


@pytest.mark.optimized  # as the process that is killed is
@pytest.mark.proof  # faults/test_unfreeze_kill is one, too, and a quarter as long
def test_gradual_unfreezing_goes_on_where_it_was_stopped(folder, reviews, tmp_path):
    config = ROOT / "configs" / "minilm_full.py"
    flags = ["--config.finetune.open_every=2", "--config.loop.length=6", "--config.loop.checkpoint_every=2"]
    keep = ("--config.loop.length", "--config.loop.checkpoint_every")

    def all_flags(out):
        chosen = text_flags(config, folder, reviews, out)
        return [flag for flag in chosen if not flag.startswith(keep)] + flags

    assert run_text(all_flags(tmp_path / "straight")) == 0
    command = [sys.executable, "-m", "experiments.finetune_text", *all_flags(tmp_path / "stopped")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=quiet, stderr=quiet)
    log, deadline = tmp_path / "stopped" / "metrics.jsonl", time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and len(log.read_text().splitlines()) >= 3:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.05)
    assert process.wait() == -signal.SIGKILL
    assert run_text(all_flags(tmp_path / "stopped")) == 0
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("straight", "stopped")]
    assert logs[0] == logs[1]
    leaves = [manifest.read(tmp_path / name / "checkpoints" / "6").leaves for name in ("straight", "stopped")]
    assert leaves[0] == leaves[1]


def test_the_table_of_runs(folder, reviews, tmp_path, capsys):
    for name in ("bitfit", "head"):
        config = ROOT / "configs" / f"minilm_{name}.py"
        assert run_text(text_flags(config, folder, reviews, tmp_path / name)) == 0
    capsys.readouterr()
    assert finetuning_table.main([str(tmp_path / "bitfit"), str(tmp_path / "head")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| run | test accuracy | moved parameters |")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| bitfit", "| head"]
    assert finetuning_table.main([str(tmp_path)]) == 2
    assert "has no finetuning.json" in capsys.readouterr().err
    assert finetuning_table.main([]) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["finetune.trainable=haed/.*"], ["'haed/.*' matches nothing", "head/bias"]),
        (["finetune.trainable=Head/.*"], ["'Head/.*' matches nothing", "head/bias"]),
        (["finetune.trainable=head/.*,encoder/layer_9/.*"], ["'encoder/layer_9/.*' matches nothing", "encoder/layer_"]),
        (["finetune.method=lora", "finetune.targets=.*attention/qeury/kernel"], ["matches nothing", "query/kernel"]),
        (["finetune.method=lora", "finetune.targets=.*norm/scale"], ["norm/scale"]),
        (["finetune.method=lora", "finetune.rank=99"], ["99"]),
        (["finetune.method=last_layers", "finetune.n_layers=7"], ["n=7", "6 layers"]),
        (["fresh=pooler/.*"], ["head/kernel needs it", 'fresh=["head/kernel"]']),
    ],
)
def test_a_mistake_is_told_before_anything_trains(flags, words, folder, reviews, tmp_path, capsys):
    out = tmp_path / "run"
    config = ROOT / "configs" / "minilm_full.py"
    assert run_text(text_flags(config, folder, reviews, out, *(f"--config.{flag}" for flag in flags))) == 2
    said = capsys.readouterr().err
    assert [word for word in words if word not in said] == []
    assert not (out / "metrics.jsonl").exists()


def test_settings_that_exclude_each_other_come_at_once():
    flags = ["method=lora", "trainable=head/.*", "rank=0", "alpha=-1", "layer_decay=0", "adapter_dropout_rate=2"]
    more = ["--config.trainable=(('head/.*', True), ('.*', False))"]
    with pytest.raises(ConfigError) as caught:
        parse(finetune_text.Config, [*(f"--config.finetune.{flag}" for flag in flags), *more])
    for part in (
        "exclude each other",
        "rank=0",
        "alpha=-1",
        "layer_decay=0",
        "adapter_dropout_rate=2",
        "finetune.method",
    ):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="codes cannot train"):
        parse(finetune_text.Config, ["--config.finetune.base=nf4"])
    with pytest.raises(ConfigError, match="from the head down"):
        parse(finetune_text.Config, ["--config.finetune.method=bitfit", "--config.finetune.open_every=3"])


def test_classes_are_chosen_and_renumbered():
    from experiments import images

    chosen = images.load(images.Images(name="digits", classes=(7, 3), validation=0.2), seed=0)
    everything = images.load(images.Images(name="digits"), seed=0)
    assert chosen.class_names == ("7", "3")
    labels = everything.train.source.arrays["label"]
    n_rows = len(chosen.train.source) + len(chosen.evaluated["validation"])
    assert n_rows == int(np.isin(labels, (7, 3)).sum())
    test = images.labels(chosen.evaluated["test"])
    assert int((test == 0).sum()) == int((images.labels(everything.evaluated["test"]) == 7).sum())
    with pytest.raises(ConfigError, match="two different classes"):
        parse(classify_images.Config, ["--config.data.classes=3,3"])


def test_default_settings_are_those_of_the_library():
    from experiments.finetuning import Finetune
    from jaxdl.finetune.lora import Lora

    ours = {field.name: field.default for field in dataclasses.fields(Lora)}
    assert Finetune().alpha == ours["alpha"]
    assert Finetune().is_rank_stabilized == ours["is_rank_stabilized"]
