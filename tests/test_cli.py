"""What the command lines share: where a run is written to, what nobody reads, how a command ends, plugins."""

import argparse
import os
import runpy
import signal
import sys
from pathlib import Path

import pytest
from launching import REPOSITORY, environment, start_script, wait

from blipds import cli, distributed
from blipds.config.run import load_run_config
from blipds.config.sections import Config
from blipds.errors import UserError
from blipds.registry import SCHEDULES
from blipds.signals import Stopped


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


NOWHERE = """
import os, sys
from blipds import cli
reader, writer = os.pipe()
os.close(reader)
sys.stdout = open({}, "w")
os.dup2(sys.stdout.fileno(), 1)
cli.run(lambda: print("a line"))
"""


def test_output_that_nobody_reads_or_that_has_no_room(tmp_path):
    full = "error: standard output cannot be written: [Errno 28] No space left on device\n"
    for place, status, said in (("writer", 141, ""), ("'/dev/full'", 1, full)):
        log = tmp_path / f"log{status}"
        (tmp_path / "script.py").write_text(NOWHERE.format(place))
        assert wait([start_script([tmp_path / "script.py"], environment(), log)], 300) == status
        assert log.read_text() == said


# --- the installed blipds-finetune


def test_a_rank_for_each_gpu(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words[1:]))
    monkeypatch.setattr(distributed, "free_port", lambda: 4711)
    monkeypatch.setattr(sys, "argv", ["blipds-finetune", "--cfg-path", "shapes_tiny"])
    for name in ("RANK", "RANKS"):
        monkeypatch.delenv(name, raising=False)
    cli.start_ranks("a.module")
    assert started == []
    monkeypatch.setattr(distributed, "device_type", lambda: "cuda")
    monkeypatch.setattr(cli.torch.cuda, "device_count", lambda: 8)
    cli.start_ranks("a.module")
    monkeypatch.setenv("RANKS", "2")
    cli.start_ranks("a.module")
    launcher, typed = (
        ["-m", "deepspeed.launcher.runner", "--quiet"],
        ["--module", "a.module", "--cfg-path", "shapes_tiny"],
    )
    assert started[0] == [*launcher, "--master_port", "4711", *typed]
    assert started[1] == [*launcher, "--num_accelerators", "2", "--master_port", "4711", *typed]
    monkeypatch.setenv("RANK", "0")  # torchrun and others have started this rank
    cli.start_ranks("a.module")
    assert len(started) == 2


# --- how a command ends


@pytest.fixture
def run(monkeypatch, capfd):
    """run(main) gives the exit status of the command, 0 where it returns, and what it wrote to stderr."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.setattr(cli, "leave", sys.exit)  # os._exit would end pytest
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(distributed, "shut_down", lambda: None)

    def ended(main):
        try:
            cli.run(main)
        except SystemExit as left:
            return left.code, capfd.readouterr().err
        return 0, capfd.readouterr().err

    yield ended
    for number, handler in before.items():
        signal.signal(number, handler)


def raises(error):
    def main():
        raise error

    return main


def test_each_end_has_its_status_and_its_line(run):
    assert run(lambda: None) == (0, "")
    assert run(raises(UserError("no such file: x"))) == (1, "error: no such file: x\n")
    assert run(raises(KeyboardInterrupt())) == (130, "interrupted\n")
    assert run(raises(Stopped("stopped by SIGTERM after step 3"))) == (75, "stopped by SIGTERM after step 3\n")
    assert run(lambda: signal.raise_signal(signal.SIGTERM)) == run(lambda: signal.raise_signal(signal.SIGUSR1))
    assert run(lambda: signal.raise_signal(signal.SIGTERM)) == (75, "")


def test_a_bug_is_shown_once_by_the_rank_that_met_it_first(run, monkeypatch):
    status, said = run(raises(RuntimeError("the cable is broken")))
    assert status == 1 and said.startswith("rank 0 failed:\nTraceback")
    assert said.count("Traceback") == said.count("RuntimeError: the cable is broken") == 1
    monkeypatch.setattr(distributed, "first_to_fail", lambda: False)
    assert run(raises(RuntimeError("the cable is broken"))) == run(raises(UserError("x"))) == (1, "")


def test_another_rank_says_which_it_is(run, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert run(raises(UserError("no such file: x"))) == (1, "error (rank 1): no such file: x\n")
    assert run(raises(KeyboardInterrupt())) == (130, "")


def test_plugins_lie_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "of_my_own.py").write_text(
        "from blipds.registry import SCHEDULES\n"
        "from blipds.training.schedules import ConstantLR\n"
        "SCHEDULES.register('of_my_own')(type('Mine', (ConstantLR,), {'__doc__': 'As constant_lr.'}))\n"
    )
    cli.import_plugins(["of_my_own"])
    assert SCHEDULES["of_my_own"].__name__ == "Mine"
    with pytest.raises(UserError, match=r"^--plugin nobody\.s: No module named 'nobody'$"):
        cli.import_plugins(["nobody.s"])


def test_list_needs_no_config_and_knows_the_plugins_before_it(monkeypatch, capsys):
    parse_arguments = runpy.run_path(str(REPOSITORY / "launch" / "finetune.py"))["parse_arguments"]
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--plugin", "tests.plugin_captioner", "--list"])
    with pytest.raises(SystemExit) as left:
        parse_arguments()
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert left.value.code in (0, None)
    assert {"blip_caption", "coco_caption", "cosine_step_lr", "cross_entropy", "CIDEr"} <= listed
    assert {"conv_gru", "few_shapes", "half", "doubled"} <= listed
