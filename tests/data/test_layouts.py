"""Twelve ways to write down the captions of the same 200 photographs, and how each is recognised."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from packing import LAYOUTS, read, write_rows, written

from blipds.config.run import load_run_config
from blipds.data.annotations import expand_braces, read_annotations, read_splits
from blipds.data.datasets import build_dataset
from blipds.data.layouts import KINDS, read_layout
from blipds.data.loader import RankShare, epoch_loader
from blipds.data.tokenizer import CaptionTokenizer
from blipds.errors import UserError
from blipds.scoring.metrics import score_held_out_reference

# --- the same photographs, whatever the layout ---


@cache
def human(references):
    """One caption of each image scored against its others. Twelve times the same captions are scored once."""
    return score_held_out_reference(json.loads(references), ("Bleu", "ROUGE_L", "CIDEr")).values


def built(path, layout, folder, training):
    run_config = folder / "run.yaml"
    run_config.write_text("model: {model_type: tiny}\ndatasets: {custom_caption: {}}\n")
    key = "datasets.custom_caption.build_info.annotations.train"
    config, _ = load_run_config(run_config, [f"{key}={path}", f"env.cache_root={folder / 'cache'}"])
    return build_dataset("custom_caption", config, "train", training)


def first_batch(dataset):
    loader = epoch_loader([dataset], CaptionTokenizer(), RankShare(8, 1, rank=0, world_size=1), seed=1, num_workers=0)
    (batch,) = next(loader.windows(epoch=0))
    return batch


@pytest.fixture(scope="module")
def expected(photographs, tmp_path_factory):
    """What LAVIS's list, BLIP's own layout, gives."""
    folder = tmp_path_factory.mktemp("expected")
    return first_batch(built(LAYOUTS["list"](photographs, folder / "data"), "list", folder, training=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_records_first_batch_and_metrics(layout, photographs, expected, tmp_path):
    path = LAYOUTS[layout](photographs, tmp_path / "data")

    dataset = built(path, layout, tmp_path, training=True)
    records = [(Path(str(r.image)).name, r.image_id, list(r.captions)) for r in dataset.records]
    assert records == [(path.name, path.stem, captions) for path, captions in photographs]
    assert dataset.notices == ()

    batch = first_batch(dataset)
    assert torch.equal(batch.images.pixels, expected.images.pixels)
    assert torch.equal(batch.captions.input_ids, expected.captions.input_ids)
    assert torch.equal(batch.captions.labels, expected.captions.labels)

    evaluated = built(path, layout, tmp_path, training=False)
    references = {str(record.image_id): list(record.captions) for record in evaluated.records}
    assert human(json.dumps(references)) == human(json.dumps({path.stem: texts for path, texts in photographs}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recognised_by_content(layout, photographs, tmp_path):
    """The file's name does not matter."""
    path = Path(expand_braces(str(LAYOUTS[layout](photographs[:3], tmp_path)))[0])
    if path.is_file():
        path = path.rename(path.with_name("captions"))
    assert read_layout(path, None, [])[0] == layout.split(",")[0]


# --- details of a layout ---


def test_karpathys_splits(tmp_path):
    images = [
        {"filename": f"{split}.jpg", "split": split, "sentences": [{"raw": "one"}], "cocoid": number}
        for number, split in enumerate(["train", "restval", "val", "test"])
    ]
    path = written(tmp_path, "dataset_coco.json", json.dumps({"images": images}))
    assert read(path, "train")[0] == [("train.jpg", 0, ("one",)), ("restval.jpg", 1, ("one",))]
    assert read(path, "val")[0] == [("val.jpg", 2, ("one",))]
    assert {split: len(found.records) for split, found in read_splits([path], None, None).items()} == {
        "train": 2,
        "val": 1,
        "test": 1,
    }
    with pytest.raises(UserError, match=r"no split 'dev2'; it has test, train, val$"):
        read(path, "dev2")


def test_cocos_captions_may_come_in_any_order(tmp_path):
    content = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": 3, "caption": "b1"},
            {"image_id": 7, "caption": "a1"},
            {"image_id": 3, "caption": "b2"},
        ],
    }
    path = written(tmp_path, "captions.json", json.dumps(content))
    assert read(path)[0] == [("a.jpg", 7, ("a1",)), ("b.jpg", 3, ("b1", "b2"))]
    assert read_annotations([path], None, True).pairs == [(1, 0), (0, 0), (1, 1)]


def test_cocos_image_lists_have_no_captions(tmp_path):
    path = written(tmp_path, "image_info_test2014.json", '{"images": [{"id": 1, "file_name": "a.jpg"}]}')
    assert read(path, training=False)[0] == [("a.jpg", 1, ())]
    with pytest.raises(UserError, match=r"no image has a caption \(1 images; keys and columns"):
        read(path)


def test_cocos_own_file(shared, tmp_path):
    """5,000 images, 25,014 captions: https://cocodataset.org"""
    annotations = read_annotations([shared / "data" / "coco_annotations" / "captions_val2017.json"], tmp_path, True)
    assert (len(annotations.records), len(annotations.pairs)) == (5000, 25014)


@pytest.mark.parametrize(
    ("text", "records"),
    [
        # the last column takes what an unquoted caption has too much; a row that is too short has no caption
        ("image,caption\na.jpg,one, two\n", [("a.jpg", "a", ("one, two",))]),
        ('image,caption\na.jpg,"one, ""two"""\n', [("a.jpg", "a", ('one, "two"',))]),
        ("image_name| comment_number| comment\na.jpg| 0| one\na.jpg| 4   two\n", [("a.jpg", "a", ("one",))]),
        # quotes in a file without quoting are the caption's
        (
            'image\tcaption\na.jpg\t"Stop" sign\nb.jpg\t"open\n',
            [("a.jpg", "a", ('"Stop" sign',)), ("b.jpg", "b", ('"open',))],
        ),
        ("Caption;Image_ID;Image\none;7;a.jpg\n", [("a.jpg", 7, ("one",))]),
        ("image,image_id,caption\na.jpg,007,one\nb.jpg,,two\n", [("a.jpg", "007", ("one",)), ("b.jpg", "b", ("two",))]),
        ("image,image_id,caption\na.jpg,7.0,one\n", [("a.jpg", 7, ("one",))]),  # pandas' column with gaps
        ("a.jpg,one\nb.jpg,two\n", [("a.jpg", "a", ("one",)), ("b.jpg", "b", ("two",))]),
        ("\ufeffimage,caption\r\na.jpg,one\r\n", [("a.jpg", "a", ("one",))]),  # from Excel
        ("image,caption,text\na.jpg,one,two\n", [("a.jpg", "a", ("one",))]),  # `text` counts where no `caption` is
        ("image,caption,Caption,caption,caption.1\na.jpg,1,2,3,4\n", [("a.jpg", "a", ("1", "2", "3", "4"))]),
        ("image,caption,x,x\na.jpg,one,y,z\n", [("a.jpg", "a", ("one",))]),
    ],
)
def test_tables(tmp_path, text, records):
    assert read(written(tmp_path, "captions.csv", text))[0] == records


QUOTED = """he said "it's" """.rstrip()
SMILE = "a \U0001f642"


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        (str(["a dog", QUOTED]), ("a dog", QUOTED)),
        (json.dumps([SMILE, QUOTED]), (SMILE, QUOTED)),
        ('["one","two",]', ("one", "two")),
        ("[sic] a dog", ("[sic] a dog",)),
        ("['one' 'two']", None),  # numpy's
        ('["one", 2, "three"]', None),
    ],
)
def test_lists_written_as_text(tmp_path, text, captions):
    path = write_rows([["image", "captions"], ["a.jpg", text]], tmp_path / "captions.csv")
    if captions is None:
        with pytest.raises(UserError, match=r"line 2 \(a\.jpg\): 'captions' is a list written as text that cannot be"):
            read(path)
    else:
        assert read(path)[0] == [("a.jpg", "a", captions)]


@pytest.mark.parametrize(
    ("text", "records"),
    [
        ("caption,image\na dog, running,a.jpg\n", [("a.jpg", "a", ("a dog, running",))]),
        ("image,caption,image_id\na.jpg,one, two, three,7\n", [("a.jpg", 7, ("one, two, three",))]),
        ("image\tcaption\tsplit\na.jpg\tone\ttwo\ttrain\n", [("a.jpg", "a", ("one\ttwo".replace("\t", " "),))]),
        ("image,caption\na.jpg,one,,,\n", [("a.jpg", "a", ("one",))]),  # a spreadsheet's empty columns
        ("image,caption,\na.jpg,one, two,\n", [("a.jpg", "a", ("one, two",))]),
        (",image,caption\n0,a.jpg,one, two\n", [("a.jpg", "a", ("one, two",))]),  # pandas' index
    ],
)
def test_cells_beyond_the_columns_are_the_captions(tmp_path, text, records):
    assert read(written(tmp_path, "captions.csv", text))[0] == records


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image,caption\n1,a.jpg,one\n", "line 2: 3 cells for the 2 columns image, caption: put captions in quotes"),
        ("image,caption_1,caption_2\na.jpg,one,two,three\n", "line 2: 4 cells for the 3 columns"),
        ("image,split\na.jpg,train,x\n", "line 2: 3 cells for the 2 columns"),
        ("image,caption,image\na.jpg,one,b.jpg\n", "line 1: several columns image"),
    ],
)
def test_cells_that_fit_no_column_are_named(tmp_path, text, said):
    with pytest.raises(UserError, match=re.escape(said)):
        read(written(tmp_path, "captions.csv", text))


@pytest.mark.parametrize("ids", [(7, "7"), ("7", 7), ("a", "a"), (7, 7.0)])
def test_cocos_ids_are_text_or_numbers(tmp_path, ids):
    first, second = ids
    content = {
        "images": [{"id": first, "file_name": "a.jpg"}],
        "annotations": [{"id": 1, "image_id": second, "caption": "one"}],
    }
    assert read(written(tmp_path, "coco.json", json.dumps(content)))[0] == [("a.jpg", first, ("one",))]


def test_flickrs_token_file(tmp_path):
    """Flickr8k's own has captions of an image that does not exist, under a name like this one."""
    path = written(tmp_path, "tokens", "a.jpg#0\tA dog # 1 .\na.jpg#1\ttwo\n2258277193_586949ec62.jpg.1#0\tthree\n")
    assert read(path)[0] == [
        ("a.jpg", "a", ("A dog # 1 .", "two")),
        ("2258277193_586949ec62.jpg.1", "2258277193_586949ec62.jpg", ("three",)),
    ]


SPLIT_ROWS = [{"image": f"{s}.jpg", "caption": "one", "split": s} for s in ("train", "validation", "test", "")]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(SPLIT_ROWS),
        "\n".join(map(json.dumps, SPLIT_ROWS)),
        "\n".join(["image,caption,Split", *(",".join(row.values()) for row in SPLIT_ROWS)]),
    ],
)
def test_rows_may_name_their_split(tmp_path, text):
    path = written(tmp_path, "captions", text)
    assert [name for name, _, _ in read(path, "val")[0]] == ["validation.jpg", ".jpg"]  # the last one names none
    with pytest.raises(UserError, match="'split' is 7; expected the name of a split"):
        read(written(tmp_path, "number.json", '[{"image": "a.jpg", "split": 7}]'))


def test_braces():
    assert expand_braces("s/{008..011}.tar") == ["s/008.tar", "s/009.tar", "s/010.tar", "s/011.tar"]
    assert expand_braces("{0..1}/{1..2}.tar") == ["0/1.tar", "0/2.tar", "1/1.tar", "1/2.tar"]
    assert expand_braces("a{b}.tar") == ["a{b}.tar"]
    assert expand_braces("cat {1..2} | awk '{print $1,$2}'") == [
        "cat 1 | awk '{print $1,$2}'",
        "cat 2 | awk '{print $1,$2}'",
    ]
    with pytest.raises(UserError, match="stands for 1,000,000,000 files"):
        expand_braces("{000000000..999999999}.tar")


# --- what cannot be told, or is wrong ---


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is empty"),
        ("[]", "an empty list"),
        ("{}", "an object with nothing in it"),
        ('{"videos": []}', "an object with 'videos'"),
        ("once upon a time", "its first line 'once upon a time' names no column image, file_name"),
        ("PAR1\udcff", "it is no text in UTF-8"),
    ],
)
def test_unclear_files(tmp_path, text, reason):
    path = tmp_path / "x"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        read(path)
    assert f"{path}: cannot tell what it is ({reason}" in str(caught.value)
    assert str(caught.value).endswith(f"what can be read: {KINDS}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image": "a.jpg", "caption": "one"}\n{"image": "b.jpg",\n', "line 2: Expecting property name"),
        ('{"images": [{"id": 1}]}', "image 0: expected an object with 'id' and 'file_name'"),
        ('{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}', "image 1: the id 1 is that of"),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2, "caption": "x"}]}',
            "annotation 0: no image has the id 2",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": []}]}',
            "(captions_*.json is meant, not instances_*.json)",
        ),
        ('{"images": [{"sentences": []}]}', "image 0: expected 'filename', 'split', 'sentences' with 'raw'"),
        ("image,caption\na.jpg,one\n,two\n", "line 3: expected an object with 'image', a file name"),
        ('image,caption\na.jpg,"one\n', "line 2: unexpected end of data"),
        ("image,caption\n", "no image in it"),
        ("a.jpg#0\tone\nb.jpg two\n", "line 2: expected name.jpg#0<TAB>caption; got 'b.jpg two'"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    path = written(tmp_path, "x", text)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_two_images_with_one_id_cannot_be_evaluated(tmp_path):
    path = written(tmp_path, "x.csv", "image,image_id,caption\na.jpg,7,one\nb.jpg,7,two\n")
    assert len(read(path)[0]) == 2
    with pytest.raises(UserError, match=r"the image_id 7 belongs to two images, .*/a\.jpg and .*/b\.jpg$"):
        read(path, training=False)


def test_long_captions_and_control_characters(tmp_path):
    rows = [{"image": "a.jpg", "caption": [" a\x1b[2J\ndog\ud800 ", "x" * 10_001]}]
    records, notices = read(written(tmp_path, "x", json.dumps(rows)))
    assert records == [("a.jpg", "a", ("a [2J dog", "x" * 10_000))]
    assert notices == (f"1 captions cut to 10,000 characters; the first: {tmp_path / 'x'}, entry 0",)
