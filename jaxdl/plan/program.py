"""What a compiled program does, read off its text: collectives and traffic with the memory, loops times their trips."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"),
    *("after-all", "partition-id", "replica-id", "opt-barrier", "copy-done", "async-start", "async-update"),
    *("async-done", "all-gather-done", "all-reduce-done", "collective-permute-done", "domain"),
}
_HOLDS_OPERAND = ("all-gather-start", "collective-permute-start")  # beside the result proper
_BITS = {"pred": 8, "token": 0, "opaque": 0, "tuple": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\([^=]*\) -> .*|)\{$")
_NAMED = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}")
_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")


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
        """Bytes of the result in the device's main memory."""
        return shape_bytes(self.shape, is_on_chip_free=True)

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


class Collective(NamedTuple):
    """What one line of the program sends.

    Attributes:
      kind: of `KINDS`.
      axes: of the mesh, over which devices talk.
      times: how often in a step.
      n_bytes: each time on one device: the larger of what goes in and what comes out.
    """

    kind: str
    axes: tuple[str, ...]
    times: int
    n_bytes: int


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
            if one.opcode == "fusion" and not into_fusions:
                continue
            if one.opcode in ("while", "call", "conditional", "fusion", "async-start"):
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


def collectives(program: Program, axes: Mapping[str, int]) -> list[Collective]:
    """What devices send each other in a step; equal lines are one, the most bytes first.

    Args:
      program: of `parse`.
      axes: of the mesh, in its order: name -> size.
    """
    total: Counter[tuple[str, tuple[str, ...], int]] = Counter()
    seen: set[tuple[str, str]] = set()
    fused = {name for lines in program.computations.values() for one in lines if _is_fusion(one) for name in one.called}
    for name, one, times in walk(program):
        kind = one.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        channel = re.search(r"channel_id=(\d+)", one.attributes)
        if name in fused and channel is not None:  # a TPU has it in the fusion that starts it and in that which ends it
            if (kind, channel[1]) in seen:
                continue
            seen.add((kind, channel[1]))
        if kind == "all-reduce" and "all-reduce-scatter" in name:
            kind = "reduce-scatter"
        total[kind, _axes(one.attributes, axes), _moved(program.computations[name], one)] += times
    found = [Collective(kind, over, count, n_bytes) for (kind, over, n_bytes), count in total.items()]
    return sorted(found, key=lambda one: -one.times * one.n_bytes)


def _is_fusion(one: Instruction) -> bool:
    return one.opcode == "fusion"


def _moved(computation: list[Instruction], one: Instruction) -> int:
    shapes = {other.name: other.n_bytes for other in computation}
    operands = sum(shapes.get(name, 0) for name in one.operands)
    result = one.n_bytes
    if one.opcode in _HOLDS_OPERAND:
        result -= operands
    return max(operands, result)


def _axes(attributes: str, axes: Mapping[str, int]) -> tuple[str, ...]:
    sizes = tuple(axes.values())
    group = _first_group(attributes, math.prod(sizes))
    if len(group) < 2:
        return ()
    places = np.array(np.unravel_index(group, sizes))
    return tuple(name for name, row in zip(axes, places, strict=True) if len(set(row.tolist())) > 1)


def _first_group(attributes: str, n: int) -> list[int]:
    if found := _IOTA.search(attributes):
        return _iota(found[2], found[3]).reshape(_numbers(found[1]))[0].ravel().tolist()
    if found := _MESH.search(attributes):
        named = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        ids = _iota(found[2], found[3]) if found[2] else np.arange(math.prod(map(int, named.values())))
        ids = ids.reshape([int(size) for size in named.values()])
        return ids[tuple(slice(None) if f"'{name}'" in found[4] else 0 for name in named)].ravel().tolist()
    if found := _GROUPS.search(attributes):
        groups = [[int(i) for i in part.split(",") if i] for part in re.findall(r"\{([\d,]*)\}", found[1])]
        groups = [group for group in groups if len(set(group)) > 1]
        if groups:
            return groups[0]
        return list(range(n)) if "source_target_pairs" not in attributes and not found[1] else []
    return list(range(n))


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """Numbers from 0 in a grid, its dimensions in another order."""
    grid = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return grid.transpose(_numbers(order)) if order else grid


def _numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def traffic(program: Program) -> int:
    """Bytes that a device reads and writes in a step if every fusion reads its operands from memory and writes its
    results there; a slice of an operand counts as the slice.
    """
    total = 0
    for name, one, times in walk(program, into_fusions=False):
        if one.opcode not in _FREE:
            total += times * _touched(program, program.computations[name], one)
    return total


def _touched(program: Program, computation: list[Instruction], one: Instruction) -> int:
    sizes = {other.name: other.in_memory for other in computation}
    operands = [sizes.get(name, 0) for name in one.operands]
    if one.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * one.in_memory
    if one.opcode in _HOLDS_OPERAND:
        return one.in_memory
    if one.opcode == "dynamic-update-slice":
        return 2 * (operands[1] if len(operands) > 1 else 0)
    inner = program.computations.get(one.called[0], []) if one.opcode == "fusion" and one.called else []
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


def summary(found: list[Collective]) -> list[dict[str, Any]]:
    """One row for each kind and axes: how often, how many bytes in all, the largest at once."""
    rows: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = {}
    for one in found:
        empty = {"kind": one.kind, "axes": list(one.axes), "count": 0, "bytes": 0, "largest": 0}
        row = rows.setdefault((one.kind, one.axes), empty)
        row["count"] += one.times
        row["bytes"] += one.times * one.n_bytes
        row["largest"] = max(row["largest"], one.n_bytes)
    return sorted(rows.values(), key=lambda row: -row["bytes"])
