"""One split: who captions what, what is written, what it is scored against. The captioner is a stub."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from blipds import distributed
from blipds.captioning.confidence import Caption, Confidence
from blipds.config.sections import RunConfig
from blipds.data.annotations import Annotations, ImageFile, Record
from blipds.data.datasets import CaptionDataset
from blipds.data.processors import BlipImageEval
from blipds.errors import UserError
from blipds.evaluation.evaluator import (
    Evaluator,
    References,
    dataset_references,
    read_cider_corpus,
    read_references,
)
from blipds.scoring.clip import ImageScore
from blipds.scoring.process import Scoring

RUN = RunConfig(batch_size_eval=2, num_workers=0)
CPU = torch.device("cpu")


class StubCaptioner:
    def __init__(self):
        self.batches = []

    def caption(self, model, images, names, lockstep):
        assert images["pixel_values"].shape == (len(names), 3, 8, 8)
        self.batches.append(list(names))
        return [
            Caption(f"{model} {name}", Confidence(-name, -1.0, ((model, -0.5), (str(name), 0.5 - name))))
            for name in names
        ]


@pytest.fixture
def dataset(tmp_path):
    """Five images with the ids 10 to 14, each with one caption; the second and the last cannot be read."""
    for number in (0, 2, 3):
        Image.new("RGB", (8, 8), (50 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    records = [Record(ImageFile(tmp_path / f"{n}.png"), (f"number {n}",), 10 + n) for n in range(5)]
    return CaptionDataset("custom", Annotations(records, []), BlipImageEval(image_size=8), str, 1, training=False)


def make(dataset, references=None):
    return Evaluator("val", dataset, StubCaptioner(), references, RUN)


class StubClip:
    """Sees the red of an image; its score of a caption is that and the caption's length."""

    metric, source, factor, max_tokens = "CLIPScore", "folder", 2.5, 77
    shrink = staticmethod(lambda width, height: 3)

    def __init__(self):
        self.image_processor, self.devices = self, []

    def __call__(self, image):
        return torch.tensor(image.getpixel((0, 0))[0])

    def to(self, device):
        self.devices.append(device.type)

    def scores(self, reds, captions, references):
        known = references or [None] * len(captions)
        return [
            ImageScore(red + len(caption), group and len(group[0]), 1, 0)
            for red, caption, group in zip(reds.tolist(), captions, known, strict=True)
        ]


@pytest.mark.parametrize("with_references", [True, False])
def test_a_clip_scores_the_captions_of_readable_images(dataset, tmp_path, with_references):
    """Images 0, 2 and 3 have the reds 0, 100 and 150; "a photo of 10" has 13 characters, "number 0" eight."""
    references = dataset_references(dataset) if with_references else None
    clip, results = StubClip(), tmp_path / "results" / "val.json"
    evaluator = Evaluator("val", dataset, StubCaptioner(), references, RUN, [clip])
    opened, read = [], ImageFile.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ImageFile,
            "open",
            lambda self, shrink: opened.append((self.path.name, shrink(64, 80))) or read(self, shrink),
        )
        evaluator.caption("a photo of", CPU, torch.float32, results)
    assert opened == [(f"{number}.png", 3) for number in range(5)]  # once each, as large as the CLIP wants it (not 4)
    assert clip.devices == ["cpu", "cpu"]  # to the device, and back to the host
    kept = json.loads((tmp_path / "scores" / "val.clip.json").read_text())
    assert kept["per_image"]["CLIPScore"] == {"10": 13, "12": 113, "13": 163}
    assert kept["per_image"].get("RefCLIPScore") == ({"10": 8, "12": 8, "13": 8} if with_references else None)
    assert kept["settings"]["CLIPScore"]["cut_captions"] == 3

    (task,) = evaluator.scoring_tasks(results, ["ROUGE_L"]).values()
    assert evaluator.unscored == "" and task.metrics == (["ROUGE_L"] if with_references else ())
    (scores,) = Scoring([task]).scores()
    assert scores.values["CLIPScore"] == pytest.approx((13 + 113 + 163) / 3)
    assert ("ROUGE_L" in scores.values) == ("RefCLIPScore" in scores.values) == with_references
    assert scores.settings == kept["settings"] and scores.missing == {} and scores.images == 3


def test_diversity_beside_the_scores(dataset, tmp_path):
    references = References({str(n): ["a"] for n in range(10, 15)}, {"10": "near"})
    results = tmp_path / "val.json"
    results.write_text(json.dumps([{"image_id": 10, "caption": "A dog."}, {"image_id": 12, "caption": "a cat"}]))
    known = SimpleNamespace(share=lambda captions: 0.5)
    evaluator = Evaluator("val", dataset, StubCaptioner(), references, RUN, trained_on=known)
    tasks = evaluator.scoring_tasks(results, ["CIDEr"])
    expected = {"distinct_1": 0.75, "distinct_2": 1, "vocabulary": 3, "words_per_caption": 2, "seen_in_training": 0.5}
    assert tasks["val"].known.values == expected and tasks["val_near"].known.values["vocabulary"] == 2


def on_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)


def test_every_readable_image_is_captioned_once_and_in_order(dataset, tmp_path):
    evaluator = make(dataset)
    generated = evaluator.caption("a photo of", CPU, torch.float32, tmp_path / "results" / "val.json")
    assert evaluator.captioner.batches == [[10], [12, 13]]  # in batches of two images, readable or not
    assert generated.captions == {0: "a photo of 10", 2: "a photo of 12", 3: "a photo of 13"}
    assert [error.split(":")[0] for error in generated.errors] == [f"{tmp_path}/1.png", f"{tmp_path}/4.png"]
    assert json.loads((tmp_path / "results" / "val.json").read_text()) == [
        {"image_id": number, "caption": f"a photo of {number}"} for number in (10, 12, 13)
    ]
    assert (tmp_path / "confidence" / "val.json").read_text().splitlines() == [
        "[",
        *(
            f'{{"image_id": {n}, "caption": "a photo of {n}", "log_prob": -{n}, "mean_log_prob": -1.0, '
            f'"words": [["a photo of", -0.5], ["{n}", {0.5 - n}]]}}{comma}'
            for n, comma in ((10, ","), (12, ","), (13, ""))
        ),
        "]",
    ]


def test_a_split_of_which_no_image_can_be_read_is_an_error(dataset, tmp_path):
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"no image")
    results = tmp_path / "results" / "val.json"
    with pytest.raises(UserError, match=rf"^val: none of 5 images can be read; {tmp_path}/0.png: .*/1.png: .*/2.png: "):
        make(dataset).caption("", CPU, torch.float32, results)
    assert not results.exists()


@pytest.mark.parametrize(("rank", "mine"), [(0, [0, 3]), (1, [1, 4]), (2, [2])])
def test_ranks_share_the_images_without_fillers(dataset, monkeypatch, rank, mine):
    on_rank(monkeypatch, rank, 3)
    batches = list(make(dataset).loader)
    assert [index for batch in batches for index in batch.indices] == [index for index in mine if index in (0, 2, 3)]
    assert sum(len(batch.errors) for batch in batches) == len([index for index in mine if index in (1, 4)])


def test_in_step_a_rank_without_images_captions_fillers(dataset, monkeypatch):
    """Three batches of another rank; this one has one of its own."""
    on_rank(monkeypatch, 2, 3)
    evaluator = make(dataset)
    monkeypatch.setattr(distributed, "gather", lambda value: [3, 1, value])
    assert [batch.indices for batch in evaluator.batches(lockstep=True)] == [[2], [], []]
    assert [batch.indices for batch in evaluator.batches(lockstep=False)] == [[2]]


def test_each_domain_is_scored_like_a_set_of_its_own(dataset, tmp_path):
    references = References({str(n): [f"reference {n}"] for n in range(10, 15)}, {"10": "near", "13": "far"})
    results = tmp_path / "val.json"
    results.write_text(json.dumps([{"image_id": n, "caption": f"caption {n}"} for n in (10, 12, 13)]))
    tasks = make(dataset, references).scoring_tasks(results, ["CIDEr"])
    assert {name: list(task.candidates) for name, task in tasks.items()} == {
        "val": ["10", "12", "13"],
        "val_near": ["10"],
        "val_far": ["13"],
    }
    assert tasks["val_far"].candidates == {"13": "caption 13"}
    assert tasks["val_far"].references == {"13": ["reference 13"]}
    assert make(dataset).scoring_tasks(results, ["CIDEr"]) == {}


def test_an_image_without_a_reference_is_an_error(dataset):
    with pytest.raises(UserError, match=r"^val: no reference for 4 images; the first is 11$"):
        make(dataset, References({"10": ["a dog"], "11": []}))


def test_references_are_the_captions_in_use(dataset):
    assert dataset_references(dataset) == References({str(10 + n): [f"number {n}"] for n in range(5)})
    dataset.records = [Record(record.image, (), record.image_id) for record in dataset.records]
    assert dataset_references(dataset) is None


def test_an_annotation_file_in_cocos_layout(tmp_path):
    path = tmp_path / "references.json"
    annotations = [{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}, {"image_id": 2, "caption": "c"}]
    path.write_text(json.dumps({"annotations": annotations, "images": [{"id": 2, "domain": "far"}, {"id": 1}]}))
    assert read_references(path) == References({"1": ["a", "b"], "2": ["c"]}, {"2": "far"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # Windows' mark of UTF-8
    assert read_references(path).captions == {"1": ["a", "b"], "2": ["c"]}
    path.write_text(json.dumps({"annotations": [*annotations, {"image_id": 7, "caption": None}]}))
    with pytest.raises(UserError, match=r"references.json: a caption of image 7 is no text: None$"):
        read_references(path)
    path.write_text(json.dumps(annotations))
    with pytest.raises(UserError, match=r"^run.annotation_file .*references.json: not COCO's layout \(TypeError"):
        read_references(path)


def test_document_frequencies_of_another_collection(tmp_path):
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps([{"image": "a.jpg", "caption": ["x", "y"]}, {"image": "b.jpg", "caption": "z"}]))
    assert read_cider_corpus(path) == {"0": ["x", "y"], "1": ["z"]}
    with pytest.raises(UserError, match=r"^--cider-df df\.p: pickles are not read"):
        read_cider_corpus(Path("df.p"))
