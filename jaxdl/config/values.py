"""Values of a configuration as text of the command line and as JSON, both read by the annotations of the fields."""

import collections.abc
import dataclasses
import enum
import json
import math
import typing
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any, Literal, TypeVar

from jaxdl.config.duration import Duration
from jaxdl.config.schema import (
    ConfigError,
    check_schema,
    describe,
    hints,
    is_kind,
    is_section,
    members,
    nearest_names,
    variants,
)
from jaxdl.errors import JaxdlError

T = TypeVar("T")
Convert = Callable[[Any, Any, str, list[str]], Any]


class _Mismatch(Exception):
    """The value is of another kind than this member of the annotation."""


def to_json(config: Any) -> str:
    """Writes a configuration as JSON, keys sorted; a section with variants has its class name under `type`.

    Raises:
      ConfigError: values of another type than their annotation, floats that are not finite (JSON has none), and
        values that would not come back equal.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Loop:
      ...     steps: Duration = Duration("10 epochs")
      ...     widths: tuple[int, ...] = (64, 64)
      >>> from_json(Loop, to_json(Loop())) == Loop()
      True
    """
    check_schema(type(config))
    problems: list[str] = []
    data = encode(type(config), config, "", problems)
    if not problems:
        back = decode(type(config), data, "", problems)
        if not problems and back != config:
            problems.append(f"it comes back from JSON as {back!r}; take the union apart that JSON cannot tell.")
    if problems:
        raise ConfigError.listing("config to JSON", problems)
    return json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"


def from_json(config_type: type[T], text: str) -> T:
    """Reads a configuration from JSON, and restores tuples, paths, enums and variants from the annotations.

    Args:
      config_type: the dataclass to build.
      text: what `to_json` wrote. A field that is left out takes its default.

    Raises:
      ConfigError: no JSON, unknown keys, wrong types, fields without value or default, all in one message.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Loop:
      ...     seed: int = 0
      >>> from_json(Loop, '{"sed": 1}')
      Traceback (most recent call last):
      jaxdl.config.schema.ConfigError: config from JSON: 1 problem(s)
        - sed: no such field; nearest: seed.
    """
    check_schema(config_type)
    problems: list[str] = []
    config: Any = None
    try:
        config = decode(config_type, json.loads(text, object_pairs_hook=_unique), "", problems)
    except (json.JSONDecodeError, RecursionError) as error:
        problems.append(f"this is not JSON: {error}.")
    except _Mismatch as error:
        problems.append(f"{error}.")
    if problems:
        raise ConfigError.listing("config from JSON", problems)
    return config


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise _Mismatch(f"the key {twice[0]!r} appears twice in one object; keep one")
    return dict(pairs)


def encode(annotation: Any, value: Any, path: str, problems: list[str]) -> Any:
    """Turns a value into JSON data and appends what does not fit its annotation to `problems`.

    Example:
      >>> encode(tuple[Duration, ...], (Duration(3),), "loop.steps", [])
      ['3 steps']
    """
    data = _convert(_encode_member, annotation, value, path, problems)
    tagged = len(variants(annotation)) > 1 and is_section(value) and isinstance(data, dict)
    return {"type": type(value).__name__, **data} if tagged else data


def decode(annotation: Any, data: Any, path: str, problems: list[str]) -> Any:
    """Turns JSON data (or a Python literal) into a value and appends what does not fit to `problems`.

    Example:
      >>> decode(tuple[Duration, ...], ["3 steps"], "loop.steps", [])
      (Duration('3 steps'),)
    """
    choices = {variant.__name__: variant for variant in variants(annotation)}
    if len(choices) > 1 and isinstance(data, dict):
        tag = data.get("type")
        if not isinstance(tag, str) or tag not in choices:
            problems.append(f"{_join(path, 'type')}={tag!r} chooses no variant; expected one of {list(choices)}.")
            return None
        annotation, data = choices[tag], {key: item for key, item in data.items() if key != "type"}
    return _convert(_decode_member, annotation, data, path, problems)


def _convert(convert: Convert, annotation: Any, value: Any, path: str, problems: list[str]) -> Any:
    """Takes the first member of the annotation that fits, else reports what the nearest one missed."""
    attempts: list[list[str]] = []
    for member in members(annotation):
        trial: list[str] = []
        try:
            result = convert(member, value, path, trial)
        except _Mismatch:
            continue
        if not trial:
            return result
        attempts.append(trial)
    kind = type(value).__name__
    missed = f"{_field(path, value)} has type {kind}; expected {describe(annotation)}."
    problems += attempts[0] if attempts else [missed]
    return None


def _field(path: str, value: Any) -> str:
    shown = repr(value)
    return f"{path or 'config'}={shown if len(shown) <= 80 else shown[:77] + '...'}"


def _encode_member(member: Any, value: Any, path: str, problems: list[str]) -> Any:
    if is_section(member):
        if type(value) is not member:
            raise _Mismatch
        fields = hints(member).items()
        return {name: encode(inner, getattr(value, name), _join(path, name), problems) for name, inner in fields}
    origin, args = typing.get_origin(member), typing.get_args(member)
    if origin is tuple and isinstance(value, tuple):
        return _items(encode, member, value, path, problems)
    if isinstance(value, collections.abc.Mapping) and origin in (dict, collections.abc.Mapping):
        return _entries(encode, args[1], value, path, problems)
    if is_kind(member, enum.Enum) and isinstance(value, member):
        return value.name
    if (is_kind(member, PurePath) and isinstance(value, PurePath)) or (member is Duration and type(value) is Duration):
        return str(value)
    return _scalar(member, value, path, problems)


def _decode_member(member: Any, data: Any, path: str, problems: list[str]) -> Any:
    if is_section(member):
        return _decode_section(member, data, path, problems)
    origin, args = typing.get_origin(member), typing.get_args(member)
    if origin is tuple and isinstance(data, (list, tuple)):
        items = _items(decode, member, data, path, problems)
        return None if items is None else tuple(items)
    if isinstance(data, dict) and origin in (dict, collections.abc.Mapping):
        return _entries(decode, args[1], data, path, problems)
    if is_kind(member, enum.Enum) and isinstance(data, str) and data in member.__members__:
        return member[data]
    if is_kind(member, PurePath) and isinstance(data, str):
        return member(data)
    if member is Duration and isinstance(data, (str, int)):
        try:
            return Duration(data)
        except JaxdlError as error:
            problems.append(f"{path}: {error}")
            return None
    return _scalar(member, data, path, problems)


def _join(path: str, name: object) -> str:
    return f"{path}.{name}".lstrip(".")


def _decode_section(member: Any, data: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(data, dict):
        raise _Mismatch
    fields = hints(member)
    n_before = len(problems)
    for key in data.keys() - fields.keys():
        near = ", ".join(nearest_names(key, fields)) or "none, it has no fields"
        problems.append(f"{_join(path, key)}: no such field; nearest: {near}.")
    for name in required(member) - data.keys():
        problems.append(f"{_join(path, name)} has no value and no default; expected {describe(fields[name])}.")
    values = {name: decode(fields[name], data[name], _join(path, name), problems) for name in fields if name in data}
    if len(problems) > n_before:
        return None
    try:
        return member(**values)
    except (ValueError, TypeError) as error:
        problems.append(f"{path or 'config'}: {error}")


def required(config_type: type) -> set[str]:
    """The fields of a dataclass that have no default.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Data:
      ...     path: str
      ...     shuffle: bool = True
      >>> required(Data)
      {'path'}
    """
    return {
        field.name
        for field in dataclasses.fields(config_type)
        if field.init and field.default is field.default_factory is dataclasses.MISSING
    }


def _items(convert: Convert, member: Any, items: Sequence[Any], path: str, problems: list[str]) -> Any:
    args = typing.get_args(member)
    annotations = args[:1] * len(items) if args[1:] == (...,) else args
    if len(annotations) != len(items):
        problems.append(f"{_field(path, items)} has {len(items)} values; expected {describe(member)}.")
        return None
    pairs = zip(annotations, items, strict=True)
    return [convert(inner, item, f"{path}[{i}]", problems) for i, (inner, item) in enumerate(pairs)]


def _entries(convert: Convert, annotation: Any, entries: Any, path: str, problems: list[str]) -> dict[str, Any]:
    problems += [
        f"{path}: the key {key!r} is not a str; mappings have str keys." for key in entries if type(key) is not str
    ]
    return {key: convert(annotation, item, f"{path}[{key!r}]", problems) for key, item in entries.items()}


def _scalar(member: Any, value: Any, path: str, problems: list[str]) -> Any:
    """The kinds that are the same in JSON: None, bool, int, float, str and the values of a Literal."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if member is float and is_number:
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{_field(path, value)} is not finite; a run's config must be a number that JSON can hold.")
        return float(value) if abs(value) < 2**1023 else value
    if member is int and isinstance(value, int) and is_number:
        return int(value)
    if typing.get_origin(member) is Literal:
        if any(value == choice and type(value) is type(choice) for choice in typing.get_args(member)):
            return value
    elif (member in (bool, type(None)) and type(value) is member) or (member is str and isinstance(value, str)):
        return str(value) if member is str else value
    raise _Mismatch
