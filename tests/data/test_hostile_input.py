"""Generated bad input, all the way to a batch: each is refused in one line, left out by name, or read as it is meant.

Hypothesis draws the damage, the same in every run. The last test counts what was done, by kind and by what came of it.
"""

import contextlib
import copy
import io
import json
import math
import os
import struct
import tarfile
import warnings
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packing import LAYOUTS, add
from PIL import Image

from blipds.config.deepspeed import load_ds_config, resolve_ds_config
from blipds.config.run import load_run_config
from blipds.config.sections import Config, RunConfig
from blipds.data.annotations import read_annotations
from blipds.data.datasets import CaptionDataset
from blipds.data.loader import Collator
from blipds.data.processors import BlipImageTrain, CaptionProcessor, load_image
from blipds.data.tokenizer import CaptionTokenizer
from blipds.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
REFUSED, LEFT_OUT, READ = "refused in one line", "left out by name", "read"
COUNTS: Counter[tuple[str, str]] = Counter()
CLAIMED = 1010

HOSTILE = [
    *(math.nan, math.inf, -math.inf, 1e308, -1, 0, 2**70, True, None, 0.5),
    *("", " ", "...", "x" * 100_000, "x " * 50_000),
    *("\0", "\x1b[2J\x07", "a\r\nb\u2028c\x85d", "\ud800", "\u202e", "\ufeff"),
    *("../../etc/passwd", "/etc/passwd", "..", ".", "~/x", "C:\\x.jpg", "a" * 300, "${oc.env:HOME}", "${x", "{0..9}"),
    *([], {}, [[]], [None], [""], [1], ["a", 2], {"a": 1}, {"": {}}, [math.nan] * 3, {"raw": None}),
]
LETTERS = st.binary(max_size=40).map(lambda content: content.decode("latin-1"))


def generated(examples):
    """Hypothesis without its database and clock, and with `examples` inputs: the same inputs every time."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def outcome(kind, function):
    """Runs it and counts what came of it; anything but a UserError of one line is a failure."""
    try:
        result = function()
    except UserError as error:
        assert str(error) and len(str(error).splitlines()) == 1
        str(error).encode()  # a terminal must be able to show it
        COUNTS[kind, REFUSED] += 1
        return None
    return result


# --- ways to damage things ---


def places(node, path=()):
    """The path of every node of a JSON-like tree but its root."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def with_hostile_value(tree, data):
    """A copy of the tree in which one value, or one key, is another."""
    tree = copy.deepcopy(tree)
    *path, last = data.draw(st.sampled_from(list(places(tree))))
    node = tree
    for key in path:
        node = node[key]
    how = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename"]))
    value = data.draw(st.sampled_from(HOSTILE))
    if how == "replace" or isinstance(node, list):
        node[last] = value
    else:
        inner = node.pop(last)
        if how == "rename":
            node[f"{last}x"] = inner
    return tree


def damaged(content, data):
    """Bytes cut short, flipped, taken out, put in or doubled."""
    at = data.draw(st.integers(0, max(len(content) - 1, 0)))
    how = data.draw(st.sampled_from(["cut", "flip", "take out", "put in", "double", "quote"]))
    if how == "cut":
        return content[:at]
    if how == "flip":
        return content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :]
    if how == "take out":
        return content[:at] + content[at + data.draw(st.integers(1, 600)) :]
    if how == "put in":
        return content[:at] + data.draw(st.binary(min_size=1, max_size=8)) + content[at:]
    if how == "quote":
        return content[:at] + b'"' + content[at:]
    return content + content


# --- the path of a sample ---


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three small photographs with five captions each."""
    folder = tmp_path_factory.mktemp("photographs")
    found = []
    for number in range(3):
        path = folder / f"{number}.png"
        Image.linear_gradient("L").resize((9, 7)).save(path)
        found.append((path, [f"a dog, number {number}, seen {k} times" for k in range(5)]))
    return found


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer()


def to_a_batch(path, tokenizer, cache=None):
    """What a training run does with an annotation file: records, samples, a batch; and what an evaluation reads."""
    annotations = read_annotations([path], None, captions_needed=True, index_cache=cache)
    root = str(path if path.is_dir() else path.parent)
    assert all(str(record.image).startswith(root) for record in annotations.records)
    captions = [caption for record in annotations.records for caption in record.captions]
    assert all(caption == " ".join(caption.splitlines()) and caption.encode() for caption in captions)
    assert all(str(record.image_id) is not None for record in annotations.records)
    processor = BlipImageTrain(8)
    dataset = CaptionDataset(
        "hostile", annotations, processor, CaptionProcessor(prompt="a picture of "), "all", training=True
    )
    batch = Collator(tokenizer, dataset)([dataset[index] for index in range(len(dataset))])
    assert batch.captions.position_ids.max() < 39 and bool(torch.isfinite(batch.images.pixels.float()).all())
    with contextlib.suppress(UserError):
        read_annotations([path], None, captions_needed=False, index_cache=cache)
    return [*annotations.notices, *batch.errors]


def judge(kind, path, tokenizer, cache=None):
    left_out = outcome(kind, lambda: to_a_batch(path, tokenizer, cache))
    if left_out is not None:
        COUNTS[kind, LEFT_OUT if left_out else READ] += 1


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- annotations of every layout ---


@pytest.fixture(scope="module")
def layouts(images, tmp_path_factory):
    """{layout: (the file to damage, what is given to read)}"""
    found = {}
    for layout, write in LAYOUTS.items():
        if layout != "shards":
            path = write(images, tmp_path_factory.mktemp("layout"))
            texts = [file for file in sorted(path.rglob("*")) if file.suffix in (".txt", ".jsonl", ".csv")]
            text = path if path.is_file() else texts[0]
            found[layout] = (text, path)
    return found


@generated(15)
@given(data=st.data())
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "shards"])
def test_damaged_annotations(layout, layouts, tokenizer, data):
    text, path = layouts[layout]
    before, whole = listing(text.parent), text.read_bytes()
    text.write_bytes(damaged(whole, data))
    try:
        judge(f"annotations, {layout.split(',')[0]}: damaged bytes", path, tokenizer)
    finally:
        text.write_bytes(whole)
    assert listing(text.parent) == before


@generated(40)
@given(data=st.data())
@pytest.mark.parametrize("layout", ["COCO", "Karpathy", "list"])
def test_json_of_the_wrong_shape(layout, layouts, tokenizer, data):
    text, path = layouts[layout]
    whole = text.read_text()
    text.write_text(json.dumps(with_hostile_value(json.loads(whole), data)).replace("e+308", "e+309"))
    try:
        judge(f"annotations, {layout}: values of the wrong shape", path, tokenizer)
    finally:
        text.write_text(whole)


@generated(40)
@given(data=st.data())
def test_hostile_lines(layouts, tokenizer, data):
    text, path = layouts["JSON Lines"]
    whole = text.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    text.write_text("\n".join(json.dumps(line) for line in with_hostile_value(lines, data)))
    try:
        judge("annotations, JSON Lines: values of the wrong shape", path, tokenizer)
    finally:
        text.write_text(whole)


@generated(40)
@given(
    name=st.sampled_from(["0.png", *(value for value in HOSTILE if isinstance(value, str))]) | LETTERS,
    caption=st.sampled_from([value for value in HOSTILE if isinstance(value, str)]) | LETTERS,
    delimiter=st.sampled_from(",;|\t"),
)
def test_hostile_cells(images, tmp_path_factory, tokenizer, name, caption, delimiter):
    folder = tmp_path_factory.mktemp("table")
    (folder / "0.png").write_bytes(images[0][0].read_bytes())
    text = f"image{delimiter}caption\n0.png{delimiter}a dog\n{name}{delimiter}{caption}\n"
    (folder / "captions.csv").write_bytes(text.encode(errors="surrogatepass"))
    judge("annotations, table: hostile cells", folder / "captions.csv", tokenizer)
    assert listing(folder) == ["0.png", "captions.csv"]


# --- shards ---


@generated(60)
@given(data=st.data())
def test_damaged_shards(images, tmp_path_factory, tokenizer, data):
    folder = tmp_path_factory.mktemp("shards")
    path = LAYOUTS["shards"](images, folder, count=1).with_name("000.tar")
    path.write_bytes(damaged(path.read_bytes(), data))
    judge("tar shards: damaged bytes", path, tokenizer, folder / "cache")
    assert {name.split("/")[0] for name in listing(folder)} <= {"000.tar", "cache"}


NAMES = ["../0.jpg", "/etc/0.jpg", "a/../../0.jpg", "0.jpg/", ".", "..", "\n.jpg", "\x1b.jpg", "0", ".jpg"]
KINDS_OF_MEMBER = [
    *(tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE),
    *(tarfile.GNUTYPE_SPARSE, b"Z"),
]


@generated(60)
@given(
    name=st.sampled_from(NAMES),
    kind=st.sampled_from(KINDS_OF_MEMBER),
    target=st.sampled_from(["/etc/passwd", "../../x", "0.png"]),
    size=st.sampled_from([0, 0, 0, 0, 8, 2**40, -512, -1024]),
    text=st.sampled_from([b"a dog", b"", b"\xff", b"{", b'{"caption": NaN}', b'{"caption": 3}', b"[" * 10_000]),
)
def test_hostile_members(images, tmp_path_factory, tokenizer, name, kind, target, size, text):
    folder = tmp_path_factory.mktemp("shards")
    (folder / "data").mkdir()
    with tarfile.open(folder / "data" / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "0.png", images[0][0].read_bytes())
        add(tar, "0.json" if text[:1] in b"{[" else "0.txt", text)
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, target, size
        tar.addfile(member)  # its header alone: a size that is not 0 is a lie
        add(tar, "1.png", images[1][0].read_bytes())
        add(tar, "1.txt", b"a cat")
    judge("tar shards: names, links and sizes", folder / "data" / "a.tar", tokenizer)
    assert listing(folder) == ["data", "data/a.tar"]


# --- images ---


def encoded(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png(width, height, chunks):
    """A PNG by hand: the header says what it likes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts)
    return b"\x89PNG\r\n\x1a\n" + body


PHOTO = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
WHOLE = {
    "JPEG": encoded(PHOTO, "JPEG"),
    "progressive JPEG": encoded(PHOTO, "JPEG", progressive=True),
    "PNG": encoded(PHOTO, "PNG"),
    "GIF": encoded(PHOTO.convert("P"), "GIF"),
    "WebP": encoded(PHOTO, "WEBP"),
    "BMP": encoded(PHOTO, "BMP"),
    "TIFF": encoded(PHOTO, "TIFF", compression="tiff_lzw"),
}


@generated(30)
@given(data=st.data())
@pytest.mark.parametrize("file_format", WHOLE)
def test_damaged_images(file_format, tmp_path_factory, data):
    """A damaged one may still be an image; then it is RGB."""
    path = tmp_path_factory.mktemp("image") / "a.jpg"
    path.write_bytes(damaged(WHOLE[file_format], data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own remarks on damaged files
        try:
            image = load_image(path)
            assert image.mode == "RGB" and BlipImageTrain(8)(image).shape == (3, 8, 8)
            COUNTS[f"images, {file_format}: damaged bytes", READ] += 1
        except OSError as error:
            assert str(path) in str(error)
            COUNTS[f"images, {file_format}: damaged bytes", LEFT_OUT] += 1


REFUSED_IMAGES = {
    "a bomb: 50,000 x 50,000 pixels in 100 bytes": png(50_000, 50_000, [(b"IDAT", zlib.compress(b"\0" * 100))]),
    "a bomb: 2 GiB of text in a PNG": png(8, 8, [(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)))] * 2),
    "no pixels": png(0, 0, []),
    "a name for an image, and a program for Ghostscript in it": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "an empty file": b"",
    "a page of text": b"<html>404 Not Found</html>",
}


@pytest.mark.parametrize("name", REFUSED_IMAGES)
def test_images_that_are_not_read(name, tmp_path):
    (tmp_path / "a.jpg").write_bytes(REFUSED_IMAGES[name])
    with pytest.raises(OSError, match=r"cannot read the image .*a\.jpg: "), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_image(tmp_path / "a.jpg")
    COUNTS["images: bombs and what is none", LEFT_OUT] += 1


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


GREY16 = Image.new("I;16", (24, 16), 128 * 257)
UNUSUAL = {  # the pixel at (1, 1), by what the format is defined to mean
    "CMYK": (encoded(Image.new("CMYK", (24, 16), (0, 255, 255, 0)), "JPEG", quality=100), (24, 16), (254, 0, 0)),
    "16 bits a pixel": (encoded(GREY16, "PNG"), (24, 16), (128, 128, 128)),
    "animated: its first picture": (
        encoded(Image.new("RGB", (24, 16), "blue"), "GIF", save_all=True, append_images=[PHOTO]),
        (24, 16),
        (0, 0, 255),
    ),
    "turned by EXIF": (encoded(Image.new("RGB", (24, 16), "blue"), "PNG", exif=turned(6)), (16, 24), (0, 0, 255)),
    "transparent: on white": (encoded(Image.new("RGBA", (24, 16), (0, 0, 0, 1)), "PNG"), (24, 16), (255, 255, 255)),
    "a palette": (encoded(Image.new("RGB", (24, 16), "blue").convert("P"), "PNG"), (24, 16), (0, 0, 255)),
    "black and white": (encoded(Image.new("1", (24, 16), 1), "PNG"), (24, 16), (255, 255, 255)),
    "one pixel": (encoded(Image.new("RGB", (2, 2), "blue"), "PNG"), (2, 2), (0, 0, 255)),
    "very long": (encoded(Image.new("RGB", (5000, 2), "blue"), "PNG"), (5000, 2), (0, 0, 255)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_images_are_read_as_they_are_meant(name, tmp_path):
    content, size, colour = UNUSUAL[name]
    (tmp_path / "a.jpg").write_bytes(content)
    image = load_image(tmp_path / "a.jpg")
    assert (image.mode, image.size) == ("RGB", size)
    assert all(abs(a - b) <= 1 for a, b in zip(image.getpixel((1, 1)), colour, strict=True))
    assert BlipImageTrain(8)(image).shape == (3, 8, 8)
    COUNTS["images: unusual kinds", READ] += 1


# --- configs ---


RUN_CONFIGS = {path.name: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "run_configs").glob("*.yaml"))}
DS_CONFIGS = {path.name: json.loads(path.read_text()) for path in sorted((ROOT / "ds_configs").glob("*.json"))}


@generated(100)
@given(name=st.sampled_from(sorted(RUN_CONFIGS)), data=st.data())
def test_hostile_run_configs(tmp_path_factory, name, data):
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(yaml.safe_dump(with_hostile_value(RUN_CONFIGS[name], data)))
    found = outcome("run configs: hostile values", lambda: load_run_config(path))
    if found is not None:
        COUNTS["run configs: hostile values", READ] += 1
        numbers = ("init_lr", "min_lr", "weight_decay", "beta2", "length_penalty")
        assert all(math.isfinite(getattr(found[0].run, key)) for key in numbers)


@generated(60)
@given(name=st.sampled_from(sorted(RUN_CONFIGS)), data=st.data())
def test_damaged_run_configs(tmp_path_factory, name, data):
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_bytes(damaged((ROOT / "run_configs" / name).read_bytes(), data))
    if outcome("run configs: damaged bytes", lambda: load_run_config(path)) is not None:
        COUNTS["run configs: damaged bytes", READ] += 1


def resolved(path):
    config = Config(run=RunConfig(batch_size_train=2))
    return resolve_ds_config(load_ds_config(path), config, world_size=2, default_precision="fp32", source=str(path))


@generated(100)
@given(name=st.sampled_from(sorted(DS_CONFIGS)), data=st.data())
def test_hostile_deepspeed_configs(tmp_path_factory, name, data):
    path = tmp_path_factory.mktemp("config") / "ds.json"
    path.write_text(json.dumps(with_hostile_value(DS_CONFIGS[name], data)))
    if outcome("DeepSpeed JSONs: hostile values", lambda: resolved(path)) is not None:
        COUNTS["DeepSpeed JSONs: hostile values", READ] += 1


@generated(40)
@given(name=st.sampled_from(sorted(DS_CONFIGS)), data=st.data())
def test_damaged_deepspeed_configs(tmp_path_factory, name, data):
    path = tmp_path_factory.mktemp("config") / "ds.json"
    path.write_bytes(damaged((ROOT / "ds_configs" / name).read_bytes(), data))
    if outcome("DeepSpeed JSONs: damaged bytes", lambda: resolved(path)) is not None:
        COUNTS["DeepSpeed JSONs: damaged bytes", READ] += 1


# --- how many of them ---


def test_how_many_and_what_came_of_them(request):
    """Printed with `pytest -s`: the table of bad input in the documentation, which claims CLAIMED files and values."""
    kinds = sorted({kind for kind, _ in COUNTS})
    print(f"\n| input | generated | {REFUSED} | {LEFT_OUT} | {READ} |\n|---|---|---|---|---|")
    for kind in kinds:
        counts = [COUNTS[kind, what] for what in (REFUSED, LEFT_OUT, READ)]
        print(f"| {kind} | {sum(counts)} | {' | '.join(map(str, counts))} |")
    print(f"| all | {sum(COUNTS.values())} | | | |", os.linesep)
    if not request.config.option.keyword and not any("::" in argument for argument in request.config.args):
        assert sum(COUNTS.values()) == CLAIMED
