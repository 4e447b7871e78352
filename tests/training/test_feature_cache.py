"""Who computes which features, and what becomes of images that cannot be read; the encoder is a stub."""

import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from blipds import distributed
from blipds.config.sections import RunConfig
from blipds.data.annotations import Annotations, ImageFile, Record
from blipds.data.datasets import CaptionDataset
from blipds.data.images import EmbedStore
from blipds.data.processors import BlipImageEval, BlipImageTrain
from blipds.errors import UserError
from blipds.training.feature_cache import fill, my_share, refuse_random_processors

ENGINE = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)


def dataset(folder, processor):
    """Five images whose red is their number; the third is none."""
    for number in range(5):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes(b"no image")
    records = [Record(ImageFile(folder / f"{number}.png"), ("a",), number) for number in range(5)]
    return CaptionDataset("custom", Annotations(records, []), processor, str, 1, training=False)


def red(pixel_values):
    """Two tokens of width 3 that say the red of an image."""
    return pixel_values[:, :1, 0, 0].mul(255).round().unsqueeze(-1).expand(-1, 2, 3)


def test_features_are_stored_once_and_unreadable_images_stay_missing(tmp_path):
    images = dataset(tmp_path, BlipImageEval(image_size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    store = EmbedStore(tmp_path / "embeds", "key", images=5, tokens=2, width=3)
    missing = my_share(store)
    assert missing == [0, 1, 2, 3, 4]
    fill(store, images, missing, red, ENGINE, RunConfig(batch_size_eval=2, num_workers=0))
    assert store.missing() == [2]
    for number in (0, 1, 3, 4):
        assert torch.equal(store.read(number), torch.full((2, 3), number, dtype=torch.bfloat16))
    with pytest.raises(OSError, match="no features are stored"):
        store.read(2)
    assert my_share(store) == [2]


@pytest.mark.parametrize(("one_folder", "share"), [(True, [3]), (False, [1, 3])])
def test_ranks_share_what_is_missing(tmp_path, monkeypatch, one_folder, share):
    """Rank 3 of two machines with two ranks each: all four share one folder, or the two of a machine its own."""
    monkeypatch.setattr(distributed, "rank", lambda: 3)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(distributed, "local_rank", lambda: 1)
    monkeypatch.setattr(distributed, "local_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    monkeypatch.setattr(distributed, "broadcast", lambda value: value)
    monkeypatch.setattr(distributed, "gather", lambda value: [one_folder if isinstance(value, bool) else value])
    assert my_share(EmbedStore(tmp_path, "key", images=5, tokens=2, width=3)) == share


def test_augmented_images_are_refused(tmp_path):
    refuse_random_processors([dataset(tmp_path, BlipImageEval(image_size=8))])
    with pytest.raises(UserError, match=r"but the processor of datasets\.custom draws at random"):
        refuse_random_processors([dataset(tmp_path, BlipImageTrain(image_size=8))])


def test_the_encoder_has_the_next_batch_while_the_disk_has_one(tmp_path, monkeypatch):
    images = dataset(tmp_path, BlipImageEval(image_size=8))
    store = EmbedStore(tmp_path / "embeds", "key", images=5, tokens=2, width=3)
    next_batch, write, waited = threading.Event(), EmbedStore.write, []

    def slow_write(self, indices, embeds):
        if indices == [0, 1]:
            waited.append(next_batch.wait(timeout=30))
        write(self, indices, embeds)

    def encoder(pixel_values):
        if len(pixel_values) == 1:  # [3], whose neighbour cannot be read
            next_batch.set()
        return red(pixel_values)

    monkeypatch.setattr(EmbedStore, "write", slow_write)
    fill(store, images, my_share(store), encoder, ENGINE, RunConfig(batch_size_eval=2, num_workers=0))
    assert waited == [True] and store.missing() == [2]


def test_a_full_disk_is_an_error_in_one_line(tmp_path, monkeypatch):
    def full(self, indices, embeds):
        raise OSError(28, "No space left on device")

    images = dataset(tmp_path, BlipImageEval(image_size=8))
    store = EmbedStore(tmp_path / "embeds", "key", images=5, tokens=2, width=3)
    monkeypatch.setattr(EmbedStore, "write", full)
    with pytest.raises(UserError, match=r"^model.cache_image_embeds: cannot write to .*No space left on device"):
        fill(store, images, my_share(store), red, ENGINE, RunConfig(batch_size_eval=2, num_workers=0))
