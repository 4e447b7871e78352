"""What all tests share."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small tensors: more threads only get in each other's way, by a factor of 20 on busy cores

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """`../shared` (photographs, oracle, reference scores). A clone without it skips; under CI=true it must be there."""
    if not SHARED.is_dir():
        reason = f"needs {SHARED}, which only the project's own machines have"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with the marker `gpu` are skipped where there is none.

    Files that start ranks come first, since they take longest: at the end no core waits for one of them.
    """
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is false"))
    starts_ranks = {path: "from launching import" in path.read_text() for path in {item.path for item in items}}
    items.sort(key=lambda item: not starts_ranks[item.path])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(error: object) -> None:
    """Where a worker of pytest-xdist dies, `--dist loadfile` waits for ever (pytest-xdist issue 784)."""
    if error:
        pytest.exit("a process that ran tests has died; what it had left was not run", returncode=3)


def pytest_unconfigure() -> None:
    """A failed test's traceback keeps its loader's workers, which do not heed the signal that Python ends them with."""
    for child in multiprocessing.active_children():
        child.kill()
