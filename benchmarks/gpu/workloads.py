"""What is measured on a GPU: sizes, competitors, floors and aims.

Sizes of the full run fit an H100 with 80 GB beside one competitor's model; `tiny` ones run anywhere in seconds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Competitor, Result, speed_up

COMPILED, CUDNN = "PyTorch torch.compile", "PyTorch torch.compile, cuDNN attention"
EAGER, OURS = "PyTorch eager", "jaxdl"
FULL, LORA = "jaxdl, everything trains", "jaxdl, LoRA r=16"


@dataclass(frozen=True)
class Aim:
    """Throughput of jaxdl that is wanted, as a multiple of a competitor's."""

    against: str
    floor: float
    aim: float


@dataclass(frozen=True)
class Workload:
    """One table.

    Attributes:
      title: its heading; sizes are filled in.
      unit: of what a step processes.
      units: sizes -> how many.
      sizes, tiny: keywords of all competitors.
      rows: name -> (target, further options).
      steps: of a round.
      tolerance: of the first losses, relative; None where nobody computes the same.
      aims: see `Aim`.
      shares: (name, of which other, floor and aim of its memory and of its time), where less is better.
      seconds: what it may take on an H100: compiling, and at least three rounds.
    """

    title: str
    unit: str
    units: Callable[[Mapping[str, Any]], int]
    sizes: Mapping[str, Any]
    tiny: Mapping[str, Any]
    rows: Mapping[str, tuple[str, Mapping[str, Any]]]
    steps: int
    seconds: int
    tolerance: float | None = 2e-2
    aims: Sequence[Aim] = ()
    shares: tuple[str, str, tuple[float, float], tuple[float, float]] | None = None

    def sizes_of(self, is_tiny: bool) -> Mapping[str, Any]:
        """The sizes of a run."""
        return self.tiny if is_tiny else self.sizes

    def competitors(self, is_tiny: bool) -> list[Competitor]:
        """In the order of the rounds; tiny ones are not compiled by PyTorch, which takes longer than all the rest."""
        sizes, rows = self.sizes_of(is_tiny), []
        for name, (target, options) in self.rows.items():
            if is_tiny and target.partition(":")[2].startswith("Torch"):
                options = {**options, "is_compiled": False}
            round_ = {"steps": 1 if is_tiny else self.steps}
            rows.append(Competitor(name, f"benchmarks.gpu.{target}", {**sizes, **options}, round_))
        return rows


def verdicts(workload: Workload, results: Sequence[Result]) -> list[str]:
    """How the results stand to floors and aims, a line each."""
    by_name, lines = {result.name: result for result in results}, []
    for aim in workload.aims:
        ours, theirs = by_name[OURS], by_name[aim.against]
        lines.append(f"Against {aim.against}: floor {aim.floor}, aim {aim.aim}: {_judged(ours, theirs, aim)}.")
    if workload.shares:
        name, other, memory, time = workload.shares
        for what, limits, values in (("peak memory", memory, _memories), ("step time", time, _times)):
            share = values(by_name[name], by_name[other])
            told = "not run" if share is None else f"{share:.2f}, {_word(-share, -limits[0], -limits[1])}"
            lines.append(f"{name}, {what} as a share of {other}: floor {limits[0]}, aim {limits[1]}: {told}.")
    return lines


def _judged(ours: Result, theirs: Result, aim: Aim) -> str:
    ratio = speed_up(ours, theirs)
    return "not run" if ratio is None else f"{ratio.median:.2f}, {_word(ratio.median, aim.floor, aim.aim)}"


def _word(value: float, floor: float, aim: float) -> str:
    return "below the floor" if value < floor else "above the floor" if value < aim else "aim reached"


def _memories(a: Result, b: Result) -> float | None:
    mine, other = (result.facts.get("peak_bytes") or result.facts.get("program_bytes") for result in (a, b))
    return mine / other if mine and other else None


def _times(a: Result, b: Result) -> float | None:
    return None if a.failure or b.failure else a.median_s / b.median_s


HALF, SINGLE = {"dtype": "bfloat16"}, {"dtype": "float32"}

GPT = Workload(
    title="GPT-2 124M, {batch_size} x {length} tokens, vocabulary {vocab_size}, {dtype}",
    unit="tokens",
    units=lambda sizes: sizes["batch_size"] * sizes["length"],
    sizes={"width": 768, "n_heads": 12, "n_layers": 12, "vocab_size": 50304, "length": 1024, "batch_size": 32, **HALF},
    tiny={"width": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 256, "length": 16, "batch_size": 2, **HALF},
    rows={
        COMPILED: ("gpt:Torch", {}),
        OURS: ("gpt:Jaxdl", {"chunk_tokens": 32 * 1024}),  # all logits at once: faster, and there is room
        CUDNN: ("gpt:Torch", {"attention": "CUDNN_ATTENTION"}),
    },
    steps=10,
    seconds=80,
    aims=(Aim(COMPILED, 1.0, 1.1), Aim(CUDNN, 0.95, 1.05)),
)
VIT = Workload(
    title="ViT-S/{patch_size}, {batch_size} images of {image_size}, {dtype}",
    unit="images",
    units=lambda sizes: sizes["batch_size"],
    sizes={
        **{"width": 384, "n_heads": 6, "n_layers": 12, "image_size": 224, "patch_size": 16, "n_classes": 1000},
        **{"batch_size": 256, **HALF},
    },
    tiny={
        **{"width": 32, "n_heads": 2, "n_layers": 2, "image_size": 16, "patch_size": 8, "n_classes": 5},
        **{"batch_size": 2, **HALF},
    },
    rows={COMPILED: ("vision:TorchViT", {}), OURS: ("vision:JaxdlViT", {})},
    steps=20,
    seconds=85,
    aims=(Aim(COMPILED, 1.0, 1.2),),
)
RESNET = Workload(
    title="ResNet-50, {batch_size} images of {image_size}, {dtype}",
    unit="images",
    units=lambda sizes: sizes["batch_size"],
    sizes={
        **{"stage_sizes": [3, 4, 6, 3], "width": 64, "image_size": 224, "n_classes": 1000},
        **{"batch_size": 256, **HALF},
    },
    tiny={"stage_sizes": [1, 1], "width": 8, "image_size": 32, "n_classes": 5, "batch_size": 4, **HALF},
    rows={COMPILED: ("vision:TorchResNet", {}), OURS: ("vision:JaxdlResNet", {})},
    steps=10,
    seconds=120,
    tolerance=5e-2,  # batch norms over few values: the two libraries round at different places
    aims=(Aim(COMPILED, 1.0, 1.1),),
)
LORA_1B = Workload(
    title="Fine-tuning a Llama-like model of 1.5 billion parameters, {n_rows} x {n_tokens} tokens, full remat, {dtype}",
    unit="tokens",
    units=lambda sizes: sizes["n_rows"] * sizes["n_tokens"],
    sizes={"n_rows": 8, "n_tokens": 2048, **HALF},
    tiny={
        **{"n_layers": 1, "width": 32, "n_heads": 2, "n_kv_heads": 1, "hidden": 64, "vocab_size": 256},
        **{"n_rows": 2, "n_tokens": 16, **HALF},
    },
    rows={FULL: ("lora:Jaxdl", {"case": "full"}), LORA: ("lora:Jaxdl", {"case": "lora"})},
    steps=3,
    seconds=90,
    tolerance=None,
    shares=(LORA, FULL, (0.30, 0.24), (0.85, 0.70)),
)
BERT = Workload(
    title="MiniLM, everything trains, {batch_size} x {length} tokens, {dtype}",
    unit="rows",
    units=lambda sizes: sizes["batch_size"],
    sizes={
        **{"width": 384, "n_heads": 12, "hidden": 1536, "n_layers": 6, "vocab_size": 30522},
        **{"length": 128, "batch_size": 256, **HALF},
    },
    tiny={
        **{"width": 16, "n_heads": 2, "hidden": 32, "n_layers": 2, "vocab_size": 50},
        **{"length": 8, "batch_size": 4, **HALF},
    },
    rows={COMPILED: ("bert:Torch", {}), OURS: ("bert:Jaxdl", {})},
    steps=20,
    seconds=55,
)
LSTM = Workload(
    title="LSTM {n_layers} x {width}, {batch_size} rows of {length}, {dtype} (TF32)",
    unit="rows",
    units=lambda sizes: sizes["batch_size"],
    sizes={"width": 512, "n_layers": 2, "length": 128, "batch_size": 64, **SINGLE},
    tiny={"width": 8, "n_layers": 2, "length": 5, "batch_size": 4, **SINGLE},
    rows={EAGER: ("recurrent:Torch", {"is_compiled": False}), OURS: ("recurrent:Jaxdl", {})},
    steps=40,
    seconds=25,
    aims=(Aim(EAGER, 0.83, 1.0),),
)

WORKLOADS = {"gpt": GPT, "vit": VIT, "resnet": RESNET, "bert": BERT, "lstm": LSTM, "lora": LORA_1B}
