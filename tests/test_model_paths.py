"""Parameter paths are public: each network's path, shape and dtype table is compared line by line with a golden text.

`JAXDL_UPDATE_GOLDEN=1 python -m pytest tests/test_model_paths.py` writes the tables anew.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxdl.models import CNN, MLP, ConvNeXt, PreActBottleneckBlock, ResNet, ResNet18, ResNet50
from jaxdl.paths import flatten

GOLDEN = Path(__file__).parent / "golden"
MODELS = {
    "mlp": (MLP(widths=(64, 32), n_outputs=10, norm="layer"), (1, 784)),
    "cnn": (CNN(n_outputs=10, dense_width=64), (1, 28, 28, 1)),
    "resnet18": (ResNet18(n_outputs=1000), (1, 64, 64, 3)),
    "resnet50_batch": (ResNet50(n_outputs=1000, norm="batch"), (1, 64, 64, 3)),
    "resnet_preact": (
        ResNet(n_outputs=10, stage_sizes=(1, 1), block=PreActBottleneckBlock, width=16, stem="small"),
        (1, 32, 32, 3),
    ),
    "convnext": (ConvNeXt(n_outputs=10), (1, 28, 28, 1)),
}


def table(model, shape):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    return [f"{path} {'x'.join(map(str, leaf.shape))} {leaf.dtype}" for path, leaf in flatten(variables).items()]


@pytest.mark.parametrize("name", MODELS)
def test_golden(name):
    lines = table(*MODELS[name])
    path = GOLDEN / f"paths_{name}.txt"
    if os.environ.get("JAXDL_UPDATE_GOLDEN") == "1":
        path.write_text("\n".join(lines) + "\n")
    assert lines == path.read_text().splitlines()


def test_the_tables_see_a_renamed_a_lost_and_a_reshaped_parameter():
    lines = (GOLDEN / "paths_cnn.txt").read_text().splitlines()
    _, shape = MODELS["cnn"]
    assert lines != table(CNN(n_outputs=11, dense_width=64), shape)
    assert lines != table(CNN(n_outputs=10, dense_width=64, norm="none"), shape)
    assert lines != table(CNN(n_outputs=10, dense_width=64, param_dtype=jnp.bfloat16), shape)


@pytest.mark.parametrize("name", MODELS)
def test_paths_do_not_depend_on_the_batch_the_compute_dtype_or_training(name):
    model, (_, *shape) = MODELS[name]
    other = model.clone(dtype=jnp.bfloat16)
    assert table(other, (3, *shape)) == table(model, (1, *shape))
    twice = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=True), jnp.zeros((2, *shape)))
    assert list(flatten(twice)) == [line.split()[0] for line in table(model, (1, *shape))]
