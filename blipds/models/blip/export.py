"""Checkpoints out: a BLIP/LAVIS .pth, and a transformers folder. In is `checkpoints.py`."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from blipds.errors import UserError
from blipds.models.blip.geometry import ORIGINAL_VISION_EPS, TEXT_KEYS, VISION_KEYS, BlipGeometry, geometry_of
from blipds.models.blip.names import TIED, to_transformers_name
from blipds.models.protocol import Export

TOKEN_IDS = (30522, 102, 0)  # [DEC], [SEP], [PAD] of bert-base-uncased with [DEC] and [ENC] behind it


def save_blip(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], epoch: int = 0) -> None:
    """A .pth as the original BLIP and LAVIS write it, with the tied tensors and the position_ids that theirs hold."""
    model = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for tied, owner in TIED.items():
        if owner in model:
            model[tied] = model[owner]  # one storage in the file, as in the original
    positions = len(model["text_decoder.bert.embeddings.position_embeddings.weight"])
    model["text_decoder.bert.embeddings.position_ids"] = torch.arange(positions).expand(1, -1).contiguous()
    temporary = path.with_name(path.name + ".tmp")
    torch.save({"model": model, "config": dict(config), "epoch": epoch}, temporary)
    temporary.replace(path)


def export_blip(path: Path, export: Export) -> None:
    """`launch/export.py --format blip`."""
    if path.is_dir() or path.suffix != ".pth":
        raise UserError(f"--output {path}: --format blip writes one file, FILE.pth")
    if path.exists() and not export.overwrite:
        raise UserError(f"{path} exists already; choose another output, or replace it with --force")
    constants = export.model.constants()
    if any(eps != ORIGINAL_VISION_EPS for eps in constants.values()):
        print(
            f"careful: {constants}; the original code and LAVIS compute with {ORIGINAL_VISION_EPS:g} whatever it says"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_blip(path, export.tensors, asdict(export.config) | constants)


def export_transformers(folder: Path, export: Export) -> None:
    """`launch/export.py --format hf`: what `BlipForConditionalGeneration.from_pretrained` loads, to compute the same.

    The folder appears complete or not at all. UserError: geometry that transformers' BLIP cannot express, or the folder
    exists and is not empty; with `export.overwrite` an earlier export is replaced, and only what is one (its
    config.json says model_type "blip").
    """
    from transformers import BlipImageProcessor, BlipProcessor, GenerationConfig

    geometry, tokenizer = geometry_of(export.model), export.tokenizer
    token_ids = (tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
    config = transformers_config(geometry, token_ids)
    renamed = {to_transformers_name(name): t.detach().cpu().contiguous() for name, t in export.tensors.items()}
    _check_expressible(geometry, config, renamed)
    _check_free(folder, export.overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's folders are closed to others
        save_file(renamed, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "model.safetensors").chmod(0o644)  # safetensors closes its files to others, too
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        image_processor = BlipImageProcessor(
            size={"height": geometry.image_size, "width": geometry.image_size},
            image_mean=list(export.image_mean),
            image_std=list(export.image_std),
            resample=3,  # PIL's bicubic
        )
        BlipProcessor(image_processor, tokenizer).save_pretrained(temporary)
        settings = GenerationConfig(
            bos_token_id=token_ids[0], eos_token_id=token_ids[1], pad_token_id=token_ids[2], **export.generation
        )
        settings.save_pretrained(temporary)
        (temporary / "README.md").write_text(model_card(export.hub_name or folder.name, export), "utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_expressible(geometry: BlipGeometry, config: dict[str, Any], renamed: Mapping[str, Tensor]) -> None:
    """UserError unless transformers' model of this config has exactly these tensors (it is built without memory)."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    reason = "transformers' BLIP cannot express {}; export with --format blip, or load the weights with blipds"
    if geometry.vision_features:
        raise UserError(reason.format("the image encoder's " + ", ".join(geometry.vision_features)))
    with torch.device("meta"):
        model = BlipForConditionalGeneration(BlipConfig(**config))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in TIED}
    given = {name: tuple(tensor.shape) for name, tensor in renamed.items()}
    if wrong := sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name)):
        shapes = ", ".join(f"{n} (is {given.get(n)}, should be {expected.get(n)})" for n in wrong[:5])
        raise UserError(reason.format(f"these tensors: {shapes}"))


def _check_free(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{folder}: exists already; choose another output, or replace an earlier export with --force")
    try:
        is_export = json.loads((folder / "config.json").read_text("utf-8")).get("model_type") == "blip"
    except (OSError, ValueError, AttributeError):
        is_export = False
    if not is_export:
        raise UserError(f"{folder}: not an earlier export (no config.json of a BLIP in it); it is not overwritten")


def transformers_config(geometry: BlipGeometry, token_ids: tuple[int, int, int] = TOKEN_IDS) -> dict[str, Any]:
    """config.json for `BlipForConditionalGeneration`; whatever has a default that differs from BLIP is written out."""
    start, end, padding = token_ids
    return {
        "architectures": ["BlipForConditionalGeneration"],
        "model_type": "blip",
        "dtype": "float32",
        "tie_word_embeddings": True,
        "label_smoothing": geometry.label_smoothing,
        "initializer_range": 0.02,
        "image_text_hidden_size": 256,
        "projection_dim": 512,
        "vision_config": {
            "model_type": "blip_vision_model",
            **{key: getattr(geometry, name) for name, key in VISION_KEYS.items()},
            "hidden_act": "gelu",
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
        },
        "text_config": {
            "model_type": "blip_text_model",
            **{key: getattr(geometry, key) for key in TEXT_KEYS},
            "hidden_act": "gelu",
            "encoder_hidden_size": geometry.vision_width,
            "is_decoder": True,
            "use_cache": True,
            "tie_word_embeddings": True,
            "bos_token_id": start,
            "eos_token_id": end,
            "sep_token_id": end,
            "pad_token_id": padding,
        },
    }


def model_card(name: str, export: Export) -> str:
    """README.md of the exported folder, with the call that captions as this project does."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in export.generation.items())
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- image-captioning
- blip
---
# {name}

A BLIP image captioner, finetuned with blipds.

## Captioning with transformers

```python
from PIL import Image
from transformers import AutoProcessor, BlipForConditionalGeneration

folder = "{name}"
processor = AutoProcessor.from_pretrained(folder, backend="pil")
model = BlipForConditionalGeneration.from_pretrained(folder).eval()

prompt = {export.config.prompt!r}
inputs = processor(images=Image.open("photo.jpg"), text=prompt, return_tensors="pt")
ids = model.generate(**inputs, {arguments})
caption = processor.decode(ids[0, inputs["input_ids"].shape[1] - 1 :], skip_special_tokens=True)
```

- The prompt must be given: the model was trained to continue it. `generate` replaces its first token by [DEC], drops
  its closing [SEP], and returns the rest in front of the caption: cut it off by tokens, since decoding does not give
  every prompt back letter by letter.
- The arguments must be given, too: BLIP in transformers 5 ignores the folder's `generation_config.json`.
- `backend="pil"` resizes as in training; without it pixels differ by up to one step of 255.
- Greedy search (`num_beams=1`) gives the captions of blipds. Beam search may now and then choose another of its beams:
  transformers normalises scores by the length without the prompt, blipds as the code behind BLIP's published numbers.

{export.card.strip()}
"""
