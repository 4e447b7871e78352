"""Predicted and measured activations of BLIP's own sizes, as rows of the table in ds_configs/README.md.

    PYTHONPATH=.:tests python tests/benchmarks/planned_memory.py

A forward and backward pass of each on a CPU, with the kernels that a GPU would take; every allocation is counted. Needs
3 GB of memory at most.
"""

import gc
from pathlib import Path

from held_memory import activations_on_cpu

from blipds.config.run import load_run_config
from blipds.engine import DTYPES
from blipds.planning.planner import Shape, activations

RUN_CONFIGS = Path(__file__).resolve().parents[2] / "run_configs"
NONE = ["model.vit_grad_ckpt=false"]
VIT = ["model.vit_grad_ckpt=true", "model.vit_ckpt_layer=null"]
TEXT = ["model.text_grad_ckpt=true"]
COMBINATIONS = [
    ("base", 224, "fp32", (4, 1), NONE),
    ("base", 224, "bf16", (4, 1), NONE),
    ("base", 224, "bf16", (4, 5), NONE),
    ("base", 224, "bf16", (4, 5), TEXT),
    ("base", 384, "fp32", (2, 5), NONE),
    ("base", 384, "bf16", (2, 1), NONE),
    ("base", 384, "bf16", (2, 1), [*VIT[:1], "model.vit_ckpt_layer=6"]),
    ("base", 384, "bf16", (2, 5), [*VIT, *TEXT]),
    ("base", 384, "fp32", (2, 5), ["model.freeze_vit=true"]),
    ("large", 384, "fp32", (1, 1), NONE),
    ("large", 384, "bf16", (2, 1), NONE),
    ("large", 384, "bf16", (2, 1), [*VIT[:1], "model.vit_ckpt_layer=5"]),
    ("large", 384, "bf16", (2, 5), [*VIT, *TEXT]),
]


def main() -> None:
    for model, size, precision, (images, captions), options in COMBINATIONS:
        path = RUN_CONFIGS / f"caption_coco_{model}.yaml"
        config, _ = load_run_config(path, [f"model.image_size={size}", *options])
        shape = Shape(images, captions, tokens=20, prompt_tokens=4)
        kept, peak = activations(config, shape, DTYPES[precision])
        measured_kept, measured_peak = activations_on_cpu(config, shape, DTYPES[precision])
        gc.collect()
        said = ", ".join(option.removeprefix("model.") for option in options if option not in NONE) or "-"
        megabytes = " | ".join(f"{value / 1e6:.0f}" for value in (kept, measured_kept, peak, measured_peak))
        print(f"| {model} {size}, {precision} | {images} x {captions} | {said} | {megabytes} |", flush=True)


if __name__ == "__main__":
    main()
