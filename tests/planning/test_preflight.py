"""The parsers and comparisons of preflight; tests/launch/test_several_machines.py runs it on two machines."""

import socket
import subprocess

import pytest
from launching import LAUNCHER, REPOSITORY, environment, free_port

from blipds.errors import UserError
from blipds.planning.preflight import (
    Command,
    Host,
    check_command,
    check_gpus,
    check_interfaces,
    check_port,
    check_run,
    check_same,
    checks,
    exported,
    port_is_free,
    read_hostfile,
)


@pytest.fixture
def hostfile(tmp_path):
    def write(text):
        (tmp_path / "hosts").write_text(text)
        return tmp_path / "hosts"

    return write


def test_hostfile(hostfile):
    text = "# two nodes\nnode1 slots=8\n\n  node2   slots=4  # the old one\n"
    assert read_hostfile(hostfile(text)) == [Host("node1", 8), Host("node2", 4)]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("node1 slots=8\nnode2\n", 2, "'node2' is no host; expected NAME slots=N"),
        ("node1 slots=eight\n", 1, "'node1 slots=eight' is no host"),
        ("node1 slots=0\n", 1, "'node1 slots=0' is no host"),
        ("node1 slots=8 max=9\n", 1, "is no host"),
        ("node1 slots=8\n\nnode1 slots=8\n", 3, "node1 stands twice"),
    ],
)
def test_a_malformed_hostfile_names_the_line(hostfile, text, line, said):
    path = hostfile(text)
    with pytest.raises(UserError) as error:
        read_hostfile(path)
    assert str(error.value).startswith(f"{path}:{line}: ") and said in str(error.value)


def test_an_empty_hostfile_is_an_error(hostfile):
    with pytest.raises(UserError, match="names no host"):
        read_hostfile(hostfile("# nobody\n"))


def test_a_missing_hostfile_ends_preflight_with_one_line(tmp_path):
    found = list(checks(tmp_path / "nowhere", []))
    assert len(found) == 1 and not found[0].good
    assert str(found[0]).startswith("failed  hostfile    no such hostfile: ")


def test_exported_variables(tmp_path):
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nHF_HOME=/a=b\n")
    environ = {"PYTHONPATH": "/code", "NCCL_DEBUG": "INFO", "HOME": "/root", "OMP_NUM_THREADS": "1"}
    assert exported(environ, [tmp_path, tmp_path / "nowhere"]) == {
        "PYTHONPATH": "/code",
        "NCCL_DEBUG": "INFO",
        "GLOO_SOCKET_IFNAME": "eth0",
        "HF_HOME": "/a=b",
    }
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nexport\n")
    with pytest.raises(UserError, match=r"\.deepspeed_env:2: 'export' is not NAME=value"):
        exported(environ, [tmp_path])


def test_what_preflight_reads_of_a_command():
    words = "deepspeed --hostfile hosts --master_port=29501 launch/finetune.py --cfg-path a.yaml --ds-config b.json "
    words += "--plugin my.module --options run.max_epoch=1 env.cache_root=/data"
    assert Command.parse(words.split()) == Command(
        hostfile="hosts",
        port=29501,
        cfg_path="a.yaml",
        ds_config="b.json",
        options=("run.max_epoch=1", "env.cache_root=/data"),
        plugins=("my.module",),
    )


def test_the_command_must_name_the_hostfile_that_was_checked(tmp_path):
    assert not check_command(tmp_path / "hosts", Command()).good
    other = check_command(tmp_path / "hosts", Command(hostfile="elsewhere"))
    assert not other.good and "it says --hostfile elsewhere" in other.text
    assert check_command(tmp_path / "hosts", Command(hostfile=str(tmp_path / "hosts"), launcher="slurm")).good


def test_versions_that_differ_are_named():
    facts = {"a": {"versions": {"torch": "2.9", "timm": "1.0"}}, "b": {"versions": {"torch": "2.8", "timm": "1.0"}}}
    found = check_same("versions", facts, "install the same everywhere")
    assert not found.good
    assert found.text == "torch is 2.9 on a and 2.8 on b: install the same everywhere"
    facts["b"] = facts["a"]
    assert check_same("versions", facts, "").good


def test_gpus_are_counted_against_slots():
    hosts = [Host("a", 8), Host("b", 8)]
    assert check_gpus(hosts, {"a": {"gpus": 0}, "b": {"gpus": 0}}).good
    assert check_gpus(hosts, {"a": {"gpus": 8}, "b": {"gpus": 8}}).good
    missing = check_gpus(hosts, {"a": {"gpus": 8}, "b": {"gpus": 7}})
    assert not missing.good and missing.text == "b has 7 GPUs, but the hostfile gives it 8 slots"


def facts_of_network(named, own="lo", route="eth1"):
    return {"a": {"named": named, "own": own, "route": route, "interfaces": ["eth0", "eth1", "lo"]}}


def test_the_interface_must_be_there_and_reach_the_others():
    hosts = [Host("a", 1), Host("b", 1)]

    def found(*args, **kwargs):
        facts = facts_of_network(*args, **kwargs)
        return check_interfaces(hosts, {**facts, "b": facts["a"]})

    assert found({"GLOO_SOCKET_IFNAME": "eth1"}).good
    assert found({}, own="eth1").good
    assert "gloo would take lo: put GLOO_SOCKET_IFNAME=eth1" in found({}).text
    assert "gloo would take eth0" in found({"GLOO_SOCKET_IFNAME": "eth0"}).text
    assert "NCCL_SOCKET_IFNAME=ib0, but a has eth0, eth1, lo" in found({"NCCL_SOCKET_IFNAME": "ib0"}).text


def test_a_port_that_is_held_is_not_free():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert not port_is_free(port)
    assert port_is_free(port)
    taken = check_port([Host("a", 1)], {"a": {"port_free": False}}, Command(port=29500))
    assert not taken.good and "deepspeed --master_port 29501" in taken.text


def test_the_run_must_be_the_same_and_checkpoints_must_fit():
    run = {"run": "", "config": "x", "data": "y", "output": "/out", "free": 50e9, "needed": 20e9}
    assert all(check.good for check in check_run({"a": run, "b": run}))
    changed = [check for check in check_run({"a": run, "b": {**run, "config": "z", "free": 10e9}}) if not check.good]
    assert [check.name for check in changed] == ["config", "disk"]
    assert changed[1].text == "b: only 10.0 GB free for 20.0 GB of checkpoints in /out"
    (broken,) = check_run({"a": run, "b": {"run": "no such annotation file: x.json"}})
    assert not broken.good and broken.text == "b: no such annotation file: x.json"


def test_a_run_with_too_few_ranks_stops_at_once(tmp_path):
    """What deepspeed does with a hostfile that is not there: it goes on alone."""
    start = [LAUNCHER, "--hostfile", tmp_path / "nowhere", "--num_accelerators", "1", "--master_port", free_port()]
    run = ["launch/finetune.py", "--cfg-path", "run_configs/shapes_tiny.yaml", "--options"]
    options = [f"run.output_dir={tmp_path}/out", "run.expect_world_size=16"]
    words = [str(word) for word in (*start, *run, *options)]
    done = subprocess.run(words, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    assert done.returncode != 0
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert said.startswith("error: run.expect_world_size is 16, but 1 rank was started: look at --hostfile")
    assert not (tmp_path / "out").exists()
