"""What happens to an image and to a caption before they become a batch.

An image processor takes an RGB Pillow image and returns uint8 pixels (3, H, W). It does not normalise: bytes are a
quarter of the traffic of floats, so `(pixels / 255 - mean) / std` is done on the device, with the processor's own
`mean` and `std`.

Random choices come from torch's global CPU generator and from nothing else: seed it per sample (inside
`torch.random.fork_rng`), and the same sample gets the same pixels on any number of ranks and workers.
"""

import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from blipds.registry import PROCESSORS

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# RandAugment as in the original BLIP code (transform/randaugment.py): N = 2 operations at M = 5 on a scale of 10.
NUM_AUGMENTATIONS = 2
AUGMENTATION_PROBABILITY = 0.5  # of each operation that was chosen
SHEAR = 0.3 * 5 / 10
TRANSLATE = 10 * 5 // 10  # pixels
ROTATE = 30 * 5 / 10  # degrees
FILL = (128, 128, 128)

CROP_RATIO = (3 / 4, 4 / 3)  # width / height, torchvision's default

# What Pillow may decode: of its other formats, EPS starts Ghostscript on a stranger's program.
Image.init()
with suppress(ImportError):  # optional: reads HEIC, the photographs of phones
    import pillow_heif

    pillow_heif.register_heif_opener()
FORMATS = sorted({"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF"} & Image.OPEN.keys())

Image.MAX_IMAGE_PIXELS, MAX_PIXELS = None, 2 * (Image.MAX_IMAGE_PIXELS or 1 << 62)  # Pillow does not know of draft()
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20  # ComfyUI's workflows and large ICC profiles; all of a file's: 64 MiB

PHOTOMETRIC, SAMPLE_FORMAT = 262, 339  # tags of TIFF
ORIENTATION = 0x0112  # the EXIF tag, and what undoes each of its values
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# --- images: reading -------------------------------------------------------------------------------------------------


Shrink = Callable[[int, int], int]


def load_image(path: str | os.PathLike[str], shrink: Shrink | None = None, data: BinaryIO | None = None) -> Image.Image:
    """Read an image file whole, upright (EXIF orientation) and as RGB; from `data`, where `path` is but its name.

    Transparent pixels come out white, unless all are transparent; greys of more than 8 bits are scaled by the range of
    their values (`grey_bytes`).
    `shrink(width, height)`: how many times smaller the image may come; a JPEG is then decoded at 1/2, 1/4 or 1/8, a
    fraction of the work. Raises OSError naming the file where it is missing, truncated or no image.
    """
    try:
        with Image.open(path if data is None else data, formats=FORMATS) as image:
            whole = image.width * image.height
            if shrink is not None and (factor := shrink(image.width, image.height)) > 1:
                image.draft(None, (image.width // factor, image.height // factor))
            # of a progressive JPEG all coefficients are held, whatever the scale
            if (pixels := whole if image.info.get("progressive") else image.width * image.height) > MAX_PIXELS:
                raise ValueError(f"{pixels:,} pixels are more than {MAX_PIXELS:,}: might be an attack")
            encoding = str(image.tile[:1])
            image.load()
            return to_rgb(upright(image), encoding)
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise anything on damaged bytes: SyntaxError, struct.error, zlib.error, ...
        raise OSError(f"cannot read the image {os.fspath(path)}: {error}") from error


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its orientation tag says. No other tag is looked at: many a camera's cannot be decoded.

    Pillow's exif_transpose writes all of the EXIF anew, and fails on such a tag.
    """
    try:
        value: Any = image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF raises anything, and says nothing about the pixels
        return image
    method = UPRIGHT.get(value[0] if isinstance(value, tuple) and value else value)
    return image if method is None else image.transpose(method)


def to_rgb(image: Image.Image, encoding: str) -> Image.Image:
    """`encoding`: how the file keeps its pixels, in Pillow's words."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        greys = np.asarray(image)
        tags = getattr(image, "tag_v2", None)  # TIFF's: Pillow heeds these two in 8 bits alone
        if tags and image.mode == "I" and tags.get(SAMPLE_FORMAT, (1,))[0] == 1:  # unsigned
            greys = greys.view(np.uint32)
        bright = grey_bytes(greys)
        clear = greys == image.info.get("transparency", math.nan)  # the grey that the tRNS of a PNG names
        bright[clear & ~clear.all()] = 255
        return Image.fromarray(255 - bright if tags and tags.get(PHOTOMETRIC) == 0 else bright).convert("RGB")
    if ";16" in encoding and 0 < np.asarray(image.convert("RGB")).max() < 16:
        raise ValueError("of its 16 bits a colour only the lower 12 are used, and Pillow reads the upper 8: scale them")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image  # convert() would copy it
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() == (0, 0):  # such a picture has no alpha, but a byte to spare
            return image.convert("RGB")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def grey_bytes(values: np.ndarray) -> np.ndarray:
    """Greys of any type (H, W) -> uint8, by the range of the values, which no file says.

    From 0 to 1, or to 2^n - 1 where n is the least of 8, 10, 12, 14 and 16 bits that holds them all; what goes below 0
    or beyond 16 bits is stretched from its lowest to its highest value. NaN is the lowest. A 16-bit picture whose
    brightest point is below a quarter comes out up to four times brighter than it is meant.
    """
    greys = values.astype(np.float64)
    known = greys[np.isfinite(greys)]
    if known.size == 0:
        raise ValueError("no pixel of it is a number")
    low, high = known.min(), known.max()
    if low < 0 or high >= 1 << 16:
        top = high - low or 1.0
    else:
        bits = max(8, math.ceil(math.ceil(high).bit_length() / 2) * 2)
        low, top = 0.0, 1 if high <= 1 else (1 << bits) - 1
    return np.round((np.nan_to_num(greys, nan=low, posinf=high, neginf=low) - low) / top * 255).astype(np.uint8)


def to_pixels(image: Image.Image) -> Tensor:
    """RGB Pillow image -> contiguous uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# --- images: processors ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageProcessor:
    """What an image processor is to the rest of the data path."""

    image_size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    is_random: ClassVar[bool] = False

    def shrink(self, width: int, height: int) -> int:
        """How many times smaller than width x height the image may be read (`load_image`); the same when turned."""
        return 1

    def __call__(self, image: Image.Image) -> Tensor:
        raise NotImplementedError


@PROCESSORS.register("blip_image_eval")
@dataclass(frozen=True)
class BlipImageEval(ImageProcessor):
    """Bicubic resize of the whole image to a square, the aspect ratio given up, as in BLIP's evaluation."""

    def shrink(self, width: int, height: int) -> int:
        """Leaves twice the pixels asked for on each side: published datasets (1024 at most) keep theirs exactly."""
        return min(width, height) // (2 * self.image_size)

    def __call__(self, image: Image.Image) -> Tensor:
        return to_pixels(image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC))


@PROCESSORS.register("crop_flip")
@dataclass(frozen=True)
class CropFlip(ImageProcessor):
    """Random resized crop and horizontal flip.

    The flip turns "left" into "right" while the caption stays as it is: the recipe of the papers, and harmless on
    photographs, but not for data whose captions say where things are (use `blip_image_eval` there).
    """

    min_scale: float = 0.5  # smallest and largest share of the image's area that a crop keeps
    max_scale: float = 1.0
    is_random: ClassVar[bool] = True

    def shrink(self, width: int, height: int) -> int:
        """Leaves the smallest crop with as many pixels as are asked for, on each side."""
        smallest_crop = math.sqrt(self.min_scale * width * height * CROP_RATIO[0])
        return int(min(smallest_crop, width, height) / self.image_size)

    def __call__(self, image: Image.Image) -> Tensor:
        box = random_crop_box(image.width, image.height, self.min_scale, self.max_scale)
        flipped = _uniform() < 0.5
        operations = self.draw_operations()
        pixels = resized_crop(image, box, self.image_size)
        if flipped:
            pixels = pixels.flip(-1)
        if not operations:  # 42 of 100 images never come back to Pillow
            return pixels
        image = Image.merge("RGB", [Image.fromarray(plane) for plane in pixels.numpy()])
        for operation, sign in operations:
            image = operation(image, sign)
        return to_pixels(image)

    def draw_operations(self) -> "list[tuple[Operation, int]]":
        """What is done to the pixels after crop and flip, each with its sign."""
        return []


@PROCESSORS.register("blip_image_train")
@dataclass(frozen=True)
class BlipImageTrain(CropFlip):
    """BLIP's training augmentation: random resized crop, horizontal flip, RandAugment."""

    def draw_operations(self) -> "list[tuple[Operation, int]]":
        return draw_operations()


def random_crop_box(width: int, height: int, min_scale: float, max_scale: float) -> tuple[int, int, int, int]:
    """A random crop (left, top, right, bottom), drawn as by torchvision's RandomResizedCrop.

    Area uniform in [min_scale, max_scale] of the image's, aspect ratio log-uniform in CROP_RATIO. Where ten tries do
    not fit into the image (it is very long or very tall): the largest crop in its centre within CROP_RATIO.
    """
    for _ in range(10):
        area = width * height * _uniform(min_scale, max_scale)
        ratio = math.exp(_uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = _below(width - crop_width + 1), _below(height - crop_height + 1)
            return left, top, left + crop_width, top + crop_height
    crop_width = min(width, round(height * CROP_RATIO[1]))
    crop_height = min(height, round(width / CROP_RATIO[0]))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def resized_crop(image: Image.Image, box: tuple[int, int, int, int], size: int) -> Tensor:
    """The crop `box`, resized to uint8 (3, size, size) by the bicubic filter that Pillow's resize uses.

    torch's is 2 to 3 times as fast and rounds its weights to 16 bits: one value in some hundreds differs, by 1.
    Evaluation, which is held against published numbers, resizes by Pillow.
    """
    # Cropped first, and not by resize(box=...), whose bicubic filter would look beyond the crop's edges.
    crop = torch.from_numpy(np.array(image.crop(box))).permute(2, 0, 1).unsqueeze(0)
    return F.interpolate(crop, (size, size), mode="bicubic", antialias=True).squeeze(0).contiguous()


# --- RandAugment -----------------------------------------------------------------------------------------------------


Operation = Callable[[Image.Image, int], Image.Image]


def draw_operations() -> list[tuple[Operation, int]]:
    """Two operations drawn with replacement from OPERATIONS, each applied with probability 0.5 and a random sign.

    Those that change nothing are left out.
    """
    drawn = []
    for _ in range(NUM_AUGMENTATIONS):
        operation = OPERATIONS[OPERATION_NAMES[_below(len(OPERATION_NAMES))]]
        if _uniform() < AUGMENTATION_PROBABILITY:
            drawn.append((operation, 1 if _uniform() < 0.5 else -1))
    return [(operation, sign) for operation, sign in drawn if operation is not None]


def _warp(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """matrix (a, b, c, d, e, f): the output at (x, y) is the input at (ax + by + c, dx + ey + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL)


def _moved(image: Image.Image, right: int, down: int) -> Image.Image:
    """Whole pixels need no interpolation: pasted, which is exact and much faster than a bilinear warp."""
    canvas = Image.new("RGB", image.size, FILL)
    canvas.paste(image, (right, down))
    return canvas


# name -> operation(image, sign); sign is +1 or -1 and gives the direction, where an operation has one. None changes
# nothing, but still takes its tenth of the draws: M = 5 is an enhancement factor of exactly 1.0.
OPERATIONS: dict[str, Operation | None] = {
    "Identity": None,
    "AutoContrast": lambda image, sign: ImageOps.autocontrast(image),
    "Equalize": lambda image, sign: ImageOps.equalize(image),
    "Brightness": None,
    "Sharpness": None,
    "ShearX": lambda image, sign: _warp(image, (1, sign * SHEAR, 0, 0, 1, 0)),
    "ShearY": lambda image, sign: _warp(image, (1, 0, 0, sign * SHEAR, 1, 0)),
    "TranslateX": lambda image, sign: _moved(image, sign * TRANSLATE, 0),
    "TranslateY": lambda image, sign: _moved(image, 0, sign * TRANSLATE),
    "Rotate": lambda image, sign: image.rotate(sign * ROTATE, Image.Resampling.BILINEAR, fillcolor=FILL),
}
OPERATION_NAMES = tuple(OPERATIONS)


# --- captions --------------------------------------------------------------------------------------------------------

_PUNCTUATION_TO_SPACE = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))


@PROCESSORS.register("blip_caption")
@dataclass(frozen=True)
class CaptionProcessor:
    """Cleans a caption as LAVIS does and puts the prompt in front of it."""

    prompt: str = ""
    max_words: int = 50  # the prompt's words do not count

    def __call__(self, caption: str) -> str:
        return self.prompt + self.clean(caption)

    def clean(self, caption: str) -> str:
        """Lower case, some punctuation to spaces, single spaces, at most `max_words` words; commas and hyphens stay."""
        return " ".join(self.words(caption)[: self.max_words])

    def words(self, caption: str) -> list[str]:
        """All of a caption's words, clean."""
        return caption.lower().translate(_PUNCTUATION_TO_SPACE).split()


# --- randomness ------------------------------------------------------------------------------------------------------


def _uniform(low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * torch.rand(()).item()


def _below(bound: int) -> int:
    return int(torch.randint(bound, ()))
