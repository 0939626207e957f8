"""DPO and IPO against NumPy and PyTorch, log-probabilities of completions, and references that never move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl import JaxdlError, create_state, make_train_step, paths
from jaxdl.finetune.adapters import with_adapters
from jaxdl.finetune.lora import Lora, add
from jaxdl.finetune.preference import base_reference, copied_reference, dpo, ipo, make_preference_loss_fn, score_pairs
from jaxdl.finetune.quantize import quantize
from jaxdl.models.apply import init_model
from jaxdl.models.gpt2 import GPT2, gpt2_block
from jaxdl.models.language import make_sequence_log_prob_fn

RNG = np.random.default_rng(0)
POLICY, REFERENCE = RNG.normal(size=(2, 6)) * 9 - 30, RNG.normal(size=(2, 6)) * 9 - 30
MARGIN = (POLICY[0] - POLICY[1]) - (REFERENCE[0] - REFERENCE[1])
WEIGHT = np.array([1.0, 0.0, 2.0, 1.0, 0.5, 1.0])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_dpo_against_numpy(weight, label_smoothing):
    beta, rows = 0.3, np.ones(6) if weight is None else weight
    given = None if weight is None else jnp.asarray(weight)
    total, n = dpo(jnp.asarray(MARGIN, jnp.float32), given, beta=beta, label_smoothing=label_smoothing)
    right, wrong = -np.log(sigmoid(beta * MARGIN)), -np.log(sigmoid(-beta * MARGIN))
    np.testing.assert_allclose(total, rows @ ((1 - label_smoothing) * right + label_smoothing * wrong), rtol=1e-5)
    assert float(n) == rows.sum()
    gradient = jax.grad(lambda m: dpo(m, given, beta=beta, label_smoothing=label_smoothing).total)
    meant = rows * beta * (sigmoid(beta * MARGIN) - 1 + label_smoothing)
    np.testing.assert_allclose(gradient(jnp.asarray(MARGIN, jnp.float32)), meant, atol=1e-5)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_ipo_against_numpy(weight):
    rows = np.ones(6) if weight is None else weight
    given = None if weight is None else jnp.asarray(weight)
    total, _ = ipo(jnp.asarray(MARGIN, jnp.float32), given, beta=0.2)
    np.testing.assert_allclose(total, rows @ (MARGIN - 2.5) ** 2, rtol=1e-5)
    end = jax.grad(lambda m: ipo(m, beta=0.2).total)(jnp.array([2.5, 3.5]))
    np.testing.assert_allclose(end, [0.0, 2.0], atol=1e-6)  # unlike DPO's, this margin has an end


def test_far_margins_stay_finite():
    assert dpo(jnp.array([-1e4, 1e4]), beta=1.0).finish() == 5e3
    assert np.isfinite(jax.grad(lambda m: dpo(m, beta=1.0).total)(jnp.array([-1e4, 1e4]))).all()


def policy():
    model = GPT2(gpt2_block(width=16, n_heads=2), n_layers=1, vocab_size=13, n_positions=8, layout="unrolled")
    chosen, rejected = (jnp.asarray(RNG.integers(0, 13, (4, 7))) for _ in range(2))
    rejected = rejected.at[:, :3].set(chosen[:, :3])  # the prompt
    lengths = np.array([6, 5, 6, 4])  # tokens and targets are one apart
    params, _ = init_model(model, jax.random.key(0), chosen)
    return model, params, {"chosen": rows_of(chosen, lengths), "rejected": rows_of(rejected, lengths - 1)}


def rows_of(tokens, lengths, n_prompt=3):
    place = np.arange(tokens.shape[1] - 1)[None]
    is_completion = (place >= n_prompt - 1) & (place < lengths[:, None])
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weight": jnp.asarray(is_completion, jnp.float32)}


def numpy_log_probs(model, params, rows):
    logits = np.asarray(model.apply({"params": params}, rows["tokens"]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    token = np.take_along_axis(log_p, np.asarray(rows["targets"])[..., None], -1)[..., 0]
    return (token * np.asarray(rows["weight"])).sum(1)


@pytest.mark.parametrize("chunk_tokens", [None, 8])
def test_log_probabilities_are_of_the_completion_alone(chunk_tokens):
    model, params, batch = policy()
    log_prob_fn = jax.jit(make_sequence_log_prob_fn(model, train=False, chunk_tokens=chunk_tokens))
    scores = score_pairs(log_prob_fn, params, {}, batch, None)
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(scores[side], numpy_log_probs(model, params, batch[side]), rtol=1e-5)
    rows = batch["chosen"]
    other = {**rows, "targets": jnp.where(rows["weight"] == 0, 12 - rows["targets"], rows["targets"])}
    np.testing.assert_array_equal(log_prob_fn(params, {}, other, None), log_prob_fn(params, {}, rows, None))


def losses_of(model, **options):
    """The loss with a copy as reference, and that with given numbers."""
    log_prob_fn = make_sequence_log_prob_fn(model, train=False)
    copied = make_preference_loss_fn(log_prob_fn, copied_reference(log_prob_fn), **options)
    return copied, make_preference_loss_fn(log_prob_fn, **options), log_prob_fn


def moved(params, size=0.1):
    """A policy that has left its reference."""
    flat = paths.flatten(params)
    noise = [size * RNG.normal(size=leaf.shape).astype(np.float32) for leaf in flat.values()]
    return jax.tree.unflatten(
        jax.tree.structure(params), [x + jnp.asarray(e) for x, e in zip(flat.values(), noise, strict=True)]
    )


def test_loss_gradient_and_metrics_against_pytorch():
    """The formula of eq. 7 in PyTorch over log-probabilities; the chain rule through the model is JAX's own."""
    torch = pytest.importorskip("torch")
    model, reference, batch = policy()
    params, (copied, _, log_prob_fn) = moved(reference), losses_of(model, beta=0.5)
    scored = score_pairs(log_prob_fn, params, {}, batch, None)
    anchor = score_pairs(log_prob_fn, reference, {}, batch, None)
    ours = {side: torch.tensor(np.asarray(scored[side]), requires_grad=True) for side in scored}
    theirs = {side: torch.tensor(np.asarray(anchor[side])) for side in anchor}
    rewards = {side: 0.5 * (ours[side] - theirs[side]) for side in ours}
    loss = -torch.nn.functional.logsigmoid(rewards["chosen"] - rewards["rejected"]).sum()
    loss.backward()
    out = jax.jit(copied)({**params, "reference": reference}, {}, batch, None)
    np.testing.assert_allclose(out.total, loss.item(), rtol=1e-5)
    assert float(out.weight) == 4.0
    margin = (rewards["chosen"] - rewards["rejected"]).detach().numpy()
    np.testing.assert_allclose(out.sums["reward_margin"].finish(), margin.mean(), rtol=1e-4)
    np.testing.assert_allclose(out.sums["chosen_reward"].finish(), rewards["chosen"].mean().item(), rtol=1e-4)
    np.testing.assert_allclose(out.sums["rejected_reward"].finish(), rewards["rejected"].mean().item(), rtol=1e-4)
    assert out.sums["preference_accuracy"].finish() == (margin > 0).mean()
    gradient = jax.grad(lambda p: copied({**p, "reference": reference}, {}, batch, None).total)(params)
    _, pull = jax.vjp(lambda p: score_pairs(log_prob_fn, p, {}, batch, None), params)
    meant = pull({side: jnp.asarray(ours[side].grad.numpy()) for side in ours})[0]
    for path, leaf in paths.flatten(gradient).items():
        np.testing.assert_allclose(leaf, paths.flatten(meant)[path], atol=2e-5, err_msg=path)


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_given_numbers_are_a_second_road(loss):
    model, reference, batch = policy()
    params, (copied, given, log_prob_fn) = moved(reference), losses_of(model, loss=loss)
    known = {**batch, "reference": score_pairs(log_prob_fn, reference, {}, batch, None)}
    one = copied({**params, "reference": reference}, {}, batch, None)
    two = given(params, {}, known, None)
    np.testing.assert_allclose(one.total, two.total, rtol=1e-6)


def test_at_the_start_the_loss_is_log_2_and_nothing_is_preferred():
    model, params, batch = policy()
    out = losses_of(model)[0]({**params, "reference": params}, {}, {**batch, "weight": jnp.array([1.0, 1, 0, 1])}, None)
    np.testing.assert_allclose(out.total, 3 * np.log(2), rtol=1e-6)
    assert float(out.weight) == 3.0
    assert {name: value.finish() for name, value in out.sums.items()} == {
        "preference_accuracy": 0.0,
        "reward_margin": 0.0,
        "chosen_reward": 0.0,
        "rejected_reward": 0.0,
    }


def train(loss_fn, params, trainable, batch, n=12):
    tx = optax.adam(3e-2)
    state = create_state(params, {}, tx, rng=jax.random.key(1), trainable=trainable)
    step = jax.jit(make_train_step(loss_fn, tx, trainable=trainable, microbatches=2))
    history = []
    for _ in range(n):
        state, metrics = step(state, batch)
        history.append({name: metrics[name].finish() for name in ("loss", "reward_margin", "preference_accuracy")})
    return state, history


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_training_raises_the_margin_and_not_the_reference(loss):
    model, params, batch = policy()
    trainable = [("reference/.*", False), (".*", True)]
    both = {**params, "reference": params}
    state, history = train(losses_of(model, loss=loss)[0], both, trainable, batch)
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["reward_margin"] > history[0]["reward_margin"] + 0.3
    assert history[-1]["preference_accuracy"] == 1.0
    for path, leaf in paths.flatten(params).items():
        np.testing.assert_array_equal(paths.flatten(state.params["reference"])[path], leaf)


LORA = Lora([(".*(query|value|up)/kernel", 2), (".*", None)])
ADAPTERS_TRAIN = [("adapters/.*", True), (".*", False)]


def with_lora(model, params, batch):
    log_prob_fn = make_sequence_log_prob_fn(model, train=True)
    still_fn = make_sequence_log_prob_fn(model, train=False)
    loss_fn = with_adapters(make_preference_loss_fn(log_prob_fn, base_reference(still_fn)), LORA)
    return loss_fn, add(jax.random.key(2), params, LORA, model, batch["chosen"]["tokens"]), still_fn


def test_the_base_is_the_reference_of_adapters():
    """A second road: the numbers of the base in the batch, and the adapters' gradient from them."""
    model, params, batch = policy()
    loss_fn, adapted, still_fn = with_lora(model, params, batch)
    adapted["adapters"] = moved(adapted["adapters"])
    known = {**batch, "reference": score_pairs(still_fn, params, {}, batch, None)}
    given = with_adapters(make_preference_loss_fn(still_fn), LORA)

    def loss_of(fn, batch):
        return jax.jit(jax.value_and_grad(lambda a: fn({**params, "adapters": a}, {}, batch, jax.random.key(0)).total))

    one, gradient = loss_of(loss_fn, batch)(adapted["adapters"])
    two, meant = loss_of(given, known)(adapted["adapters"])
    assert abs(float(one) - 4 * np.log(2)) > 1e-3
    np.testing.assert_allclose(one, two, rtol=1e-5)
    for path, leaf in paths.flatten(gradient).items():
        np.testing.assert_allclose(leaf, paths.flatten(meant)[path], atol=1e-5, err_msg=path)


def test_adapters_over_a_quantised_base_learn_too():
    model, params, batch = policy()
    small = quantize(params, [(".*/kernel", "nf4"), (".*", None)])
    loss_fn, adapted, _ = with_lora(model, small, batch)
    _, history = train(loss_fn, adapted, ADAPTERS_TRAIN, batch)
    np.testing.assert_allclose(history[0]["loss"], np.log(2), rtol=1e-5)  # b is zero: policy and reference agree
    assert history[-1]["reward_margin"] > 0.05
    assert history[-1]["preference_accuracy"] == 1.0


def test_a_reference_that_would_train_is_refused():
    model, params, batch = policy()
    state = create_state({**params, "reference": params}, {}, optax.sgd(0.1), rng=jax.random.key(0))
    with pytest.raises(
        JaxdlError, match=r"(?s)reference/decoder/final_norm/bias.*put \('reference/\.\*', False\) first"
    ):
        jax.eval_shape(make_train_step(losses_of(model)[0], optax.sgd(0.1)), state, batch)
    loss_fn, adapted, _ = with_lora(model, params, batch)
    trainable = [("adapters/.*", True), (".*/bias", True), (".*", False)]
    state = create_state(adapted, {}, optax.sgd(0.1), rng=jax.random.key(0), trainable=trainable)
    with pytest.raises(JaxdlError, match=r"(?s)^decoder/final_norm/bias, .* must be frozen; train the adapters alone"):
        jax.eval_shape(make_train_step(loss_fn, optax.sgd(0.1), trainable=trainable), state, batch)


def test_what_is_wrong_is_told():
    with pytest.raises(
        JaxdlError, match=r"(?s)2 problem.*beta=0 must be positive.*label_smoothing=0.5 must be in \[0, 0.5\)"
    ):
        dpo(jnp.zeros(1), beta=0, label_smoothing=0.5)
    with pytest.raises(JaxdlError, match="loss='dpp' is unknown; did you mean 'dpo' or 'ipo'"):
        make_preference_loss_fn(None, loss="dpp")
    with pytest.raises(JaxdlError, match="IPO has none"):
        make_preference_loss_fn(None, loss="ipo", label_smoothing=0.1)
    rows = {"x": jnp.ones(2)}
    loss_fn = make_preference_loss_fn(lambda params, extra, rows, rng: rows["x"])
    with pytest.raises(JaxdlError, match=r"no 'rejected'; it has chosen\."):
        loss_fn({}, {}, {"chosen": rows}, None)
    with pytest.raises(JaxdlError, match=r"(?s)x is \(2,\) in 'chosen' and \(3,\) in 'rejected'.*y is missing in"):
        loss_fn({}, {}, {"chosen": rows, "rejected": {"x": jnp.ones(3), "y": jnp.ones(1)}}, None)
    for reference, told in (
        ({}, r"chosen missing and rejected missing; make it \(2,\) by score_pairs"),
        ({"reference": {"chosen": jnp.ones(2), "rejected": jnp.ones((2, 1))}}, r"rejected \(2, 1\); make it \(2,\)"),
    ):
        with pytest.raises(JaxdlError, match=told):
            loss_fn({}, {}, {"chosen": rows, "rejected": rows, **reference}, None)
