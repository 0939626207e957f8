"""The benchmarks for a GPU, on this machine: the same maths on both sides, the clock, the tables, the plan."""

import importlib
import itertools
import json
import math
import os
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.gpu import predict, report, rounds, run, sides
from benchmarks.gpu import workloads as w
from benchmarks.harness import Competitor, Result

pytestmark = pytest.mark.optimized

HERE = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}


def fake(name: str, seconds: float = 0.0, **options: object) -> Competitor:
    return Competitor(name, "fake_competitor:Fake", options, {"seconds": seconds}, HERE)


def side(name: str, row: str, **options: object):
    """A competitor of a workload at its tiny size, made in this process."""
    workload = w.WORKLOADS[name]
    target, own = workload.rows[row]
    module, _, kind = target.partition(":")
    made = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), kind)
    return made(**{**workload.tiny, **own, **options})


SMALLER = {"gpt": {"n_layers": 1}, "resnet": {"stage_sizes": [1]}}


@pytest.mark.parametrize("name", SMALLER)
def test_both_libraries_compute_the_same_losses(name):
    """Of the others, `python -m benchmarks.gpu.run --tiny` compares the losses in bfloat16."""
    pytest.importorskip("torch")
    sizes = {"dtype": "float32", **SMALLER[name]}
    ours, theirs = side(name, w.OURS, **sizes), side(name, w.COMPILED, is_compiled=False, **sizes)
    mine, other = ours.warm_up(), theirs.warm_up()
    np.testing.assert_allclose(mine["first_losses"], other["first_losses"], rtol=2e-4)
    assert len(set(mine["first_losses"])) == len(mine["first_losses"])  # something moves
    assert mine["model_flops"] > 0
    assert ours.round(1) > 0
    assert theirs.round(1) > 0


def test_lora_holds_a_bfloat16_base_and_trains_the_adapters_only():
    state = jax.eval_shape(sides.abstract_start(side("lora", w.LORA).parts), jax.random.key(0))
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params["adapters"]))
    base = [leaf for name, part in state.params.items() if name != "adapters" for leaf in jax.tree.leaves(part)]
    assert {str(leaf.dtype) for leaf in base} == {"bfloat16"}
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == 2 * trained


def test_rounds_are_taken_in_turn_and_a_failure_stays_alone():
    notes: list[str] = []
    found = rounds.measure([fake("a"), fake("b", fails=True)], time.monotonic() + 60, notes.append, most_rounds=4)
    assert found[0].seconds == (0.5,) * 4
    assert found[0].facts["peak_bytes"] == 2**30
    assert found[0].facts["warm_up_s"] >= 0
    assert found[1].failure == "ZeroDivisionError: a round went wrong"
    assert any("a round went wrong" in note for note in notes)


def test_who_compiles_for_too_long_is_ended_and_the_other_has_its_rounds():
    started = time.monotonic()
    slow, quick = rounds.measure([fake("slow", warm_up_s=60.0), fake("quick")], started + 5.0, lambda text: None, 3)
    assert time.monotonic() - started < 30
    assert slow.failure == rounds.OUT_OF_TIME
    assert quick.seconds == (0.5,) * 3


def test_rounds_end_in_time_with_as_many_for_each(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(rounds, "monotonic", lambda: next(ticks))  # a second each time that it is looked at
    found = rounds.measure([fake("a"), fake("b")], 100, lambda text: None, most_rounds=1000)
    assert [result.failure for result in found] == [None, None]
    assert len(found[0].seconds) == len(found[1].seconds)
    assert rounds.LEAST_ROUNDS < len(found[0].seconds) < 100 / 2


def gpt_results() -> list[Result]:
    facts = {"first_losses": [10.8, 10.7], "warm_up_s": 40.0, "peak_bytes": 20 * 2**30}
    ours = {**facts, "model_flops": 28e12, "choices": ["attention: cudnn (bfloat16 on a GPU)"]}
    return [
        Result(w.COMPILED, (0.09, 0.09, 0.09), facts),
        Result(w.OURS, (0.075, 0.075, 0.075), ours),
        Result(w.CUDNN, failure="no such backend"),
    ]


def test_the_table_holds_rates_mfu_memory_and_the_plan(monkeypatch):
    planned = {w.OURS: {"sizes": dict(w.GPT.sizes), "peak_bytes": 25 * 2**30, "bound_s": 0.029}}
    monkeypatch.setattr(report, "predictions", lambda: {"gpt": planned})
    text = report.to_table("gpt", w.GPT, gpt_results(), {"kind": "NVIDIA H100 80GB HBM3"}, False).to_markdown()
    mfu = 100 * 28e12 / 0.075 / 989e12
    rate = f"{32 * 1024 / 0.075:,.0f}"
    cells = f"| jaxdl | {rate} | 75.0 ms (75.0 .. 75.0) | 1.20 (1.20 .. 1.20) | {mfu:.1f} % | 20.00 | 25.00 | 29.0 ms |"
    assert cells in text
    assert "cuDNN attention: **not run** (no such backend) | - | - | - | - | - | - | - | - |" in text
    assert "Against PyTorch torch.compile: floor 1.0, aim 1.1: 1.20, aim reached." in text
    assert "Against PyTorch torch.compile, cuDNN attention: floor 0.95, aim 1.05: not run." in text
    planned[w.OURS]["sizes"]["batch_size"] = 64  # a plan of other sizes says nothing
    text = report.to_table("gpt", w.GPT, gpt_results(), {}, False).to_markdown()
    assert "| - | 20.00 | - | - |" in text


def test_other_maths_is_told_beside_the_figures():
    results = gpt_results()
    results[1] = Result(w.OURS, (0.075,) * 3, {**results[1].facts, "first_losses": [math.nan, 10.7]})
    text = report.to_table("gpt", w.GPT, results, {}, False).to_markdown()
    assert "**Not the same work:** jaxdl does other maths" in text
    assert "75.0 ms" in text
    assert report.other_maths(results, None) is None


def test_shares_are_judged_the_other_way_round():
    full = Result(w.FULL, (1.0, 1.0), {"peak_bytes": 100})
    for peak, seconds, words in (
        (24, 0.70, "aim reached"),
        (29, 0.84, "above the floor"),
        (31, 0.9, "below the floor"),
    ):
        lines = w.verdicts(w.LORA_1B, [full, Result(w.LORA, (seconds, seconds), {"peak_bytes": peak})])
        assert [line.rstrip(".").endswith(words) for line in lines] == [True, True]
    assert all(line.endswith("not run.") for line in w.verdicts(w.LORA_1B, [full, Result(w.LORA, failure="no")]))


def test_run_writes_after_each_workload_and_says_what_found_no_time(monkeypatch, tmp_path, capsys):
    files = [tmp_path / "out.json", tmp_path / "out.md"]
    seen: list[bool] = []

    def measure(competitors, deadline, note, most):
        seen.append(files[0].exists())
        return gpt_results()[: len(competitors)]

    monkeypatch.setattr(run.rounds, "measure", measure)
    monkeypatch.setattr(run.machine, "describe", lambda: {"cpu": "a box"})
    monkeypatch.setattr(run, "_ceilings", lambda facts: {"kind": "H100"})
    arguments = ["gpt", "vit", "--json", str(files[0]), "--markdown", str(files[1])]
    assert run.main([*arguments, "--seconds", "170"]) == 1  # one competitor failed
    assert seen == [False, True]
    assert run.main(["vit", *arguments[2:], "--seconds", "80"]) == 0
    found = json.loads(files[0].read_text())["workloads"]["vit"]
    assert found["results"][0]["failure"].startswith("out of time: it takes about")
    assert files[1].read_text().count("**not run** (out of time") == 2
    assert "images/s" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.main(["gtp"])


def test_the_kept_predictions_are_of_these_sizes():
    kept = json.loads(report.PREDICTIONS.read_text())["workloads"]
    for name, workload in w.WORKLOADS.items():
        ours = {row: own for row, (target, own) in workload.rows.items() if ":Jaxdl" in target}
        assert kept[name].keys() == ours.keys(), "run python -m benchmarks.gpu.predict"
        for row, own in ours.items():
            told = kept[name][row]
            assert (told["sizes"], told["options"]) == (workload.sizes, own), f"{name}: run benchmarks.gpu.predict"


def test_the_kept_programs_multiply_in_bfloat16_call_cudnn_and_reuse_the_state():
    kept = json.loads(report.PREDICTIONS.read_text())["workloads"]
    layers = {"gpt": 12, "vit": 11, "bert": 5}  # the last of ViT and BERT has a single query, and is XLA's
    for name, told in ((name, told) for name, rows in kept.items() for told in rows.values()):
        if w.WORKLOADS[name].sizes["dtype"] == "bfloat16":
            assert told["products"].get("float32", 0) < 1e-3 * told["products"]["bfloat16"], name
        if name in layers:
            found = {target: n for target, n in told["calls"].items() if "fmha" in target}
            assert set(found.values()) == {layers[name]}, name
            assert any(target.endswith("Backward") for target in found), name
        # what is not reused is the batch: at most 256 images and their labels
        assert told["state_bytes"] - told["aliased_bytes"] < 1.01 * 256 * (224 * 224 * 3 * 4 + 4), name


def test_a_prediction_counts_operations_and_calls():
    told = predict.predict("gpt:Jaxdl", {**w.GPT.tiny, "n_layers": 1}, "cpu:1")
    n, width, length, layers, vocab = 2 * 16, 32, 16, 1, 256
    forward = layers * (24 * n * width**2 + 4 * n * length * width) + 2 * n * width * vocab
    assert told["model_flops"] == 3 * forward
    assert told["peak_bytes"] > told["state_bytes"] > told["aliased_bytes"] * 0.9
    assert told["bound_s"] is None
    table = predict.to_table({"gpt": {"jaxdl": told}}).to_markdown()
    assert "| gpt: jaxdl | 0.00 | - | - | 0.00 T bfloat16" in table
