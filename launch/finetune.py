#!/usr/bin/env python
"""Finetune a captioner.

    deepspeed launch/finetune.py --cfg-path run_configs/caption_coco_large.yaml --ds-config ds_configs/zero2.json
    deepspeed --num_accelerators 2 launch/finetune.py ...       two ranks on this machine, GPUs or not
    deepspeed --hostfile hosts launch/finetune.py ...           several machines

torchrun and plain python (one process) work too. run_configs/README.md explains every key, ds_configs/README.md which
DeepSpeed config to pick. The run directory, run.output_dir/<job id>, gets metrics.jsonl, TensorBoard's files, captions,
checkpoints and the configs as they were resolved.
"""

import argparse
from pathlib import Path

import torch

from blipds import cli, distributed
from blipds.captioner import Captioner, initial_weights, load_initial_weights, take_constants
from blipds.config import Config
from blipds.data.datasets import build_dataset
from blipds.data.loader import TrainLoader
from blipds.ds_config import RunValues, load_ds_config, precision, resolve_ds_config, zero_stage
from blipds.engine import Engine, checkpointed, default_precision, parameter_groups, prepare_ops
from blipds.engine.checkpoints import STATE, find_checkpoint, load_state, newest_run
from blipds.errors import UserError
from blipds.evaluator import build_evaluators, evaluate_checkpoint
from blipds.models import build_model, read_text_config
from blipds.models.checkpoints import open_checkpoint
from blipds.models.lr_scales import lr_scales
from blipds.monitor import Monitor, NullMonitor
from blipds.registry import SCHEDULES
from blipds.trainer import Plan, RunState, Trainer

DEFAULT_DS_CONFIG = Path(__file__).parent.parent / "ds_configs" / "zero2.json"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_config_arguments(parser)
    parser.add_argument(
        "--ds-config", type=Path, default=DEFAULT_DS_CONFIG, metavar="JSON", help="DeepSpeed config (default: zero2)"
    )
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="go on: 'auto' with the newest run below run.output_dir (a fresh start if there is none), or a run "
        "directory or checkpoint",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    config = cli.load_config(args)
    device = distributed.initialise()
    ds_config = resolve(config, args.ds_config, device)
    if args.print_config:
        if distributed.is_main():
            print(f"{cli.as_yaml(config)}---\n{cli.as_json(ds_config)}", end="")
        return
    resumed = checkpoint_to_resume(args.resume or config.run.resume_ckpt_path, config)
    run_dir = cli.open_run_dir(config, resumed.parent.parent if resumed else None)
    if config.run.evaluate:
        checkpoint = str(resumed) if resumed else initial_weights(config.model)
        evaluate(config, checkpoint, config.run.test_splits, device, run_dir, RunState())
        return
    state = train(config, ds_config, device, run_dir, resumed)
    if config.run.test_splits:
        best = find_checkpoint(str(run_dir), "best")
        evaluate(config, best, config.run.test_splits, device, run_dir, state)


def resolve(config: Config, ds_path: Path, device: torch.device) -> dict:
    run = config.run
    values = RunValues(
        micro_batch_size=run.batch_size_train,
        gradient_accumulation_steps=run.accum_grad_iters,
        learning_rate=run.init_lr,
        betas=(0.9, run.beta2),
        weight_decay=run.weight_decay,
        max_grad_norm=run.max_grad_norm,
    )
    return resolve_ds_config(
        load_ds_config(ds_path),
        values,
        world_size=distributed.world_size(),
        default_precision=default_precision(device),
        hidden_size=read_text_config(config.model.med_config_path).hidden_size,
        source=str(ds_path),
    )


def checkpoint_to_resume(where: str | None, config: Config) -> Path | None:
    """The checkpoint that --resume means; rank 0 looks, so that all ranks agree. Collective."""
    found: Path | None = None
    if where == "auto":
        found = distributed.broadcast(newest_run(Path(config.run.output_dir).expanduser()))
    elif where is not None:
        found = Path(where).expanduser()
    if found is None:
        return None
    checkpoint = Path(find_checkpoint(str(found), "latest"))
    if not (checkpoint / STATE).exists():
        raise UserError(f"--resume {where}: {checkpoint} is no checkpoint of a run (it has no {STATE})")
    return checkpoint


def train(config: Config, ds_config: dict, device: torch.device, run_dir: Path, resumed: Path | None) -> RunState:
    run = config.run
    torch.manual_seed(run.seed)
    captioner = Captioner.from_config(config)
    datasets = [
        build_dataset(name, config, split, training=True) for name in config.datasets for split in run.train_splits
    ]
    ratios = run.train_dataset_ratios
    loader = TrainLoader(
        datasets,
        captioner.tokenizer,
        micro_batch=run.batch_size_train,
        accumulation=run.accum_grad_iters,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=run.seed,
        shuffle=run.shuffle,
        ratios=None if ratios is None else [ratios[dataset.name] for dataset in datasets],
        num_workers=run.num_workers,
    )
    evaluators = build_evaluators(config, run.valid_splits, captioner)
    plan = make_plan(config, loader.steps_per_epoch)
    schedule = SCHEDULES[run.lr_sched](
        init_lr=run.init_lr,
        max_epoch=plan.epochs,
        total_steps=plan.total_steps,
        min_lr=run.min_lr,
        warmup_lr=run.warmup_lr,
        warmup_steps=run.warmup_steps,
        lr_decay_rate=run.lr_decay_rate,
    )

    model = build_model(config.model, checkpointed)
    say = print if distributed.is_main() else lambda line: None
    if resumed is None:
        load_initial_weights(model, config, say)
    else:
        take_constants(model, open_checkpoint(resumed))  # the weights come with the engine's own files
    offload = ds_config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
    if not ds_config["optimizer"]["params"].get("torch_adam") and not prepare_ops(offload, say):
        ds_config["optimizer"]["params"]["torch_adam"] = True
    scales = lr_scales((name for name, _ in model.named_parameters()), run.lr_scale, run.lr_layer_decay)
    groups = parameter_groups(model, run.weight_decay, run.weight_decay_on, scales)
    engine = Engine(model, ds_config, groups, precision(ds_config))

    state = RunState()
    if resumed is not None:
        saved = load_state(engine, resumed)
        state = RunState(**{key: saved[key] for key in ("global_step", "best_metric", "best_step")})
    monitor = NullMonitor()
    if distributed.is_main():
        monitor = Monitor(run_dir, resume_step=state.global_step if resumed else None)
        (run_dir / "config.yaml").write_text(cli.as_yaml(config))
        (run_dir / "ds_config.json").write_text(cli.as_json(ds_config))
    for line in start_block(config, ds_config, model, plan, loader, run_dir, state):
        monitor.say(line)

    trainer = Trainer(
        engine,
        loader,
        schedule,
        evaluators,
        monitor,
        plan,
        run_dir,
        seed=run.seed,
        max_bad_images=run.max_bad_images,
        state=state,
    )
    trainer.train()
    monitor.close()
    engine.close()
    return state


def make_plan(config: Config, steps_per_epoch: int) -> Plan:
    run = config.run
    if run.runner == "runner_iter":
        assert run.max_iters is not None
        total = run.max_iters
        epoch_steps = min(run.iters_per_inner_epoch or steps_per_epoch, total)
    else:
        epoch_steps = steps_per_epoch
        total = run.max_epoch * steps_per_epoch
    return Plan(epoch_steps, total, run.log_freq, run.val_freq, run.val_steps, run.save_freq, run.save_last)


def start_block(
    config: Config,
    ds_config: dict,
    model: torch.nn.Module,
    plan: Plan,
    loader: TrainLoader,
    run_dir: Path,
    state: RunState,
) -> list[str]:
    """The arithmetic of the run, for a person to check before it has cost an hour."""
    run, ranks = config.run, distributed.world_size()
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    trainable = sum(size for size, learns in sizes if learns)
    frozen = sum(size for size, learns in sizes if not learns)
    images = run.batch_size_train * run.accum_grad_iters * ranks
    samples = sum(len(dataset) for dataset in loader.datasets)
    captions = sum(len(group) for dataset in loader.datasets for _, group in dataset.groups)
    micro, accumulated = run.batch_size_train, run.accum_grad_iters
    lines = [
        f"model      {config.model.arch} {config.model.model_type}: {trainable:,} parameters, and {frozen:,} frozen",
        f"batch      {micro} micro x {accumulated} accumulated x {ranks} ranks = {images} images a step, "
        f"about {images * captions / samples:.0f} captions",
        f"length     {samples:,} samples ({captions:,} captions), {loader.steps_per_epoch} steps a pass; "
        f"{plan.total_steps} steps in {plan.epochs} epochs of {plan.epoch_steps}",
        f"engine     ZeRO stage {zero_stage(ds_config)}, {precision(ds_config)}, {run.lr_sched} from {run.init_lr:g}",
        f"directory  {run_dir}",
        f"watch      tensorboard --logdir {run_dir.parent}",
    ]
    if state.global_step:
        lines.append(f"resumed    after step {state.global_step}")
    return lines


def evaluate(
    config: Config, checkpoint: str | None, splits: list[str], device: torch.device, run_dir: Path, state: RunState
) -> None:
    """Scores splits with the weights of a checkpoint, in fp32."""
    monitor = Monitor(run_dir) if distributed.is_main() else NullMonitor()
    evaluate_checkpoint(config, checkpoint, splits, device, "fp32", run_dir, monitor, step=state.global_step)
    monitor.close()


if __name__ == "__main__":
    cli.run(main)
