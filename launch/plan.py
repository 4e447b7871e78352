#!/usr/bin/env python
"""Will it fit? Forecasts memory and network traffic of a run, without GPUs and without building anything.

    python launch/plan.py --cfg-path run_configs/caption_coco_large.yaml --ds-config ds_configs/zero2.json \\
        --gpus 8 --gpu-memory 24GB
    python launch/plan.py ... --recommend my_ds.json     the fastest of ds_configs/ that fits, written out

The forecast is for the fullest batch: every caption is model.max_txt_len tokens long. "auto" precision is bf16 where
this machine has no GPU. launch/README.md says how far the figures can be trusted.
"""

import argparse
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from blipds import cli
from blipds.config.deepspeed import Section, load_ds_config, precision
from blipds.config.sections import Config
from blipds.engine import DTYPES
from blipds.errors import UserError
from blipds.files.paths import packaged
from blipds.planning.planner import (
    CAPTIONS_PER_IMAGE,
    GB,
    Cluster,
    Forecast,
    ParameterSizes,
    Shape,
    activations,
    forecast,
    recommend,
)
from blipds.training import building

DS_CONFIGS = packaged("ds_configs")
UNITS = {"GB": 10**9, "GiB": 2**30, "TB": 10**12, "TiB": 2**40}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_config_arguments(parser)
    parser.add_argument("--ds-config", type=Path, default=DS_CONFIGS / "zero2.json", metavar="JSON")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of a node")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (default: 1)")
    parser.add_argument(
        "--gpu-memory", type=size, required=True, metavar="SIZE", help="of a GPU: 24GB; GiB is understood too"
    )
    parser.add_argument(
        "--host-memory", type=size, default=math.inf, metavar="SIZE", help="of a node, for offloading: 256GB"
    )
    parser.add_argument(
        "--recommend", type=Path, metavar="JSON", help="write the fastest DeepSpeed config that fits, and its options"
    )
    return parser.parse_args()


def size(text: str) -> float:
    match = re.fullmatch(r"([0-9.]+) ?(GB|GiB|TB|TiB)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size; expected a number and GB or GiB, such as 24GB")
    return float(match[1]) * UNITS[match[2]]


def main() -> None:
    args = parse_arguments()
    config = cli.load_config(args)
    if args.gpus < 1 or args.nodes < 1:
        raise UserError("--gpus and --nodes must be at least 1")
    cluster = Cluster(args.gpus, args.nodes, args.gpu_memory, args.host_memory)
    # the ranks of the plan, where a launcher would say how many there are
    os.environ.update(WORLD_SIZE=str(cluster.ranks), LOCAL_WORLD_SIZE=str(args.gpus))
    if args.recommend is not None:
        write_recommendation(args, config, cluster)
        return
    ds = resolve(config, args.ds_config)
    if args.print_config:
        print(f"{cli.as_yaml(config)}---\n{cli.as_json(ds)}", end="")
        return
    found = forecast(config, ds, cluster)
    print(f"{args.cfg_path} with {args.ds_config} on {args.nodes} x {args.gpus} GPUs, {precision(ds)}\n")
    print("\n".join([*table(config, found), "", *activation_table(config, ds), "", found.verdict()]))


def resolve(config: Config, path: Path) -> Section:
    return building.resolve(config, load_ds_config(path), torch.device("cuda"), str(path))


def table(config: Config, found: Forecast) -> list[str]:
    states, sizes, shape = found.states, ParameterSizes.of(config), Shape.of(config)
    all_captions = any(dataset.captions_per_image == "all" for dataset in config.datasets.values())

    def row(name: str, value: float) -> str:
        return f"  {name:58}{value / GB:8.2f}"

    return [
        f"{sizes.trainable:,} parameters, and {sum(sizes.frozen):,} frozen",
        f"micro-batch: {shape.images} images x {shape.captions} captions x {shape.tokens} tokens at "
        f"{config.model.image_size} x {config.model.image_size}"
        + f" ({CAPTIONS_PER_IMAGE} captions per image assumed)"
        * all_captions,
        "",
        f"{'on each GPU':60}{'GB':>8}",
        row("parameters", states.parameters),
        row("gradients", states.gradients),
        row("optimizer states", states.optimizer),
        row("activations, the peak", found.activations),
        row("communication buffers and gathered parameters", states.buffers),
        row("an allowance for CUDA, NCCL and the allocator", found.allowance),
        row("= forward and backward", found.training),
        row("= update (no activations or buffers, but fp32 gradients)", found.updating),
        "on each node",
        row("host memory, for model states", found.host),
        row("NVMe", found.nvme),
        "sent by each GPU in an optimizer step",
        row("gradients and parameters", found.network),
    ]


def activation_table(config: Config, ds: Section) -> list[str]:
    """Peaks with and without checkpointing, for half, once and twice the micro-batch."""
    micro = config.run.batch_size_train
    batches = sorted({max(micro // 2, 1), micro, 2 * micro})
    rows = {"as configured": config}
    for options in config.model.CHECKPOINTING:
        name = ", ".join(f"model.{key}" for key, value in options.items() if value) or "no checkpointing"
        rows[name] = replace(config, model=replace(config.model, **options))
    lines = [f"{'activations in GB, by run.batch_size_train':44}" + "".join(f"{batch:>8}" for batch in batches)]
    for name, changed in tqdm(rows.items(), desc="activations", leave=False, disable=None):
        shapes = [replace(Shape.of(changed), images=batch) for batch in batches]
        peaks = [activations(changed, shape, DTYPES[precision(ds)])[1] for shape in shapes]
        lines.append(f"  {name:42}" + "".join(f"{peak / GB:8.2f}" for peak in peaks))
    return lines


def write_recommendation(args: argparse.Namespace, config: Config, cluster: Cluster) -> None:
    if args.recommend.exists():
        raise UserError(f"--recommend {args.recommend}: that file exists already")
    candidates = {}
    for path in sorted(DS_CONFIGS.glob("*.json")):
        try:
            candidates[path.name] = resolve(config, path)
        except UserError as error:
            print(f"skipped: {error}")
    best = recommend(config, candidates, cluster)
    if best is None:
        raise UserError(
            "nothing in ds_configs/ fits, even with one image at a time and all activations recomputed: more memory, "
            "more GPUs, or a smaller model.image_size"
        )
    name, values, found = best
    args.recommend.write_text((DS_CONFIGS / name).read_text("utf-8"), "utf-8")
    options = [f"{key}={json.dumps(value)}" for key, value in values.items()]  # JSON's null and true are YAML's
    start = f"--num_gpus {args.gpus}" if args.nodes == 1 else "--hostfile HOSTS"
    script = "--module blipds.launch.finetune" if __package__ else "launch/finetune.py"
    print(
        f"ds_configs/{name}, written to {args.recommend}; {found.verdict()}\n\n"
        f"deepspeed {start} {script} --cfg-path {args.cfg_path} --ds-config {args.recommend} \\\n"
        f"    --options {' '.join([*args.options, *options])}"
    )


def command() -> None:
    """`blipds-plan`."""
    cli.run(main)


if __name__ == "__main__":
    command()
