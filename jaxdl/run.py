"""The folder of a run: its configuration, environment, metric log, checkpoints and report."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jaxdl import paths
from jaxdl.checkpoint import Store
from jaxdl.config import ConfigError, check_resume, from_json, leaf_values, to_json
from jaxdl.errors import JaxdlError
from jaxdl.optim import multipliers
from jaxdl.parallel import processes
from jaxdl.paths import Rules, Tree
from jaxdl.report.environment import environment
from jaxdl.report.progress import Progress
from jaxdl.report.writers import CsvWriter, JsonlWriter, TensorBoardWriter, Writer

_OF_A_PROCESS = ("parallel.coordinator", "parallel.process_index")  # fields that may differ between processes


class Run:
    """Opens or continues a run folder.

    Args:
      directory: made where it does not exist.
      config: a frozen dataclass; a folder with checkpoints must hold the same one but for the fields in `allow`,
        `out`, for a folder may be moved, and `parallel`, for a run may go on with other devices.
      total_steps: the planned updates, for the progress line.
      batch_size: rows of a step, for the rate of examples.
      allow: dotted config fields that may differ from the saved run's.
      keep_last, keep_best, best_metric, best_mode: as for `checkpoint.Store`.
      is_verbose: show progress and notes.

    Where there are many processes, the first one writes; the others have no writers and show no progress.

    Attributes:
      store, writers, progress: what `loop.fit` takes.

    Raises:
      JaxdlError: the folder cannot be written.
      ConfigError: the saved configuration differs.
      ProcessError: the processes have different configurations, or see different checkpoints.
    """

    def __init__(
        self,
        directory: str | Path,
        config: Any,
        *,
        total_steps: int,
        batch_size: int,
        allow: Sequence[str] = (),
        keep_last: int = 3,
        keep_best: int = 1,
        best_metric: str | None = None,
        best_mode: str = "max",
        is_verbose: bool = True,
    ) -> None:
        self.directory = Path(directory)
        self._is_first = processes.is_first()
        processes.led("opening the run folder", lambda: _check_writable(self.directory), error=JaxdlError)
        self._config_path = self.directory / "config.json"
        self._config_before = self._config_path.read_bytes() if self._config_path.exists() else None
        self.store = Store(
            self.directory / "checkpoints",
            keep_last=keep_last,
            keep_best=keep_best,
            best_metric=best_metric,
            best_mode=best_mode,
        )
        self._steps_before = self.store.steps()
        notes = _settle_config(self._config_path, config, allow) if self._steps_before else []
        _agree(self.directory, config, self._steps_before)
        self.environment = environment()
        self.writers: list[Writer] = []
        if self._is_first:
            replace_text(self._config_path, to_json(config))
            replace_text(self.directory / "environment.json", json.dumps(self.environment, indent=2) + "\n")
            self.writers = [
                JsonlWriter(self.directory / "metrics.jsonl"),
                CsvWriter(self.directory / "metrics.csv"),
                TensorBoardWriter(self.directory / "tensorboard"),
            ]
        start, is_shown = max(self._steps_before, default=0), is_verbose and self._is_first
        self.progress = Progress(total_steps, start, examples_per_step=batch_size) if is_shown else None
        if start >= total_steps:
            notes.append(f"{self.directory} is complete; delete it or choose another --config.out to train anew")
        for note in notes:
            if self.progress is not None:
                self.progress.note(note)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self.writers:
            writer.close()
        if self.progress is not None:
            self.progress.close()
        is_refused = isinstance(error, JaxdlError) and error.exit_code == 2
        if self._is_first and is_refused and self.store.steps() == self._steps_before:
            self._forget_config()
        self.store.__exit__(kind, error, trace)

    def _forget_config(self) -> None:
        """Nothing was begun with this configuration: the saved one still is that of the checkpoints."""
        if self._config_before is None:
            self._config_path.unlink(missing_ok=True)
        else:
            self._config_path.write_bytes(self._config_before)


def _check_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".jaxdl-probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise JaxdlError(f"the run folder {directory} cannot be written: {error.strerror}; choose another.") from None


def _agree(directory: Path, config: Any, steps: list[int]) -> None:
    """All processes have read what is there before the first one writes."""
    fields = {name: repr(value) for name, value in leaf_values(config).items() if name not in _OF_A_PROCESS}
    digest = hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:12]
    processes.agree("the configuration", digest, "give all the same flags.")
    processes.agree("the list of checkpoints", steps, f"all must see the same folder {directory}.")


def _settle_config(path: Path, config: Any, allow: Sequence[str]) -> list[str]:
    """Compares with the configuration that the checkpoints were made with; folder and devices may be others."""
    try:
        saved = from_json(type(config), path.read_text())
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise JaxdlError(
            f"{path} is missing, damaged or of another experiment. Restore it from a backup, or start in another "
            f"folder.\n{error}"
        ) from None
    if hasattr(config, "out"):
        saved = dataclasses.replace(saved, out=config.out)
    if hasattr(config, "parallel"):
        saved = dataclasses.replace(saved, parallel=saved.parallel.moved_to(config.parallel))
    return check_resume(saved, config, allow=allow)


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one piece: whoever reads it sees the old text or the new one.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "a.txt"
      >>> replace_text(path, "hello"); path.read_text()
      'hello'
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def parameter_rows(
    params: Tree,
    *,
    trainable: Rules,
    weight_decay_rules: Rules | None = None,
    lr_scale_rules: Rules | None = None,
) -> list[dict[str, Any]]:
    """Every verdict of the rules on every parameter, a dict each, for `report.table.parameter_table`.

    Args:
      params: tree of arrays or `jax.ShapeDtypeStruct`s.
      trainable, weight_decay_rules, lr_scale_rules: as for `make_train_step` and `make_optimizer`.

    Raises:
      RuleError: a rule list does not fit.

    Example:
      >>> import numpy as np
      >>> parameter_rows({"w": np.ones(2)}, trainable=[(".*", True)])[0]["path"]
      'w'
    """
    moves = paths.match(trainable, params, what="trainable")
    moving, _ = paths.split(params, moves)
    decay = paths.flatten(multipliers(weight_decay_rules, moving, what="weight_decay"))
    scale = {} if lr_scale_rules is None else paths.flatten(multipliers(lr_scale_rules, moving, what="lr_scale"))
    return [
        {
            "path": path,
            "shape": tuple(leaf.shape),
            "dtype": str(leaf.dtype),
            "trainable": path in decay,
            "decay": decay.get(path, 0.0),
            "lr_scale": scale.get(path, 1.0) if path in decay else 0.0,
        }
        for path, leaf in paths.flatten(params).items()
    ]
