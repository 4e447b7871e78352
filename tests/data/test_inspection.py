"""`launch/prepare_data.py check`: a small collection with everything wrong with it, and what is said about it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launching import launch
from packing import LAYOUTS
from PIL import Image

from blipds.data.annotations import read_splits
from blipds.data.inspection import Picture as P
from blipds.data.inspection import histogram, inspect, overlap, sizes, spread
from blipds.data.tokenizer import CaptionTokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "prepare_data.py"


def noise(path, seed, size=(6, 4)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def collection(tmp_path):
    """train.json: a and b are one picture and share an id, c is damaged, d missing, e a link. val.json: a and f."""
    images = tmp_path / "images"
    images.mkdir()
    for name, seed in (("a", 1), ("b", 1), ("f", 2)):
        noise(images / f"{name}.png", seed)
    noise(tmp_path / "elsewhere.png", 3, size=(60, 40))
    (images / "e.png").symlink_to(tmp_path / "elsewhere.png")
    (images / "c.png").write_bytes((images / "a.png").read_bytes()[:60])
    captions = {
        "a": ["a dog", "a dog and a \U0001f984 ."],
        "b": ["a cat", "..."],
        "c": "one two three four five six",
        "d": "a dog",
        "e": "a " + "dog " * 40,
        "f": [],
    }
    ids = {"a": 7, "b": 7}
    train = [{"image": f"{n}.png", "caption": captions[n], "image_id": ids.get(n, n)} for n in captions]
    val = [{"image": f"{n}.png", "caption": "a dog", "image_id": n} for n in "af"]
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "val.json").write_text(json.dumps(val))
    return tmp_path


def test_what_it_says(collection):
    """Token counts by hand: "a dog" 2 (twice), "a dog and a [UNK]" 5, "a cat" 2, six words 6, "a" and 40 dogs 41."""
    command = [sys.executable, SCRIPT, "check", "train.json", "val.json", "--images", "images", "--problems", "bad.txt"]
    done = subprocess.run(command, cwd=collection, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    damaged = next(line for line in done.stdout.splitlines() if "c.png" in line).strip()
    assert damaged.startswith(f"cannot read the image {collection}/images/c.png: ")
    root = collection / "images"
    assert done.stdout.splitlines() == [
        "train.json: list",
        "  images      6, 6x4 to 60x40 pixels, the median 6x4",
        "  captions    6; 0 to 2, 1.0 on average, an image",
        "  missing     1 images",
        "  unreadable  1 images",
        f"    {root}/d.png: missing",
        f"    {damaged}",
        "  ids         1 images have the id of another",
        f"    7: {root}/a.png and {root}/b.png",
        "  pictures    1 images are equal to another, pixel by pixel",
        f"    {root}/a.png = {root}/b.png",
        "  note        1 captions without a word left out; the first: train.json, entry 1",
        "  tokens in a caption, without the prompt",
        "        0-4          3  ########################################",
        "        5-9          2  ###########################",
        "      10-14          0",
        "      15-19          0",
        "      20-24          0",
        "      25-29          0",
        "      30-34          0",
        "      35-39          0",
        "        40+          1  #############",
        "  cut         16.67% of the captions, at model.max_txt_len=40; 0.00%, at max_words=50",
        "  long        16.67% have more tokens than run.max_len=20 allows",
        "  vocabulary  1.72% of 58 words are [UNK]: \U0001f984 (1)",
        "  spelling    0.00% of 57 reference words cannot be generated as they are written",
        "val.json: list",
        "  images      2, all 6x4 pixels",
        "  captions    2; 1 an image",
        "  missing     0 images",
        "  unreadable  0 images",
        "  ids         0 images have the id of another",
        "  pictures    0 images are equal to another, pixel by pixel",
        "  tokens in a caption, without the prompt",
        "        0-4          2  ########################################",
        "         5+          0",
        "  cut         0.00% of the captions, at model.max_txt_len=40; 0.00%, at max_words=50",
        "  long        0.00% have more tokens than run.max_len=20 allows",
        "  vocabulary  0.00% of 4 words are [UNK]",
        "  spelling    0.00% of 4 reference words cannot be generated as they are written",
        "train.json and val.json: 2 images and 1 ids in both",
        f"    {root}/a.png = {root}/a.png",
        f"    {root}/f.png = {root}/f.png",
        "    id f",
        "problems       bad.txt: 2 lines",
        "contact sheet  output/check_train.png",
    ]
    assert (collection / "bad.txt").read_text() == f"{root}/d.png: missing\n{damaged}\n"
    with Image.open(collection / "output" / "check_train.png") as sheet:
        # six readable images, five to a row: cells of 320 pixels, and margins of 12
        assert sheet.width == 5 * 332 + 12


def test_errors_are_one_line(tmp_path):
    done = launch(1, "launch/prepare_data.py", "check", tmp_path / "x.json")
    assert done.returncode == 1
    assert done.stdout.startswith(f"error: no such annotation file: {tmp_path}/x.json")
    assert done.stdout.count("\n") == 1


def test_splits_inside_of_one_file(tmp_path):
    """Karpathy's file has them all; here each photograph is in restval or train, and one is missing in test."""
    images = []
    for number in range(3):
        noise(tmp_path / f"{number}.png", number)
        images.append((tmp_path / f"{number}.png", ["a dog"]))
    path = LAYOUTS["Karpathy"](images, tmp_path / "data")
    found = {
        split: inspect(split, annotations, CaptionTokenizer(), max_words=50, workers=1)
        for split, annotations in read_splits([path], None, None).items()
    }
    assert {split: len(findings.readable) for split, findings in found.items()} == {"train": 3, "test": 0}
    assert overlap(found["train"], found["test"]) == ["train and test: 0 images and 0 ids in both"]


def test_small_sums():
    assert histogram([1, 2, 7]) == [
        "        0-4          2  ########################################",
        "         5+          1  ####################",
    ]
    assert sizes([P((2, 3)), P((4, 5)), P((9, 9)), P(error="x")]) == ", 2x3 to 9x9 pixels, the median 4x5"
    assert (sizes([P(error="x")]), sizes([P((2, 3))])) == ("", ", all 2x3 pixels")
    assert (spread([5, 5]), spread([1, 2])) == ("5", "1 to 2, 1.5 on average,")
