"""The recipes' scripts: what they start, seen by stand-ins for the programs that they call."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import REPOSITORY, environment

FINETUNE = str(REPOSITORY / "launch" / "finetune.py")


@pytest.fixture
def started(tmp_path):
    """started(stand_in, *arguments, **variables): the words that launch/train_caption_coco_base.sh calls it with."""

    def run(stand_in, *arguments, **variables):
        program = tmp_path / stand_in
        program.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
        program.chmod(0o755)
        script = REPOSITORY / "launch" / "train_caption_coco_base.sh"
        path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
        words = ["bash", str(script), *arguments]
        called = environment() | {"PATH": path} | variables
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=called)
        return done.stdout.splitlines()

    return run


def test_runs_of_one_machine_take_free_ports(started):
    quiet, flag, port, *rest = started("deepspeed", "--options", "env.cache_root=/my data")
    assert (quiet, flag) == ("--quiet", "--master_port")
    assert 1024 < int(port) < 65536
    recipe = ["--cfg-path", f"{REPOSITORY}/run_configs/caption_coco_base.yaml"]
    recipe += ["--ds-config", f"{REPOSITORY}/ds_configs/zero2.json", "--resume", "auto"]
    assert rest == [FINETUNE, *recipe, "--options", "env.cache_root=/my data"]
    assert started("deepspeed", RANKS="2")[3:6] == ["--num_accelerators", "2", FINETUNE]


def test_several_machines_are_checked_first_and_meet_at_the_port_that_was_checked(started):
    words = started("python", HOSTFILE="hosts")
    assert words[:3] == [f"{REPOSITORY}/launch/preflight.py", "--hostfile", "hosts"]
    assert words[3:9] == ["--", "deepspeed", "--quiet", "--hostfile", "hosts", FINETUNE]
