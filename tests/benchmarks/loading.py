"""Reading and augmenting photographs on one core: our dataset against the same transforms of torchvision."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from benchmarks.measuring import Row, alternate
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from blipds.data.annotations import ImageFile, Record, annotations_of
from blipds.data.datasets import CaptionDataset
from blipds.data.processors import CLIP_MEAN, CLIP_STD, FILL, BlipImageTrain, CaptionProcessor

IMAGE_SIZE = 384


def make_photographs(folder: Path, count: int, width: int = 640, height: int = 480) -> list[Path]:
    """JPEGs of about COCO's size in bytes: smooth colours with some grain."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        colours = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(colours.resize((width, height), Image.Resampling.BICUBIC))
        grain = rng.normal(0, 12, (height, width, 3))
        paths.append(folder / f"{number}.jpg")
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


class TorchvisionRandAugment:
    """The ten operations of BLIP's RandAugment (N = 2, M = 5, probability 0.5) by torchvision on Pillow images."""

    def __init__(self) -> None:
        warp = {"interpolation": InterpolationMode.BILINEAR, "fill": list(FILL)}
        shear = float(np.degrees(np.arctan(0.15)))
        still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
        self.operations: list[Callable[[Image.Image, int], Image.Image]] = [
            lambda image, sign: image,
            lambda image, sign: TF.autocontrast(image),
            lambda image, sign: TF.equalize(image),
            lambda image, sign: TF.adjust_brightness(image, 1.0),
            lambda image, sign: TF.adjust_sharpness(image, 1.0),
            lambda image, sign: TF.affine(image, **{**still, "shear": [sign * shear, 0.0]}, **warp),
            lambda image, sign: TF.affine(image, **{**still, "shear": [0.0, sign * shear]}, **warp),
            lambda image, sign: TF.affine(image, **{**still, "translate": [sign * 5, 0]}, **warp),
            lambda image, sign: TF.affine(image, **{**still, "translate": [0, sign * 5]}, **warp),
            lambda image, sign: TF.rotate(image, sign * 15.0, **warp),
        ]

    def __call__(self, image: Image.Image) -> Image.Image:
        for _ in range(2):
            operation = self.operations[int(torch.randint(len(self.operations), ()))]
            if torch.rand(()) < 0.5:
                image = operation(image, 1 if torch.rand(()) < 0.5 else -1)
        return image


def loading(rounds: int, images: int = 48) -> list[Row]:
    """640 x 480 JPEGs to the training transform at 384, one thread, in CPU time.

    Ours gives bytes, and the device normalises them; torchvision's ends with ToTensor and Normalize, as LAVIS's does.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    theirs_transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(IMAGE_SIZE, scale=(0.5, 1.0), interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            TorchvisionRandAugment(),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = make_photographs(Path(folder), images)
        records = [Record(ImageFile(path), ("a picture of a dog",), path.stem) for path in paths]
        text = CaptionProcessor()
        dataset = CaptionDataset("jpegs", annotations_of(records), BlipImageTrain(IMAGE_SIZE), text, 1, True)
        drawn = iter(range(10**9))

        def ours() -> None:
            for index in range(images):
                assert dataset.sample(index, seed=next(drawn)).image is not None

        def read(path: Path) -> Tensor:
            with Image.open(path) as image:
                return theirs_transform(image.convert("RGB"))

        def theirs() -> None:
            for path in paths:
                read(path)

        def decode_alone() -> None:
            for path in paths:
                with Image.open(path) as image:
                    image.load()

        sides = {"ours": ours, "torchvision": theirs, "decoding alone": decode_alone}
        timings = alternate(sides, rounds, torch.device("cpu"), clock=time.process_time)
    torch.set_num_threads(threads)
    speeds = {name: images / timing.median for name, timing in timings.items()}
    return [
        Row(
            "loading",
            f"images/s a core, 640x480 JPEGs to {IMAGE_SIZE} (decoding alone {speeds['decoding alone']:.0f})",
            f"{speeds['ours']:.0f}",
            f"{speeds['torchvision']:.0f} (torchvision)",
            speeds["ours"] / speeds["torchvision"],
            1.5,
            {name: timing.seconds for name, timing in timings.items()},
        )
    ]
