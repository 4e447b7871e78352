#!/usr/bin/env python
"""Turn a checkpoint into what other tools load: a transformers folder, or a BLIP/LAVIS .pth.

    python launch/export.py --checkpoint output/coco_large/<run> --format hf --output my-captioner
    python launch/export.py --checkpoint output/coco_large/<run> --format blip --output my_captioner.pth
    python launch/export.py --checkpoint output/coco_large/<run> --format hf --output my-captioner --push OWNER/NAME

The checkpoint is a run directory (its best), one of a run's checkpoints (<run>/checkpoints/step_00001000, or latest),
whatever ZeRO stage and number of ranks wrote it; the run's own config.yaml gives the geometry, the image size, mean and
std, the prompt and the decoding, and its metrics.jsonl the numbers for the model card. Any other checkpoint that
finetune.py reads can be exported too, with a --cfg-path that says how the model is built:

    python launch/export.py --cfg-path run_configs/caption_coco_base.yaml --checkpoint x.pth --format hf --output x

A run with model.lora, or a folder of peft's, holds adapters: --format lora writes them alone, --merge with another
format writes the model with them merged into the weights of their base.

hf    config, safetensors, tokenizer, image processor, generation config and a model card (README.md) with the metrics,
      the run config, its limits and the call that captions as this project does. BlipForConditionalGeneration,
      AutoModelForImageTextToText and the image-text-to-text pipeline load it as it is. An image encoder that
      transformers' BLIP cannot express (layer scale, registers, ...) is refused with the reason. --push uploads the
      folder to the Hugging Face hub, with the token of `hf auth login` or HF_TOKEN; a missing repository is created.
blip  the dict {model, config, epoch} that the original BLIP code and LAVIS load; any image encoder.
lora  peft's adapter_config.json and adapter_model.safetensors, which PeftModel.from_pretrained puts onto transformers'
      model of the base (exported as hf, or the base itself where it is a transformers folder).

Weights are written in fp32. No GPU is needed, and no optimizer state is read.
"""

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blipds import cli
from blipds.captioning.captioner import Captioner, image_processor_of, run_directory
from blipds.config.sections import Config
from blipds.engine.checkpoints import STATE, read_state
from blipds.errors import UserError
from blipds.files.paths import user_path
from blipds.models import build_model
from blipds.models.adapter_files import holds_adapters, read_adapters, write_peft
from blipds.models.protocol import Export, keep_activations
from blipds.models.weights import base_of, find_checkpoint, load_weights, open_weights
from blipds.registry import ARCHS
from blipds.report.run_files import of_kind, read_lines

SHOWN_METRICS = ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L", "SPICE")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="what to export: a path, URL or hub name")
    parser.add_argument("--format", required=True, metavar="NAME", help="hf, blip or lora: see above")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR|FILE.pth", help="where to write it")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the transformers folder to the Hugging Face hub")
    parser.add_argument("--force", action="store_true", help="replace an earlier export at --output")
    parser.add_argument("--merge", action="store_true", help="merge adapters into their base")
    cli.add_base_argument(parser)
    cli.add_config_arguments(parser, default="the config.yaml of the run that the checkpoint is of")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    location = find_checkpoint(args.checkpoint, "best")
    run_dir = run_directory(user_path(location))
    config = load_config(args, run_dir)
    if args.print_config:
        print(cli.as_yaml(config), end="")
        return
    formats = ARCHS[config.model.arch]().exports
    names = [*formats, *(["lora"] if "hf" in formats else [])]
    if args.format not in names:
        allowed = ", ".join(names) or "none: its checkpoints are safetensors under its own names"
        raise UserError(f"--format {args.format}: {config.model.arch} has the formats {allowed}")
    if args.push:
        check_push(args.push, args.format)
    stored = open_weights(location, user_path(config.env.cache_root), base_of(config.model))
    check_merge(args, holds_adapters(stored))
    output = user_path(args.output)
    with torch.device("meta"):  # its geometry is what counts
        model = build_model(config.model, keep_activations)
    if args.format == "lora":
        adapters = read_adapters(stored, model.checkpoint_format())
        write_peft(output, adapters, model, args.force)
        print(f"{output}: {adapters}, of {adapters.base}")
        return
    tensors: dict[str, Tensor] = {}
    load_weights(model, stored, print, write=lambda name, tensor: tensors.update({name: tensor.float()}))
    processor = image_processor_of(config)
    export = Export(
        model,
        tensors,
        replace(config.model, lora=None),
        Captioner.from_config(config).tokenizer.tokenizer,
        processor.mean,
        processor.std,
        generation_arguments(config),
        card_text(config, run_dir, location),
        args.force,
        args.push,
    )
    formats[args.format](output, export)
    print(f"{output}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} numbers, from {location}")
    if args.push:
        print(f"pushed to {push(output, args.push)}")


def check_push(name: str, export_format: str) -> None:
    """UserError where a push must fail, before the export takes its time."""
    from huggingface_hub import get_token

    if export_format != "hf":
        raise UserError(f"--push uploads a transformers folder: --format is {export_format}; allowed: hf")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"--push {name}: expected OWNER/NAME")
    if get_token() is None:
        raise UserError(f"--push {name}: no token of the Hugging Face hub: type `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str) -> str:
    """Uploads a folder to the hub (HF_ENDPOINT, where that is another), in one commit; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="A captioner finetuned with blipds")
    except Exception as error:  # of whatever HTTP package the hub's client uses
        reason = " ".join(str(error).split())
        raise UserError(f"--push {name}: {type(error).__name__}: {reason} ({folder} is complete)") from error
    return str(address)


def load_config(args: argparse.Namespace, run_dir: Path | None) -> Config:
    if args.cfg_path is None:
        if run_dir is None:
            raise UserError(
                f"--checkpoint {args.checkpoint} lies in no run directory, so nothing says how its model is built; "
                "give the run config with --cfg-path"
            )
        args.cfg_path = run_dir / "config.yaml"
    return cli.load_config(args)


def check_merge(args: argparse.Namespace, has_adapters: bool) -> None:
    """UserError where --merge or --format lora does not fit what the checkpoint holds."""
    if not has_adapters and (args.merge or args.format == "lora"):
        option = "--merge" if args.merge else "--format lora"
        raise UserError(f"{option}: --checkpoint {args.checkpoint} holds no adapters")
    if has_adapters and args.merge == (args.format == "lora"):
        raise UserError(
            f"--checkpoint {args.checkpoint} holds adapters; allowed: --format lora, or another format with --merge"
        )


def generation_arguments(config: Config) -> dict[str, Any]:
    """The run's decoding as arguments of transformers' `generate`."""
    run = config.run
    arguments: dict[str, Any] = {
        "num_beams": run.num_beams,
        "max_length": run.max_len,
        "min_length": run.min_len,
        "do_sample": run.use_nucleus_sampling,
    }
    if run.use_nucleus_sampling:  # both of the original codes penalise repetition by 1.1 here, whatever the config says
        return arguments | {"top_p": run.top_p, "temperature": run.temperature, "repetition_penalty": 1.1}
    if run.num_beams > 1:
        arguments["length_penalty"] = run.length_penalty
    return arguments | {"repetition_penalty": run.repetition_penalty}


def card_text(config: Config, run_dir: Path | None, location: str) -> str:
    """Metrics of the run, the limits of its model, and its config, as Markdown."""
    parts = []
    if run_dir is not None and (lines := evaluations(run_dir, Path(location))):
        columns = [name for name in SHOWN_METRICS if any(line.get(name) is not None for line in lines)]
        parts.append("## Metrics\n")
        parts.append("| split | step | " + " | ".join(columns) + " | weights |")
        parts.append("|---" * (len(columns) + 3) + "|")
        for line in lines:
            values = ["" if line.get(name) is None else f"{line[name]:.4f}" for name in columns]
            parts.append(f"| {line['split']} | {line['step']} | {' | '.join(values)} | {weights_of(line)} |")
        parts.append("\nCIDEr and the others as fractions, computed by pycocoevalcap over PTB tokens.\n")
    size, trained_on = config.model.image_size, ", ".join(config.datasets)
    parts.append(
        f"""## Limits

- The model was finetuned on {trained_on}, and writes captions like those. On other kinds of images captions are more
  often wrong, and may name things that are not there.
- The model repeats biases of its captions, also about people. Do not use it to decide anything about a person.
- Images are resized to {size} x {size} pixels, whatever their shape: small things and writing get lost.
- A caption has at most {config.run.max_len} tokens, with the prompt's.
"""
    )
    parts.append(f"## Run config\n\n<details>\n\n```yaml\n{cli.as_yaml(config)}```\n\n</details>\n")
    return "\n".join(parts)


def weights_of(line: dict[str, Any]) -> str:
    """The note of an evaluation, a path of the training machine shortened to its last part."""
    what, _, precision = str(line.get("note", "")).rpartition(", ")
    return f"{Path(what).name}, {precision}"


def evaluations(run_dir: Path, checkpoint: Path) -> list[dict[str, Any]]:
    """Lines of kind "eval" in metrics.jsonl about this checkpoint: the last of each split and way of evaluating.

    Where the run never evaluated it, its best line; a line that a crash tore is passed over.
    """
    lines = of_kind(read_lines(run_dir), "eval")
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    step = read_state(folder)["run"]["global_step"] if (folder / STATE).exists() else None
    here = [line for line in lines if folder.name in str(line.get("note", "")) or trained_at(line, step)]
    if not here and lines:
        here = [max(lines, key=lambda line: line.get("agg_metrics") or 0.0)]
    return list({(line["split"], weights_of(line)): line for line in here}.values())


def trained_at(line: dict[str, Any], step: int | None) -> bool:
    """Whether the loop itself evaluated at this step (a later evaluation names its checkpoint instead)."""
    return line["step"] == step and str(line.get("note", "")).startswith("training weights")


def command() -> None:
    """`blipds-export`."""
    cli.run(main)


if __name__ == "__main__":
    command()
