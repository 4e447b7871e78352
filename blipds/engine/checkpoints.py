"""A run's checkpoints: `step_N` folders, and the links `latest` and `best` to two of them."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from blipds import distributed
from blipds.engine.engine import Engine
from blipds.errors import UserError
from blipds.models.geometry import constants_of

STATE = "state.json"
WEIGHTS = "model.safetensors"  # fp32, whole, whatever the ZeRO stage: what evaluation and export read
RESUME = "engine"  # DeepSpeed's own files, one or more a rank


class CheckpointFolder:
    """`<run directory>/checkpoints`. Keeps the latest and the best checkpoint, and no other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, engine: Engine, run: dict[str, Any], shape: dict[str, Any], best: bool) -> None:
        """Writes `step_N` under a temporary name, renames it, and moves `latest` (and `best`) to it. Collective."""
        name = f"step_{run['global_step']:08d}"
        target, partial = self.folder / name, self.folder / f"{name}.partial"
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        distributed.barrier()
        engine.save(partial, RESUME)
        is_main = distributed.is_main()
        weights = {name: weight for name, weight in engine.weights() if is_main}
        if is_main:
            constants = json.dumps(constants_of(engine.model))  # type: ignore[arg-type]
            save_file(weights, partial / WEIGHTS, metadata={"format": "blipds", "config": constants})
            (partial / WEIGHTS).chmod(0o644)  # safetensors leaves it to its owner alone
            (partial / STATE).write_text(json.dumps({"run": run, "shape": shape}, indent=2))
        distributed.barrier()
        if is_main:
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            self.point("latest", name)
            if best:
                self.point("best", name)
            self.prune()
        distributed.barrier()

    def point(self, link: str, name: str) -> None:
        """Replaces a link atomically."""
        partial = self.folder / f"{link}.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(name)
        partial.replace(self.folder / link)

    def prune(self) -> None:
        kept = {(self.folder / link).resolve() for link in ("latest", "best")}
        for folder in self.folder.glob("step_*"):
            if folder.resolve() not in kept:
                shutil.rmtree(folder)


def shape_of(engine: Engine, global_batch: int) -> dict[str, Any]:
    """What must be the same when a run goes on: DeepSpeed's files fit nothing else, and the data's order follows."""
    return {
        "ranks": distributed.world_size(),
        "zero_stage": engine.stage,
        "precision": engine.precision,
        "global_batch": global_batch,
    }


def read_state(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """{"run": where the run stood, "shape": see `shape_of`} of a run's checkpoint."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        return {"run": dict(state["run"]), "shape": dict(state["shape"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint} is no checkpoint of a run ({STATE}: {error})") from error


def load_engine(engine: Engine, checkpoint: Path, shape: dict[str, Any]) -> None:
    """Brings the engine back to a checkpoint of the same shape. Collective."""
    written = read_state(checkpoint)["shape"]
    for key, here in shape.items():
        if written.get(key) != here:
            raise UserError(f"{checkpoint} was written with {key} {written.get(key)}, but this run has {here}")
    engine.load(checkpoint, RESUME)


def find_checkpoint(location: str, link: str) -> str:
    """The checkpoint meant by a run directory or its `checkpoints` folder: where `link` points. Others as they are.

    A run without a best checkpoint (nothing was scored) has a latest one.
    """
    path = Path(location).expanduser()
    for candidate in (path / "checkpoints" / link, path / link, path / "checkpoints" / "latest", path / "latest"):
        if candidate.exists():
            return str(candidate.resolve())
    return location


def newest_run(output_dir: Path) -> Path | None:
    """The run directory below `output_dir` whose latest checkpoint is the newest."""
    links = sorted(output_dir.glob("*/checkpoints/latest"), key=lambda link: (link / STATE).stat().st_mtime)
    return links[-1].parent.parent if links else None
