"""What `fit` refuses before it reads data or compiles: each problem as a sentence, all of them in one error."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxdl.errors import JaxdlError
from jaxdl.parallel.exact import exact_problems
from jaxdl.parallel.runners import unused_axes
from jaxdl.step import Step


def check_fit(counts: Mapping[str, int | None], problems: Sequence[str]) -> None:
    """Refuses counts below 1, and calls that would go past an evaluation or a checkpoint.

    Args:
      counts: arguments of `fit` by name; None where one was not given.
      problems: what else was found.

    Raises:
      JaxdlError: everything that is wrong.
    """
    found = [f"{name}={n} must be at least 1." for name, n in counts.items() if n is not None and n < 1]
    per_call = counts["steps_per_call"] or 1
    for name in ("eval_every", "checkpoint_every"):
        n = counts[name]
        if n is not None and 1 <= n < per_call:
            found.append(f"steps_per_call={per_call} is more than {name}={n}; use at most {n}.")
    if found or problems:
        raise JaxdlError.listing("fit", [*found, *problems])


def mesh_problems(mesh: Any, shardings: Any, data: Any) -> list[str]:
    """Devices with nothing of their own to do, and a batch that does not divide over the others."""
    problems = []
    n_shards = 1 if mesh is None else mesh.shape.get("data", 1)
    unused = [] if mesh is None else unused_axes(mesh, shardings)
    if unused:
        problems.append(
            f"the mesh has the axes {mesh.axis_names} and nothing lies over {', '.join(map(repr, unused))}: its "
            "devices would do the same work twice. A batch lies over 'data' and 'sequence'; give rules for the others."
        )
    if data.batch_size % n_shards:
        problems.append(
            f"batch_size={data.batch_size} does not divide over {n_shards} devices on axis 'data'; use a multiple."
        )
    return problems


def virtual_shard_problems(
    n_shards: int, step: Step, mesh: Any, data: Any, steps_per_call: int, is_resident: bool | None
) -> list[str]:
    """What exact mode cannot do."""
    microbatches = step.halves.microbatches if hasattr(step, "halves") else 1
    problems = exact_problems(n_shards, 1 if mesh is None else mesh.size, {"a batch": data.batch_size}, microbatches)
    if steps_per_call > 1:
        problems.append(f"steps_per_call={steps_per_call} must be 1 in exact mode, whose step is several programs.")
    if is_resident:
        problems.append("is_resident=True must be False or None in exact mode, which cuts batches on the host.")
    return problems
