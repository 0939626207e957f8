"""New tokens after prompts: jaxdl against `transformers` with its cache, on the same weights, greedily.

Dimensions: `B` batch, `T` time.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import BenchmarkError, Competitor, Result, Settings, fastest, measure, speed_up, spread
from benchmarks.machine import n_cores, use_full_float32
from benchmarks.table import Table, not_run, ratio_cell, time_cell
from benchmarks.weights import fill_named, fill_pretrained

SMALL = {"width": 384, "n_heads": 6, "n_layers": 6, "vocab_size": 5000, "n_positions": 256}
GPT2_SMALL = {"width": 768, "n_heads": 12, "n_layers": 12, "vocab_size": 50257, "n_positions": 1024}
N_PROMPT, AIM = 64, 2.0
OURS, EAGER, STATIC = "jaxdl", "transformers", "transformers, static cache, torch.compile"


class Workload(NamedTuple):
    """A network, rows, and new tokens of each row."""

    sizes: dict[str, int]
    batch_size: int
    n_new: int


WORKLOADS = {
    "GPT 6 x 384": Workload(SMALL, 1, 64),
    "GPT 6 x 384, batch 8": Workload(SMALL, 8, 64),
    "GPT-2 124M": Workload(GPT2_SMALL, 1, 24),
    "GPT-2 124M, batch 8": Workload(GPT2_SMALL, 8, 16),
}


def make_prompts(vocab_size: int, batch_size: int) -> np.ndarray:
    """(B, T) int32."""
    return np.random.default_rng(1).integers(1, vocab_size, (batch_size, N_PROMPT), dtype=np.int32)


class _Side:
    """Generates as told, and tells its first tokens.

    Args:
      sizes: of the network.
      batch_size: B.
      n_new: new tokens of each row.
    """

    def __init__(self, sizes: dict[str, int], batch_size: int, n_new: int, **options: Any) -> None:
        self.prompts, self.n_new = make_prompts(sizes["vocab_size"], batch_size), n_new
        self.make(**sizes, **options)
        self.facts = {"tokens": self.generate()}
        if options.get("is_compiled"):
            self.generate()  # compiles again, for lengths in general

    make: Callable[..., None]  # makes the network and its weights, from sizes and options

    def generate(self) -> list[list[int]]:
        """The new tokens of each row."""
        raise NotImplementedError

    def round(self) -> float:
        """Seconds of a new token of every row, the reading of the prompt included."""
        start = time.perf_counter()
        self.generate()
        return (time.perf_counter() - start) / self.n_new


class Jaxdl(_Side):
    """`jaxdl.generate.generate`."""

    def make(self, **sizes: Any) -> None:
        from jaxdl.models.gpt2 import GPT2, gpt2_block
        from jaxdl.pretrained.gpt2 import GPT2_FAMILY

        use_full_float32()
        block = gpt2_block(width=sizes["width"], n_heads=sizes["n_heads"])
        names = ("n_layers", "vocab_size", "n_positions")
        self.model = GPT2(block, **{name: sizes[name] for name in names})
        self.params = fill_pretrained(GPT2_FAMILY, self.model)

    def generate(self) -> list[list[int]]:
        from jaxdl.generate import generate

        return generate(self.model, self.params, self.prompts.tolist(), max_new_tokens=self.n_new)


class Transformers(_Side):
    """`GPT2LMHeadModel.generate`; with `is_compiled`, over a static cache and through `torch.compile`."""

    def make(self, is_compiled: bool = False, **sizes: Any) -> None:
        import torch
        import transformers

        torch.set_num_threads(n_cores())
        config = transformers.GPT2Config(
            vocab_size=sizes["vocab_size"],
            n_positions=sizes["n_positions"],
            n_embd=sizes["width"],
            n_layer=sizes["n_layers"],
            n_head=sizes["n_heads"],
        )
        self.model: Any = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="sdpa").eval()
        fill_named(self.model)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(self.device)
        self.options: dict[str, Any] = {}
        if is_compiled:
            self.options = {"cache_implementation": "static"}
            self.model.forward = torch.compile(self.model.forward)

    def generate(self) -> list[list[int]]:
        import torch

        prompts = torch.from_numpy(self.prompts.astype(np.int64)).to(self.device)
        lengths = {"min_new_tokens": self.n_new, "max_new_tokens": self.n_new}
        mask = torch.ones_like(prompts)
        with torch.inference_mode():
            rows = self.model.generate(
                prompts, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths, **self.options
            )
        found: list[list[int]] = rows[:, N_PROMPT:].tolist()
        return found


def bytes_per_token(width: int, n_layers: int, vocab_size: int, **_: int) -> int:
    """Bytes of the weights that every new token reads, float32.

    Example:
      >>> bytes_per_token(1, 1, 3)
      60
    """
    return 4 * (n_layers * 12 * width**2 + vocab_size * width)


def run(settings: Settings) -> list[Table]:
    """One table."""
    made = Table(
        f"Generation with a cache, greedy, prompts of {N_PROMPT} tokens",
        ["", "time of a new token of all rows", f"speed against {EAGER}", "weights read, GB/s"],
    )
    for title, workload in WORKLOADS.items():
        sizes = {"sizes": workload.sizes, "batch_size": workload.batch_size, "n_new": workload.n_new}
        results = measure(
            [
                Competitor(EAGER, "benchmarks.generation:Transformers", sizes),
                Competitor(OURS, "benchmarks.generation:Jaxdl", sizes),
                Competitor(STATIC, "benchmarks.generation:Transformers", {**sizes, "is_compiled": True}),
            ],
            settings,
        )
        made.notes.append(add_rows(made, title, results, bytes_per_token(**workload.sizes)))
        made.results = [*made.results, *results]
    return [made]


def add_rows(made: Table, title: str, results: Sequence[Result], n_bytes: int) -> str:
    """Adds a workload's rows and returns what is to say of it.

    Raises:
      BenchmarkError: two generate different tokens.
    """
    check_same_tokens(results)
    eager = next(result for result in results if result.name == EAGER)
    for result in results:
        name = f"{title}: {result.name}"
        if result.failure:
            made.rows.append(not_run(name, result.failure, 4))
            continue
        rate = f"{n_bytes / result.median_s / 1e9:.1f}"
        made.rows.append([name, time_cell(spread(result.seconds)), ratio_cell(speed_up(result, eager)), rate])
    best = fastest([result for result in results if result.name != OURS])
    ratio = speed_up(next(result for result in results if result.name == OURS), best)
    if ratio is None:
        return f"{title}: not judged."
    word = "reached" if ratio.median >= AIM else "missed"
    return (
        f"{title}: {ratio.median:.2f} times the fastest of `transformers` ({best.name}); the aim of {AIM:g} is {word}."
    )


def check_same_tokens(results: Sequence[Result]) -> None:
    """Asserts that all that ran told the same tokens.

    Raises:
      BenchmarkError: they did not.
    """
    told = {result.name: result.facts["tokens"] for result in results if not result.failure}
    first = next(iter(told.items()), None)
    for name, tokens in told.items():
        if first and tokens != first[1]:
            same = sum(a == b for x, y in zip(tokens, first[1], strict=True) for a, b in zip(x, y, strict=True))
            raise BenchmarkError(f"{name} generates other tokens than {first[0]}: {same} are the same.")
