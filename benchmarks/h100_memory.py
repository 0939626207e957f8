"""Compiles fine-tuning of a model of 1.5 billion parameters for an H100, without one, and prints what memory it needs.

    python -m benchmarks.h100_memory           # about ten minutes on two cores

XLA compiles for a description of the card (`jaxdl/plan/h100_sxm.txtpb`), so neither a GPU nor a driver is needed, only
the CUDA plugin of the same version as JAX and cuDNN. The memory is that of XLA's buffers; speed cannot be told this
way.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.table import Table
from jaxdl import compiler_options, create_state, make_optimizer, make_train_step, paths
from jaxdl.finetune.adapters import with_adapters
from jaxdl.finetune.lora import Lora, add
from jaxdl.finetune.quantize import quantize
from jaxdl.models.language import make_language_loss_fn
from jaxdl.models.llama import Llama, llama_block
from jaxdl.plan.topology import H100_TARGET as TARGET
from jaxdl.state import ALL, split_trainable

GIB = 2**30
PROJECTIONS = ".*/(query|key|value|output|gate|up|down)/kernel"


class Sizes(NamedTuple):
    """Of the model and its batch; the defaults are those of Llama 3.2 1B with a head of its own."""

    n_layers: int = 16
    width: int = 2048
    n_heads: int = 32
    n_kv_heads: int = 8
    hidden: int = 8192
    vocab_size: int = 128256
    n_rows: int = 8
    n_tokens: int = 2048


@dataclass(frozen=True)
class Case:
    """A way to fine-tune.

    Attributes:
      name: for the table.
      base: rules of `quantize`.
      rank: of LoRA on all seven projections; None trains everything.
      microbatches: parts of the batch, one after the other.
    """

    name: str
    base: paths.Rules = ((".*", None),)
    rank: int | None = None
    microbatches: int = 1

    @property
    def trainable(self) -> paths.Rules:
        """Rules for the step."""
        return ALL if self.rank is None else (("adapters/.*", True), (".*", False))


HALF: paths.Rules = ((".*", "bfloat16"),)
NF4_ALL: paths.Rules = ((".*/(kernel|embedding)", "nf4"), *HALF)
CASES = (
    Case("everything, float32 AdamW"),
    Case("everything, float32 AdamW, 2 microbatches", microbatches=2),
    Case("LoRA r=16, bfloat16 base", HALF, 16),
    Case("LoRA r=16, bfloat16 base, 2 microbatches", HALF, 16, 2),
    Case("LoRA r=16, NF4 projections, the rest bfloat16", ((PROJECTIONS, "nf4"), *HALF), 16),
    Case("LoRA r=16, all matrices NF4", NF4_ALL, 16),
    Case("LoRA r=16, all matrices NF4, 2 microbatches", NF4_ALL, 16, 2),
)


class Memory(NamedTuple):
    """Bytes of a compiled step, and its parameters.

    Attributes:
      n_parameters, n_trainable: counted before quantisation, adapters included.
      state: arguments: parameters, moments, the batch.
      peak: the most that is held at once.
      seconds: of compiling.
    """

    n_parameters: int
    n_trainable: int
    state: int
    peak: int
    seconds: float


def parts(case: Case, sizes: Sizes, dtype: Any = jnp.bfloat16) -> tuple[Any, Any, Any]:
    """`(loss_fn, init, batch)` of a case: `init` is `key -> params`, the batch is shapes; computed in `dtype`."""
    block = llama_block(
        width=sizes.width, n_heads=sizes.n_heads, n_kv_heads=sizes.n_kv_heads, hidden=sizes.hidden, dtype=dtype
    )
    model = Llama(block, n_layers=sizes.n_layers, vocab_size=sizes.vocab_size, layout="unrolled", remat="full")
    tokens = jax.ShapeDtypeStruct((sizes.n_rows, sizes.n_tokens), jnp.int32)
    loss_fn, settings = make_language_loss_fn(model, train=True), None
    if case.rank is not None:
        settings = Lora([(PROJECTIONS, case.rank), (".*", None)])
        loss_fn = with_adapters(loss_fn, settings)

    def init(key: jax.Array) -> Any:
        params = quantize(model.init(key, jnp.zeros(tokens.shape, tokens.dtype))["params"], case.base)
        return params if settings is None else add(key, params, settings, model, tokens)

    return loss_fn, init, {"tokens": tokens, "targets": tokens}


def abstract_step(case: Case, sizes: Sizes) -> tuple[Any, Any, Any]:
    """The train step of a case, its state and its batch, both as shapes."""
    loss_fn, init, batch = parts(case, sizes)
    tx = make_optimizer("adamw", learning_rate=1e-4)

    def start(key: jax.Array) -> Any:
        return create_state(init(key), {}, tx, rng=key, trainable=case.trainable)

    state = jax.eval_shape(start, jax.random.key(0))
    return make_train_step(loss_fn, tx, trainable=case.trainable, microbatches=case.microbatches), state, batch


def measure(case: Case, sizes: Sizes, sharding: Any = None) -> Memory:
    """Compiles a case, for the devices of `sharding`, or for this machine."""
    step, state, batch = abstract_step(case, sizes)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (state, batch))
    started = time.perf_counter()
    jitted = jax.jit(step, donate_argnums=0, compiler_options=compiler_options())
    memory: Any = jitted.lower(*placed).compile().memory_analysis()
    seconds = time.perf_counter() - started
    moving, _ = split_trainable(state.params, case.trainable)
    plain = abstract_step(dataclasses.replace(case, base=Case.base), sizes)[1].params
    n_parameters, n_trainable = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (plain, moving))
    return Memory(n_parameters, n_trainable, memory.argument_size_in_bytes, memory.peak_memory_in_bytes, seconds)


@contextlib.contextmanager
def tracing_for_gpu() -> Iterator[None]:
    """Lets the library choose as on a GPU: cuDNN's attention, for one."""
    with mock.patch.object(jax, "default_backend", return_value="gpu"):
        yield


def h100() -> Any:
    """A sharding on one described card."""
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    described = topologies.get_topology_desc(platform="cuda", target_config=TARGET.read_text(), topology="1x1x1")
    return NamedSharding(Mesh(np.array(described.devices), ("data",)), PartitionSpec())


def missing() -> str | None:
    """None, or one line that says what to install."""
    jax_version, found = importlib.metadata.version("jax"), {}
    for cuda in (12, 13):
        names = [f"jax-cuda{cuda}-plugin", f"jax-cuda{cuda}-pjrt", f"nvidia-cudnn-cu{cuda}"]
        found[cuda] = [name for name in names if _version(name) not in ("any", jax_version)]
        if not found[cuda]:
            return None
    cuda = min(found, key=lambda cuda: len(found[cuda]))
    wanted = f"jax-cuda{cuda}-plugin=={jax_version} jax-cuda{cuda}-pjrt=={jax_version} nvidia-cudnn-cu{cuda}"
    return f"h100_memory: this needs the CUDA plugin; in an environment apart: pip install jax=={jax_version} {wanted}"


def _version(name: str) -> str | None:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return version if name.startswith("jax") else "any"


def to_table(results: Mapping[str, Memory], sizes: Sizes) -> Table:
    """Each case against the first."""
    first = next(iter(results.values()))
    table = Table(
        f"Memory of fine-tuning on one H100: {first.n_parameters / 1e9:.2f} billion parameters, "
        f"{sizes.n_rows} rows of {sizes.n_tokens} tokens",
        ["what trains", "trainable", "state GiB", "peak GiB", "against the first", "compiled in"],
        notes=[
            f"Compiled with jax {jax.__version__} for a described H100 SXM 80 GB, without one: `python -m "
            "benchmarks.h100_memory`. Computed in bfloat16 with cuDNN's attention, full remat, and logits in chunks of "
            "256 MiB; adapters and moments in float32; the state is donated. The peak is XLA's, of its buffers.",
        ],
    )
    for name, memory in results.items():
        cells = [f"{memory.n_trainable / 1e6:.1f} M", f"{memory.state / GIB:.2f}", f"{memory.peak / GIB:.2f}"]
        table.rows.append([name, *cells, f"{memory.peak / first.peak:.3f}", f"{memory.seconds:.0f} s"])
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 where the table was made, 2 where something must be installed first."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.h100_memory", description=__doc__.splitlines()[0])
    parser.parse_args(arguments)
    if told := missing():
        print(told, file=sys.stderr)
        return 2
    jax.config.update("jax_platforms", "cpu")
    sizes, sharding, results = Sizes(), h100(), {}
    with tracing_for_gpu():
        for case in CASES:
            results[case.name] = measure(case, sizes, sharding)
            print(f"{case.name}: {results[case.name].peak / GIB:.2f} GiB", file=sys.stderr, flush=True)
    print(to_table(results, sizes).to_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
