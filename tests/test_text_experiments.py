"""The text experiments: every shipped config for two steps on small texts of its own form, and what each one shows."""

import ast
import importlib
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import classify_text, language_model, masked_language_model, tag_tokens, text, text_rows
from jaxdl.command import run_command
from jaxdl.config import ConfigError, parse
from jaxdl.data.text import ByteTokenizer, Documents, Tokenizer, encode_tags
from jaxdl.errors import JaxdlError
from jaxdl.models.apply import init_model
from jaxdl.models.bert import Bert, bert_block
from jaxdl.pretrained import save
from jaxdl.report import read_history

pytest.importorskip("tokenizers")

CONFIGS = Path(__file__).parents[1] / "configs"
MODULES = (language_model, classify_text, tag_tokens, masked_language_model)
SHIPPED = {
    config: module
    for module in MODULES
    for config in sorted(CONFIGS.glob("*.py"))
    if f"from {module.__name__} import Config" in config.read_text()
}


def python_files(folder):
    """Forty files in two packages; the name of a function tells which."""
    for i in range(40):
        package = folder / ("alpha" if i % 2 else "beta")
        package.mkdir(parents=True, exist_ok=True)
        body = "\n".join(f"    total_{k} = {k} + value[{i}]" for k in range(12))
        lines = f"def {package.name}_{i}(value):\n{body}\n    return total_0\n\n\n"
        (package / f"module_{i}.py").write_text(lines * 2)
    return folder


def brown_files(folder):
    folder.mkdir()
    names = [f"c{genre}{i:02}" for genre in "ab" for i in range(1, 13)]
    (folder / "cats.txt").write_text("".join(f"{name} {'news' if name[1] == 'a' else 'press'}\n" for name in names))
    for i, name in enumerate(names):
        (folder / name).write_text(f"\tThe/at jury/nn {i}/cd said/vbd ./.\n\n" * 6)
    return folder


def newsgroups_files(folder):
    folder.mkdir()
    for split, n in (("train", 60), ("test", 20)):
        rows = [("sci.space\tthe moon is far" if i % 2 else "rec.autos\ta red car") + f" {i}" for i in range(n)]
        (folder / f"20newsgroups-{split}.tab").write_text(
            "Category\tText\nd\tstring\nclass\t\n" + "\n".join(rows) + "\n"
        )
    return folder


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora")
    readers = {"python": python_files, "brown": brown_files, "newsgroups": newsgroups_files}
    return {name: make(root / name) for name, make in readers.items()}


def shrunk(config, module, corpora, out, *flags):
    """The words of a command line that runs a config on little data for two steps."""
    whole = parse(module.Config, [f"--config={config}", *_path(config, corpora)]).config
    words = ["loop.length=2", "loop.eval_every=100", "loop.checkpoint_every=100", "loop.log_every=1"]
    words += ["loop.steps_per_call=1", "optimizer.warmup=1", "parallel.mesh=data=1", f"out={out}"]
    words += ["data.length=32", "data.batch_size=8", "data.eval_batch_size=8", "data.test=0.25"]
    words += ["data.validation=0.25", "tokenizer.vocab_size=300", "model.n_layers=1", "model.width=12"]
    words += ["new_tokens=5"] if module is language_model else []
    words += ["n_packages=2"] if module is classify_text and whole.corpus.name == "python" else []
    settings = {word.partition("=")[0]: word for word in (*words, *flags)}
    return [f"--config={config}", *_path(config, corpora), *(f"--config.{word}" for word in settings.values())]


def _path(config, corpora):
    name = re.search(r'Corpus\(name="(\w+)"', config.read_text())
    return [f"--config.corpus.path={corpora[name[1] if name else 'python']}"]


RUN = [config for config in SHIPPED if not config.stem.endswith("_gpu") or config.stem == "python_gpt_gpu"]
QUICK = ("python_gpt", "newsgroups_bert")  # the others are proofs


def marked(config):
    return pytest.param(config, id=config.stem, marks=[] if config.stem in QUICK else pytest.mark.proof)


@pytest.mark.parametrize("config", [marked(config) for config in RUN])
def test_the_shipped_config_runs(config, corpora, tmp_path, capsys):
    module = SHIPPED[config]
    assert run_command(module.Config, module.experiment, shrunk(config, module, corpora, tmp_path)) == 0
    out = capsys.readouterr().out
    assert f"report        {tmp_path}/report.html" in out
    assert re.search(r"test (accuracy|bits per byte) [\d.]+", out)
    assert ("words scored  100.00 %" in out) == (module is tag_tokens)
    assert (tmp_path / "checkpoints" / "2" / "manifest.json").exists()
    history = read_history(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in history if "train/loss" in row] == [1, 2]
    assert np.isfinite([row["train/loss"] for row in history if "train/loss" in row]).all()
    assert json.loads((tmp_path / "config.json").read_text())["loop"]["length"] == "2 steps"


@pytest.mark.parametrize("config", [c for c in SHIPPED if c not in RUN], ids=lambda config: config.stem)
def test_the_config_for_a_gpu_makes_a_network(config, corpora):
    made = parse(SHIPPED[config].Config, [f"--config={config}", *_path(config, corpora)]).config
    head = {classify_text: "classify", tag_tokens: "tag", masked_language_model: "masked_lm"}.get(SHIPPED[config])
    given = {} if head is None else {"head": head, "n_outputs": 0 if head == "masked_lm" else 20}
    model = made.model.build(made.tokenizer.vocab_size, made.data.length, made.hardware.dtype, **given)
    tokens = jax.ShapeDtypeStruct((2, made.data.length), np.int32)
    out, _ = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), tokens)
    assert out.dtype == np.float32  # whatever the computation's
    assert out.shape[-1] == (20 if head in ("classify", "tag") else made.tokenizer.vocab_size)


@pytest.mark.parametrize("config", SHIPPED, ids=lambda config: config.stem)
def test_the_docstring_says_how_to_run_it_and_what_it_gave(config):
    said = ast.get_docstring(ast.parse(config.read_text()))
    assert f"python -m {SHIPPED[config].__name__} --config configs/{config.name}" in said
    assert re.search(r"^(Measured on|Not measured)", said, re.MULTILINE)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_each_experiment_has_a_small_config_and_one_for_a_gpu(module):
    names = {config.stem for config, its in SHIPPED.items() if its is module}
    assert any(name.endswith("_gpu") for name in names)
    assert any(not name.endswith("_gpu") for name in names)


def test_the_lstm_reads_what_the_gpt_reads():
    gpt, lstm = (importlib.import_module(f"configs.python_{name}").get_config() for name in ("gpt", "lstm"))
    assert (gpt.corpus, gpt.tokenizer, gpt.data) == (lstm.corpus, lstm.tokenizer, lstm.data)


@pytest.mark.parametrize("tokenizer", ["bytes", "byte_level"])
def test_windows_count_the_bytes_of_their_targets(tokenizer):
    texts = ["def f(x):\n    return 'ü'\n" * 5, "x = 1\n" * 20]
    made = ByteTokenizer() if tokenizer == "bytes" else Tokenizer.train(texts, kind="byte_level", vocab_size=300)
    rows = language_model.windows(Documents({"text": texts}), made, 16)
    for i in range(len(rows)):
        kept = [int(token) for token in rows[i]["targets"] if token != made.id_of("eos")]
        written = made.decode(kept)
        if "\N{REPLACEMENT CHARACTER}" not in written:  # no character was cut in two
            assert rows[i]["n_bytes"] == len(written.encode())


def test_words_beyond_the_length_are_not_scored(corpora, tmp_path):
    [config] = [config for config in RUN if config.stem == "brown_tags"]
    short = parse(tag_tokens.Config, shrunk(config, tag_tokens, corpora, tmp_path, "data.length=4")).config
    parts = text_rows.load_parts(short.corpus, short.data)
    made = text.make_tokenizer(short.tokenizer, parts["train"], tmp_path)
    rows = encode_tags(parts["test"], made, 4, tag_names=parts["test"].about["tag_names"])
    assert 0 < tag_tokens.share_scored(rows, parts["test"]) < 1


def test_a_classifier_of_ones_own_jsonl(tmp_path, capsys):
    rows = [{"body": f"{word} number {i}", "mood": mood} for i in range(40) for word, mood in MOODS]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["corpus.name=jsonl", f"corpus.path={tmp_path / 'own.jsonl'}", "corpus.text_field=body"]
    flags += ["corpus.label_field=mood", "data.length=24", "data.batch_size=16", "data.eval_batch_size=16"]
    flags += ["model.n_layers=1", "model.width=16", "model.n_heads=2", "loop.length=60", "loop.eval_every=100"]
    flags += ["optimizer.learning_rate=0.01", "parallel.mesh=data=1", f"out={tmp_path / 'run'}"]
    words = [f"--config.{flag}" for flag in flags]
    assert run_command(classify_text.Config, classify_text.experiment, words) == 0
    assert float(re.search(r"test accuracy ([\d.]+) %", capsys.readouterr().out)[1]) > 90  # half would be luck
    assert "glad" in (tmp_path / "run" / "report.html").read_text()


def test_a_pretrained_folder_gets_a_new_head_and_keeps_its_tokenizer(tmp_path, capsys):
    texts = [f"{word} number {i}" for i in range(20) for word, _ in MOODS]
    tokenizer = Tokenizer.train(texts, kind="wordpiece", vocab_size=80)
    block = bert_block(8, 2, 12)
    model = Bert(block, n_layers=1, vocab_size=tokenizer.vocab_size, n_positions=16, head="masked_lm")
    params, _ = init_model(model, jax.random.key(0), np.ones((1, 4), np.int32))
    save(tmp_path / "folder", model, params, tokenizer)
    rows = [{"text": text, "mood": MOODS[i % 2][1]} for i, text in enumerate(texts)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["corpus.name=jsonl", f"corpus.path={tmp_path / 'own.jsonl'}", "corpus.label_field=mood"]
    flags += [f"pretrained={tmp_path / 'folder'}", "fresh=head/.*,pooler/.*", r"drop=cls\..*"]
    flags += ["trainable=(('head/.*',True),('.*',False))", "data.length=12", "data.batch_size=8", "loop.length=2"]
    flags += ["data.eval_batch_size=8", "parallel.mesh=data=1", f"out={tmp_path / 'run'}"]
    words = [f"--config.{flag}" for flag in flags]
    assert run_command(classify_text.Config, classify_text.experiment, words) == 0
    out = capsys.readouterr().out
    assert "fresh 4: head/bias, head/kernel, pooler/bias, pooler/kernel" in out
    assert re.search(r"head/kernel +\(8, 2\) +float32 +16 +yes", out)
    assert re.search(r"pooler/kernel +\(8, 8\) +float32 +64 +no", out)


MOODS = (("bright", "glad"), ("gloomy", "sad"))


def test_classes_are_names_or_numbers():
    for classes, labels, names in ((["b", "a"], [1, 0], ("a", "b")), ([3, 0], [3, 0], ())):
        made = text.labelled(Documents({"text": ["x", "y"], "c": classes}), "c")
        assert (made.columns, made.class_names) == ({"text": ["x", "y"], "label": labels}, names)
    with pytest.raises(JaxdlError, match=r"label_field='c' holds int, str; give every row a name"):
        text.labelled(Documents({"text": ["x", "y"], "c": ["a", 1]}), "c")
    with pytest.raises(ConfigError, match="label_field='c' is of jsonl and parquet"):
        parse(text.Corpus, ["--config.label_field=c"])


def test_held_out_files_are_in_one_part_only(corpora):
    corpus = parse(language_model.Config, [f"--config.corpus.path={corpora['python']}"]).config.corpus
    parts = text_rows.load_parts(corpus, text_rows.TextRows(validation=0.2, test=0.2))
    paths = [set(part.columns["path"]) for part in parts.values()]
    assert sum(map(len, paths)) == len(set().union(*paths)) == 40


def test_python_is_tagged_by_what_each_word_does():
    source = "class A:\n    def f(self):\n        return g(self.x, 'a', 1)\n"
    tags = [pair for line in tag_tokens.tagged_lines(source) for pair in line]
    for pair in (("A", "class"), ("f", "function"), ("return", "keyword"), ("g", "call"), ("x", "attribute")):
        assert pair in tags
    assert {tag for _, tag in tags} <= set(tag_tokens.PYTHON_TAGS)
    assert list(tag_tokens.tagged_lines("def (:\n")) == [] or list(tag_tokens.tagged_lines("'''")) == []


def test_impossible_settings_come_at_once():
    cases = {
        language_model: (
            ["tokenizer.kind=wordpiece", "prompt=", "new_tokens=300", "temperature=-1"],
            ["does not keep every byte", "prompt='' is empty", "new_tokens=300 must be below", "must not be negative"],
        ),
        classify_text: (
            ["n_packages=1", "label_smoothing=1", "data.length=0", "corpus.name=vader"],
            ["n_packages=1 at least 2", "label_smoothing=1.0 must", "length=0 must be at least 1", "pip download"],
        ),
        tag_tokens: (
            ["corpus.name=newsgroups", "max_rows=0", "model.width=50"],
            ["has no tags", "max_rows=0 must be", "width=50 does not divide over n_heads=6"],
        ),
        masked_language_model: (
            ["probability=1", "prompt=nothing", "data.validation=0.7"],
            ["probability=1.0 must", "must hold one blank", "validation=0.7 must lie between 0 and 0.5"],
        ),
    }
    for module, (flags, said) in cases.items():
        with pytest.raises(ConfigError) as caught:
            parse(module.Config, [f"--config.{flag}" for flag in flags])
        assert all(part in str(caught.value) for part in said), (module.__name__, str(caught.value))
