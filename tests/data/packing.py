"""Writes the same captioned images in the layouts that people have: `LAYOUTS[name](images, folder)` gives the path.

`images`: [(path of a photograph, [captions])]. A photograph lies under its own name in every layout.
"""

import csv
import io
import json
import os
import tarfile
from pathlib import Path

from blipds.data.annotations import read_annotations


def read(path, split=None, training=True):
    """([(image name, id, captions)], notices) of what `path` holds."""
    annotations = read_annotations([path], None, training, split)
    return [(Path(str(r.image)).name, r.image_id, r.captions) for r in annotations.records], annotations.notices


def written(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


def link_images(images, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for path, _ in images:
        os.link(path, folder / path.name) if same_disk(path, folder) else (folder / path.name).symlink_to(path)
    return folder


def same_disk(path, folder):
    return path.stat().st_dev == folder.stat().st_dev and os.access(path, os.W_OK)


def pairs(images):
    return [(path.name, caption) for path, captions in images for caption in captions]


def write_json(content, path):
    path.write_text(json.dumps(content))
    return path


def write_rows(rows, path, **dialect):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **dialect).writerows(rows)
    return path


def coco(images, folder):
    """Image ids are numbers in COCO; here they are what the other layouts give: the name without its suffix."""
    link_images(images, folder)
    content = {
        "info": {},
        "images": [{"id": path.stem, "file_name": path.name, "width": 224} for path, _ in images],
        "annotations": [
            {"id": number, "image_id": Path(name).stem, "caption": caption}
            for number, (name, caption) in enumerate(pairs(images))
        ],
    }
    return write_json(content, folder / "captions_train.json")


def karpathy(images, folder):
    """Two of three images in restval, which is trained on too; one more in test."""
    link_images(images, folder / "val2014")
    entries = [
        {
            "filepath": "val2014",
            "filename": path.name,
            "imgid": number,
            "split": "restval" if number % 3 else "train",
            "sentences": [{"raw": caption, "tokens": caption.split(), "imgid": number} for caption in captions],
            "sentids": [],
        }
        for number, (path, captions) in enumerate(images)
    ]
    other = entries[0] | {"split": "test", "filename": "other.jpg"}
    return write_json({"images": [other, *entries], "dataset": "flickr8k"}, folder / "dataset_flickr8k.json")


def lavis(images, folder):
    link_images(images, folder)
    entries = [{"image": name, "caption": caption, "image_id": Path(name).stem} for name, caption in pairs(images)]
    return write_json(entries, folder / "train.json")


def json_lines(images, folder):
    """An image a line, its captions in a list."""
    link_images(images, folder)
    lines = [json.dumps({"image": path.name, "captions": captions}) for path, captions in images]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


def comma_table(images, folder):
    link_images(images, folder)
    return write_rows([("image", "caption"), *pairs(images)], folder / "captions.txt")


def wide_table(images, folder):
    """A column for each caption, as spreadsheets have it."""
    link_images(images, folder)
    rows = [(path.name, "x", *captions) for path, captions in images]
    header = ("file_name", "licence", *(f"caption_{number}" for number in range(5)))
    return write_rows([header, *rows], folder / "captions.tsv", delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)


def flickr30k_table(images, folder):
    link_images(images, folder)
    lines = ["image_name| comment_number| comment"]
    lines += [f"{path.name}| {k}| {caption}" for path, captions in images for k, caption in enumerate(captions)]
    (folder / "results.csv").write_text("\n".join(lines))
    return folder / "results.csv"


def tokens(images, folder):
    link_images(images, folder)
    lines = [f"{path.name}#{k}\t{caption}\n" for path, captions in images for k, caption in enumerate(captions)]
    (folder / "Flickr8k.token.txt").write_text("".join(lines))
    return folder / "Flickr8k.token.txt"


def image_folder(images, folder):
    link_images(images, folder)
    for path, captions in images:
        (folder / f"{path.stem}.txt").write_text("\n".join(captions) + "\n")
    return folder


def metadata_jsonl(images, folder):
    """The hub's layout with a folder for each split; `test` has an image of its own."""
    for split, members in {"train": images, "test": images[:1]}.items():
        link_images(members, folder / split)
        lines = [json.dumps({"file_name": name, "text": caption}) for name, caption in pairs(members)]
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def metadata_csv(images, folder):
    link_images(images, folder)
    write_rows([("file_name", "text"), *pairs(images)], folder / "metadata.csv")
    return folder


def shards(images, folder, count=3):
    """Photograph and caption file side by side, the captions as text and as JSON in turn. Gives a path with braces."""
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(images) // count)
    for shard in range(count):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for number, (path, captions) in enumerate(images[shard * size : (shard + 1) * size]):
                add(tar, path.name, path.read_bytes())
                if number % 2:
                    add(tar, f"{path.stem}.txt", "\n".join(captions).encode())
                else:
                    add(tar, f"{path.stem}.json", json.dumps({"caption": captions, "width": 224}).encode())
    return folder / f"{{000..{count - 1:03d}}}.tar"


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


LAYOUTS = {
    "COCO": coco,
    "Karpathy": karpathy,
    "list": lavis,
    "JSON Lines": json_lines,
    "table, comma": comma_table,
    "table, wide": wide_table,
    "table, Flickr30k": flickr30k_table,
    "tokens": tokens,
    "image folder": image_folder,
    "metadata folder, jsonl": metadata_jsonl,
    "metadata folder, csv": metadata_csv,
    "shards": shards,
}
