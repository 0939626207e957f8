"""The sections that experiment configurations share, and the pieces that each section builds."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxdl import JaxdlError, TrainState, make_optimizer, make_schedule, models, optim, parallel
from jaxdl.config import Duration
from jaxdl.early_stopping import EarlyStopping
from jaxdl.host_memory import keep_freed_memory
from jaxdl.loop import Profile
from jaxdl.paths import Rules

PathRules = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class MLP:
    """A multi-layer perceptron."""

    widths: tuple[int, ...] = (128, 128)  # the width of each hidden layer
    activation: str = "relu"  # relu, gelu, silu, tanh, ...
    dropout_rate: float = 0.0  # share of hidden units dropped in training
    norm: str = "none"  # none, layer, batch or group
    residual: bool = False  # add each hidden layer's input to its output where the widths agree

    def build(self, n_outputs: int, dtype: Any) -> nn.Module:
        return models.MLP(n_outputs=n_outputs, dtype=dtype, **_fields(self))


@dataclass(frozen=True)
class CNN:
    """A small convolutional network."""

    features: tuple[int, ...] = (32, 64, 128)  # channels of each stage; stages are separated by pooling
    convs_per_stage: int = 2  # 3x3 convolutions in a stage
    norm: str = "group"  # none, layer, batch or group
    activation: str = "relu"  # relu, gelu, silu, tanh, ...
    pool: str = "max"  # max or mean
    reduce: str = "mean"  # how the last feature map becomes a vector: mean, max or flatten
    dense_width: int = 0  # width of a hidden layer before the head; 0 has none
    dropout_rate: float = 0.0  # share of units dropped before the head in training

    def build(self, n_outputs: int, dtype: Any) -> nn.Module:
        return models.CNN(n_outputs=n_outputs, dtype=dtype, **_fields(self))


@dataclass(frozen=True)
class ResNet:
    """A residual network."""

    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)  # blocks in each stage
    block: Literal["basic", "bottleneck", "preact_basic", "preact_bottleneck"] = "basic"  # the kind of block
    width: int = 64  # channels of the first stage; each stage doubles them
    stem: str = "imagenet"  # imagenet: 7x7 and pooling; small: 3x3 for images up to 64 pixels; pooled: 3x3 and pooling
    norm: str = "group"  # group, batch or layer
    activation: str = "relu"  # relu, gelu, silu, tanh, ...
    zero_init: bool = True  # begin with each residual branch at zero
    dropout_rate: float = 0.0  # share of features dropped before the head in training

    def build(self, n_outputs: int, dtype: Any) -> nn.Module:
        blocks = {
            "basic": models.BasicBlock,
            "bottleneck": models.BottleneckBlock,
            "preact_basic": models.PreActBasicBlock,
            "preact_bottleneck": models.PreActBottleneckBlock,
        }
        return models.ResNet(n_outputs=n_outputs, dtype=dtype, **{**_fields(self), "block": blocks[self.block]})


@dataclass(frozen=True)
class ConvNeXt:
    """A ConvNeXt-like network."""

    depths: tuple[int, ...] = (2, 2, 2)  # blocks in each stage
    widths: tuple[int, ...] = (32, 64, 128)  # channels of each stage
    stem_size: int = 2  # pixels of a patch, in each direction
    kernel_size: int = 7  # of the depthwise convolutions
    layer_scale_init: float = 1e-6  # the first value of the factor of each residual branch
    drop_path_rate: float = 0.0  # largest share of branches dropped in training (stochastic depth)

    def build(self, n_outputs: int, dtype: Any) -> nn.Module:
        return models.ConvNeXt(n_outputs=n_outputs, dtype=dtype, **_fields(self))


Model = MLP | CNN | ResNet | ConvNeXt


def _fields(section: Any) -> dict[str, Any]:
    return {entry.name: getattr(section, entry.name) for entry in dataclasses.fields(section)}


@dataclass(frozen=True)
class Optimizer:
    """The update rule, its learning rate and its penalties."""

    name: str = "adamw"  # gd, sgd, momentum, nesterov, rmsprop, adagrad, adam, adamw, lion, lamb, lars, muon, ...
    learning_rate: float = 1e-3  # the highest rate of the schedule
    schedule: str = "cosine"  # constant, cosine, linear, exponential, polynomial or one_cycle
    warmup: Duration = Duration(0)  # length of the linear rise from zero
    end_learning_rate: float = 0.0  # the last rate; ignored by constant
    weight_decay: float = 0.0  # strength of decoupled decay
    weight_decay_rules: PathRules | None = None  # (regex, factor) pairs; kernels and embeddings where None
    l2: float = 0.0  # strength of coupled L2, l2/2 sum w^2
    l1: float = 0.0  # strength of L1, l1 sum |w|; with l2 this is the elastic net
    l2_rules: PathRules | None = None  # as weight_decay_rules
    l1_rules: PathRules | None = None  # as weight_decay_rules
    l1_method: str = "proximal"  # proximal gives exact zeros; or subgradient
    clip_norm: float | None = None  # largest global norm of the gradient
    clip_value: float | None = None  # largest magnitude of a gradient entry
    lr_scale_rules: PathRules | None = None  # (regex, factor) pairs on the learning rate
    ema_decay: float | None = None  # evaluate a moving average of the parameters with this decay
    plateau_patience: int | None = None  # updates without a better loss before the rate is halved
    options: Mapping[str, float] = field(default_factory=dict)  # further options by Optax's name, such as momentum

    def problems(self) -> Iterator[str]:
        try:
            self.build(steps=1_000_000_000, warmup_steps=1)
        except JaxdlError as error:
            yield str(error)

    def build(self, *, steps: int, warmup_steps: int) -> optax.GradientTransformationExtraArgs:
        end = {} if self.schedule == "constant" else {"end": self.end_learning_rate}
        plateau = None
        if self.plateau_patience is not None:
            plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=self.plateau_patience)
        return make_optimizer(
            self.name,
            learning_rate=make_schedule(
                self.schedule, peak=self.learning_rate, steps=steps, warmup_steps=warmup_steps, **end
            ),
            weight_decay=self.weight_decay,
            weight_decay_rules=self.weight_decay_rules,
            l2=self.l2,
            l2_rules=self.l2_rules,
            l1=self.l1,
            l1_rules=self.l1_rules,
            l1_method=self.l1_method,
            clip_norm=self.clip_norm,
            clip_value=self.clip_value,
            lr_scale_rules=self.lr_scale_rules,
            ema_decay=self.ema_decay,
            plateau=plateau,
            **dict[str, Any](self.options),
        )


@dataclass(frozen=True)
class Loop:
    """How long, how often."""

    length: Duration = Duration("10 epochs")  # when the run ends
    eval_every: Duration = Duration("1 epoch")  # between evaluations
    checkpoint_every: Duration = Duration("1 epoch")  # between checkpoints
    log_every: int = 50  # steps in a row of the metric log
    steps_per_call: int = 1  # updates in one call of the device; whole epochs pay for steps under a few ms
    keep_last: int = 3  # newest checkpoints to keep
    keep_best: int = 1  # best checkpoints to keep, by the validation metric
    early_stopping_patience: int | None = None  # evaluations without a better validation loss before the run stops
    guard: Literal["stop", "skip"] = "stop"  # what a non-finite step does
    profile: bool = False  # trace ten steps for TensorBoard

    def problems(self) -> Iterator[str]:
        counts = {"log_every": self.log_every, "steps_per_call": self.steps_per_call, "keep_last": self.keep_last}
        yield from (f"{name}={n} must be at least 1." for name, n in counts.items() if n < 1)
        durations = {"length": self.length, "eval_every": self.eval_every, "checkpoint_every": self.checkpoint_every}
        yield from (f"{name}={str(d)!r} must be longer than nothing." for name, d in durations.items() if not d.amount)
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            yield f"early_stopping_patience={self.early_stopping_patience} must be at least 1."
        if self.keep_best < 0:
            yield f"keep_best={self.keep_best} must not be negative."

    def early_stopping(self, metric: str) -> EarlyStopping | None:
        patience = self.early_stopping_patience
        return None if patience is None else EarlyStopping(metric, patience)

    def profile_in(self, directory: Path) -> Profile | None:
        return Profile(directory / "profile") if self.profile else None


@dataclass(frozen=True)
class Parallel:
    """The devices, and what lies where."""

    mesh: str = "data=-1"  # devices along each axis, such as data=4,model=2; -1 takes all that are left
    sharding: Literal["replicated", "zero1", "fsdp", "tensor", "fsdp_tensor"] = "replicated"  # of the whole state
    cpu_devices: int | None = None  # devices that a CPU shows itself as, such as one a core; one where None
    coordinator: str | None = None  # host:port of process 0 of several; from the environment or the cluster where None
    process_count: int | None = None  # how many processes; as coordinator
    process_index: int | None = None  # which one this is; as coordinator
    deadline_s: float = 300.0  # that processes wait for each other
    heartbeat_s: float = 30.0  # a process that says nothing for so long is taken for dead
    exact: bool = False  # the same bits on any number of devices, at a price: docs/exact.md
    virtual_shards: int = 8  # of exact mode: a power of two, at least as many as there will ever be devices

    def problems(self) -> Iterator[str]:
        try:
            parallel.parse_mesh(self.mesh)
        except JaxdlError as error:
            yield str(error)
        if self.cpu_devices is not None and self.cpu_devices < 1:
            yield f"cpu_devices={self.cpu_devices} must be at least 1."
        if self.virtual_shards < 1 or self.virtual_shards & (self.virtual_shards - 1):
            yield f"virtual_shards={self.virtual_shards} must be a power of two: sums are added in pairs."

    @property
    def exact_shards(self) -> int | None:
        """For `fit`."""
        return self.virtual_shards if self.exact else None

    def initialize(self) -> None:
        """Comes before anything touches JAX."""
        if self.cpu_devices is not None:
            jax.config.update("jax_num_cpu_devices", self.cpu_devices)
        parallel.initialize(
            self.coordinator,
            self.process_count,
            self.process_index,
            deadline_s=self.deadline_s,
            heartbeat_s=self.heartbeat_s,
        )

    def moved_to(self, other: "Parallel") -> "Parallel":
        """The section of a saved run that goes on with other devices: only what decides about numbers stays."""
        return dataclasses.replace(other, exact=self.exact, virtual_shards=self.virtual_shards)

    def make_mesh(self) -> jax.sharding.Mesh | None:
        """None for a single device."""
        axes: Any = parallel.parse_mesh(self.mesh)
        mesh = parallel.make_mesh(**axes)
        return None if mesh.size == 1 else mesh

    def rules(self, state: TrainState) -> Rules:
        """Where the state lies."""
        if self.sharding == "zero1":
            return parallel.zero(1)
        if self.sharding == "replicated":
            return parallel.REPLICATED
        split = parallel.REPLICATED if self.sharding == "fsdp" else parallel.tensor_parallel(state)
        return split if self.sharding == "tensor" else parallel.with_fsdp(split)


@dataclass(frozen=True)
class Hardware:
    """Memory and precision of a step."""

    microbatches: int = 1  # parts of a batch computed one after the other, for less memory
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # parameters stay float32
    keep_freed_memory: bool = True  # a CPU: faster, and the process holds what it ever held; docs/performance.md

    def initialize(self) -> None:
        """Comes before anything is computed."""
        if self.keep_freed_memory and jax.default_backend() == "cpu":
            keep_freed_memory("the platform is cpu; --config.hardware.keep_freed_memory=False hands it back")

    def problems(self) -> Iterator[str]:
        if self.microbatches < 1:
            yield f"microbatches={self.microbatches} must be at least 1."

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.compute_dtype)

    def scaled(self, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        """Adds dynamic loss scaling where the gradients are float16."""
        return optim.dynamic_loss_scale(tx) if self.compute_dtype == "float16" else tx
