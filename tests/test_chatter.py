"""Warnings of libraries are in the run's log file, errors on the terminal; nothing is lost when a run fails early."""

import logging
import sys
import warnings

import pytest

from blipds.chatter import Chatter


@pytest.fixture
def library(capsys):
    """A logger that writes to the terminal by itself, as torch's do."""
    logger = logging.getLogger("blipds_test_library")
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    logger.propagate = False
    yield logger
    logger.removeHandler(handler)


def speak(library):
    deepspeed = logging.getLogger("DeepSpeed")
    handler = logging.StreamHandler(sys.stdout)  # DeepSpeed adds it when it is imported
    deepspeed.addHandler(handler)
    library.warning("no CUDA runtime is found")
    library.error("the library is broken")
    deepspeed.warning("setting accelerator to %s", "CPU")
    logging.getLogger("without_a_handler").warning("from nobody")
    logging.getLogger("without_a_handler").error("from somebody")
    warnings.warn("torch.old is deprecated", FutureWarning, stacklevel=1)
    deepspeed.removeHandler(handler)


@pytest.mark.filterwarnings("default")
def test_warnings_go_to_the_log_and_errors_to_both(library, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's own
    with Chatter() as chatter:
        speak(library)
        assert not (tmp_path / "log.txt").exists()
        chatter.open(tmp_path)
        library.warning("a late word")
    library.warning("after the run")
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == "the library is broken\nfrom somebody\nafter the run\n"
    log = (tmp_path / "log.txt").read_text()
    assert all(" rank 0 " in line for line in log.splitlines() if " WARNING " in line)
    said = ["no CUDA runtime is found", "the library is broken", "setting accelerator to CPU", "from nobody"]
    said += ["from somebody", "FutureWarning: torch.old is deprecated", "a late word"]
    assert all(log.count(text) == 1 for text in said) and "after the run" not in log
    assert chatter.unwritten() == ""


def test_a_quiet_run_has_no_log(tmp_path):
    with Chatter() as chatter:
        chatter.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_was_said_before_a_failure_is_known(library, tmp_path):
    with Chatter() as chatter:
        library.warning("no CUDA runtime is found")
    assert chatter.unwritten() == "blipds_test_library: no CUDA runtime is found\n"
