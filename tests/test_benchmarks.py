"""The harness of the benchmarks: its arithmetic, its processes and its report. No figure is judged here."""

import itertools
import json
import math
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    bare_jax,
    checkpoint,
    input_pipeline,
    loop_overhead,
    mlp,
    network,
    run,
    start_up,
    tiny_loop,
    training,
)
from benchmarks.harness import (
    BenchmarkError,
    Child,
    Competitor,
    Result,
    Settings,
    Spread,
    check_same_losses,
    fastest,
    measure,
    speed_up,
    spread,
)
from benchmarks.table import Table, not_run, ratio_cell, time_cell

pytestmark = pytest.mark.optimized

HERE = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}


class Clock:
    """A competitor that says when it works: the child imports this module and finds it."""

    def __init__(self, log: str, name: str) -> None:
        self.log, self.name, self.n_rounds = Path(log), name, 0
        self.facts = {"pid": os.getpid(), "first_losses": [1.0, 2.0]}
        print("noise on standard output must not reach the answers")

    def round(self, seconds: float = 0.0) -> float:
        start = time.monotonic()
        time.sleep(seconds)
        self.n_rounds += 1
        with self.log.open("a") as file:
            file.write(json.dumps([self.name, self.n_rounds, start, time.monotonic()]) + "\n")
        return float(self.n_rounds)


class Broken:
    def __init__(self) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")


class Figures:
    n = 0

    def round(self) -> dict[str, float]:
        self.n += 1
        return {"seconds": float(self.n), "stall_s": self.n / 2}


class Fragile:
    """Works once; then it fails, or takes its process with it."""

    def __init__(self, dies: bool) -> None:
        self.dies, self.n = dies, 0

    def round(self) -> float:
        self.n += 1
        if self.n == 1:
            return 1.0
        if self.dies:
            print("Illegal instruction", file=sys.stderr, flush=True)
            os._exit(7)
        raise ZeroDivisionError("a round went wrong\nwith a second line")


def clock(name: str, log: Path, seconds: float = 0.0) -> Competitor:
    return Competitor(name, "test_benchmarks:Clock", {"log": str(log), "name": name}, {"seconds": seconds}, HERE)


@pytest.mark.parametrize("values", [[3.0], [5.0, 1.0], [2.0, 9.0, 4.0], [0.5, 0.1, 0.9, 0.7]])
def test_spread_is_that_of_numpy(values):
    assert spread(values) == (np.median(values), np.min(values), np.max(values))


def test_speed_up_pairs_the_rounds():
    ours, theirs = Result("a", (1.0, 2.0, 4.0)), Result("b", (3.0, 2.0, 4.8))
    assert speed_up(ours, theirs) == pytest.approx((1.2, 1.0, 3.0))
    # The ratio of the medians would be 1.5: rounds of different moments must not meet.
    assert theirs.median_s / ours.median_s == 1.5
    assert speed_up(ours, Result("c", failure="no")) is None
    assert speed_up(Result("c", failure="no"), theirs) is None


def test_fastest_passes_over_failures():
    slow, quick, failed = Result("slow", (3.0,)), Result("quick", (1.0, 9.0, 2.0)), Result("failed", failure="no")
    assert fastest([failed, slow, quick]) is quick
    assert fastest([failed]).median_s == math.inf


def losses(name: str, *values: float) -> Result:
    return Result(name, (1.0,), {"first_losses": list(values)})


def test_same_losses_pass_and_tell_the_difference():
    found = check_same_losses([losses("a", 2.0, 1.0), losses("b", 2.0002, 1.0), Result("c", failure="no")], 1e-3)
    assert found == pytest.approx(1e-4)


@pytest.mark.parametrize("other", [(2.0, 1.01), (2.0, math.nan), (math.inf, 1.0)])
def test_other_maths_is_an_error(other):
    with pytest.raises(BenchmarkError, match="b does other maths than a"):
        check_same_losses([losses("a", 2.0, 1.0), losses("b", *other)], 1e-3)


def test_losses_of_another_number_of_steps_are_an_error():
    with pytest.raises(ValueError):
        check_same_losses([losses("a", 2.0, 1.0), losses("b", 2.0)], 1e-3)


def test_measure_interleaves_live_processes_and_runs_one_at_a_time(tmp_path):
    log = tmp_path / "log"
    results = measure([clock("A", log, 0.02), clock("B", log, 0.02)], Settings(rounds=3))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line[0] for line in lines] == ["A", "B"] * 3
    assert [line[1] for line in lines] == [1, 1, 2, 2, 3, 3]  # the processes lived on from round to round
    assert all(before[3] <= after[2] for before, after in itertools.pairwise(lines))
    assert [result.seconds for result in results] == [(1.0, 2.0, 3.0)] * 2
    pids = {result.facts["pid"] for result in results}
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_a_competitor_that_cannot_start_is_told_and_the_others_go_on(tmp_path):
    notes = []
    missing = Competitor("PyTorch", "test_benchmarks:Broken", environment=HERE)
    found = measure([missing, clock("A", tmp_path / "log")], Settings(rounds=2, note=notes.append))
    assert found[0].failure == "torch is missing: pip install 'jaxdl[bench]'"
    assert found[0].seconds == ()
    assert found[1].seconds == (1.0, 2.0)
    assert any("torch is missing" in note for note in notes)


@pytest.mark.parametrize(
    ("dies", "told"), [(False, "ZeroDivisionError: a round went wrong"), (True, "ended with 7: Illegal instruction")]
)
def test_a_competitor_that_fails_later_has_no_figures(dies, told, tmp_path):
    fragile = Competitor("fragile", "test_benchmarks:Fragile", {"dies": dies}, environment=HERE)
    found = measure([fragile, clock("A", tmp_path / "log")], Settings(rounds=3))
    assert found[0].failure is not None
    assert found[0].failure.endswith(told)
    assert found[0].median_s == math.inf
    assert found[1].seconds == (1.0, 2.0, 3.0)


def test_leaving_a_child_ends_its_process(tmp_path):
    with Child(clock("A", tmp_path / "log")) as child:
        child.set_up()
        pid = child.facts()["pid"]
        assert child.call("round", seconds=0.0) == 1.0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_cells():
    assert time_cell(Spread(2.5, 2.0, 12.0)) == "2.50 s (2.00 .. 12.0)"
    assert time_cell(Spread(0.0125, 0.01, 0.2)) == "12.5 ms (10.0 .. 200)"
    assert time_cell(Spread(4e-6, 3e-6, 5e-6)) == "4.00 µs (3.00 .. 5.00)"
    assert ratio_cell(Spread(0.98765, 0.9, 1.0), digits=3) == "0.988 (0.900 .. 1.000)"
    assert ratio_cell(None) == "-"


def test_table_is_markdown_and_json():
    table = Table("T", ["", "time"], [["a|b", "1 s"], not_run("torch", "not installed", 2)], ["A note."])
    assert table.to_markdown() == (
        "## T\n\n|  | time |\n| --- | ---: |\n| a/b | 1 s |\n| torch: **not run** (not installed) | - |\n\nA note.\n"
    )
    assert json.loads(json.dumps(table.to_json()))["rows"][0] == {"": "a|b", "time": "1 s"}


def test_flops_are_those_of_the_compiled_products():
    """XLA counts the same products, plus a little for what is not a product."""
    sizes, batch_size = (96, 128, 64, 10), 64
    kernels = [jnp.asarray(kernel) for kernel, _ in network.initial_weights(sizes)]

    def loss(kernels, x):
        for kernel in kernels:
            x = x @ kernel
        return x.sum()

    compiled = jax.jit(jax.grad(loss)).lower(kernels, jnp.ones((batch_size, sizes[0]))).compile()
    last = 2 * batch_size * sizes[-2] * sizes[-1]  # the gradient needs no last forward product
    expected = network.flops_per_step(sizes, batch_size) - last
    assert expected <= compiled.cost_analysis()["flops"] <= 1.1 * expected


def test_batches_are_rows_of_the_dataset_and_calls_get_them_in_turn():
    batches = mlp.Batches((6, 2), 4)
    assert sorted(batches.rows.ravel()) == list(range(4 * mlp.N_BATCHES))
    side = mlp.Jaxdl.__new__(mlp.Jaxdl)
    side.parts, side.n = training.JaxdlParts(None, None, batches.batched), 3
    for first in (50, mlp.N_BATCHES + 50, mlp.N_BATCHES - 1):  # the last goes over the end
        chunk = side.batch(first)
        for i in range(3):
            one = batches[first + i]
            for name, whole in (("features", batches.features), ("label", batches.label)):
                np.testing.assert_array_equal(chunk[name][i], one[name])
                np.testing.assert_array_equal(one[name], whole[batches.rows[(first + i) % mlp.N_BATCHES]])
    assert np.shares_memory(side.batch(50)["features"], batches.batched["features"])


@pytest.fixture(scope="module")
def step_losses():
    return mlp.Jaxdl("steps", (8, 4, 3), 4).facts["first_losses"]


@pytest.mark.parametrize(("mode", "guarded"), [("repeat", False), ("resident", False), ("steps", True)])
def test_all_ways_to_call_the_step_do_the_same_maths(mode, guarded, step_losses):
    other = mlp.Jaxdl(mode, (8, 4, 3), 4, guarded)
    np.testing.assert_allclose(other.facts["first_losses"], step_losses, rtol=1e-5)
    assert len(step_losses) == training.N_LOSSES
    assert other.round(mlp.STEPS_PER_CALL) > 0
    assert int(other.state.step) == other.done


def test_pytorch_does_the_same_maths(step_losses):
    pytest.importorskip("torch")
    theirs = mlp.Torch(is_compiled=False, sizes=(8, 4, 3), batch_size=4)
    np.testing.assert_allclose(theirs.facts["first_losses"], step_losses, rtol=1e-5)


def test_the_step_written_by_hand_does_the_same_maths(step_losses):
    with jax.numpy_rank_promotion("allow"):
        by_hand = bare_jax.Bare("benchmarks.mlp:Jaxdl", "mlp", {"sizes": (8, 4, 3), "batch_size": 4})
        np.testing.assert_allclose(by_hand.facts["first_losses"], step_losses, rtol=1e-5)


def test_fit_is_held_between_rounds_and_does_the_same_maths_as_the_bare_loop(tmp_path):
    work = {"sizes": [8, 4, 3], "batch_size": 4, "steps": 2 * loop_overhead.LOG_EVERY}
    resident = {"is_saving": False, "is_resident": True, "steps_per_call": 50}
    competitors = [
        Competitor("bare", "benchmarks.loop_overhead:Bare", work),
        Competitor("fit", "benchmarks.loop_overhead:Fit", {**work, "directory": str(tmp_path / "saving")}),
        Competitor(
            "resident", "benchmarks.loop_overhead:Fit", {**work, "directory": str(tmp_path / "not"), **resident}
        ),
    ]
    for name in ("saving", "not"):
        (tmp_path / name).mkdir()
    results = measure(competitors, Settings(rounds=2))
    assert [result.failure for result in results] == [None] * 3
    check_same_losses(results, 1e-5)
    (folder,) = (tmp_path / "saving").iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [50, 100, 150, 200, 250, 300]
    assert {"metrics.csv", "tensorboard", "checkpoints"} <= {path.name for path in folder.iterdir()}
    # A round begins with the checkpoint of the round before: after two rounds there are two, and no third.
    # On a busy machine the second may still be under way, with a suffix, when its process ends.
    assert {int(path.name.split(".")[0]) for path in (folder / "checkpoints").iterdir()} == {100, 200}


@pytest.mark.parametrize("is_idiomatic", [True, False])
def test_the_loops_of_pytorch_do_the_same_maths(is_idiomatic):
    torch = pytest.importorskip("torch")
    n_threads = torch.get_num_threads()
    try:
        theirs = tiny_loop.Torch((8, 4, 3), 4, is_idiomatic)
        assert theirs.round(steps=60) > 0
    finally:
        torch.set_num_threads(n_threads)
    ours = loop_overhead.Bare((8, 4, 3), 4, steps=1)
    np.testing.assert_allclose(theirs.facts["first_losses"], ours.facts["first_losses"], rtol=1e-5)


def test_the_tiny_mlp_is_judged_against_both_loops():
    taken = {tiny_loop.FIT: 4.0, tiny_loop.REPEATED: 1.0, tiny_loop.IDIOMATIC: 6.0, tiny_loop.BEST: 3.0}
    results = [Result(name, (seconds,), {"first_losses": [2.0]}) for name, seconds in taken.items()]
    made = tiny_loop.to_table([*results, Result(tiny_loop.COMPILED, failure="no compiler")])
    assert made.rows[1] == [tiny_loop.REPEATED, "1.00 s (1.00 .. 1.00)", "3.00 (3.00 .. 3.00)", "6.00 (6.00 .. 6.00)"]
    assert made.notes[0].endswith("floor 2.0, aim 3.2: above the floor (3.00).")
    assert made.notes[1].endswith("floor 4.0, aim 6.0: aim reached (6.00).")


def test_a_failure_inside_fit_reaches_the_harness(tmp_path):
    work = {"sizes": [8, 4, 3], "batch_size": 4, "steps": 0, "directory": str(tmp_path)}
    (result,) = measure([Competitor("fit", "benchmarks.loop_overhead:Fit", work)], Settings(rounds=1))
    assert result.failure is not None
    assert result.failure.startswith("JaxdlError")


def test_verdicts():
    best = Result("PyTorch eager", (3.0, 3.0, 3.0))
    ours = [Result("a", (2.0, 2.0, 2.0)), Result("b", (2.4, 2.4, 2.4)), Result("c", (3.0, 3.0, 3.0))]
    text = training.verdict(ours, best, training.Aim(1.2, 1.45))
    assert "a: aim reached (1.50)" in text
    assert "b: above the floor (1.25)" in text
    assert "c: below the floor (1.00)" in text
    assert "not judged" in training.verdict(ours, Result("PyTorch eager", failure="no"), training.Aim(1.0, 2.0))
    assert loop_overhead.verdict("5 ms", 0.005, 0.98).endswith("reached.")
    assert loop_overhead.verdict("5 ms", 0.005, 0.979).endswith("missed.")
    assert loop_overhead.verdict("1 ms", 0.001, 0.5).endswith("without an aim.")


@pytest.mark.parametrize("cache", ["none", "cold", "warm"])
def test_fresh_processes_and_their_caches(cache, tmp_path):
    code = "import os, sys; print(len(os.listdir(sys.argv[-1]))); open(sys.argv[-1] + '/x', 'w')"
    ran = start_up.Fresh(["-c", "print(0.5)"] if cache == "none" else ["-c", code], str(tmp_path), cache, True)
    assert ran.round() == {"none": 0.5, "cold": 0.0, "warm": 1.0}[cache]


def test_a_warm_start_is_judged_against_both_forms_of_pytorch():
    seconds = (3.0, 1.5, 2.4, 6.0)
    made = start_up._steps_table([Result(name, (taken,)) for name, taken in zip("abcd", seconds, strict=True)])
    assert made.notes == [
        "b, against c: floor 1.2, aim 1.8: above the floor (1.60).",
        "b, against d: floor 2.0, aim 3.0: aim reached (4.00).",
    ]


def test_a_fresh_process_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="ended with 3"):
        start_up.Fresh(["-c", "raise SystemExit(3)"], str(tmp_path))
    with pytest.raises(RuntimeError, match="No module named 'nothing'"):
        start_up.Fresh(["-c", "import nothing"], str(tmp_path))


def test_run_writes_what_it_prints_and_fails_where_a_benchmark_does(tmp_path, monkeypatch, capsys):
    def works(settings):
        return [Table("Works", ["", "time"], [["a", "1 s"]], results=[Result("a", (1.0,))])]

    def fails(settings):
        raise BenchmarkError("torch does other maths")

    monkeypatch.setattr(run, "WORKLOADS", {"works": works, "fails": fails})
    monkeypatch.setattr(run.machine, "describe", lambda: {"cpu": "a box"})
    files = ["--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md")]
    assert run.main([*files, "--rounds", "2", "--quick"]) == 1
    printed = capsys.readouterr().out
    assert (tmp_path / "out.md").read_text() in printed
    assert "- cpu: a box" in printed
    assert "mean little" in printed
    assert "torch does other maths" in printed
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["workloads"]["works"][0]["results"][0]["seconds"] == [1.0]
    assert run.main(["works"]) == 0


@pytest.mark.parametrize("side", ["Jaxdl", "Orbax", "Torch"])
def test_checkpoints_are_read_back_and_only_ours_notices_a_flipped_byte(side, tmp_path):
    if side == "Torch":
        pytest.importorskip("torch")
    saves = getattr(checkpoint, side)(str(tmp_path), 40_000, leaf=(50, 100))
    assert saves.facts["bytes"] == 40_000
    assert saves.facts["flipped_byte"] in {"refused"} if side == "Jaxdl" else {"refused", "not noticed", "harmless"}
    figures = saves.round()
    assert 0 < figures["stall_s"] <= figures["seconds"]
    assert figures["restore_s"] > 0
    assert [path.name for path in saves.directory.iterdir()] == []


def test_a_checkpoint_that_takes_a_flipped_byte_for_sound_is_an_error():
    figures = {"seconds": 2.0, "stall_s": 0.5, "restore_s": 1.0}
    facts = {"bytes": 10**8, "flipped_byte": "not noticed"}
    theirs = Result(checkpoint.TORCH, (2.0,), facts, rounds=(figures,))
    one = "500 ms (500 .. 500)", "2.00 s (2.00 .. 2.00)", "50", "1.00 s (1.00 .. 1.00)", "100", "not noticed"
    assert checkpoint.to_row("a", theirs) == ["a", *one]
    with pytest.raises(BenchmarkError, match="flipped byte was not noticed"):
        checkpoint.to_row("a", Result(checkpoint.OURS, (2.0,), facts, rounds=(figures,)))


@pytest.mark.parametrize("workload", input_pipeline.WORKLOADS)
def test_all_loaders_read_the_same_rows(workload):
    source, _, is_augmented, _ = input_pipeline.WORKLOADS[workload]
    results = []
    for name, (side, options) in input_pipeline.SIDES.items():
        if side == "Torch" and (options["n_workers"] or not find_spec("torch")):
            continue  # workers are processes: `make bench` has them
        reads = getattr(input_pipeline, side)(source, 2 * input_pipeline.BATCH_SIZE, is_augmented, **options)
        figures = reads.round(batches=1)
        assert figures["seconds"] > 0
        assert figures["cpu_s"] > 0
        results.append(Result(name, (1.0,), reads.facts, rounds=(figures,)))
    input_pipeline.check_same_rows(results)
    assert len(results) >= 3
    assert len(input_pipeline.to_row("a", results[0])) == 4
    with pytest.raises(BenchmarkError, match="read other rows"):
        input_pipeline.check_same_rows([*results, Result("other", (1.0,), {"checksum": 1})])


def test_a_round_can_have_several_figures(tmp_path):
    rows = [Competitor("a", "test_benchmarks:Figures", environment=HERE)]
    (result,) = measure(rows, Settings(rounds=2))
    assert result.seconds == (1.0, 2.0)
    assert result.figures("stall_s") == [0.5, 1.0]


@pytest.mark.parametrize("arguments", [["nothing"], ["mlp", "--rounds", "0"]])
def test_run_refuses_what_it_does_not_know(arguments, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert "error" in capsys.readouterr().err


def test_without_pytorch_the_table_says_so_and_holds_the_rest():
    ours = (mlp.STEPS, mlp.GUARDED, mlp.REPEAT, mlp.RESIDENT)
    results = [Result(name, (0.001,), {"first_losses": [2.0]}) for name in ours]
    results += [Result(name, failure="no torch") for name in (training.EAGER, training.COMPILED)]
    results.append(Result(training.BARE, (0.002,), {"first_losses": [2.0]}))
    results.append(Result(training.PEAK, (1e-12,)))
    host = [Result(name, (1e-4,)) for name in (mlp.HOST_STEPS, mlp.HOST_REPEAT)]
    text = mlp.to_table(results, *host).to_markdown()
    assert text.count("**not run** (no torch)") == 2
    # 2 * 128 * (3 * 668672 - 401408) operations in 1 ms
    assert f"| {mlp.STEPS} | 1.00 ms (1.00 .. 1.00) | - | 411 | 41 % |" in text
    assert "Peak: 1000 GFLOP/s" in text
    assert "not judged" in text
    assert f"written by hand in bare JAX: {mlp.STEPS} 2.00 (2.00 .. 2.00), " in text
