#!/usr/bin/env python
"""Write report.html of a run, finished or running: what it was, curves, metrics, captions to look at.

    python launch/report.py output/caption_coco_base/RUN
    python launch/report.py output/caption_coco_base/RUN --attention 24
    python launch/report.py RUN_A RUN_B ...                    compares runs: RUN_A/comparison.html

Training and launch/evaluate.py write it after each evaluation; this writes it anew. It is one file that needs nothing
else, to be opened in any browser or sent to somebody. Where the run kept no CIDEr of single images, it is computed.

--attention N adds heat maps to N images of each split, as many of the worst, the best and the others: where the decoder
looked when it chose each word. It loads the best checkpoint of the run, or --checkpoint.

Several runs are compared with the first: their curves, each metric's difference with its 95 % interval, and the images
whose captions differ most. Images and references are those of the first run's config.
"""

import argparse
from pathlib import Path

import torch

from blipds import cli, distributed
from blipds.captioning.captioner import Captioner
from blipds.config.sections import Config
from blipds.errors import UserError
from blipds.evaluation.evaluator import Evaluator, load_model
from blipds.evaluation.heat_maps import heat_maps
from blipds.models.weights import find_checkpoint
from blipds.report.comparison import COMPARISON, write_comparison
from blipds.report.gallery import HeatMap, Shown
from blipds.report.page import REPORT, shown_captions, write_report
from blipds.training import building


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory; several are compared")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.html", help="default: RUN/report.html, of several RUN/comparison.html"
    )
    parser.add_argument("--attention", type=int, default=0, metavar="N", help="heat maps for N images of each split")
    parser.add_argument("--checkpoint", metavar="PATH", help="of the heat maps; default: the best of the run")
    cli.add_override_arguments(parser)
    args = parser.parse_args()
    args.run = args.runs[0]
    if len(args.runs) > 1 and (args.attention or args.checkpoint):
        parser.error("--attention and --checkpoint are for one run")
    return args


def main() -> None:
    args = parse_arguments()
    args.cfg_path = args.run / "config.yaml"
    for run in args.runs:
        if not (run / "config.yaml").exists():
            raise UserError(f"{run} is no run directory: it has no config.yaml")
    config = cli.load_config(args)
    if len(args.runs) > 1:
        path = args.output or args.run / COMPARISON
        write_comparison(args.runs, shown_splits(config, args.run), path)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        return
    evaluators = building.evaluators_of_run(config, args.run)
    maps = heat_maps_of(config, args, evaluators) if args.attention > 0 else {}
    if not write_report(args.run, [evaluator.shown() for evaluator in evaluators], print, maps, args.output):
        raise SystemExit(1)
    path = args.output or args.run / REPORT
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def shown_splits(config: Config, run: Path) -> list[Shown]:
    """Images and references of a run; none where they are gone, since the numbers are worth a page."""
    try:
        return [evaluator.shown() for evaluator in building.evaluators_of_run(config, run)]
    except UserError as error:
        print(f"no images are shown: {error}")
        return []


def heat_maps_of(
    config: Config, args: argparse.Namespace, evaluators: list[Evaluator]
) -> dict[str, dict[str, list[HeatMap]]]:
    """By split and image id, of the images whose captions the gallery shows."""
    checkpoint = find_checkpoint(args.checkpoint or str(args.run), "best")
    if checkpoint == str(args.run):
        raise UserError(f"{args.run} has no checkpoint; give one with --checkpoint")
    device = torch.device(distributed.device_type())
    model = load_model(config, checkpoint, Captioner.from_config(config), device, torch.float32, print)
    return {
        evaluator.split: heat_maps(
            model, evaluator, shown_captions(args.run, evaluator.shown(), args.attention), device
        )
        for evaluator in evaluators
    }


def command() -> None:
    """`blipds-report`."""
    cli.run(main)


if __name__ == "__main__":
    command()
