"""Where numbers go to be looked at: TensorBoard always, Weights & Biases and MLflow when the config asks for them.

writes: `run/tensorboard/`; `run/wandb/` or `run/trackers.json`, which keeps the ids under which a run that is started
again goes on there. Costs: TensorBoard and W&B write in threads of their own, MLflow makes one request per record.
"""

from __future__ import annotations

import importlib.util
import json
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from cprec.config import MetricsConfig, MlflowConfig, RunConfig, WandbConfig
from cprec.errors import ConfigError
from cprec.format import write_atomically

IDS = "trackers.json"
_MLFLOW_PARAMS = 100
"""Most that MLflow takes in one request."""


class Tracker(Protocol):
    """A place that takes named numbers by step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def missing_packages(config: MetricsConfig) -> list[str]:
    """A sentence for each tracker that the config asks for and that is not installed."""
    wanted = {"metrics.wandb": ("wandb", config.wandb), "metrics.mlflow": ("mlflow", config.mlflow)}
    return [f"{field}: the package {package} is not installed: pip install 'cprec[{package}]'"
            for field, (package, asked) in wanted.items() if asked and importlib.util.find_spec(package) is None]


def open_trackers(run_dir: Path, config: RunConfig, *, resume_step: int) -> dict[str, Tracker]:
    """The trackers of a run, by name. Raises ConfigError when one of them cannot be reached as the config says."""
    trackers: dict[str, Tracker] = {"TensorBoard": TensorBoard(run_dir, resume_step)}
    for name, kind, asked in (("W&B", Wandb, config.metrics.wandb), ("MLflow", Mlflow, config.metrics.mlflow)):
        if asked is None:
            continue
        try:
            trackers[name] = kind(run_dir, asked, config)  # type: ignore[arg-type]
        except Exception as e:  # these packages raise all kinds of errors, mostly for want of a network or a login
            raise ConfigError(f"metrics: {name} does not start: {type(e).__name__}: {e}") from e
    return trackers


class TensorBoard:
    """Event files in `run/tensorboard/`; what was logged after `resume_step` is marked as not having been."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """One W&B run for a run folder, however often it is started. Steps that W&B has already it keeps as they are."""

    def __init__(self, run_dir: Path, asked: WandbConfig, config: RunConfig) -> None:
        import wandb

        known = _known_id(run_dir, "wandb")
        self._run = wandb.init(
            project=asked.project, name=asked.name or run_dir.name, id=known, resume="allow" if known else None,
            mode=asked.mode, dir=str(run_dir), config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"))
        _keep_id(run_dir, "wandb", self._run.id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """One MLflow run for a run folder, however often it is started."""

    def __init__(self, run_dir: Path, asked: MlflowConfig, config: RunConfig) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=asked.tracking_uri)
        self._run_id = _known_id(run_dir, "mlflow") or self._create(run_dir, asked, config)
        self._client.update_run(self._run_id, status="RUNNING")
        _keep_id(run_dir, "mlflow", self._run_id)

    def _create(self, run_dir: Path, asked: MlflowConfig, config: RunConfig) -> str:
        from mlflow.entities import Param

        experiment = self._client.get_experiment_by_name(asked.experiment)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(asked.experiment)
        run_id: str = self._client.create_run(experiment_id, run_name=asked.name or run_dir.name).info.run_id
        params = [Param(_allowed(k), v) for k, v in _leaves(config.model_dump(mode="json"))]
        for first in range(0, len(params), _MLFLOW_PARAMS):
            self._client.log_batch(run_id, params=params[first:first + _MLFLOW_PARAMS])
        return run_id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._client.log_batch(self._run_id, metrics=[Metric(_allowed(k), v, now_ms, step) for k, v in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def _allowed(name: str) -> str:
    """The name as MLflow takes it: other characters than these become underscores."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """The values of a nested mapping under dotted names, as text."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value)


def _known_id(run_dir: Path, tracker: str) -> str | None:
    path = run_dir / IDS
    ids = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return str(ids[tracker]) if tracker in ids else None


def _keep_id(run_dir: Path, tracker: str, run_id: str) -> None:
    path = run_dir / IDS
    ids = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_atomically(path, json.dumps({**ids, tracker: run_id}, indent=1) + "\n")
