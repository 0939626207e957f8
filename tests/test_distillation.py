"""Soft targets against NumPy in float64, weights, and a teacher that is asked and never moves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl import JaxdlError, create_state, make_train_step, paths
from jaxdl.finetune.distillation import distillation, refuse_gradient, soft_cross_entropy, with_teacher
from jaxdl.finetune.quantize import quantize, with_quantized
from jaxdl.losses import LossOut
from jaxdl.models import MLP
from jaxdl.models.apply import init_model, make_loss_fn
from jaxdl.objectives import classification

RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(size=(5, 4)) * 2, RNG.normal(size=(5, 4)) * 3
LABELS, WEIGHT = np.array([0, 3, 1, 1, 2]), np.array([1.0, 0.5, 0.0, 2.0, 1.0])
FROZEN_TEACHER = [("teacher/.*", False), (".*", True)]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def numpy_soft(student, teacher, temperature):
    """Row by row, and its gradient by the student's logits."""
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return temperature**2 * (p * np.log(p / q)).sum(-1), temperature * (q - p)


def numpy_hard(student, labels):
    q = softmax(student)
    return -np.log(q[np.arange(len(labels)), labels]), q - np.eye(student.shape[1])[labels]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("hard_share", [0.0, 0.3])
def test_loss_and_gradient_against_numpy(temperature, hard_share):
    objective = distillation(classification(), temperature=temperature, hard_share=hard_share)
    batch = {"label": LABELS, "weight": WEIGHT, "teacher_logits": TEACHER.astype(np.float32)}
    batch = jax.tree.map(jnp.asarray, batch)
    out = objective(jnp.asarray(STUDENT, jnp.float32), batch)
    gradient = jax.grad(lambda x: objective(x, batch).total)(jnp.asarray(STUDENT, jnp.float32))
    (soft, soft_gradient), (hard, hard_gradient) = (
        numpy_soft(STUDENT, TEACHER, temperature),
        numpy_hard(STUDENT, LABELS),
    )
    np.testing.assert_allclose(out.total, WEIGHT @ (hard_share * hard + (1 - hard_share) * soft), rtol=1e-5)
    meant = WEIGHT[:, None] * (hard_share * hard_gradient + (1 - hard_share) * soft_gradient)
    np.testing.assert_allclose(gradient, meant, atol=1e-5)
    assert float(out.weight) == WEIGHT.sum()
    np.testing.assert_allclose(out.sums["soft_loss"].finish(), WEIGHT @ soft / WEIGHT.sum(), rtol=1e-5)
    np.testing.assert_allclose(out.sums["hard_loss"].finish(), WEIGHT @ hard / WEIGHT.sum(), rtol=1e-5)


def test_at_high_temperature_the_gradient_is_the_distance_of_the_logits():
    """Hinton et al. 2015, eq. 4: (z - v) / N, for logits of mean zero; T**2 is in our loss already."""
    z, v = (x - x.mean(-1, keepdims=True) for x in (STUDENT, TEACHER))
    gradient = jax.grad(lambda x: soft_cross_entropy(x, jnp.asarray(v, jnp.float32), temperature=300.0).total)
    np.testing.assert_allclose(gradient(jnp.asarray(z, jnp.float32)), (z - v) / 4, atol=0.02)


def test_it_is_zero_where_both_agree_whatever_the_offset():
    teacher = jnp.asarray(TEACHER, jnp.float32)
    assert abs(float(soft_cross_entropy(teacher + 7.0, teacher, temperature=2.0).total)) < 1e-5
    assert float(soft_cross_entropy(teacher, teacher).total) == 0.0


def test_rows_of_weight_zero_and_impossible_classes():
    student, teacher = jnp.asarray(STUDENT, jnp.float32), jnp.asarray(TEACHER, jnp.float32)
    weight = jnp.asarray(WEIGHT, jnp.float32)
    spoilt = teacher.at[2].set(jnp.nan)
    assert float(soft_cross_entropy(student, spoilt, weight).total) == float(
        soft_cross_entropy(student, teacher, weight).total
    )
    masked_student, masked_teacher = student.at[:, 1].set(-jnp.inf), teacher.at[:, 1].set(-jnp.inf)
    others = np.array([0, 2, 3])
    np.testing.assert_allclose(
        soft_cross_entropy(masked_student, masked_teacher).total,
        numpy_soft(STUDENT[:, others], TEACHER[:, others], 1.0)[0].sum(),
        rtol=1e-5,
    )
    assert np.isfinite(jax.grad(lambda x: soft_cross_entropy(x, masked_teacher).total)(masked_student)).all()


def test_tokens_are_rows_too():
    student, teacher = (jnp.asarray(x, jnp.float32).reshape(1, 5, 4) for x in (STUDENT, TEACHER))
    by_row = soft_cross_entropy(student, teacher, jnp.ones(1), temperature=2.0)
    assert float(by_row.weight) == 5.0
    np.testing.assert_allclose(by_row.total, numpy_soft(STUDENT, TEACHER, 2.0)[0].sum(), rtol=1e-5)


def test_class_weights_divide_by_rows():
    class_weights = np.array([1.0, 2.0, 0.5, 3.0])
    objective = distillation(classification(class_weights=jnp.asarray(class_weights)), hard_share=0.5, temperature=1.0)
    batch = {"label": jnp.asarray(LABELS), "teacher_logits": jnp.asarray(TEACHER, jnp.float32)}
    out = objective(jnp.asarray(STUDENT, jnp.float32), batch)
    hard, soft = class_weights[LABELS] * numpy_hard(STUDENT, LABELS)[0], numpy_soft(STUDENT, TEACHER, 1.0)[0]
    np.testing.assert_allclose(out.total / out.weight, (hard + soft).mean() / 2, rtol=1e-5)


def school():
    """A teacher, a smaller student, and their losses."""
    teacher, student = MLP(widths=(16,), n_outputs=3), MLP(widths=(8,), n_outputs=3)
    x = jax.random.normal(jax.random.key(0), (12, 6))
    batch = {"features": x, "label": jnp.argmax(x[:, :3], axis=1)}
    taught, _ = init_model(teacher, jax.random.key(1), x)
    params, _ = init_model(student, jax.random.key(2), x)
    loss_fn = make_loss_fn(student, distillation(hard_share=0.0), inputs="features", train=True)

    def teacher_fn(variables, batch):
        return teacher.apply({"params": variables}, batch["features"], train=False)

    return params, taught, with_teacher(loss_fn, teacher_fn), batch, (student, teacher, teacher_fn)


@pytest.mark.parametrize("microbatches", [1, 3])
def test_a_student_learns_and_the_teacher_does_not_move(microbatches):
    params, taught, loss_fn, batch, (student, teacher, _) = school()
    tx = optax.adamw(0.03, weight_decay=0.1)
    state = create_state({**params, "teacher": taught}, {}, tx, rng=jax.random.key(3), trainable=FROZEN_TEACHER)
    assert not [path for path in paths.flatten(state.opt_state) if "teacher" in path]
    step = jax.jit(make_train_step(loss_fn, tx, trainable=FROZEN_TEACHER, microbatches=microbatches))
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"].finish())
    assert losses[-1] < losses[0] / 20
    for path, leaf in paths.flatten(taught).items():
        np.testing.assert_array_equal(paths.flatten(state.params["teacher"])[path], leaf)
    learnt = {name: tree for name, tree in state.params.items() if name != "teacher"}
    assert paths.flatten(learnt).keys() == paths.flatten(params).keys()
    says, said = (
        jax.nn.softmax(model.apply({"params": tree}, batch["features"], train=False))
        for model, tree in ((student, learnt), (teacher, taught))
    )
    np.testing.assert_allclose(says, said, atol=0.1)
    evaluate = make_loss_fn(student, classification(), inputs="features", train=False)
    judged = evaluate(state.params, {}, {**batch, "label": jnp.argmax(said, axis=1)}, None)
    assert judged.sums["accuracy"].finish() > 0.8


def test_the_gradient_is_the_one_of_given_logits():
    """A second road: the teacher's logits computed before and put in the batch."""
    params, taught, loss_fn, batch, (student, _, teacher_fn) = school()
    given = {**batch, "teacher_logits": teacher_fn(taught, batch)}
    plain = make_loss_fn(student, distillation(hard_share=0.0), inputs="features", train=True)
    rng = jax.random.key(0)
    one = jax.grad(lambda p: loss_fn({**p, "teacher": taught}, {}, batch, rng).total)(params)
    two = jax.grad(lambda p: plain(p, {}, given, rng).total)(params)
    for path, leaf in paths.flatten(one).items():
        np.testing.assert_allclose(leaf, paths.flatten(two)[path], atol=1e-6)


def test_a_teacher_in_eight_bits():
    params, taught, _, batch, (student, _, teacher_fn) = school()
    small = quantize(taught, [(".*0/kernel", "int8"), (".*", None)])
    plain = make_loss_fn(student, distillation(hard_share=0.0), inputs="features", train=True)
    tx = optax.sgd(0.1)
    state = create_state({**params, "teacher": small}, {}, tx, rng=jax.random.key(3), trainable=FROZEN_TEACHER)
    step = jax.jit(make_train_step(with_teacher(plain, with_quantized(teacher_fn)), tx, trainable=FROZEN_TEACHER))
    assert np.isfinite(step(state, batch)[1]["loss"].finish())


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_teacher_that_would_train_is_refused_before_anything_compiles(microbatches):
    params, taught, loss_fn, batch, _ = school()
    trainable = [("teacher/.*kernel", True), ("teacher/.*", False), (".*", True)]
    state = create_state({**params, "teacher": taught}, {}, optax.sgd(0.1), rng=jax.random.key(3), trainable=trainable)
    step = make_train_step(loss_fn, optax.sgd(0.1), trainable=trainable, microbatches=microbatches)
    kernels = [f"teacher/{path}" for path in paths.flatten(taught) if path.endswith("kernel")]
    with pytest.raises(JaxdlError) as told:
        jax.eval_shape(step, state, batch)
    first, *_ = str(told.value).splitlines()
    assert first == f"{', '.join(kernels)} must be frozen; put ('teacher/.*', False) first in trainable."


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.vmap(f, axis_size=2, in_axes=None)])
def test_a_gradient_is_refused_through_every_transformation(wrap):
    def loss(w, v):
        return jnp.sum(wrap(lambda w, v: refuse_gradient(v, "v/")["x"] * w)(w, {"x": v}))

    np.testing.assert_allclose(jax.grad(loss)(2.0, 3.0), 3.0 * jnp.size(wrap(lambda a, b: a)(1.0, {"x": 1.0})))
    with pytest.raises(JaxdlError, match="v/x must be frozen"):
        jax.grad(loss, argnums=1)(2.0, 3.0)


def test_what_is_wrong_is_told():
    with pytest.raises(
        JaxdlError, match=r"(?s)2 problem.*temperature=0 must be positive.*hard_share=1 must be in \[0, 1\)"
    ):
        distillation(temperature=0, hard_share=1)
    with pytest.raises(JaxdlError, match=r"\[5, 4\] and the teacher's \[5, 3\]"):
        soft_cross_entropy(jnp.zeros((5, 4)), jnp.zeros((5, 3)))
    with pytest.raises(JaxdlError, match="no 'teacher_logits', only label; wrap the loss in with_teacher"):
        distillation()(jnp.zeros((2, 3)), {"label": jnp.zeros(2, int)})
    with pytest.raises(JaxdlError, match="params have no 'teacher'; nearest: teachers"):
        with_teacher(lambda *a: LossOut(0, 0), lambda *a: 0)({"teachers": {}}, {}, {}, None)
