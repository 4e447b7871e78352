"""launch/finetune.py on tar shards from pipes: two real ranks, resumed in the middle, and a pipe that fails."""

import json
import tarfile

import pytest
from data.packing import add
from launching import launch

from blipds.data.shapes import make_scenes

SHARDS, IMAGES = 4, 10  # of each shard


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    scenes = iter(make_scenes("train", SHARDS * IMAGES, seed=1))
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for number in range(IMAGES):
                scene = next(scenes)
                scene.open().save(folder / "image.png")
                add(tar, f"{shard}-{number}.png", (folder / "image.png").read_bytes())
                add(tar, f"{shard}-{number}.txt", "\n".join(scene.captions()).encode())
    return folder


def finetune(folder, stream, *arguments):
    (folder / "run.yaml").write_text(f"""
model: {{model_type: tiny, vit_kwargs: {{patch_size: 16}}, med_config_path: tests/engine/no_dropout.json}}
datasets:
  custom_caption:
    captions_per_image: all
    shuffle_buffer: 4
    build_info: {{annotations: {{train: "{stream}"}}}}
run:
  {{runner: runner_iter, max_iters: 8, iters_per_inner_epoch: 4, batch_size_train: 3, num_workers: 2, log_freq: 1,
  valid_splits: [], keep_last: 5, output_dir: {folder}, job_id: run}}
""")
    return launch(2, "launch/finetune.py", "--cfg-path", folder / "run.yaml", *arguments)


def losses(folder):
    """By step; of a step that was taken twice, the later one."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def test_resumed_in_mid_stream(shards, tmp_path):
    """8 steps of 3 images a rank: into the second pass over its 20."""
    stream = f"pipe:cat {shards}/{{000..003}}.tar"
    whole = finetune(tmp_path, stream)
    assert whole.returncode == 0, whole.stdout[-3000:]
    assert "length     a stream; 8 steps in 2 epochs of 4" in whole.stdout
    expected = losses(tmp_path)
    assert sorted(expected) == list(range(1, 9))

    again = finetune(tmp_path, stream, "--resume", tmp_path / "run" / "checkpoints" / "step_00000004")
    assert again.returncode == 0, again.stdout[-3000:]
    assert "custom_caption: reading past 12 samples a rank that were trained on" in again.stdout
    resumed = losses(tmp_path)
    assert sorted(resumed) == list(range(1, 9))
    assert [resumed[step] for step in range(5, 9)] == pytest.approx([expected[step] for step in range(5, 9)], rel=1e-6)


def test_a_pipe_that_fails_on_one_rank(shards, tmp_path):
    """There is no shard 4, which rank 0 comes to in its third turn, and rank 1 never: one line, and both end."""
    process = finetune(tmp_path, f"pipe:cat {shards}/{{000..004}}.tar")
    assert process.returncode != 0
    assert process.stdout.count("error: pipe:cat") == 1
    assert f"pipe:cat {shards}/004.tar ended with exit status 1" in process.stdout
    assert "Traceback" not in process.stdout
