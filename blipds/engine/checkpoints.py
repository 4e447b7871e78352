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

    def save(self, engine: Engine, state: dict[str, Any], best: bool) -> None:
        """Writes `step_N` under a temporary name, renames it, and moves `latest` (and `best`) to it. Collective."""
        name = f"step_{state['global_step']:08d}"
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
            (partial / STATE).write_text(json.dumps(state, indent=2))
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


def load_state(engine: Engine, checkpoint: Path) -> dict[str, Any]:
    """Brings the engine back to a checkpoint of the same shape (ranks, ZeRO stage); returns its state. Collective."""
    state = json.loads((checkpoint / STATE).read_text())
    shape = {"world_size": distributed.world_size(), "zero_stage": engine.stage, "precision": engine.precision}
    for key, here in shape.items():
        if state[key] != here:
            raise UserError(f"{checkpoint} was written with {key} {state[key]}, this run has {here}")
    engine.load(checkpoint, RESUME)
    return state


def find_checkpoint(location: str, link: str) -> str:
    """The checkpoint meant by a run directory or its `checkpoints` folder: where `link` points. Others as they are."""
    path = Path(location).expanduser()
    for candidate in (path / "checkpoints" / link, path / link):
        if candidate.exists():
            return str(candidate.resolve())
    return location


def newest_run(output_dir: Path) -> Path | None:
    """The run directory below `output_dir` whose latest checkpoint is the newest."""
    links = sorted(output_dir.glob("*/checkpoints/latest"), key=lambda link: (link / STATE).stat().st_mtime)
    return links[-1].parent.parent if links else None
