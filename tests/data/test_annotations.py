"""LAVIS's annotation layouts, and what is said about entries that do not fit."""

import json
import re

import pytest
from PIL import Image

from blipds.data.annotations import Annotations, read_annotations
from blipds.errors import UserError


@pytest.fixture
def read(tmp_path):
    """read([entries], ...) writes a file for each list and reads them."""
    (tmp_path / "images").mkdir()

    def read(*files, captions_needed=True):
        paths = [tmp_path / f"{number}.json" for number in range(len(files))]
        for path, entries in zip(paths, files, strict=True):
            path.write_text(json.dumps(entries))
        return read_annotations(paths, tmp_path / "images", captions_needed)

    return read


def contents(annotations):
    return [(record.image.path.name, record.captions, record.image_id) for record in annotations.records]


# --- layouts ---


def test_a_pair_an_entry(read):
    """Entries of one image become one record; the pairs keep the order of the file."""
    annotations = read(
        [
            {"image": "a.jpg", "caption": "one", "image_id": "A"},
            {"image": "b.jpg", "caption": "two", "image_id": "B"},
            {"image": "a.jpg", "caption": "three", "image_id": "A"},
        ]
    )
    assert contents(annotations) == [("a.jpg", ("one", "three"), "A"), ("b.jpg", ("two",), "B")]
    assert annotations.pairs == [(0, 0), (1, 0), (0, 1)]


def test_an_image_an_entry(read):
    annotations = read(
        [{"image": "a.jpg", "caption": ["one", "two"], "image_id": 7}, {"image": "b.jpg", "caption": ["three"]}]
    )
    assert contents(annotations) == [("a.jpg", ("one", "two"), 7), ("b.jpg", ("three",), "b")]
    assert annotations.pairs == [(0, 0), (0, 1), (1, 0)]


def test_several_files(read):
    annotations = read([{"image": "b.jpg", "caption": "one"}], [{"image": "a.jpg", "caption": "two"}])
    assert contents(annotations) == [("b.jpg", ("one",), "b"), ("a.jpg", ("two",), "a")]


@pytest.mark.parametrize(
    ("entry", "image_id"),
    [
        ({"image": "val2014/COCO_val2014_000000391895.jpg"}, 391895),
        ({"image": "COCO_val2014_000000391895.jpg", "image_id": "coco_391895"}, "coco_391895"),
        ({"image": "a.jpg", "image_id": 0}, 0),
        ({"image": "val/0013ea2087020901.jpg", "img_id": 0}, 0),  # nocaps
        ({"image": "cats/1.b.jpg"}, "cats/1.b"),  # the folder keeps cats/1.b and dogs/1.b apart
        ({"image": "000000391895.jpg"}, 391895),
        ({"image": "coco/val2017/000000001000.jpg"}, 1000),
        ({"image": "mine/000000001000.jpg"}, "mine/000000001000"),  # twelve digits may be anybody's
    ],
)
def test_image_ids(read, entry, image_id):
    assert read([{**entry, "caption": "one"}]).records[0].image_id == image_id


def test_without_captions(read):
    annotations = read([{"image": "a.jpg", "img_id": 0}, {"image": "b.jpg", "img_id": 1}], captions_needed=False)
    assert contents(annotations) == [("a.jpg", (), 0), ("b.jpg", (), 1)]
    assert annotations.pairs == []


def test_blank_captions_are_left_out(read):
    assert contents(read([{"image": "a.jpg", "caption": ["one", " ", ""]}])) == [("a.jpg", ("one",), "a")]


def test_limit_is_by_images(read):
    pairs = [("a", "one"), ("b", "two"), ("c", "three"), ("a", "four"), ("b", "five")]
    annotations = read([{"image": f"{image}.jpg", "caption": caption} for image, caption in pairs])

    limited = annotations.limited(2)
    assert contents(limited) == [("a.jpg", ("one", "four"), "a"), ("b.jpg", ("two", "five"), "b")]
    assert limited.pairs == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert isinstance(limited, Annotations)
    assert annotations.limited(None) is annotations.limited(3) is annotations


def test_the_image_opens_as_rgb(read, tmp_path):
    Image.new("L", (3, 2), 9).save(tmp_path / "images" / "a.png")
    image = read([{"image": "a.png", "caption": "one"}]).records[0].image
    assert str(image) == str(tmp_path / "images" / "a.png")
    assert (image.open().mode, image.open().size) == ("RGB", (3, 2))


def test_cocos_own_files(shared, tmp_path):
    folder = shared / "data" / "coco_annotations"
    coco = read_annotations([folder / "coco_karpathy_val.json"], tmp_path, captions_needed=True)
    assert len(coco.records) == 5000
    assert coco.records[0].image_id == 184613
    assert coco.records[0].captions[0] == "A child holding a flowered umbrella and petting a yak."
    nocaps = read_annotations([folder / "nocaps_val.json"], tmp_path, captions_needed=False)
    assert (len(nocaps.records), nocaps.pairs) == (4500, [])


# --- mistakes ---


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image": "b.jpg", "caption": 3}, "entry 1 (b.jpg): 'caption' is neither a text nor a list of texts"),
        ({"image": "b.jpg", "caption": ["x", 3]}, "entry 1 (b.jpg): 'caption' is neither a text nor a list of texts"),
        ({"caption": "x"}, "entry 1: expected an object with 'image', a file name; got {'caption': 'x'}"),
        ({"image": "", "caption": "x"}, "entry 1: expected an object with 'image', a file name; got "),
        ("b.jpg", "entry 1: expected an object with 'image', a file name; got b.jpg"),
        (
            {"image": "b.jpg", "caption": "x", "image_id": [1]},
            "entry 1 (b.jpg): 'image_id' is [1]; expected a text or a whole number",
        ),
    ],
)
def test_bad_entries_are_named(read, tmp_path, entry, message):
    with pytest.raises(UserError, match=f"^{re.escape(f'{tmp_path}/0.json, {message}')}"):
        read([{"image": "a.jpg", "caption": "one"}, entry])


def test_captions_for_all_or_none(read):
    entries = [{"image": "a.jpg", "caption": "one"}, {"image": "b.jpg"}, {"image": "c.jpg"}]
    with pytest.raises(UserError, match=r"2 images have no caption, others have; the first is .*/images/b\.jpg$"):
        read(entries, captions_needed=False)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '"text"', "[" * 100000])
def test_files_that_are_no_list(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"^annotation file {path}: "):
        read_annotations([path], tmp_path, captions_needed=True)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=f"^no such annotation file: {tmp_path}/a.json"):
        read_annotations([tmp_path / "a.json"], tmp_path, captions_needed=True)
    (tmp_path / "a.json").write_text('[{"image": "a.jpg"}]')
    with pytest.raises(UserError, match=f"^no such image folder: {tmp_path}/images"):
        read_annotations([tmp_path / "a.json"], tmp_path / "images", captions_needed=True)


@pytest.mark.parametrize("image", ["../a.jpg", "x/../../a.jpg", "../images2/a.jpg", "..", "/etc/a.jpg"])
def test_images_outside_of_their_folder(read, image):
    with pytest.raises(UserError, match="lies outside of the image folder"):
        read([{"image": image, "caption": "one"}])


@pytest.mark.parametrize(("image", "path"), [("x/../a.jpg", "a.jpg"), ("./x//a.jpg", "x/a.jpg")])
def test_images_inside_of_their_folder(read, tmp_path, image, path):
    below = tmp_path / "images" / path
    for name in (image, str(below)):
        assert read([{"image": name, "caption": "one"}]).records[0].image.path == below


@pytest.mark.parametrize("image", ["a\0.jpg", "a\n.jpg", "a\x1b[2J.jpg", "\ud800.jpg"])
def test_names_with_control_characters(read, image):
    with pytest.raises(UserError, match=r"holds control characters$"):
        read([{"image": image, "caption": "one"}])


def test_links_are_followed(read, tmp_path):
    """The hub's cache is a folder of nothing else."""
    Image.new("RGB", (3, 2)).save(tmp_path / "blob", "PNG")
    (tmp_path / "images" / "a.jpg").symlink_to("../blob")
    assert read([{"image": "a.jpg", "caption": "one"}]).records[0].image.open().size == (3, 2)
