"""What wandb and mlflow hold can be read back, a resumed run is the same run, and no tracker ever stops one."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from blipds import cli, trackers
from blipds.config.run import load_run_config
from blipds.config.sections import Config
from blipds.errors import UserError
from blipds.monitor import Monitor

CONFIG = {"run": {"init_lr": 1e-5}}


def follow(run_dir, *names, start=1):
    """Two log lines, a validation and its captions after step `start`."""
    monitor = Monitor(run_dir, start - 1, trackers=names, config=CONFIG)
    for step in (start, start + 1):
        monitor.train(step, 0, {"loss": 1.0 / step, "grad_norm": None})
    monitor.captions("val", start, [Image.new("RGB", (60, 30), "red")], ["a red box"], [["red", "a box"]])
    monitor.evaluation("val", 0, start, {"CIDEr": 0.5}, {})  # scores come after later steps
    monitor.say_where()
    monitor.close()


def read_wandb(folder):
    """The records of an offline run: protocol buffers in LevelDB's log format, behind a header of 7 bytes.

    A block of 32768 bytes holds pieces, each behind CRC (4), length (2) and kind (1: whole, 2: first, 3: middle, 4:
    last); fewer than 7 bytes at a block's end are left empty.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("run-*.wandb")
    data, place, pieces, records = path.read_bytes(), 7, b"", []
    while place < len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        pieces += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(pieces))
            pieces = b""
    return records


def test_wandb_offline(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    follow(tmp_path, "wandb")
    follow(tmp_path, "wandb", start=3)
    where = f"watch      wandb sync {tmp_path}/wandb/offline-run-"
    printed = [line for line in capfd.readouterr().out.splitlines() if not line.startswith("val ")]
    assert [line.startswith(where) for line in printed] == [True, True]
    first, second = (read_wandb(folder) for folder in sorted((tmp_path / "wandb").glob("offline-run-*")))
    runs = [record.run for records in (first, second) for record in records if record.HasField("run")]
    (run_id,) = {run.run_id for run in runs}
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": run_id}
    assert {run.display_name for run in runs} == {tmp_path.name}
    assert {update.key: json.loads(update.value_json) for update in runs[0].config.update}["run"] == CONFIG["run"]
    logged = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in first
        if record.HasField("history")
    ]
    assert [(line["step"], line["train/loss"]) for line in logged if "train/loss" in line] == [(1, 1.0), (2, 0.5)]
    assert [(line["step"], line["val/CIDEr"]) for line in logged if "val/CIDEr" in line] == [(1, 0.5)]
    table = next((tmp_path / "wandb").glob("offline-run-*/files/media/table/val/captions_*"))
    found = json.loads(table.read_text())
    assert found["columns"] == ["image", "caption", "references"]
    assert found["data"][0][1:] == ["a red box", "red\na box"]


def test_mlflow_in_a_local_store(tmp_path, monkeypatch, capfd):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    run_dir = tmp_path / "run"
    follow(run_dir, "mlflow")
    follow(run_dir, "mlflow", start=3)
    run_id = json.loads((run_dir / "trackers.json").read_text())["mlflow"]
    printed = [line for line in capfd.readouterr().out.splitlines() if not line.startswith("val ")]
    assert printed == [f"watch      mlflow run {run_id} at file://{tmp_path}/store"] * 2
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("blipds")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, "run", "FINISHED")
    losses = client.get_metric_history(run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in losses] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert [metric.step for metric in client.get_metric_history(run_id, "val/CIDEr")] == [1, 3]
    names = {file.path for file in client.list_artifacts(run_id, "captions")}
    assert names == {f"captions/val_step{step}.{kind}" for step in (1, 3) for kind in ("json", "png")}
    table = json.loads(Path(client.download_artifacts(run_id, "captions/val_step1.json")).read_text())
    assert table == {"columns": ["caption", "references"], "data": [["a red box", ["red", "a box"]]]}
    assert yaml.safe_load(Path(client.download_artifacts(run_id, "config.yaml")).read_text()) == CONFIG


class Broken(trackers.TensorBoard):
    def scalars(self, step, values):
        raise ConnectionError("the network\nis down")


def test_a_tracker_that_fails_is_left_out_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Broken)
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", lambda *arguments: 1 / 0)
    follow(tmp_path, "wandb", "mlflow", "tensorboard")
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("val ")]
    assert printed == [
        "mlflow fails, and the run goes on without it: ZeroDivisionError: division by zero",
        "wandb fails, and the run goes on without it: ConnectionError: the network is down",
        f"watch      tensorboard --logdir {tmp_path.parent}",
    ]
    assert [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        *("train", "train", "eval")
    ]


def test_wandb_without_a_login_never_asks(tmp_path):
    """It would wait for an answer, and the other ranks for this one."""
    code = "from pathlib import Path; from blipds.monitor import Monitor; Monitor(Path('run'), trackers=['wandb'])"
    variables = {"PATH": "/usr/bin", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd=tmp_path)
    assert done.stdout.startswith("wandb fails, and the run goes on without it: RuntimeError: not logged in: ")


def test_a_package_that_is_missing(tmp_path, monkeypatch):
    made = Config()
    made.run.output_dir, made.run.trackers = str(tmp_path), ["tensorboard", "wandb"]
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(UserError, match=r"^run\.trackers: wandb is not installed: pip install wandb$"):
        cli.open_run_dir(made)


def test_an_unknown_tracker(tmp_path):
    (tmp_path / "run.yaml").write_text("run: {trackers: [wandbb]}")
    with pytest.raises(UserError, match=r"wandbb.*did you mean 'wandb'"):
        load_run_config(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("run: {trackers: mlflow}")
    assert load_run_config(tmp_path / "run.yaml")[0].run.trackers == ["mlflow"]
