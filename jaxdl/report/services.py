"""Writers for two services whose clients are extras: Weights & Biases and MLflow."""

from collections.abc import Mapping
from typing import Any

from jaxdl.report.history import WriterError, checked_row


class WandbWriter:
    """A Weights & Biases run (extra: `pip install 'jaxdl[wandb]'`).

    The service keeps what was logged, so `resume` cannot take rows back. The charts' axis is the logged `step`, so the
    rows that are computed again lie upon the ones before.

    Args:
      project: the project's name.
      settings: further keywords of `wandb.init`: `name`, `dir`, `mode="offline"`, `id` and `resume="allow"` to go on
        with one run after a restart.

    Raises:
      WriterError: wandb is not installed.

    Example:
      >>> writer = WandbWriter(project="digits", mode="offline")  # doctest: +SKIP
    """

    def __init__(self, project: str, **settings: Any):
        wandb = _import_extra("wandb", extra="wandb")
        self._run = wandb.init(project=project, **settings)
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(checked_row(step, scalars))

    def flush(self) -> None:
        """Does nothing: the client sends in the background."""

    def close(self) -> None:
        self._run.finish()

    def resume(self, step: int) -> None:
        """Does nothing: see the class."""


class MlflowWriter:
    """An MLflow run (extra: `pip install 'jaxdl[mlflow]'`).

    MLflow keeps every value that was logged at a step and shows the latest, so `resume` has nothing to do.

    Args:
      experiment: the experiment's name.
      run_id: the run to go on with; a new one if `None`.
      tracking_uri: a server's address, or `sqlite:///mlflow.db` (which needs the full `mlflow` package); MLflow's own
        default if `None`.

    Raises:
      WriterError: mlflow is not installed.

    Example:
      >>> writer = MlflowWriter(experiment="digits")  # doctest: +SKIP
    """

    def __init__(self, experiment: str, *, run_id: str | None = None, tracking_uri: str | None = None):
        mlflow = _import_extra("mlflow", extra="mlflow")
        self._client = mlflow.MlflowClient(tracking_uri=tracking_uri)
        self.run_id = run_id or self._client.create_run(self._experiment_id(experiment)).info.run_id

    def _experiment_id(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return self._client.create_experiment(name) if found is None else found.experiment_id

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        row = checked_row(step, scalars)
        for name, value in row.items():
            if name != "step":
                self._client.log_metric(self.run_id, name, value, step=row["step"])

    def flush(self) -> None:
        """Does nothing: every value is sent as it is written."""

    def close(self) -> None:
        self._client.set_terminated(self.run_id)

    def resume(self, step: int) -> None:
        """Does nothing: see the class."""


def _import_extra(module: str, *, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise WriterError(
            f"{module} is not installed; pip install 'jaxdl[{extra}]', or choose another writer."
        ) from error
