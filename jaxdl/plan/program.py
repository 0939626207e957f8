"""The text of a compiled program, walked as it runs: loops times their trips; and its traffic with the memory."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"),
    *("after-all", "partition-id", "replica-id", "opt-barrier", "copy-done", "async-start", "async-update"),
    *("async-done", "fusion-done", "all-gather-done", "all-reduce-done", "collective-permute-done", "domain"),
}
_FUSIONS = ("fusion", "fusion-start")
HOLDS_OPERAND = ("all-gather-start", "collective-permute-start")  # beside the result proper
_BITS = {"pred": 8, "token": 0, "opaque": 0, "tuple": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\([^=]*\) -> .*|)\{$")
_NAMED = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SCRATCH = re.compile(r", [su]8\[\d+\](?:\{[^}]*\})?\)$")
_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One line of a program: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def n_bytes(self) -> int:
        """Of the result, all arrays of a tuple together."""
        return shape_bytes(self.shape)

    @property
    def in_memory(self) -> int:
        """Bytes of the result in the device's main memory, without what cuBLAS and cuDNN may scribble in."""
        shape = _SCRATCH.sub(")", self.shape) if self.is_of_nvidia else self.shape
        return shape_bytes(shape, is_on_chip_free=True)

    @property
    def is_of_nvidia(self) -> bool:
        """A call of cuBLAS or cuDNN."""
        return self.opcode == "custom-call" and 'target="__cu' in self.attributes

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        found = _CALLED.findall(self.attributes)
        for names in _BRANCHES.findall(self.attributes):
            found += [name.strip().lstrip("%") for name in names.split(",")]
        return found


class Program(NamedTuple):
    """Computations by name; each is a list of instructions."""

    computations: Mapping[str, list[Instruction]]
    entry: str


def shape_bytes(text: str, *, is_on_chip_free: bool = False) -> int:
    """Bytes of a shape, or of all shapes of a tuple, without what a layout adds.

    Args:
      text: as XLA writes it.
      is_on_chip_free: arrays that a layout puts into another memory than the main one, such as a TPU's VMEM (`S(1)`),
        count nothing.

    Example:
      >>> shape_bytes("(f32[2,3]{1,0:T(8,128)}, bf16[4]{0:S(1)}, pred[], s4[6])")
      36
      >>> shape_bytes("(f32[2,3]{1,0:T(8,128)}, bf16[4]{0:S(1)}, pred[], s4[6])", is_on_chip_free=True)
      28
    """
    bits = 0
    for dtype, sizes, layout in _ARRAY.findall(text):
        if is_on_chip_free and "S(" in layout:
            continue
        digits = re.match(r"[a-z]+?(\d+)", dtype)
        width = _BITS.get(dtype, int(digits[1]) if digits else 0)
        bits += width * math.prod(int(n) for n in sizes.split(",") if n)
    return bits // 8


def arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Dtype and sizes of each array of a shape.

    Example:
      >>> arrays("(f32[2,3]{1,0}, s32[])")
      [('f32', (2, 3)), ('s32', ())]
    """
    return [(dtype, tuple(int(n) for n in sizes.split(",") if n)) for dtype, sizes, _ in _ARRAY.findall(text)]


def parse(text: str) -> Program:
    """Reads the text of a compiled program.

    Example:
      >>> program = parse('''HloModule m
      ... ENTRY %main (x: f32[2]) -> f32[2] {
      ...   %x = f32[2]{0} parameter(0)
      ...   ROOT %y = f32[2]{0} add(%x, %x), metadata={op_name="a"}
      ... }''')
      >>> program.entry, [one.opcode for one in program.computations["main"]]
      ('main', ['parameter', 'add'])
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if line.endswith("{") and " = " not in line.split("(")[0] and not line.startswith(" "):
            found = _HEADER.match(re.sub(r", execution_thread=\S+ ", " ", line))
            if found:
                current = computations.setdefault(found[2], [])
                entry = found[2] if found[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (named := _NAMED.match(line)):
            current.append(_instruction(named))
    return Program(computations, entry)


def _instruction(named: re.Match[str]) -> Instruction:
    rest = named[3]
    end = _balanced(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _balanced(rest, len(opcode))
    inside = rest[len(opcode) + 1 : end - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(
        named[2], shape, opcode, operands or _bare(opcode, inside), rest[end:] + _number(opcode, inside), bool(named[1])
    )


def _bare(opcode: str, inside: str) -> tuple[str, ...]:
    return () if opcode in ("parameter", "constant") else tuple(re.findall(r"([A-Za-z_][\w.\-]*)(?:,|$)", inside))


def _number(opcode: str, inside: str) -> str:
    """A scalar constant keeps its value, a parameter its number."""
    return f", value={inside}" if opcode in ("parameter", "constant") and len(inside) < 24 else ""


def _balanced(text: str, start: int) -> int:
    """The place after the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    return len(text)


def walk(program: Program, into_fusions: bool = True) -> Iterator[tuple[str, Instruction, int]]:
    """Every instruction that runs, with its computation and how often.

    Args:
      program: of `parse`.
      into_fusions: also what fusions are made of.
    """
    waiting = [(program.entry, 1)]
    while waiting:
        name, times = waiting.pop()
        for one in program.computations.get(name, ()):
            yield name, one, times
            if one.opcode in _FUSIONS and not into_fusions:
                continue
            if one.opcode in ("while", "call", "conditional", "async-start", *_FUSIONS):
                n = trips(program, one) if one.opcode == "while" else 1
                waiting += [(inner, times * n) for inner in one.called]


def trips(program: Program, loop: Instruction) -> int:
    """How often the body of a `while` runs: what XLA knows of it, else the largest constant of its condition."""
    if known := _TRIPS.search(loop.attributes):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    constants = [
        int(found[1])
        for one in program.computations.get(condition[1] if condition else "", ())
        if one.opcode == "constant" and (found := re.search(r"value=(\d+)$", one.attributes))
    ]
    return max(constants, default=1)


def traffic(program: Program) -> int:
    """Bytes that a device reads and writes in a step if every fusion reads its operands from memory and writes its
    results there; a slice of an operand counts as the slice.
    """
    total = 0
    for name, one, times in walk(program, into_fusions=False):
        if one.opcode not in _FREE:
            total += times * touched(program, program.computations[name], one)
    return total


def touched(program: Program, computation: list[Instruction], one: Instruction) -> int:
    """Bytes that one instruction reads and writes: those of a slice where it takes or changes a slice only."""
    sizes = {other.name: other.in_memory for other in computation}
    operands = [sizes.get(name, 0) for name in one.operands]
    if one.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * one.in_memory
    if one.opcode in HOLDS_OPERAND:
        return one.in_memory
    if one.opcode == "dynamic-update-slice":
        return 2 * (operands[1] if len(operands) > 1 else 0)
    inner = program.computations.get(one.called[0], []) if one.opcode in _FUSIONS and one.called else []
    if not inner:
        return sum(operands) + one.in_memory
    return sum(_read(inner, i, size) for i, size in enumerate(operands)) + _written(inner, one)


def _read(inner: list[Instruction], number: int, size: int) -> int:
    """What a fusion reads of an operand: its slices, where it takes nothing else."""
    own = next((i for i in inner if i.opcode == "parameter" and i.attributes.endswith(f"value={number}")), None)
    if own is None:
        return size
    total = 0
    for user in (one for one in inner if own.name in one.operands):
        if user.opcode in ("dynamic-slice", "gather", "slice"):
            total += user.in_memory
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == own.name:
            continue  # written in place
        else:
            return size
    return min(total, size)


def _written(inner: list[Instruction], fusion: Instruction) -> int:
    root = next((one for one in inner if one.is_root), None)
    sizes = {one.name: one for one in inner}
    parts = [sizes[name] for name in root.operands if name in sizes] if root and root.opcode == "tuple" else [root]
    total = 0
    for part in parts:
        if part is None:
            return fusion.in_memory
        while part.opcode in ("bitcast", "copy", "convert") and part.operands and part.operands[0] in sizes:
            if sizes[part.operands[0]].opcode not in ("dynamic-update-slice", "bitcast", "copy", "convert"):
                break
            part = sizes[part.operands[0]]
        if part.opcode == "dynamic-update-slice" and part.operands[1] in sizes:
            total += sizes[part.operands[1]].in_memory
        else:
            total += part.in_memory
    return total
