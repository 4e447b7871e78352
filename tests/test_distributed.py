"""Ranks that mpirun or srun started: their variables, without deepspeed's launcher."""

import subprocess
import sys

import pytest
from launching import REPOSITORY, environment, free_port

SUM = (
    "import torch; from blipds import distributed as d; d.initialise(); "
    "print(d.rank(), d.world_size(), d.local_rank(), d.local_world_size(), "
    "int(d.sum_over_ranks(torch.tensor([d.rank() + 1]))))"
)
OPENMPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")


@pytest.mark.parametrize(("names", "a_node"), [(OPENMPI, "2"), (SLURM, "2"), (SLURM, "2(x1)")])
def test_ranks_of_other_launchers_meet(names, a_node):
    """The names are those of OpenMPI's and SLURM's manuals; the launchers themselves are not at hand."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in ("0", "1"):
        variables = dict(zip(names, (rank, "2", rank, a_node), strict=True))
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", SUM],
                env={**environment(), **meeting, **variables},
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    printed = [process.communicate(timeout=300)[0].strip() for process in ranks]
    assert printed == ["0 2 0 2 3", "1 2 1 2 3"]


def test_many_ranks_without_a_meeting_point_are_an_error():
    variables = dict(zip(OPENMPI, ("0", "2", "0", "2"), strict=True))
    done = subprocess.run(
        [sys.executable, "-c", SUM], env={**environment(), **variables}, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode != 0 and "MASTER_ADDR is not: set it to the first machine's name" in done.stderr
