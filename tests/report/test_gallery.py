"""Which images a report shows, and how large they may be."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blipds.data.annotations import ImageFile, Record
from blipds.report.gallery import BEST, IMAGES, RANDOM, THUMBNAIL_BYTES, WORST, HeatMap, choose, overlay, thumbnail_of

IDS = [f"image {number}" for number in range(100)]
CIDER = {image_id: float(number * 37 % 100) for number, image_id in enumerate(IDS)}  # all different


def picture_in(uri):
    kind, _, content = uri.partition(";base64,")
    return kind, Image.open(io.BytesIO(base64.b64decode(content)))


def test_a_third_each_of_worst_best_and_others():
    chosen = choose(IDS, CIDER, 30)
    by_reason = {why: {i for i, reason in chosen.items() if reason == why} for why in (WORST, BEST, RANDOM)}
    assert {CIDER[image_id] for image_id in by_reason[WORST]} == set(range(10))
    assert {CIDER[image_id] for image_id in by_reason[BEST]} == set(range(90, 100))
    assert len(by_reason[RANDOM]) == 10
    assert list(chosen) == [image_id for image_id in IDS if image_id in chosen]


def test_a_smaller_choice_is_part_of_a_larger_one():
    """So that images with heat maps are in the gallery."""
    assert choose(IDS, CIDER, 12).keys() <= choose(IDS, CIDER, 30).keys() <= choose(IDS, CIDER, 99).keys()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 99, 100, 240])
def test_no_image_twice_and_none_too_many(count):
    assert len(choose(IDS, CIDER, count)) == min(count, 100)
    assert len(choose(IDS, None, count)) == min(count, 100)


def test_without_scores_the_lot_decides():
    chosen = choose(IDS, None, 10)
    assert set(chosen.values()) == {RANDOM} and list(chosen) != IDS[:10]
    assert choose(IDS[::-1], None, 10).keys() == chosen.keys()


def test_thumbnails_are_small_whatever_the_image(tmp_path):
    """Noise is the worst that a JPEG can meet; 240 of them, in base64, are 8 MB."""
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    uri, size = thumbnail_of(Record(ImageFile(tmp_path / "noise.png"), (), 1))
    kind, image = picture_in(uri)
    assert (kind, image.format, image.size, size) == ("data:image/jpeg", "JPEG", (384, 288), (384, 288))
    assert len(uri) < 4 / 3 * THUMBNAIL_BYTES + 100
    assert IMAGES * len(uri) < 8.1e6


def test_small_images_keep_their_size(tmp_path):
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    uri, size = thumbnail_of(Record(ImageFile(tmp_path / "red.png"), (), 1))
    assert size == (40, 30)
    assert picture_in(uri)[1].getpixel((20, 15)) == pytest.approx((200, 30, 30), abs=3)


def test_an_image_that_cannot_be_read(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"no image")
    for name in ("x.jpg", "missing.jpg"):
        assert thumbnail_of(Record(ImageFile(Path(tmp_path, name)), (), 1))[0] is None


def test_heat_maps_are_bright_where_the_decoder_looked():
    weights = [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]  # two rows of three patches: below, on the right
    kind, image = picture_in(overlay(HeatMap("dog", weights), (300, 100)))
    assert (kind, image.size) == ("data:image/png", (64, 21))
    image = image.convert("RGBA")
    assert image.getpixel((2, 2)) == (20, 11, 52, 150)
    red, green, blue, alpha = image.getpixel((62, 20))
    assert red > 240 and green > 200 and alpha < 130 and blue < 200
