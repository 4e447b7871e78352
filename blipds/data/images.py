"""Images as the model takes them: pixels from the file, or the features that a frozen encoder computed once."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from blipds.data.annotations import ImageFile, Record
from blipds.data.processors import ImageProcessor
from blipds.errors import UserError


@cache
def statistics_on(device: torch.device, *statistics: tuple[float, float, float]) -> list[Tensor]:
    """Mean and std on a device, (3, 1, 1) each: made once, since each costs a copy that the host waits for."""
    return [torch.tensor(values, device=device).view(3, 1, 1) for values in statistics]


class Images(NamedTuple):  # torch pins the tensors of named tuples by itself
    """uint8 pixels (I, 3, H, W), and what normalises them on the device."""

    pixels: Tensor
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def to(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """pixel_values (I, 3, H, W), normalised in fp32. Bytes travel, not floats: a quarter of the traffic."""
        pixels = self.pixels.to(device, non_blocking=True).float().div_(255)
        mean, std = statistics_on(device, self.mean, self.std)
        return pixels.sub_(mean).div_(std).to(dtype)

    def model_inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's argument that they are."""
        return {"pixel_values": self.to(device, dtype)}


class ImageEmbeds(NamedTuple):
    """bf16 features (I, N, width) of the image encoder."""

    embeds: Tensor

    def model_inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"image_embeds": self.embeds.to(device, dtype, non_blocking=True)}


@overload
def stack(images: Sequence[Tensor | None], processor: ImageProcessor) -> Images: ...
@overload
def stack(
    images: Sequence[Tensor | None], processor: ImageProcessor, features: "EmbedStore | None"
) -> Images | ImageEmbeds: ...
def stack(
    images: Sequence[Tensor | None], processor: ImageProcessor, features: "EmbedStore | None" = None
) -> Images | ImageEmbeds:
    """Images of a dataset as one batch; None becomes zeros.

    They are what `processor` gives, uint8 (3, H, W), or where there are `features`, rows (tokens, width) of these.
    """
    if features is not None:
        blank = torch.zeros(features.tokens, features.width, dtype=torch.bfloat16)
    else:
        blank = torch.zeros(3, processor.image_size, processor.image_size, dtype=torch.uint8)
    found = [blank if image is None else image for image in images]
    stacked = torch.stack(found) if found else blank.new_zeros(0, *blank.shape)
    return Images(stacked, processor.mean, processor.std) if features is None else ImageEmbeds(stacked)


class EmbedStore:
    """The features of a dataset's images on disk, bf16: a row (tokens, width) an image, read by memory map.

    `<key>.bf16` holds the rows, `<key>.done` a byte an image that says whether its row is there: a store that was left
    half filled is completed later. The key should be all that the features depend on (`embeds_key`).
    """

    def __init__(self, folder: Path, key: str, images: int, tokens: int, width: int) -> None:
        self.rows_path, self.done_path = folder / f"{key}.bf16", folder / f"{key}.done"
        self.images, self.tokens, self.width = images, tokens, width

    @property
    def row_bytes(self) -> int:
        return self.tokens * self.width * torch.bfloat16.itemsize

    def allocate(self) -> None:
        """Makes the files where they are not there. Raises UserError where the disk has not the space."""
        folder = self.rows_path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            needed = len(self.missing()) * self.row_bytes
            if needed > free:
                raise UserError(
                    f"model.cache_image_embeds: {self.images:,} images x {self.tokens} tokens x {self.width} in bf16 "
                    f"need {needed / 1e9:.1f} GB more in {folder}, which has {free / 1e9:.1f} GB free; give a folder "
                    "elsewhere, or false"
                )
            for path, size in ((self.rows_path, self.images * self.row_bytes), (self.done_path, self.images)):
                with path.open("ab") as file:
                    file.truncate(size)
        except OSError as error:
            raise UserError(f"model.cache_image_embeds: cannot write to {folder}: {error}") from error

    def missing(self) -> list[int]:
        """The images that have no row yet."""
        done = np.zeros(self.images, dtype=np.uint8)
        if self.done_path.exists():
            found = np.fromfile(self.done_path, dtype=np.uint8)
            done[: len(found)] = found[: self.images]
        return np.flatnonzero(done == 0).tolist()

    def write(self, indices: Sequence[int], embeds: Tensor) -> None:
        """Rows (I, tokens, width) of some images; they reach the disk before the bytes that say so.

        By plain writes, not by a map: a disk that fills up in between is an OSError then, not a dead process.
        """
        rows = embeds.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
        with self.rows_path.open("r+b") as file:
            for index, row in zip(indices, rows, strict=True):
                file.seek(index * self.row_bytes)
                file.write(row.tobytes())
            file.flush()
            os.fdatasync(file.fileno())
        with self.done_path.open("r+b") as file:
            for index in indices:
                file.seek(index)
                file.write(b"\x01")

    @cached_property
    def rows(self) -> np.memmap:
        return np.memmap(self.rows_path, dtype=np.int16, mode="r", shape=(self.images, self.tokens, self.width))

    @cached_property
    def done(self) -> np.ndarray:
        return np.fromfile(self.done_path, dtype=np.uint8)

    def read(self, index: int) -> Tensor:
        if not self.done[index]:
            raise OSError("no features are stored: the image could not be read when they were computed")
        return torch.from_numpy(np.array(self.rows[index])).view(torch.bfloat16)


def embeds_key(encoder: str, records: Sequence[Record], processor: ImageProcessor) -> str:
    """What features depend on, in 32 hexadecimal digits: encoder (a hash of its weights), processor, and the images.

    A file (for an image in a shard: the shard) is known by its path, size and time of change; reading every byte would
    cost as much as decoding.
    """
    digest = hashlib.blake2b(f"{encoder}\n{processor!r}\n".encode(), digest_size=16)
    for record in records:
        digest.update(f"{record.image}\n".encode())
        if isinstance(record.image, ImageFile) and record.image.path.exists():
            stat = record.image.path.stat()
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
