#!/usr/bin/env python
"""Get the standard datasets, and look at captioned images before training on them.

    python launch/prepare_data.py coco --root DATA        then train with --options env.cache_root=DATA
    python launch/prepare_data.py flickr30k|flickr8k|nocaps --root DATA
    python launch/prepare_data.py spice                   what the metric SPICE needs

The annotations (and COCO's images) are downloaded to where the packaged dataset configs look. It first says how much
disk and time it needs, and asks; interrupted downloads resume. It lists the files that you must request yourself
(Flickr's photographs) and where to put them, and unpacks them from there.

    python launch/prepare_data.py check my_captions/train.json my_captions/val.json --images my_captions/images
    python launch/prepare_data.py check dataset_flickr8k.json --images Flicker8k_Dataset
    python launch/prepare_data.py check my_folder_of_images_and_txt
    python launch/prepare_data.py check 'shards/{000..012}.tar'

`check` takes what datasets.custom_caption takes and says what training would find: the kind of files; images, captions
and captions an image; how long captions are in tokens, and how many would be cut; words outside of the vocabulary, and
words that the tokenizer cannot spell as they are written; images that are missing, cannot be read, or are there twice;
ids that two images share; and what two splits have in common. Every image is decoded. Ten samples are drawn on a
contact sheet, for a person to see that captions and images belong together.
"""

import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import Any

from blipds import cli
from blipds.config.run import packaged_dataset
from blipds.config.sections import EnvConfig, ModelConfig, RunConfig
from blipds.data.annotations import read_splits
from blipds.data.inspection import Findings, describe, inspect, overlap, problems
from blipds.data.preparation import DATASETS, StandardSet, Step, announcement, spice_steps
from blipds.data.tokenizer import CaptionTokenizer
from blipds.errors import UserError
from blipds.files.paths import user_path
from blipds.monitor import contact_sheet

SAMPLES = 10
MAX_WORDS = 50  # as datasets.<name>.text_processor.*.max_words where nothing is said


def parse_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check", help="say what is in a captioned collection", description=__doc__, formatter_class=raw
    )
    check.set_defaults(run=run_check)
    check.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="annotation file, folder or tar shard; one for each split"
    )
    check.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="where the image names of an annotation file start; default: its folder",
    )
    check.add_argument(
        "--contact-sheet",
        type=Path,
        metavar="PNG",
        help="where the samples are drawn; default: output/check_<first PATH>.png, which a later check replaces",
    )
    check.add_argument("--problems", type=Path, metavar="FILE", help="write down all missing and unreadable images")
    check.add_argument(
        "--index-cache",
        type=Path,
        metavar="DIR",
        help="keep the indices of shards here (<env.cache_root>/shard_indices)",
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    check.add_argument("--workers", type=int, default=cores, help=f"processes that open images; default: {cores}")
    add_standard_sets(commands)
    return parser.parse_args()


def add_standard_sets(commands: Any) -> None:
    for name in (*DATASETS, "spice"):
        what = "SPICE's models (Stanford CoreNLP)" if name == "spice" else f"the dataset {DATASETS[name]}"
        command = commands.add_parser(name, help=f"get {what}", description=f"Get {what}.")
        command.set_defaults(run=run_spice if name == "spice" else run_standard_set)
        command.add_argument(
            "--root",
            type=Path,
            default=Path(EnvConfig.cache_root),
            metavar="DIR",
            help=f"env.cache_root of the runs that use it; default: {EnvConfig.cache_root}",
        )
        command.add_argument("--yes", action="store_true", help="start without asking")
        if name != "spice":
            command.add_argument("--no-images", action="store_true", help="annotations only")


def main() -> None:
    args = parse_arguments()
    args.run(args)


def run_standard_set(args: argparse.Namespace) -> None:
    root = user_path(args.root)
    wanted = StandardSet(packaged_dataset(DATASETS[args.command]), root)
    done: set[str] = set()
    # new annotations may name images that are missing: plan again until nothing new is left
    while steps := [step for step in wanted.steps(not args.no_images) if step.line not in done]:
        carry_out(steps, root, args.yes)
        done |= {step.line for step in steps}
    missing = [] if args.no_images else wanted.missing_lines()
    for line in missing:
        print(f"missing    {line}")
    if missing:
        raise UserError(f"{args.command}: the annotations are there, but images are missing")
    print(f"ready      --options env.cache_root={root}")


def run_spice(args: argparse.Namespace) -> None:
    downloads = user_path(args.root) / "downloads"
    if steps := spice_steps(downloads):
        carry_out(steps, downloads.parent, args.yes)
    print("ready      SPICE's models are there")


def carry_out(steps: list[Step], root: Path, yes: bool) -> None:
    """Says what is needed, asks, and does it."""
    print(*announcement(steps, root), sep="\n", flush=True)
    if not yes and not sys.stdin.isatty():
        raise UserError("standard input is no terminal, so nobody can confirm: give --yes to start")
    if not yes and input("start? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("not started")
    for step in steps:
        print(step.line, flush=True)
        step.do()


def run_check(args: argparse.Namespace) -> None:
    found = {}
    names = {path.name for path in args.paths}
    for path in args.paths:
        name = path.name if path.name and len(names) == len(args.paths) else str(path)
        for split, annotations in read_splits([user_path(path)], args.images, args.index_cache).items():
            found[f"{name} {split}".strip()] = annotations
    if not found:
        raise UserError(f"{args.paths[0]}: no image in it")
    tokenizer = CaptionTokenizer(prompt=ModelConfig.prompt, max_txt_len=ModelConfig.max_txt_len)
    splits = [inspect(name, annotations, tokenizer, MAX_WORDS, args.workers) for name, annotations in found.items()]
    for findings in splits:
        print(*describe(findings, tokenizer, RunConfig.max_len), sep="\n")
    for first, second in itertools.combinations(splits, 2):
        print(*overlap(first, second), sep="\n")
    if args.problems is not None:
        lines = [line for findings in splits for line in problems(findings)]
        write(args.problems, "".join(f"{line}\n" for line in lines))
        print(f"problems       {args.problems}: {len(lines):,} lines")
    sheet = args.contact_sheet or Path("output") / f"check_{args.paths[0].stem}.png"
    if draw_samples(splits, sheet):
        print(f"contact sheet  {sheet}")


def draw_samples(splits: list[Findings], path: Path) -> bool:
    """Samples from all over the collection; False where no image can be read."""
    records = [record for findings in splits for record, _ in findings.readable]
    if not records:
        return False
    shown = [records[number * len(records) // SAMPLES] for number in range(min(SAMPLES, len(records)))]
    images = [record.image.open() for record in shown]
    captions = [record.captions[0] if record.captions else "(no caption)" for record in shown]
    sheet = contact_sheet(images, captions, [record.captions[1:] for record in shown], columns=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return True


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--problems {path}: {error.strerror}") from error


def command() -> None:
    """`blipds-prepare-data`."""
    cli.run(main)


if __name__ == "__main__":
    command()
