"""Fine-tuning a BERT of MiniLM's shape for classification, with random weights: everything, the last layer, or LoRA.

Rows are padded to one length and masked; dropout is off on both sides, so that the losses can be compared. PyTorch's
side is `transformers` with its fused attention, also inside its trainer, and `peft`.

Dimensions: `B` batch, `T` time, `D` width, `F` hidden, `N` batches, `L` layers.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import BenchmarkError, Child, Competitor, Result, Settings, measure
from benchmarks.table import Table
from benchmarks.training import N_BATCHES, Aim, JaxdlParts, competitors, table, to_torch
from benchmarks.training import Jaxdl as JaxdlTraining
from benchmarks.training import Torch as TorchTraining
from benchmarks.weights import draw, fill_named, fill_pretrained

SIZES = {
    "width": 384,
    "n_heads": 12,
    "hidden": 1536,
    "n_layers": 6,
    "vocab_size": 30522,
    "length": 128,
    "batch_size": 32,
}
N_OUTPUTS, RANK, ALPHA = 2, 8, 16
ATTENTION = "encoder/layer_.*/attention/(query|key|value|output)/kernel"
# what moves -> (title, floor and aim, steps of a round)
KINDS = {
    "full": ("everything", Aim(0.88, 1.05), 1),
    "last": ("the last layer, the pooler and the head", Aim(1.1, 1.25), 1),
    "lora": (f"LoRA r={RANK} on all attention projections, and the head", Aim(0.88, 1.05), 1),
}
TRAINER = "transformers' Trainer"
MOST_OVER_ORACLE, MOST_OF_FULL, MOST_MOMENTS = 1.03, 0.72, 0.02


def make_batches(vocab_size: int, length: int, batch_size: int) -> dict[str, np.ndarray]:
    """`tokens` and `mask` (N, B, T) int32, rows of length / 2 to length tokens; `label` (N, B) int32."""
    rng = np.random.default_rng(1)
    shape = (N_BATCHES, batch_size, length)
    lengths = rng.integers(length // 2, length + 1, (N_BATCHES, batch_size, 1))
    mask = (np.arange(length) < lengths).astype(np.int32)
    tokens = rng.integers(1, vocab_size, shape, dtype=np.int32) * mask
    return {"tokens": tokens, "mask": mask, "label": rng.integers(0, N_OUTPUTS, shape[:2], dtype=np.int32)}


def trainable_rules(kind: str, n_layers: int) -> list[tuple[str, bool]]:
    """What moves, for jaxdl."""
    moving = {
        "full": [".*"],
        "last": [f"encoder/layer_{n_layers - 1}/.*", "pooler/.*", "head/.*"],
        "lora": ["adapters/.*", "head/.*"],
    }[kind]
    return [(regex, True) for regex in moving] + ([] if kind == "full" else [(".*", False)])


class Jaxdl(JaxdlTraining):
    """`jaxdl.models.bert.Bert`, perhaps with `jaxdl.finetune.lora`; it also tells what a delta of the run holds."""

    def __init__(self, kind: str, **options: Any) -> None:
        self.kind = kind
        super().__init__(kind=kind, **options)

    @property
    def facts(self) -> dict[str, Any]:
        """Those of every workload, and bytes of a delta."""
        return super().facts | (self._bytes() if self.kind != "full" else {})

    def make(
        self,
        kind: str,
        width: int,
        n_heads: int,
        hidden: int,
        n_layers: int,
        vocab_size: int,
        length: int,
        batch_size: int,
    ) -> JaxdlParts:
        import jax

        from jaxdl.finetune.adapters import add, with_adapters
        from jaxdl.finetune.lora import Lora
        from jaxdl.models.apply import make_loss_fn
        from jaxdl.models.bert import Bert, bert_block
        from jaxdl.objectives import classification
        from jaxdl.paths import flatten
        from jaxdl.pretrained.bert import BERT

        block = bert_block(width, n_heads, hidden, dropout_rate=0.0, attention_dropout_rate=0.0)
        model = Bert(block, n_layers=n_layers, vocab_size=vocab_size, head="classify", n_outputs=N_OUTPUTS)
        params, batches = fill_pretrained(BERT, model), make_batches(vocab_size, length, batch_size)
        loss_fn = make_loss_fn(model, classification(), inputs=("tokens", "mask"), train=True)
        if kind == "lora":
            settings = Lora([(ATTENTION, RANK), (".*", None)], alpha=ALPHA)
            one = {name: batches[name][0] for name in ("tokens", "mask")}
            params = add(jax.random.key(0), params, settings, model, one["tokens"], mask=one["mask"])
            fresh = params["adapters"]
            drawn = [
                draw(f"adapters/{path}", leaf.shape) if path.endswith("/a") else leaf
                for path, leaf in flatten(fresh).items()
            ]
            params["adapters"] = jax.tree.unflatten(jax.tree.structure(fresh), [jax.numpy.asarray(x) for x in drawn])
            loss_fn = with_adapters(loss_fn, settings)
        self.params = params
        return JaxdlParts(loss_fn, params, batches, trainable=trainable_rules(kind, n_layers))

    def _bytes(self) -> dict[str, int]:
        from jaxdl.finetune.contract import Frozen
        from jaxdl.finetune.delta_folder import read_delta, save_delta
        from jaxdl.paths import flatten

        rules = self.parts.trainable
        frozen = Frozen(self.params, {}, rules)
        with tempfile.TemporaryDirectory() as directory:
            save_delta(Path(directory, "delta"), self.state.params, {}, frozen)
            _, arrays = read_delta(Path(directory, "delta"))
        moving = [leaf for path, leaf in flatten(self.params).items() if f"params/{path}" not in frozen.hashes]
        return {
            "delta_bytes": sum(array.nbytes for array in arrays.values()),
            "trainable_bytes": sum(leaf.nbytes for leaf in moving),
        }


class Torch(TorchTraining):
    """`transformers.BertForSequenceClassification` with `requires_grad=False` on what is frozen, or under `peft`."""

    def make(
        self,
        kind: str,
        width: int,
        n_heads: int,
        hidden: int,
        n_layers: int,
        vocab_size: int,
        length: int,
        batch_size: int,
    ) -> tuple[Any, Any, list[dict[str, Any]]]:
        import torch
        import transformers

        config = transformers.BertConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            num_hidden_layers=n_layers,
            num_attention_heads=n_heads,
            intermediate_size=hidden,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        config.num_labels = N_OUTPUTS
        model: Any = transformers.BertForSequenceClassification._from_config(config, attn_implementation="sdpa")
        fill_named(model)
        if kind == "lora":
            model = _with_peft(model)
        elif kind == "last":
            moving = (f"bert.encoder.layer.{n_layers - 1}.", "bert.pooler.", "classifier.")
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith(moving))
        model = model.to(self.device).train()

        def loss_fn(tokens: Any, mask: Any, label: Any) -> Any:
            return torch.nn.functional.cross_entropy(model(input_ids=tokens, attention_mask=mask).logits, label)

        return model, loss_fn, to_torch(make_batches(vocab_size, length, batch_size))


def _with_peft(model: Any) -> Any:
    import peft
    import torch

    targets = ["query", "key", "value", "attention.output.dense"]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, modules_to_save=["classifier"])
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_A." in name:
                parameter.copy_(torch.from_numpy(draw(_adapter_path(name), tuple(parameter.shape[::-1])).T))
    return adapted


def _adapter_path(name: str) -> str:
    """PEFT's name of a matrix A -> jaxdl's path.

    Example:
      >>> _adapter_path("base_model.model.bert.encoder.layer.3.attention.self.key.lora_A.default.weight")
      'adapters/encoder/layer_3/attention/key/a'
    """
    _, _, rest = name.partition(".encoder.layer.")
    layer, _, inside = rest.partition(".attention.")
    part = "output" if inside.startswith("output.") else inside.split(".")[1]
    return f"adapters/encoder/layer_{layer}/attention/{part}/a"


def flops_per_step(
    kind: str,
    width: int,
    n_heads: int,
    hidden: int,
    n_layers: int,
    vocab_size: int,
    length: int,
    batch_size: int,
) -> int:
    """Operations of the products of one update; the pooler, the head and LoRA's own matrices are left out.

    Example:
      >>> sizes = {"width": 1, "n_heads": 1, "hidden": 4, "n_layers": 2, "vocab_size": 9, "length": 3, "batch_size": 1}
      >>> [flops_per_step(kind, **sizes) for kind in ("full", "last", "lora")]  # a layer: 72 and 36 of attention
      [648, 414, 486]
    """
    n = batch_size * length
    weights, attention = 2 * n * (4 * width**2 + 2 * width * hidden), 4 * n * length * width
    inputs = 6 * n * width**2  # of query, key and value
    forward = n_layers * (weights + attention)
    if kind == "full":
        return 3 * forward
    if kind == "last":  # the gradients of its weights, and of what comes after the query, key and value
        return forward + 2 * (weights + attention) - inputs
    return 2 * forward + n_layers * attention - inputs


def run(settings: Settings) -> list[Table]:
    """A table for each way to fine-tune, and what each compiles to and holds."""
    tables, found = [], {}
    for kind, (what, aim, steps) in KINDS.items():
        sizes: dict[str, Any] = {"kind": kind, **SIZES}
        with tempfile.TemporaryDirectory() as directory:
            results = measure(_rows(kind, sizes, steps, settings, directory), settings)
        title = f"BERT as MiniLM, batch {SIZES['batch_size']}, length {SIZES['length']}, trains {what}: one step"
        tables.append(table(title, results, flops=flops_per_step(**sizes), aim=aim))
        found[kind] = next(result for result in results if result.name == "jaxdl")
    with Child(Competitor("FLOPs", "benchmarks.bert_flops:Counts", SIZES)) as child:
        settings.note("compiles to count FLOPs")
        child.set_up()
        counts = child.facts()
    return [*tables, work_table(counts, found)]


def _rows(kind: str, sizes: dict[str, Any], steps: int, settings: Settings, directory: str) -> list[Competitor]:
    rows = competitors(
        "benchmarks.bert", sizes, settings, steps=steps, is_mapped=True, bare="bert" if kind == "last" else None
    )
    if kind == "full":
        options = {"directory": directory, **sizes}
        rows.append(Competitor(TRAINER, "benchmarks.trainer:Trainer", options, {"steps": steps}))
    return rows


def work_table(counts: dict[str, float], found: dict[str, Result]) -> Table:
    """What jaxdl's steps compile to and hold, each with its limit.

    Raises:
      BenchmarkError: a limit is broken.
    """
    facts = {kind: result.facts for kind, result in found.items() if not result.failure}
    shares = [
        ("FLOPs, the last layer, over a hand-written step", counts["last"] / counts["oracle"], MOST_OVER_ORACLE),
        ("FLOPs, LoRA over full", counts["lora"] / counts["full"], MOST_OF_FULL),
    ]
    if facts.keys() == KINDS.keys():
        moments = {kind: facts[kind]["optimizer_bytes"] for kind in KINDS}
        shares.append(("bytes of the optimizer, LoRA over full", moments["lora"] / moments["full"], MOST_MOMENTS))
        for kind in ("last", "lora"):
            own, trained = facts[kind], facts[kind]["trainable_bytes"]
            shares.append((f"bytes of the optimizer, {kind}, over two moments", moments[kind] / (2 * trained), 1.001))
            shares.append((f"bytes of the delta, {kind}, over the trained bytes", own["delta_bytes"] / trained, 1.0))
    made = Table("BERT as MiniLM: what jaxdl's steps compile to and hold", ["", "share", "limit"])
    made.rows = [[name, f"{share:.4f}", f"{limit:g}"] for name, share, limit in shares]
    made.notes = [
        "FLOPs are XLA's count of the compiled step: "
        + ", ".join(f"{name} {count / 1e9:.1f} G" for name, count in counts.items())
        + ". The hand-written step, of plain `jax.numpy`, differentiates the last layer, the pooler and the head only."
    ]
    if broken := [f"{name} is {share:.4f}, above {limit:g}" for name, share, limit in shares if share > limit]:
        raise BenchmarkError("; ".join(broken))
    return made
