"""BERT, RoBERTa and DistilBERT against transformers: outputs, every gradient leaf, three AdamW steps, both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.paths import flatten
from jaxdl.pretrained.bert import BERT
from jaxdl.pretrained.distilbert import DISTILBERT
from jaxdl.pretrained.folder import load, save
from jaxdl.pretrained.ledger import PretrainedError
from jaxdl.pretrained.roberta import ROBERTA
from jaxdl.pretrained.verify import verify_parity
from tests.parity.families import build, check_family, quiet_torch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FAMILIES = {family.name: family for family in (BERT, ROBERTA, DISTILBERT)}
SIZES = {"vocab_size": 131, "max_position_embeddings": 19, "pad_token_id": 0, "initializer_range": 0.2}
WIDTHS = {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 20}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SIZES, **WIDTHS),
    "roberta": lambda: transformers.RobertaConfig(**{**SIZES, "pad_token_id": 1}, **WIDTHS, type_vocab_size=1),
    "distilbert": lambda: transformers.DistilBertConfig(**SIZES, dim=12, n_heads=3, hidden_dim=20),
}
CASES = [(name, architecture) for name, family in FAMILIES.items() for architecture in family.architectures]
NAMES = {"0": "bad", "1": "so-so", "2": "good"}


@pytest.fixture(autouse=True)
def one_thread():
    with quiet_torch():
        yield


def make_config(name, architecture, **changes):
    config = CONFIGS[name]()
    config.num_hidden_layers = 2 if architecture.endswith("Model") else 1
    if architecture.endswith(("SequenceClassification", "TokenClassification")):
        config.id2label, config.label2id = NAMES, {label: int(i) for i, label in NAMES.items()}
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def write(path, name, architecture, **changes):
    """A folder as transformers saves it, with random values everywhere."""
    build(getattr(transformers, architecture), make_config(name, architecture, **changes)).save_pretrained(path)


@pytest.mark.parametrize(("name", "architecture"), CASES, ids=[architecture for _, architecture in CASES])
def test_family(tmp_path, name, architecture):
    family, module = FAMILIES[name], getattr(transformers, architecture)
    report = check_family(family, module, make_config(name, architecture), tmp_path)
    assert len(report.losses) == 4
    model = load(tmp_path / "ours", family=family).model
    assert model == load(tmp_path / "theirs", family=family).model
    assert model.labels == (tuple(NAMES.values()) if model.head in ("classify", "tag") else ())


def test_the_proof_sees_two_swapped_leaves(tmp_path):
    write(tmp_path, "bert", "BertForTokenClassification")
    theirs = transformers.BertForTokenClassification.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        own = theirs.bert.encoder.layer[0].attention.self
        own.query.weight.data, own.key.weight.data = own.key.weight.data, own.query.weight.data
    report = verify_parity(tmp_path, family=BERT, theirs=theirs)
    assert not report.is_equal


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_and_rates_survive(tmp_path, name):
    rate = "seq_classif_dropout" if name == "distilbert" else "classifier_dropout"
    architecture = next(a for a, head in FAMILIES[name].architectures.items() if head == "classify")
    write(tmp_path / "theirs", name, architecture, **{rate: 0.3})
    ours = load(tmp_path / "theirs", family=FAMILIES[name])
    assert (ours.model.labels, ours.model.n_outputs) == (("bad", "so-so", "good"), 3)
    assert (ours.model.head_dropout_rate, ours.model.block.dropout_rate) == (0.3, 0.1)
    save(tmp_path / "ours", ours.model, ours.params, family=FAMILIES[name])
    config = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert config.id2label == {int(i): label for i, label in NAMES.items()}
    assert (config.num_labels, getattr(config, rate)) == (3, 0.3)
    calm = load(tmp_path / "theirs", family=FAMILIES[name], dropout_rate=0.0, attention_dropout_rate=0.0).model
    assert {calm.head_dropout_rate, calm.block.dropout_rate, calm.block.attention_dropout_rate} == {0.0}


@pytest.mark.parametrize("name", FAMILIES)
def test_another_head(tmp_path, name):
    family = FAMILIES[name]
    architecture = next(a for a, head in family.architectures.items() if head == "masked_lm")
    write(tmp_path, name, architecture)
    old = {"bert": "cls[.].*", "roberta": "lm_head[.].*", "distilbert": "vocab_.*"}[name]
    fresh = ["head/.*", *(["pooler/.*"] if name == "bert" else [])]
    loaded = load(tmp_path, head="classify", n_outputs=1, fresh=fresh, drop=[old], family=family)
    assert {path.split("/")[0] for path in loaded.ledger.fresh} == {rule.split("/")[0] for rule in fresh}
    inputs, _ = family.inputs(np.random.default_rng(0), loaded.model)
    assert loaded.model.apply({"params": loaded.params}, **inputs).shape == (3, 1)
    with pytest.raises(PretrainedError, match="head/"):
        load(tmp_path, head="classify", n_outputs=1, family=family)


def test_the_old_names_of_the_first_checkpoints(tmp_path):
    from safetensors.numpy import load_file, save_file

    write(tmp_path, "bert", "BertForMaskedLM")
    new = load(tmp_path, family=BERT)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for k, x in tensors.items()
    }
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].copy()
    old["cls.seq_relationship.weight"] = np.zeros((2, 12), np.float32)
    old["cls.seq_relationship.bias"] = np.zeros(2, np.float32)
    old["bert.embeddings.position_ids"] = np.arange(19)[None]
    save_file(old, tmp_path / "model.safetensors")
    loaded = load(tmp_path, family=BERT)
    assert all(map(np.array_equal, jax.tree.leaves(new.params), jax.tree.leaves(loaded.params)))
    assert loaded.ledger.dropped == ("cls.seq_relationship.bias", "cls.seq_relationship.weight")
    old["cls.predictions.decoder.weight"][0, 0] += 1
    save_file(old, tmp_path / "model.safetensors")
    with pytest.raises(PretrainedError, match="tied"):
        load(tmp_path, family=BERT)


@pytest.mark.parametrize(
    ("name", "head", "change", "said"),
    [
        ("bert", "Model", {"hidden_act": "mish"}, "hidden_act='mish' is unknown"),
        ("bert", "Model", {"position_embedding_type": "relative_key"}, "only 'absolute'"),
        ("bert", "Model", {"is_decoder": True}, "is_decoder=true makes a decoder"),
        ("bert", "ForMaskedLM", {"tie_word_embeddings": False}, "tie_word_embeddings=false is not supported"),
        ("bert", "ForQuestionAnswering", {"id2label": NAMES}, "3 labels for the start and the end"),
        ("roberta", "ForMaskedLM", {"hidden_act": "relu"}, "masked_lm head has 'gelu' always"),
        ("distilbert", "Model", {"activation": "glu"}, "activation='glu' is unknown; nearest: gelu"),
    ],
)
def test_configs_that_mean_another_network_are_refused(name, head, change, said):
    config = {**CONFIGS[name]().to_dict(), **change}
    architecture = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}[name] + head
    with pytest.raises(PretrainedError, match=said):
        FAMILIES[name].to_model({**config, "architectures": [architecture]})


def test_a_block_that_transformers_does_not_have_is_not_saved(tmp_path):
    write(tmp_path, "bert", "BertModel")
    loaded = load(tmp_path, family=BERT)
    other = loaded.model.clone(block=loaded.model.block.replace(norm_position="pre", activation="tanh"))
    with pytest.raises(PretrainedError, match="norm_position='pre'; transformers has 'post'"):
        save(tmp_path / "new", other, loaded.params, family=BERT)


@pytest.mark.parametrize("name", FAMILIES)
def test_scanned_layers_load_the_same_numbers(tmp_path, name):
    architecture = next(iter(FAMILIES[name].architectures))
    write(tmp_path, name, architecture)
    plain, scanned = (load(tmp_path, family=FAMILIES[name], layout=layout) for layout in ("unrolled", "scanned"))
    inputs, _ = FAMILIES[name].inputs(np.random.default_rng(0), plain.model)
    outs = [side.model.apply({"params": side.params}, **inputs) for side in (plain, scanned)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *outs)
    assert any(path.startswith("encoder/layers/") for path in flatten(scanned.params))
    assert jnp.abs(jax.tree.leaves(outs[0])[0]).max() > 0.1
