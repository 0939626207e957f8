"""Values of a configuration as words of the command line."""

import ast
import collections.abc
import enum
import math
import typing
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, Literal

from jaxdl.config.duration import Duration
from jaxdl.config.schema import ConfigError, describe, is_kind, is_section, members
from jaxdl.config.values import decode

_OPENINGS = ("(", "[", "{")


def read_text(annotation: Any, words: Sequence[str]) -> Any:
    """Reads the words behind a flag as a value of the annotated type.

    A tuple is written as words (`64 64`), with commas (`64,64`) or as a Python literal (`(64, 64)`); tuples of tuples
    and mappings as a Python literal. A bool without a word is true. `None` is None where the annotation allows it.

    Args:
      annotation: the type of the field.
      words: what the shell split the value into.

    Raises:
      ConfigError: says what was expected, without naming the flag.

    Example:
      >>> read_text(tuple[int, ...], ["64", "64"]), read_text(float | None, ["3e-4"]), read_text(bool, [])
      ((64, 64), 0.0003, True)
    """
    candidates = sorted(members(annotation), key=_reading_order)
    reasons: list[str] = []
    for member in candidates:
        try:
            return _read_member(member, list(words))
        except ValueError as error:
            reasons.append(str(error))
    expected = f"expected {describe(annotation)}"
    is_plain = len(candidates) == 1 and reasons[0]
    raise ConfigError(f"{expected}: {reasons[0]}" if is_plain else expected)


def _reading_order(member: Any) -> int:
    """None first and text last, since text would take every word."""
    return 0 if member is type(None) else 2 if member is str or is_kind(member, PurePath) else 1


def _read_member(member: Any, words: list[str]) -> Any:
    """Raises ValueError with a reason, empty where the expected type says it all."""
    origin, args = typing.get_origin(member), typing.get_args(member)
    if is_section(member) or any(map(is_section, args)):
        raise ValueError("a section cannot be written on the command line; set it in a config file")
    if member is Duration:
        return Duration(" ".join(words))
    if origin is tuple or origin in (dict, collections.abc.Mapping):
        is_literal = len(words) == 1 and words[0].startswith(_OPENINGS)
        return _read_literal(member, words[0]) if is_literal else _read_tuple(member, args, words)
    if member is bool and not words:
        return True
    if len(words) != 1:
        raise ValueError(f"it takes one value, not {len(words)}")
    return _read_word(member, words[0])


def _read_literal(member: Any, word: str) -> Any:
    try:
        data = ast.literal_eval(word)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise ValueError("it is not a Python literal; put quotes around each text in it") from None
    problems: list[str] = []
    value = decode(member, data, "value", problems)
    if problems:
        raise ValueError("; ".join(problems).removesuffix("."))
    return value


def _read_tuple(member: Any, args: tuple[Any, ...], words: list[str]) -> Any:
    inner_origins = [typing.get_origin(inner) for arg in args if arg is not ... for inner in members(arg)]
    if typing.get_origin(member) is not tuple or any(origin in (tuple, dict) for origin in inner_origins):
        raise ValueError("write it as a Python literal")
    if not words:
        raise ValueError("its value is missing; the empty tuple is written '()'")
    if len(words) == 1 and "," in words[0]:
        words = [word.strip() for word in words[0].removesuffix(",").split(",")]
    annotations = args[:1] * len(words) if args[1:] == (...,) else args
    if len(annotations) != len(words):
        raise ValueError(f"it takes {len(annotations)} values, not {len(words)}")
    pairs = zip(annotations, words, strict=True)
    wrong = [word for inner, word in pairs if not _can_read(inner, word)]
    if wrong:
        raise ValueError(f"not so {', '.join(map(repr, wrong))}")
    return tuple(read_text(inner, [word]) for inner, word in zip(annotations, words, strict=True))


def _can_read(annotation: Any, word: str) -> bool:
    try:
        read_text(annotation, [word])
    except ConfigError:
        return False
    return True


def _read_word(member: Any, word: str) -> Any:
    if member is str or is_kind(member, PurePath):
        return member(word)
    if member is type(None):
        choices: dict[str, Any] = {"None": None, "none": None, "null": None}
    elif member is bool:
        choices = {"true": True, "True": True, "false": False, "False": False}
    elif typing.get_origin(member) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(member)}
    elif is_kind(member, enum.Enum):
        choices = dict(member.__members__)
    else:
        return _read_number(member, word)
    if word not in choices:
        raise ValueError("")
    return choices[word]


def _read_number(member: Any, word: str) -> int | float:
    try:
        number = member(word)
    except ValueError:
        raise ValueError("") from None
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError("it must be finite")
    return number


def to_words(value: Any) -> list[str]:
    """Writes a value as `read_text` reads it, for the defaults in `--help`.

    Example:
      >>> to_words((64, 64)), to_words(True), to_words((("a", 1),)), to_words(Duration(5))
      (['64', '64'], ['true'], ['(("a", 1),)'], ['5 steps'])
    """
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, enum.Enum):
        return [value.name]
    if isinstance(value, tuple) and value and not any(isinstance(item, (tuple, dict)) for item in value):
        return [word for item in value for word in to_words(item)]
    if isinstance(value, (tuple, dict)):
        literal = repr(value)
        return [literal if '"' in literal else literal.replace("'", '"')]  # reads better inside the shell's quotes
    return [str(value)]
