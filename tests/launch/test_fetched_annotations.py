"""A LAVIS run config on two ranks from an empty cache: the annotations are downloaded on first use, once."""

import hashlib
import json

from launching import launch
from PIL import Image
from serving import Handler, serving

SPLITS = ("train", "val", "test")
SMALL = [
    *("model.model_type=tiny", "model.load_pretrained=false", "model.med_config_path=tests/engine/no_dropout.json"),
    *("run.max_epoch=1", "run.batch_size_train=2", "run.batch_size_eval=2", "run.num_workers=0", "run.log_freq=1"),
    *("run.report_metric=false", "run.job_id=test"),
]


def annotations(split):
    entries = [{"image": f"val2014/{split}_{k}.jpg", "caption": f"number {k}", "image_id": str(k)} for k in range(4)]
    return json.dumps(entries).encode()


def finetune(server, folder):
    options = [*SMALL, f"env.cache_root={folder}", f"run.output_dir={folder}/output"]
    for split in SPLITS:
        files = f"datasets.coco_caption.build_info.annotations.{split}"
        md5 = hashlib.md5(annotations(split)).hexdigest()
        options += [f"{files}.url={server.address(f'/{split}.json')}", f"{files}.md5={md5}"]
    config = "run_configs/lavis_caption_coco_large_ft.yaml"
    return launch(2, "launch/finetune.py", "--cfg-path", config, "--resume", "auto", "--options", *options)


def test_trains_with_annotations_it_fetched(tmp_path):
    (tmp_path / "coco" / "images" / "val2014").mkdir(parents=True)
    for split in SPLITS:
        for k in range(4):
            Image.new("RGB", (40, 30), (60 * k, 100, 50)).save(
                tmp_path / "coco" / "images" / "val2014" / f"{split}_{k}.jpg"
            )
    with serving() as server:
        server.files = {f"/{split}.json": annotations(split) for split in SPLITS}
        server.plan, server.faulty = [Handler.other_bytes], "/val.json"
        failed = finetune(server, tmp_path)
        server.faulty = "/none"
        trained = finetune(server, tmp_path)
        assert sorted(server.paths) == ["/test.json", "/train.json", "/val.json", "/val.json"]

    assert failed.returncode != 0 and "Traceback" not in failed.stdout
    (error,) = [line for line in failed.stdout.splitlines() if line.startswith("error")]
    assert "/val.json: the download's md5 is" in error
    assert error.endswith(f"put it at {tmp_path}/coco/annotations/coco_karpathy_val.json")

    assert trained.returncode == 0, trained.stdout[-4000:]
    assert f"data       {tmp_path}/coco/annotations/coco_karpathy_val.json: 0.0 MB from http" in trained.stdout
    run = tmp_path / "output" / "test"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1]
    assert len(json.loads((run / "results" / "test_epoch0.json").read_text())) == 4
