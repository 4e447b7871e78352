"""Ranks that mpirun or srun started: their variables, without deepspeed's launcher."""

import os
from datetime import timedelta

import pytest
import torch
from launching import environment, free_port, start_script, wait

from blipds import distributed
from blipds.errors import UserError

SUM = """
import torch
from blipds import distributed as d
d.initialise()
total = d.sum_over_ranks(torch.tensor([d.rank() + 1]))
print(d.rank(), d.world_size(), d.local_rank(), d.local_world_size(), int(total))
"""
OPENMPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")


@pytest.fixture
def variables(monkeypatch):
    """Gives this process an environment of its own."""
    return lambda **given: monkeypatch.setattr(os, "environ", dict(given))


def test_ranks_of_another_launcher_meet(tmp_path):
    """The names are those of SLURM's manual; the launcher itself is not at hand."""
    (tmp_path / "sum.py").write_text(SUM)
    meeting = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        start_script(
            [tmp_path / "sum.py"], meeting | dict(zip(SLURM, (rank, "2", rank, "2(x1)"), strict=True)), tmp_path / rank
        )
        for rank in ("0", "1")
    ]
    assert wait(ranks, timeout=300) == 0
    assert [(tmp_path / rank).read_text() for rank in ("0", "1")] == ["0 2 0 2 3\n", "1 2 1 2 3\n"]


@pytest.mark.parametrize(("names", "per_node"), [(OPENMPI, "8"), (SLURM, "8"), (SLURM, "8(x2)")])
def test_the_variables_of_other_launchers(variables, names, per_node):
    """From OpenMPI's and SLURM's manuals: rank 9 of 16, the second on the second machine."""
    variables(MASTER_ADDR="node1", **dict(zip(names, ("9", "16", "1", per_node), strict=True)))
    distributed.take_launcher_names()
    taken = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")]
    assert taken == ["9", "16", "1", "8", "29500"]


def test_many_ranks_without_a_meeting_point_are_an_error(variables):
    variables(**dict(zip(OPENMPI, ("0", "2", "0", "2"), strict=True)))
    with pytest.raises(UserError, match="MASTER_ADDR is not: set it to the first machine's name"):
        distributed.take_launcher_names()


def test_collective_calls_wait_no_longer_than_asked(variables, monkeypatch):
    variables(RANK="0", WORLD_SIZE="1", DS_ACCELERATOR="cpu")
    given = {}
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **kwargs: given.update(kwargs))
    distributed.initialise(collective_minutes=7)
    assert given["timeout"] == timedelta(minutes=7)


def test_each_rank_takes_its_share_of_the_cores(variables, monkeypatch):
    """Whatever the launcher said: deepspeed nothing, torchrun one thread."""
    variables(LOCAL_WORLD_SIZE="3", OMP_NUM_THREADS="1")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    distributed.share_cores()
    assert given == [5]


def test_fp32_is_fp32(variables, monkeypatch):
    variables(RANK="0", WORLD_SIZE="1", DS_ACCELERATOR="cpu")
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *args, **kwargs: None)
    distributed.allow_tf32(True)
    distributed.initialise()
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
