"""The real all-MiniLM-L6-v2 against transformers: sentence vectors, gradients, and folders that go in and out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.paths import flatten
from jaxdl.pretrained import load, save, verify_parity
from jaxdl.pretrained.bert import BERT
from jaxdl.pretrained.ledger import PretrainedError
from jaxdl.pretrained.sentence import load_sentence_encoder, read_settings, save_sentence_encoder
from jaxdl.pretrained.tensors import read_folder
from tests.minilm import minilm_folder
from tests.parity.families import quiet_torch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SENTENCES = [
    "A man is playing a guitar.",
    "Someone plays music on a string instrument.",
    "The stock market fell sharply on Monday after the central bank raised its interest rate once more.",
    "Shares dropped at the start of the week.",
    "Hello!",
    "Penguins can't fly, although they are birds, and they swim extremely well in very cold water near the ice.",
]


pytestmark = pytest.mark.xdist_group("minilm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return minilm_folder(tmp_path_factory.mktemp("minilm"))


@pytest.fixture(autouse=True)
def one_thread():
    with quiet_torch():
        yield


@pytest.fixture(scope="module")
def batch(folder):
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch(SENTENCES)
    batch = {"tokens": np.array([row.ids for row in rows]), "mask": np.array([row.attention_mask for row in rows])}
    assert len({int(n) for n in batch["mask"].sum(1)}) == len(SENTENCES)
    return batch


def their_vectors(module, batch):
    hidden = module(input_ids=torch.tensor(batch["tokens"]), attention_mask=torch.tensor(batch["mask"]))[0]
    mask = torch.tensor(batch["mask"])[..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def our_bert(folder):
    return load_sentence_encoder(folder, family=BERT)


def their_bert(folder):
    return transformers.BertModel.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False)


def test_sentence_vectors(folder, batch):
    model, params, _, ledger = our_bert(folder)
    assert not ledger.fresh
    assert (set(ledger.dropped), set(ledger.ignored)) == (
        {"pooler.dense.weight", "pooler.dense.bias"},
        {"embeddings.position_ids"},
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 22_713_216 - 384 * 385 + 384 * (30592 - 30522)
    ours = np.asarray(jax.jit(model.apply)({"params": params}, **batch))
    with torch.no_grad():
        theirs = their_vectors(their_bert(folder).eval(), batch).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    alone = model.apply({"params": params}, batch["tokens"][:1, : batch["mask"][0].sum()])
    np.testing.assert_allclose(ours[:1], alone, atol=1e-5)
    similarity = ours @ ours.T
    others = [similarity[i, j] for i in range(6) for j in range(i) if (j, i) not in ((0, 1), (2, 3))]
    assert min(similarity[0, 1], similarity[2, 3]) > 0.4 > 2 * max(others)


def test_gradients(folder, batch):
    """Of the mean cosine of neighbours, in float64."""
    theirs = their_bert(folder).double().eval()
    vectors = their_vectors(theirs, batch)
    value = (vectors[::2] * vectors[1::2]).sum(1).mean()
    value.backward()
    with jax.enable_x64(True):
        model, params, _, _ = load_sentence_encoder(folder, family=BERT, dtype=jnp.float64)

        @jax.jit
        @jax.value_and_grad
        def grad_fn(params):
            vectors = model.apply({"params": params}, **batch)
            return (vectors[::2] * vectors[1::2]).sum(1).mean()

        ours, grads = grad_fn(params)
        flat = {path: np.asarray(leaf) for path, leaf in flatten(grads).items()}
    np.testing.assert_allclose(ours, value.item(), rtol=1e-6)  # their softmax is in float32
    gradients = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    compared = {
        "encoder/layer_0/attention/query/kernel": gradients["encoder.layer.0.attention.self.query.weight"].T,
        "encoder/layer_3/attention_norm/scale": gradients["encoder.layer.3.attention.output.LayerNorm.weight"],
        "encoder/layer_5/mlp/down/bias": gradients["encoder.layer.5.output.dense.bias"],
        "embed/position/embedding": gradients["embeddings.position_embeddings.weight"],
        "embed/token/embedding": np.pad(gradients["embeddings.word_embeddings.weight"], [(0, 70), (0, 0)]),
    }
    for path, want in compared.items():
        largest = np.abs(want).max()
        assert largest > 1e-5, path
        np.testing.assert_allclose(flat[path], want, rtol=0, atol=1e-5 * largest, err_msg=path)
    assert (flat["embed/token/embedding"][0] == 0).all()  # the padding token


def test_its_tokenizer_gives_the_tokens_of_transformers(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding="max_length", max_length=40)
    ours = load(folder, family=BERT).tokenizer.encode_batch(SENTENCES, 40)
    np.testing.assert_array_equal(ours["tokens"], theirs["input_ids"])
    np.testing.assert_array_equal(ours["mask"], theirs["attention_mask"])


def test_outputs_every_gradient_leaf_and_three_steps(folder):
    report = verify_parity(folder, learning_rate=1e-5)
    assert report.is_equal, f"\n{report}"
    assert max(line.error for line in report.lines) < 1e-6


def test_the_whole_folder_goes_in_and_out(folder, batch, tmp_path):
    loaded = load(folder, family=BERT)
    assert (len(loaded.ledger.loaded), loaded.ledger.dropped) == (103, ())
    save(tmp_path / "whole", loaded.model, loaded.params, family=BERT)
    before, after = read_folder(folder), read_folder(tmp_path / "whole")
    assert before.keys() - after.keys() == {"embeddings.position_ids"}
    assert all(before[name].tobytes() == x.tobytes() for name, x in after.items())
    encoder = our_bert(folder)
    save_sentence_encoder(tmp_path / "ours", encoder.model, encoder.params, max_tokens=256, family=BERT)
    assert read_settings(tmp_path / "ours") == read_settings(folder) == ("mean", True, 256)
    again = our_bert(tmp_path / "ours")
    assert again.model == encoder.model
    with torch.no_grad():
        sides = [their_vectors(their_bert(path).eval(), batch) for path in (folder, tmp_path / "ours")]
    assert torch.equal(*sides)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, r"pooling by \['max_tokens'\] is not supported"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "not supported"),
        ("modules.json", [{"type": "a.Transformer", "path": ""}, {"type": "a.Dense", "path": "1"}], "Dense"),
        ("modules.json", None, "cannot be read"),
    ],
)
def test_other_kinds_of_vectors_are_refused(tmp_path, name, content, said):
    modules = [{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "1_Pooling"}]
    files = {"modules.json": modules, "1_Pooling/config.json": {"pooling_mode": "cls"}}
    (tmp_path / "1_Pooling").mkdir()
    for file, value in files.items():
        (tmp_path / file).write_text(json.dumps(value))
    assert read_settings(tmp_path) == ("first", False, None)
    (tmp_path / name).write_text("{" if content is None else json.dumps(content))
    with pytest.raises(PretrainedError, match=said):
        read_settings(tmp_path)
