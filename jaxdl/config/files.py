"""Config files: Python modules with a `get_config()` that returns a configuration."""

import dataclasses
import sys
import traceback
import types
from pathlib import Path
from typing import Any

from jaxdl.config.values import encode
from jaxdl.paths import nearest


def load_config(file: str, config_type: type) -> tuple[Any, list[str]]:
    """Runs a config file and returns what its `get_config()` returns.

    Args:
      file: path of the file, relative to the working directory or absolute.
      config_type: the dataclass that it must return.

    Returns:
      `(config, problems)`: the configuration, or None with a line for each reason: there is no such file, it has no
      `get_config()`, it raises, or it returns another type or values that do not fit the annotations.

    Example:
      >>> load_config("nowhere/mlp.py", Path)[1]
      ['config file nowhere/mlp.py: there is no folder nowhere; paths are relative to the working directory.']
    """
    config, problems = _load(file, config_type.__name__)
    if not problems and type(config) is not config_type:
        wanted, got = (f"{kind.__module__}.{kind.__qualname__}" for kind in (config_type, type(config)))
        problems = [f"get_config() returns a {got}; expected {wanted}."]
    elif not problems:
        encode(config_type, config, "", problems)
    return (None if problems else config), [f"config file {file}: {problem}" for problem in problems]


def config_type_of(file: str) -> tuple[type | None, list[str]]:
    """Runs a config file and tells the dataclass of its configuration, whichever experiment it is of.

    Args:
      file: as for `load_config`.

    Returns:
      `(config_type, problems)`, None with a line for each reason.

    Example:
      >>> config_type_of("nowhere/mlp.py")[1]
      ['config file nowhere/mlp.py: there is no folder nowhere; paths are relative to the working directory.']
    """
    config, problems = _load(file)
    if not problems and not dataclasses.is_dataclass(type(config)):
        problems = [f"get_config() returns a {type(config).__name__}; expected the Config of an experiment."]
    return (None if problems else type(config)), [f"config file {file}: {problem}" for problem in problems]


def _load(file: str, kind: str = "Config") -> tuple[Any, list[str]]:
    path = Path(file)
    if not path.is_file():
        return None, [_not_there(path)]
    try:
        get_config = getattr(_run(path), "get_config", None)
        if not callable(get_config):
            return None, [f"it has no get_config(); write `def get_config(): return {kind}(...)` in it."]
        return get_config(), []
    except (Exception, SystemExit) as error:
        return None, [_raised(error, path)]


def _not_there(path: Path) -> str:
    if path.is_dir():
        return "it is a folder; name a file in it."
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}; paths are relative to the working directory."
    beside = nearest(path.name, [other.name for other in path.parent.glob("*.py")])
    shown = ", ".join(str(path.parent / name) for name in beside) or "none, there is no Python file beside it"
    return f"it is not there; nearest files: {shown}."


def _run(path: Path) -> types.ModuleType:
    """Executes the file itself, since an import would leave a `__pycache__` beside it."""
    module = types.ModuleType(f"jaxdl_config_file_{path.stem}")
    module.__file__ = str(path)
    _name_main_module()
    sys.modules[module.__name__] = module  # dataclasses look up the module of the class they decorate
    exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), module.__dict__)
    return module


def _name_main_module() -> None:
    """Lets a config file import the experiment that `python -m` runs without making its classes a second time."""
    main = sys.modules["__main__"]
    if main.__spec__ is not None:
        sys.modules.setdefault(main.__spec__.name, main)


def _raised(error: BaseException, path: Path) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == str(path) else (lines or [None])[-1]
    where = f" in line {line}" if line else ""
    what = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"it raises {type(error).__name__}{where}: {what}."
