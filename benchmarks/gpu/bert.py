"""A BERT of MiniLM's shape that learns to classify, all of it: one training step."""

from typing import Any

from benchmarks import bert
from benchmarks.gpu.sides import Jaxdl as JaxdlSide
from benchmarks.gpu.sides import Parts
from benchmarks.gpu.sides import Torch as TorchSide


class Jaxdl(JaxdlSide):
    """`jaxdl.models.bert.Bert`, its weights those of a checkpoint of `transformers`."""

    def make(
        self, width: int, n_heads: int, hidden: int, n_layers: int, vocab_size: int, dtype: str, **rows: int
    ) -> Parts:
        from jaxdl.models.apply import init_model, make_loss_fn
        from jaxdl.models.bert import Bert, bert_block
        from jaxdl.objectives import classification

        block = bert_block(width, n_heads, hidden, dropout_rate=0.0, attention_dropout_rate=0.0, dtype=dtype)
        model = Bert(block, n_layers=n_layers, vocab_size=vocab_size, head="classify", n_outputs=bert.N_OUTPUTS)
        batches = bert.make_batches(vocab_size, **rows)
        one = {name: batches[name][0, :1] for name in ("tokens", "mask")}
        loss_fn = make_loss_fn(model, classification(), inputs=("tokens", "mask"), train=True)

        def fill(shapes: Any) -> Any:
            from benchmarks.weights import fill_pretrained
            from jaxdl.pretrained.bert import BERT

            return fill_pretrained(BERT, model)

        return Parts(loss_fn, lambda key: init_model(model, key, one["tokens"], mask=one["mask"]), batches, fill)


class Torch(TorchSide):
    """`transformers.BertForSequenceClassification` with PyTorch's fused attention."""

    network = "transformers' BertForSequenceClassification"

    def make(self, dtype: str, **sizes: int) -> tuple[Any, Any, list[dict[str, Any]]]:
        return bert.Torch.make(self, kind="full", **sizes)  # type: ignore[arg-type]
