"""Reads Flickr8k's 6,000 training photographs as files and from tar shards, in turn, through the training loader.

    python tests/benchmarks/shards.py [--rounds 3] [--image-size 128]

Packs the photographs into shards in a temporary folder and opens photographs of both kinds in turn; then, for two ranks
with two workers each, one rank after the other, reads an epoch from files and one from shards, alternating. Every epoch
is checked: each image exactly once over the two ranks, and so too where it is left in the middle and taken up again.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

from packing import shards
from tqdm import tqdm

from blipds.data.annotations import read_annotations
from blipds.data.datasets import CaptionDataset
from blipds.data.loader import RankShare, epoch_loader
from blipds.data.processors import BlipImageTrain
from blipds.data.tokenizer import CaptionTokenizer

FLICKR8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "flickr8k"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=128)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sources = open_sources(Path(folder))
        compare_opening(sources)
        rates = {name: [] for name in sources}
        for number in range(args.rounds):
            for name, annotations in sources.items():
                seen, rate = read_epoch(annotations, args.image_size, epoch=number)
                assert set(seen.values()) == {1} and len(seen) == 6000, "not every image exactly once"
                rates[name].append(rate)
                print(f"round {number}  {name:6} {rate:7.0f} images/s, 6,000 images once each", flush=True)
        whole, _ = read_epoch(sources["shards"], args.image_size, epoch=0, last_step=60)
        rest, _ = read_epoch(sources["shards"], args.image_size, epoch=0, first_step=60)
        assert whole + rest == Counter(dict.fromkeys(whole + rest, 1)) and len(whole + rest) == 6000
        print(f"left after step 60 and taken up: {len(whole):,} images, then the other {len(rest):,}")
    if rates["files"]:
        best = {name: max(found) for name, found in rates.items()}
        print(f"best of each: shards / files = {best['shards'] / best['files']:.3f}")


def open_sources(folder):
    """{files, shards}: the same photographs, one caption each, a caption that is the photograph's name."""
    images = [(path, [path.stem]) for path in sorted((FLICKR8K / "images").iterdir())[:6000]]
    start = time.perf_counter()
    braces = shards(images, folder / "shards", count=13)
    packed = time.perf_counter()
    entries = [{"image": path.name, "caption": captions} for path, captions in images]
    (folder / "list.json").write_text(json.dumps(entries))
    files = read_annotations([folder / "list.json"], FLICKR8K / "images", captions_needed=True)
    opened = time.perf_counter()
    packs = read_annotations([braces], None, captions_needed=True, index_cache=folder / "cache")
    indexed = time.perf_counter()
    assert read_annotations([braces], None, captions_needed=True, index_cache=folder / "cache") == packs
    again = time.perf_counter()
    print(
        f"13 shards packed in {packed - start:.1f} s, indexed in {indexed - opened:.2f} s, "
        f"opened with the index in {again - indexed:.2f} s"
    )
    return {"files": files, "shards": packs}


def compare_opening(sources, block=50, blocks=20):
    """Processor time of opening the same photographs, fifty from files and fifty from shards in turn.

    Unlike images a second, it means something on a machine that has other work.
    """
    seconds = dict.fromkeys(sources, 0.0)
    for number in range(blocks):
        for name in sorted(sources, reverse=number % 2 == 1):
            start = time.process_time()
            for record in sources[name].records[number * block : (number + 1) * block]:
                record.image.open()
            seconds[name] += time.process_time() - start
    rates = {name: block * blocks / spent for name, spent in seconds.items()}
    print(
        f"opened in turn: {rates['files']:.0f} files and {rates['shards']:.0f} shard members a second of processor "
        f"time, shards / files = {rates['shards'] / rates['files']:.3f}",
        flush=True,
    )


def read_epoch(annotations, image_size, epoch, first_step=0, last_step=None):
    """({caption: times seen} over both ranks, images a second)"""
    dataset = CaptionDataset("benchmark", annotations, BlipImageTrain(image_size), str, 1, training=True)
    tokenizer = CaptionTokenizer(prompt="")
    seen, images, seconds = Counter(), 0, 0.0
    for rank in (0, 1):
        loader = epoch_loader([dataset], tokenizer, RankShare(32, 1, rank, world_size=2), seed=1, num_workers=2)
        start = time.perf_counter()
        for step, (batch,) in tqdm(enumerate(loader.windows(epoch, first_step), start=first_step), disable=None):
            if step == last_step:
                break
            assert not batch.errors
            images += batch.num_images
            rows = batch.captions.input_ids.tolist()
            seen.update(tuple(row) for row in rows if any(row[1:]))
        seconds += time.perf_counter() - start
    return seen, images / seconds


if __name__ == "__main__":
    main()
