"""The checks of preflight, in this process; tests/launch/test_several_machines.py runs them on two machines."""

import json
import runpy
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
from launching import REPOSITORY

from blipds import distributed
from blipds.config.run import load_run_config
from blipds.errors import UserError
from blipds.planning import preflight
from blipds.planning.planner import ParameterSizes
from blipds.planning.preflight import (
    Check,
    answer,
    check_command,
    check_disk,
    check_gpus,
    check_interfaces,
    check_same,
    compare,
    exported_variables,
    parse_command,
    read_hostfile,
    run_checks,
)

TINY = REPOSITORY / "tests" / "shapes_tiny.yaml"


@pytest.fixture
def hostfile(tmp_path):
    def write(text):
        (tmp_path / "hosts").write_text(text)
        return tmp_path / "hosts"

    return write


# ---- What the user gives --------------------------------------------------------------------------------------------


def test_hostfile(hostfile):
    text = "# two nodes\nnode1 slots=8\n\n  node2   slots=4  # the old one\n"
    assert read_hostfile(hostfile(text)) == {"node1": 8, "node2": 4}


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("node1 slots=8\nnode2\n", 2, "'node2' is not a host; expected NAME slots=N"),
        ("node1 slots=eight\n", 1, "'node1 slots=eight' is not a host"),
        ("node1 slots=0\n", 1, "'node1 slots=0' is not a host"),
        ("node1 slots=8 max=9\n", 1, "is not a host"),
        ("node1 slots=8\n\nnode1 slots=8\n", 3, "node1 is listed twice"),
    ],
)
def test_a_malformed_hostfile_names_the_line(hostfile, text, line, said):
    path = hostfile(text)
    with pytest.raises(UserError) as error:
        read_hostfile(path)
    assert str(error.value).startswith(f"{path}:{line}: ") and said in str(error.value)


def test_an_empty_hostfile_is_an_error(hostfile):
    with pytest.raises(UserError, match="lists no hosts"):
        read_hostfile(hostfile("# nobody\n"))


def test_exported_variables(tmp_path):
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nHF_HOME=/a=b\n")
    environ = {"PYTHONPATH": "/code", "NCCL_DEBUG": "INFO", "HOME": "/root", "OMP_NUM_THREADS": "1"}
    assert exported_variables(environ, [tmp_path, tmp_path / "nowhere"]) == {
        "PYTHONPATH": "/code",
        "NCCL_DEBUG": "INFO",
        "GLOO_SOCKET_IFNAME": "eth0",
        "HF_HOME": "/a=b",
    }
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nexport\n")
    with pytest.raises(UserError, match=r"\.deepspeed_env:2: 'export' is not NAME=value"):
        exported_variables(environ, [tmp_path])


def test_what_preflight_reads_of_a_command():
    words = "deepspeed --hostfile hosts --include node1:0 --master_port=29501 launch/finetune.py --cfg-path a.yaml "
    words += "--ds-config b.json --plugin my.module --resume auto --options run.max_epoch=1 env.cache_root=/data"
    command = parse_command(words.split())
    assert (command.hostfile, command.master_port, command.launcher) == ("hosts", "29501", "pdsh")
    assert (str(command.cfg_path), str(command.ds_config)) == ("a.yaml", "b.json")
    assert (command.options, command.plugin) == (["run.max_epoch=1", "env.cache_root=/data"], ["my.module"])
    with pytest.raises(UserError, match="--master_port high is not a number"):
        parse_command(["deepspeed", "--master_port", "high"])


def test_the_command_must_name_the_hostfile_that_was_checked(tmp_path):
    with pytest.raises(UserError, match="it has no --hostfile"):
        check_command(tmp_path / "hosts", parse_command([]))
    with pytest.raises(UserError, match="it says --hostfile elsewhere"):
        check_command(tmp_path / "hosts", parse_command(["-H", "elsewhere"]))
    same = parse_command(["--hostfile", str(tmp_path / "hosts"), "--launcher", "slurm"])
    assert check_command(tmp_path / "hosts", same) == "the same hostfile, started by slurm"


# ---- On each host ---------------------------------------------------------------------------------------------------


def test_the_interface_must_exist_and_reach_the_others():
    def said(named, own="lo", route="eth1"):
        try:
            return check_interfaces(["eth0", "eth1", "lo"], named, own, route)
        except UserError as error:
            return f"failed: {error}"

    assert said({"GLOO_SOCKET_IFNAME": "eth1"}) == said({}, own="eth1") == "interface eth1"
    assert said({}, route=None) == "interface lo"  # one machine
    assert said({}).startswith("failed: the others are reached by eth1, but gloo would take lo: put GLOO_SOCKET_IFNAME")
    assert "but gloo would take eth0" in said({"GLOO_SOCKET_IFNAME": "eth0"})
    assert said({"NCCL_SOCKET_IFNAME": "ib0"}).startswith("failed: NCCL_SOCKET_IFNAME=ib0, but there is eth0, eth1, lo")


def test_a_host_says_what_is_wrong_with_it(tmp_path):
    """A port in use, a file that another machine wrote and this one cannot see, a run config that is not there."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        words = ["deepspeed", "--master_port", str(port), "--cfg-path", "nowhere.yaml"]
        said = json.loads(json.dumps(answer("127.0.0.1", 1, tmp_path / "unseen", words)))
    failed = {name: text for name, good, text in said["checks"] if not good}
    assert failed["port"] == f"{port} is in use: deepspeed --master_port {port + 1}"
    assert failed["shared disk"].startswith(f"{tmp_path} is not")
    assert failed["run config"].startswith("no such config file: nowhere.yaml; packaged: caption_coco_base, ")
    words = ["deepspeed", "--master_port", str(port), "--cfg-path", str(TINY)]
    words += ["--options", "datasets.shapes_caption.num_images={train: 4, val: 2, test: 2}"]
    (tmp_path / "seen").touch()
    said = answer("127.0.0.1", 1, tmp_path / "seen", [*words, f"run.output_dir={tmp_path}"])
    assert [name for name, good, _ in said["checks"] if good] == ["network", "shared disk", "port", "disk"]
    assert said["same"].keys() == {"versions", "code", "config", "data"}


def test_three_checkpoints_must_fit_on_the_disk(tmp_path, monkeypatch):
    """Of 1 billion trainable and 1 billion frozen parameters: 3 x (2 x 8 + 1 x 12) = 84 GB."""
    monkeypatch.setattr(ParameterSizes, "of", lambda config: ParameterSizes(((10**9,),), (10**9,)))
    config, _ = load_run_config(TINY, [f"run.output_dir={tmp_path}"])
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=84 * 10**9))
    assert check_disk(config) == f"84.0 GB free for 84.0 GB of checkpoints in {tmp_path}"
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=83 * 10**9))
    with pytest.raises(UserError, match=r"only 83\.0 GB free for 84\.0 GB"):
        check_disk(config)


# ---- Comparing ------------------------------------------------------------------------------------------------------


def test_versions_that_differ_are_named():
    here, there = {"torch": "2.9", "timm": "1.0"}, {"torch": "2.8", "timm": "1.0"}
    with pytest.raises(UserError, match=r"^torch is 2.9 on a and 2.8 on b: install the same everywhere$"):
        check_same({"a": here, "b": there}, "install the same everywhere")
    assert check_same({"a": here, "b": here}, "") == "torch 2.9, timm 1.0"


def test_gpus_are_counted_against_slots():
    hosts = {"a": 8, "b": 8}
    assert check_gpus(hosts, {"a": 0, "b": 0}).startswith("none on any host")
    assert check_gpus(hosts, {"a": 8, "b": 9}) == "as many as slots; 1 more stay unused"
    with pytest.raises(UserError, match="b has 7 GPUs, but the hostfile gives it 8 slots"):
        check_gpus(hosts, {"a": 8, "b": 7})


def test_what_a_host_lacks_is_said_with_its_name():
    code = {"versions": {"torch": "2.9"}, "code": {"digest": "x"}}
    same = {**code, "config": {"digest": "y"}, "data": {"digest": "z"}}
    good = {"same": same, "gpus": 0, "checks": [Check("disk", True, "50 GB free")]}
    full = {"same": {**same, "data": {"digest": "w"}}, "gpus": 0, "checks": [Check("disk", False, "only 1 GB free")]}
    broken = {"same": code, "gpus": 0, "checks": [Check("run config", False, "?")]}
    hosts = {"a": 1, "b": 1}
    assert all(check.good for check in compare(hosts, {"a": good, "b": good}))
    failed = [check for check in compare(hosts, {"a": good, "b": full}) if not check.good]
    assert [(check.name, check.text) for check in failed] == [
        ("data", "digest is z on a and w on b: annotations must be the same, at the same path"),
        ("disk", "b: only 1 GB free"),
    ]
    (failed,) = [check for check in compare(hosts, {"a": good, "b": broken}) if not check.good]
    assert str(failed) == "failed  run config  b: ?"


# ---- From end to end ------------------------------------------------------------------------------------------------


def test_a_missing_hostfile_ends_preflight_with_one_line(tmp_path):
    (found,) = run_checks(tmp_path / "nowhere", [])
    assert str(found).startswith(f"failed  hostfile    {tmp_path}/nowhere: cannot be read: ")


def test_a_host_that_does_not_answer_is_named(hostfile, monkeypatch):
    """A shell stands in for ssh; `gone` is a host that it does not know."""
    script = '[ "$1" != gone ] || { echo "no route to host" >&2; exit 255; }; exec sh -c "$2"'
    monkeypatch.setattr(preflight, "SSH", ("sh", "-c", script, "ssh"))
    found, command, ssh = run_checks(hostfile("here slots=1\ngone slots=2\n"), ["true"])
    assert found.good and found.text.endswith("2 hosts, 3 slots")
    assert not command.good and "it has no --hostfile" in command.text
    assert not ssh.good and ssh.text.startswith("gone: no route to host: ssh must work without a password")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    *_, ssh, python = run_checks(hostfile("here slots=1\n"), [])
    assert ssh.good and not python.good
    assert python.text.startswith("here: ") and "/nowhere/python and blipds must be there too" in python.text


def test_a_run_with_too_few_ranks_stops_at_once(tmp_path, monkeypatch):
    """Without its hostfile deepspeed starts the ranks of this machine alone."""
    monkeypatch.setattr(distributed, "initialise", lambda minutes: torch.device("cpu"))
    words = ["finetune.py", "--cfg-path", str(TINY), "--options", f"run.output_dir={tmp_path}/out"]
    monkeypatch.setattr(sys, "argv", [*words, "run.expect_world_size=16"])
    main = runpy.run_path(str(REPOSITORY / "launch" / "finetune.py"))["main"]
    with pytest.raises(UserError, match=r"run.expect_world_size is 16, but 1 rank was started: look at --hostfile"):
        main()
    assert not (tmp_path / "out").exists()
