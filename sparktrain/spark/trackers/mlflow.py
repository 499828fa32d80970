"""MLflow: a run with the settings as parameters, curves, the run directory's tables, and the model, ready to serve.

Where and as what is MLflow's own to say: ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``, or ``mlflow.set_...``
before the run. Inside ``with mlflow.start_run():`` a run is a child of that one.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from sparktrain.config import RunConfig
from sparktrain.errors import Stopped
from sparktrain.pulse import Stretch
from sparktrain.results import RunResult
from sparktrain.rundir import RunDir
from sparktrain.spark.trackers.contract import CURVES
from sparktrain.storage import at_hand

_TAG = "sparktrain.run_id"
_DIRECTORY = "sparktrain.directory"
_SERVED_BY = "sparktrain.train.served"
_PARAMETERS_AT_ONCE = 100
# MLflow's own defaults ask a server that is away for four minutes.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}


class Mlflow:
    """Uses MLflow's global functions in one thread, where the active run is that thread's own."""

    package: ClassVar[str] = "mlflow"

    def __init__(self, config: RunConfig, directory: RunDir) -> None:
        self._mlflow, self._config, self._directory = _mlflow(), config, directory
        active = self._mlflow.active_run()
        self._parent = active.info.run_id if active else None

    def start(self) -> None:
        mlflow, known = self._mlflow, self._directory.run_id()
        before: Any = mlflow.search_runs(filter_string=f"tags.`{_TAG}` = '{known}'", output_format="list")
        if before:
            mlflow.start_run(run_id=before[0].info.run_id)
        else:
            mlflow.start_run(run_name=self._directory.path.name, parent_run_id=self._parent)
        mlflow.set_tags({_TAG: known, "sparktrain.run_dir": str(self._directory.path), **_versions()})
        # A parameter cannot change, but where a run goes on, how it is launched may.
        said = before[0].data.params if before else {}
        params = _flat(self._config.model_dump(mode="json"))
        new = [(name, value) for name, value in params.items() if name not in said]
        for begin in range(0, len(new), _PARAMETERS_AT_ONCE):
            mlflow.log_params(dict(new[begin : begin + _PARAMETERS_AT_ONCE]))

    def log(self, stretch: Stretch) -> None:
        self._mlflow.log_metrics({name: float(getattr(stretch, name)) for name in CURVES}, step=stretch.step)

    def finish(self, result: RunResult) -> None:
        mlflow, summary = self._mlflow, result.summary()
        numbers = {name: float(value) for name, value in summary.items() if isinstance(value, int | float)}
        mlflow.log_metrics({f"final.{name}": value for name, value in numbers.items()}, step=self._config.train.steps)
        for file in ("config.json", "result.json", "metrics.parquet"):
            with at_hand(self._directory.path / file) as here:
                mlflow.log_artifact(str(here))
        with at_hand(self._directory.model) as model:
            self._log_model(model)
        mlflow.end_run()

    def fail(self, error: BaseException) -> None:
        if self._mlflow.active_run() is None:
            return  # it was finished before, and a tag would begin another one
        stopped = not isinstance(error, Exception) or getattr(error, "exit_code", None) == Stopped.exit_code
        self._mlflow.set_tag("sparktrain.error", f"{type(error).__name__}: {error}"[:500])
        self._mlflow.end_run("KILLED" if stopped else "FAILED")

    def _log_model(self, path: Path) -> None:
        """As a function from prompts to texts where there is a tokenizer, else as files."""
        import mlflow.pyfunc
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

        if not (path / "tokenizer.json").exists():
            mlflow.log_artifacts(str(path), "model")
            return
        code = importlib.util.find_spec(_SERVED_BY)
        assert code is not None
        column = Schema([ColSpec(DataType.string)])
        params = [
            ParamSpec("max_new_tokens", DataType.long, 64),
            ParamSpec("temperature", DataType.double, 0.0),
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # advice to let MLflow guess what is said here
            mlflow.pyfunc.log_model(
                name="model",
                python_model=code.origin,
                artifacts={"model": str(path)},
                signature=ModelSignature(column, column, ParamSchema(params)),
                # Named, or MLflow would load the model here to find out.
                pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "transformers")],
            )


@contextlib.contextmanager
def parent(directory: Path) -> Iterator[None]:
    """An MLflow run of which runs inside are children; what files ``directory`` has in the end are its artifacts. It is
    the same run where the directory is there already and has had one."""
    mlflow, here = _mlflow(), str(directory.absolute())
    known = f'tags.`{_DIRECTORY}` = "{here}"'
    before = mlflow.search_runs(filter_string=known, output_format="list") if directory.exists() else []
    if before:
        mlflow.start_run(run_id=before[0].info.run_id, nested=True)
    else:
        mlflow.start_run(run_name=directory.name, nested=True, tags={_DIRECTORY: here})
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
        with contextlib.suppress(mlflow.MlflowException):
            for file in sorted(directory.glob("[!.]*.*")):
                if file.is_file():
                    mlflow.log_artifact(str(file))
    finally:
        with contextlib.suppress(mlflow.MlflowException):  # its server went away meanwhile: the runs do not mind
            mlflow.end_run(status)


def _mlflow() -> Any:
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    import mlflow

    return mlflow


def _versions() -> dict[str, str]:
    return {f"version.{name}": importlib.metadata.version(name) for name in ("sparktrain", "pyspark", "torch")}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """``section.key`` as the command line says it; MLflow takes texts of up to 6,000 characters."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = str(value)[:6000]
    return flat
