"""What devices send each other in a compiled program, over which axis of the mesh, and how often."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxdl.plan.program import HOLDS_OPERAND, Instruction, Program, walk

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}")
_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")


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
    if one.opcode in HOLDS_OPERAND:
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
