#!/usr/bin/env python
"""Caption one or more splits with a checkpoint, and score them.

    python launch/evaluate.py --cfg-path run_configs/caption_coco_large.yaml --checkpoint output/<run>
    deepspeed launch/evaluate.py --cfg-path ... --checkpoint model.pth --split test --precision bf16

The checkpoint is a run directory (its best), one of a run's checkpoints, a BLIP or LAVIS .pth, or a transformers
folder; without one, model.finetuned or model.pretrained of the run config. Ranks share the images; captions and metrics
go to a new run directory below run.output_dir. At the end there is a table, with what was published for the checkpoint
where it is a released one.

nocaps: results/val.json is the file to submit to its server, as it is. Where you have references for val,
    --options run.annotation_file=nocaps_val_4500_captions.json
scores all images and, each like a set of its own, those in-domain, near-domain and out-domain.
"""

import argparse
from pathlib import Path

import torch

from blipds import cli, distributed
from blipds.config.deepspeed import load_ds_config, precision
from blipds.config.sections import Config
from blipds.engine import DTYPES
from blipds.errors import UserError
from blipds.evaluation.evaluator import evaluate_checkpoint, read_cider_corpus
from blipds.models.weights import find_checkpoint, initial_weights
from blipds.report.machine import machine_facts
from blipds.scoring.clip import CLIP_METRICS
from blipds.scoring.metrics import METRICS, Scores
from blipds.scoring.published import published, table
from blipds.training import building


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_config_arguments(parser)
    parser.add_argument("--checkpoint", metavar="PATH", help="what to evaluate: a path, a URL or a hub name")
    cli.add_base_argument(parser)
    parser.add_argument(
        "--split", nargs="+", metavar="NAME", help="splits to caption (default: run.test_splits, else run.valid_splits)"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=(*METRICS, "SPICE", *CLIP_METRICS),
        metavar="NAME",
        help=f"which to compute: {' '.join(METRICS)}, and CLIPScore and PAC-S where run.clip_score and run.pac_score "
        "name a CLIP (all of these by default); SPICE, for which launch/prepare_data.py spice fetches the models",
    )
    parser.add_argument(
        "--cider-df",
        type=Path,
        metavar="FILE",
        help="take CIDEr's document frequencies from the captions of this annotation file (any layout that "
        "custom_caption reads), not from the references of the set that is evaluated; for small sets. COCO's "
        "captions_val2014.json is what coco-val-df.p was counted in",
    )
    parser.add_argument(
        "--precision", choices=list(DTYPES), help="of weights and arithmetic (default: run.eval_precision)"
    )
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
    for metric, (key, _) in CLIP_METRICS.items():
        if metric in (args.metrics or ()) and getattr(config.run, key) is None:
            raise UserError(f"--metrics {metric} needs a CLIP: --options run.{key}=FOLDER_OR_HUB_NAME")
    corpus = read_cider_corpus(args.cider_df) if args.cider_df else None
    device = distributed.initialise(config.run.collective_minutes)
    checkpoint = find_checkpoint(args.checkpoint, "best") if args.checkpoint else initial_weights(config.model)
    splits = args.split or config.run.test_splits or config.run.valid_splits
    run_dir = cli.open_run_dir(config)
    monitor = cli.open_monitor(config, run_dir)
    if distributed.is_main():
        cli.keep_config(config, run_dir)
        monitor.start(0, machine_facts(device))
    precision = chosen_precision(args, config, device)
    options = {"metrics": args.metrics or (*METRICS, *CLIP_METRICS), "cider_corpus": corpus}
    evaluations = evaluate_checkpoint(config, checkpoint, splits, device, precision, run_dir, monitor, **options)
    for line in summary(evaluations, checkpoint):
        monitor.say(line)
    monitor.say(f"captions   {run_dir / 'results'}")
    if distributed.is_main():
        building.rewrite_report(config, run_dir, monitor.say)
    monitor.close()


def summary(evaluations: list[tuple[str, dict[str, Scores]]], checkpoint: str | None) -> list[str]:
    """The table of all splits (and domains), a released checkpoint's published scores below its own."""
    rows, remarks = [], []
    for dataset, found in evaluations:
        for name, scores in found.items():
            if not scores.values:
                continue
            rows.append((name, scores.images, {metric: 100 * value for metric, value in scores.values.items()}))
            theirs = published(checkpoint, dataset, name.removeprefix(f"{dataset}_"))
            if theirs is not None and theirs.images == scores.images:
                rows.append(("  published", theirs.images, theirs.values))
                remarks.append(f"published: {theirs.source}")
            elif theirs is not None:
                remarks.append(f"{name}: the published scores are over {theirs.images:,} images, so not shown")
    return [*(table(rows) if rows else []), *dict.fromkeys(remarks)]


def chosen_precision(args: argparse.Namespace, config: Config, device: torch.device) -> str:
    if args.precision or not args.ds_config:
        return args.precision or config.run.eval_precision
    return precision(building.resolve(config, load_ds_config(args.ds_config), device, str(args.ds_config)))


def command() -> None:
    """`blipds-evaluate`."""
    cli.run(main)


if __name__ == "__main__":
    command()
