#!/usr/bin/env python
"""Finetune a captioner.

    deepspeed launch/finetune.py --cfg-path run_configs/caption_coco_large.yaml --ds-config ds_configs/zero2.json
    deepspeed --num_accelerators 2 launch/finetune.py ...       two ranks on this machine, GPUs or not
    deepspeed --hostfile hosts launch/finetune.py ...           several machines
    blipds-finetune --cfg-path caption_coco_base --ds-config zero2      the installed command: a rank for each GPU

torchrun and plain python (one process) work too. run_configs/README.md explains every key, ds_configs/README.md which
DeepSpeed config to pick. The run directory, run.output_dir/<job id>, gets metrics.jsonl, TensorBoard's files, captions,
checkpoints and the configs as they were resolved.
"""

import argparse
from pathlib import Path

import torch

from blipds import cli, distributed
from blipds.config.deepspeed import load_ds_config
from blipds.config.sections import Config
from blipds.engine.checkpoints import read_state, resume_point
from blipds.errors import UserError
from blipds.evaluation.evaluator import evaluate_checkpoint
from blipds.files.paths import packaged, user_path
from blipds.models.weights import find_checkpoint, initial_weights
from blipds.training import building
from blipds.training.run_state import RunState

DEFAULT_DS_CONFIG = packaged("ds_configs") / "zero2.json"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_config_arguments(parser)
    parser.add_argument(
        "--list",
        action=cli.ListEverything,
        nargs=0,
        help="print what there is to choose from (archs, datasets, processors, schedules, objectives, metrics; after "
        "--plugin the plugin's too), and stop",
    )
    parser.add_argument(
        "--ds-config",
        type=Path,
        default=DEFAULT_DS_CONFIG,
        metavar="JSON",
        help="DeepSpeed config, or the name of one of ds_configs/ (default: zero2)",
    )
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="resume from a checkpoint: auto (that of run.job_id, else of the newest run below run.output_dir, else a "
        "fresh start), a run directory (its newest whole checkpoint), or a checkpoint; any number of ranks, any "
        "ZeRO stage, the same global batch",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    config = cli.load_config(args)
    device = distributed.initialise(config.run.collective_minutes)
    building.check_world_size(config)
    resume = None if args.print_config else args.resume or config.run.resume_ckpt_path
    resumed = checkpoint_to_resume(resume, config) if resume else None
    ds_config = building.resolve(config, load_ds_config(args.ds_config), device, str(args.ds_config))
    if args.print_config:
        if distributed.is_main():
            print(f"{cli.as_yaml(config)}---\n{cli.as_json(ds_config)}", end="")
        return
    if distributed.is_main() and (line := building.memory_warning(config, ds_config, device)):
        print(line, flush=True)
    run_dir = cli.open_run_dir(config, resumed, restart=resume == "auto")
    if config.run.evaluate:
        evaluate(config, str(resumed) if resumed else initial_weights(config.model), device, run_dir)
        return

    state = RunState(**read_state(resumed)["run"]) if resumed else RunState()
    monitor = cli.open_monitor(config, run_dir, state.global_step, state.awaited_step)
    if distributed.is_main():
        (run_dir / "config.yaml").write_text(cli.as_yaml(config), encoding="utf-8")
        (run_dir / "ds_config.json").write_text(cli.as_json(ds_config), encoding="utf-8")
    try:
        trainer = building.build_trainer(config, ds_config, run_dir, monitor, resumed)
        trainer.train()
    except torch.OutOfMemoryError as error:
        raise building.out_of_memory(config, ds_config, device, DEFAULT_DS_CONFIG.parent, error) from error
    finally:
        monitor.close()
    trainer.close()
    if config.run.test_splits:
        best_step = trainer.state.best_step or trainer.state.global_step
        best = find_checkpoint(str(run_dir), "best")
        evaluate(config, best, device, run_dir, step=best_step, epoch=trainer.plan.epoch_of(best_step))


def checkpoint_to_resume(where: str, config: Config) -> Path | None:
    """The checkpoint that --resume means. Rank 0 looks, and reads it once to see that it is whole. Collective.

    The global batch stays that of the checkpoint, whatever the number of ranks.
    """
    output_dir = user_path(config.run.output_dir)
    run_dirs = [output_dir / config.run.job_id] if config.run.job_id else sorted(output_dir.glob("*"))
    found: tuple[Path | None, list[str]] | UserError = (None, [])
    if distributed.is_main():
        try:
            found = resume_point(where, run_dirs)
        except UserError as error:  # raised on every rank below: the others wait for the answer
            found = error
    found = distributed.broadcast(found)
    if isinstance(found, UserError):
        raise found
    checkpoint, lines = found
    if checkpoint is not None and (line := building.keep_global_batch(config.run, read_state(checkpoint)["shape"])):
        lines.append(line)
    if distributed.is_main():
        for line in lines:
            print(line)
    return checkpoint


def evaluate(
    config: Config, checkpoint: str | None, device: torch.device, run_dir: Path, step: int = 0, epoch: int | None = None
) -> None:
    """Scores the test splits (where there are none, the validation splits) with a checkpoint, in run.eval_precision."""
    splits = config.run.test_splits or config.run.valid_splits
    monitor = cli.open_monitor(config, run_dir)
    precision = config.run.eval_precision
    evaluate_checkpoint(config, checkpoint, splits, device, precision, run_dir, monitor, step=step, epoch=epoch)
    if distributed.is_main():
        cli.keep_config(config, run_dir)
        building.rewrite_report(config, run_dir, monitor.say)
    monitor.close()


def command() -> None:
    """`blipds-finetune`: starts a rank for each GPU, or RANKS of them, by DeepSpeed's launcher."""
    parse_arguments()  # --help and mistakes need no launcher
    cli.start_ranks("blipds.launch.finetune")
    cli.run(main)


if __name__ == "__main__":
    cli.run(main)
