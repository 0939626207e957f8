"""Plans: what is counted against closed forms, what is refused before it is compiled, and what a command prints."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from experiments import (
    classify_images,
    classify_text,
    dates,
    finetune_text,
    images,
    language_model,
    masked_language_model,
    regress_table,
    sequence_to_sequence,
    tag_tokens,
)
from jaxdl import losses
from jaxdl.__main__ import main
from jaxdl.config import parse
from jaxdl.data.text import ByteTokenizer, Documents, encode_rows, encode_tags, mask_tokens
from jaxdl.errors import JaxdlError
from jaxdl.losses import LossOut
from jaxdl.models.bert import Bert, bert_block
from jaxdl.models.gpt2 import GPT2, gpt2_block
from jaxdl.models.language import make_language_loss_fn
from jaxdl.parallel import Split, make_mesh, zero
from jaxdl.plan import (
    NoSketch,
    Remedy,
    Sketch,
    TopologyError,
    array,
    child,
    collectives,
    command,
    count_flops,
    parse_topology,
    program,
    roofline,
    step,
    text,
    topology,
)
from jaxdl.plan.flops import tracing_for, without_remat
from jaxdl.pretrained import save

pytestmark = pytest.mark.optimized

ROOT = Path(__file__).parents[1]
DIGITS = f"--config={ROOT / 'configs' / 'digits_cnn.py'}"
SMALL = [f"--config={ROOT / 'configs' / 'digits_mlp.py'}", "--config.model.widths=32"]
GPT_WORDS = [
    f"--config={ROOT / 'configs' / 'python_gpt.py'}",
    *("--config.model.n_layers=1", "--config.model.layout=scanned", "--config.model.width=32"),
    *("--config.tokenizer.vocab_size=300", "--config.data.length=64", "--config.new_tokens=5"),
]

# ---- operations ----


def gpt(layout="unrolled", remat="none"):
    block = gpt2_block(width=32, n_heads=4)
    model = GPT2(block, n_layers=3, vocab_size=128, n_positions=16, layout=layout, remat=remat)
    tokens = array((4, 16), "int32")

    def init(key):
        return model.init(key, jnp.zeros((1, 16), jnp.int32))["params"], {}

    loss_fn = make_language_loss_fn(model, train=True)
    return Sketch(init, loss_fn, optax.adamw(1e-3), {"tokens": tokens, "targets": tokens})


def matrices(params):
    """The entries of all matrices that a token is multiplied with; the table is also the head."""
    leaves = {"/".join(k.key for k in keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}
    return sum(leaf.size for path, leaf in leaves.items() if path.endswith("kernel") or "token/embedding" in path)


@pytest.mark.parametrize("layout", ["unrolled", "scanned"])
def test_operations_of_a_gpt_are_those_of_the_formula(layout):
    """6 N + 12 L d T a token (Chowdhery et al. 2022, appendix B), N the matrices, attention as if not causal."""
    sketch = gpt(layout)
    with tracing_for("tpu"):
        state = step.abstract_state(sketch)
        found = count_flops(step.make_step(sketch), state, dict(sketch.batch))
    assert found == {"float32": 4 * 16 * (6 * matrices(state.params) + 12 * 3 * 32 * 16)}


def test_remat_is_work_of_the_program_and_none_of_the_model():
    plain, twice = gpt("scanned"), gpt("scanned", "full")
    counted = []
    for sketch in (plain, twice):
        placed = step.place(sketch, jax.devices()[:1])
        where = parse_topology("v5e:1x1")
        counted.append(step.count(sketch, where, step.trace(where, placed)))
    assert counted[0]["model"] == counted[1]["model"] == counted[0]["program"]["float32"]
    layers = 3 * (12 * 32 * 32) + 3 * 2 * 32 * 16  # each layer's products once more, but the last of a branch
    extra = counted[1]["program"]["float32"] - counted[1]["model"]
    assert 0.5 < extra / (4 * 16 * 2 * layers) <= 1.0


def test_operations_of_products_and_convolutions_are_those_that_xla_counts():
    x, kernel = array((2, 9, 9, 3), "float32"), array((3, 3, 3, 5), "float32")

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    theirs = jax.jit(convolve).lower(x, kernel).compile().cost_analysis()["flops"]
    assert count_flops(convolve, x, kernel) == {"float32": 2 * 2 * 4 * 4 * 5 * 27}
    assert theirs == pytest.approx(2 * 2 * 4 * 4 * 5 * 27, rel=0.02)
    a, b = array((3, 4, 5), "bfloat16"), array((3, 5, 6), "bfloat16")
    assert count_flops(jnp.matmul, a, b) == {"bfloat16": 2 * 3 * 4 * 5 * 6}


def test_branches_count_as_the_dearest_and_loops_as_often_as_they_run():
    x = array((4, 4), "float32")
    once = 2 * 4 * 4 * 4

    def choose(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert count_flops(choose, x).total() == 2 * once

    def loop(x):
        return jax.lax.fori_loop(0, 7, lambda i, x: x @ x, x)

    assert count_flops(loop, x).total() == 7 * once

    def spread(x):
        inner = jax.shard_map(lambda x: x @ x.T, mesh=make_mesh(data=4), in_specs=P("data"), out_specs=P("data"))
        return inner(x)

    assert count_flops(spread, x).total() == 4 * (2 * 1 * 4 * 1)

    @jax.checkpoint
    def layer(x):
        return jnp.tanh(x @ x) @ x

    with without_remat():
        plain = count_flops(jax.grad(lambda x: jnp.tanh(x @ x).sum()), x).total()
    assert count_flops(jax.grad(lambda x: layer(x).sum()), x).total() > plain


# ---- programs ----


def test_collectives_count_as_often_as_they_run():
    mesh = make_mesh(data=4, model=2)

    def body(x, _):
        return jax.lax.psum(x, "data") * 0.5, jax.lax.all_gather(x, "model")

    def fn(x):
        return jax.lax.scan(body, x, length=5)

    out_specs = (P(), P(None, None))
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=P(), out_specs=out_specs, check_vma=False)
    read = program.parse(jax.jit(mapped).lower(array((1024,), "float32")).compile().as_text())
    rows = {(row["kind"], *row["axes"]): row for row in collectives.summary(collectives.collectives(read, mesh.shape))}
    assert rows["all-reduce", "data"]["count"] == 5
    assert rows["all-reduce", "data"]["largest"] == 4096
    assert rows["all-gather", "model"]["count"] == 5
    assert rows["all-gather", "model"]["bytes"] == 5 * 2 * 4096


TPU_TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,128]{1,0:T(8,128)})->f32[]}

%fused (param_0.1: f32[8,128], param_1: s32[]) -> f32[1,128] {
  %param_0.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %constant.9 = s32[] constant(0)
  ROOT %dynamic-slice.1 = f32[1,128]{1,0} dynamic-slice(%param_0.1, %param_1, %constant.9), dynamic_slice_sizes={1,128}
}

%body.1 (arg: (s32[], /*index=5*/f32[8,128])) -> (s32[], f32[8,128]) {
  %arg = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %gte.0 = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %gte.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %fusion.1 = f32[1,128]{1,0} fusion(%gte.1, %gte.0), kind=kLoop, calls=%fused
  %ag = (f32[1,128]{1,0}, f32[4,128]{1,0}) all-gather-start(%fusion.1), channel_id=3, replica_groups=[2,4]<=[4,2]T(1,0)
  %agd = f32[4,128]{1,0} all-gather-done(%ag)
  ROOT %tuple = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%gte.0, %gte.1)
}

%cond.1 (arg.1: (s32[], f32[8,128])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %gte.2 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %constant.6 = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%gte.2, %constant.6), direction=LT
}

ENTRY %main.1_spmd (x: f32[8,128]) -> f32[] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0), sharding={replicated}
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%zero, %x)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%start), condition=%cond.1, body=%body.1
  %cp = f32[8,128]{1,0} collective-permute(%x), channel_id=4, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %ar = f32[8,128]{1,0} all-reduce(%cp), channel_id=5, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%cond.1
  ROOT %sum = f32[] constant(0)
}
"""


@pytest.mark.parametrize(
    ("said", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("model",)),
        ("replica_groups={}", ("data", "model")),
        ("replica_groups=[4,2]<=[8]", ("model",)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data",)),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2] {'axis_1'}, dimensions={0}", ("data",)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ("data",)),
        ("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", ()),
        ("source_target_pairs={{0,2},{2,4},{4,6},{6,0}}", ("data",)),
    ],
)
def test_groups_of_devices_are_axes_of_the_mesh(said, axes):
    assert collectives._axes(f", channel_id=1, {said}, use_global_device_ids=true", {"data": 4, "model": 2}) == axes


def test_the_text_of_a_tpu_is_read():
    read = program.parse(TPU_TEXT)
    assert read.entry == "main.1_spmd"
    found = {
        (one.kind, one.axes, one.times, one.n_bytes) for one in collectives.collectives(read, {"data": 4, "model": 2})
    }
    assert found == {
        ("all-gather", ("data",), 6, 4 * 128 * 4),
        ("collective-permute", ("model",), 1, 4096),
        ("all-reduce", ("data", "model"), 1, 4096),
    }
    # The loop reads one row of the eight each time and writes it: 6 x (512 + 4 + 512), and what is sent.
    sent = 6 * (512 + 2048) + 2 * 2 * 4096
    assert program.traffic(read) == 6 * (512 + 4 + 512) + sent + 6 * (4 + 4 + 1)


@pytest.mark.parametrize("target", ["__cublas$lt$matmul", "another"])
def test_what_cublas_may_scribble_in_is_no_traffic(target):
    read = program.parse(f"""ENTRY %main (a: bf16[4,8], b: bf16[8,16]) -> bf16[4,16] {{
  %a = bf16[4,8]{{1,0}} parameter(0)
  %b = bf16[8,16]{{1,0}} parameter(1)
  %product = (bf16[4,16]{{1,0}}, s8[4194304]{{0}}) custom-call(%a, %b), custom_call_target="{target}"
  ROOT %out = bf16[4,16]{{1,0}} get-tuple-element(%product), index=0
}}""")
    assert program.traffic(read) == 2 * (4 * 8 + 8 * 16 + 4 * 16) + (4194304 if target == "another" else 0)


def test_a_fusion_that_runs_beside_others_counts_once_and_its_slice_alone():
    read = program.parse("""%update (p0: f32[8,4], p1: f32[1,4], p2: s32[]) -> f32[8,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = f32[1,4]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %new = f32[8,4]{1,0} dynamic-update-slice(%p0, %p1, %p2, %p2)
}

ENTRY %main (a: f32[8,4], b: f32[1,4], i: s32[]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[1,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %begun = ((f32[8,4]{1,0}, f32[1,4]{1,0}, s32[]), f32[8,4]{1,0}, u32[]) fusion-start(%a, %b, %i), calls=%update
  ROOT %done = f32[8,4]{1,0} fusion-done(%begun)
}""")
    assert program.traffic(read) == 2 * 16 + 4


def test_layers_in_a_scan_leave_the_rows_of_a_batch_where_they_are():
    """Under FSDP parameters travel, a layer at a time; XLA alone would cut states by features and gather every row."""
    sketch = dataclasses.replace(gpt("scanned", "full"), sharding=lambda state: zero(3, floor_bytes=512))
    tokens = array((64, 16), "int32")
    sketch = dataclasses.replace(sketch, batch={"tokens": tokens, "targets": tokens}, mesh={"data": 8})
    where, placed = parse_topology("cpu:8"), step.place(sketch, jax.devices())
    found = step.compile_step(where, placed, step.trace(where, placed))
    states, layer = 64 * 16 * 32 * 4, 128 * 32 * 4
    sent = {row["kind"]: row["largest"] for row in found["collectives"] if row["kind"] != "all-reduce"}
    assert sent["all-gather"] <= layer < states / 4
    assert max(sent.values()) < states / 4


# ---- topologies ----


@pytest.mark.parametrize(
    ("name", "n", "grid"),
    [
        ("cpu:8", 8, (8,)),
        ("h100", 1, (1,)),
        ("h100:16", 16, (16,)),
        ("v5litepod-256", 256, (16, 16)),
        ("v5e:2x4", 8, (2, 4)),
        ("V6E-16", 16, (4, 4)),
        ("v5p-8", 4, (2, 2, 1)),
        ("v5p:8x8x16", 1024, (8, 8, 16)),
        ("v4-128", 64, (4, 4, 4)),
    ],
)
def test_names_of_topologies(name, n, grid):
    found = parse_topology(name)
    assert (found.n_devices, found.shape) == (n, grid)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h10:8", "there is no topology 'h10:8'; nearest: h100:8"),
        ("v5e", r"'v5e' names no grid; write v5e"),
        ("v5e-7", r"there is no 'v5e-7'; the sizes are v5e-1, v5e-4, v5e-8"),
        ("v5p-12", r"there is no 'v5p-12'; the sizes are v5p-8, v5p-16"),
        ("v5p:4x4", "'v5p:4x4': a topology of v5p is written v5p:AxBxC"),
        ("cpu:0", "'cpu:0' has no devices"),
        ("cpu-8", "'cpu-8': write cpu:8"),
        ("", "there is no topology ''"),
    ],
)
def test_unknown_topologies_are_refused_with_the_nearest(name, said):
    with pytest.raises(TopologyError, match=said):
        parse_topology(name)


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("v5e:2x2", "libtpu", "plan-tpu"), ("h100:1", "jax_cuda12_plugin", "plan-gpu")]
)
def test_a_missing_extra_is_named(name, package, extra, capsys):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    assert main(["plan", DIGITS, f"--topology={name}"]) == 2
    assert f"pip install 'jaxdl[{extra}]'" in capsys.readouterr().err


# ---- what is refused before it is compiled ----


def tiny(**changes):
    def loss_fn(params, extra, batch, rng):
        return LossOut(*losses.squared_error(batch["x"] @ params["kernel"], batch["y"]))

    def init(key):
        return {"kernel": jnp.ones((256, 128))}, {}

    batch = {"x": array((16, 256), "float32"), "y": array((16, 128), "float32")}
    return Sketch(**{"init": init, "loss_fn": loss_fn, "tx": optax.adam(0.1), "batch": batch, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mesh": {"data": 16}}, "the mesh data=16 needs 16 devices and there are 8"),
        ({"mesh": {"data": 4, "model": 2}}, "nothing lies over 'model'"),
        ({"mesh": {"data": 8}, "sharding": lambda s: zero(3, floor_bytes=2**30)}, "cuts nothing"),
        ({"sharding": lambda s: [(".*/kernel", Split("modle")), (".*", None)]}, "names the axis 'modle'; the mesh"),
        (
            {"batch": {"x": array((12, 256), "float32"), "y": array((12, 128), "float32")}},
            "12 rows, which do not",
        ),
        ({"trainable": [("kernl", True), (".*", False)]}, "rule 'kernl' matches nothing; nearest paths: kernel"),
    ],
)
def test_what_does_not_fit_is_refused(changes, said):
    with pytest.raises(JaxdlError, match=said):
        step.place(tiny(**changes), jax.devices())


def test_every_problem_is_in_one_message():
    batch = {"x": array((12, 256), "float32"), "y": array((12, 128), "float32")}
    sharding = [("params/kernel", Split("modle")), (".*", None)]
    with pytest.raises(JaxdlError, match=r"plan: 2 problem") as error:
        step.place(tiny(batch=batch, sharding=lambda s: sharding), jax.devices())
    assert "modle" in str(error.value)
    assert "do not divide" in str(error.value)


# ---- memory ----


def test_what_a_device_holds_is_arithmetic():
    placed = step.place(tiny(sharding=lambda s: zero(3)), jax.devices())
    held, kernel = step.held(tiny(), placed), 256 * 128 * 4 // 8
    assert held["parameters"] == held["gradients"] == kernel
    assert held["optimizer"] == 2 * kernel + 4
    assert held["batch"] == 2 * (256 + 128) * 4
    assert step.left_whole(placed) == []
    assert step.left_whole(step.place(tiny(), jax.devices()), least=1) != []


CASES = {
    "digits CNN": ([DIGITS, "--config.model.features=8,16", "--config.model.dense_width=0"], "cpu:8"),
    "digits MLP, FSDP": ([SMALL[0], "--config.model.widths=512,512", "--config.parallel.sharding=fsdp"], "cpu:8"),
    "digits MLP": (SMALL, "cpu:1"),
    "regression": ([f"--config={ROOT / 'configs' / 'diabetes_mlp.py'}"], "cpu:1"),
    "GPT": (GPT_WORDS, "cpu:1"),
    "digits MLP, microbatches": ([*SMALL, "--config.hardware.microbatches=4"], "cpu:2"),
}


@pytest.mark.parametrize("case", CASES)
def test_groups_add_up_to_the_compilers_peak(case):
    words, name = CASES[case]
    result = child.plan(words, name)
    found = text.groups(result)
    assert min(found.values()) >= 0
    assert sum(found.values()) == pytest.approx(result["compiled"]["peak"], rel=0.05)
    arguments = sum(result["held"][name] for name in ("parameters", "optimizer", "other state", "batch"))
    assert arguments == pytest.approx(result["compiled"]["arguments"], rel=0.05)  # arithmetic against the compiler
    assert text.fits(result)
    said = text.page(result)
    assert "It fits: " in said
    assert "the compiler's peak" in said
    json.dumps(result)
    if case == "digits MLP, FSDP":
        assert {"all-gather", "reduce-scatter", "all-reduce"} & {
            row["kind"] for row in result["compiled"]["collectives"]
        }
        assert any(row["sharding"] == "-, data" or row["sharding"] == "data, -" for row in result["parameters"])


def test_the_groups_of_a_refused_step_are_what_it_would_hold():
    held = {"parameters": 2**30, "optimizer": 2**31, "other state": 4, "batch": 8, "gradients": 2**30}
    refused = step._refused(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 26.47G of 15.75G hbm. Exceeded by 10.72G."
    )
    assert refused["needed"] == int(26.47 * 2**30)
    shown = text._memory({"held": held, "compiled": refused})
    assert "2.00 GiB" in shown
    assert "Used 26.47G of 15.75G" in shown


# ---- the bound of time ----


def test_the_bound_is_the_slower_of_products_and_memory():
    counted = {"model": 4 * 197e12, "program": {"bfloat16": 4 * 2 * 197e12}}
    told = roofline.bound(parse_topology("v5e:2x2"), counted, int(819e9 // 2))
    assert told["step_s"] == told["compute_s"] == pytest.approx(2.0)
    assert told["mfu"] == pytest.approx(0.5)
    assert told["memory_s"] == pytest.approx(0.5)
    assert roofline.bound(parse_topology("cpu:1"), counted, 1) is None


# ---- the command ----


def test_the_command_says_all_and_fits(tmp_path, capsys):
    """In the process of its own that it compiles in."""
    target = tmp_path / "plan.json"
    words = ["plan", *SMALL, "--config.optimizer.learning_rate", "3e-4", "--topology", "cpu:2", f"--json={target}"]
    assert main(words) == 0
    out = capsys.readouterr().out
    for said in (
        "digits_mlp.py on cpu:2: 2 x this machine's CPU, mesh data=2",
        "optimizer.learning_rate  0.0003",
        "command line",
        "data.batch_size",
        "1,442 training rows",
        "head/kernel",
        "sum of the groups",
        "devices send each other",
        "all-reduce",
        "no bound of the time of a step",
        "It fits: ",
    ):
        assert said in out
    found = json.loads(target.read_text())
    assert {row["source"] for row in found["config"]} >= {"default", "command line"}
    assert found["rss"] > 2**20
    assert found["flops"]["model"] > 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--topology=cpu:8", "--config.data.batch_size=30"], "30 rows, which do not divide over the 8 devices"),
        (["--topology=cpu:2", "--config.parallel.mesh=data=4"], "the mesh data=4 needs 4 devices and there are 2"),
        (["--topology=cqu:2"], "there is no topology 'cqu:2'; nearest: cpu:"),
        (["--config.optimizer.lerning_rate=1", "--config.seed=-1"], "optimizer.learning_rate"),
    ],
)
def test_the_command_refuses_with_2_and_one_message(flags, said, capsys):
    assert main(["plan", *SMALL, *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert "Traceback" not in err


def test_a_compile_that_takes_too_long_is_ended(capsys):
    assert main(["plan", *SMALL, "--time-limit=0.05"]) == 1
    assert "were not enough; give more with --time-limit" in capsys.readouterr().err


def test_what_does_not_fit_gets_remedies_ranked_by_what_they_save(monkeypatch, capsys):
    def small(self):
        return 70_000

    monkeypatch.setattr(topology.Topology, "memory", property(small))
    monkeypatch.setattr(command, "compile_apart", lambda words, where, seconds: child.plan(words, where.name))
    monkeypatch.setattr("experiments.sketching._remedies", two_remedies)
    assert main(["plan", *SMALL]) == 1
    out = capsys.readouterr().out
    assert "It does not fit: " in out
    table = [line.split() for line in out[out.index("remedy ") :].splitlines()[2:4]]
    found = {line[-1]: line[-2] for line in table}
    assert found == {"--config.data.batch_size=16": "yes", "--config.optimizer.name=lion": "no"}
    assert table[0][-1] == "--config.data.batch_size=16"  # saves most
    assert out.endswith("It fits with --config.data.batch_size=16\n")


def two_remedies(config):
    yield Remedy("lion", ("--config.optimizer.name=lion",))
    yield Remedy("fewer rows", ("--config.data.batch_size=16",))


# ---- what experiments say of themselves ----


def shapes(batch):
    return {name: (tuple(np.shape(x)), str(np.asarray(x).dtype)) for name, x in batch.items()}


def said(sketch):
    return {name: (leaf.shape, str(leaf.dtype)) for name, leaf in sketch.batch.items()}


def config_of(module, name, *flags):
    return parse(module.Config, [f"--config={ROOT / 'configs' / name}", *flags]).config


@pytest.mark.parametrize("flags", [(), ("--config.data.mixup_alpha=0.2", "--config.data.validation=0.1")])
def test_pictures_are_as_the_sketch_says(flags):
    config = config_of(classify_images, "digits_cnn.py", *flags)
    pipeline = images.load(config.data, config.seed).train
    sketch = config.sketch()
    assert said(sketch) == shapes(pipeline[0])
    assert sketch.n_rows == pipeline.n_rows


def test_tables_and_dates_are_as_the_sketch_says():
    config = config_of(regress_table, "diabetes_mlp.py")
    pipeline, _, _ = regress_table.load(config.data, config.seed)
    assert (said(config.sketch()), config.sketch().n_rows) == (shapes(pipeline[0]), pipeline.n_rows)
    config = config_of(sequence_to_sequence, "dates_lstm.py", "--config.data.n_train=64", "--config.optimizer.warmup=0")
    rows = dates.load(config.data, config.seed)["train"]
    batch = {name: x[: config.data.batch_size] for name, x in rows.arrays.items()}
    assert said(config.sketch()) == shapes(batch)
    assert config.sketch().n_rows == 64


def test_texts_are_as_the_sketch_says():
    documents = Documents({"text": ["def f(x):\n    return x\n" * 400], "label": [1]})
    flags = ("--config.tokenizer.kind=bytes", "--config.data.batch_size=4")
    config = config_of(language_model, "python_gpt.py", *flags)
    rows = language_model.windows(documents, ByteTokenizer(), config.data.length)
    assert said(config.sketch()) == shapes({name: x[:4] for name, x in rows.arrays.items()})
    config = config_of(masked_language_model, "python_bert.py", *flags)
    rows = masked_language_model.windows(documents, ByteTokenizer(), config.data.length)
    batch = mask_tokens(ByteTokenizer())({"tokens": rows.arrays["tokens"][:4]}, np.random.default_rng(0))
    assert said(config.sketch()) == shapes(batch)
    config = config_of(classify_text, "python_packages.py", "--config.data.batch_size=1", flags[0])
    assert said(config.sketch()) == shapes(encode_rows(documents, ByteTokenizer(), config.data.length).arrays)
    config = config_of(tag_tokens, "python_tags.py", "--config.data.batch_size=1", flags[0])
    words = Documents({"text": ["a b"], "words": [("a", "b")], "tags": [("name", "name")]})
    rows = encode_tags(words, ByteTokenizer(), config.data.length, tag_names=tag_tokens.PYTHON_TAGS)
    assert said(config.sketch()) == shapes(rows.arrays)


@pytest.mark.parametrize("name", ["minilm_lora", "minilm_head"])
def test_a_plan_of_fine_tuning_knows_what_moves_and_where_it_is_from(name, tmp_path):
    block = bert_block(16, 2, 32)
    model = Bert(block, n_layers=6, vocab_size=64, n_positions=32, has_pooler=True)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    save(tmp_path / "bert", model, params)
    flags = [f"--config.pretrained={tmp_path / 'bert'}", f"--config.corpus.path={tmp_path}"]
    sketch = config_of(finetune_text, f"{name}.py", *flags, "--config.data.length=8").sketch()
    placed = step.place(sketch, jax.devices()[:1])
    rows = {row["path"]: row for row in step.parameter_table(sketch, placed)}
    moving = {path for path, row in rows.items() if row["trainable"]}
    pooler = {"pooler/kernel", "pooler/bias"} if name == "minilm_head" else set()  # pretrained, and part of a head
    assert moving == pooler | {path for path, row in rows.items() if row["source"] == "seed"}
    assert {"head/kernel", "head/bias"} <= moving
    assert any(path.startswith("adapters/") for path in moving) == (name == "minilm_lora")
    assert rows["pooler/kernel"]["source"] == str(tmp_path / "bert")
    assert "fresh 2: head/bias, head/kernel" in sketch.notes[0]
    n = sum(rows[path]["shape"][0] * (rows[path]["shape"] + (1,))[1] for path in moving)
    assert step.held(sketch, placed)["gradients"] == 4 * n


def test_a_configuration_that_cannot_say_its_shapes_says_why():
    config = config_of(classify_images, "digits_cnn.py")
    unknown = dataclasses.replace(config, data=images.Images(name="tfds", tfds_name="mnist"))
    with pytest.raises(NoSketch, match="known only once it is read"):
        unknown.sketch()


@pytest.mark.parametrize("name", ["plan_gpt2", "plan_llama8b"])
def test_the_shipped_plans_have_the_sizes_that_they_say(name):
    config = config_of(language_model, f"{name}.py")
    params = step.abstract_state(config.sketch()).params
    n = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert n == pytest.approx({"plan_gpt2": 124.4e6, "plan_llama8b": 8.03e9}[name], rel=0.01)


# ---- compilers for what is not here ----


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "h100:1", "h100:4"])
def test_a_step_compiles_for_an_accelerator_that_is_not_here(name, tmp_path):
    if told := topology.missing(parse_topology(name)):
        pytest.skip(told)
    target = tmp_path / "plan.json"
    words = [*SMALL, "--config.hardware.compute_dtype=bfloat16", f"--topology={name}", f"--json={target}"]
    done = subprocess.run([sys.executable, "-m", "jaxdl", "plan", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(target.read_text())
    assert found["compiled"]["peak"] > 0
    assert (found["compiled"]["collectives"] == []) == (name == "h100:1")
    assert found["roofline"]["step_s"] > 0
