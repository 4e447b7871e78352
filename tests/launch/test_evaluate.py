"""launch/evaluate.py on nocaps, and on COCO with a file that is called like a released checkpoint; real ranks."""

import json
import re
import shutil

import pytest
import torch
from launching import launch, launch_as_typed
from PIL import Image
from small_clip import save_clip

from blipds.scoring.clip import ClipScorer
from blipds.scoring.metrics import score_captions

TINY = ["model.vit_kwargs={embed_dim: 96, depth: 4, num_heads: 4}", "model.image_size=96"]
DOMAINS = ["in-domain", "near-domain", "out-domain", "near-domain", "out-domain"]
QUICK = ("Bleu", "ROUGE_L", "CIDEr")  # without METEOR, whose Java takes seconds to load


@pytest.fixture
def tiny(shared, tmp_path):
    """Options for five small photographs and the oracle's captioner, under the name of BLIP large."""
    (tmp_path / "images").mkdir()
    photographs = sorted((shared / "data" / "flickr8k" / "images").glob("*.jpg"))
    for number, path in enumerate(photographs[: len(DOMAINS)]):
        with Image.open(path) as image:
            image.resize((96, 96)).save(tmp_path / "images" / f"{number}.jpg")
    shutil.copy(shared / "oracle" / "tiny_blip.pth", tmp_path / "model_large_caption.pth")
    options = [*TINY, f"model.med_config_path={shared}/oracle/med_config.json", "run.num_workers=0"]
    return [*options, f"env.cache_root={tmp_path}", f"run.output_dir={tmp_path}", "run.job_id=run"]


def evaluate(ranks, folder, dataset, split, arguments, options, checkpoint="model_large_caption.pth"):
    (folder / "run.yaml").write_text(f"datasets: {{{dataset}: {{images: images}}}}")
    what = ["--checkpoint", folder / checkpoint, "--split", split]
    typed = ["--cfg-path", folder / "run.yaml", *what, *arguments, "--options", *options]
    return (launch if ranks == 1 else launch_as_typed)(ranks, "launch/evaluate.py", *typed)


def evaluations(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "eval"]


def test_nocaps_by_domain_on_two_ranks(tiny, tmp_path):
    """nocaps_val.json as LAVIS has it, and nocaps's own file with references and domains; 648 to 4,500 images there."""
    images = [{"image": f"{number}.jpg", "img_id": number} for number in range(len(DOMAINS))]
    references = {str(number): [f"a photo of number {number}", "a dog in the grass"] for number in range(len(DOMAINS))}
    (tmp_path / "val.json").write_text(json.dumps(images))
    annotations = [{"image_id": int(key), "caption": text} for key, texts in references.items() for text in texts]
    own = {"images": [{"id": number, "domain": domain} for number, domain in enumerate(DOMAINS)]}
    (tmp_path / "references.json").write_text(json.dumps(own | {"annotations": annotations}))

    tiny += [f"run.annotation_file={tmp_path}/references.json", "datasets.nocaps.build_info.annotations.val=val.json"]
    tiny += [f"run.clip_score={save_clip(tmp_path / 'clip')}", "run.batch_size_eval=2"]
    process = evaluate(2, tmp_path, "nocaps", "val", ["--metrics", *QUICK, "CLIPScore"], tiny)
    assert process.returncode == 0, process.stdout[-4000:]
    submission = json.loads((tmp_path / "run" / "results" / "val.json").read_text())
    assert [sorted(entry) for entry in submission] == [["caption", "image_id"]] * len(DOMAINS)
    assert [entry["image_id"] for entry in submission] == list(range(len(DOMAINS)))

    clip = ClipScorer("CLIPScore", str(tmp_path / "clip"))
    photographs = [Image.open(tmp_path / "images" / f"{number}.jpg") for number in range(len(DOMAINS))]
    pixels = torch.stack([clip.image_processor(photograph) for photograph in photographs])
    judged = clip.scores(pixels, [entry["caption"] for entry in submission], list(references.values()))

    lines = evaluations(tmp_path / "run")
    assert {line["split"] for line in lines} == {"val", *(f"val_{domain}" for domain in DOMAINS)}
    for line in lines:
        domain = line["split"].removeprefix("val").removeprefix("_")
        ids = [str(number) for number, its in enumerate(DOMAINS) if domain in ("", its)]
        captions = {str(entry["image_id"]): entry["caption"] for entry in submission}
        expected = score_captions({i: captions[i] for i in ids}, {i: references[i] for i in ids}, QUICK)
        assert {name: line[name] for name in expected.values} == expected.values
        assert {"generation", "tokenization", *QUICK} == set(line["seconds"])
        own = [judged[int(image_id)] for image_id in ids]
        assert line["CLIPScore"] == pytest.approx(sum(score.value for score in own) / len(own), abs=1e-6)
        assert line["RefCLIPScore"] == pytest.approx(sum(score.with_references for score in own) / len(own), abs=1e-6)
        assert line["settings"]["CLIPScore"]["model"] == str(tmp_path / "clip")
        assert "no annotation file for split 'train'" in line["missing"]["seen_in_training"]
    assert "CLIPScore: 2.5 x max(cos, 0) by" in process.stdout and "RefCLIPScore" in process.stdout
    assert re.search(r"^val_near-domain +2 +\d", process.stdout, re.MULTILINE)
    assert "val: the published scores are over 4,500 images, so not shown" in process.stdout


def test_cider_by_the_frequencies_of_another_collection(tiny, tmp_path):
    entries = [{"image": f"{number}.jpg", "caption": [f"number {number}"]} for number in range(len(DOMAINS))]
    (tmp_path / "test.json").write_text(json.dumps(entries))
    corpus = {f"{number}": [f"a man with {number} dogs", "a dog"] for number in range(30)}
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"image": f"{key}.jpg", "caption": texts}) + "\n" for key, texts in corpus.items())
    )
    tiny += ["datasets.coco_caption.build_info.annotations.test=test.json", "run.eval_precision=bf16"]
    arguments = ["--metrics", "CIDEr", "--cider-df", tmp_path / "corpus.jsonl"]
    process = evaluate(1, tmp_path, "coco_caption", "test", arguments, tiny)
    assert process.returncode == 0, process.stdout[-4000:]
    results = json.loads((tmp_path / "run" / "results" / "test.json").read_text())
    expected = score_captions(
        {str(entry["image_id"]): entry["caption"] for entry in results},
        {str(entry["image_id"]): [f"number {number}"] for number, entry in enumerate(results)},
        ("CIDEr",),
        cider_corpus=corpus,
    )
    (line,) = evaluations(tmp_path / "run")
    assert line["CIDEr"] == expected.values["CIDEr"]
    assert line["note"].endswith(", bf16")
    assert "fewer than 50 images" not in process.stdout

    process = evaluate(1, tmp_path, "coco_caption", "test", ["--cider-df", "coco-val-df.p"], tiny)
    assert process.returncode == 1
    assert re.search(r"^error: --cider-df coco-val-df.p: pickles are not read", process.stdout, re.MULTILINE)
    process = evaluate(1, tmp_path, "coco_caption", "test", ["--metrics", "PAC-S"], tiny)
    assert process.returncode == 1
    assert process.stdout.endswith("error: --metrics PAC-S needs a CLIP: --options run.pac_score=FOLDER_OR_HUB_NAME\n")


def test_a_transformers_folder_gives_the_captions_of_the_file_that_it_was_made_from(tiny, tmp_path):
    (tmp_path / "test.json").write_text(json.dumps([{"image": f"{n}.jpg", "image_id": n} for n in range(len(DOMAINS))]))
    tiny += ["datasets.coco_caption.build_info.annotations.test=test.json"]
    process = evaluate(1, tmp_path, "coco_caption", "test", [], tiny)
    assert process.returncode == 0, process.stdout[-4000:]
    assert "captions only, no references" in process.stdout
    of_the_file = (tmp_path / "run" / "results" / "test.json").read_text()

    export = ["--cfg-path", tmp_path / "run.yaml", "--checkpoint", tmp_path / "model_large_caption.pth"]
    export += ["--format", "hf", "--output", tmp_path / "folder", "--options", *tiny]
    process = launch(1, "launch/export.py", *export)
    assert process.returncode == 0, process.stdout[-4000:]
    tiny = ["run.job_id=again" if option == "run.job_id=run" else option for option in tiny]
    process = evaluate(1, tmp_path, "coco_caption", "test", [], tiny, checkpoint="folder")
    assert process.returncode == 0, process.stdout[-4000:]
    assert (tmp_path / "again" / "results" / "test.json").read_text() == of_the_file
