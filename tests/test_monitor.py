"""The monitor: what it writes can be read back, also after a crash and a resume."""

import json
import subprocess
import sys
import time

import pytest
from PIL import Image

from blipds.monitor import Monitor, NullMonitor, contact_sheet


def lines(run_dir):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    return [timeless(json.loads(line, parse_constant=refuse)) for line in text.splitlines()]


def timeless(line):
    """Without the time, which every line has; a torn line is another test's."""
    assert abs(line.pop("time", time.time()) - time.time()) < 3600
    return line


def board(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir / "tensorboard")).Reload()


@pytest.fixture
def monitor(tmp_path):
    monitor = Monitor(tmp_path)
    yield monitor
    monitor.close()


def test_train_line_has_full_precision(monitor, tmp_path):
    loss = 2.0 + 2.0**-40
    monitor.train(7, 1, {"loss": loss, "lr": 1e-5, "grad_norm": None, "skipped_steps": 3})
    expected = {"kind": "train", "step": 7, "epoch": 1, "loss": loss, "lr": 1e-5, "grad_norm": None, "skipped_steps": 3}
    assert lines(tmp_path) == [expected]  # readable at once, before close()
    assert isinstance(lines(tmp_path)[0]["skipped_steps"], int)
    monitor.close()
    scalars = board(tmp_path)
    assert sorted(scalars.Tags()["scalars"]) == ["train/loss", "train/lr", "train/skipped_steps"]
    assert [(event.step, event.value) for event in scalars.Scalars("train/loss")] == [(7, 2.0)]


def test_not_finite_stays_json(monitor, tmp_path):
    monitor.train(1, 0, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    (line,) = lines(tmp_path)
    assert line["loss"] is None and line["grad_norm"] is None and line["lr"] == 0.5
    assert line["not_finite"] == {"loss": "nan", "grad_norm": "inf"}


def test_tensors_and_numpy_numbers(monitor, tmp_path):
    import numpy
    import torch

    monitor.train(1, 0, {"loss": torch.tensor(1.5), "lr": numpy.float32(0.25)})
    assert lines(tmp_path)[0]["loss"] == 1.5 and lines(tmp_path)[0]["lr"] == 0.25


def test_evaluation(monitor, tmp_path, capsys):
    metrics, seconds = {"CIDEr": 0.25, "Bleu_4": 0.5}, {"generation": 1.234, "CIDEr": 0.5}
    monitor.evaluation("val", 0, 20, metrics, {"METEOR": "no Java"}, "best, fp32", seconds)
    head = {"kind": "eval", "split": "val", "epoch": 0, "step": 20}
    assert lines(tmp_path) == [
        head
        | {"CIDEr": 0.25, "Bleu_4": 0.5, "missing": {"METEOR": "no Java"}, "note": "best, fp32"}
        | {"seconds": {"generation": 1.23, "CIDEr": 0.5}}
    ]
    assert capsys.readouterr().out.splitlines() == [
        "val at step 20 (epoch 1): CIDEr 0.25  Bleu_4 0.5  [best, fp32]",
        "  METEOR is missing: no Java",
    ]
    monitor.close()
    assert [event.value for event in board(tmp_path).Scalars("val/CIDEr")] == [0.25]


def test_captions_without_scores(monitor, capsys):
    """Why they have none is said: there are no references, nobody wants scores, or no metric could run."""
    monitor.evaluation("val", 0, 20, {}, {}, "best, fp32", unscored="run.report_metric is false")
    monitor.evaluation("test", None, 20, {}, {}, unscored="no references")
    monitor.evaluation("val", None, 20, {}, {"CIDEr": "no Java"})
    assert capsys.readouterr().out.splitlines() == [
        "val at step 20 (epoch 1): captions only, run.report_metric is false  [best, fp32]",
        "test: captions only, no references",
        "val: captions only",
        "  CIDEr is missing: no Java",
    ]


def test_resume_drops_what_is_taken_again(tmp_path):
    before = Monitor(tmp_path)
    for step in range(1, 7):
        before.train(step, 0, {"loss": float(step)})
    before.evaluation("val", 0, 3, {"CIDEr": 0.3}, {})
    before.evaluation("val", 0, 6, {"CIDEr": 0.6}, {})
    before.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 2, "lo')  # the crash

    after = Monitor(tmp_path, resume_step=3)
    after.train(4, 0, {"loss": 40.0})
    after.close()
    assert [(line["kind"], line["step"]) for line in lines(tmp_path)] == [
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("eval", 3),
        ("train", 4),
    ]
    assert [path.name for path in tmp_path.glob("metrics*")] == ["metrics.jsonl"]
    curves = board(tmp_path)
    assert [(e.step, e.value) for e in curves.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert [e.step for e in curves.Scalars("val/CIDEr")] == [3]


def test_resume_drops_scores_that_come_again(tmp_path):
    """The scores of step 2 came after the checkpoint of step 3 was written, which awaits them still."""
    before = Monitor(tmp_path)
    for step in (1, 2, 3):
        before.train(step, 0, {"loss": float(step)})
    before.evaluation("val", 0, 1, {"CIDEr": 0.1}, {})
    before.evaluation("val", 0, 2, {"CIDEr": 0.2}, {})
    before.close()
    Monitor(tmp_path, resume_step=3, awaited_step=2).close()
    assert [(line["kind"], line["step"]) for line in lines(tmp_path)] == [
        *(("train", step) for step in (1, 2, 3)),
        ("eval", 1),
    ]


def test_start(monitor, tmp_path):
    """What a run is, and when each of its lines was written, in seconds since 1970."""
    monitor.start(20, {"ranks": 2, "device": "cpu"})
    monitor.checkpoint(20, 1.5)
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    times = [line.pop("time") for line in found]
    assert times == sorted(times) and abs(time.time() - times[0]) < 60
    assert found[0] == {"kind": "start", "step": 20, "ranks": 2, "device": "cpu"}


def test_checkpoint(monitor, tmp_path):
    monitor.checkpoint(20, 1.5)
    monitor.close()
    assert lines(tmp_path) == [{"kind": "save", "step": 20, "seconds": 1.5}]
    assert [(e.step, e.value) for e in board(tmp_path).Scalars("save/seconds")] == [(20, 1.5)]


def test_captions(monitor, tmp_path):
    images = [Image.new("RGB", (60, 30), "red"), Image.new("L", (30, 90))]
    monitor.captions("val", 20, images, ["a red box", ""], [["red", "a box", "third"], []])
    monitor.close()
    sheet = Image.open(tmp_path / "samples" / "val_step20.png")
    assert sheet.size == contact_sheet(images, ["a red box", ""], [["red", "a box"], []]).size
    assert board(tmp_path).Tags()["images"] == ["val/captions"]


def test_contact_sheet_draws_image_and_text():
    sheet = contact_sheet([Image.new("RGB", (320, 240), "red")], ["a word " * 50], [["grey text"] * 5])
    assert sheet.getpixel((12 + 160, 12 + 120)) == (255, 0, 0)
    below = sheet.crop((0, 12 + 240, *sheet.size)).convert("L")
    assert below.getextrema() == (0, 255)  # black text on white
    assert sheet.height < 240 + 200  # long captions are cut, not drawn for ever


def test_contact_sheet_grid():
    one = contact_sheet([Image.new("RGB", (5, 5))], ["x"], [["y"]])
    five = contact_sheet([Image.new("RGB", (5, 5))] * 5, ["x"] * 5, [["y"]] * 5, columns=2)
    assert five.height == 3 * one.height and five.width == 2 * (one.width - 12) + 12


def test_progress_without_a_terminal_is_lines(tmp_path):
    """Into a pipe: a first line, one every 30 s, a last line; and no carriage returns that would garble a log."""
    code = f"""if True:
        from pathlib import Path
        from blipds.monitor import Monitor
        monitor = Monitor(Path({str(tmp_path)!r}))
        for epoch in range(2):
            monitor.start_epoch(epoch, 2, 200, done=50 if epoch == 0 else 0)
            for done in range(51 if epoch == 0 else 1, 201):
                monitor.advance(done, {{"loss": 2.5, "lr": "1e-05"}})
                if done == 100:
                    monitor.say("half way")
        monitor.close()
        monitor.close()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "half way\nhalf way\n"
    assert "\r" not in done.stderr
    shown = [line for line in done.stderr.splitlines() if line.startswith("epoch")]
    assert [line.split(" [")[0] for line in shown] == [
        "epoch 1/2 step 50/200",
        "epoch 1/2 step 200/200",
        "epoch 2/2 step 0/200",
        "epoch 2/2 step 200/200",
    ]
    assert shown[1].endswith("loss=2.5, lr=1e-05]")


def test_an_epoch_ends_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("blipds.monitor.QUIET_SECONDS", 0.0)
    monitor = Monitor(tmp_path)
    monitor.start_epoch(0, 1, 2)
    monitor.advance(1, {})
    monitor.advance(2, {"loss": 2.5})
    monitor.close()
    shown = capsys.readouterr().err.splitlines()
    assert [line.split(" [")[0] for line in shown] == [f"epoch 1/1 step {done}/2" for done in range(3)]
    assert shown[-1].endswith("loss=2.5]")


def test_null_monitor_does_nothing():
    def methods(kind):
        return {
            name for name, value in vars(kind).items() if callable(value) and (name[0] != "_" or name == "__init__")
        }

    assert methods(NullMonitor) == methods(Monitor)
    null = NullMonitor()
    null.start_epoch(0, 1, 1)
    null.evaluation("val", 0, 1, {}, {}, unscored="no references")
    null.say("nothing")
    assert vars(null) == {}


def test_importing_is_light():
    code = "import sys, blipds.monitor; assert not {'tensorboard', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
