"""Generation: against the full forward pass, NumPy loops, exhaustive search and hand-made stop conditions."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.generate import GenerateError, Sampling, filter_logits, generate
from jaxdl.generate.calls import Calls
from jaxdl.generate.loop import Plan, advance, begin
from jaxdl.generate.sampling import choose
from jaxdl.models.apply import init_model
from jaxdl.models.gpt2 import GPT2, gpt2_block
from jaxdl.models.llama import Llama, llama_block
from jaxdl.models.transformer import stack_layers

V = 23
PROMPTS = [[5, 9, 11, 7], [6], [8, 12, 13, 1, 2, 3, 4]]
BLOCK = llama_block(width=16, n_heads=4, hidden=24, n_kv_heads=2, init_std=0.5)
MODELS = {
    "gpt2": GPT2(gpt2_block(width=16, n_heads=4, init_std=0.5), n_layers=2, vocab_size=V, n_positions=32),
    "llama": Llama(BLOCK, n_layers=2, vocab_size=V),
    "window": Llama(BLOCK, n_layers=2, vocab_size=V, local=BLOCK.replace(window=3), local_layers=(0,)),
}


def create(name):
    model = MODELS[name]
    params, _ = init_model(model, jax.random.key(1), jnp.ones((1, 4), jnp.int32))
    return model, params


def slow_greedy(model, params, prompt, n):
    """The whole row through the model for each token, without a cache; what stands to the right is not seen."""
    forward = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    tokens = list(prompt)
    for _ in range(n):
        row = np.zeros((1, 32), np.int32)
        row[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(forward(row)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_full_forward_pass_token_by_token(name):
    model, params = create(name)
    expected = [slow_greedy(model, params, prompt, 6) for prompt in PROMPTS]
    assert generate(model, params, PROMPTS, max_new_tokens=6) == expected
    assert len({tuple(row) for row in expected}) == 3


@pytest.mark.parametrize("options", [{}, {"n_beams": 3}])
def test_scanned_layers_say_the_same(options):
    model, params = create("llama")
    scanned = model.clone(layout="scanned")
    stacked = {**params, "decoder": stack_layers(params["decoder"])}
    expected = generate(model, params, PROMPTS, max_new_tokens=6, **options)
    assert generate(scanned, stacked, PROMPTS, max_new_tokens=6, **options) == expected


def test_one_compilation_serves_all_lengths_of_a_bucket():
    model, params = create("llama")
    settings = {"temperature": 1.0, "top_p": 0.9}
    generate(model, params, [[1] * 9], max_new_tokens=4, **settings)
    counts = begin._cache_size(), advance._cache_size()
    for length, n, temperature in [(1, 1, 0.5), (16, 16, 2.0), (12, 7, 1.0)]:
        changes = {"temperature": temperature, "top_p": 0.5, "seed": length, "stop_tokens": []}
        assert len(generate(model, params, [[1] * length], max_new_tokens=n, **changes)[0]) == n
    assert (begin._cache_size(), advance._cache_size()) == counts
    generate(model, params, [[1] * 17], max_new_tokens=4, **settings)
    assert begin._cache_size() == counts[0] + 1


def test_the_longest_prompts_fit_though_no_power_of_two_does():
    model, params = create("gpt2")
    prompt = [1 + i % 9 for i in range(20)]
    assert generate(model, params, [prompt, [4]], max_new_tokens=12)[0] == slow_greedy(model, params, prompt, 12)


def test_rows_end_with_their_stop_token_and_the_loop_with_the_last_row():
    model, params = create("gpt2")
    free = generate(model, params, PROMPTS, max_new_tokens=10)
    stops = [free[0][1], free[1][4]]
    expected = [row[: 1 + min(i for i, token in enumerate([*row, *stops]) if token in stops)] for row in free]
    assert generate(model, params, PROMPTS, max_new_tokens=10, stop_tokens=stops) == expected
    assert any(len(row) < 10 for row in expected)


def test_the_loop_stops_when_all_rows_have():
    model, params = create("gpt2")
    row = generate(model, params, [PROMPTS[0]], max_new_tokens=10)[0]
    stops = jnp.array([row[2]], jnp.int32)
    at = row.index(row[2])
    plan = Plan(Calls(model), 16, is_greedy=True, top_k=None)
    settings = stops, jax.random.key(0), Sampling(0.0)
    state = begin(params, jnp.array([PROMPTS[0]]), jnp.ones((1, 4), bool), *settings, plan=plan)
    state = advance(params, state, np.int32(10), *settings, plan=plan)
    assert (int(state.n), int(state.lengths[0])) == (at + 1, at + 1)


def test_streamed_tokens_are_those_returned_in_the_order_of_time():
    model, params = create("gpt2")
    stop = generate(model, params, PROMPTS, max_new_tokens=11)[0][5]
    heard = []
    options = {"max_new_tokens": 11, "stop_tokens": [stop]}
    rows = generate(model, params, PROMPTS, on_token=lambda row, token: heard.append((row, token)), **options)
    assert rows == generate(model, params, PROMPTS, **options)
    assert [[token for row, token in heard if row == i] for i in range(3)] == rows
    assert heard[:3] == [(i, rows[i][0]) for i in range(3)]


def test_samples_depend_on_the_seed_alone():
    model, params = create("gpt2")
    one, same, other = (generate(model, params, PROMPTS, max_new_tokens=12, temperature=1.0, seed=s) for s in (1, 1, 2))
    assert one == same
    assert one != other
    cold = generate(model, params, PROMPTS, max_new_tokens=12, temperature=1e-4)
    assert cold == generate(model, params, PROMPTS, max_new_tokens=12)


def test_samples_follow_the_filtered_probabilities():
    logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
    rows = jnp.broadcast_to(logits, (20_000, 4))
    sampling = Sampling(temperature=0.5, top_k=3)
    tokens = choose(rows, jax.random.key(0), sampling, None, is_greedy=False)
    expected = np.array([0.16, 0.09, 0.04, 0.0]) / 0.29
    counts = np.bincount(tokens, minlength=4) / 20_000
    np.testing.assert_allclose(counts, expected, atol=0.012)
    assert counts[3] == 0


def slow_filter(logits, temperature, top_k, top_p, min_p):
    """The kept tokens of one row, by their definitions, in float64."""
    logits = logits / temperature
    kept = set(range(len(logits)))

    def probabilities():
        weights = {i: np.exp(logits[i] - logits.max()) for i in kept}
        return {i: w / sum(weights.values()) for i, w in weights.items()}

    if top_k is not None:
        kept = set(sorted(kept, key=lambda i: -logits[i])[:top_k])
    if top_p is not None:
        total, few, share = 0.0, set(), probabilities()
        for i in sorted(kept, key=lambda i: -logits[i]):
            if total < top_p:
                few.add(i)
            total += share[i]
        kept = few
    if min_p is not None:
        share = probabilities()
        kept = {i for i in kept if share[i] >= min_p * max(share.values())}
    return kept


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), list(itertools.product([None, 1, 6], [None, 0.3, 0.9], [None, 0.2]))
)
def test_filters_against_loops(top_k, top_p, min_p):
    logits = np.random.default_rng(4).normal(size=(5, 17)) * 2
    sampling = Sampling(0.8, top_k, top_p, min_p)
    out = np.asarray(filter_logits(jnp.asarray(logits, jnp.float32), sampling))
    for row, result in zip(logits, out, strict=True):
        assert set(np.flatnonzero(np.isfinite(result))) == slow_filter(row, 0.8, top_k, top_p, min_p)


def test_the_likeliest_token_is_always_kept():
    logits = jnp.array([[0.0, 1.0, 5.0]])
    out = filter_logits(logits, Sampling(1.0, 1, 1e-6, 1.0))
    assert np.isfinite(out).tolist() == [[False, False, True]]


def test_a_beam_as_wide_as_the_vocabulary_finds_the_best_of_all_sequences():
    model = GPT2(gpt2_block(width=8, n_heads=2, init_std=0.8), n_layers=1, vocab_size=5, n_positions=32)
    params, _ = init_model(model, jax.random.key(3), jnp.ones((1, 4), jnp.int32))
    prompt, news = [1, 2], list(itertools.product(range(5), repeat=3))
    rows = jnp.array([[*prompt, *new[:-1]] for new in news])
    likelihood = np.asarray(jax.nn.log_softmax(jax.jit(model.apply)({"params": params}, rows)[:, 1:]))
    scores = {new: sum(likelihood[row, i, new[i]] for i in range(3)) for row, new in enumerate(news)}
    best = max(scores, key=scores.get)
    greedy = tuple(generate(model, params, [prompt], max_new_tokens=3)[0])
    assert tuple(generate(model, params, [prompt], max_new_tokens=3, n_beams=25)[0]) == best
    assert scores[best] >= scores[greedy]


def test_penalties_keep_tokens_from_coming_again():
    model, params = create("gpt2")
    row = generate(model, params, [[6]], max_new_tokens=16, repetition_penalty=1e6)[0]
    assert len({6, *row}) == 17


def test_the_cache_is_updated_in_place():
    block = gpt2_block(width=64, n_heads=4)
    model = GPT2(block, n_layers=2, vocab_size=50, n_positions=1024)
    params, _ = init_model(model, jax.random.key(1), jnp.ones((1, 4), jnp.int32))
    plan = Plan(Calls(model), 512, is_greedy=True, top_k=None)
    settings = jnp.zeros(0, jnp.int32), jax.random.key(0), Sampling(0.0)
    state = begin(params, jnp.ones((2, 512), jnp.int32), jnp.ones((2, 512), bool), *settings, plan=plan)
    layer = state.cache["layers"]["layer_0"]["attention"]["key"].nbytes
    compiled = advance.lower(params, state, np.int32(9), *settings, plan=plan).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < layer / 4
    assert compiled.memory_analysis().alias_size_in_bytes >= 4 * layer


def test_everything_wrong_with_a_request_is_said_at_once():
    model, params = create("gpt2")
    with pytest.raises(GenerateError) as error:
        generate(
            model, params, [[], [V, 1], [1] * 30, "text"], max_new_tokens=0, temperature=-1.0, top_k=0, top_p=1.5,
            min_p=-0.1, repetition_penalty=0.0, stop_tokens=[99], n_beams=0,
        )  # fmt: skip
    message = str(error.value)
    words = [
        "prompt 0 is empty", f"prompt 1 has tokens [{V}]", "prompt 3 is 'text'", "max_new_tokens=0", "temperature=-1.0",
        "top_k=0", "top_p=1.5", "min_p=-0.1", "repetition_penalty=0.0", "stop_tokens has [99]", "n_beams=0",
    ]  # fmt: skip
    assert [word for word in words if word not in message] == []


def test_a_prompt_longer_than_the_context_names_both():
    model, params = create("gpt2")
    with pytest.raises(GenerateError, match=r"30 tokens.*max_new_tokens=5 35, more than the 32 positions of GPT2"):
        generate(model, params, [[1] * 30], max_new_tokens=5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"top_k": 3}, "top_k do nothing at temperature=0"),
        ({"n_beams": 2, "temperature": 1.0}, "not temperature"),
        ({"n_beams": 2, "on_token": print}, "n_beams=1 with on_token"),
        ({"n_beams": 2, "repetition_penalty": 1.2}, "is not for beam search"),
        ({"length_penalty": 2.0}, "is of beam search"),
    ],
)
def test_options_that_contradict_each_other(options, match):
    model, params = create("gpt2")
    with pytest.raises(GenerateError, match=match):
        generate(model, params, PROMPTS, max_new_tokens=3, **options)


def test_what_is_no_language_model_is_refused():
    from jaxdl.models import MLP

    with pytest.raises(GenerateError, match="MLP lacks hidden, logits, init_cache, vocab_size"):
        generate(MLP(widths=(2,), n_outputs=2), {}, [[1]], max_new_tokens=1)


def test_a_cpu_writes_new_keys_and_values_into_the_cache_without_a_copy():
    model = GPT2(gpt2_block(width=32, n_heads=2), n_layers=2, vocab_size=64, n_positions=64)
    plan, sampling = Plan(Calls(model), 16, is_greedy=True, top_k=None), Sampling(0.0, None, None, None, None)
    key, stops = jax.random.key(0), jnp.zeros(0, jnp.int32)

    def first(tokens_BT):
        params = model.init(key, tokens_BT)["params"]
        return params, begin(params, tokens_BT, tokens_BT > 0, stops, key, sampling, plan=plan)

    params, state = jax.eval_shape(first, jax.ShapeDtypeStruct((3, 16), jnp.int32))
    text = advance.lower(params, state, jnp.int32(4), stops, key, sampling, plan=plan).compile().as_text()
    shapes = {f"f32[{','.join(map(str, leaf.shape))}]" for leaf in jax.tree.leaves(state.cache) if leaf.ndim == 3}
    assert shapes == {"f32[6,32,16]"}
    assert text.count("f32[6,32,16]") > 8
    assert not [line for line in text.splitlines() if re.search(r"= f32\[6,32,16\]\S* (copy|transpose)\(", line)]
