"""Where people watch curves, captions and settings of runs: `run.trackers`. Only rank 0 has any."""

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from blipds.files.replacing import replace_text

IDS = "trackers.json"  # in the run directory: what wandb and mlflow call this run, so that a resumed run is the same
Row = tuple[Image.Image, str, Sequence[str]]  # an image, its caption, its references
Config = Mapping[str, Any]


class Tracker:
    """What the monitor calls; `where` tells a person where to look. Whatever fails may raise: the run goes on."""

    where: str

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def captions(self, step: int, split: str, rows: Sequence[Row], sheet: Image.Image) -> None:
        """`sheet` shows all rows."""

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard(Tracker):
    """Curves and contact sheets in `tensorboard/` of the run directory.

    With `resume_step` (the last step the checkpoint holds) what came after it is dropped: those steps are repeated.
    """

    def __init__(self, run_dir: Path, resume_step: int | None, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step, flush_secs=30)
        self.where = f"tensorboard --logdir {run_dir.parent}"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def captions(self, step: int, split: str, rows: Sequence[Row], sheet: Image.Image) -> None:
        import numpy

        self._writer.add_image(f"{split}/captions", numpy.asarray(sheet), step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB(Tracker):
    """Weights & Biases, as its own variables (WANDB_PROJECT, WANDB_MODE=offline, ...) say."""

    def __init__(self, run_dir: Path, resume_step: int | None, config: Config) -> None:
        import wandb

        settings = wandb.Settings(silent=True, console="off")
        if wandb.setup(settings).settings.mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("not logged in: type `wandb login`, or set WANDB_MODE=offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "blipds"),
            name=run_dir.name,
            id=_run_id(run_dir, "wandb", lambda: uuid.uuid4().hex),
            resume="allow",
            dir=run_dir,
            config=dict(config),
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")  # its own step cannot go back: scores come after later steps
        self.where = f"wandb sync {self._run.settings.sync_dir}" if self._run.offline else f"wandb {self._run.url}"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def captions(self, step: int, split: str, rows: Sequence[Row], sheet: Image.Image) -> None:
        import wandb

        data = [[wandb.Image(image), caption, "\n".join(references)] for image, caption, references in rows]
        self._run.log({"step": step, f"{split}/captions": wandb.Table(["image", "caption", "references"], data)})

    def close(self) -> None:
        self._run.finish()


class MLflow(Tracker):
    """MLflow, as its own variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ...) say."""

    def __init__(self, run_dir: Path, resume_step: int | None, config: Config) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        self._id = _run_id(run_dir, "mlflow", lambda: self._create(run_dir.name, config))
        self._client.update_run(self._id, status="RUNNING")
        self.where = f"mlflow run {self._id} at {mlflow.get_tracking_uri()}"

    def _create(self, run_name: str, config: Config) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "blipds")
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run_id: str = self._client.create_run(experiment_id, run_name=run_name).info.run_id
        self._client.log_dict(run_id, dict(config), "config.yaml")
        return run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in values.items()])

    def captions(self, step: int, split: str, rows: Sequence[Row], sheet: Image.Image) -> None:
        self._client.log_image(self._id, sheet, f"captions/{split}_step{step}.png")
        table = {"columns": ["caption", "references"], "data": [[row[1], list(row[2])] for row in rows]}
        self._client.log_dict(self._id, table, f"captions/{split}_step{step}.json")

    def close(self) -> None:
        self._client.set_terminated(self._id)


Make = Callable[[Path, int | None, Config], Tracker]
TRACKERS: dict[str, Make] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}  # named as their packages


def _run_id(run_dir: Path, tracker: str, create: Callable[[], str]) -> str:
    path = run_dir / IDS
    ids: dict[str, str] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if tracker not in ids:
        ids[tracker] = create()
        replace_text(path, json.dumps(ids) + "\n")
    return ids[tracker]
