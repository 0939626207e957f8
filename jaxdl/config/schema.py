"""What a configuration may hold: nested frozen dataclasses (sections) whose leaves have annotations.

A leaf is annotated `bool`, `int`, `float`, `str`, `pathlib.Path`, an `Enum`, a `Literal`, a `Duration`, a `tuple` or a
`Mapping[str, ...]` of these, or a union of these such as `int | None`. A section may be a union of dataclasses, its
variants, of which a configuration holds one.
"""

import collections.abc
import dataclasses
import enum
import types
import typing
from collections.abc import Iterator
from pathlib import PurePath
from typing import Annotated, Any, Literal, NewType, Union

from jaxdl.config.duration import Duration
from jaxdl.errors import JaxdlError
from jaxdl.paths import nearest

_UNSET = object()
_MAPPINGS = (dict, collections.abc.Mapping)
_SCALARS = (bool, int, float, str, type(None), Duration)
_NAMES = {bool: "true or false", str: "str", type(None): "None", Duration: "a duration such as '10 epochs' or 500"}


class ConfigError(JaxdlError):
    """A configuration, a config file or the command line is not usable; the message lists every problem at once."""


def is_section(value: Any) -> bool:
    """Whether a value (or, given a type, its instances) is a section: a dataclass other than `Duration`.

    Example:
      >>> is_section(Duration), is_section(Duration(3)), is_section({})
      (False, False, False)
    """
    return dataclasses.is_dataclass(value) and value is not Duration and not isinstance(value, Duration)


def hints(config_type: type) -> dict[str, Any]:
    """The annotation of every field that the constructor takes, in order.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Loop:
      ...     seed: int = 0
      >>> hints(Loop)
      {'seed': <class 'int'>}
    """
    annotations = typing.get_type_hints(config_type)
    return {field.name: annotations[field.name] for field in dataclasses.fields(config_type) if field.init}


def members(annotation: Any) -> list[Any]:
    """The members of a union, or the annotation alone; `Annotated` and `NewType` are looked through.

    Example:
      >>> members(int | None)
      [<class 'int'>, <class 'NoneType'>]
    """
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return members(annotation.__origin__)
    if isinstance(annotation, NewType):
        return members(annotation.__supertype__)
    if origin in (Union, types.UnionType):
        return [inner for member in typing.get_args(annotation) for inner in members(member)]
    return [type(None) if annotation is None else annotation]


def variants(annotation: Any) -> list[type]:
    """The dataclasses among the members of an annotation: none for a leaf, several for a section with variants.

    Example:
      >>> variants(Duration | None)
      []
    """
    return [member for member in members(annotation) if is_section(member)]


def leaves(config_type: type, config: Any = None) -> dict[str, Any]:
    """The annotation of every leaf by its dotted path.

    Args:
      config_type: a dataclass.
      config: an instance, to get only the fields of the variants that it holds; None gets the fields of all variants.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Experiment:
      ...     steps: Duration = Duration(500)
      >>> list(leaves(Experiment))
      ['steps']
    """
    found: dict[str, Any] = {}
    for name, annotation in hints(config_type).items():
        inside = variants(annotation)
        if not inside:
            found[name] = annotation
        held = getattr(config, name, _UNSET)
        for section in inside if held is _UNSET else [held_type for held_type in inside if type(held) is held_type]:
            for path, inner in leaves(section, None if held is _UNSET else held).items():
                known = found.get(f"{name}.{path}")
                found[f"{name}.{path}"] = inner if known is None else known | inner
    return found


def names(config_type: type) -> list[str]:
    """The dotted paths of all leaves and all sections, of all variants.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Loop:
      ...     seed: int = 0
      >>> names(Loop)
      ['seed']
    """
    found: dict[str, None] = {}
    for name, annotation in hints(config_type).items():
        found[name] = None
        for section in variants(annotation):
            found.update(dict.fromkeys(f"{name}.{path}" for path in names(section)))
    return list(found)


def sections(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every dataclass instance in a configuration with its dotted path (the root's is empty), also inside tuples.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Loop:
      ...     seed: int = 0
      >>> list(sections({"loops": (Loop(),)}))
      [('loops.0', Loop(seed=0))]
    """
    inside: list[tuple[Any, Any]] = []
    if is_section(value):
        yield path, value
        inside = [(name, getattr(value, name)) for name in hints(type(value))]
    elif isinstance(value, collections.abc.Mapping):
        inside = list(value.items())
    elif isinstance(value, tuple):
        inside = list(enumerate(value))
    for key, item in inside:
        yield from sections(item, f"{path}.{key}".lstrip("."))


def check_schema(config_type: type) -> None:
    """Refuses a dataclass with a field that a configuration cannot hold.

    Raises:
      ConfigError: every such field, in one message.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Loop:
      ...     callback: collections.abc.Callable = print
      >>> check_schema(Loop)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      jaxdl.config.schema.ConfigError: schema Loop: 1 problem(s)
        - callback: Callable is no type of a configuration; use bool, int, float, str, Path, Enum, Literal, ...
    """
    if not (isinstance(config_type, type) and is_section(config_type)):
        raise ConfigError(f"schema {config_type!r} is no dataclass; write one with @dataclass(frozen=True).")
    if found := list(_schema_problems(config_type, "")):
        raise ConfigError.listing(f"schema {config_type.__name__}", found)


def _schema_problems(annotation: Any, path: str) -> Iterator[str]:
    choices = [section.__name__ for section in variants(annotation)]
    if len(choices) != len(set(choices)):
        yield f"{path}: two variants are called {choices[0]}; give them different names."
    for member in members(annotation):
        origin, args = typing.get_origin(member), typing.get_args(member)
        if is_section(member):
            if len(choices) > 1 and "type" in hints(member):
                yield f"{path}: a variant cannot have a field named 'type' ({member.__name__}); rename it."
            for name, inner in hints(member).items():
                yield from _schema_problems(inner, f"{path}.{name}".lstrip("."))
        elif origin is tuple:
            for inner in args:
                yield from () if inner is ... else _schema_problems(inner, path)
        elif origin in _MAPPINGS and args[0] is str:
            yield from _schema_problems(args[1], path)
        elif origin is not Literal and member not in _SCALARS and not is_kind(member, enum.Enum, PurePath):
            rule = "use bool, int, float, str, Path, Enum, Literal, Duration, tuple[X, ...], Mapping[str, X] or a union"
            yield f"{path}: {describe(member)} is no type of a configuration; {rule}."


def is_kind(member: Any, *bases: type) -> bool:
    """Whether an annotation is one of these classes or below one.

    Example:
      >>> is_kind(bool, int), is_kind(tuple[int, ...], tuple)
      (True, False)
    """
    return isinstance(member, type) and typing.get_origin(member) is None and issubclass(member, bases)


def describe(annotation: Any) -> str:
    """An annotation in words, for a message and for `--help`.

    Example:
      >>> describe(tuple[int, ...]), describe(Literal["sgd", "adam"]), describe(bool | None)
      ('tuple of int', "one of 'sgd', 'adam'", 'true or false, or None')
    """
    return ", or ".join(_describe_member(member) for member in members(annotation))


def _describe_member(member: Any) -> str:
    origin, args = typing.get_origin(member), typing.get_args(member)
    if member in _NAMES:
        return _NAMES[member]
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is tuple and args[1:] == (...,):
        return f"tuple of {describe(args[0])}"
    if origin is tuple:
        return f"tuple ({', '.join(map(describe, args))})"
    if origin in _MAPPINGS:
        return f"mapping of str to {describe(args[1])}"
    if is_kind(member, enum.Enum):
        return "one of " + ", ".join(member.__members__)
    if is_kind(member, PurePath):
        return "path"
    return getattr(member, "__name__", str(member))


def nearest_names(name: str, candidates: typing.Iterable[str]) -> list[str]:
    """The dotted names most similar to a misspelt one.

    Example:
      >>> nearest_names("optimzer.lr", ["seed", "optimizer.lr", "optimizer.name", "data.path"])
      ['optimizer.lr', 'optimizer.name', 'data.path']
    """
    slashed = [candidate.replace(".", "/") for candidate in candidates]
    return [near.replace("/", ".") for near in nearest(name.replace(".", "/"), slashed)]
