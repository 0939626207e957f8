"""What each line of a compiled program does: its kind, its place in the network, its operations and bytes."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from jaxdl.plan.collectives import KINDS as COLLECTIVES
from jaxdl.plan.program import Instruction, Program, arrays, parse, touched, walk
from jaxdl.profile.names import part_of, short_name

PRODUCT, REDUCTION, ELEMENTWISE = "products", "reductions", "elementwise"
COLLECTIVE, COPY, OTHER = "collectives", "copies", "other"
KINDS = (PRODUCT, REDUCTION, ELEMENTWISE, COLLECTIVE, COPY, OTHER)
_CONTAINERS = {"while", "call", "conditional", "async-start", "async-done", "async-update"}
_PRODUCTS = {"dot", "convolution", "ragged-dot", "scaled-dot"}
_REDUCTIONS = {"reduce", "reduce-window", "select-and-scatter", "sort", "topk", "batch-norm-training", "argmax"}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_COPIES = {
    *("copy", "copy-start", "copy-done", "transpose", "reshape", "slice", "dynamic-slice", "dynamic-update-slice"),
    *("concatenate", "pad", "gather", "scatter", "broadcast", "iota", "reverse", "convert", "bitcast-convert"),
}
_OTHER = {"rng", "rng-bit-generator", "rng-get-and-update-state", "infeed", "outfeed", "fft", "cholesky", "custom-call"}
_MESSAGES = {"send", "recv", "send-done", "recv-done", "collective-broadcast"}
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "f64": "float64", "s8": "int8"}


@dataclass(frozen=True)
class Operation:
    """A line of a program that a device runs as one.

    Attributes:
      name: XLA's.
      kind: of `KINDS`.
      path: modules of the network and JAX's operation, such as `block_0/attention/query/dot_general`.
      part: see `names.part_of`.
      flops: multiplications and additions of its products each time; None where it is a library's call of unknown size.
      dtype: of the operands of its products, "" where it has none.
      n_bytes: read and written each time, if all comes from memory and goes there.
      is_container: it only runs others, as a loop does.
    """

    name: str
    kind: str
    path: str
    part: str
    flops: int | None = 0
    dtype: str = ""
    n_bytes: int = 0
    is_container: bool = False


def read_operations(text: str) -> tuple[str, dict[str, Operation]]:
    """The name of a compiled program, and its operations by name.

    Args:
      text: of `jax.stages.Compiled.as_text()`.

    Example:
      >>> module, found = read_operations('''HloModule jit_f, is_scheduled=true
      ... ENTRY %main (x: f32[2,3], y: f32[3,5]) -> f32[2,5] {
      ...   %x = f32[2,3]{1,0} parameter(0)
      ...   %y = f32[3,5]{1,0} parameter(1)
      ...   ROOT %dot.1 = f32[2,5]{1,0} dot(%x, %y), lhs_contracting_dims={1}, metadata={op_name="jit(f)/jvp(A)/b/dot"}
      ... }''')
      >>> one = found["dot.1"]
      >>> module, one.kind, one.path, one.part, one.flops, one.n_bytes
      ('jit_f', 'products', 'b/dot', 'forward', 60, 124)
    """
    named = re.search(r"^HloModule ([^\s,]+)", text, re.MULTILINE)
    program = parse(text)
    found = {}
    for computation, one, _ in walk(program, into_fusions=False):
        if one.opcode not in _FREE and one.name not in found:
            found[one.name] = _operation(program, computation, one)
    return named[1] if named else "", found


def _operation(program: Program, computation: str, one: Instruction) -> Operation:
    inside = list(_inside(program, computation, one))
    op_name, served = _op_name(inside, one), ""
    if not op_name:  # XLA made it: it serves what takes its result
        served = _served(program, computation, one)
    is_container = one.opcode in _CONTAINERS
    path = short_name(op_name) if op_name else f"{_stem(one)}{_for(served)}"
    products = [] if is_container else [count for at, inner in inside if (count := _product(program, at, inner))]
    counts = [count for count, _ in products if count is not None]
    return Operation(
        name=one.name,
        kind=OTHER if is_container else kind_of([_what(inner) for _, inner in inside]),
        path=f"{path} ({one.opcode} itself)" if is_container else path,
        part=part_of(op_name or served),
        flops=sum(counts) if len(counts) == len(products) else None,
        dtype=next((dtype for _, dtype in products), ""),
        n_bytes=0 if is_container else touched(program, program.computations[computation], one),
        is_container=is_container,
    )


def _op_name(inside: Sequence[tuple[str, Instruction]], one: Instruction) -> str:
    """JAX's name of the product in a line, else of the line, else of the last in it that has one."""
    lines, own = [line for _, line in reversed(inside)], _OP_NAME.search(one.attributes)
    for line in (*(line for line in lines if _what(line) in _PRODUCTS), one, *lines):
        if found := _OP_NAME.search(line.attributes):
            is_cut = own and own[1].endswith(f"/{found[1]}")  # within a function that XLA calls
            return own[1] if own and is_cut else found[1]
    return ""


def _served(program: Program, computation: str, one: Instruction, depth: int = 4) -> str:
    """JAX's name of the nearest line that takes the result."""
    names = {one.name}
    for _ in range(depth):
        takers = [line for line in program.computations[computation] if names & set(line.operands)]
        for line in takers:
            found = _op_name(list(_inside(program, computation, line)), line)
            if found and "(" in found:  # not that of an argument
                return found
        names = {line.name for line in takers}
    return ""


def _stem(one: Instruction) -> str:
    """The name that XLA gave, without numbers and what says that it is a fusion.

    Example:
      >>> text = "HloModule m\\nENTRY %e () -> f32[] {\\n  ROOT %wrapped_copy_fusion.3 = f32[] constant(0)\\n}"
      >>> _stem(parse(text).computations["e"][0])
      'copy'
    """
    return re.sub(r"^wrapped_|(_fusion)?(\.\d+)?(\.clone)?$", "", one.name) or one.name


def _for(served: str) -> str:
    return f" for {short_name(served)}" if served else ""


def _inside(program: Program, computation: str, one: Instruction) -> Iterator[tuple[str, Instruction]]:
    """What a fusion is made of, or the line itself."""
    if one.opcode != "fusion":
        yield computation, one
        return
    for name in one.called:
        for inner in program.computations.get(name, []):
            yield from _inside(program, name, inner)


def _what(one: Instruction) -> str:
    found = _TARGET.search(one.attributes)
    return f"custom-call {found[1]}" if found else one.opcode


def kind_of(opcodes: Sequence[str]) -> str:
    """The kind of a fusion of these operations: what weighs most in it.

    Args:
      opcodes: XLA's; a custom call with its target behind it.

    Example:
      >>> [kind_of(codes) for codes in (["copy", "dot"], ["multiply", "reduce"], ["bitcast", "transpose"], ["tanh"])]
      ['products', 'reductions', 'copies', 'elementwise']
    """
    codes = [code.removesuffix("-start").removesuffix("-done") for code in opcodes if code not in _FREE]
    tests: list[tuple[str, Callable[[str], bool]]] = [
        (COLLECTIVE, lambda code: code in COLLECTIVES or code in _MESSAGES),
        (PRODUCT, lambda code: code in _PRODUCTS or _is_product_call(code)),
        (REDUCTION, lambda code: code in _REDUCTIONS),
        (OTHER, lambda code: code in _OTHER or code.startswith("custom-call")),
        (ELEMENTWISE, lambda code: code not in _COPIES),
    ]
    return next((kind for kind, is_it in tests if any(map(is_it, codes))), COPY)


def _is_product_call(code: str) -> bool:
    names = ("gemm", "matmul", "conv", "fmha", "rnn", "__onednn", "cublas", "cudnn", "dot")
    return code.startswith("custom-call") and any(name in code.lower() for name in names)


# ---- operations of products ----


def _product(program: Program, computation: str, one: Instruction) -> tuple[int | None, str] | None:
    """(FLOPs, dtype) of a product; None as FLOPs where they cannot be told; None where it is none."""
    what = _what(one)
    if what not in _PRODUCTS and not _is_product_call(what):
        return None
    shapes = {other.name: other.shape for other in program.computations[computation]}
    operands = [arrays(shapes[name])[0] for name in one.operands if arrays(shapes.get(name, ""))]
    if len(operands) < 2 or not arrays(one.shape):
        return None, ""
    dtype, lhs = operands[0]
    out = arrays(one.shape)[0][1]
    return _count(what, one.attributes, lhs, operands[1][1], out), _DTYPES.get(dtype, dtype)


Sizes = tuple[int, ...]


def _count(what: str, attributes: str, lhs: Sizes, rhs: Sizes, out: Sizes) -> int | None:
    if found := re.search(r'"intermediate_tensor_shape":\{[^}]*"dimensions":\[([^\]]*)\]', attributes):
        scores = [int(n) for n in re.findall(r"\d+", found[1])]  # B, H, T, S of cuDNN's attention
        n_products = 5 if "backward" in what.lower() else 2
        return 2 * n_products * math.prod(scores) * math.prod(lhs) // math.prod(scores[:3])
    if "dim_labels=" in attributes:
        return _convolution(what, attributes, lhs, rhs, out)
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes) or re.search(
        r'"lhs_contracting_dimensions":\[([^\]]*)\]', attributes
    )
    if found is None:
        return None
    return 2 * math.prod(out) * math.prod(lhs[int(i)] for i in re.findall(r"\d+", found[1]))


def _convolution(what: str, attributes: str, lhs: Sizes, rhs: Sizes, out: Sizes) -> int | None:
    """As `plan.flops` counts: zeros of a dilated input do not count. cuDNN's gradients keep the labels of forward."""
    labels = re.search(r"dim_labels=[^_\s]+_([^-\s]+)->", attributes)
    if labels is None:
        return None
    kernel, outputs = rhs, out
    if "BackwardInput" in what:
        outputs = lhs
    elif "BackwardFilter" in what:
        kernel, outputs = out, rhs
    dilation = re.search(r"lhs_dilate=([\dx]+)", attributes)
    filled = math.prod(int(n) for n in dilation[1].split("x")) if dilation else 1
    return 2 * math.prod(outputs) * math.prod(kernel) // kernel[labels[1].index("o")] // filled
