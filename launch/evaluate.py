#!/usr/bin/env python
"""Caption one or more splits with a checkpoint, and score them.

    python launch/evaluate.py --cfg-path run_configs/caption_coco_large.yaml --checkpoint output/<run>
    deepspeed launch/evaluate.py --cfg-path ... --checkpoint model.pth --split test --precision bf16

The checkpoint is a run directory (its best), one of a run's checkpoints, a BLIP or LAVIS .pth, or a transformers
folder; without one, model.finetuned or model.pretrained of the run config. Ranks share the images;
captions and metrics go to a new run directory below run.output_dir.
"""

import argparse
from pathlib import Path

import torch

from blipds import building, cli, distributed
from blipds.config import Config
from blipds.ds_config import load_ds_config, precision
from blipds.engine import DTYPES
from blipds.engine.checkpoints import find_checkpoint
from blipds.evaluator import evaluate_checkpoint
from blipds.monitor import Monitor, NullMonitor
from blipds.report import machine_facts
from blipds.weights import initial_weights


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_config_arguments(parser)
    parser.add_argument("--checkpoint", metavar="PATH", help="what to evaluate: a path, a URL or a hub name")
    parser.add_argument(
        "--split", nargs="+", metavar="NAME", help="splits to caption (default: run.test_splits, else run.valid_splits)"
    )
    parser.add_argument("--precision", choices=list(DTYPES), help="of weights and arithmetic (default: fp32)")
    parser.add_argument(
        "--ds-config", type=Path, metavar="JSON", help="take the precision from a DeepSpeed config, as training does"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    config = cli.load_config(args)
    if args.print_config:
        if distributed.is_main():
            print(cli.as_yaml(config), end="")
        return
    device = distributed.initialise()
    checkpoint = find_checkpoint(args.checkpoint, "best") if args.checkpoint else initial_weights(config.model)
    splits = args.split or config.run.test_splits or config.run.valid_splits
    run_dir = cli.open_run_dir(config)
    monitor = Monitor(run_dir) if distributed.is_main() else NullMonitor()
    if distributed.is_main():
        cli.keep_config(config, run_dir)
        monitor.start(0, machine_facts(device))
    evaluate_checkpoint(config, checkpoint, splits, device, chosen_precision(args, config, device), run_dir, monitor)
    monitor.say(f"captions   {run_dir / 'results'}")
    if distributed.is_main():
        building.rewrite_report(config, run_dir, monitor.say)
    monitor.close()


def chosen_precision(args: argparse.Namespace, config: Config, device: torch.device) -> str:
    if args.precision or not args.ds_config:
        return args.precision or "fp32"
    return precision(building.resolve(config, load_ds_config(args.ds_config), device, str(args.ds_config)))


if __name__ == "__main__":
    cli.run(main)
