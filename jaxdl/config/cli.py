"""The command line of an experiment: a config file chooses the values, flags override them."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from jaxdl.config.files import load_config
from jaxdl.config.flags import Flag, read_flags, split_flags
from jaxdl.config.resume import leaf_values, unknown_names
from jaxdl.config.schema import (
    ConfigError,
    check_schema,
    describe,
    hints,
    is_section,
    leaves,
    members,
    nearest_names,
    sections,
    variants,
)
from jaxdl.config.text import read_text
from jaxdl.config.tyro_cli import assemble, print_help
from jaxdl.config.values import encode, required

T = TypeVar("T")
_MISSING = object()


@dataclasses.dataclass(frozen=True)
class Parsed(Generic[T]):
    """What the command line came to.

    Args:
      config: the configuration, checked.
      file: the config file as it was written, or None.
      sources: where each leaf's value is from: `"default"`, the file as it was written, or `"command line"`.
      allow: the names behind `--resume.allow`, for `check_resume`.

    Example:
      >>> Parsed(config=None, file=None, sources={}).allow
      ()
    """

    config: T
    file: str | None
    sources: Mapping[str, str]
    allow: tuple[str, ...] = ()


def parse(
    config_type: type[T], argv: Sequence[str] | None = None, *, default: T | None = None, prog: str | None = None
) -> Parsed[T]:
    """Reads a configuration from the command line; nothing else is read than the config file that it names.

    Written `--config=configs/x.py --config.section.field=value`; a space may stand for `=` and `-` for `_`. Tuples are
    `64 64`, `64,64` or `(64, 64)`; bools `=true`, `=false`, `--config.x.flag` or `--config.x.no-flag`. A section with
    variants has the fields of the variant that the file chose. `--help` prints every field and exits with 0.

    Args:
      config_type: a frozen dataclass. Each dataclass in it may define `problems()`, which returns a line for each
        impossible combination of its values.
      argv: the words after the program's name; None takes those of the process.
      default: the configuration to override where no file is named; None takes the defaults of `config_type`.
      prog: the program's name in the help.

    Raises:
      ConfigError: everything wrong with the command line, the file and the combination of values, in one message.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Loop:
      ...     n_steps: int = 100
      ...     seed: int = 0
      >>> parsed = parse(Loop, ["--config.n-steps=5"])
      >>> parsed.config, parsed.sources
      (Loop(n_steps=5, seed=0), {'n_steps': 'command line', 'seed': 'default'})
    """
    check_schema(config_type)
    flags, problems = split_flags(sys.argv[1:] if argv is None else argv)
    by_name = {name: [flag for flag in flags if flag.name == name] for name in ("config", "resume.allow", "help", "h")}
    file, base, file_problems = _base(config_type, by_name["config"], default)
    if by_name["help"] or by_name["h"]:
        print_help(config_type, _blank(config_type) if base is None else base, prog, file_problems)
    problems = file_problems + problems
    allow = _allow(by_name["resume.allow"], config_type, problems)
    words = _words([flag for flag in flags if flag.name not in by_name], config_type, base, problems)
    config: Any = None if base is None else _build(config_type, base, words, problems)
    if problems:
        raise ConfigError.listing("config", problems)
    return Parsed(config, file, _sources(config_type, config, words, file), allow)


def _base(config_type: type, flags: list[Flag], default: Any) -> tuple[str | None, Any, list[str]]:
    """The file's name, the configuration that the flags override (None if it is unusable), and problems."""
    problems = []
    if len(flags) > 1:
        problems.append(f"--config is given {len(flags)} times ({', '.join(map(str, flags))}); give it once.")
    if flags and (len(flags[0].words) != 1 or not flags[0].words[0]):
        problems.append(f"{flags[0]}: expected one config file; write --config=configs/NAME.py.")
    if problems:
        return None, None, problems
    if not flags:
        return None, *_checked_default(config_type, default)
    file = flags[0].words[0]
    return file, *load_config(file, config_type)


def _checked_default(config_type: type, default: Any) -> tuple[Any, list[str]]:
    problems: list[str] = []
    if default is None:
        default = _blank(config_type)
        if _missing(default):
            return default, []
        with _collecting(problems, "config"):
            default = _finished(default)
    encode(config_type, default, "", problems)
    return None if problems else default, problems


@contextlib.contextmanager
def _collecting(problems: list[str], path: str) -> Iterator[None]:
    """Turns what a constructor or a `problems()` of the schema raises into a problem line."""
    try:
        yield
    except Exception as error:
        shown = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        problems.append(f"{path}: {shown}")


def _blank(config_type: type) -> Any:
    """An object with the defaults, made without the constructor; it lacks the attributes of fields without default."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_type):
        choices = variants(hints(config_type).get(field.name))
        if not field.init:
            continue
        if field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
        elif len(choices) == 1 and len(members(hints(config_type)[field.name])) == 1:
            values[field.name] = _blank(choices[0])
    blank: Any = object.__new__(config_type)
    for name, value in values.items():
        object.__setattr__(blank, name, value)
    return blank


def _finished(blank: Any) -> Any:
    """The same by the constructors."""
    made = {name: _finished(getattr(blank, name)) for name in required(type(blank))}
    return type(blank)(**made)


def _missing(config: Any) -> list[str]:
    """The dotted paths of the fields that a blank configuration lacks."""
    found = []
    for name in hints(type(config)):
        if not hasattr(config, name):
            found.append(name)
        elif is_section(getattr(config, name)):
            found += [f"{name}.{path}" for path in _missing(getattr(config, name))]
    return found


def _allow(flags: list[Flag], config_type: type, problems: list[str]) -> tuple[str, ...]:
    if not flags:
        return ()
    if len(flags) > 1:
        problems.append(f"--resume.allow is given {len(flags)} times; give it once, with several names.")
    allow = tuple(name.replace("-", "_") for name in read_text(tuple[str, ...], flags[0].words or ("()",)))
    if not allow:
        problems.append("--resume.allow has no value; name the fields that may change.")
    problems += unknown_names(allow, config_type)
    return allow


def _words(flags: list[Flag], config_type: type, base: Any, problems: list[str]) -> dict[str, tuple[str, ...]]:
    """The words of the good flags by dotted path."""
    for flag in flags:
        if flag.name.partition(".")[0] != "config" and flag.written.startswith("--"):
            fields = leaves(config_type, base)
            near_names = nearest_names(flag.name, ["help", "resume.allow", "config", *fields])
            near = ", ".join(f"--config.{name}" if name in fields else f"--{name}" for name in near_names)
            problems.append(f"{flag.written}: no such flag; nearest: {near}; see --help.")
    words, wrong = read_flags([flag for flag in flags if flag.name.startswith("config.")], config_type, base)
    problems += wrong
    return words


def _build(config_type: type, base: Any, words: Mapping[str, Sequence[str]], problems: list[str]) -> Any:
    """The configuration with the flags' values, and what its sections say about it; None if it cannot be built."""
    fields = leaves(config_type, base)
    lacking = [path for path in _missing(base) if path not in words]
    for path in lacking:
        how = f"--config.{path}=VALUE ({describe(fields[path])})" if path in fields else "it in a config file"
        problems.append(f"config.{path} has no value and no default; give {how}.")
    if lacking:
        return None
    config = None if words else base
    if words:
        with _collecting(problems, "config"):
            config = assemble(config_type, base, words)
    for path, section in sections(config):
        where = f"config.{path}".rstrip(".")
        with _collecting(problems, where):
            lines = section.problems() if hasattr(section, "problems") else ()
            problems += [f"{where}: {line}" for line in ([lines] if isinstance(lines, str) else lines or ())]
    return config


def _sources(config_type: type, config: Any, words: Iterable[str], file: str | None) -> dict[str, str]:
    """A leaf is the file's where it differs from the default of `config_type`, or where that has no such leaf."""
    before = _blank(config_type)
    sources = {}
    for path in leaf_values(config):
        is_default = file is None or _get(before, path) == _get(config, path)
        sources[path] = "command line" if path in words else "default" if is_default else str(file)
    return sources


def _get(config: Any, path: str) -> Any:
    """The value at a dotted path, or an object equal to nothing else; the variants on the way are part of it."""
    kinds = []
    for name in path.split("."):
        kinds.append(type(config))
        config = getattr(config, name, _MISSING)
    return kinds, config
