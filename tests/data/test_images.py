"""The store of image features: what is kept, what is missing, and what a key depends on."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from syncs import Syncs

from blipds.data.annotations import ImageFile, Record
from blipds.data.images import EmbedStore, embeds_key, stack
from blipds.data.processors import BlipImageEval
from blipds.errors import UserError

EMBEDS = torch.randn(3, 5, 4).bfloat16()  # three images, five tokens of width 4


@pytest.fixture
def store(tmp_path):
    store = EmbedStore(tmp_path / "embeds", "key", images=3, tokens=5, width=4)
    store.allocate()
    return store


def test_rows_come_back_as_they_were_written(store, tmp_path):
    store.write([2, 0], EMBEDS[[2, 0]])
    store.write([1], EMBEDS[[1]].float())
    again = EmbedStore(tmp_path / "embeds", "key", images=3, tokens=5, width=4)
    assert all(torch.equal(again.read(index), EMBEDS[index]) for index in range(3))
    assert again.rows_path.stat().st_size == 3 * 5 * 4 * 2


def test_a_half_filled_store_is_completed(store):
    assert store.missing() == [0, 1, 2]
    store.write([1], EMBEDS[[1]])
    assert store.missing() == [0, 2]
    store.allocate()  # a second start
    assert store.missing() == [0, 2]
    assert torch.equal(store.read(1), EMBEDS[1])


def test_an_image_without_features_is_an_unreadable_image(store):
    store.write([1], EMBEDS[[1]])
    with pytest.raises(OSError, match="could not be read"):
        store.read(0)


def test_pixels_are_stacked_with_blanks_for_fillers():
    processor = BlipImageEval(4, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    white = torch.full((3, 4, 4), 255, dtype=torch.uint8)
    batch = stack([white, None], processor)
    pixels = batch.model_inputs(torch.device("cpu"), torch.float32)["pixel_values"]
    assert torch.equal(pixels, torch.stack([torch.ones(3, 4, 4), -torch.ones(3, 4, 4)]))
    assert stack([], processor).pixels.shape == (0, 3, 4, 4)


def test_a_batch_has_blanks_for_fillers(store):
    batch = stack([EMBEDS[0], None], BlipImageEval(8), store)
    inputs = batch.model_inputs(torch.device("cpu"), torch.float32)
    assert list(inputs) == ["image_embeds"]
    assert torch.equal(inputs["image_embeds"], torch.stack([EMBEDS[0].float(), torch.zeros(5, 4)]))


def test_too_little_space_is_known_before_writing(tmp_path, monkeypatch):
    """COCO with large at 384: 113,287 images x 577 tokens x 1024 x 2 bytes = 133.9 GB."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000_000_000))
    with pytest.raises(UserError, match=r"need 133\.9 GB more in .*, which has 100\.0 GB free"):
        EmbedStore(tmp_path, "key", images=113_287, tokens=577, width=1024).allocate()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "embeds").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        EmbedStore(tmp_path / "embeds", "key", images=3, tokens=5, width=4).allocate()


def test_what_a_key_depends_on(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"one")
    records = [Record(ImageFile(tmp_path / "a.jpg"), ("a dog",), 1)]
    key = embeds_key("weights", records, BlipImageEval(224))
    assert key == embeds_key("weights", [Record(ImageFile(tmp_path / "a.jpg"), (), 7)], BlipImageEval(224))
    others = [
        embeds_key("other weights", records, BlipImageEval(224)),
        embeds_key("weights", records, BlipImageEval(384)),
        embeds_key("weights", records, BlipImageEval(224, mean=(0.5, 0.5, 0.5))),
        embeds_key("weights", records * 2, BlipImageEval(224)),
    ]
    (tmp_path / "a.jpg").write_bytes(b"two")
    os.utime(tmp_path / "a.jpg", ns=(0, 0))
    others.append(embeds_key("weights", records, BlipImageEval(224)))
    assert len({key, *others}) == 6


def test_mean_and_std_are_made_once_on_a_device():
    """Each costs a copy from the host that the step would wait for."""
    processor = BlipImageEval(4, mean=(0.25, 0.5, 0.75), std=(0.5, 0.5, 0.5))
    batch = stack([None], processor)
    batch.model_inputs(torch.device("cpu"), torch.float32)
    with Syncs() as found:
        batch.model_inputs(torch.device("cpu"), torch.float32)
    assert found == []
