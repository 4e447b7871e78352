"""What the command lines share: where a run is written to, and what nobody reads."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blipds import cli
from blipds.config.run import load_run_config
from blipds.config.sections import Config
from blipds.errors import UserError


def config(output_dir, job_id="job"):
    made = Config()
    made.run.output_dir, made.run.job_id = str(output_dir), job_id
    return made


def test_a_run_directory_is_made_and_not_used_twice(tmp_path):
    assert cli.open_run_dir(config(tmp_path / "a")) == tmp_path / "a" / "job"
    assert cli.open_run_dir(config(tmp_path / "a")) == tmp_path / "a" / "job"  # still empty
    (tmp_path / "a" / "job" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"job holds a run already: give another run.job_id, or go on: .* --resume /"):
        cli.open_run_dir(config(tmp_path / "a"))
    assert cli.open_run_dir(config(tmp_path / "a"), restart=True) == tmp_path / "a" / "job"
    resumed = tmp_path / "a" / "job" / "checkpoints" / "step_00000004"
    assert cli.open_run_dir(config(tmp_path / "b"), resumed) == tmp_path / "a" / "job"


def test_a_run_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    for output_dir in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nobody")):
        with pytest.raises(UserError, match=rf"^run.output_dir: {output_dir}/job cannot be written to \(\[Errno"):
            cli.open_run_dir(config(output_dir))


def test_without_a_home_it_is_the_cache(tmp_path, monkeypatch):
    """torch and the hub would make a folder with the name ~ in the working directory."""
    monkeypatch.setenv("HOME", "~")
    (tmp_path / "run.yaml").write_text(f"datasets: {{custom_caption: {{}}}}\nenv: {{cache_root: {tmp_path}/cache}}\n")
    cli.load_config(argparse.Namespace(cfg_path=tmp_path / "run.yaml", options=[], plugin=[]))
    assert os.environ["HOME"] == f"{tmp_path}/cache"


def test_the_config_is_kept_in_utf_8(tmp_path):
    made = config(tmp_path)
    made.model.prompt = "ein bild f\u00fcr \u72ac "
    cli.keep_config(made, tmp_path)
    assert load_run_config(tmp_path / "config.yaml")[0].model.prompt == "ein bild f\u00fcr \u72ac "
    (tmp_path / "config.yaml").read_text(encoding="utf-8")


SAY = "from blipds import cli; cli.run(lambda: print('a line'))"


def test_output_that_nobody_reads_or_that_has_no_room():
    reader, writer = os.pipe()
    os.close(reader)
    closed = subprocess.run([sys.executable, "-c", SAY], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (closed.returncode, closed.stderr) == (141, "")
    with open("/dev/full", "wb") as disk:  # noqa: PTH123
        full = subprocess.run([sys.executable, "-c", SAY], stdout=disk, stderr=subprocess.PIPE, text=True)
    said = "error: standard output cannot be written: [Errno 28] No space left on device\n"
    assert (full.returncode, full.stderr) == (1, said)
