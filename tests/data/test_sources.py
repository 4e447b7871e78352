"""Image names as people have them, and images of formats that are not read."""

import json
import unicodedata
from collections import Counter
from urllib.parse import quote

import pytest
from PIL import Image

from blipds.data import sources
from blipds.data.annotations import read_annotations
from blipds.data.sources import ImageFolder, loose_key, passed_over, unread_suffix

ACCENTED = unicodedata.normalize("NFC", "Café là.jpg")


@pytest.fixture
def folder(tmp_path):
    """dogs/My Dog.JPG, dogs/a.jpg, dogs/A.jpg and two names with accents, one decomposed, as macOS writes it."""
    (tmp_path / "dogs").mkdir()
    for name in ("dogs/My Dog.JPG", "dogs/a.jpg", "dogs/A.jpg", ACCENTED, unicodedata.normalize("NFD", "ñandú.jpg")):
        Image.new("RGB", (3, 2)).save(tmp_path / name, "JPEG")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("dogs\\My Dog.JPG", "dogs/My Dog.JPG"),
        (".\\dogs\\My Dog.JPG", "dogs/My Dog.JPG"),
        ("Dogs/my dog.jpg", "dogs/My Dog.JPG"),
        ("dogs/My%20Dog.JPG", "dogs/My Dog.JPG"),
        (quote(ACCENTED), ACCENTED),
        (unicodedata.normalize("NFD", ACCENTED), ACCENTED),
        (unicodedata.normalize("NFC", "ÑANDÚ.jpg"), unicodedata.normalize("NFD", "ñandú.jpg")),
        ("DOGS\\%41.jpg", None),  # a.jpg or A.jpg? nobody knows
        ("dogs/My Dog.png", None),
    ],
)
def test_a_name_that_no_file_has(folder, name, found):
    images = ImageFolder(folder)
    assert images(name).path == folder / (found or name)
    assert images(str(folder / name)).path == folder / (found or name)
    expected = [] if found is None else [f"differ from the file that is there.*the first: {name!r} is {found!r}"]
    assert len(images.notices()) == len(expected)


def test_what_was_mended_is_told_once(folder):
    names = ["dogs\\My Dog.JPG", "dogs\\a.jpg", "dogs/A.jpg", "dogs/MY DOG.JPG"]
    (folder / "train.json").write_text(json.dumps([{"image": name, "caption": name} for name in names]))
    annotations = read_annotations([folder / "train.json"], None, True)
    assert [str(record.image.path.relative_to(folder)) for record in annotations.records] == [
        *("dogs/My Dog.JPG", "dogs\\a.jpg", "dogs/A.jpg")
    ]
    assert annotations.records[0].captions == ("dogs\\My Dog.JPG", "dogs/MY DOG.JPG")  # one image
    assert annotations.notices == (
        "2 image names differ from the file that is there by letter case, Unicode form, backslashes or URL quoting, "
        "and are read; the first: 'dogs\\\\My Dog.JPG' is 'dogs/My Dog.JPG'",
    )


def test_a_file_of_the_very_name_goes_first(tmp_path):
    """And then nothing is looked for: the whole folder is listed only for a name that is missing."""
    Image.new("RGB", (3, 2)).save(tmp_path / "100%25.jpg")
    Image.new("RGB", (3, 2)).save(tmp_path / "100%.jpg")
    images = ImageFolder(tmp_path)
    assert [images(name).path.name for name in ("100%25.jpg", "100%.jpg")] == ["100%25.jpg", "100%.jpg"]
    assert (images.by_loose_key, images.notices()) == (None, [])


def test_loose_keys():
    assert loose_key("Straße/%C3%89.JPG") == loose_key("STRASSE\\E\u0301.jpg")
    assert loose_key("a.jpg") != loose_key("a.jpeg")


def test_formats_that_are_not_read(tmp_path, monkeypatch):
    """As if pillow-heif were not installed, and as if Pillow had no AVIF."""
    monkeypatch.setattr(sources, "OTHER_IMAGES", {".heic", ".avif", ".cr2"})
    assert [unread_suffix(name) for name in ("a.HEIC", "a.b/c.avif", "a.jpg", "a.txt", "heic")] == [
        *(".HEIC", ".avif", None, None, None)
    ]
    Image.new("RGB", (3, 2)).save(tmp_path / "a.jpg")
    for name in ("b.HEIC", "c.HEIC", "d.avif", "._e.heic"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.txt").write_text("a dog")
    line = (
        "3 files passed over, of formats that are not read: .HEIC (2), .avif (1); pip install pillow-heif reads HEIC; "
        "Pillow 11.3 or later reads AVIF"
    )
    assert line in read_annotations([tmp_path], None, True).notices
    (tmp_path / "train.csv").write_text("image,caption\na.jpg,a dog\nb.HEIC,a cat\nb.HEIC,a cat again\n")
    assert read_annotations([tmp_path / "train.csv"], None, True).notices == tuple(passed_over(Counter({".HEIC": 1})))
    assert passed_over(Counter({".cr2": 1})) == [
        "1 file passed over, of formats that are not read: .cr2 (1); convert them to JPEG or PNG"
    ]
    assert passed_over(Counter()) == []
