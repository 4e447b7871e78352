import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_to_tensor

from blipds.data import processors
from blipds.data.processors import (
    CLIP_MEAN,
    CLIP_STD,
    FILL,
    OPERATION_NAMES,
    OPERATIONS,
    BlipImageEval,
    BlipImageTrain,
    CaptionProcessor,
    draw_operations,
    load_image,
    random_crop_box,
    resized_crop,
)
from blipds.registry import PROCESSORS


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_processors_are_registered():
    assert PROCESSORS["blip_image_train"] is BlipImageTrain
    assert PROCESSORS["blip_image_eval"] is BlipImageEval
    assert PROCESSORS["blip_caption"] is CaptionProcessor


# --- evaluation and training processors ---


@pytest.mark.parametrize("size", [(97, 61), (40, 130)])
def test_eval_processor_equals_torchvision(size):
    image = noise(*size)
    expected = pil_to_tensor(transforms.Resize((48, 48), InterpolationMode.BICUBIC)(image))

    pixels = BlipImageEval(48)(image)

    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    assert torch.equal(pixels, expected)


def test_processors_offer_what_normalisation_needs():
    for processor in (BlipImageEval(48), BlipImageTrain(48)):
        assert (processor.image_size, processor.mean, processor.std) == (48, CLIP_MEAN, CLIP_STD)
    assert BlipImageEval(48, mean=(0.5, 0.5, 0.5)).mean == (0.5, 0.5, 0.5)


def test_train_processor_depends_on_torchs_seed_alone():
    image = noise(64, 48)
    processor = BlipImageTrain(32)

    def pixels(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return processor(image)

    assert pixels(1).shape == (3, 32, 32)
    assert torch.equal(pixels(1), pixels(1))
    assert not torch.equal(pixels(1), pixels(2))


def test_resized_crop_is_pillows_but_for_rounding():
    image = noise(640, 480)
    expected = transforms.functional.resized_crop(image, 7, 35, 400, 520, [384, 384], InterpolationMode.BICUBIC)
    pixels = resized_crop(image, (35, 7, 555, 407), 384)
    assert pixels.is_contiguous()
    difference = (pixels.int() - pil_to_tensor(expected).int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.02


def test_train_processor_crops_flips_and_augments(monkeypatch):
    image = noise(64, 48)
    box = (5, 7, 45, 37)
    crop = Image.fromarray(resized_crop(image, box, 32).permute(1, 2, 0).numpy())
    monkeypatch.setattr(processors, "random_crop_box", lambda *_: box)
    for operations, expected in (
        ([], crop),
        ([(OPERATIONS["Equalize"], 1), (OPERATIONS["Rotate"], -1)], None),
    ):
        monkeypatch.setattr(processors, "draw_operations", lambda operations=operations: operations)
        seen = {BlipImageTrain(32)(image).numpy().tobytes() for _ in range(20)}
        allowed = [crop, ImageOps.mirror(crop)]
        if expected is None:
            allowed = [ImageOps.equalize(x).rotate(-15, Image.Resampling.BILINEAR, fillcolor=FILL) for x in allowed]
        assert seen == {pil_to_tensor(x).contiguous().numpy().tobytes() for x in allowed}


def test_crop_boxes_keep_to_scale_ratio_and_image():
    torch.manual_seed(0)
    boxes = torch.tensor([random_crop_box(640, 480, 0.5, 1.0) for _ in range(1000)])
    left, top, right, bottom = boxes.unbind(1)
    width, height = right - left, bottom - top
    share, ratio = width * height / (640 * 480), width / height

    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 640 and bottom.max() <= 480
    assert 0.498 < share.min() < 0.52 and 0.9 < share.max() <= 1
    assert 0.745 < ratio.min() < 0.8 and 1.3 < ratio.max() < 1.34


def test_crop_boxes_are_drawn_like_torchvisions():
    torch.manual_seed(0)
    image = Image.new("RGB", (640, 480))
    ours = torch.tensor([random_crop_box(640, 480, 0.5, 1.0) for _ in range(2000)]).float().mean(0)
    theirs = [transforms.RandomResizedCrop.get_params(image, [0.5, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)]
    theirs = torch.tensor([(left, top, left + w, top + h) for top, left, h, w in theirs]).float().mean(0)

    assert torch.allclose(ours, theirs, atol=8)  # pixels; the standard error of such a mean is about 1.5


def test_crop_of_a_very_long_image_falls_back_to_its_centre():
    assert random_crop_box(1000, 30, 0.5, 1.0) == (480, 0, 520, 30)
    assert random_crop_box(30, 1000, 0.5, 1.0) == (0, 480, 30, 520)


# --- the operations of RandAugment ---

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def test_the_ten_operations():
    assert set(OPERATION_NAMES) == {
        *("Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness"),
        *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    }


@pytest.mark.parametrize("name", ["Identity", "Brightness", "Sharpness"])
def test_operations_that_change_nothing_at_this_magnitude(name):
    assert OPERATIONS[name] is None


def test_autocontrast_and_equalize_are_those_of_pillow():
    image = noise(16, 16).point(lambda value: 60 + value // 4)
    assert OPERATIONS["AutoContrast"](image, 1) == ImageOps.autocontrast(image)
    assert OPERATIONS["AutoContrast"](image, 1).getextrema() == ((0, 255),) * 3
    assert OPERATIONS["Equalize"](image, 1) == ImageOps.equalize(image)


@pytest.mark.parametrize(
    ("name", "sign", "marker_at", "filled", "kept"),
    [
        ("TranslateX", 1, (12, 9), (4, 9), (5, 9)),
        ("TranslateX", -1, (2, 9), (15, 9), (14, 9)),
        ("TranslateY", 1, (7, 14), (7, 4), (7, 5)),
        ("TranslateY", -1, (7, 4), (7, 15), (7, 14)),
    ],
)
def test_translation_moves_by_five_pixels_and_fills_with_grey(name, sign, marker_at, filled, kept):
    image = Image.new("RGB", (20, 20))
    image.putpixel((7, 9), WHITE)

    moved = OPERATIONS[name](image, sign)

    assert moved.getpixel(marker_at) == WHITE
    assert moved.getpixel(filled) == FILL == (128, 128, 128)
    assert moved.getpixel(kept) == BLACK


@pytest.mark.parametrize("sign", [1, -1])
def test_shear_shifts_rows_by_their_height(sign):
    # Each row is a ramp, value 2x: bilinear interpolation gives it exactly, so a shift by s changes values by 2s.
    ramp = np.tile(2 * np.arange(100, dtype=np.uint8), (41, 1))
    image = Image.fromarray(np.stack([ramp] * 3, axis=-1))

    sheared = np.asarray(OPERATIONS["ShearX"](image, sign)).astype(int)[:, :, 0]

    for y in (0, 9, 29, 40):
        shift = sign * 0.15 * (y + 0.5)  # pixel centres lie at y + 0.5
        assert sheared[y, 50] == pytest.approx(2 * (50 + shift), abs=1)
    assert sheared[40, 99 if sign == 1 else 0] == 128

    transposed = np.asarray(OPERATIONS["ShearY"](image.transpose(Image.Transpose.TRANSPOSE), sign))[:, :, 0]
    assert np.array_equal(transposed.T, sheared)


@pytest.mark.parametrize("sign", [1, -1])
def test_rotation_keeps_the_centre_and_turns_by_15_degrees(sign):
    image = Image.new("RGB", (101, 101))
    for x, y in ((50, 50), (90, 50)):
        image.paste(WHITE, (x - 1, y - 1, x + 2, y + 2))

    turned = OPERATIONS["Rotate"](image, sign)

    assert turned.getpixel((50, 50)) == WHITE
    # 40 px right of the centre turn to 40 cos 15 = 38.6 right and 40 sin 15 = 10.4 up (counter-clockwise is positive).
    assert turned.getpixel((50 + 39, 50 - sign * 10)) == WHITE
    assert turned.getpixel((90, 50)) == BLACK
    assert turned.getpixel((0, 0)) == FILL


def test_two_operations_each_applied_half_of_the_time(monkeypatch):
    calls = []
    monkeypatch.setattr(
        processors,
        "OPERATIONS",
        {name: lambda image, sign, name=name: calls.append((name, sign)) or image for name in OPERATION_NAMES},
    )
    torch.manual_seed(0)

    applied = []
    for _ in range(4000):
        drawn = draw_operations()
        for operation, sign in drawn:
            operation(None, sign)
        applied.append(len(drawn))

    # Binomial: 0, 1 or 2 applied in 1/4, 1/2, 1/4 of the images; operations and signs are uniform.
    assert np.bincount(applied) / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    names = [name for name, _ in calls]
    assert {name: names.count(name) / len(names) for name in OPERATION_NAMES} == pytest.approx(
        dict.fromkeys(OPERATION_NAMES, 0.1), abs=0.02
    )
    assert np.mean([sign for _, sign in calls]) == pytest.approx(0, abs=0.05)


def test_operations_that_change_nothing_are_left_out(monkeypatch):
    monkeypatch.setattr(processors, "OPERATION_NAMES", ("Identity", "Brightness", "Sharpness"))
    assert not any(draw_operations() for _ in range(20))


# --- reading ---


def test_load_image_turns_as_exif_says(tmp_path):
    image = Image.new("RGB", (3, 2))
    image.putpixel((0, 0), WHITE)
    exif = image.getexif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)

    loaded = load_image(tmp_path / "turned.png")

    assert loaded.size == (2, 3)
    assert loaded.getpixel((1, 0)) == WHITE


def test_load_image_survives_broken_exif(tmp_path):
    noise(8, 8).save(tmp_path / "image.jpg", exif=b"Exif\0\0not exif at all")
    assert load_image(tmp_path / "image.jpg").size == (8, 8)


def pixel_after_saving(image: Image.Image, path) -> tuple[int, int, int]:
    image.save(path)
    loaded = load_image(path)
    assert loaded.mode == "RGB"
    return loaded.getpixel((0, 0))


def test_load_image_converts_to_rgb(tmp_path):
    palette = Image.new("RGB", (4, 4), (10, 200, 30)).quantize(2)
    assert pixel_after_saving(palette, tmp_path / "palette.png") == (10, 200, 30)
    assert pixel_after_saving(Image.new("L", (4, 4), 77), tmp_path / "grey.png") == (77, 77, 77)
    assert pixel_after_saving(Image.new("1", (4, 4), 1), tmp_path / "bits.png") == WHITE
    assert pixel_after_saving(Image.new("CMYK", (4, 4), (255, 0, 0, 0)), tmp_path / "cmyk.tif") == (0, 255, 255)


def test_load_image_shows_transparency_as_white(tmp_path):
    for mode, clear, opaque in (("RGBA", (0, 0, 0, 0), (9, 8, 7, 255)), ("LA", (0, 0), (9, 255))):
        image = Image.new(mode, (4, 4), clear)
        image.putpixel((3, 3), opaque)
        assert pixel_after_saving(image, tmp_path / "clear.png") == WHITE
    assert pixel_after_saving(Image.new("RGBA", (4, 4), (9, 8, 7, 255)), tmp_path / "opaque.png") == (9, 8, 7)
    # alpha that a program left at 0 throughout, as in many a BMP of 32 bits
    assert pixel_after_saving(Image.new("RGBA", (4, 4), (9, 8, 7, 0)), tmp_path / "unused.png") == (9, 8, 7)
    greys = Image.fromarray(np.array([[257 * 50, 257 * 255]], dtype=np.uint16))
    greys.save(tmp_path / "grey.png", transparency=257 * 50)
    assert np.asarray(load_image(tmp_path / "grey.png")).tolist() == [[[255] * 3, [255] * 3]]


def test_large_texts_and_profiles_beside_the_pixels(tmp_path):
    text = PngInfo()
    text.add_text("workflow", "x" * (2 << 20), zip=True)
    for extra in ({"pnginfo": text}, {"icc_profile": bytes(2 << 20)}):
        Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "image.png", **extra)
        assert load_image(tmp_path / "image.png").getpixel((0, 0)) == (9, 8, 7)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize(("orientation", "corner"), [(3, (2, 1)), (5, (0, 0)), (6, (1, 0)), (8, (0, 2))])
def test_load_image_turns_every_format(tmp_path, file_format, orientation, corner):
    """`corner`: where the upper left pixel comes to, by the standard's table (EXIF 2.3, tag 0x0112), 16 pixels each."""
    image = Image.new("RGB", (48, 32))
    image.paste(WHITE, (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned", file_format, exif=exif)
    loaded = load_image(tmp_path / "turned")
    assert loaded.size == ((48, 32) if orientation == 3 else (32, 48))
    assert loaded.getpixel((corner[0] * 16 + 8, corner[1] * 16 + 8))[0] > 200


def exif_block(*tags):
    """A block by hand: (tag, type, count, four bytes of value). Pillow reads such tags and cannot write them again."""
    entries = b"".join(struct.pack("<HHI4s", *tag) for tag in tags)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


SHORT, TEXT, RATIONAL = 3, 2, 5
TURNED = (0x0112, SHORT, 1, b"\6\0\0\0")


@pytest.mark.parametrize(
    ("block", "turned"),
    [
        (exif_block(TURNED, (0x011A, TEXT, 4, b"72.\0")), True),
        (exif_block(TURNED, (0x011A, SHORT, 2, b"\1\0\2\0")), True),
        (exif_block(TURNED, (0x011A, RATIONAL, 1, b"\xff\xff\0\0")), True),  # lies beyond the block
        (exif_block(TURNED, (0x8769, SHORT, 1, b"\1\0\0\0")), True),  # a pointer to nowhere
        (exif_block(TURNED)[:-9], False),  # cut short
        (exif_block((0x0112, SHORT, 2, b"\6\0\6\0")), True),
        (exif_block((0x0112, SHORT, 1, b"\x09\0\0\0")), False),  # no such orientation
        (exif_block((0x0112, TEXT, 2, b"6\0\0\0")), False),
    ],
)
def test_other_tags_do_not_matter_to_the_orientation(tmp_path, block, turned):
    noise(48, 32).save(tmp_path / "image.jpg", exif=block)
    assert load_image(tmp_path / "image.jpg").size == ((32, 48) if turned else (48, 32))


RAMP = np.tile(np.linspace(0, 1, 256), (2, 1))  # the photograph: greys 0 to 255


def tiff(values, order="<", inverted=False):
    """An uncompressed TIFF (6.0, section 4) of one grey band, any type and byte order."""
    height, width = values.shape
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    sample_format = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = [(256, width), (257, height), (258, values.dtype.itemsize * 8), (259, 1), (262, 0 if inverted else 1)]
    tags += [(273, 8), (277, 1), (278, height), (279, len(data)), (339, sample_format)]
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    start = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data))
    return start + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def png(samples, colour_type):
    """16 bits a sample; (H, W, channels)."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def with_gaps():
    values = RAMP.astype(np.float32)
    values[1] = np.nan
    return values


GREYS = {
    **{f"PNG, {bits} bits in 16": png((RAMP * (2**bits - 1)).round()[..., None], 0) for bits in (8, 10, 12, 14, 16)},
    **{f"float, 0 to {top}": tiff((RAMP * top).astype(np.float32)) for top in (1, 255, 4095, 65535, 1e6)},
    "float, -1 to 1": tiff((RAMP * 2 - 1).astype(np.float32)),
    "float, big-endian": tiff(RAMP.astype(np.float32), ">"),
    "float, NaN in it": tiff(with_gaps()),
    **{f"int32, 0 to {top}": tiff((RAMP * top).round().astype(np.int32)) for top in (255, 65535, 10**6)},
    "uint32": tiff((RAMP * (2**32 - 1)).round().astype(np.uint32)),
    "int16, big-endian": tiff((RAMP * 60000 - 30000).round().astype(np.int16), ">"),
    "uint16, white is zero": tiff(((1 - RAMP) * 65535).round().astype(np.uint16), inverted=True),
    "a mask of 0 and 1": tiff((RAMP > 0.5).astype(np.int32)),
    "16 bits with alpha": png(np.stack([RAMP * 65535, np.full_like(RAMP, 65535)], axis=-1).round(), 4),
    "16 bits a colour": png((RAMP * 65535).round()[..., None].repeat(3, axis=-1), 2),
}


@pytest.mark.parametrize("name", GREYS)
def test_greys_are_scaled_by_their_range(tmp_path, name):
    (tmp_path / "grey").write_bytes(GREYS[name])
    pixels = np.asarray(load_image(tmp_path / "grey")).astype(int)
    expected = np.arange(256) if "mask" not in name else np.repeat([0, 255], 128)
    assert abs(pixels[0] - expected[:, None]).max() <= 1


def test_greys_that_cannot_be_told_are_named(tmp_path):
    low = (RAMP * 4095).round()[..., None].repeat(3, axis=-1)  # Pillow gives the upper 8 of 16 bits: at most 15
    for content, reason in ((png(low, 2), "lower 12"), (tiff(np.full((2, 2), np.nan, np.float32)), "is a number")):
        (tmp_path / "grey").write_bytes(content)
        with pytest.raises(OSError, match=f"cannot read the image .*grey: .*{reason}"):
            load_image(tmp_path / "grey")
    (tmp_path / "grey").write_bytes(tiff(np.zeros((2, 2), np.float32)))  # what is black stays so
    assert np.asarray(load_image(tmp_path / "grey")).max() == 0


def test_kinds_of_colour(tmp_path):
    image = noise(32, 32)
    path = tmp_path / "image"
    image.save(path, "MPO", save_all=True, append_images=[image.rotate(180)])  # a stereo camera's: its first picture
    jpeg = tmp_path / "image.jpg"
    image.save(jpeg)
    assert np.array_equal(load_image(path), load_image(jpeg))
    palette = image.quantize(4)
    palette.save(path, "PNG", transparency=bytes([0, 255, 255, 255]))
    shown = np.asarray(load_image(path))
    assert (shown[np.asarray(palette) == 0] == 255).all()
    assert np.array_equal(shown[np.asarray(palette) == 3], np.asarray(palette.convert("RGB"))[np.asarray(palette) == 3])


def test_load_image_names_what_it_cannot_read(tmp_path):
    whole, part, text = tmp_path / "whole.jpg", tmp_path / "part.jpg", tmp_path / "text.jpg"
    noise(64, 64).save(whole)
    part.write_bytes(whole.read_bytes()[:1500])
    text.write_text("not an image")

    for path in (part, text, tmp_path / "missing.jpg", tmp_path):
        with pytest.raises(OSError, match=str(path)):
            load_image(path)


# --- reading large photographs ---


def test_large_jpegs_are_decoded_smaller(tmp_path):
    path = tmp_path / "large.jpg"
    Image.new("RGB", (1600, 1200), (200, 100, 50)).save(path)
    assert load_image(path).size == (1600, 1200)
    assert load_image(path, lambda width, height: 1).size == (1600, 1200)
    for factor, size in ((2, (800, 600)), (3, (800, 600)), (4, (400, 300)), (8, (200, 150)), (100, (200, 150))):
        assert load_image(path, lambda width, height, factor=factor: factor).size == size
    assert load_image(path, BlipImageTrain(384).shrink).size == (800, 600)


def test_a_jpeg_is_too_large_by_what_is_decoded(tmp_path, monkeypatch):
    """A progressive one is held at its full size whatever the scale."""
    monkeypatch.setattr(processors, "MAX_PIXELS", 800 * 600)
    image, path = noise(1600, 1200), tmp_path / "large.jpg"
    image.save(path)
    assert load_image(path, lambda width, height: 2).size == (800, 600)
    for shrink, options in ((None, {}), (lambda width, height: 2, {"progressive": True})):
        image.save(path, **options)
        with pytest.raises(OSError, match=r"large\.jpg: 1,920,000 pixels are more than 480,000"):
            load_image(path, shrink)


def test_other_formats_keep_their_pixels(tmp_path):
    noise(64, 48).save(tmp_path / "image.png")
    loaded = load_image(tmp_path / "image.png", lambda width, height: 2)
    assert np.array_equal(loaded, noise(64, 48))


@pytest.mark.parametrize(
    ("width", "height", "train", "evaluation"),
    [
        # smallest crop: half the area, 3 wide and 4 high: sqrt(0.5 * 3/4 * 640 * 480) = 339 < 384
        (640, 480, 0, 0),
        (1024, 768, 1, 1),  # 543; nocaps' largest
        (4000, 3000, 5, 3),  # 2121 / 384 = 5.5; 3000 / 768 = 3.9
        (3000, 4000, 5, 3),
        (12000, 500, 1, 0),  # a long one: 500 / 384
    ],
)
def test_no_photograph_is_decoded_to_fewer_pixels_than_needed(width, height, train, evaluation):
    assert BlipImageTrain(384).shrink(width, height) == train
    assert BlipImageEval(384).shrink(width, height) == evaluation


# --- captions ---


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A Dog.", "a dog"),
        ('one.two!three"four(five)six*seven#eight:nine;ten~', "one two three four five six seven eight nine ten"),
        ("man's well-known, red/blue hat?", "man's well-known, red/blue hat?"),
        ("  two   dogs\n\trun \n", "two dogs run"),
        ("no-break\u00a0space and\u2003em\u3000space", "no-break space and em space"),
        ("", ""),
        (" .!. ", ""),
    ],
)
def test_caption_cleaning(caption, cleaned):
    assert CaptionProcessor()(caption) == cleaned


def test_caption_is_cut_to_max_words_after_cleaning():
    assert CaptionProcessor(max_words=3)("one . two ! three four") == "one two three"
    assert CaptionProcessor()(" ".join(["word"] * 60)).split() == ["word"] * 50


def test_prompt_goes_in_front_untouched_and_uncounted():
    processor = CaptionProcessor(prompt="a picture of ", max_words=2)
    assert processor("A dog runs.") == "a picture of a dog"
    assert processor.clean("A dog runs.") == "a dog"
