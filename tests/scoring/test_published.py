"""Published scores: which checkpoint they belong to, and the table beside one's own."""

import pytest

from blipds.scoring.published import RELEASED, published, table


@pytest.mark.parametrize(
    ("checkpoint", "cider"),
    [
        ("https://storage.googleapis.com/x/BLIP/models/model_base_caption_capfilt_large.pth", 133.3),
        ("/data/blip_coco_caption_base.pth", 133.5),
        ("model_large_caption.pth", 136.7),
    ],
)
def test_a_released_checkpoint_is_known_by_its_file_name(checkpoint, cider):
    found = published(checkpoint, "coco_caption", "test")
    assert found.images == 5000 and found.values["CIDEr"] == cider
    assert published(checkpoint, "coco_caption", "val") is None


@pytest.mark.parametrize("other", [None, "output/run", "model_large.pth", "Salesforce/blip-image-captioning-base"])
def test_of_others_nothing_is_published(other):
    assert published(other, "coco_caption", "test") is None


def test_domains_of_nocaps_have_its_number_of_images():
    """nocaps.org/download: 4,500 images in val, of which 648 in-domain, 2,938 near-domain and 914 out-domain."""
    sizes = {"val": 4500, "val_in-domain": 648, "val_near-domain": 2938, "val_out-domain": 914}
    for rows in RELEASED.values():
        for (dataset, part), found in rows.items():
            assert found.images == (sizes[part] if dataset == "nocaps" else 5000)


def test_table():
    rows = [("test", 5000, {"CIDEr": 133.32, "Bleu_4": 39.7, "agg_metrics": 173.02}), ("  published", 12, {"SPICE": 9})]
    assert table(rows) == [
        "             images  BLEU-1  BLEU-2  BLEU-3  BLEU-4  METEOR  ROUGE-L   CIDEr  SPICE",
        "test          5,000       -       -       -   39.70       -        -  133.32      -",
        "  published      12       -       -       -       -       -        -       -   9.00",
    ]
