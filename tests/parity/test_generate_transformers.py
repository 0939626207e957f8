"""Generation against transformers on the same weights: greedy, beam search, and every filter of a sampler."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.generate import Sampling, filter_logits, generate
from jaxdl.generate.sampling import penalize_repetition
from jaxdl.models.t5 import T5
from jaxdl.pretrained import load
from jaxdl.pretrained.gpt2 import GPT2_FAMILY
from jaxdl.pretrained.llama import LLAMA_FAMILIES
from jaxdl.pretrained.t5 import T5_FAMILY

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPTS = [[5, 9, 11, 7, 4], [6], [8, 12, 13]]
PAD, STOP = 0, 2
SIZES = {"vocab_size": 40, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": STOP}
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shaken(model):
    """Weights large enough that the likeliest tokens differ from step to step and no two are nearly as likely."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    config = transformers.GPT2Config(n_embd=16, n_head=4, n_layer=2, n_positions=64, **SIZES)
    return pair(transformers.GPT2LMHeadModel, config, GPT2_FAMILY, tmp_path_factory)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    config = transformers.LlamaConfig(**SIZES, **LLAMA)
    return pair(transformers.LlamaForCausalLM, config, LLAMA_FAMILIES[0], tmp_path_factory)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=PAD,
        **{**SIZES, "eos_token_id": STOP},
    )  # fmt: skip
    return pair(transformers.T5ForConditionalGeneration, config, T5_FAMILY, tmp_path_factory)


def pair(make, config, family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(2)  # of the weights that `shaken` adds to
    theirs = shaken(make(config))
    theirs.save_pretrained(folder)
    loaded = load(folder, family=family)
    return loaded.model, loaded.params, theirs


def their_generate(theirs, prompts, **options):
    """New tokens of each row, up to the stop token."""
    length = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = theirs.generate(ids, attention_mask=mask, **{"do_sample": False, "num_beams": 1, **options})
    first = 1 if theirs.config.is_encoder_decoder else length
    return [until_stop(row[first:]) for row in out.tolist()]


def until_stop(tokens):
    return tokens[: tokens.index(STOP) + 1] if STOP in tokens else tokens


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.7}])
def test_greedy(name, options, request):
    model, params, theirs = request.getfixturevalue(name)
    expected = their_generate(theirs, PROMPTS, max_new_tokens=20, **options)
    # transformers counts its padding as said before; where that is penalised, rows are compared without any
    groups = [[prompt] for prompt in PROMPTS] if options else [PROMPTS]
    if options:
        expected = [row for prompt in PROMPTS for row in their_generate(theirs, [prompt], max_new_tokens=20, **options)]
    out = [
        row
        for group in groups
        for row in generate(model, params, group, max_new_tokens=20, stop_tokens=[STOP], **options)
    ]
    assert out == expected
    assert len({tuple(row) for row in out}) > 1
    assert name == "t5" or len({token for row in out for token in row}) > 4


@pytest.mark.parametrize(
    ("name", "n_beams", "length_penalty"),
    [("gpt2", 2, 1.0), ("gpt2", 4, 0.5), ("gpt2", 3, -1.0), ("llama", 3, 2.5), ("llama", 4, 1.0), ("t5", 3, 0.7)],
)
def test_beam_search(name, n_beams, length_penalty, request):
    model, params, theirs = request.getfixturevalue(name)
    options = {"max_new_tokens": 12, "length_penalty": length_penalty}
    expected = their_generate(theirs, PROMPTS, num_beams=n_beams, early_stopping=False, **options)
    out = generate(model, params, PROMPTS, stop_tokens=[STOP], n_beams=n_beams, **options)
    assert out == expected


def test_beam_search_with_stop_tokens_that_are_met(llama):
    model, params, theirs = llama
    greedy = generate(model, params, PROMPTS, max_new_tokens=12)
    stops = [greedy[0][3], greedy[1][2]]
    rows = generate(model, params, PROMPTS, max_new_tokens=12, n_beams=3, stop_tokens=stops)
    assert any(row[-1] in stops and len(row) < 12 for row in rows)
    out = their_generate(theirs, PROMPTS, max_new_tokens=12, num_beams=3, eos_token_id=stops, early_stopping=False)
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in out]
    assert rows == [row[:end] for row, end in zip(out, ends, strict=True)]


@pytest.mark.parametrize(
    "settings", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 9, "top_p": 0.8, "min_p": 0.1}]
)
def test_filters_are_the_warpers_of_transformers(settings):
    logits = np.random.default_rng(0).normal(size=(4, 30)).astype(np.float32) * 3
    processors = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(0.7)])
    classes = {"top_k": "TopKLogitsWarper", "top_p": "TopPLogitsWarper", "min_p": "MinPLogitsWarper"}
    for name, value in settings.items():
        processors.append(getattr(transformers, classes[name])(value))
    expected = processors(None, torch.tensor(logits)).numpy()
    out = np.asarray(filter_logits(jnp.asarray(logits), Sampling(temperature=0.7, **settings)))
    np.testing.assert_array_equal(np.isinf(out), np.isinf(expected))
    assert 0 < np.isinf(out).sum() < out.size
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_repetition_penalty_is_that_of_transformers():
    logits = np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32)
    tokens = np.array([[1, 2, 2], [0, 0, 0], [9, 3, 4]])
    seen = np.zeros((3, 10), bool)
    for row, said in enumerate(tokens):
        seen[row, said] = True
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.3)
    expected = processor(torch.tensor(tokens), torch.tensor(logits)).numpy()
    out = penalize_repetition(jnp.asarray(logits), jnp.asarray(seen), 1.3)
    np.testing.assert_allclose(np.asarray(out), expected, rtol=1e-6)


def test_the_oracles_are_of_the_families_they_name(gpt2, llama, t5):
    assert isinstance(t5[0], T5)
    assert [type(model[0]).__name__ for model in (gpt2, llama)] == ["GPT2", "Llama"]
