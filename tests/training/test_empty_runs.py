"""Runs that come to nothing, as a person starts them: an error of one line, and nothing that was trained is lost."""

import json

import pytest
from launching import launch
from PIL import Image


@pytest.fixture
def collection(tmp_path):
    """A run config for eight images to train on, and five for validation; `spoil(split)` makes them unreadable."""
    numbers = {"train": range(8), "val": range(5)}
    for split, its in numbers.items():
        for number in its:
            Image.new("RGB", (40, 30), (30 * number, 100, 50)).save(tmp_path / f"{split}{number}.png")
        entries = [{"image": f"{split}{number}.png", "caption": f"number {number}"} for number in its]
        (tmp_path / f"{split}.json").write_text(json.dumps(entries))
    (tmp_path / "run.yaml").write_text(
        f"""
model: {{model_type: tiny, med_config_path: tests/engine/no_dropout.json}}
datasets:
  custom_caption: {{build_info: {{annotations: {{train: {tmp_path}/train.json, val: {tmp_path}/val.json}}}}}}
run: {{output_dir: {tmp_path}, job_id: run, max_epoch: 1, batch_size_train: 2, num_workers: 0, log_freq: 1,
       save_last: false, async_save: true}}
"""
    )

    def spoil(split):
        for number in numbers[split]:
            (tmp_path / f"{split}{number}.png").write_bytes(b"no image")

    return spoil


def error_of(process):
    assert process.returncode == 1 and "Traceback" not in process.stdout, process.stdout[-4000:]
    (error,) = [line for line in process.stdout.splitlines() if line.startswith("error")]
    return error


def test_no_training_image_can_be_read(collection, tmp_path):
    collection("train")
    process = launch(1, "launch/finetune.py", "--cfg-path", tmp_path / "run.yaml")
    error = error_of(process)
    assert "split 'train': none of its 8 images can be read" in error  # at the start, before the model is built
    assert f"{tmp_path}/train0.png" in error and "cannot identify image file" in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_no_image_to_validate_can_be_read(collection, tmp_path):
    """On two ranks, with checkpoints in the background; then the images are mended, and the run resumes on one."""
    collection("val")
    process = launch(2, "launch/finetune.py", "--cfg-path", tmp_path / "run.yaml")
    error = error_of(process)
    assert f"val: none of 5 images can be read; {tmp_path}/val0.png: " in error
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000002"]

    for number in range(5):
        Image.new("RGB", (40, 30)).save(tmp_path / f"val{number}.png")
    process = launch(1, "launch/finetune.py", "--cfg-path", tmp_path / "run.yaml", "--resume", "auto")
    assert process.returncode == 0, process.stdout[-4000:]
    assert "the run had ended after step 2; its captions are scored again" in process.stdout
    assert (checkpoints / "best").resolve().name == "step_00000002"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["split"], line["step"]) for line in lines if line["kind"] == "eval"] == [("val", 2)]
