"""Attention, the encoder-decoder, decoding against enumeration, and the experiment on dates."""

import itertools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dates, sequence_to_sequence
from jaxdl.command import run_command
from jaxdl.config import ConfigError, parse
from jaxdl.errors import JaxdlError
from jaxdl.models.checks import ModelError
from jaxdl.models.seq2seq import Seq2Seq
from jaxdl.models.seq2seq_attention import AdditiveAttention, Memory, MultiplicativeAttention, attend
from jaxdl.models.seq2seq_decode import beam_search, greedy_search, make_translator
from jaxdl.paths import flatten
from jaxdl.report import read_history

B, S, T, D, E = 2, 4, 3, 5, 6
RNG = np.random.default_rng(0)
QUERY, VALUES = RNG.normal(size=(B, T, D)), RNG.normal(size=(B, S, E))
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
CONFIGS = Path(__file__).parents[1] / "configs"


def additive_score(p, q, v):
    hidden = np.tanh(q @ p["query"]["kernel"] + v @ p["key"]["kernel"] + p["key"]["bias"])
    return (hidden @ p["score"]["kernel"])[0]


def multiplicative_score(p, q, v):
    return q @ (v @ p["key"]["kernel"])


@pytest.mark.parametrize(
    ("module", "score"),
    [(AdditiveAttention, additive_score), (MultiplicativeAttention, multiplicative_score)],
)
def test_attention_against_a_loop(module, score):
    with jax.enable_x64(True):
        attention = module(D, dtype=jnp.float64, param_dtype=jnp.float64)
        variables = attention.init(jax.random.key(0), QUERY, VALUES)
        variables = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), variables)
        scores = attention.apply(variables, QUERY, VALUES)
        context, weights = attend(scores, Memory(jnp.zeros(0), jnp.asarray(VALUES), jnp.asarray(MASK)))
    p = jax.tree.map(np.asarray, variables["params"])
    for b, t in itertools.product(range(B), range(T)):
        row = [score(p, QUERY[b, t], VALUES[b, s]) for s in range(S) if MASK[b, s]]
        share = np.exp(row) / np.sum(np.exp(row))
        np.testing.assert_allclose(weights[b, t][MASK[b]], share, rtol=1e-9)
        np.testing.assert_allclose(context[b, t], share @ VALUES[b][MASK[b]], rtol=1e-9)
    assert (np.asarray(weights)[1, :, 2:] == 0).all()


def make(**options):
    model = Seq2Seq(source_vocab_size=9, target_vocab_size=7, width=8, embed_width=6, **options)
    source, previous = jnp.array([[3, 4, 5, 6, 8], [7, 3, 0, 0, 0]]), jnp.array([[1, 3, 4, 5], [1, 6, 2, 0]])
    variables = jax.jit(model.init)(jax.random.key(0), source, previous=previous)
    return model, variables, source, previous, jnp.array([5, 2])


@pytest.mark.parametrize("attention", ["additive", "multiplicative"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_padding_of_the_source_changes_nothing(cell, attention):
    model, variables, source, previous, lengths = make(cell=cell, attention=attention, n_encoder_layers=2)
    apply = jax.jit(lambda source: model.apply(variables, source, previous=previous, lengths=lengths))
    logits = apply(source)
    np.testing.assert_array_equal(logits, apply(source.at[1, 2:].set(8)))
    assert not np.allclose(logits[1], apply(source.at[1, 1].set(8))[1], atol=1e-4)
    mask = jnp.arange(5)[None] < lengths[:, None]
    by_mask = jax.jit(lambda source: model.apply(variables, source, previous=previous, mask=mask))(source)
    np.testing.assert_array_equal(logits, by_mask)
    alone = jax.jit(model.apply)(variables, source[1:, :2], previous=previous[1:])
    np.testing.assert_allclose(logits[1:], alone, atol=1e-6)


def test_a_target_sees_only_the_tokens_before_it():
    model, variables, source, previous, lengths = make()
    apply = jax.jit(lambda previous: model.apply(variables, source, previous=previous, lengths=lengths))
    logits, changed = apply(previous), apply(previous.at[:, 2].set(0))
    np.testing.assert_array_equal(logits[:, :2], changed[:, :2])
    assert (np.abs(logits[:, 2:] - changed[:, 2:]).max(-1) > 1e-5).all()


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_step_by_step_equals_teacher_forcing(cell):
    model, variables, source, previous, lengths = make(cell=cell, n_decoder_layers=2)
    apply = jax.jit(model.apply, static_argnames="method")
    expected = apply(variables, source, previous=previous, lengths=lengths)
    memory, carry = apply(variables, source, lengths=lengths, method=Seq2Seq.encode)
    for t in range(previous.shape[1]):
        logits, carry = apply(variables, previous[:, t : t + 1], memory, carry, method=Seq2Seq.decode)
        np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=1e-5)


@pytest.mark.parametrize("attention", ["additive", "multiplicative"])
def test_every_parameter_learns(attention):
    model, variables, source, previous, lengths = make(attention=attention, n_encoder_layers=2, n_decoder_layers=2)
    targets, params, losses = jnp.array([[3, 4, 5, 2], [6, 2, 0, 0]]), variables["params"], []

    @jax.jit
    def step(params):
        def loss(params):
            logits = model.apply({"params": params}, source, previous=previous, lengths=lengths, train=True)
            out = sequence_to_sequence.translation()(logits, {"targets": targets})
            return out.total / out.weight

        loss, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), loss, grads

    for i in range(60):
        params, loss, grads = step(params)
        losses.append(float(loss))
        if i == 0:
            quiet = [path for path, grad in flatten(grads).items() if np.abs(grad).max() < 1e-8]
            assert not quiet
    assert losses[-1] < 0.5 * losses[0]


def test_paths():
    _, variables, *_ = make(attention="additive", n_decoder_layers=2)
    assert list(flatten(jax.tree.map(lambda leaf: "x".join(map(str, leaf.shape)), variables["params"])).items()) == [
        ("attention/key/bias", "8"),
        ("attention/key/kernel", "16x8"),
        ("attention/query/kernel", "8x8"),
        ("attention/score/kernel", "8x1"),
        ("bridge/bias", "32"),
        ("bridge/kernel", "32x32"),
        ("combine/bias", "8"),
        ("combine/kernel", "24x8"),
        ("decoder/layer_0/forward/input/bias", "32"),
        ("decoder/layer_0/forward/input/kernel", "6x32"),
        ("decoder/layer_0/forward/recurrent/bias", "32"),
        ("decoder/layer_0/forward/recurrent/kernel", "8x32"),
        ("decoder/layer_1/forward/input/bias", "32"),
        ("decoder/layer_1/forward/input/kernel", "8x32"),
        ("decoder/layer_1/forward/recurrent/bias", "32"),
        ("decoder/layer_1/forward/recurrent/kernel", "8x32"),
        ("embed/source/embedding", "9x6"),
        ("embed/target/embedding", "7x6"),
        ("encoder/layer_0/backward/input/bias", "32"),
        ("encoder/layer_0/backward/input/kernel", "6x32"),
        ("encoder/layer_0/backward/recurrent/bias", "32"),
        ("encoder/layer_0/backward/recurrent/kernel", "8x32"),
        ("encoder/layer_0/forward/input/bias", "32"),
        ("encoder/layer_0/forward/input/kernel", "6x32"),
        ("encoder/layer_0/forward/recurrent/bias", "32"),
        ("encoder/layer_0/forward/recurrent/kernel", "8x32"),
        ("head/bias", "7"),
        ("head/kernel", "8x7"),
    ]


def test_what_makes_no_network_is_refused():
    with pytest.raises(ModelError) as caught:
        Seq2Seq(source_vocab_size=0, target_vocab_size=5, attention="aditive", cell="lstn", dropout_rate=1.0)
    for part in ("source_vocab_size=0", "did you mean 'additive'", "did you mean 'lstm'", "dropout_rate=1.0"):
        assert part in str(caught.value)
    model, variables, source, previous, _ = make()
    with pytest.raises(ModelError, match="source is float32; give token numbers"):
        model.apply(variables, source.astype(jnp.float32), previous=previous)
    with pytest.raises(ModelError, match="previous has shape"):
        model.apply(variables, source, previous=previous[0])


# Decoding: a language whose next token depends on the two before, given as a table.

BOS, EOS, V, LONGEST = 4, 1, 4, 4


def language(seed, n_rows):
    logits = np.random.default_rng(seed).normal(size=(n_rows, V + 1, V + 1, V)) * 1.5
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def step_fn(table, tokens, before):
    return table[jnp.arange(tokens.shape[0]), before, tokens], tokens


def log_prob(table, tokens):
    total, before, last = 0.0, BOS, BOS
    for token in tokens:
        total += table[before, last, token]
        before, last = last, token
    return total


def penalised(table, tokens, penalty):
    return log_prob(table, tokens) / ((5 + len(tokens)) / 6) ** penalty


def enumerate_all(table, penalty):
    """Every ended sequence up to the longest, and every one cut there: (has it ended, score, tokens), best first."""
    words = [w for w in range(V) if w != EOS]
    ended = [(*body, EOS) for n in range(LONGEST) for body in itertools.product(words, repeat=n)]
    cut = list(itertools.product(words, repeat=LONGEST))
    ranked = [sorted(((penalised(table, s, penalty), s) for s in group), reverse=True) for group in (ended, cut)]
    return ranked[0] + ranked[1]


def slow_beam_search(table, width, penalty):
    """The same rules in Python lists."""
    live, ended = [(0.0, ())], []
    for _ in range(LONGEST):
        grown = sorted(((log_prob(table, (*s, w)), (*s, w)) for _, s in live for w in range(V)), reverse=True)
        ended += [(penalised(table, s, penalty), s) for _, s in grown[:width] if s[-1] == EOS]
        ended = sorted(ended, reverse=True)[:width]
        live = [item for item in grown if item[1][-1] != EOS][:width]
        if len(ended) == width:
            return ended
    return (ended + sorted(((penalised(table, s, penalty), s) for _, s in live), reverse=True))[:width]


def search(tables, width, penalty):
    n = len(tables)
    return jax.jit(
        lambda tables: beam_search(
            step_fn, tables, jnp.full(n, BOS), n_rows=n, beam_width=width, max_length=LONGEST,
            bos=BOS, eos=EOS, pad=0, length_penalty=penalty,
        )
    )(jnp.asarray(tables, jnp.float32))  # fmt: skip


def check_found(found, row, expected):
    for k, (score, tokens) in enumerate(expected):
        padded = [*tokens, *[0] * (LONGEST - len(tokens))]
        assert found.tokens[row, k].tolist() == padded, (row, k)
        np.testing.assert_allclose(found.scores[row, k], score, rtol=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_a_beam_as_wide_as_the_language_finds_the_best_of_all(penalty):
    tables = language(1, 3)
    width = 3**LONGEST + sum(3**n for n in range(LONGEST))  # every sequence there is
    found = search(tables, width, penalty)
    for row, table in enumerate(tables):
        check_found(found, row, enumerate_all(table, penalty))


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_beam_search_against_the_same_rules_in_lists(width, penalty):
    tables = language(2, 20)
    found = search(tables, width, penalty)
    for row, table in enumerate(tables):
        check_found(found, row, slow_beam_search(table, width, penalty))


def test_a_beam_of_one_is_greedy_and_a_wider_one_is_better_somewhere():
    tables = language(3, 50)
    greedy = greedy_search(
        step_fn, jnp.asarray(tables, jnp.float32), jnp.full(50, BOS), n_rows=50, max_length=LONGEST, bos=BOS, eos=EOS
    )
    one, three = search(tables, 1, 0.0), search(tables, 3, 0.0)
    np.testing.assert_array_equal(greedy, one.tokens[:, 0])
    ended = np.asarray((one.tokens[:, 0] == EOS).any(-1) & (three.tokens[:, 0] == EOS).any(-1))
    gain = np.asarray(three.scores[:, 0] - one.scores[:, 0])[ended]
    assert (gain > 0.1).any()
    assert len(set(map(tuple, np.asarray(greedy).tolist()))) > 5


@pytest.mark.parametrize("n_decoder_layers", [1, 2])
def test_a_translator_follows_its_model(n_decoder_layers):
    """Greedy tokens are the argmax under teacher forcing on themselves; a beam never scores less than them."""
    model, variables, source, _, lengths = make(n_decoder_layers=n_decoder_layers)
    variables = jax.tree.map(lambda p: 3 * p, variables)
    tokens = make_translator(model, max_length=6, bos=1, eos=2)(variables, source, lengths)
    previous = jnp.concatenate([jnp.ones((2, 1), jnp.int32), tokens[:, :-1]], 1)
    logits = model.apply(variables, source, previous=previous, lengths=lengths)
    is_real = np.cumsum(np.asarray(tokens == 2), 1) - np.asarray(tokens == 2) == 0
    np.testing.assert_array_equal(np.asarray(logits.argmax(-1))[is_real], np.asarray(tokens)[is_real])
    assert (np.asarray(tokens)[~is_real] == 0).all()
    beams = make_translator(model, max_length=6, bos=1, eos=2, beam_width=1)(variables, source, lengths)
    np.testing.assert_array_equal(tokens, beams)


def test_decoding_refuses_what_makes_no_sense():
    model, *_ = make()
    with pytest.raises(JaxdlError, match=r"eos=7 is no token; take one of 0\.\.6"):
        make_translator(model, max_length=6, bos=1, eos=7)
    with pytest.raises(ModelError, match=r"3 problem"):
        beam_search(step_fn, (), (), n_rows=1, beam_width=0, max_length=0, bos=0, eos=1, length_penalty=-1.0)


# The experiment.


def test_dates_are_right_disjoint_and_a_function_of_the_seed():
    rows = dates.load(dates.Dates(n_train=300, n_validation=50, n_test=100), seed=3)
    texts = {
        name: [dates.decode(row, dates.TARGET_CHARACTERS) for row in source.arrays["targets"]]
        for name, source in rows.items()
    }
    assert {name: len(text) for name, text in texts.items()} == {"train": 300, "validation": 50, "test": 100}
    assert len(set(itertools.chain(*texts.values()))) == 450
    again, other = (dates.load(dates.Dates(n_train=300, n_validation=50, n_test=100), seed=s) for s in (3, 4))
    np.testing.assert_array_equal(rows["train"].arrays["source"], again["train"].arrays["source"])
    assert (rows["train"].arrays["source"] != other["train"].arrays["source"]).any()
    arrays = rows["train"].arrays
    np.testing.assert_array_equal(arrays["previous"][:, 1:], arrays["targets"][:, :-1])
    assert (arrays["previous"][:, 0] == dates.BOS).all()
    assert ((arrays["source"] != 0).sum(1) == arrays["lengths"]).all()
    last = dates.FIRST_DAY + dates.datetime.timedelta(days=dates.N_DAYS - 1)
    assert last.isoformat() == "2099-12-31"


@pytest.mark.parametrize(
    ("date", "wanted"),
    [
        ("1900-12-01", "december first, nineteen hundred|december the first, nineteen hundred"),
        ("2000-08-20", "the twentieth of august, two thousand"),
        ("1905-05-12", "twelfth of may nineteen (oh|hundred and) five"),
        ("1999-01-31", "january the thirty-first, nineteen ninety-nine"),
        ("2009-02-22", "feb. 22, two thousand (and )?nine"),
    ],
)
def test_a_date_is_said_in_many_ways(date, wanted):
    day = dates.datetime.date.fromisoformat(date)
    said = {dates.phrase(day, np.random.default_rng(seed)) for seed in range(200)}
    assert any(re.fullmatch(f"(\\w+day, )?({wanted})", text) for text in said), said
    assert len(said) >= 10


def run(out, *flags):
    small = ["data.n_train=64", "data.n_validation=8", "data.n_test=8", "data.batch_size=16", "data.eval_batch_size=8"]
    small += [
        "loop.length=2",
        "loop.log_every=1",
        "loop.steps_per_call=1",
        "optimizer.warmup=1",
        "parallel.mesh=data=1",
        f"out={out}",
        *flags,
    ]
    config, module = CONFIGS / "dates_lstm.py", sequence_to_sequence
    return run_command(
        module.Config, module.experiment, [f"--config={config}", *(f"--config.{flag}" for flag in small)]
    )


@pytest.mark.parametrize(
    "flags",
    [(), ("beam_width=3", "length_penalty=0.5", "model.attention=multiplicative", "model.cell=gru")],
    ids=["shipped", "beam"],
)
def test_the_experiment_runs(flags, tmp_path, capsys):
    assert run(tmp_path, *flags) == 0
    out = capsys.readouterr().out
    assert re.search(r"\w+ .* -> ", out)
    share = re.search(r"test exact match ([\d.]+) %  \((\d) of 8 wrong, 2 steps\)", out)
    assert share
    history = read_history(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in history if "train/loss" in row] == [1, 2]
    assert any("validation/exact_match" in row for row in history)
    assert "Translations" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["loop"]["length"] == "2 steps"


def test_exact_match_under_teacher_forcing_is_that_of_greedy_decoding():
    """On a network that knows some rows: both numbers come from the same arrays by different roads."""
    model, variables, source, _, lengths = make()
    variables = jax.tree.map(lambda p: 3 * p, variables)
    written = make_translator(model, max_length=6, bos=1, eos=2)(variables, source, lengths)
    for targets in (written, written.at[0, 1].set(written[0, 1] % 6 + 1)):
        previous = jnp.concatenate([jnp.ones((2, 1), jnp.int32), targets[:, :-1]], 1)
        logits = model.apply(variables, source, previous=previous, lengths=lengths)
        found = sequence_to_sequence.translation()(logits, {"targets": targets}).sums["exact_match"].finish()
        assert found == float((written == targets).all(1).mean())


def test_impossible_settings_come_at_once():
    flags = ["data.n_test=0", "data.n_validation=-1", "beam_width=0", "length_penalty=-1", "label_smoothing=1"]
    with pytest.raises(ConfigError) as caught:
        parse(sequence_to_sequence.Config, [f"--config.{flag}" for flag in flags])
    for part in ("n_test=0", "n_validation=-1", "beam_width=0", "length_penalty=-1", "label_smoothing=1.0"):
        assert part in str(caught.value)
