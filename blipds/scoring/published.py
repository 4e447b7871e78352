"""Published scores of released checkpoints, and the table that compares a checkpoint with them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from blipds.scoring.clip import CLIP_METRICS


@dataclass(frozen=True)
class Published:
    """`values` as papers print them, times 100."""

    source: str
    images: int
    values: dict[str, float]


PAPER = "BLIP paper (arXiv 2201.12086), table 7"
DOMAINS = "BLIP paper, after Papers with Code"
BLIP2 = "BLIP's row in the BLIP-2 paper (arXiv 2301.12597)"
LAVIS = "LAVIS, docs/benchmark.rst"
BLIP_BASE = {
    ("coco_caption", "test"): Published(
        f"{PAPER}; METEOR, ROUGE-L, SPICE: salesforce/BLIP#150",
        5000,
        {"Bleu_4": 39.7, "METEOR": 30.95, "ROUGE_L": 59.97, "CIDEr": 133.3, "SPICE": 23.8},
    ),
    ("nocaps", "val"): Published(PAPER, 4500, {"CIDEr": 109.6, "SPICE": 14.7}),
    ("nocaps", "val_near-domain"): Published(DOMAINS, 2938, {"CIDEr": 108.6, "SPICE": 14.8}),
    ("nocaps", "val_out-domain"): Published(DOMAINS, 914, {"CIDEr": 111.5, "SPICE": 14.2}),
}
LAVIS_BASE = {
    ("coco_caption", "test"): Published(LAVIS, 5000, {"Bleu_4": 39.9, "CIDEr": 133.5, "SPICE": 23.7}),
    ("nocaps", "val"): Published(LAVIS, 4500, {"Bleu_4": 31.9, "CIDEr": 109.1, "SPICE": 14.7}),
}
BLIP_LARGE = {
    ("coco_caption", "test"): Published(
        f"{PAPER}; METEOR, SPICE: LAVIS's dataset card",
        5000,
        {"Bleu_4": 40.4, "METEOR": 31.4, "CIDEr": 136.7, "SPICE": 24.3},
    ),
    ("nocaps", "val"): Published(PAPER, 4500, {"CIDEr": 113.2, "SPICE": 14.8}),
    ("nocaps", "val_in-domain"): Published(BLIP2, 648, {"CIDEr": 114.9, "SPICE": 15.2}),
    ("nocaps", "val_near-domain"): Published(DOMAINS, 2938, {"CIDEr": 112.1, "SPICE": 14.9}),
    ("nocaps", "val_out-domain"): Published(DOMAINS, 914, {"CIDEr": 115.3, "SPICE": 14.4}),
}
# By file name. The hub's Salesforce/blip-image-captioning-* are not here: transformers' conversion script makes them
# from pretrained checkpoints, for which no such scores are published.
RELEASED = {
    "model_base_caption_capfilt_large.pth": BLIP_BASE,
    "blip_coco_caption_base.pth": LAVIS_BASE,
    "model_large_caption.pth": BLIP_LARGE,
}


def published(checkpoint: str | None, dataset: str, part: str) -> Published | None:
    """What was published for a checkpoint (a path or an address) on a split of a dataset, or on a domain of it."""
    name = (checkpoint or "").rpartition("/")[2]
    return RELEASED.get(name, {}).get((dataset, part))


COLUMNS = {
    **{f"Bleu_{n}": f"BLEU-{n}" for n in (1, 2, 3, 4)},
    **{"METEOR": "METEOR", "ROUGE_L": "ROUGE-L", "CIDEr": "CIDEr", "SPICE": "SPICE"},
}
CLIP_COLUMNS = {name: name for metric in CLIP_METRICS for name in (metric, f"Ref{metric}")}


def table(rows: Iterable[tuple[str, int, Mapping[str, float]]]) -> list[str]:
    """Lines for a terminal; of each row its name, the number of images, and metrics times 100."""
    rows = list(rows)
    scored = {metric for _, _, values in rows for metric in values}
    columns = COLUMNS | {metric: title for metric, title in CLIP_COLUMNS.items() if metric in scored}
    lines = [("", "images", *columns.values())]
    for name, images, values in rows:
        numbers = (f"{values[metric]:.2f}" if metric in values else "-" for metric in columns)
        lines.append((name, f"{images:,}", *numbers))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        f"{first:<{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        for first, *rest in lines
    ]
