"""A run's checkpoints: `step_N` folders, and the links `latest` and `best` to two of them."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from blipds import distributed
from blipds.engine.engine import Engine
from blipds.engine.files import (
    FileRecord,
    damage,
    flush_folder,
    host_copies,
    read_manifest,
    write_manifest,
    write_tensors,
    write_text,
)
from blipds.errors import UserError
from blipds.files import paths

STATE = "state.json"
WEIGHTS = "model.safetensors"  # fp32, whole, whatever the ZeRO stage: what evaluation and export read
SLACK = 16 << 20  # bytes beside the tensors: headers, JSON, the file system's own


@dataclass
class BegunCheckpoint:
    """A checkpoint that is being written: what only rank 0 can complete once the files of all ranks are there."""

    partial: Path
    name: str
    state: dict[str, Any]
    best: bool
    files: Future[list[FileRecord]]  # this rank's

    @property
    def step(self) -> int:
        return self.state["run"]["global_step"]


class CheckpointFolder:
    """`<run directory>/checkpoints`. Keeps the newest `keep_last` checkpoints and the best, and no other.

    And the candidate, whose score is still to come, until `settle`. A checkpoint is begun and finished: in between,
    with `background`, training may go on while a thread writes; it costs a copy in the host's memory.
    """

    def __init__(self, folder: Path, keep_last: int, background: bool = False) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.background = background
        self.begun: BegunCheckpoint | None = None
        self.candidate: int | None = None  # step

    def begin(self, engine: Engine, run: dict[str, Any], shape: dict[str, Any], best: bool) -> str | None:
        """Begins `step_N`, under another name. Collective.

        Returns why it cannot be written (a full disk); what was there before is then as it was. What was begun before
        must be finished.
        """
        assert self.begun is None
        name = name_of(run["global_step"])
        partial = self.folder / f"{name}.partial"
        failure = self.prepare(partial, engine.checkpoint_bytes) if distributed.is_main() else None
        failure = distributed.broadcast(failure)
        if failure is None:
            state = {"run": run, "shape": shape, "engine": engine.state.counters()}
            self.begun = BegunCheckpoint(partial, name, state, best, self.write_files(engine, partial))
        return failure

    @property
    def written(self) -> bool:
        """Whether a checkpoint is begun and this rank's files of it are written, or cannot be."""
        return self.begun is not None and self.begun.files.done()

    def finish(self) -> str | None:
        """Gives what was begun its name, and moves `latest` (and `best`) to it. Collective.

        All files are through to the disk before its manifest is there, and that is before the name. Returns why it
        could not be written; what was there before is then as it was.
        """
        begun, self.begun = self.begun, None
        assert begun is not None
        error = begun.files.exception()
        if not isinstance(error, OSError | None):
            raise error
        own = (None, f"rank {distributed.rank()}: {error}") if error else (begun.files.result(), None)
        shares = distributed.gather(own)
        failure = next((failure for _, failure in shares if failure), None)
        if distributed.is_main():
            failure = failure or self.complete(begun, [record for records, _ in shares for record in records or []])
            if failure is not None:
                shutil.rmtree(begun.partial, ignore_errors=True)
        return distributed.broadcast(failure)

    def prepare(self, partial: Path, needed: int) -> str | None:
        """An empty folder on a disk with room, for which old checkpoints may have to go; else why not. Rank 0 only."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob("*.partial"):
                shutil.rmtree(left_over) if left_over.is_dir() and not left_over.is_symlink() else left_over.unlink()
            if shutil.disk_usage(self.folder).free < needed + SLACK:
                self.prune(keep_last=1)
            free = shutil.disk_usage(self.folder).free
            if free < needed + SLACK:
                return f"it takes {(needed + SLACK) / 1e9:.2f} GB, and {self.folder} has {free / 1e9:.2f} GB left"
            partial.mkdir()
        except OSError as error:
            return str(error)
        return None

    def write_files(self, engine: Engine, partial: Path) -> Future[list[FileRecord]]:
        """Every rank its moments; rank 0 the weights, too. Collective."""
        writers = [engine.state.writer(partial, self.background)]
        weights = (weight for _, weight in engine.weights())  # collective: to be exhausted by every rank
        if distributed.is_main():
            metadata = {"format": "blipds", "config": json.dumps(engine.model.checkpoint_config())}
            tensors = host_copies(weights) if self.background else weights
            writers.append(lambda: write_tensors(partial / WEIGHTS, engine.weight_shapes(), tensors, metadata))
        files: Future[list[FileRecord]] = Future()
        writing = Thread(target=resolve, args=(files, writers), name="checkpoint")
        writing.start() if self.background else writing.run()
        for _ in weights:
            pass
        return files

    def complete(self, begun: BegunCheckpoint, records: list[FileRecord]) -> str | None:
        """Adds what makes the folder a checkpoint and gives it its name; else why not. Rank 0 only."""
        partial, target = begun.partial, self.folder / begun.name
        try:
            records = [*records, write_text(partial / STATE, json.dumps(begun.state, indent=2))]
            write_manifest(partial, records, written=time.time())
            flush_folder(partial)
            if target.exists():  # of a run that went on from an earlier checkpoint, or damaged
                shutil.rmtree(target)
            partial.rename(target)
        except OSError as error:
            return str(error)
        try:
            self.link(begun.name, "latest", *(["best"] if begun.best else []))
        except OSError as error:
            return f"{target} is whole, but the links to it cannot be written: {error}"
        return None

    def settle(self, best: bool) -> str | None:
        """The candidate's score is there: it becomes the best or one among others. Why it could not. Rank 0 only."""
        assert self.candidate is not None
        name, self.candidate = name_of(self.candidate), None
        if not (self.folder / name).is_dir():
            return f"there is no checkpoint {name}"
        try:
            self.link(name, *(["best"] if best else []))
        except OSError as error:
            return str(error)
        return None

    def link(self, name: str, *links: str) -> None:
        """Moves links to a checkpoint, each atomically; then removes those that are no longer kept. Raises OSError."""
        for link in links:
            paths.point(self.folder / link, name)
        flush_folder(self.folder)
        self.prune(self.keep_last)

    def prune(self, keep_last: int) -> None:
        """Removes all but the newest `keep_last` complete checkpoints, the best and the candidate.

        Damaged ones count for nothing.
        """
        kept = [folder.name for _, folder in newest_first(self.folder)[:keep_last]]
        best = paths.target(self.folder / "best")
        spared = (*kept, best and best.name, name_of(self.candidate or 0))
        for folder in step_folders(self.folder):
            if kept and folder.name not in spared:
                shutil.rmtree(folder, ignore_errors=True)


def resolve(files: Future[list[FileRecord]], writers: list[Callable[[], FileRecord]]) -> None:
    """Calls the writers one after the other; `files` has what they gave, or the first exception."""
    try:
        files.set_result([write() for write in writers])
    except BaseException as error:
        files.set_exception(error)


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def step_folders(checkpoints: Path) -> list[Path]:
    """Those that got their name; a save that never ended leaves a `.partial`."""
    return [path for path in sorted(checkpoints.glob("step_*")) if path.name.removeprefix("step_").isdecimal()]


def newest_first(checkpoints: Path) -> list[tuple[float, Path]]:
    """(time of writing, checkpoint) of those with a manifest, newest first. No tensor is looked at."""
    found = []
    for folder in step_folders(checkpoints):
        with contextlib.suppress(ValueError):
            found.append((read_manifest(folder)[0], folder))
    return sorted(found, reverse=True)


def newest_intact(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as it was written, and a line for each one passed over. Reads all of it.

    Links are not asked: a crash may have come before they were moved.
    """
    complete = [folder for _, folder in newest_first(checkpoints)]
    lines: list[str] = []
    for folder in [*(path for path in step_folders(checkpoints) if path not in complete), *complete]:
        problem = damage(folder)
        if problem is None:
            return folder, lines
        lines.append(f"damaged: {folder}: {problem}")
    return None, lines


def shape_of(engine: Engine, global_batch: int) -> dict[str, Any]:
    """How the run was shared out. Only the global batch must stay: the schedule and the data's order follow it."""
    return {
        "ranks": distributed.world_size(),
        "zero_stage": engine.stage,
        "precision": engine.precision,
        "global_batch": global_batch,
    }


def read_state(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """{"run": where the run stood, "shape": see `shape_of`, "engine": its counters} of a run's checkpoint."""
    try:
        state = json.loads((checkpoint / STATE).read_text("utf-8"))
        return {key: dict(state[key]) for key in ("run", "shape", "engine")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint} is no checkpoint of a run ({STATE}: {error})") from error


def load_engine(engine: Engine, checkpoint: Path) -> None:
    """Takes up the optimizer's state of a checkpoint, whatever ranks and ZeRO stage wrote it. Collective.

    The weights are there already (`Engine.filling`).
    """
    state = read_state(checkpoint)
    engine.state.read(checkpoint, state["engine"], state["shape"]["precision"] == engine.precision)


def resume_point(where: str, run_dirs: Iterable[Path]) -> tuple[Path | None, list[str]]:
    """The checkpoint that `--resume where` means, whole and as it was written, and lines about those passed over.

    `where`: a run directory, or a checkpoint; "auto": the newest of `run_dirs`, None where none has any checkpoint.
    Raises UserError where there are checkpoints and none is whole.
    """
    location = newest_run(run_dirs) if where == "auto" else paths.user_path(where)
    if location is None:
        return None, []
    folder = next((path for path in (location / "checkpoints", location) if step_folders(path)), None)
    if folder is None:
        checkpoint = paths.target(location)  # `latest` and `best` are links
        problem = damage(checkpoint) if checkpoint else "no such folder"
        if checkpoint is None or problem is not None:
            raise UserError(f"--resume {where}: no whole checkpoint of a run: {problem}")
        return checkpoint, []
    found, lines = newest_intact(folder)
    if found is None:
        raise UserError(f"none of the checkpoints in {folder} is whole; {'; '.join(lines)}")
    return found, [*lines, *([f"going on from {found}, the newest that is whole"] if lines else [])]


def newest_run(run_dirs: Iterable[Path]) -> Path | None:
    """The run directory with the newest checkpoint; where no manifest can be read, one with something like it."""

    def age(run_dir: Path) -> tuple[float, Path]:
        return next((written for written, _ in newest_first(run_dir / "checkpoints")), 0.0), run_dir

    return max((run_dir for run_dir in run_dirs if step_folders(run_dir / "checkpoints")), key=age, default=None)
