"""Checkpoints are whole or not there: damage of every kind, a full disk, what is kept."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from blipds.engine.checkpoints import CheckpointFolder, read_state, resume_point
from blipds.engine.files import FileRecord, damage, host_copies, write_tensors
from blipds.errors import UserError
from blipds.models.weights import find_checkpoint

NAMES = ("encoder.weight", "encoder.bias")


class StubEngine:
    """What CheckpointFolder asks of an engine, with 40 kB of weights that depend on the step."""

    model = SimpleNamespace(checkpoint_config=lambda: {"eps": 1e-6})

    def __init__(self, step: int, rows: int = 100) -> None:
        shapes = {"encoder.weight": (rows, 100), "encoder.bias": (100,)}
        self.tensors = {name: torch.full(shape, float(step)) for name, shape in shapes.items()}
        self.state = SimpleNamespace(writer=self.writer, counters=lambda: {"adam_step": 1, "loss_scale": {}})
        self.checkpoint_bytes = 12 * sum(tensor.numel() for tensor in self.tensors.values())

    def weight_shapes(self):
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def weights(self):
        yield from self.tensors.items()

    def writer(self, folder, copy) -> Callable[[], FileRecord]:
        tensors = host_copies(self.tensors.values()) if copy else self.tensors.values()
        return partial(write_tensors, folder / "adam_00000.safetensors", self.weight_shapes(), tensors, {})


def save(run_dir, step, best=False, keep_last=9, rows=100, background=False):
    return save_in(CheckpointFolder(run_dir / "checkpoints", keep_last, background), step, best, rows)


def save_in(folder, step, best=False, rows=100):
    return folder.begin(StubEngine(step, rows), {"global_step": step}, {"global_batch": 8}, best) or folder.finish()


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture
def run(tmp_path):
    """A run directory with checkpoints after steps 2, 4 and 6."""
    for step in (2, 4, 6):
        assert save(tmp_path / "run", step) is None
    return tmp_path / "run"


def step_of(run_dir):
    """Where the run would go on, and what is said."""
    checkpoint, lines = resume_point(str(run_dir), [])
    return read_state(checkpoint)["run"]["global_step"], lines


def test_files_are_what_safetensors_writes(run):
    weights = load_file(run / "checkpoints" / "step_00000006" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == StubEngine(6).weight_shapes()
    assert all((tensor == 6).all() for tensor in weights.values())


# --- damage

NEWEST = "step_00000006"


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def cut(path, keep):
    os.truncate(path, int(keep * path.stat().st_size))


def grow(path):
    with path.open("ab") as file:
        file.write(b"\0")


def link(checkpoints, name, target):
    (checkpoints / name).unlink(missing_ok=True)
    (checkpoints / name).symlink_to(target)


FILES = ("model.safetensors", "adam_00000.safetensors", "state.json", "manifest.json")
DAMAGE = {
    **{f"{file} is gone": (lambda newest, file=file: (newest / file).unlink()) for file in FILES},
    **{f"{file} is empty": (lambda newest, file=file: cut(newest / file, 0)) for file in FILES},
    **{f"{file} is cut off": (lambda newest, file=file: cut(newest / file, 0.9)) for file in FILES},
    **{f"{file} has a flipped bit": (lambda newest, file=file: flip(newest / file, 0.5)) for file in FILES},
    "the header of the weights has a flipped bit": lambda newest: flip(newest / "model.safetensors", 0.001),
    "the last byte of the moments has a flipped bit": lambda newest: flip(newest / "adam_00000.safetensors", 1),
    "the weights have a byte too many": lambda newest: grow(newest / "model.safetensors"),
    "the manifest has a byte too many": lambda newest: grow(newest / "manifest.json"),
    "the manifest is a list": lambda newest: (newest / "manifest.json").write_text("[]"),
    "a file is a folder": lambda newest: ((newest / "state.json").unlink(), (newest / "state.json").mkdir()),
    "everything is gone": lambda newest: [path.unlink() for path in newest.iterdir()],
    "two files have changed places": lambda newest: (
        (newest / "model.safetensors").rename(newest / "x"),
        (newest / "adam_00000.safetensors").rename(newest / "model.safetensors"),
        (newest / "x").rename(newest / "adam_00000.safetensors"),
    ),
    "weights of another step": lambda newest: shutil.copy(
        newest.parent / "step_00000004" / "model.safetensors", newest / "model.safetensors"
    ),
}
HARMLESS = {  # what a crash at the wrong moment leaves: the newest checkpoint is whole
    "latest is stale": lambda checkpoints: link(checkpoints, "latest", "step_00000002"),
    "latest points nowhere": lambda checkpoints: link(checkpoints, "latest", "step_00000099"),
    "latest is gone": lambda checkpoints: (checkpoints / "latest").unlink(),
    "a save that never ended": lambda checkpoints: shutil.copytree(
        checkpoints / "step_00000002", checkpoints / "step_00000008.partial"
    ),
    "a link that never was moved": lambda checkpoints: link(checkpoints, "latest.partial", NEWEST),
    "a foreign folder": lambda checkpoints: (checkpoints / "step_backup").mkdir(),
}


def test_there_are_thirty_kinds_of_damage():
    assert len(DAMAGE) + len(HARMLESS) + 1 >= 30


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(run, kind):
    DAMAGE[kind](run / "checkpoints" / NEWEST)
    step, lines = step_of(run)
    assert step == 4
    assert len(lines) == 2 and lines[0].startswith(f"damaged: {run}/checkpoints/{NEWEST}: ")
    assert lines[1] == f"going on from {run}/checkpoints/step_00000004, the newest that is whole"
    assert save(run, 6) is None  # the run comes by there again
    assert step_of(run) == (6, [])


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_a_crash_leaves_behind_costs_nothing(run, kind):
    HARMLESS[kind](run / "checkpoints")
    assert step_of(run) == (6, [])
    assert save(run, 8) is None
    assert step_of(run) == (8, [])
    assert (run / "checkpoints" / "latest").resolve().name == "step_00000008"
    assert not list((run / "checkpoints").glob("*.partial"))


def test_with_none_left_it_says_so(run):
    for folder in (run / "checkpoints").glob("step_*"):
        flip(folder / "model.safetensors", 0.7)
    with pytest.raises(UserError, match=r"none of the checkpoints in .* is whole; damaged: .*step_00000006: "):
        step_of(run)


def test_a_damaged_checkpoint_that_is_asked_for_is_refused(run):
    flip(run / "checkpoints" / NEWEST / "adam_00000.safetensors", 0.5)
    with pytest.raises(UserError, match=r"no whole checkpoint of a run: adam_00000.safetensors is damaged"):
        resume_point(str(run / "checkpoints" / "latest"), [])
    with pytest.raises(UserError, match=r"nowhere: no whole checkpoint of a run: no such folder"):
        resume_point("nowhere", [])


def test_auto_takes_the_run_that_saved_last(tmp_path):
    for name, step in (("a", 9), ("b", 3)):
        assert save(tmp_path / name, step) is None
    (tmp_path / "c" / "checkpoints" / "step_00000001.partial").mkdir(parents=True)
    assert resume_point("auto", sorted(tmp_path.iterdir()))[0] == tmp_path / "b" / "checkpoints" / "step_00000003"
    assert resume_point("auto", [tmp_path / "c"]) == (None, [])


# --- what is kept


def test_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 7):
        assert save(tmp_path, step, best=step == 2, keep_last=2) is None
    assert names(tmp_path) == ["best", "latest", "step_00000002", "step_00000005", "step_00000006"]
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step_00000002"


def test_without_symlinks(tmp_path, monkeypatch):
    """SMB, exFAT, Colab's drive: the links are small text files, and mean the same everywhere."""

    def refuse(*_, **__):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    for step in range(1, 7):
        assert save(tmp_path, step, best=step == 2, keep_last=2) is None
    assert names(tmp_path) == ["best", "latest", "step_00000002", "step_00000005", "step_00000006"]
    checkpoints = tmp_path / "checkpoints"
    assert step_of(tmp_path) == (6, [])
    assert resume_point(str(checkpoints / "best"), [])[0] == checkpoints / "step_00000002"
    for location, step in ((tmp_path, 2), (checkpoints, 2), (checkpoints / "latest", 6)):
        assert find_checkpoint(str(location), "best") == str(checkpoints / f"step_0000000{step}")
    for link in ("best", "latest"):  # lost by a copy
        (checkpoints / link).unlink()
    for location in (tmp_path, checkpoints):
        assert find_checkpoint(str(location), "best") == str(checkpoints / "step_00000006")


def test_links_that_cannot_be_written_leave_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "latest").mkdir(parents=True)
    failure = save(tmp_path, 1)
    assert failure.startswith(f"{tmp_path}/checkpoints/step_00000001 is whole, but the links to it cannot be written")
    assert step_of(tmp_path) == (1, [])


@pytest.mark.parametrize("better", [True, False])
def test_a_candidate_is_kept_until_its_score_is_there(tmp_path, better):
    folder = CheckpointFolder(tmp_path / "checkpoints", keep_last=1)
    for step in range(1, 6):
        if step == 2:
            folder.candidate = 2
        assert save_in(folder, step, best=step == 1) is None
    assert names(tmp_path) == ["best", "latest", "step_00000001", "step_00000002", "step_00000005"]
    assert folder.settle(best=better) is None
    kept = "step_00000002" if better else "step_00000001"
    assert names(tmp_path) == ["best", "latest", kept, "step_00000005"]
    assert (tmp_path / "checkpoints" / "best").resolve().name == kept


def test_a_candidate_that_was_never_written_is_not_the_best(run):
    folder = CheckpointFolder(run / "checkpoints", keep_last=9)
    folder.candidate = 8
    assert folder.settle(best=True) == "there is no checkpoint step_00000008"
    assert names(run) == ["latest", "step_00000002", "step_00000004", "step_00000006"]


def test_going_on_from_an_earlier_one_leaves_the_others_behind(run):
    """After step 2 the run takes step 4 anew: what counts is when it was written."""
    assert save(run, 4) is None
    assert step_of(run) == (4, [])


# --- in the background


def test_what_is_written_in_the_background_is_what_was_there_when_it_began(tmp_path):
    folder, engine = CheckpointFolder(tmp_path / "checkpoints", keep_last=1, background=True), StubEngine(2)
    assert folder.begin(engine, {"global_step": 2}, {}, best=True) is None
    for tensor in engine.tensors.values():
        tensor.fill_(3)  # training goes on
    assert folder.finish() is None
    written = load_file(tmp_path / "checkpoints" / "best" / "model.safetensors")
    assert all((tensor == 2).all() for tensor in written.values())
    assert step_of(tmp_path) == (2, [])


def test_before_it_is_finished_the_one_before_counts(run):
    folder = CheckpointFolder(run / "checkpoints", keep_last=9, background=True)
    assert not folder.written
    assert folder.begin(StubEngine(8), {"global_step": 8}, {}, best=False) is None
    assert step_of(run) == (6, [])
    assert folder.finish() is None
    assert step_of(run) == (8, []) and not folder.written


# --- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


ROWS = 4000  # 400,000 weights: 4.8 MB a checkpoint


def test_a_disk_that_is_known_to_be_too_small(small_disk):
    """16 MiB are asked for beside the tensors: there is room for one checkpoint of 4.8 MB, then for none."""
    for step in (1, 2, 3):
        assert save(small_disk, step, rows=ROWS, best=step == 1) is None  # old ones make room, the best does not
    (small_disk / "photographs").write_bytes(bytes(8 << 20))
    failure = save(small_disk, 4, rows=ROWS)
    assert failure.startswith("it takes 0.02 GB, and ") and failure.endswith(" GB left")
    assert names(small_disk) == ["best", "latest", "step_00000001", "step_00000003"]
    assert step_of(small_disk) == (3, [])


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("free", [0, 4 << 10, 2 << 20, 3 << 20])
def test_a_disk_that_fills_up_all_the_same(small_disk, free, background, monkeypatch):
    """Another program takes the room between the look and the write."""
    assert save(small_disk, 1, rows=ROWS) is None
    left = shutil.disk_usage(small_disk).free
    (small_disk / "photographs").write_bytes(bytes(left - free))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 40))
    failure = save(small_disk, 2, rows=ROWS, background=background)
    assert "No space left on device" in failure
    assert step_of(small_disk) == (1, [])
    (small_disk / "photographs").unlink()
    assert save(small_disk, 2, rows=ROWS) is None
    assert step_of(small_disk) == (2, [])


def test_a_manifest_holds_every_file_by_size_and_checksum(run):
    newest = run / "checkpoints" / NEWEST
    listed = {record["name"] for record in json.loads((newest / "manifest.json").read_text())["files"]}
    assert listed == {path.name for path in newest.iterdir()} - {"manifest.json"}
    assert damage(newest) is None
