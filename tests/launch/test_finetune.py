"""launch/finetune.py and launch/evaluate.py as a person runs them: real ranks, a small captioner of drawn shapes."""

import json
import re
import time

import pytest
import torch
from launching import launch, launch_as_typed
from PIL import Image

ZERO2, ZERO3 = "ds_configs/zero2.json", "ds_configs/zero3.json"


def arguments(output, *options, ds_config=ZERO2):
    shapes = ["datasets.shapes_caption.num_images.train=90", "datasets.shapes_caption.captions_per_image=all"]
    sizes = [*shapes, "run.limit_val=11", "run.batch_size_train=8"]
    small = ["model.med_config_path=tests/engine/no_dropout.json", "run.num_workers=1", "run.batch_size_eval=4"]
    options = [*sizes, *small, "run.log_freq=1", f"run.output_dir={output}", "run.job_id=test", *options]
    return ["--cfg-path", "tests/shapes_tiny.yaml", "--ds-config", ds_config, "--options", *options]


def lines(run_dir, kind):
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] == kind]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run directory of two epochs on two ranks under ZeRO-3, and what was printed."""
    output = tmp_path_factory.mktemp("output")
    options = arguments(output, "run.max_epoch=2", "run.test_splits=[test]", ds_config=ZERO3)
    process = launch_as_typed(2, "launch/finetune.py", *options)
    assert process.returncode == 0, process.stdout[-4000:]
    return output / "test", process.stdout


def test_start_block(finished):
    _, printed = finished
    assert "batch      8 micro x 1 accumulated x 2 ranks = 16 images a step, about 80 captions" in printed
    # 90 images in global batches of 16: five whole ones, and the last completed with fillers
    assert "length     90 samples (450 captions), 6 steps a pass; 12 steps in 2 epochs of 6" in printed
    assert "ZeRO stage 3" in printed


def test_metrics_file(finished):
    run_dir, _ = finished
    train = lines(run_dir, "train")
    assert [line["step"] for line in train] == list(range(1, 13))
    assert [line["epoch"] for line in train] == [0] * 6 + [1] * 6
    for line in train:
        assert {"loss", "lr", "grad_norm", "images_per_s", "captions_per_s", "data_wait"} <= set(line)
    assert train[-1]["loss"] < train[0]["loss"]
    val, test = lines(run_dir, "eval")[:2], lines(run_dir, "eval")[2]
    assert [(line["split"], line["epoch"], line["step"]) for line in val] == [("val", 0, 6), ("val", 1, 12)]
    assert test["split"] == "test"
    names = {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "agg_metrics"}
    assert names <= set(val[0]) and not val[0]["missing"]
    assert val[0]["agg_metrics"] == pytest.approx(val[0]["CIDEr"] + val[0]["Bleu_4"])


def test_every_image_is_captioned_once(finished):
    """11 images on two ranks: shares of 6 and 5, in batches of 4."""
    run_dir, _ = finished
    best = max(lines(run_dir, "eval")[:2], key=lambda line: line["agg_metrics"])
    for name in ("val_epoch0", "val_epoch1", f"test_epoch{best['epoch']}"):
        results = json.loads((run_dir / "results" / f"{name}.json").read_text())
        ids = [result["image_id"] for result in results]
        split = name.split("_")[0]
        assert ids == [f"{split}-42-{number:06d}" for number in range(11)]
        assert all(isinstance(result["caption"], str) for result in results)


def test_run_directory(finished):
    run_dir, _ = finished
    assert (run_dir / "checkpoints" / "latest").resolve().name == "step_00000012"
    assert (run_dir / "checkpoints" / "best" / "model.safetensors").exists()
    assert list((run_dir / "tensorboard").glob("events*"))
    assert Image.open(run_dir / "samples" / "val_step12.png").width > 100
    assert json.loads((run_dir / "ds_config.json").read_text())["train_batch_size"] == 16
    assert "lr_sched: cosine_step_lr" in (run_dir / "config.yaml").read_text()


def test_report(finished):
    """Rank 0's, about both splits; with the CIDEr of each image of each evaluation."""
    run_dir, _ = finished
    page = (run_dir / "report.html").read_text()
    assert "Captions of val" in page and "Captions of test" in page and page.rstrip().endswith("</html>")
    for line in lines(run_dir, "eval"):
        entries = json.loads((run_dir / "scores" / f"{line['split']}_epoch{line['epoch']}.json").read_text())
        assert [entry["image_id"] for entry in entries] == [f"{line['split']}-42-{number:06d}" for number in range(11)]
        assert sum(entry["CIDEr"] for entry in entries) / 11 == pytest.approx(line["CIDEr"])


def test_tensorboard_holds_the_curves(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir, _ = finished
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    losses = [event.value for event in board.Scalars("train/loss")]
    assert losses == pytest.approx([line["loss"] for line in lines(run_dir, "train")], rel=1e-6)
    assert {"train/lr", "train/grad_norm", "train/images_per_s", "val/CIDEr"} <= set(board.Tags()["scalars"])
    assert "val/captions" in board.Tags()["images"]


def test_evaluate_writes_what_the_run_wrote(finished, tmp_path):
    """One rank instead of two, from the command line: the same captions of the best checkpoint, the same scores."""
    run_dir, _ = finished
    options = [*arguments(tmp_path)[arguments(tmp_path).index("--options") :]]
    where = ["--cfg-path", "tests/shapes_tiny.yaml", "--checkpoint", run_dir, "--split", "test"]
    process = launch_as_typed(1, "launch/evaluate.py", *where, *options)
    assert process.returncode == 0, process.stdout[-4000:]
    written = next((run_dir / "results").glob("test_epoch*.json")).read_text()
    assert (tmp_path / "test" / "results" / "test.json").read_text() == written
    scores = [next(line for line in lines(d, "eval") if line["split"] == "test") for d in (run_dir, tmp_path / "test")]
    assert scores[0]["CIDEr"] == scores[1]["CIDEr"]
    assert "Captions of test" in (tmp_path / "test" / "report.html").read_text()


def test_a_checkpoint_of_two_ranks_under_zero3_exports_as_one_under_zero0(tmp_path):
    exported = []
    for stage in (0, 3):
        ds_config = tmp_path / f"stage{stage}.json"
        ds_config.write_text(json.dumps({"zero_optimization": {"stage": stage}, "bf16": {"enabled": False}}))
        options = ["run.runner=runner_iter", "run.max_iters=3", "run.valid_splits=[]", "run.test_splits=[]"]
        output = tmp_path / f"zero{stage}"
        process = launch(2, "launch/finetune.py", *arguments(output, *options, ds_config=ds_config))
        assert process.returncode == 0, process.stdout[-4000:]
        file = tmp_path / f"zero{stage}.pth"
        process = launch(1, "launch/export.py", "--checkpoint", output / "test", "--format", "blip", "--output", file)
        assert process.returncode == 0, process.stdout[-4000:]
        exported.append(torch.load(file, weights_only=True)["model"])
    zero0, zero3 = exported
    assert zero0.keys() == zero3.keys() and len(zero0) > 100
    for name, tensor in zero0.items():
        # three steps of Adam at 1e-3: far less than one step's difference in any weight
        assert torch.allclose(tensor.double(), zero3[name].double(), atol=1e-5), name


def test_evaluate_writes_the_captions_of_the_original_code(shared, tmp_path):
    """The oracle's checkpoint, by the command line alone: geometry by vit_kwargs and med_config_path, no run config."""
    golden = json.loads((shared / "oracle" / "golden.json").read_text())["generate"]
    config = tmp_path / "run.yaml"
    config.write_text("datasets: {flickr8k_caption: {}}")
    process = launch(
        1,
        "launch/evaluate.py",
        *("--cfg-path", config, "--split", "val", "--options"),
        f"model.finetuned={shared}/oracle/tiny_blip.pth",
        "model.vit_kwargs={embed_dim: 96, depth: 4, num_heads: 4}",
        "model.image_size=96",
        f"model.med_config_path={shared}/oracle/med_config.json",
        f"env.cache_root={shared}/data",
        *("run.limit_val=64", "run.num_workers=0", "run.report_metric=false"),
        *(f"run.output_dir={tmp_path}", "run.job_id=oracle"),
    )
    assert process.returncode == 0, process.stdout[-4000:]
    results = json.loads((tmp_path / "oracle" / "results" / "val.json").read_text())
    assert [f"{result['image_id']}.jpg" for result in results] == golden["images"]
    assert [result["caption"] for result in results] == golden["captions"]["beam3_max20_min5"]


@pytest.fixture
def collection(tmp_path):
    """Options for a collection of one's own: 12 images, of which two are no images."""
    (tmp_path / "images").mkdir()
    entries = []
    for number in range(12):
        Image.new("RGB", (40, 30), (20 * number, 100, 50)).save(tmp_path / "images" / f"{number}.png")
        entries.append({"image": f"{number}.png", "caption": f"number {number}", "image_id": f"n{number}"})
    for number in (3, 7):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"no image")
    (tmp_path / "train.json").write_text(json.dumps(entries))
    (tmp_path / "run.yaml").write_text(
        f"""
model: {{model_type: tiny, med_config_path: tests/engine/no_dropout.json}}
datasets:
  custom_caption:
    build_info:
      annotations: {{train: {{storage: {tmp_path}/train.json}}, val: {{storage: {tmp_path}/train.json}}}}
    images: {tmp_path}/images
run: {{output_dir: {tmp_path}/output, job_id: test, max_epoch: 1, batch_size_train: 2, num_workers: 1, log_freq: 1,
       report_metric: false}}
"""
    )
    return tmp_path


def test_unreadable_images_are_named_and_left_out(collection):
    process = launch(2, "launch/finetune.py", "--cfg-path", collection / "run.yaml")
    assert process.returncode == 0, process.stdout[-4000:]
    bad = (collection / "output" / "test" / "bad_images.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in bad] == [f"{collection}/images/{number}.png" for number in (3, 7)]
    results = json.loads((collection / "output" / "test" / "results" / "val_epoch0.json").read_text())
    assert [result["image_id"] for result in results] == [f"n{number}" for number in range(12) if number not in (3, 7)]


def test_too_many_unreadable_images_end_the_run(collection):
    process = launch(
        2, "launch/finetune.py", "--cfg-path", collection / "run.yaml", "--options", "run.max_bad_images=1"
    )
    assert process.returncode != 0 and "Traceback" not in process.stdout
    errors = [line for line in process.stdout.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "2 images cannot be read, more than run.max_bad_images (1)" in errors[0]


def test_a_mistake_is_one_line_on_two_ranks(tmp_path):
    started = time.monotonic()
    process = launch_as_typed(2, "launch/finetune.py", *arguments(tmp_path, "run.max_epohc=2"), timeout=120)
    assert process.returncode != 0
    errors = [line for line in process.stdout.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "unknown key run.max_epohc; did you mean 'max_epoch'?" in errors[0]
    assert "Traceback" not in process.stdout
    assert time.monotonic() - started < 100
    assert not (tmp_path / "test").exists()


AUGMENTED = "datasets.shapes_caption.vis_processor.train.name=blip_image_train"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["datasets.flickr8k_caption.images=nowhere"], r"no such images: .*/nowhere; .*prepare_data.py flickr8k"),
        (["datasets.nonsense_caption.images=x"], r"unknown dataset 'nonsense_caption'; .*shapes_caption"),
        (["run.lr_sched=cosine"], r"unknown run.lr_sched 'cosine'; did you mean 'cosine_step_lr'\?"),
        (
            ["model.freeze_vit=true", "model.cache_image_embeds=true", AUGMENTED],
            r"cache_image_embeds keeps one encoding an image.*name=blip_image_eval",
        ),
        (["model.finetuned=nowhere.pth", "model.load_finetuned=true"], r"nowhere.pth: no such file"),
    ],
)
def test_mistakes_are_one_line(options, said, tmp_path):
    process = launch(1, "launch/finetune.py", *arguments(tmp_path, *options), timeout=120)
    assert process.returncode == 1
    assert re.search(rf"^error: .*{said}", process.stdout, re.MULTILINE), process.stdout
    assert "Traceback" not in process.stdout


def test_a_contradicting_deepspeed_config_names_both_places(tmp_path):
    ds_config = tmp_path / "mine.json"
    ds_config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 4}))
    process = launch(1, "launch/finetune.py", *arguments(tmp_path, ds_config=ds_config), timeout=120)
    assert process.returncode == 1
    assert "train_micro_batch_size_per_gpu is 4 but run.batch_size_train is 8" in process.stdout
