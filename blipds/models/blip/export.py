"""Checkpoints out: a BLIP/LAVIS .pth, and a transformers folder. In is `checkpoints.py`."""

import json
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
from blipds.models.exporting import check_file, misfits, model_card, new_folder, on_host, write_pth
from blipds.models.protocol import Export

TOKEN_IDS = (30522, 102, 0)  # [DEC], [SEP], [PAD] of bert-base-uncased with [DEC] and [ENC] behind it


def save_blip(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """A .pth as the original BLIP and LAVIS write it, with the tied tensors and the position_ids that theirs hold."""
    model = {name: on_host(tensor) for name, tensor in tensors.items()}
    for tied, owner in TIED.items():
        if owner in model:
            model[tied] = model[owner]  # one storage in the file, as in the original
    positions = len(model["text_decoder.bert.embeddings.position_embeddings.weight"])
    model["text_decoder.bert.embeddings.position_ids"] = torch.arange(positions).expand(1, -1).contiguous()
    write_pth(path, model, config)


def export_blip(path: Path, export: Export) -> None:
    """`launch/export.py --format blip`."""
    check_file(path, export.overwrite)
    constants = export.model.constants()
    if any(eps != ORIGINAL_VISION_EPS for eps in constants.values()):
        print(
            f"careful: {constants}; the original code and LAVIS compute with {ORIGINAL_VISION_EPS:g} whatever it says"
        )
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
    renamed = {to_transformers_name(name): on_host(tensor) for name, tensor in export.tensors.items()}
    _check_expressible(geometry, config, renamed)
    with new_folder(folder, export.overwrite, "blip") as temporary:
        save_file(renamed, temporary / "model.safetensors", metadata={"format": "pt"})
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
        card = model_card(folder, export, "BLIP", usage(export))
        (temporary / "README.md").write_text(card, "utf-8")


def _check_expressible(geometry: BlipGeometry, config: dict[str, Any], renamed: Mapping[str, Tensor]) -> None:
    """UserError unless transformers' model of this config has exactly these tensors (it is built without memory)."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    reason = "transformers' BLIP cannot express {}; export with --format blip, or load the weights with blipds"
    if geometry.vision_features:
        raise UserError(reason.format("the image encoder's " + ", ".join(geometry.vision_features)))
    with torch.device("meta"):
        model = BlipForConditionalGeneration(BlipConfig(**config))
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in TIED}
    if wrong := misfits(renamed, expected):
        raise UserError(reason.format(f"these tensors: {wrong}"))


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


def usage(export: Export) -> str:
    """The call that captions as this project does."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in export.generation.items())
    return f"""
```python
from PIL import Image
from transformers import AutoProcessor, BlipForConditionalGeneration

folder = "{{name}}"
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
"""
