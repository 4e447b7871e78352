"""Builds the parts of a training run from its configs."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from blipds import distributed
from blipds.captioning.captioner import Captioner
from blipds.config.deepspeed import (
    Section,
    checkpoints_on_host,
    load_ds_config,
    offload_folders,
    offloads_optimizer,
    precision,
    resolve_ds_config,
    uses_torch_adam,
    with_offload_folder,
    with_setting,
    zero_stage,
)
from blipds.config.sections import Config, RunConfig
from blipds.data.caption_checks import cut_lines, spelling_lines
from blipds.data.datasets import CaptionDataset, build_dataset, splits_of
from blipds.data.loader import RankShare, TrainLoader, epoch_loader
from blipds.data.preparation import fetch_annotations
from blipds.data.streams import build_stream, stream_loader, streams_of
from blipds.data.tokenizer import CaptionTokenizer
from blipds.engine import (
    DTYPES,
    Engine,
    checkpointed,
    checkpointed_on_host,
    default_precision,
    parameter_groups,
    partitioned_init,
    prepare_nvme,
    prepare_ops,
)
from blipds.engine.checkpoints import CheckpointFolder, load_engine, read_state
from blipds.errors import UserError, short_of_memory
from blipds.evaluation.evaluator import Evaluator, build_evaluators, load_clips
from blipds.files.paths import user_path
from blipds.models import build_trained
from blipds.models.adapter_files import BASE
from blipds.models.lr_scales import lr_scales
from blipds.models.parameters import whole_shape
from blipds.models.weights import base_of, load_initial_weights, load_weights, open_weights
from blipds.monitor import Monitor
from blipds.planning import planner
from blipds.registry import OBJECTIVES, SCHEDULES
from blipds.report.gallery import Shown
from blipds.report.machine import machine_facts
from blipds.report.page import REPORT, write_report
from blipds.report.run_files import of_kind, read_lines
from blipds.training.feature_cache import cache_image_embeds, refuse_random_processors
from blipds.training.objectives import Objective
from blipds.training.run_state import RunState, StepPlan
from blipds.training.schedules import Schedule
from blipds.training.trainer import Trainer
from blipds.training.validation import Validation


def build_trainer(
    config: Config, ds_config: Section, run_dir: Path, monitor: Monitor, resumed: Path | None = None
) -> Trainer:
    """Everything from annotation files to the engine, ready to train; `resumed` is a checkpoint of a run. Collective.

    Small and cheap parts come first, so that what a user can mend shows before the model is built.
    """
    run = config.run
    torch.manual_seed(run.seed)
    objective: Objective = OBJECTIVES[run.objective](config)
    fetch_annotations(config, [*run.train_splits, *run.valid_splits, *run.test_splits], monitor.say)
    captioner = Captioner.from_config(config)
    trained_on, loader = build_loader(config, captioner.tokenizer, monitor.say)
    learnt_from = objective.open(trained_on, captioner.tokenizer)
    evaluators = build_evaluators(config, run.valid_splits, captioner, load_clips(run))
    datasets = [*trained_on, *(evaluator.dataset for evaluator in evaluators)]
    if config.model.cache_image_embeds:
        refuse_random_processors(datasets)
    plan = StepPlan.of(run, loader.steps_per_epoch)
    schedule = build_schedule(run, plan)
    state = RunState() if resumed is None else RunState(**read_state(resumed)["run"])
    if not config.model.cache_image_embeds:  # images are read while the model is built, unless features replace them
        loader.start(*divmod(state.global_step, loader.steps_per_epoch))
    engine = build_engine(config, ds_config, run_dir, resumed, monitor)
    captioner.check_model(engine.model)
    if resumed is not None:
        load_engine(engine, resumed)
    if config.model.cache_image_embeds:
        cache_image_embeds(engine, config, datasets, monitor.say)
    sizes, samples = run_sizes(engine.model, plan, trained_on), sum(map(len, trained_on))
    monitor.start(state.global_step, sizes | objective.facts() | machine_facts(engine.device))
    for line in start_block(config, ds_config, sizes, samples, plan, loader, run_dir):
        monitor.say(line)
    if (adapters := engine.model.lora) is not None:
        monitor.say(f"adapters   {adapters}; base {adapters.base[BASE]}")
    monitor.say_where()
    if state.global_step:
        monitor.say(f"resumed    after step {state.global_step}")
    if notice := other_data(state, samples, loader.steps_per_epoch):
        monitor.say(f"data       {notice}")
    for line in [*learnt_from, *data_notices(trained_on, evaluators, captioner.tokenizer)]:
        monitor.say(f"data       {line}")
    checkpoints = CheckpointFolder(run_dir / "checkpoints", run.keep_last, background=run.async_save)
    shared = (checkpoints, monitor, plan, state)
    validation = Validation(run, run_dir, engine, evaluators, *shared)
    return Trainer(run, run_dir, engine, objective, loader, schedule, validation, *shared)


def keep_global_batch(run: RunConfig, written: dict[str, Any]) -> str | None:
    """Shares the global batch of a checkpoint (its "shape") out anew where the ranks are others; a line about it.

    `run.batch_size_train` never grows, so that memory suffices. UserError where it cannot be, with the choices.
    """
    ranks, wanted = distributed.world_size(), int(written["global_batch"])
    now = run.batch_size_train * run.accum_grad_iters * ranks
    if now == wanted:
        return None
    sizes = f"run.batch_size_train {run.batch_size_train} x run.accum_grad_iters {run.accum_grad_iters} x {ranks} ranks"
    if ranks == written["ranks"]:
        raise UserError(f"the checkpoint is of a run with {wanted} samples a step, but {sizes} = {now}")
    if wanted % ranks:
        choices = ", ".join(str(n) for n in range(1, wanted + 1) if wanted % n == 0)
        raise UserError(
            f"the checkpoint is of a run with {wanted} samples a step, which {ranks} ranks cannot share evenly; ranks "
            f"that can: {choices}"
        )
    share = wanted // ranks
    run.batch_size_train = max(n for n in range(1, min(run.batch_size_train, share) + 1) if share % n == 0)
    run.accum_grad_iters = share // run.batch_size_train
    return (
        f"{ranks} ranks instead of {written['ranks']}: run.batch_size_train {run.batch_size_train} x "
        f"run.accum_grad_iters {run.accum_grad_iters} keep {wanted} samples a step (dropout draws other numbers)"
    )


def other_data(state: RunState, samples: int, steps: int) -> str | None:
    """Notes the samples of a pass over the training data (0: a stream); a line where a checkpoint knows of others."""
    before, state.samples = state.samples, samples or None
    if not before or not samples or before == samples:
        return None
    epoch, step = divmod(state.global_step, steps)
    return (
        f"{samples:,} samples, but the checkpoint was made on {before:,}: goes on with step {step + 1} of {steps} in "
        f"pass {epoch + 1} over them"
    )


def resolve(config: Config, ds_config: Section, device: torch.device, source: str) -> Section:
    """The DeepSpeed config with every "auto" filled in from the run config; contradictions are UserErrors."""
    return resolve_ds_config(
        ds_config,
        config,
        world_size=distributed.world_size(),
        local_world_size=distributed.local_world_size(),
        device_type=device.type,
        default_precision=default_precision(device),
        source=source,
    )


def check_world_size(config: Config) -> None:
    """UserError where the launcher started fewer (or more) ranks than `run.expect_world_size`.

    DeepSpeed goes on with this machine alone where it finds no hostfile, and a rank never sees the hostfile.
    """
    expected, ranks = config.run.expect_world_size, distributed.world_size()
    if expected is not None and ranks != expected:
        raise UserError(
            f"run.expect_world_size is {expected}, but {ranks} rank{'s were' if ranks > 1 else ' was'} started: look "
            f"at --hostfile and --num_gpus (deepspeed goes on with one machine where there is no hostfile)"
        )


def memory_warning(config: Config, ds_config: Section, device: torch.device) -> str | None:
    """A line if the run will not fit into this rank's GPU, by launch/plan.py's forecast.

    Nothing on CPUs.
    """
    if device.type != "cuda":
        return None
    found = planner.forecast(config, ds_config, this_cluster(device))
    if found.fits:
        return None
    return f"warning: this {found.verdict()} (launch/plan.py --recommend finds settings that fit)"


def this_cluster(device: torch.device) -> planner.Cluster:
    ranks, memory = distributed.local_world_size(), torch.cuda.get_device_properties(device).total_memory
    return planner.Cluster(ranks, distributed.world_size() // ranks, memory)


def out_of_memory(
    config: Config, ds_config: Section, device: torch.device, ds_configs: Path, error: torch.OutOfMemoryError
) -> UserError:
    """What to change when this rank's GPU has no memory left, of the files in `ds_configs`. Takes some seconds."""
    cluster = this_cluster(device)
    found = planner.forecast(config, ds_config, cluster)
    # where the forecast was too low, what is proposed must need less than it says of this run
    smaller = replace(cluster, gpu_memory=min(cluster.gpu_memory, 0.95 * found.gpu))
    candidates = {}
    for path in sorted(ds_configs.glob("*.json")):
        with suppress(UserError):  # not for this machine
            candidates[path.name] = resolve(config, load_ds_config(path), device, str(path))
    advice = "nothing would fit: take more GPUs or a smaller model.image_size"
    if best := planner.recommend(config, candidates, smaller):
        name, values, _ = best
        options = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
        advice = f"what would fit: --ds-config {ds_configs / name} --options {options}"
    return UserError(
        f"{short_of_memory(error)}; by the forecast of launch/plan.py this run {found.verdict()}; {advice}"
    )


def build_loader(
    config: Config, tokenizer: CaptionTokenizer, say: Callable[[str], None]
) -> tuple[list[CaptionDataset], TrainLoader]:
    """The training data that are known whole, none where they are streamed, and what loads them."""
    run = config.run
    share = RankShare(run.batch_size_train, run.accum_grad_iters, distributed.rank(), distributed.world_size())
    if streams := streams_of(config):
        stream = build_stream(config, streams, say)
        return [], stream_loader(stream, tokenizer, share, seed=run.seed, num_workers=run.num_workers)
    datasets = [
        build_dataset(name, config, split, training=True) for name in config.datasets for split in run.train_splits
    ]
    ratios = run.train_dataset_ratios
    return datasets, epoch_loader(
        datasets,
        tokenizer,
        share,
        seed=run.seed,
        shuffle=run.shuffle,
        ratios=None if ratios is None else [ratios[dataset.name] for dataset in datasets],
        num_workers=run.num_workers,
    )


def build_schedule(run: RunConfig, plan: StepPlan) -> Schedule:
    """The fields of a schedule are run keys, but for how long the run is."""
    length = {"max_epoch": plan.epochs, "total_steps": plan.total_steps}
    values = {field.name: getattr(run, field.name) for field in fields(Schedule) if field.name not in length}
    return SCHEDULES[run.lr_sched](**length, **values)


def build_engine(config: Config, ds_config: Section, run_dir: Path, resumed: Path | None, monitor: Monitor) -> Engine:
    """The model with its initial weights in a DeepSpeed engine. Collective."""
    run = config.run
    config.model.check_precision(precision(ds_config))
    if offload_folders(ds_config):
        ds_config = prepare_offload_folders(ds_config, run_dir)
        prepare_nvme(monitor.say)
    if not uses_torch_adam(ds_config) and not prepare_ops(offloads_optimizer(ds_config), monitor.say):
        ds_config = with_setting(ds_config, "optimizer.params.torch_adam", True)
    checkpoint_fn = checkpointed_on_host if checkpoints_on_host(ds_config) else checkpointed
    with partitioned_init(ds_config):
        model = build_trained(config.model, checkpoint_fn, DTYPES[precision(ds_config)])
    if run.compile:
        model.compile_layers()
    layers = {name: model.encoder_layer(name) for name, _ in model.named_parameters()}
    scales = lr_scales(layers, run.lr_scale, run.lr_layer_decay)
    groups = parameter_groups(model, run.weight_decay, run.weight_decay_on, scales)
    engine = Engine(model, ds_config, groups, precision(ds_config), run.tf32, run.compile)
    with engine.filling() as write:  # after the engine is built: the model is rounded to its precision by then
        if resumed is None:
            load_initial_weights(model, config, monitor.say, write)
        else:  # its optimizer's state follows in load_engine
            stored = open_weights(str(resumed), user_path(config.env.cache_root), base_of(config.model))
            load_weights(model, stored, monitor.say, write)
    return engine


def prepare_offload_folders(ds_config: Section, run_dir: Path) -> Section:
    """The same config with NVMe folders for this run alone: DeepSpeed empties what it finds in them, whosever it is.

    UserError where a folder is missing: DeepSpeed would make it, on whatever disk that then is.
    """
    for folder in offload_folders(ds_config):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"nvme_path {folder} in the DeepSpeed JSON: no folder that can be written to; name one")
    digest = hashlib.blake2b(str(run_dir.resolve()).encode(), digest_size=4).hexdigest()
    return with_offload_folder(ds_config, f"blipds-{digest}")


def run_sizes(model: torch.nn.Module, plan: StepPlan, trained_on: Sequence[CaptionDataset]) -> dict[str, int]:
    """What a line of kind "start" says of the run. Parameters are whole, whatever the ZeRO stage."""
    parameters = [(whole_shape(parameter).numel(), parameter.requires_grad) for parameter in model.parameters()]
    sizes = {
        "total_steps": plan.total_steps,
        "parameters": sum(size for size, learns in parameters if learns),
        "frozen_parameters": sum(size for size, learns in parameters if not learns),
    }
    if trained_on:
        sizes["images"] = sum(len(dataset.records) for dataset in trained_on)
        sizes["captions"] = sum(len(group) for dataset in trained_on for _, group in dataset.groups)
    return sizes


def start_block(
    config: Config,
    ds_config: Section,
    sizes: dict[str, int],
    samples: int,
    plan: StepPlan,
    loader: TrainLoader,
    run_dir: Path,
) -> list[str]:
    """The arithmetic of the run, for a person to check before it has cost an hour. `samples`: 0 of a stream."""
    run, model, ranks = config.run, config.model, distributed.world_size()
    parameters = f"{sizes['parameters']:,} parameters, and {sizes['frozen_parameters']:,} frozen"
    images = run.batch_size_train * run.accum_grad_iters * ranks
    micro = f"{run.batch_size_train} micro x {run.accum_grad_iters} accumulated"
    batch = f"{micro} x {ranks} ranks = {images} images a step"
    length = "a stream"
    if samples:
        captions = sizes["captions"]
        batch += f", about {images * captions / samples:.0f} captions"
        length = f"{samples:,} samples ({captions:,} captions), {loader.steps_per_epoch} steps a pass"
    return [
        f"model      {model.arch} {model.model_type}: {parameters}",
        f"batch      {batch}",
        f"length     {length}; {plan.total_steps} steps in {plan.epochs} epochs of {plan.epoch_steps}",
        f"engine     ZeRO stage {zero_stage(ds_config)}, {precision(ds_config)}, {run.lr_sched} from {run.init_lr:g}",
        f"directory  {run_dir}",
    ]


def evaluators_of_run(config: Config, run_dir: Path) -> list[Evaluator]:
    """An evaluator for each split that a run has evaluated, for its images and references; rank 0 may call it alone.

    UserError where the data are no longer there.
    """
    evaluated = {line["split"] for line in of_kind(read_lines(run_dir), "eval")}
    splits = dict.fromkeys(split for dataset in config.datasets.values() for split in splits_of(dataset))
    wanted = [split for split in splits if any(f"_{name}".endswith(f"_{split}") for name in evaluated)]
    found = build_evaluators(config, wanted, Captioner.from_config(config))
    return [evaluator for evaluator in found if evaluator.split in evaluated]


def rewrite_report(config: Config, run_dir: Path, say: Callable[[str], None]) -> None:
    """`report.html` about all that a run has evaluated; rank 0 only. Without captions where the data are gone."""
    splits: list[Shown] = []
    try:
        splits = [evaluator.shown() for evaluator in evaluators_of_run(config, run_dir)]
    except Exception as error:  # the run is worth more than its report
        say(f"{run_dir / REPORT} shows no captions: {error}")
    write_report(run_dir, splits, say)


def data_notices(
    trained_on: Sequence[CaptionDataset], evaluators: list[Evaluator], tokenizer: CaptionTokenizer
) -> list[str]:
    """What is left out of the data, cut and misspelt; and which images are trained on and evaluated."""
    lines = []
    for dataset in trained_on:
        captions = [caption for record in dataset.records for caption in record.captions]
        notices = [*dataset.notices, *cut_lines(captions, dataset.text_processor, tokenizer)]
        lines += [f"{dataset.name}: {notice}" for notice in notices]
    for evaluator in evaluators:
        references = evaluator.references.captions.values() if evaluator.references is not None else ()
        notices = [*evaluator.dataset.notices, *spelling_lines(references, tokenizer)]
        lines += [f"{evaluator.split}: {notice}" for notice in notices]
    trained = {str(record.image) for dataset in trained_on for record in dataset.records}
    for evaluator in evaluators:
        if shared := [record.image for record in evaluator.dataset.records if str(record.image) in trained]:
            lines.append(f"{len(shared)} images of {evaluator.split} are trained on too; the first: {shared[0]}")
    return lines
