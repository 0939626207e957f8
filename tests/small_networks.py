"""Five small networks with padding, weights and frozen leaves: what every way to spread a step must compute alike."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdl import TrainState, create_state
from jaxdl.finetune.adapters import with_adapters
from jaxdl.finetune.lora import Lora, add
from jaxdl.models import CNN, MLP
from jaxdl.models.apply import init_model, make_loss_fn
from jaxdl.models.bert import Bert, bert_block
from jaxdl.models.gpt2 import GPT2, gpt2_block
from jaxdl.models.language import make_language_loss_fn
from jaxdl.models.layers import dropout
from jaxdl.models.recurrent import Recurrent
from jaxdl.objectives import classification
from jaxdl.paths import Rules
from jaxdl.state import ALL

N_ROWS, LENGTH, N_CLASSES, VOCAB_SIZE = 16, 8, 4, 64


class Task(NamedTuple):
    """What a step is made of; `data` holds N_ROWS rows."""

    loss_fn: Any
    params: Any
    data: dict[str, np.ndarray]
    trainable: Rules = ALL

    def optimizer(self) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3, eps=1e-5, weight_decay=0.1))

    def state(self) -> TrainState:
        return create_state(self.params, {}, self.optimizer(), rng=jax.random.key(1), trainable=self.trainable)


def _images() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.standard_normal((N_ROWS, 8, 8, 1), np.float32),
        "label": rng.integers(0, N_CLASSES, N_ROWS).astype(np.int32),
        "weight": rng.choice([0.0, 1.0, 2.0], N_ROWS).astype(np.float32),
    }


def _tokens() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    text = rng.integers(1, VOCAB_SIZE, (N_ROWS, LENGTH + 1)).astype(np.int32)
    mask = (np.arange(LENGTH) < rng.integers(3, LENGTH + 1, (N_ROWS, 1))).astype(np.int32)
    return {"tokens": text[:, :-1], "targets": text[:, 1:], "mask": mask, "label": text[:, 0] % N_CLASSES}


def _supervised(model: nn.Module, data: dict[str, np.ndarray], inputs: Any) -> Task:
    first, *rest = [inputs] if isinstance(inputs, str) else inputs
    params, _ = init_model(model, jax.random.key(0), data[first][:1], **{name: data[name][:1] for name in rest})
    return Task(make_loss_fn(model, classification(), inputs=inputs, train=True), params, data)


def mlp(dropout_rate: float = 0.0) -> Task:
    return _supervised(MLP(n_outputs=N_CLASSES, widths=(32, 64), dropout_rate=dropout_rate), _images(), "image")


def cnn(dropout_rate: float = 0.0) -> Task:
    model = CNN(n_outputs=N_CLASSES, features=(8, 16), dense_width=16, dropout_rate=dropout_rate)
    return _supervised(model, _images(), "image")


class Reader(nn.Module):
    """A bidirectional LSTM over embedded tokens, and a head on the mean of its outputs."""

    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, tokens_BT: Any, mask: Any, *, train: bool = False) -> Any:
        x_BTD = nn.Embed(VOCAB_SIZE, 16, name="embed")(tokens_BT)
        x_BTD = dropout(x_BTD, self.dropout_rate, train=train, name="dropout")
        layers = Recurrent(16, "lstm", 1, True, name="recurrent")
        y_BTF, _ = layers(x_BTD, mask=mask, train=train)
        return nn.Dense(N_CLASSES, name="head")((y_BTF * mask[..., None]).mean(1))


def lstm(dropout_rate: float = 0.0) -> Task:
    return _supervised(Reader(dropout_rate), _tokens(), ("tokens", "mask"))


def gpt(dropout_rate: float = 0.0) -> Task:
    block = gpt2_block(width=32, n_heads=4, dropout_rate=dropout_rate, attention_dropout_rate=dropout_rate)
    model, data = GPT2(block, n_layers=2, vocab_size=VOCAB_SIZE, n_positions=LENGTH), _tokens()
    params, _ = init_model(model, jax.random.key(0), data["tokens"][:1])
    return Task(make_language_loss_fn(model, train=True), params, data)


def bert_lora(dropout_rate: float = 0.0) -> Task:
    """Fine-tuning with LoRA and a new head; the rest is frozen."""
    block = bert_block(32, 4, 64, dropout_rate=dropout_rate, attention_dropout_rate=dropout_rate)
    model = Bert(block, n_layers=2, vocab_size=VOCAB_SIZE, head="classify", n_outputs=N_CLASSES)
    task = _supervised(model, _tokens(), ("tokens", "mask"))
    settings = Lora([(".*/attention/(query|value)/kernel", 4), (".*", None)], alpha=8)
    row = {name: jnp.asarray(task.data[name][:1]) for name in ("tokens", "mask")}
    params = add(jax.random.key(2), task.params, settings, model, row["tokens"], mask=row["mask"])
    trainable = (("adapters/.*", True), ("head/.*", True), (".*", False))
    return Task(with_adapters(task.loss_fn, settings), params, task.data, trainable)


NETWORKS = {"mlp": mlp, "cnn": cnn, "lstm": lstm, "gpt": gpt, "bert_lora": bert_lora}
