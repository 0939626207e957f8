"""LoRA adapters against PEFT: the same outputs whichever side made the adapter, and files that go in and out unchanged.

Bases have small random weights. An adapter that changes nothing would prove nothing, so each has random factors and is
shown to move the outputs.
"""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.finetune import lora
from jaxdl.finetune.adapters import adapted, with_adapters
from jaxdl.finetune.lora import Lora
from jaxdl.losses import LossOut
from jaxdl.optim import make_optimizer
from jaxdl.paths import claim, flatten
from jaxdl.pretrained import FAMILIES, PretrainedError, load, save
from jaxdl.pretrained.family import find_family
from jaxdl.pretrained.peft import load_peft, save_peft
from jaxdl.state import create_state
from jaxdl.step import make_train_step
from tests.parity.families import build, quiet_torch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from safetensors.numpy import load_file, save_file  # noqa: E402

SIZES = {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 20, "num_hidden_layers": 2}
TEXT = {**SIZES, "vocab_size": 19}
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4}
TOKENS = {"pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_embd": 12, "n_head": 3, "n_layer": 2, "n_positions": 16, "vocab_size": 19, **TOKENS}
T5 = {"vocab_size": 37, "d_model": 12, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 3}
T5 |= {"decoder_start_token_id": 0}
CONFIGS = {
    "BertForSequenceClassification": ("BertConfig", {**TEXT, "num_labels": 3}),
    "BertForMaskedLM": ("BertConfig", TEXT),
    "RobertaForQuestionAnswering": ("RobertaConfig", TEXT),
    "DistilBertForSequenceClassification": (
        "DistilBertConfig",
        {"dim": 12, "n_heads": 3, "hidden_dim": 20, "n_layers": 2, "vocab_size": 19, "num_labels": 3},
    ),
    "GPT2LMHeadModel": ("GPT2Config", GPT2),
    "GPT2Model": ("GPT2Config", GPT2),
    "LlamaForCausalLM": ("LlamaConfig", {**TEXT, **TOKENS, "num_key_value_heads": 1, "tie_word_embeddings": False}),
    "GemmaForCausalLM": ("GemmaConfig", {**TEXT, **TOKENS, "num_key_value_heads": 1, "head_dim": 4}),
    "T5ForConditionalGeneration": ("T5Config", T5),
    "LlamaModel": ("LlamaConfig", {**TEXT, **TOKENS, "num_hidden_layers": 11}),
    "ViTForImageClassification": ("ViTConfig", {**IMAGE, "num_labels": 3}),
    "ViTModel": ("ViTConfig", IMAGE),
    "CLIPModel": (
        "CLIPConfig",
        {"text_config": {**TEXT, "eos_token_id": 18}, "vision_config": IMAGE, "projection_dim": 8},
    ),
    "CLIPTextModel": ("CLIPTextConfig", {**TEXT, "eos_token_id": 18}),
    "CLIPVisionModel": ("CLIPVisionConfig", IMAGE),
}
MATRICES = [(".*embedding", None), (".*", 2)]
OURS = {"plain": {}, "rank-stabilised": {"is_rank_stabilized": True}, "DoRA": {"has_magnitude": True}}
THEIRS = {"plain": {}, "rank-stabilised": {"use_rslora": True}, "DoRA": {"use_dora": True}}
CASES = [
    *(("BertForSequenceClassification", variant) for variant in OURS),
    *(("GPT2LMHeadModel", variant) for variant in OURS),
    *((name, "DoRA") for name in ("ViTForImageClassification", "LlamaForCausalLM")),
    ("T5ForConditionalGeneration", "rank-stabilised"),
]
APART = {"LlamaModel", "GemmaForCausalLM", *(name for name, _ in CASES)}
CASES += [(name, "plain") for name in CONFIGS if name not in APART]


@pytest.fixture(autouse=True)
def quiet():
    with quiet_torch(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about Conv1D, tied embeddings and the like
        yield


class Base:
    """A base on both sides: transformers' folder, and ours exported from it again."""

    def __init__(self, folder, name, **overrides):
        config, fields = CONFIGS[name]
        self.theirs_class, self.folder = getattr(transformers, name), folder
        build(self.theirs_class, getattr(transformers, config)(**fields)).save_pretrained(folder / "theirs")
        self.model, self.params, _, _ = load(folder / "theirs", **overrides)
        save(folder / "base", self.model, self.params)
        self.family = find_family(json.loads((folder / "base" / "config.json").read_text()), FAMILIES)
        self.inputs, self.their_inputs = self.family.inputs(np.random.default_rng(0), self.model)

    def torch(self):
        return self.theirs_class.from_pretrained(self.folder / "base", attn_implementation="eager").eval()

    def add(self, settings, *, noise=0.3):
        """Parameters with an adapter of random factors; what stands beside the vocabulary is as `add` makes it."""
        key, rng = jax.random.key(0), np.random.default_rng(1)
        like = jax.eval_shape(lambda: lora.add(key, self.params, settings, self.model, **self.inputs)["adapters"])
        n, flat = getattr(self.model, "vocab_size", None), {}
        for path, leaf in flatten(like).items():
            x = rng.normal(0, noise, leaf.shape).astype(np.float32)
            if path.endswith("/magnitude"):
                x = 1 + np.abs(x)
            if path == "embed/token/a":
                x[n:] = 0
            elif path.startswith("head/") and leaf.shape[-1] == 128:
                x[..., n:] = 1 if path.endswith("magnitude") else 0
            flat[path] = jnp.asarray(x)
        return {**self.params, "adapters": jax.tree.unflatten(jax.tree.structure(like), list(flat.values()))}

    def ours(self, params, settings=()):
        apply = adapted(self.model.apply, settings)
        out = jax.jit(lambda p: apply({"params": p}, **self.inputs))(params)
        return {name: np.asarray(x) for name, x in self.family.our_outputs(out, self.inputs).items()}

    def theirs(self, model):
        """Through the model in PEFT's, as some of its wrappers drop inputs."""
        model = model.base_model if isinstance(model, peft.PeftModel) else model
        inputs = {name: torch.tensor(x) if isinstance(x, np.ndarray) else x for name, x in self.their_inputs.items()}
        with torch.no_grad():
            out = self.family.their_outputs(model.eval()(**inputs), inputs)
        return {name: x.numpy() for name, x in out.items()}

    def peft(self, folder):
        return peft.PeftModel.from_pretrained(self.torch(), folder)

    def make(self, **fields):
        """An adapter that PEFT made, with random factors, and the model with it."""
        torch.manual_seed(3)
        config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "init_lora_weights": False, **fields})
        model = peft.get_peft_model(self.torch(), config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "magnitude" in name or "modules_to_save" in name:
                    p.add_(0.3 * torch.randn_like(p))
        model.save_pretrained(self.folder / "peft", save_embedding_layers=False)
        return model


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        largest = np.abs(b[name]).max()
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-5 * max(1, largest), err_msg=name)


def assert_moved(a, b):
    assert max(np.abs(a[name] - b[name]).max() for name in a) > 0.01


def assert_same_leaves(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def check_out(base, params, settings, **keywords):
    """Ours, loaded by PEFT on the exported base; and loaded again here, where nothing has changed."""
    expected = base.ours(params, settings)
    save_peft(base.folder / "ours", base.model, params, settings, base=str(base.folder / "base"), **keywords)
    theirs = base.theirs(base.peft(base.folder / "ours"))
    assert_close(theirs, expected)
    assert_moved(theirs, base.theirs(base.torch()))
    again, found, ledger = load_peft(base.folder / "ours", base.model, base.params)
    assert_same_leaves(again["adapters"], params["adapters"])
    ranks = {leaf.shape[-1] for path, leaf in flatten(again["adapters"]).items() if path.endswith("/a")}
    assert {rank: found.scale(rank) for rank in ranks} == {rank: settings.scale(rank) for rank in ranks}
    assert len(ledger.loaded) == len(ledger.sizes)
    return again, found


def check_in(base, model):
    """PEFT's, loaded here; written again it is the same file."""
    expected = base.theirs(model)
    params, settings, ledger = load_peft(base.folder / "peft", base.model, base.params)
    assert_close(base.ours(params, settings), expected)
    assert_moved(expected, base.theirs(base.torch()))
    save_peft(base.folder / "again", base.model, params, settings, saved=whole(ledger))
    theirs, again = (load_file(base.folder / name / "adapter_model.safetensors") for name in ("peft", "again"))
    assert theirs.keys() == again.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(again[name], x, err_msg=name)
    back, _, _ = load_peft(base.folder / "again", base.model, base.params)
    assert_same_leaves(back, params)
    return params, settings, ledger


def whole(ledger):
    return [path for path in ledger.loaded if not path.startswith("adapters/")]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_both_ways(tmp_path, name, variant):
    base, settings = Base(tmp_path, name), Lora(MATRICES, alpha=3, **OURS[variant])
    check_out(base, base.add(settings), settings)
    _, found, ledger = check_in(base, base.make(target_modules="all-linear", **THEIRS[variant]))
    assert (found.alpha, found.scale(4)) == (3.0, 1.5 if variant == "rank-stabilised" else 0.75)
    assert not whole(ledger)


def test_an_adapter_that_was_trained_here(tmp_path):
    base, settings = Base(tmp_path, "GPT2LMHeadModel"), Lora([(".*", 2)], alpha=3)
    params = lora.add(jax.random.key(1), base.params, settings, base.model, **base.inputs)

    def loss_fn(params, extra, batch, rng):
        logits = base.model.apply({"params": params, **extra}, **batch)
        return LossOut(jnp.sum(jax.nn.logsumexp(logits, -1) ** 2), jnp.float32(logits.size))

    rules = [("adapters/.*", True), (".*", False)]
    tx = make_optimizer(learning_rate=0.1)
    state = create_state(params, {}, tx, rng=jax.random.key(2), trainable=rules)
    step = jax.jit(make_train_step(with_adapters(loss_fn, settings), tx, trainable=rules))
    for _ in range(2):
        state, _ = step(state, base.inputs)
    check_out(base, state.params, settings)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("BertForMaskedLM", {"bert.embeddings.word_embeddings", "cls.predictions.decoder"}),
        ("GPT2LMHeadModel", {"transformer.wte", "lm_head"}),
        ("LlamaForCausalLM", {"model.embed_tokens"}),
        ("GemmaForCausalLM", {"model.embed_tokens", "lm_head"}),  # its table is scaled where it is read
        ("T5ForConditionalGeneration", {"encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}),
    ],
)
def test_an_embedding_is_adapted_wherever_it_is_used(tmp_path, name, modules):
    base, settings = Base(tmp_path, name), Lora([("embed/token/embedding", 3), (".*", None)], alpha=5)
    check_out(base, base.add(settings), settings)
    names = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names} == modules
    if len(modules) == 1:
        check_in(base, base.make(target_modules=sorted(modules)))


def test_an_adapter_of_a_tied_table_alone_has_no_form_here(tmp_path):
    base = Base(tmp_path, "GPT2LMHeadModel")
    base.make(target_modules=["wte", "c_attn"])
    with pytest.raises(
        PretrainedError, match=r"wte: the weight embed/token/embedding has one adapter .*, but lm_head has none"
    ):
        load_peft(tmp_path / "peft", base.model, base.params)


def test_a_fused_module_joins_adapters_of_several_ranks(tmp_path):
    base = Base(tmp_path, "GPT2LMHeadModel")
    rules = [(".*layer_0/attention/query/kernel", 3), (".*layer_0/attention/value/kernel", 1)]
    settings = Lora([*rules, (".*layer_1/attention/key/kernel", 2), (".*mlp/up/kernel", 4), (".*", None)], alpha=6)
    params = base.add(settings)
    expected = base.ours(params, settings)
    save_peft(tmp_path / "ours", base.model, params, settings)
    assert_close(base.theirs(base.peft(tmp_path / "ours")), expected)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert config["rank_pattern"] == {"1.attn.c_attn": 2}
    assert config["alpha_pattern"] == {"0.attn.c_attn": 8}  # 4 / 3 of 6: the query's factor of 2
    again, found, _ = load_peft(tmp_path / "ours", base.model, base.params)
    for path, leaf in flatten(params["adapters"]).items():
        np.testing.assert_allclose(flatten(again["adapters"])[path], leaf, rtol=1e-6, err_msg=path)
    assert dict(found.rules)["decoder/layer_0/attention/value/kernel"] == 1


def test_patterns_and_layers_of_peft(tmp_path):
    base = Base(tmp_path, "LlamaForCausalLM")
    model = base.make(
        target_modules=["q_proj", "v_proj", "down_proj"],
        layers_to_transform=[1],
        rank_pattern={"q_proj": 3, "^model.layers.1.mlp.down_proj": 1},
        alpha_pattern={"q_proj": 8, "v_proj": 1},
    )
    params, settings, _ = load_peft(tmp_path / "peft", base.model, base.params)
    assert_close(base.ours(params, settings), base.theirs(model))
    assert sorted(params["adapters"]["decoder"]) == ["layer_1"]
    assert settings.rules[-1] == (".*", None)
    assert dict(settings.rules)["decoder/layer_1/attention/query/kernel"] == 3
    assert check_out(base, params, settings)[1].rules == settings.rules


def test_scanned_layers_in_their_order(tmp_path):
    base = Base(tmp_path, "LlamaModel", layout="scanned")
    settings = Lora([(".*(query|up)/kernel", 2), (".*", None)], alpha=3, has_magnitude=True)
    params = base.add(settings, noise=0.1)
    assert params["adapters"]["decoder"]["layers"]["mlp"]["up"]["a"].shape == (11, 12, 2)
    check_out(base, params, settings)


HEADS = {
    "BertForSequenceClassification": ["classifier"],
    "DistilBertForSequenceClassification": ["classifier", "pre_classifier"],
    "RobertaForQuestionAnswering": ["qa_outputs"],
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_of_a_text_classifier_is_always_written(tmp_path, name):
    base, settings = Base(tmp_path, name), Lora([(".*query/kernel", 2), (".*", None)], alpha=3)
    params = base.add(settings)
    params = {**params, "head": jax.tree.map(lambda x: x * 2 - 0.1, params["head"])}
    again, _ = check_out(base, params, settings)
    assert_same_leaves(again["head"], params["head"])
    modules = {
        key.split(".")[-2] for key in load_file(tmp_path / "ours" / "adapter_model.safetensors") if "lora" not in key
    }
    assert modules == {*HEADS[name]}
    task = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["task_type"]
    check_in(base, base.make(target_modules=["query", "q_lin"], task_type=task))


def test_other_leaves_are_written_whole_with_their_modules(tmp_path):
    base, settings = Base(tmp_path, "ViTForImageClassification"), Lora([(".*query/kernel", 2), (".*", None)], alpha=3)
    saved = ["head/bias", "embed/class_token", "encoder/layer_1/mlp_norm/.*"]
    flat = flatten(base.add(settings))
    flat |= {path: leaf + 1 for path, leaf in flat.items() if claim(saved, [path])[0]}
    params = jax.tree.unflatten(jax.tree.structure(base.add(settings)), list(flat.values()))
    again, _ = check_out(base, params, settings, saved=saved)
    assert_same_leaves(again, params)
    kept = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["modules_to_save"]
    assert kept == ["classifier", "vit.embeddings", "vit.layers.1.layernorm_after"]


def test_names_of_transformers_4_are_read(tmp_path):
    base = Base(tmp_path, "ViTForImageClassification")
    model = base.make(target_modules=["q_proj", "fc2"])
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    old = {
        "vit.layers.": "vit.encoder.layer.",
        ".attention.q_proj.": ".attention.attention.query.",
        ".mlp.fc2.": ".output.dense.",
    }
    for new, name in old.items():
        tensors = {key.replace(new, name): x for key, x in tensors.items()}
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["query", "output.dense"]}))
    with pytest.raises(PretrainedError, match=r"layer\.0\.attention\.output\.dense is named by"):
        load_peft(tmp_path / "peft", base.model, base.params)  # a name's end is not enough here
    pattern = r".*\.query|.*layer\.\d+\.output\.dense"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": pattern}))
    params, settings, _ = load_peft(tmp_path / "peft", base.model, base.params)
    assert_close(base.ours(params, settings), base.theirs(model))


def test_embeddings_that_peft_wrote_beside_are_read(tmp_path):
    base = Base(tmp_path, "LlamaForCausalLM")
    model = base.make(target_modules=["embed_tokens", "q_proj"])
    model.save_pretrained(tmp_path / "peft")  # now with base_layer.weight
    names = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in names
    params, settings, ledger = load_peft(tmp_path / "peft", base.model, base.params)
    assert_close(base.ours(params, settings), base.theirs(model))
    assert whole(ledger) == ["embed/token/embedding"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_a_file(tmp_path, dtype):
    base = Base(tmp_path, "BertForSequenceClassification")
    model = base.make(target_modules=["query"]).to(dtype)
    model.save_pretrained(tmp_path / "peft")
    with jax.enable_x64(dtype == torch.float64):
        params, _, _ = load_peft(tmp_path / "peft", base.model, base.params)
    leaves = jax.tree.leaves(params["adapters"])
    assert {leaf.dtype.name for leaf in leaves} == {"float64" if dtype == torch.float64 else "float32"}


def test_merged_here_and_merged_by_peft(tmp_path):
    base = Base(tmp_path, "GPT2LMHeadModel")
    model = base.make(target_modules="all-linear", use_dora=True)
    params, settings, _ = load_peft(tmp_path / "peft", base.model, base.params)
    save(tmp_path / "merged", base.model, lora.merge(params, settings))
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    merged = model.merge_and_unload().state_dict()
    for name, x in ours.items():
        np.testing.assert_allclose(x, merged[name].numpy(), atol=2e-6, err_msg=name)
