"""The same networks in Keras 3 on JAX, trained by `compile` and `fit`; weights and batches are those of `Jaxdl`.

Keras compiles the step and donates its state by itself. `fit` gets the batches from a generator, so that it cuts and
shuffles nothing. Needs Keras: `pip install 'jaxdl[bench]'`.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.bare_jax import n_groups
from benchmarks.machine import use_full_float32
from benchmarks.training import LEARNING_RATE, N_LOSSES, WEIGHT_DECAY, load_like, timed

os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported

Weights = Mapping[str, np.ndarray]


class Keras:
    """`fit` with AdamW and the cross-entropy, without metrics.

    Args:
      like: `"module:Jaxdl"` of the workload.
      network: one of NETWORKS.
      sizes: of the workload.
    """

    def __init__(self, like: str, network: str, sizes: Mapping[str, Any]) -> None:
        import keras

        from jaxdl.paths import flatten

        if keras.backend.backend() != "jax":
            raise RuntimeError("Keras does not run on JAX: it was imported before KERAS_BACKEND was set here")

        use_full_float32()
        parts = load_like(like, sizes)
        weights = {path: np.asarray(leaf) for path, leaf in flatten(parts.params).items()}
        self.model = keras.Sequential(NETWORKS[network](sizes, weights))
        self.model.compile(
            optimizer=keras.optimizers.AdamW(LEARNING_RATE, weight_decay=WEIGHT_DECAY, epsilon=1e-8),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        self.batches = self._batches(parts.batches)
        losses = [float(self.model.train_on_batch(*next(self.batches))) for _ in range(N_LOSSES)]
        self.facts = {"first_losses": losses}
        self._run(1)

    def _batches(self, batches: Weights) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        (inputs,) = (value for name, value in batches.items() if name != "label")
        while True:
            yield from zip(inputs, batches["label"], strict=True)

    def round(self, steps: int) -> float:
        """Seconds of a step, over `steps` of them after a few that are not timed."""
        return timed(self._run, steps)

    def _run(self, steps: int) -> None:
        if steps:  # `fit` waits for its last step: it returns the loss
            self.model.fit(self.batches, steps_per_epoch=steps, epochs=1, shuffle=False, verbose=0)


def filled(layer: Any, inputs: int | tuple[int | None, ...], arrays: list[np.ndarray]) -> Any:
    """The layer, built for inputs of a shape (or a last axis), with these weights."""
    layer.build((None, inputs) if isinstance(inputs, int) else inputs)
    layer.set_weights(arrays)
    return layer


def dense(weights: Weights, path: str, activation: str | None = None) -> Any:
    """A dense layer."""
    import keras

    kernel, bias = weights[f"{path}/kernel"], weights[f"{path}/bias"]
    layer = keras.layers.Dense(len(bias), activation=activation)
    return filled(layer, len(kernel), [kernel, bias])


def mlp(sizes: Mapping[str, Any], weights: Weights) -> list[Any]:
    """Dense layers with ReLU between them."""
    hidden = [dense(weights, f"dense_{i}", "relu") for i in range(len(sizes["sizes"]) - 2)]
    return [*hidden, dense(weights, "head")]


def cnn(sizes: Mapping[str, Any], weights: Weights) -> list[Any]:
    """Stages of convolution, max-pooling, group norm, convolution, group norm; the mean over pixels; dense layers."""
    from keras import layers

    def conv(path: str) -> Any:
        kernel = weights[f"{path}/kernel"]
        layer = layers.Conv2D(kernel.shape[-1], 3, padding="same", use_bias=False)
        return filled(layer, (None, None, None, kernel.shape[2]), [kernel])

    def norm(path: str) -> list[Any]:
        scale, bias = weights[f"{path}/scale"], weights[f"{path}/bias"]
        layer = layers.GroupNormalization(n_groups(len(scale)), epsilon=1e-5)
        return [filled(layer, (None, None, None, len(scale)), [scale, bias]), layers.ReLU()]

    stages: list[Any] = []
    for i in range(len(sizes["features"])):
        at = f"stage_{i}"
        stages += [conv(f"{at}/conv_0"), layers.MaxPooling2D(2), *norm(f"{at}/norm_0")]
        stages += [conv(f"{at}/conv_1"), *norm(f"{at}/norm_1")]
    return [*stages, layers.GlobalAveragePooling2D(), dense(weights, "dense", "relu"), dense(weights, "head")]


def recurrent(sizes: Mapping[str, Any], weights: Weights) -> list[Any]:
    """LSTM or GRU layers, in one direction or in both, the mean over time, and a head."""
    from keras import layers

    width, both = sizes["width"], sizes["bidirectional"]
    made: list[Any] = []
    for i in range(sizes["n_layers"]):
        kind = {"lstm": layers.LSTM, "gru": layers.GRU}[sizes["cell"]]
        layer: Any = kind(width, return_sequences=True)
        layer = layers.Bidirectional(layer) if both else layer
        sides = ("forward", "backward") if both else ("forward",)
        arrays = [array for side in sides for array in gates(sizes["cell"], weights, f"recurrent/layer_{i}/{side}")]
        made.append(filled(layer, (None, sizes["length"], len(arrays[0])), arrays))
    return [*made, layers.GlobalAveragePooling1D(), dense(weights, "head")]


def gates(cell: str, weights: Weights, at: str) -> list[np.ndarray]:
    """Input kernel, recurrent kernel and bias in Keras's layout.

    Its LSTM has one bias, jaxdl's two: they are added up. Its GRU has the update gate before the reset gate.
    """
    kernels = [weights[f"{at}/{part}/kernel"] for part in ("input", "recurrent")]
    biases = [weights[f"{at}/{part}/bias"] for part in ("input", "recurrent")]
    if cell == "lstm":
        return [*kernels, biases[0] + biases[1]]

    def swapped(array: np.ndarray) -> np.ndarray:
        reset, update, new = np.split(array, 3, -1)
        return np.concatenate([update, reset, new], -1)

    return [*map(swapped, kernels), np.stack([swapped(bias) for bias in biases])]


# name -> (sizes, weights by path) -> layers
NETWORKS: dict[str, Callable[[Mapping[str, Any], Weights], list[Any]]] = {
    "mlp": mlp,
    "cnn": cnn,
    "recurrent": recurrent,
}
