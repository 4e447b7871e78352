"""A compile that was interrupted must not hang the next start."""

import os
import sys
from pathlib import Path

from blipds.engine.ops import clear_stale_lock, compiler_environment


def test_a_lock_that_no_process_holds_is_removed(tmp_path):
    lock = tmp_path / "lock"
    lock.touch()
    assert clear_stale_lock(lock)
    assert not lock.exists()


def test_a_lock_that_a_compile_holds_open_stays(tmp_path):
    lock = tmp_path / "lock"
    with lock.open("w"):
        assert not clear_stale_lock(lock)
        assert lock.exists()


def test_no_lock_is_nothing_to_do(tmp_path):
    assert not clear_stale_lock(tmp_path / "lock")


def test_the_builders_see_architectures_as_numbers(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a;10.0f+PTX")
    monkeypatch.setenv("PATH", "/bin")
    with compiler_environment():
        assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0 9.0;10.0+PTX"
        assert os.environ["PATH"] == f"{Path(sys.executable).parent}:/bin"
    assert (os.environ["TORCH_CUDA_ARCH_LIST"], os.environ["PATH"]) == ("8.0 9.0a;10.0f+PTX", "/bin")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    with compiler_environment():
        os.environ["TORCH_CUDA_ARCH_LIST"] = "9.0+PTX"  # as DeepSpeed leaves it
    assert "TORCH_CUDA_ARCH_LIST" not in os.environ
