"""The proof tool: it passes a faithful twin, and every kind of mistake is seen and named."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from jaxdl.__main__ import main
from jaxdl.pretrained import PretrainedError, verify, verify_parity
from jaxdl.pretrained.entries import dense, entry
from jaxdl.pretrained.tensors import write_folder
from tests.toy_family import TOY, Toy, entries, make_twin, tensors_of, to_config

pytestmark = pytest.mark.optimized

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write(path, head="classes"):
    (path / "config.json").write_text(json.dumps(to_config(Toy(head=head))))
    write_folder(path, tensors_of(head=head))
    return path


def twin(head="classes", **changes):
    return make_twin({**tensors_of(head=head), **changes}, head)


@pytest.mark.parametrize("fields", [{"is_scanned": False}, {"is_scanned": True}, {"dtype": "float32"}])
@pytest.mark.parametrize("head", ["classes", "words"])
def test_a_faithful_twin_is_equal(tmp_path, head, fields):
    tolerance = 1e-2 if "dtype" in fields else 1e-8
    report = verify_parity(write(tmp_path, head), family=TOY, theirs=twin(head), tolerance=tolerance, **fields)
    assert report.is_equal, str(report)
    n_leaves = {"classes": 27, "words": 23}[head]
    assert len(report.lines) == 1 + n_leaves + 4 + n_leaves
    assert report.losses[0] > report.losses[1] > report.losses[2] > report.losses[3]
    text = str(report)
    assert "equal within" in text
    assert "NOT" not in text
    assert [row.split()[0] for row in text.splitlines()[2:]] == ["output", "gradient", "loss", "update"]


def test_a_wrong_weight_is_seen_in_the_output(tmp_path):
    changed = tensors_of()["toy.h.1.proj.bias"] + np.float32([0.5, 0, 0, 0])
    report = verify_parity(write(tmp_path), family=TOY, theirs=twin(**{"toy.h.1.proj.bias": changed}))
    assert not report.is_equal
    assert any("output logits differs by" in problem for problem in report.problems)
    assert "NOT equal" in str(report)


def test_a_wrong_transpose_in_the_map_is_seen(tmp_path):
    """Both sides read the file through the map, so that only the comparison with PyTorch can tell."""
    wrong = dataclasses.replace(TOY, entries=lambda model: [untransposed(line) for line in entries(model)])
    report = verify_parity(write(tmp_path), family=wrong, theirs=twin())
    assert any("output logits" in problem for problem in report.problems)
    assert any("gradient encoder/layer_0/output/kernel" in problem for problem in report.problems)


def untransposed(line):
    is_it = line[0] == ("toy.h.0.proj.weight",)
    return entry("toy.h.0.proj.weight", "encoder/layer_0/output/kernel") if is_it else line


def test_equal_outputs_with_another_gradient_are_seen(tmp_path):
    """Nothing but the gradients tells a detached branch."""
    other = twin()
    forward = other.forward

    def detached(tokens):
        with torch.no_grad():
            value = forward(tokens)
        out = forward(tokens)
        return value + 0.5 * (out - out.detach())

    other.forward = detached
    report = verify_parity(write(tmp_path), family=TOY, theirs=other)
    kinds = {problem.split()[0] for problem in report.problems}
    assert "gradient" in kinds
    assert "output" not in kinds


def test_a_dead_model_proves_nothing(tmp_path):
    tensors = tensors_of()
    tensors["classifier.weight"][:] = 0
    (tmp_path / "config.json").write_text(json.dumps(to_config(Toy())))
    write_folder(tmp_path, tensors)
    report = verify_parity(tmp_path, family=TOY, theirs=make_twin(tensors))
    assert any("gradient gates/kernel is zero on both sides" in problem for problem in report.problems)
    excused = dataclasses.replace(TOY, zero_gradients=("(?!head).*",))
    assert verify_parity(tmp_path, family=excused, theirs=make_twin(tensors)).is_equal


def test_a_gradient_wrongly_called_zero_is_named(tmp_path):
    wrong = dataclasses.replace(TOY, zero_gradients=("head/bias",))
    report = verify_parity(write(tmp_path), family=wrong, theirs=twin())
    assert any("gradient head/bias is said to be zero, but is" in problem for problem in report.problems)


def test_a_loss_that_does_not_fall_is_named(tmp_path):
    report = verify_parity(write(tmp_path), family=TOY, theirs=twin(), learning_rate=30.0)
    assert any("the loss does not fall" in problem for problem in report.problems)


def test_outputs_of_other_names_or_shapes_are_named(tmp_path):
    other = dataclasses.replace(TOY, their_outputs=lambda out, _: {"hidden": out})
    assert "outputs differ in name: ['logits'] here, ['hidden'] there" in str(
        verify_parity(write(tmp_path), family=other, theirs=twin())
    )
    other = dataclasses.replace(TOY, their_outputs=lambda out, _: {"logits": out[:2]})
    assert "has shape (3, 3) here and (2, 3) there" in str(verify_parity(tmp_path, family=other, theirs=twin()))


def test_the_command_prints_a_table_and_ends_in_0_1_or_2(tmp_path, monkeypatch, capsys):
    write(tmp_path)
    monkeypatch.setattr(verify, "FAMILIES", (TOY,))
    monkeypatch.setattr("jaxdl.pretrained.folder.FAMILIES", (TOY,))
    monkeypatch.setattr(verify, "_load_theirs", lambda *_: twin())
    assert main(["verify-parity", str(tmp_path)]) == 0
    assert "max relative error" in capsys.readouterr().out
    assert main(["verify-parity", str(tmp_path), "--tolerance", "1e-30"]) == 1
    assert "NOT equal within 1e-30" in capsys.readouterr().out
    assert main(["verify-parity", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_without_torch_or_transformers_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PretrainedError, match=r"transformers is not installed.*pip install torch transformers"):
        verify_parity(write(tmp_path), family=TOY)


def test_a_map_that_leaves_torch_parameters_over_is_refused(tmp_path):
    lines = lambda model: [line for line in entries(model) if line[0] != ("toy.cls",)]  # noqa: E731
    lacking = dataclasses.replace(TOY, entries=lambda model: [*lines(model), *dense("toy.cls", "class_token")[:0]])
    with pytest.raises(PretrainedError, match=r"toy\.cls float32"):
        verify_parity(write(tmp_path), family=lacking, theirs=twin())
