"""The harness of the families, on a real class of transformers, and that it can fail."""

import dataclasses

import pytest

from jaxdl.pretrained.bert import BERT
from jaxdl.pretrained.entries import entry
from tests.parity.families import check_family

transformers = pytest.importorskip("transformers")
CONFIG = {
    "vocab_size": 131,
    "max_position_embeddings": 19,
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 20,
}


def test_bert_passes_scanned_and_unrolled(tmp_path):
    for layout in ("unrolled", "scanned"):
        (tmp_path / layout).mkdir()
        config = transformers.BertConfig(**CONFIG)
        report = check_family(BERT, transformers.BertForMaskedLM, config, tmp_path / layout, layout=layout)
        assert max(line.error for line in report.lines if line.name.startswith("output")) < 1e-12


def test_an_untransposed_square_kernel_fails(tmp_path):
    name, path = "bert.encoder.layer.0.attention.self.value.weight", "encoder/layer_0/attention/value/kernel"
    wrong = [(name,), entry(name, path)]
    lines = lambda model: [wrong[1] if line[0] == wrong[0] else line for line in BERT.entries(model)]  # noqa: E731
    family = dataclasses.replace(BERT, entries=lines)
    with pytest.raises(AssertionError, match="output logits differs"):
        check_family(family, transformers.BertForMaskedLM, transformers.BertConfig(**CONFIG), tmp_path)
