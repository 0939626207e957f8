"""What changed between the configuration of a saved run and the one that wants to go on with it."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxdl.config.schema import ConfigError, hints, is_section, names, nearest_names


class Change(NamedTuple):
    """A field whose value differs; `path` is dotted, and names a section if its variant differs.

    Example:
      >>> str(Change("optimizer.learning_rate", 0.1, 0.2))
      'optimizer.learning_rate: 0.1 -> 0.2'
    """

    path: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.path}: {self.old!r} -> {self.new!r}"


def diff(old: Any, new: Any) -> list[Change]:
    """The fields that differ between two configurations of one type, in the order of the fields.

    Example:
      >>> from dataclasses import dataclass
      >>> @dataclass(frozen=True)
      ... class Loop:
      ...     seed: int = 0
      ...     name: str = "a"
      >>> diff(Loop(), Loop(seed=1))
      [Change(path='seed', old=0, new=1)]
    """
    return list(_changes(old, new, ""))


def _changes(old: Any, new: Any, path: str) -> Iterator[Change]:
    if is_section(old) and type(old) is type(new):
        for name in hints(type(old)):
            yield from _changes(getattr(old, name), getattr(new, name), f"{path}.{name}".lstrip("."))
    elif old != new:
        yield Change(path or "config", old, new)


def leaf_values(config: Any, path: str = "") -> dict[str, Any]:
    """The value of every leaf by its dotted path; a section that is None counts as a leaf.

    Example:
      >>> from dataclasses import dataclass
      >>> @dataclass(frozen=True)
      ... class Loop:
      ...     seed: int = 0
      >>> leaf_values(Loop())
      {'seed': 0}
    """
    found = {}
    for name in hints(type(config)):
        value, inner = getattr(config, name), f"{path}.{name}".lstrip(".")
        found.update(leaf_values(value, inner) if is_section(value) else {inner: value})
    return found


def check_resume(old: Any, new: Any, *, allow: Sequence[str] = ()) -> list[str]:
    """Refuses to resume with a configuration that differs in a field that was not allowed to change by name.

    Args:
      old: the configuration of the saved run.
      new: the configuration of the run that resumes it.
      allow: dotted names of fields, or of sections to allow everything under them (`--resume.allow`).

    Returns:
      Notes for the log: the names in `allow` under which nothing changed.

    Raises:
      ConfigError: fields that changed and are not allowed, as a table of old and new values; names that are no field.

    Example:
      >>> from dataclasses import dataclass
      >>> @dataclass(frozen=True)
      ... class Loop:
      ...     seed: int = 0
      >>> check_resume(Loop(), Loop(seed=1))
      Traceback (most recent call last):
      jaxdl.config.schema.ConfigError: resume: 1 problem(s)
        - seed: 0 -> 1
      To go on with new values, allow them by name: --resume.allow seed. To keep the old ones, set the fields back.
    """
    if type(old) is not type(new):
        raise ConfigError(
            f"resume: the saved run has a {type(old).__name__}, this one a {type(new).__name__}; start a new run."
        )
    changes = diff(old, new)
    unknown = unknown_names(allow, type(new))
    forbidden = [change for change in changes if not any(_covers(name, change.path) for name in allow)]
    used = [name for name in allow if any(_covers(name, change.path) for change in changes)]
    if forbidden or unknown:
        listing = str(ConfigError.listing("resume", [*_table(forbidden), *unknown]))
        raise ConfigError(f"{listing}\n{_remedy(forbidden, used)}" if forbidden else listing)
    return [f"resume: {name} was allowed to change and did not." for name in allow if name not in used]


def unknown_names(allow: Sequence[str], config_type: type) -> list[str]:
    """A line for each allowed name that is neither a field nor a section.

    Example:
      >>> from dataclasses import dataclass
      >>> @dataclass(frozen=True)
      ... class Loop:
      ...     seed: int = 0
      >>> unknown_names(["sed"], Loop)
      ["--resume.allow='sed': no such field or section; nearest: seed."]
    """
    known = names(config_type)
    return [
        f"--resume.allow={name!r}: no such field or section; nearest: {', '.join(nearest_names(name, known))}."
        for name in allow
        if name not in known
    ]


def _covers(name: str, path: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def _table(changes: Sequence[Change]) -> list[str]:
    path_width = max((len(change.path) for change in changes), default=0) + 1
    old_width = max((len(repr(change.old)) for change in changes), default=0)
    return [f"{change.path + ':':{path_width}} {change.old!r:{old_width}} -> {change.new!r}" for change in changes]


def _remedy(forbidden: Sequence[Change], allowed: Sequence[str]) -> str:
    wanted = " ".join([*allowed, *(change.path for change in forbidden)])
    how = f"To go on with new values, allow them by name: --resume.allow {wanted}."
    return f"{how} To keep the old ones, set the fields back."
