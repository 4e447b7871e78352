"""How a command ends, in this process: one line and a status for each way; plugins; `--list`."""

import runpy
import signal
import sys

import pytest
from launching import REPOSITORY

from blipds import cli, distributed
from blipds.errors import UserError
from blipds.registry import SCHEDULES
from blipds.signals import Stopped


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
