"""Ranks that mpirun or srun started: their variables, without deepspeed's launcher."""

import pytest
from launching import environment, free_port, start_script, wait

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
def start(tmp_path):
    """start(rank, variables) starts SUM with these beside the environment: the process, and where it writes."""
    (tmp_path / "sum.py").write_text(SUM)

    def begin(rank, variables):
        log = tmp_path / f"log{rank}"
        log.touch()
        return start_script([tmp_path / "sum.py"], environment() | variables, log), log

    return begin


@pytest.mark.parametrize(("names", "a_node"), [(OPENMPI, "2"), (SLURM, "2"), (SLURM, "2(x1)")])
def test_ranks_of_other_launchers_meet(names, a_node, start):
    """The names are those of OpenMPI's and SLURM's manuals; the launchers themselves are not at hand."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        start(rank, {**meeting, **dict(zip(names, (rank, "2", rank, a_node), strict=True))}) for rank in ("0", "1")
    ]
    assert wait([process for process, _ in ranks], timeout=300) == 0
    assert [log.read_text().strip() for _, log in ranks] == ["0 2 0 2 3", "1 2 1 2 3"]


def test_many_ranks_without_a_meeting_point_are_an_error(start):
    process, log = start("0", dict(zip(OPENMPI, ("0", "2", "0", "2"), strict=True)))
    assert wait([process], timeout=300) != 0
    assert "MASTER_ADDR is not: set it to the first machine's name" in log.read_text()
