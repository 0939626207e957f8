"""One training step on one GPU in both libraries: same weights, same batches, same losses, AdamW on what trains.

A workload subclasses `Jaxdl` and `Torch`, which say what is computed. Constructors only prepare, so that all may do so
at once; `warm_up` compiles and takes the first steps. The batches lie on the device. Parameters and moments are
float32; products are bfloat16 where a workload says so, and TF32 elsewhere, in both libraries.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.training import LEARNING_RATE, WEIGHT_DECAY, make_adamw, timed
from benchmarks.weights import fill_tree

N_BATCHES, N_LOSSES = 2, 3


class Parts(NamedTuple):
    """What a workload gives to `Jaxdl`, and to whoever compiles it without a GPU.

    Attributes:
      loss_fn, trainable: as for `make_train_step`.
      init: `key -> (params, extra)`; it may be traced only.
      batches: {name: (N_BATCHES, B, ...)}.
      fill: shapes of the parameters -> their values; None where `init` makes them on the device.
    """

    loss_fn: Any
    init: Callable[[Any], tuple[Any, Any]]
    batches: Mapping[str, np.ndarray]
    fill: Callable[[Any], Any] | None = fill_tree
    trainable: Sequence[tuple[str, bool]] = ((".*", True),)


def draw_images(size: int, n_classes: int, batch_size: int) -> dict[str, np.ndarray]:
    """`image` (N, B, H, W, 3) float32 and `label` (N, B) int32, the same in every process."""
    rng = np.random.default_rng(1)
    image = rng.standard_normal((N_BATCHES, batch_size, size, size, 3), np.float32)
    return {"image": image, "label": rng.integers(0, n_classes, (N_BATCHES, batch_size), dtype=np.int32)}


class Jaxdl:
    """jaxdl's jitted step with donated state.

    Args:
      sizes: of the workload.
    """

    def __init__(self, **sizes: Any) -> None:
        self.parts, self.done = self.make(**sizes), 0

    make: Callable[..., Parts]

    def warm_up(self) -> dict[str, Any]:
        """Compiles the step and makes N_LOSSES updates.

        Returns:
          `first_losses`; `program_bytes`, what the compiled step holds at once; `model_flops` of a step; `choices`,
          what the library chose by device and shape.
        """
        import jax

        from jaxdl import compiler_options
        from jaxdl.choices import heard

        with heard() as choices:
            step, self.state = make_step(self.parts), self.start()
            numbers = range(len(next(iter(self.parts.batches.values()))))
            self.batches = [jax.device_put({k: v[i] for k, v in self.parts.batches.items()}) for i in numbers]
            options = compiler_options(step, self.state, self.batches[0])
            jitted = jax.jit(step, donate_argnums=0, compiler_options=options)
            self.call = jitted.lower(self.state, self.batches[0]).compile()
        memory: Any = self.call.memory_analysis()
        whole = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        losses = []
        for _ in range(N_LOSSES):
            loss = jax.device_get(self._step()["loss"])
            losses.append(float(loss.total / loss.weight))
        return {
            "first_losses": losses,
            "program_bytes": whole + memory.temp_size_in_bytes,
            "model_flops": model_flops(self.parts),
            "choices": list(dict.fromkeys(choices)),
        }

    def start(self) -> Any:
        import jax

        from jaxdl import create_state

        parts, key = self.parts, jax.random.key(0)
        if parts.fill is None:
            return jax.jit(abstract_start(parts))(key)
        params = parts.fill(jax.eval_shape(parts.init, key)[0])
        extra = jax.jit(lambda key: parts.init(key)[1])(key)
        return create_state(params, extra, make_adamw(), rng=key, trainable=parts.trainable)

    def _step(self) -> Any:
        self.state, metrics = self.call(self.state, self.batches[self.done % len(self.batches)])
        self.done += 1
        return metrics

    def round(self, steps: int) -> float:
        """Seconds of a step, over `steps` of them after a few that are not timed."""
        return timed(self._run, steps)

    def _run(self, steps: int) -> None:
        import jax

        for _ in range(steps):
            self._step()
        jax.block_until_ready(self.state)

    def memory(self) -> int | None:
        """The most bytes that were ever in use on the device; None where that is not counted."""
        import jax

        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def make_step(parts: Parts) -> Any:
    """The train step of a workload; the network makes its choices when it is traced."""
    from jaxdl import make_train_step

    return make_train_step(parts.loss_fn, make_adamw(), trainable=parts.trainable)


def abstract_start(parts: Parts) -> Callable[[Any], Any]:
    """`key -> TrainState`, to be traced or compiled."""
    from jaxdl import create_state

    def start(key: Any) -> Any:
        params, extra = parts.init(key)
        return create_state(params, extra, make_adamw(), rng=key, trainable=parts.trainable)

    return start


def batch_shapes(parts: Parts) -> dict[str, Any]:
    """Shape and dtype of each array of a batch."""
    import jax

    return {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in parts.batches.items()}


def model_flops(parts: Parts) -> int:
    """Operations that the mathematics of a step needs, as `jaxdl plan` counts them: nothing masked, nothing twice."""
    import jax

    from jaxdl.plan.flops import count_flops, tracing_for, without_remat

    with tracing_for("plain"), without_remat():
        state = jax.eval_shape(abstract_start(parts), jax.random.key(0))
        return count_flops(make_step(parts), state, batch_shapes(parts)).total()


class Torch:
    """PyTorch's usual loop with fused AdamW, its model and loss under `torch.compile` and autocast.

    Attributes:
      network: whose it is.

    Args:
      is_compiled: see above.
      attention: a name of `torch.nn.attention.SDPBackend` that is forced; None leaves the choice to PyTorch.
      sizes: of the workload.
    """

    network = "the benchmark's own"

    def __init__(self, is_compiled: bool = True, attention: str | None = None, **sizes: Any) -> None:
        import torch

        self.device, self.done = "cuda" if torch.cuda.is_available() else "cpu", 0
        torch.set_float32_matmul_precision("high")  # TF32, which is JAX's default, too
        dtype = sizes["dtype"]
        model, loss_fn, batches = self.make(**sizes)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )
        self.batches = [{name: part.to(self.device) for name, part in batch.items()} for batch in batches]
        self.loss_fn = torch.compile(loss_fn) if is_compiled else loss_fn
        self.autocast = dtype == "bfloat16"
        self.attention = attention if self.device == "cuda" else None

    # (model on `self.device`, loss of a batch's tensors as keywords, batches), from the sizes
    make: Callable[..., tuple[Any, Any, list[dict[str, Any]]]]

    def warm_up(self) -> dict[str, Any]:
        """Compiles and makes N_LOSSES updates; returns `first_losses`, and `network`."""
        import torch

        losses = [float(self._step()) for _ in range(N_LOSSES)]
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.empty_cache()
        return {"first_losses": losses, "network": self.network}

    def _step(self) -> Any:
        import torch

        batch = self.batches[self.done % len(self.batches)]
        with self._attention(), torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            loss = self.loss_fn(**batch)
        with self._attention():
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss.detach()

    def _attention(self) -> Any:
        if self.attention is None:
            return contextlib.nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(getattr(SDPBackend, self.attention))

    def round(self, steps: int) -> float:
        """Seconds of a step, over `steps` of them after a few that are not timed; then the memory is given back."""
        import torch

        seconds = timed(self._run, steps)
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return seconds

    def _run(self, steps: int) -> None:
        loss = None
        for _ in range(steps):
            loss = self._step()
        if loss is not None:
            loss.item()

    def memory(self) -> int | None:
        """The most bytes of tensors since the first steps; None where that is not counted."""
        import torch

        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None


def to_torch(batches: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """{name: (N, B, ...)} -> a dict of tensors for each batch; whole numbers become int64."""
    import torch

    def tensor(part: np.ndarray) -> Any:
        return torch.from_numpy(part if part.dtype == np.float32 else part.astype(np.int64))

    return [{k: tensor(v[i]) for k, v in batches.items()} for i in range(len(next(iter(batches.values()))))]


def peak_flops(device_kind: str) -> float:
    """Dense bfloat16 operations a second of a GPU, as its maker says; NaN where unknown.

    Example:
      >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("cpu")
      (989000000000000.0, nan)
    """
    rates = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
    return next((rate for name, rate in rates.items() if name in device_kind), math.nan)
