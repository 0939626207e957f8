"""Profiles: times of made-up traces by hand, operations of programs against another count, what a command prints."""

import json
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

from benchmarks import mlp, profile
from benchmarks.network import flops_per_step
from benchmarks.training import Jaxdl as Training
from jaxdl import JaxdlError, create_state, guard, make_optimizer, make_train_step
from jaxdl.__main__ import main
from jaxdl.data import ArraySource, Pipeline
from jaxdl.loop import fit
from jaxdl.models import MLP
from jaxdl.models.apply import init_model, make_loss_fn
from jaxdl.objectives import classification
from jaxdl.parallel import make_mesh
from jaxdl.plan import count_flops, program
from jaxdl.profile import Peaks, ProfileError, command, peaks, profile_step, recording, result, trace
from jaxdl.profile.names import part_of, short_name
from jaxdl.profile.operations import kind_of, read_operations
from jaxdl.profile.timeline import HOST, IDLE, INPUT_WAIT, shares
from jaxdl.profile.trace import Event, Key, Trace

pytestmark = pytest.mark.optimized

ROOT = Path(__file__).parents[1]
DIGITS = f"--config={ROOT / 'configs' / 'digits_cnn.py'}"
PEAKS = Peaks({"float32": 1e12}, 1e11, "made up")


# ---- whose time it was ----


def event(name, start, end, lane="a", *, device=0, run=None, is_task=False):
    return Event(device, lane, start, end, Key("m", name), run, is_task)


def divide(events, waits=(), n_calls=1, containers=()):
    return shares(Trace(events, list(waits)), n_calls, lambda key: key.name in containers)


def times(made):
    return {key.name: time for key, time in made.operations.items() if time}


def test_an_event_has_only_the_time_that_no_event_inside_of_it_has():
    first = [event("loop", 0, 60), event("dot", 10, 40), event("add", 20, 25), event("tanh", 50, 55)]
    made = divide([*first, event("loop", 100, 160)])
    assert times(made) == {"loop": 10 + 10 + 5, "dot": 25, "add": 5, "tanh": 5}
    assert made.idle == {HOST: 40, INPUT_WAIT: 0, IDLE: 0}
    assert made.total == 100
    assert made.calls == [100]


def test_a_kernel_that_begins_before_the_last_one_has_ended_ends_it():
    made = divide([event("dot", 0, 40), event("add", 30, 70), event("tanh", 65, 100), event("dot", 100, 140)])
    assert times(made) == {"dot": 30, "add": 35, "tanh": 35}
    assert sum(made.idle.values()) == 0


def test_operations_at_the_same_moment_share_it_and_a_loop_counts_where_nothing_inside_runs():
    events = [event("loop", 0, 90), event("dot", 10, 50, "b"), event("add", 30, 60, "c"), event("loop", 100, 190)]
    made = divide(events, containers=("loop",))
    assert times(made) == {"loop": 10 + 30, "dot": 20 + 10, "add": 10 + 10}
    assert made.total == 100


def test_the_time_of_a_helping_thread_is_no_call():
    events = [event("dot", 0, 10), event("dot", 5, 30, "b", is_task=True), event("add", 30, 40), event("dot", 50, 60)]
    made = divide(events)
    assert times(made) == {"dot": 30, "add": 10}
    assert {key.name: n for key, n in made.counts.items()} == {"dot": 1, "add": 1}


def test_gaps_are_the_programs_own_the_hosts_or_a_wait_for_input():
    calls = [
        found
        for run, at in enumerate((0, 100, 200))
        for found in (event("dot", at, at + 20, run=run), event("add", at + 30, at + 50, run=run))
    ]
    made = divide(calls, waits=[(40, 70), (160, 165), (190, 220)], n_calls=2)
    assert times(made) == {"dot": 40, "add": 40}
    assert made.idle == {IDLE: 20, INPUT_WAIT: 20 + 5 + 10, HOST: 30 + 35}
    assert made.total == 200


def test_without_numbers_of_runs_an_operation_that_is_there_once_a_call_tells_them_apart():
    dots = [event("dot", at + 5 * i, at + 5 * i + 3) for at in (0, 20) for i in range(3)]
    made = divide([*dots, event("end", 18, 19), event("end", 38, 39)])
    assert made.calls == [20]
    assert times(made) == {"dot": 9, "end": 1}


def test_times_are_the_mean_of_the_devices():
    events = [event("dot", at, at + n, device=device) for device, n in ((0, 10), (1, 30)) for at in (0, 100)]
    made = divide(events)
    assert times(made) == {"dot": 20}
    assert made.n_devices == 2
    assert made.total == 100
    assert dict(made.counts) == {Key("m", "dot"): 1}


def test_calls_that_were_disturbed_are_left_out_on_all_devices():
    starts, lengths = (0, 100, 200, 280, 600), {0: (20, 30, 70, 10, 1), 1: (20, 90, 70, 200, 1)}
    events = [
        event("dot", at, at + n, device=device)
        for device in lengths
        for at, n in zip(starts, lengths[device], strict=True)
    ]
    made = divide(events, n_calls=4)
    assert made.usual == {0, 1}
    assert made.calls == [100, 100, 80, 320] * 2
    assert times(made) == {"dot": (20 + 30 + 20 + 90) / 2}
    assert dict(made.counts) == {Key("m", "dot"): 2}
    assert made.total == 100 + 100


def test_a_trace_that_shows_too_little_is_refused():
    with pytest.raises(ProfileError, match=r"no events of operations.*XLA_FLAGS.*CUPTI"):
        divide([])
    with pytest.raises(ProfileError, match="no operation is in the trace once for each of 3 calls"):
        divide([event("dot", 0, 1), event("dot", 2, 3)], n_calls=2)


# ---- what the profiler writes ----


def space(planes):
    """Planes as `jax.profiler` has them: {plane: {line: [(name, start, end, stats)]}}."""
    names: dict[str, int] = {}

    def number(name):
        return names.setdefault(name, len(names) + 1)

    def stat(name, value):
        kind = "str_value" if isinstance(value, str) else "int64_value"
        return f"stats {{ metadata_id: {number(name)} {kind}: {json.dumps(value)} }}"

    def written(events):
        for name, start, end, stats in events:
            inside = " ".join(stat(*pair) for pair in stats.items())
            yield (f"events {{ metadata_id: {number(name)} offset_ps: {start * 1000} "
                   f"duration_ps: {(end - start) * 1000} {inside} }}")  # fmt: skip

    made = []
    for plane, lines in planes.items():
        body = " ".join(f'lines {{ name: "{line}" {" ".join(written(events))} }}' for line, events in lines.items())
        made.append((plane, body))
    known = " ".join(
        f'{kind} {{ key: {i} value {{ id: {i} name: "{name}" }} }}'
        for name, i in names.items()
        for kind in ("event_metadata", "stat_metadata")
    )
    text = " ".join(f'planes {{ name: "{plane}" {body} {known} }}' for plane, body in made)
    return ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(text)).planes


def test_a_gpu_has_a_line_a_stream_and_copies_beside_kernels():
    planes = space(
        {
            "/device:GPU:1": {
                "Stream #7(Compute)": [
                    ("fusion_kernel", 10, 30, {"hlo_op": "loop_fusion.3", "hlo_module": "jit_step(7)"}),
                ],
                "Stream #9(MemcpyH2D)": [("MemcpyH2D", 0, 5, {})],
                "XLA Modules": [("jit_step(7)", 0, 30, {})],
            },
            "/host:CPU": {"python": [(trace.INPUT, 1, 4, {}), ("other", 1, 2, {})]},
        }
    )
    found = trace.from_planes(planes)
    assert found.waits == [(1, 4)]
    assert [(e.device, e.lane, e.start, e.end, e.key) for e in found.events] == [
        (1, "Stream #9(MemcpyH2D)", 0, 5, Key("", "MemcpyH2D")),
        (1, "Stream #7(Compute)", 10, 30, Key("jit_step", "loop_fusion.3")),
    ]


def test_a_gpu_runs_several_kernels_for_one_operation():
    own = {"hlo_module": "jit_step"}
    kernels = [("memset", 0, 2), ("gemm", 2, 20), ("gemm", 30, 50)]
    names = ["custom-call.1", "custom-call.1", "custom-call.2"]
    line = [(*kernel, {**own, "hlo_op": name}) for kernel, name in zip(kernels, names, strict=True)]
    copies = [("MemcpyD2H", 60, 61, {}), ("MemcpyD2H", 61, 62, {})]
    found = trace.from_planes(space({"/device:GPU:0": {"Stream #7": [*line, *copies]}})).events
    assert [(e.key.name, e.is_task) for e in found[:3]] == [(names[0], False), (names[1], True), (names[2], False)]
    assert not any(e.is_task for e in found[3:])


def test_a_tpu_has_a_line_of_operations():
    lines = {"Steps": [("0", 0, 9, {})], "XLA Ops": [("%fusion.2 = f32[8] fusion(%x)", 2, 6, {"run_id": 5})]}
    [found] = trace.from_planes(space({"/device:TPU:0": lines})).events
    assert (found.key, found.run) == (Key("", "fusion.2"), 5)


def test_on_a_cpu_a_helping_thread_works_for_the_operation_that_asked_for_it():
    def op(name, start, end):
        return (name, start, end, {"hlo_op": name, "hlo_module": "jit_step", "run_id": 3, "device_ordinal": 2})

    planes = space(
        {
            "/host:CPU": {
                "worker/1": [
                    ("ThunkExecutor::Execute", 0, 90, {}),
                    op("dot.1", 10, 40),
                    ("ThreadpoolListener::Record", 15, 15, {"_p": 8}),
                    ("ThreadpoolListener::Record", 60, 60, {"_p": 10}),  # of no operation
                    ("end: dot.1", 39, 40, {}),
                ],
                "worker/2": [
                    ("ThreadpoolListener::StartRegion", 20, 20, {"_c": 8}),
                    ("ThreadpoolListener::Record", 25, 25, {"_p": 9}),  # a task of the task
                    ("ThreadpoolListener::StopRegion", 30, 30, {}),
                    ("ThreadpoolListener::StartRegion", 32, 32, {"_c": 9}),
                    ("ThreadpoolListener::StopRegion", 38, 38, {}),
                    ("ThreadpoolListener::StartRegion", 62, 62, {"_c": 10}),
                    op("add.2", 64, 70),
                    ("ThreadpoolListener::StopRegion", 80, 80, {}),
                ],
            }
        }
    )
    found = trace.from_planes(planes).events
    assert [(e.lane, e.key.name, e.start, e.end, e.is_task) for e in found] == [
        ("worker/1", "dot.1", 10, 40, False),
        ("worker/2", "dot.1", 20, 30, True),
        ("worker/2", "dot.1", 32, 38, True),
        ("worker/2", "add.2", 64, 70, False),
    ]
    assert {(e.device, e.run) for e in found} == {(2, 3)}


def test_a_folder_without_a_trace_is_refused(tmp_path):
    with pytest.raises(ProfileError, match="there is no trace"):
        trace.read(tmp_path)


# ---- what an operation does ----


@pytest.mark.parametrize(
    ("opcodes", "kind"),
    [
        (["parameter", "dot", "reduce"], "products"),
        (["convolution"], "products"),
        (["custom-call __cublas$gemm"], "products"),
        (["custom-call __cudnn$fmhaSoftmax"], "products"),
        (["custom-call TopK"], "other"),
        (["multiply", "reduce", "broadcast"], "reductions"),
        (["all-reduce-start"], "collectives"),
        (["all-gather-done"], "collectives"),
        (["parameter", "constant", "broadcast"], "copies"),
        (["transpose", "bitcast", "convert"], "copies"),
        (["gather"], "copies"),
        (["transpose", "exponential"], "elementwise"),
        (["rng-bit-generator"], "other"),
    ],
)
def test_the_kind_of_a_fusion_is_what_weighs_most_in_it(opcodes, kind):
    assert kind_of(opcodes) == kind


@pytest.mark.parametrize(
    ("seconds", "flops", "n_bytes", "limit"),
    [
        (1e-3, 0.5e9, 0, "compute"),
        (1e-3, 0.49e9, 0, "neither: 49 % of FLOP/s, 0 % of bytes/s"),
        (1e-3, 0, 0.5e8, "memory"),
        (1e-3, 0.6e9, 0.7e8, "memory"),
        (1e-3, None, 1e7, "neither: FLOP/s unknown, 10 % of bytes/s"),
        (1e-3, 0, 1e7, "neither: 10 % of bytes/s"),
        (19e-6, 1e6, 1e3, "launch"),
        (19e-6, 19e6, 0, "compute"),
        (0.0, 0, 0, "launch"),
    ],
)
def test_what_limits_an_operation(seconds, flops, n_bytes, limit):
    assert peaks.limited_by(seconds, flops, n_bytes, "float32", PEAKS) == limit


@pytest.mark.parametrize(
    ("op_name", "part", "short"),
    [
        ("jit(train_step)/jvp(CNN)/stage_0/conv_0/conv", "forward", "stage_0/conv_0/conv"),
        ("jit(train_step)/transpose(jvp(MLP))/dense_0/transpose", "backward", "dense_0/transpose"),
        ("jit(s)/transpose(jvp(A))/checkpoint/rematted_computation/block_1/body/dot", "again", "block_1/body/dot"),
        ("jit(s)/jvp(A)/while/body/closed_call/layer_0/layer_0/mlp/mlp.up/tanh", "forward", "layer_0/mlp/tanh"),
        ("jit(s)/jvp(A)/embed/...d,vd->...v/dot_general", "forward", "embed/dot_general"),
        ("jit(train_step)/mul", "rest", "mul"),
        ("state.params['a']", "rest", "state.params['a']"),
    ],
)  # fmt: skip
def test_names_of_the_network_without_what_jax_puts_around_them(op_name, part, short):
    assert (part_of(op_name), short_name(op_name)) == (part, short)


class Convolutions(nn.Module):
    """Strides, groups, a scan, a batched product: all that is counted in its own way."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=2, name="first")(x)
        x = nn.tanh(nn.Conv(8, (1, 3), feature_group_count=4, name="grouped")(x))
        x = x.reshape(x.shape[0], -1, 8)
        x = jnp.einsum("bik,bjk->bij", x, x)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (16, 16))
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ kernel), None), x, length=3)[0].sum()


def test_operations_of_a_program_add_up_to_those_of_what_was_traced():
    model, x = Convolutions(), jnp.ones((2, 8, 8, 4))
    params = model.init(jax.random.key(0), x)
    fn = jax.grad(lambda params, x: model.apply(params, x), argnums=(0, 1))
    text = jax.jit(fn).lower(params, x).compile().as_text()
    _, found = read_operations(text)
    often = {one.name: times for _, one, times in program.walk(program.parse(text), into_fusions=False)}
    assert sum(one.flops * often[name] for name, one in found.items()) == count_flops(fn, params, x).total()
    convolutions = [one for one in found.values() if "first" in one.path and one.kind == "products"]
    assert {one.part for one in convolutions} >= {"forward", "backward"}
    assert any(one.is_container and one.path.endswith("(while itself)") for one in found.values())


GPU_CALLS = """HloModule jit_step, is_scheduled=true
ENTRY %main (a: bf16[4,8]) -> f32[] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[8,16]{1,0} parameter(1)
  %q = bf16[2,6,3,8]{3,2,1,0} parameter(2)
  %image = f32[2,5,5,3]{3,2,1,0} parameter(3)
  %kernel = f32[7,3,3,3]{3,2,1,0} parameter(4)
  %out = f32[2,5,5,7]{3,2,1,0} parameter(5)
  %gemm = (bf16[4,16]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %attend = (bf16[2,6,3,8]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","3","6","6"],"tuple_shapes":[]}}}
  %attend.b = (bf16[2,6,3,8]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","3","6","6"],"tuple_shapes":[]}}}
  %conv = (f32[2,5,5,7]{3,2,1,0}, u8[0]{0}) custom-call(%image, %kernel), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %conv.i = (f32[2,5,5,3]{3,2,1,0}, u8[0]{0}) custom-call(%out, %kernel), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %conv.k = (f32[7,3,3,3]{3,2,1,0}, u8[0]{0}) custom-call(%image, %out), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %rnn = (f32[2,5]{1,0}, u8[0]{0}) custom-call(%a, %b), custom_call_target="cudnn_rnn_fwd"
  ROOT %sum = f32[] custom-call(%conv), custom_call_target="my_own"
}
"""  # noqa: E501


def test_calls_of_a_gpus_libraries_are_counted_by_hand():
    _, found = read_operations(GPU_CALLS)
    assert {name: one.flops for name, one in found.items()} == {
        "gemm": 2 * 4 * 8 * 16,
        "attend": 2 * (2 * 2 * 3 * 6 * 6 * 8),
        "attend.b": 5 * (2 * 2 * 3 * 6 * 6 * 8),
        **dict.fromkeys(("conv", "conv.i", "conv.k"), 2 * 2 * 5 * 5 * 7 * 3 * 3 * 3),
        "rnn": None,  # not known
        "sum": 0,
    }
    assert {one.kind for name, one in found.items() if name != "sum"} == {"products"}
    assert (found["sum"].kind, found["gemm"].dtype) == ("other", "bfloat16")


def test_what_xla_made_by_itself_is_named_by_what_takes_it():
    text = """HloModule m
ENTRY %main (x: f32[4,8]) -> f32[4,4] {
  %x = f32[4,8]{1,0} parameter(0), metadata={op_name="state.params"}
  %copy.3 = f32[4,8]{0,1} copy(%x)
  %bitcast.1 = f32[8,4]{1,0} bitcast(%copy.3)
  ROOT %dot.1 = f32[4,4]{1,0} dot(%x, %bitcast.1), lhs_contracting_dims={1}, metadata={op_name="jit(s)/jvp(A)/up/dot"}
}
"""
    _, found = read_operations(text)
    assert (found["copy.3"].path, found["copy.3"].part, found["copy.3"].kind) == (
        "copy for up/dot",
        "forward",
        "copies",
    )


def test_a_product_in_a_function_that_xla_calls_has_the_whole_name_of_its_fusion():
    text = """HloModule m
%inside (a: f32[4,8], b: f32[8,4]) -> f32[4,4] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, metadata={op_name="dot_general"}
}
%called (a: f32[4,8], b: f32[8,4]) -> f32[4,4] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  ROOT %y = f32[4,4]{1,0} fusion(%a, %b), kind=kCustom, calls=%inside, metadata={op_name="jit(s)/jvp(A)/up/dot_general"}
}
ENTRY %main (a: f32[4,8], b: f32[8,4]) -> f32[4,4] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  ROOT %call.1 = f32[4,4]{1,0} call(%a, %b), to_apply=%called
}
"""
    _, found = read_operations(text)
    assert (found["y"].path, found["y"].part, found["y"].flops) == ("up/dot_general", "forward", 2 * 4 * 4 * 8)


# ---- a step ----


def product(w, x):
    return w, x @ w


def test_a_matrix_product_has_its_operations_and_most_of_the_time():
    x = jnp.ones((512, 512))
    made = profile_step(jax.jit(product), x, [x], steps=4, peaks=PEAKS)
    longest = made.operations[0]
    assert (longest.kind, longest.flops, longest.calls) == ("products", 2 * 512**3, 1)
    assert longest.n_bytes == 3 * 4 * 512**2
    assert dict(made.flops) == {"float32": 2 * 512**3}
    assert made.share_of_peak == pytest.approx(2 * 512**3 / 1e12 / made.plain_s)
    assert made.kinds["products"] == max(made.kinds[kind] for kind in list(made.kinds)[:6])
    assert len(made.step_s) == made.steps == 4
    assert sum(made.kinds.values()) == pytest.approx(np.mean(sorted(made.step_s)[1:3]))
    assert sum(row.seconds for row in made.operations) == pytest.approx(sum(list(made.kinds.values())[:6]))
    assert json.loads(made.to_json())["operations"][0]["flops"] == 2 * 512**3
    lines = [line.split() for line in str(made).splitlines()]
    assert ["sum:", "a", "usual", "step", "in", "the", "trace"] in [line[:7] for line in lines]
    [mean] = [float(line[7]) for line in lines if line[:2] == ["mean", "of"]]
    assert mean == pytest.approx(1000 * np.mean(made.step_s), rel=0.01)


def test_any_module_on_several_devices_shows_its_messages():
    sharding = jax.NamedSharding(make_mesh(devices=jax.devices()[:2], data=2), jax.P("data"))
    batch = jax.device_put(jnp.ones((64, 32)), sharding)
    made = profile_step(lambda w, x: (w - 0.1 * x.T @ (x @ w), {}), jnp.ones((32, 8)), [batch], steps=2, peaks=PEAKS)
    assert made.n_devices == 2
    assert sum(made.flops.values()) == 2 * 2 * 64 * 32 * 8
    assert sum(row.flops * row.calls for row in made.operations) == 2 * 64 * 32 * 8  # half on each
    assert [row.limited_by for row in made.operations if row.kind == "collectives"] == [result.OF_COLLECTIVE]


def test_layers_alike_are_one_row():
    rows = [
        result.OperationRow(
            f"dot.{i}", f"block_{i}/up/dot", "forward", "products", 2, 1e-3 * i, i / 10, 1e8, "float32", 10, "compute"
        )
        for i in (1, 2)
    ]
    other = result.OperationRow("add", "add", "rest", "elementwise", 1, 2e-3, 0.2, 0, "", 1e6, "launch")
    one, two = result.joined([*rows, other], PEAKS)
    assert (one.path, one.name, one.calls, one.flops) == ("block_*/up/dot", "2 operations", 4, 1e8)
    assert (one.seconds, one.share) == pytest.approx((3e-3, 0.3))
    assert one.limited_by == "neither: 13 % of FLOP/s, 0 % of bytes/s"
    assert two == other


def failing(w, x):
    raise RuntimeError("no such thing")


def test_what_does_not_fit_a_profile_is_refused(tmp_path):
    x = jnp.ones((2, 2))
    with pytest.raises(JaxdlError, match=r"2 problem.*\n.*steps=0 must be at least 1.*\n.*no batches"):
        profile_step(product, x, [], steps=0)
    with pytest.raises(JaxdlError, match="the batches ended before 5 steps were traced"):
        profile_step(product, x, iter([x, x]), steps=5)
    with pytest.raises(ProfileError, match=r"the step failed: RuntimeError: no such thing"):
        profile_step(failing, x, [x])
    (tmp_path / "mine.txt").touch()
    with pytest.raises(JaxdlError, match="exists and is no profile"):
        profile_step(product, x, [x], folder=tmp_path)
    with pytest.raises(JaxdlError, match="is a file"):
        profile_step(product, x, [x], folder=tmp_path / "mine.txt")
    with pytest.raises(JaxdlError, match="cannot be written: Not a directory"):
        profile_step(product, x, [x], folder=tmp_path / "mine.txt" / "deeper")


def test_a_trace_under_way_is_refused_and_none_is_left(tmp_path):
    x = jnp.ones((2, 2))
    jax.profiler.start_trace(tmp_path / "own")
    try:
        with pytest.raises(ProfileError, match="a trace cannot be begun"):
            profile_step(product, x, [x], steps=1, peaks=PEAKS)
    finally:
        jax.profiler.stop_trace()
    for _ in range(2):  # the folder of an earlier profile is used again
        made = profile_step(product, x, [x], steps=1, folder=tmp_path / "new", peaks=PEAKS)
    assert made.trace == str(tmp_path / "new")
    assert len(list((tmp_path / "new").rglob("*.xplane.pb"))) == 1


def test_peaks_of_known_cards_are_their_makers_and_of_others_are_measured(monkeypatch):
    class Device:
        device_kind, platform = "NVIDIA H100 80GB HBM3", "gpu"

    assert peaks.peaks_of(Device()).rate("bfloat16") == 989e12
    monkeypatch.setattr(peaks, "measure_flops", lambda device: 8e9)
    monkeypatch.setattr(peaks, "measure_bandwidth", lambda device: 4e9)
    shared = peaks.peaks_of(jax.devices()[0], n_devices=4)
    assert (shared.rate("float32"), shared.bandwidth) == (2e9, 1e9)
    assert peaks.Peaks({"float32": 2.0, "bfloat16": 4.0}, 1.0, "").seconds({"float32": 4, "bfloat16": 4}) == 3.0


def test_a_peak_is_measured_from_what_is_done():
    assert peaks.measure_flops(jax.devices()[0], size=64) > 1e6
    assert peaks.measure_bandwidth(jax.devices()[0], mib=1) > 1e6


# ---- an experiment ----

MODEL = MLP(widths=(16,), n_outputs=3)
LOSS = make_loss_fn(MODEL, classification(), inputs="image", train=True)


def fitted(parsed, **options):
    """An experiment: `parsed` are transforms of its pipeline."""
    rng = np.random.default_rng(0)
    image, label = rng.normal(size=(64, 6)).astype(np.float32), np.arange(64, dtype=np.int32) % 3
    tx = make_optimizer("adamw", learning_rate=0.01)
    params, extra = init_model(MODEL, jax.random.key(0), jnp.ones((1, 6)))
    state = create_state(params, extra, tx, rng=jax.random.key(1))
    pipeline = Pipeline(ArraySource({"image": image, "label": label}), batch_size=8, seed=3, transforms=parsed)
    fit(state, guard(make_train_step(LOSS, tx)), pipeline, steps=3, eval_every=3, checkpoint_every=3, **options)


@pytest.mark.parametrize(
    ("transforms", "options", "n_devices"),
    [
        ((lambda row, rng: row,), {}, 1),
        ((), {"steps_per_call": 3}, 1),
        ((), {"mesh": 2}, 2),
        ((), {"mesh": 2, "exact_shards": 4}, 2),
    ],
    ids=["from the host", "on the device, three in a call", "sharded", "exact"],
)
def test_a_run_is_profiled_as_it_feeds_its_step(transforms, options, n_devices, tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "peaks_of", lambda *_: PEAKS)
    if "mesh" in options:
        options = {**options, "mesh": make_mesh(devices=jax.devices()[:2], data=2)}
    made = command.profile_experiment(lambda parsed: fitted(parsed, **options), transforms, 4, tmp_path)
    assert made.n_devices == n_devices
    assert made.rows == 8
    assert made.steps == (6 if "steps_per_call" in options else 4)
    needed = 8 * 2 * (2 * 6 * 16 + 3 * 16 * 3)  # the gradient of the images is not needed
    assert sum(made.flops.values()) == needed
    assert sum(row.flops * row.calls for row in made.operations if row.flops) * n_devices == pytest.approx(needed)
    assert (made.kinds[INPUT_WAIT] > 0) <= bool(transforms or "mesh" in options)


def test_what_ends_without_a_profile_says_why(tmp_path):
    with pytest.raises(ProfileError, match=r"without a call of jaxdl\.loop\.fit"):
        command.profile_experiment(lambda parsed: print("done"), None, 2, tmp_path)
    with pytest.raises(ProfileError, match="the step failed: ZeroDivisionError"):
        command.profile_experiment(lambda parsed: 1 / 0, None, 2, tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "a profile needs a configuration"),
        (["--config=configs/digits_cn.py"], "nearest files"),
        ([DIGITS, "--steps=0", "-m", "experiments.clasify_images"],
         r"2 problem.*\n.*--steps 0 must be at least 1.*\n.*there is no module.*experiments.classify_images"),
        ([DIGITS, "-m", "experiments.regress_table"], "is of experiments.classify_images and -m is"),
        ([DIGITS, "-m", "experiments.settings"], r"no function experiment\(parsed\)"),
        ([DIGITS, "--config.loop.lenth=3"], "nearest: --config.loop.length"),
        ([DIGITS, "--folder=tests"], "exists and is no profile"),
    ],
)  # fmt: skip
def test_the_command_refuses_what_does_not_fit(words, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    folder = [] if any("--folder" in word for word in words) else [f"--folder={tmp_path}"]
    assert main(["profile", *words, *folder]) == 2
    assert_said(said, capsys.readouterr().err)


def assert_said(said, text):
    with pytest.raises(JaxdlError, match=said):
        raise JaxdlError(text)


def test_the_command_on_the_digits(tmp_path):
    words = ["-m", "experiments.classify_images", DIGITS, "--steps=2", "--top=5", f"--folder={tmp_path / 'digits'}"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxdl", "profile", *words, f"--json={tmp_path / 'all.json'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "all.json").read_text())
    assert (tmp_path / "digits" / "profile.json").read_text() == (tmp_path / "all.json").read_text()
    assert list((tmp_path / "digits").rglob("*.trace.json.gz"))
    assert told["rows"] == 64
    assert sum(told["kinds"].values()) == pytest.approx(told["traced_s"])
    done_flops = sum(row["flops"] * row["calls"] for row in told["operations"])
    assert 0.9 < done_flops / sum(told["flops"].values()) <= 1  # XLA leaves out what is zero around a picture of 2 x 2
    lines = done.stdout.splitlines()
    assert lines[0].startswith("1 x cpu, 2 steps, ")
    assert "rows/s" in lines[0]
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("largest operations")) :]
    assert any("conv_general_dilated" in line for line in table[2:7])
    assert "input wait" in done.stdout


def test_a_benchmark_is_profiled():
    sizes = {"mode": "steps", "sizes": (4, 8, 3), "batch_size": 8}
    made = profile.profile_workload(profile.Workload(mlp.Jaxdl, sizes, {"mode": "unused"}), steps=1, is_best=False)
    assert (made.rows, made.tokens) == (8, None)
    assert sum(made.flops.values()) == flops_per_step((4, 8, 3), 8)
    assert "rows/s" in str(made)


def test_the_benchmarks_that_can_be_profiled_have_a_step():
    for workload in profile.WORKLOADS.values():
        assert issubclass(workload.side, Training)
        assert workload.best


def test_rows_and_tokens_of_a_batch():
    tokens = {"n_bytes": np.ones(4), "tokens": np.ones((4, 8))}
    assert recording.sizes_of(tokens) == (4, 32)
    assert recording.sizes_of(np.ones((6, 2))) == (6, None)
    assert recording.sizes_of({}) == (None, None)
