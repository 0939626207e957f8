"""The two uses of tyro, which is imported inside them: building a configuration from flags, and `--help`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jaxdl.config.schema import ConfigError, describe, hints, is_section, variants
from jaxdl.config.text import read_text, to_words

_ABOUT = """--config=FILE takes the configuration from get_config() of a Python file.
Each flag below overrides one field of it."""


@dataclasses.dataclass(frozen=True)
class _Resume:
    """Going on with a saved run."""

    allow: tuple[str, ...] = ()
    """Fields or sections that may differ from the configuration of the saved run."""


def assemble(config_type: type, base: Any, words: Mapping[str, Sequence[str]]) -> Any:
    """Puts the values of flags into a configuration.

    Args:
      config_type: the dataclass of the configuration.
      base: the configuration that the flags override; it may lack attributes that `words` gives.
      words: by dotted path, words that `read_text` reads.

    Raises:
      ConfigError: a constructor in the tree refuses the values.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Loop:
      ...     seed: int = 0
      >>> assemble(Loop, Loop(), {"seed": ["3"]})
      Loop(seed=3)
    """
    argv = []
    for path, value in words.items():
        argv += [f"--config.{path}={value[0]}"] if len(value) == 1 else [f"--config.{path}", *value]
    try:
        return _run_tyro(config_type, base, argv, console_outputs=False).config
    except SystemExit as error:  # tyro exits; the reason is what it was handling
        reason: BaseException | None = error
        while reason is not None and not isinstance(reason, ValueError):
            reason = reason.__context__
        raise ConfigError(str(reason or f"tyro refuses {' '.join(argv)}; set these values in a config file")) from None


def print_help(config_type: type, base: Any, prog: str | None, notes: Sequence[str] = ()) -> NoReturn:
    """Prints every flag with its type, default and meaning, and exits with 0.

    Args:
      config_type: the dataclass of the configuration.
      base: the configuration whose values are the defaults; it may lack attributes.
      prog: the program's name; None takes that of the process.
      notes: lines to print above the flags.
    """
    _run_tyro(config_type, base, ["--help"], prog=prog, description="\n".join([_ABOUT, *notes]))
    raise SystemExit(0)


def _run_tyro(config_type: type, base: Any, argv: Sequence[str], **options: Any) -> Any:
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def _leaf(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if variants(info.type):
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar=describe(info.type),
            instance_from_str=lambda words: read_text(info.type, words),
            is_instance=lambda value: True,
            str_from_instance=to_words,
        )

    command = dataclasses.make_dataclass("Command", [("config", config_type), ("resume", _Resume)], frozen=True)
    markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    default = command(_filled(base, tyro.MISSING), _Resume())
    return tyro.cli(
        command, args=argv, default=default, registry=registry, config=markers, use_underscores=True, **options
    )


def _filled(config: Any, filler: Any) -> Any:
    """A copy that has tyro's mark for "required" wherever a blank configuration lacks a value."""
    copy = object.__new__(type(config))
    for name, annotation in hints(type(config)).items():
        inside = variants(annotation)
        value = getattr(config, name, filler)
        if value is filler and inside:
            value = object.__new__(inside[0])
        object.__setattr__(copy, name, _filled(value, filler) if is_section(value) else value)
    return copy
