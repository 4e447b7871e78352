"""Warnings of libraries are in the run's log file, errors on the terminal; nothing is lost when a run fails early."""

import io
import logging
import sys
import warnings
from contextlib import contextmanager
from unittest import mock

import pytest

from blipds.chatter import Chatter


@contextmanager
def terminal():
    """What is written to a terminal without pytest's own capturing, and a logger that writes there, as torch's do."""
    shown = io.StringIO()
    library, handler = logging.getLogger("blipds_test_library"), logging.StreamHandler(shown)
    with (
        mock.patch.multiple(sys, stdout=shown, stderr=shown),
        mock.patch.object(logging.root, "handlers", []),
        mock.patch.multiple(library, handlers=[handler], propagate=False),
    ):
        yield shown, library


@pytest.mark.filterwarnings("default")
def test_warnings_go_to_the_log_and_errors_to_both(tmp_path):
    with terminal() as (shown, library):
        with Chatter() as chatter:
            library.warning("no CUDA runtime is found")
            library.error("the library is broken")
            deepspeed = logging.getLogger("DeepSpeed")
            with mock.patch.object(deepspeed, "handlers", [logging.StreamHandler(shown)]):  # added by its import
                deepspeed.warning("setting accelerator to %s", "CPU")
            logging.getLogger("without_a_handler").warning("from nobody")
            logging.getLogger("without_a_handler").error("from somebody")
            warnings.warn("torch.old is deprecated", FutureWarning, stacklevel=1)
            assert list(tmp_path.iterdir()) == []
            chatter.open(tmp_path)
            library.warning("a late word")
        library.warning("after the run")
    assert shown.getvalue() == "the library is broken\nfrom somebody\nafter the run\n"
    log = (tmp_path / "log.txt").read_text()
    said = ["no CUDA runtime is found", "the library is broken", "setting accelerator to CPU", "from nobody"]
    said += ["from somebody", "FutureWarning: torch.old is deprecated", "a late word"]
    assert [log.count(text) for text in said] == [1] * 7 and "after the run" not in log
    assert log.count(" rank 0 WARNING ") == 5 and log.count(" rank 0 ERROR ") == 2
    assert chatter.unwritten() == ""


def test_a_quiet_run_has_no_log(tmp_path):
    with Chatter() as chatter:
        chatter.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_was_said_before_a_failure_is_known():
    with terminal() as (shown, library), Chatter() as chatter:
        library.warning("no CUDA runtime is found")
    assert shown.getvalue() == ""
    assert chatter.unwritten() == "blipds_test_library: no CUDA runtime is found\n"
