"""Measures this project, and transformers' BLIP with the same weights beside it.

    bash tests/benchmarks/run.sh                                    all that need no name: about 10 minutes
    bash tests/benchmarks/run.sh training generation --rounds 9     some of them, more carefully
    bash tests/benchmarks/run.sh quality --start model.finetuned=RUN
                                                                    half an hour: real runs on the Flickr8k photographs

The sides of a comparison take turns in one process and each figure is the median of its rounds, so that ratios hold on
a machine that is not quite quiet; keep it quiet all the same. Nothing here passes or fails: a goal beside a figure is
what the project set out to reach. The arithmetic (FLOPs) is counted from the geometry (arithmetic.py); the machine's
matmul rate is measured in the same run on the shapes of the model, in the same precision.

training     steps of 1 and of --captions captions an image, fp32 and bf16, against transformers' (1 caption, fp32)
memory       activations of a step: captions that share an image against separate pairs
generation   beam 3, max_len 20, min_len 5, fp32, against transformers' generate
loading      640x480 JPEGs to the 384 training transform on one core, against torchvision's
scoring      an evaluation's tokenization and metrics, 1,000 captions, against pycocoevalcap's (only when named)
startup      launch to the first step, through the launcher
quality      time to the validation CIDEr at which the one-caption recipe ends (only when named)
compile      run.compile on the training step (only when named)
self_critical  a self-critical step: samples that share an encoding against an encoding each (only when named)

`bash tests/gpu.sh` is for GPUs: what is right there, and how fast.
"""

import argparse
import gc
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from benchmarks.generation import generation
from benchmarks.loading import loading
from benchmarks.measuring import Row, line_of, machine
from benchmarks.pair import GEOMETRIES, Size
from benchmarks.quality import quality
from benchmarks.scoring import scoring
from benchmarks.self_critical import self_critical
from benchmarks.startup import startup
from benchmarks.training import activation_memory, compiled, training

PACKAGES = ("torch", "torchvision", "transformers", "timm", "deepspeed", "pillow")
UNASKED = ("training", "memory", "generation", "loading", "startup")


def parse_arguments() -> argparse.Namespace:
    names = [*UNASKED, "scoring", "quality", "compile", "self_critical"]
    parser = argparse.ArgumentParser(
        prog="run.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help=f"which: {', '.join(names)}")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="base", help="the model (default: base)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels a side (default: 224)")
    parser.add_argument("--images", type=int, default=4, help="images a batch (default: 4)")
    parser.add_argument("--captions", type=int, default=5, help="captions an image (default: 5)")
    parser.add_argument("--length", type=int, default=12, help="tokens a caption, prompt included (default: 12)")
    parser.add_argument(
        "--dropout",
        type=float,
        default=0.0,
        help="of the decoder, on both sides (default: 0, transformers' own; the recipe's 0.1 costs both sides more on "
        "a CPU than the attention itself)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--threads", type=int, help="of torch, on a CPU (default: all cores)")
    parser.add_argument("--ranks", type=int, default=2, help="of start-up and quality (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="measured runs a side, after one warm-up (default: 5)")
    parser.add_argument(
        "--photographs", type=int, default=1800, help="quality: trained on, for an epoch (default: 1800)"
    )
    parser.add_argument(
        "--start",
        nargs="+",
        default=["model.finetuned=output/flickr8k_small/first"],
        metavar="KEY=VALUE",
        help="quality: what run_configs/caption_flickr8k_small_encoder.yaml starts from (default: "
        "model.finetuned=output/flickr8k_small/first, as the README's first run leaves it)",
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="quality, scoring: holds flickr8k/")
    parser.add_argument("--results", type=Path, help="scoring: a run's results/val_epoch<N>.json on flickr8k")
    parser.add_argument(
        "--output", type=Path, default=Path("output/benchmarks"), help="folder of the JSON and the plot"
    )
    args = parser.parse_args()
    unknown = set(args.benchmarks) - set(names)
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if args.captions < 1 or args.images < 1 or args.length < 6:
        parser.error("--images and --captions must be at least 1, --length at least 6 (the prompt has 4 tokens)")
    return args


def chosen(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], list[Row]]]:
    size = Size(args.images, args.captions, args.length)
    shape = (args.geometry, args.image_size, size)
    benchmarks: dict[str, Callable[[], list[Row]]] = {
        "training": lambda: training(*shape, args.dropout, args.rounds, device),
        "memory": lambda: activation_memory(*shape, args.dropout, device),
        "generation": lambda: generation(*shape, args.rounds, device),
        "loading": lambda: loading(args.rounds),
        "startup": lambda: startup(args.ranks, min(args.rounds, 3)),
        "scoring": lambda: scoring(min(args.rounds, 3), args.data.resolve(), args.results),
        "quality": lambda: quality(args.ranks, args.data.resolve(), args.photographs, args.start),
        "compile": lambda: compiled(*shape, args.rounds, device),
        "self_critical": lambda: self_critical(*shape, args.rounds, device),
    }
    names = args.benchmarks or UNASKED
    return {name: benchmarks[name] for name in names}


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows: list[Row] = []
    for name, benchmark in chosen(args, device).items():
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        found = benchmark()
        for row in found:
            print(line_of(row), flush=True)
        print(f"   {time.perf_counter() - started:.0f} s", flush=True)
        rows += found
        gc.collect()

    stamp = time.strftime("%Y%m%d-%H%M%S")
    args.output.mkdir(parents=True, exist_ok=True)
    report = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(["bash", "tests/benchmarks/run.sh", *sys.argv[1:]]),
        "machine": machine(device),
        "versions": {name: version(name) for name in PACKAGES},
        "settings": {key: str(value) for key, value in vars(args).items()},
        "rows": [asdict(row) for row in rows],
    }
    path = args.output / f"{stamp}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{table(rows, report)}\n\n{path}")
    if any(row.ratio is not None for row in rows):
        plot(rows, report, path.with_suffix(".png"))
        print(path.with_suffix(".png"))


def table(rows: list[Row], report: dict) -> str:
    """Markdown, to be pasted into a README."""
    found, versions = report["machine"], report["versions"]
    head = [
        ", ".join(f"{key} {value}" for key, value in found.items()),
        ", ".join(f"{name} {number}" for name, number in versions.items()),
        "",
        "| measure | blipds | against | ratio | goal |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *map(line_of, rows)])


def plot(rows: list[Row], report: dict, path: Path) -> None:
    """Each ratio as a share of its goal: what reaches the line has reached it."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if row.ratio is not None]
    shares = [row.ratio / (row.goal or 1.0) for row in shown]
    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.42 * len(shown)), layout="constrained")
    bars = axes.barh(range(len(shown)), shares)
    for bar, row, share in zip(bars, shown, shares, strict=True):
        bar.set_color("#8c8c8c" if row.goal is None else "#2a7f62" if share >= 1 else "#c0702a")
        goal = "" if row.goal is None else f" (goal {row.goal:g})"
        axes.text(bar.get_width(), bar.get_y() + bar.get_height() / 2, f" {row.ratio:.2f}{goal}", va="center", size=8)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [row.what for row in shown], size=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(1.0, *shares))
    axes.set_xlabel("ratio / goal (grey: no goal)")
    axes.set_title(f"{report['machine'].get('gpu', report['machine']['cpu'])}, {report['date']}", size=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
