"""launch/preflight.py and launch/finetune.py on two machines, by `deepspeed --hostfile`, as launch/README.md says."""

import json
import os
import signal
import sys

import pytest
from launching import LAUNCHER, REPOSITORY, free_port
from two_machines import ADDRESSES, INTERFACE, two_machines, until, what_is_missing


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """CI=true insists on them: tests/run.sh installs the programs."""
    if reason := what_is_missing():
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with two_machines(tmp_path_factory.mktemp("machines")) as machines:
        hosts = "".join(f"{address} slots=1\n" for address in ADDRESSES)
        (machines.folder / "hosts").write_text(hosts)
        yield machines


def finetune(job, *options, resume=()):
    """The drawn shapes, cut down to seconds, under ZeRO-3."""
    sizes = [
        "datasets.shapes_caption.num_images={train: 24, val: 6, test: 6}",
        "datasets.shapes_caption.captions_per_image=all",
    ]
    small = [
        "run.batch_size_train=4",
        f"model.med_config_path={REPOSITORY}/tests/engine/no_dropout.json",
        "run.num_workers=1",
        "run.log_freq=1",
    ]
    where = [f"run.job_id={job}", "run.test_splits=[]", *options]
    return [
        *(str(LAUNCHER), "--hostfile", "hosts", "--master_port", str(free_port())),
        *(REPOSITORY / "launch" / "finetune.py", "--cfg-path", REPOSITORY / "tests" / "shapes_tiny.yaml"),
        *("--ds-config", REPOSITORY / "ds_configs" / "zero3.json", *resume),
        *("--options", *sizes, *small, *where),
    ]


def lines(machines, job, kind):
    metrics = machines.folder / "output" / "shapes_tiny" / job / "metrics.jsonl"
    entries = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return [entry for entry in entries if entry["kind"] == kind]


def preflight(*command, hostfile="hosts"):
    return [sys.executable, REPOSITORY / "launch" / "preflight.py", "--hostfile", hostfile, *command]


def failures(printed):
    return [line for line in printed.splitlines() if line.startswith("failed")]


def test_two_machines_train_resume_and_end_together(machines):
    """Preflight finds nothing wrong and starts the run. A second one resumes it, until one of its ranks is killed.

    Both machines are then free within 60 seconds, and the job script sees a status.
    """
    status, printed = machines.run(*preflight("--", *finetune("run", "run.max_epoch=1", "run.expect_world_size=2")))
    assert status == 0, printed[-4000:]
    found = [line.split()[1] for line in printed.splitlines() if line.startswith("ok ")]
    assert found[:3] == ["hostfile", "command", "ssh"] and found[-1] == "ops"
    assert {*found[3:-1]} == {"versions", "code", "config", "data", "gpus", "network", "shared", "port", "disk"}
    assert f"interface {INTERFACE}" in printed
    assert "x 2 ranks = 8 images a step" in printed
    checkpoints = machines.folder / "output" / "shapes_tiny" / "run" / "checkpoints"
    assert (checkpoints / "latest").resolve().name == "step_00000003"
    assert [line["step"] for line in lines(machines, "run", "eval")] == [3]

    log = machines.folder / "resumed.log"
    endless = finetune("run", "run.max_epoch=1000", "run.val_freq=2", resume=["--resume", "auto"])
    run = machines.popen(*endless, log=log)
    assert until(lambda: run.poll() is not None or len(lines(machines, "run", "eval")) >= 2, 400)
    assert run.poll() is None, log.read_text()[-4000:]
    os.kill(rank(machines.processes(1)).pid, signal.SIGKILL)
    assert until(lambda: not machines.processes(0) and not machines.processes(1), 60), [
        process.cmdline() for machine in (0, 1) for process in machines.processes(machine)
    ]
    assert run.wait(1) != 0
    assert "resumed    after step 3" in log.read_text()
    evaluations = lines(machines, "run", "eval")
    assert [line["step"] for line in evaluations[:2]] == [3, 6]
    assert all(isinstance(line["CIDEr"], float) for line in evaluations)


def test_preflight_names_a_missing_file_a_taken_port_and_the_interface(machines):
    """Without GLOO_SOCKET_IFNAME in .deepspeed_env gloo would talk to itself."""
    env = machines.folder / ".deepspeed_env"
    kept = env.read_text()
    env.write_text("DS_ACCELERATOR=cpu\n")
    command = [*("deepspeed", "--hostfile", "hosts", "--master_port", "29777"), "x.py", "--cfg-path", "nowhere.yaml"]
    holder = [sys.executable, "-c", "import socket, time; s = socket.create_server(('', 29777)); time.sleep(600)"]
    held = machines.popen(*holder, log=machines.folder / "holder.log")
    try:
        status, printed = machines.run(*preflight("--", *command))
    finally:
        held.kill()
        held.wait()
        env.write_text(kept)
    assert status == 1
    network, port, config = sorted(failures(printed))
    assert f"put GLOO_SOCKET_IFNAME={INTERFACE} (and NCCL_SOCKET_IFNAME) into .deepspeed_env" in network
    assert f"{ADDRESSES[0]}: 29777 is in use" in port
    assert f"{ADDRESSES[1]}: no such config file: nowhere.yaml" in config


def rank(processes):
    """The process that DeepSpeed's launcher started on a machine; its data workers look alike, but for the parent."""
    return next(
        process
        for process in processes
        if "--local_rank=0" in process.cmdline() and "deepspeed.launcher.launch" in process.parent().cmdline()
    )
