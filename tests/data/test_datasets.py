"""Samples: which captions share an image, what the limits count, and what becomes of bad input."""

import json

import pytest
import torch
from PIL import Image

from blipds.config.sections import (
    AnnotationConfig,
    BuildInfo,
    Config,
    DatasetConfig,
    EnvConfig,
    ImageProcessorConfig,
    ImageProcessors,
    ModelConfig,
    RunConfig,
    TextProcessorConfig,
    TextProcessors,
)
from blipds.data import datasets
from blipds.data.annotations import Annotations, ImageFile, Record
from blipds.data.datasets import CaptionDataset, build_dataset, build_image_processor, splits_of
from blipds.data.processors import CLIP_MEAN, BlipImageEval, BlipImageTrain
from blipds.errors import UserError

# a pair an entry: image a has five captions, b has three
PAIRS = [("a", "a1"), ("b", "b1"), ("a", "a2"), ("a", "a3"), ("b", "b2"), ("a", "a4"), ("b", "b3"), ("a", "a5")]


@pytest.fixture
def folder(tmp_path):
    """env.cache_root with my/train.json, my/val.json and two photographs; c.png is none."""
    (tmp_path / "my" / "images").mkdir(parents=True)
    Image.linear_gradient("L").save(tmp_path / "my" / "images" / "a.png")
    Image.radial_gradient("L").save(tmp_path / "my" / "images" / "b.png")
    (tmp_path / "my" / "images" / "c.png").write_bytes(b"no image")
    train = [{"image": f"{image}.png", "caption": caption.upper()} for image, caption in PAIRS]
    (tmp_path / "my" / "train.json").write_text(json.dumps(train))
    val = [{"image": f"{image}.png", "caption": ["x", "y"]} for image in "abc"]
    (tmp_path / "my" / "val.json").write_text(json.dumps(val))
    return tmp_path


def config(folder, captions_per_image=1, **run):
    files = {split: AnnotationConfig(storage=[f"my/{split}.json"]) for split in ("train", "val")}
    dataset = DatasetConfig(
        build_info=BuildInfo(annotations=files), images="my/images", captions_per_image=captions_per_image
    )
    return Config(
        model=ModelConfig(image_size=8),
        datasets={"custom_caption": dataset},
        run=RunConfig(**run),
        env=EnvConfig(cache_root=str(folder)),
    )


def train_set(folder, captions_per_image=1, **run):
    return build_dataset("custom_caption", config(folder, captions_per_image, **run), "train", training=True)


def captions_of(dataset):
    """The captions of each sample, the prompt cut off."""
    samples = [dataset[index] for index in range(len(dataset))]
    assert all(caption.startswith("a picture of ") for sample in samples for caption in sample.captions)
    return [[caption.removeprefix("a picture of ") for caption in sample.captions] for sample in samples]


# --- samples ---


def test_one_caption_a_sample_in_the_order_of_the_file(folder):
    assert captions_of(train_set(folder)) == [[caption] for _, caption in PAIRS]


@pytest.mark.parametrize(
    ("captions_per_image", "expected"),
    [
        (2, [["a1", "a2"], ["a3", "a4"], ["a5"], ["b1", "b2"], ["b3"]]),
        (3, [["a1", "a2", "a3"], ["a4", "a5"], ["b1", "b2", "b3"]]),
        (9, [["a1", "a2", "a3", "a4", "a5"], ["b1", "b2", "b3"]]),
        ("all", [["a1", "a2", "a3", "a4", "a5"], ["b1", "b2", "b3"]]),
    ],
)
def test_captions_that_share_an_image(folder, captions_per_image, expected):
    assert captions_of(train_set(folder, captions_per_image)) == expected


def test_limit_train_counts_images(folder):
    dataset = train_set(folder, limit_train=1, limit_val=2)
    assert captions_of(dataset) == [["a1"], ["a2"], ["a3"], ["a4"], ["a5"]]
    assert len(dataset.records) == 1


def test_evaluation_samples_are_images(folder):
    dataset = build_dataset("custom_caption", config(folder, "all", limit_train=1), "val", training=False)
    assert [dataset[index].captions for index in range(len(dataset))] == [[], [], []]
    assert dataset.records[0].captions == ("x", "y")
    limited = build_dataset("custom_caption", config(folder, limit_val=2), "val", training=False)
    assert [record.image_id for record in limited.records] == ["a", "b"]


def test_pixels_are_the_processors(folder):
    dataset = build_dataset("custom_caption", config(folder), "val", training=False)
    with Image.open(folder / "my" / "images" / "b.png") as image:
        assert torch.equal(dataset[1].image, BlipImageEval(8)(image.convert("RGB")))


def test_the_seed_alone_decides_the_augmentation(folder):
    dataset = train_set(folder)
    assert isinstance(dataset.image_processor, BlipImageTrain)
    torch.manual_seed(1)
    first = dataset.sample(0, seed=5)
    drawn = torch.rand(3)
    torch.manual_seed(2)
    assert torch.equal(dataset.sample(0, seed=5).image, first.image)
    assert not torch.equal(dataset.sample(0, seed=6).image, first.image)
    # and it leaves torch's own random state as it was
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)


def test_an_unreadable_image_is_an_error_sample(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    records = [Record(ImageFile(tmp_path / name), ("x",), name) for name in ("bad.png", "missing.png")]
    dataset = CaptionDataset("d", Annotations(records, [(0, 0), (1, 0)]), BlipImageEval(8), str, 1, training=True)
    for index, record in enumerate(records):
        sample = dataset[index]
        assert (sample.image, sample.captions) == (None, [])
        assert sample.error.startswith(f"{record.image}: ")


# --- building ---


def test_a_training_split_without_a_readable_image(folder):
    images = folder / "my" / "images"
    (images / "a.png").unlink()
    (images / "b.png").write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        train_set(folder)
    assert str(caught.value).startswith(
        f"datasets.custom_caption: split 'train': none of its 2 images can be read; {images}/a.png: no such file; "
        f"cannot read the image {images}/b.png: cannot identify image file"
    )
    Image.new("RGB", (3, 2)).save(images / "b.png")
    assert len(train_set(folder).records) == 2


def test_it_is_given_up_after_some_unreadable_images(folder, monkeypatch):
    """Missing ones do not count: looking for a file costs little."""
    entries = [{"image": f"{name}.png", "caption": "x"} for name in (*map(str, range(200)), *["c"] * 3, "d", "e", "a")]
    (folder / "my" / "train.json").write_text(json.dumps(entries))
    assert len(train_set(folder).records) == 204
    for name in "de":
        (folder / "my" / "images" / f"{name}.png").write_bytes(b"no image")
    monkeypatch.setattr(datasets, "PROBED", 3)
    with pytest.raises(UserError, match="split 'train': none of the first 3 images can be read"):
        train_set(folder)


def test_paths_start_at_the_cache_root_unless_absolute(folder):
    given = config(folder)
    dataset = given.datasets["custom_caption"]
    dataset.build_info.images.storage = "nowhere"  # `images` overrides it
    assert build_dataset("custom_caption", given, "train", training=True)
    given.env.cache_root = "/nowhere"
    dataset.build_info.annotations["train"].storage = [str(folder / "my" / "train.json")]
    dataset.images = str(folder / "my" / "images")
    assert build_dataset("custom_caption", given, "train", training=True)


def test_what_the_processors_are_given(folder):
    given = config(folder)
    given.model.prompt = "an image of "
    dataset = given.datasets["custom_caption"]
    dataset.vis_processor = ImageProcessors(
        train=ImageProcessorConfig(name="blip_image_train", min_scale=0.2, max_scale=0.9, mean=[0.5, 0.5, 0.5])
    )
    dataset.text_processor = TextProcessors(train=TextProcessorConfig(max_words=2))
    built = build_dataset("custom_caption", given, "train", training=True)
    assert built.image_processor == BlipImageTrain(8, min_scale=0.2, max_scale=0.9, mean=(0.5, 0.5, 0.5))
    assert built.text_processor("One two. Three!") == "an image of one two"


def test_the_models_image_size_and_the_processors_defaults():
    processor = build_image_processor(ImageProcessorConfig(name="blip_image_eval"), image_size=224)
    assert processor == BlipImageEval(224, mean=CLIP_MEAN)


def test_a_processor_that_does_not_take_a_key():
    wrong = ImageProcessorConfig(name="blip_image_eval", min_scale=0.5)
    with pytest.raises(UserError, match="vis_processor 'blip_image_eval' does not take one of min_scale"):
        build_image_processor(wrong, image_size=8)


def test_unknown_splits(folder):
    with pytest.raises(UserError) as caught:
        build_dataset("custom_caption", config(folder), "vall", training=False)
    assert str(caught.value) == (
        "no annotation file for split 'vall': give datasets.<name>.build_info.annotations.vall.storage; "
        "did you mean 'val'? allowed: train, val"
    )
    shapes = Config(datasets={"shapes_caption": DatasetConfig(num_images={"train": 3, "none": 0})})
    with pytest.raises(UserError, match="num_images has no split 'val'; allowed: none, train"):
        build_dataset("shapes_caption", shapes, "val", training=False)
    with pytest.raises(UserError, match=r"datasets\.shapes_caption: split 'none' holds no image"):
        build_dataset("shapes_caption", shapes, "none", training=False)


def test_unknown_dataset(folder):
    given = Config(datasets={"coco_captoin": DatasetConfig()})
    with pytest.raises(UserError, match="unknown dataset 'coco_captoin'; did you mean 'coco_caption'"):
        build_dataset("coco_captoin", given, "train", training=True)


def test_without_an_image_folder_names_start_beside_the_file(folder):
    given = config(folder)
    given.datasets["custom_caption"].images = None
    (folder / "my" / "images" / "a.png").rename(folder / "my" / "a.png")
    dataset = build_dataset("custom_caption", given, "train", training=True)
    assert str(dataset.records[0].image) == str(folder / "my" / "a.png")


@pytest.mark.parametrize("storage", ["pipe:cat a.tar", "https://example.org/{000..012}.tar"])
def test_streams_are_not_evaluated(folder, storage):
    given = config(folder)
    given.datasets["custom_caption"].build_info.annotations["val"].storage = [storage]
    with pytest.raises(UserError, match="a stream can only be trained on, and nothing else beside it; split 'val' nee"):
        build_dataset("custom_caption", given, "val", training=False)


def test_splits_of(folder):
    dataset = config(folder).datasets["custom_caption"]
    dataset.build_info.annotations["test"] = AnnotationConfig()
    assert splits_of(dataset) == ["train", "val"]
    assert splits_of(DatasetConfig(num_images={"val": 3})) == ["val"]


def test_shapes():
    given = Config(
        model=ModelConfig(image_size=8),
        datasets={"shapes_caption": DatasetConfig(num_images={"val": 2}, captions_per_image="all")},
    )
    dataset = build_dataset("shapes_caption", given, "val", training=True)
    assert [record.image_id for record in dataset.records] == ["val-42-000000", "val-42-000001"]
    assert [len(dataset[index].captions) for index in range(2)] == [5, 5]
