#!/usr/bin/env python
"""Caption images.

    python launch/caption.py photo.jpg folder http://host/image.png --checkpoint output/RUN
    python launch/caption.py folder --checkpoint model_base_caption_capfilt_large.pth --output captions.jsonl
    find . -name '*.jpg' | python launch/caption.py - --checkpoint FOLDER --sidecar
    deepspeed launch/caption.py folder --checkpoint output/RUN --output captions.jsonl      all GPUs share the work
    python launch/caption.py --rank candidates.jsonl --checkpoint output/RUN                which caption is likeliest?

A folder stands for all images in it and below. The captions go to standard output as JSON Lines; with --output, to one
file in the order of the images (the same command continues it, on any number of GPUs); with --sidecar, to a .txt for
each image. Images that cannot be read are skipped and named; a command that captions none fails.

The checkpoint is a run directory (its best) or one of its checkpoints, whose config.yaml says how the model is built
and how captions are generated; a transformers folder or hub name; or a .pth of BLIP or LAVIS. What the checkpoint does
not say is as in the paper (3 beams, 5 to 20 tokens with the prompt's 4) unless the options below say otherwise.
"""

import argparse
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

DECODING = (
    *("prompt", "num_beams", "max_len", "min_len", "length_penalty", "repetition_penalty"),
    *("use_nucleus_sampling", "top_p", "temperature", "seed"),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="file, folder, http(s) address, or - for one of them on each line of stdin; with --rank, the folder where "
        "the image names in FILE start",
    )
    parser.add_argument(
        "--rank",
        type=Path,
        metavar="FILE",
        help="generate nothing: score the captions that FILE has of each image (any layout that custom_caption reads) "
        "and write them likeliest token for token first, with --scores",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="run directory, file, folder, URL, hub name"
    )

    output = parser.add_argument_group("where the captions go").add_mutually_exclusive_group()
    output.add_argument(
        "--output", type=Path, metavar="FILE", help="FILE.jsonl or FILE.csv; an existing one is continued"
    )
    output.add_argument(
        "--sidecar",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="a .txt beside each image, or below FOLDER; existing ones are kept. Give it behind the images, before "
        "another option, or as --sidecar=FOLDER",
    )
    parser.add_argument(
        "--scores",
        action="store_true",
        help="with each caption its log-probability, the mean of a token's, and each word's",
    )
    parser.add_argument("--force", action="store_true", help="overwrite --output; the captions in it are lost")

    decoding = parser.add_argument_group("how captions are generated (default: as the checkpoint's run, or the paper)")
    decoding.add_argument("--prompt", metavar="TEXT", help='what captions continue, and do not show: "a picture of"')
    decoding.add_argument(
        "--num-captions", type=int, default=1, metavar="N", help="for each image: the best beams, or draws"
    )
    decoding.add_argument("--num-beams", type=int, metavar="N", help="1: greedy search")
    decoding.add_argument("--max-len", type=int, metavar="N", help="tokens at most, the prompt's included")
    decoding.add_argument("--min-len", type=int, metavar="N", help="tokens at least, the prompt's included")
    decoding.add_argument("--length-penalty", type=float, metavar="X", help="above 1 favours long captions (beams)")
    decoding.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 disfavours words used before")
    decoding.add_argument("--use-nucleus-sampling", action="store_true", default=None, help="draw words at random")
    decoding.add_argument("--top-p", type=float, metavar="P", help="from the likeliest words that reach this together")
    decoding.add_argument("--temperature", type=float, metavar="X", help="below 1 draws likely words more often")
    decoding.add_argument("--seed", type=int, metavar="N", help="of the draws; each image has its own from it")

    work = parser.add_argument_group("speed")
    work.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time on each GPU (32)")
    work.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of weights (fp32)")
    work.add_argument(
        "--num-workers", type=int, metavar="N", help="processes that decode images for each GPU (cores/GPUs)"
    )

    model = parser.add_argument_group("how the model is built, where the checkpoint does not say")
    model.add_argument("--cfg-path", type=Path, metavar="YAML", help="run config (run_configs/)")
    model.add_argument("--base", metavar="PATH", help="the weights that adapters adapt, if not where they say")
    model.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override keys of the run config")
    model.add_argument("--plugin", action="append", default=[], metavar="MODULE", help="import a module of your own")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_args()
    if args.force and args.output is None:
        parser.error("--force overwrites --output, which is not given")
    for name in ("num_captions", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is 1 or more")
    if args.rank is None and not args.images:
        parser.error("give images to caption")
    if (args.scores or args.rank) and args.sidecar is not None:
        parser.error("--sidecar has no place for scores; give --output")
    if args.rank is not None:
        if len(args.images) > 1 or not all(map(os.path.isdir, args.images)):
            parser.error("--rank takes at most one folder, where the image names in its file start")
        decoding_given = [name for name in DECODING if name != "prompt" and getattr(args, name) is not None]
        if args.num_captions > 1 or decoding_given:
            name = (decoding_given or ["num_captions"])[0].replace("_", "-")
            parser.error(f"--rank generates nothing: leave out --{name}")
    if args.use_nucleus_sampling and args.num_beams is None:
        args.num_beams = 1
    if args.prompt and not args.prompt.endswith(" "):
        args.prompt += " "
    return args


def main(args: argparse.Namespace) -> None:
    from blipds import cli, distributed
    from blipds.captioning.captioner import caption_recipe, load_caption_model
    from blipds.captioning.inputs import NamedImage, check_named, named_images
    from blipds.captioning.ranking import Ranker, read_candidates
    from blipds.captioning.stream import caption_images
    from blipds.data.sources import passed_over, unread_suffix
    from blipds.errors import UserError
    from blipds.files.paths import user_path
    from blipds.models.weights import find_checkpoint

    check_named(args.images)
    cli.import_plugins(args.plugin)
    device = distributed.initialise()
    candidates = None if args.rank is None else read_candidates(user_path(args.rank), args.images, say)
    recipe = caption_recipe(find_checkpoint(args.checkpoint, "best"), args.cfg_path, args.options, args.base)
    recipe = recipe.with_decoding(**{name: getattr(args, name) for name in DECODING})
    model = load_caption_model(recipe, args.num_captions, device, args.precision, say, args.scores)
    shows_progress = distributed.is_main() and sys.stderr.isatty() and "-" not in args.images
    other_files: Counter[str] = Counter()
    if candidates is not None:
        model = Ranker.of(model, candidates, say)
        images, total = map(NamedImage, candidates), len(candidates)
    else:
        images = named_images(args.images, other_files)
        total = sum(1 for _ in named_images(args.images, Counter())) if shows_progress else None
    counts = caption_images(
        model,
        images,
        open_output(args, model) if distributed.is_main() else None,
        batch_size=args.batch_size,
        num_workers=workers(args.num_workers),
        total=total,
        verb="captioned" if candidates is None else "ranked",
    )
    unread = {suffix: other_files.pop(suffix) for suffix in list(other_files) if unread_suffix(f"image{suffix}")}
    others = f"; not read, by suffix: {most_common(other_files)}" if other_files else ""
    others += "".join(f"; {line}" for line in passed_over(unread))
    empty_stdin = args.images == ["-"] and not (counts.unreadable or others)
    if distributed.is_main() and not (counts.captioned or counts.already or empty_stdin):
        raise UserError(f"no image was {counts.verb} ({counts.unreadable:,} cannot be read{others})")
    say(f"{counts}{others}")


def most_common(suffixes: Counter[str]) -> str:
    shown = [f"{count:,} {suffix or 'without one'}" for suffix, count in suffixes.most_common(5)]
    return ", ".join([*shown, "..."] if len(suffixes) > 5 else shown)


def open_output(args: argparse.Namespace, model: Any) -> Any:
    from blipds.captioning.outputs import CaptionFile, CaptionLines, Sidecars
    from blipds.files.paths import user_path

    if args.output is not None:
        return CaptionFile(user_path(args.output), model.settings(), model.num_captions, args.force, model.scores)
    if args.sidecar is not None:
        return Sidecars(user_path(args.sidecar) if args.sidecar else None, model.settings())
    return CaptionLines(None, False, model.num_captions, model.scores)


def workers(given: int | None) -> int:
    """By default this rank's share of the cores."""
    from blipds import distributed

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return given if given is not None else max(1, min(8, cores // distributed.local_world_size()))


def say(line: str) -> None:
    """On stderr, since captions may go to standard output."""
    from blipds import distributed

    if distributed.is_main():
        print(line, file=sys.stderr, flush=True)


def command() -> None:
    """`blipds-caption`."""
    arguments = parse_arguments()  # --help waits for no import
    from blipds import cli

    cli.run(partial(main, arguments))


if __name__ == "__main__":
    command()
