"""Checkpoints out: LAVIS's .pth, and a transformers folder. In is `checkpoints.py`."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from blipds.errors import UserError
from blipds.models.blip2.checkpoints import to_lavis, to_transformers_name
from blipds.models.blip2.language_model import has_own_head
from blipds.models.exporting import check_file, misfits, model_card, new_folder, on_host, write_pth
from blipds.models.protocol import Export

IMAGE_TOKEN = "<image>"  # transformers' Blip2ForConditionalGeneration puts the queries in its places


def export_lavis(path: Path, export: Export) -> None:
    """`launch/export.py --format blip`: what LAVIS's captioning checkpoints hold, all but the language model."""
    check_file(path, export.overwrite)
    model: Any = export.model
    if model.elsewhere is None and getattr(export.config, "load_llm", False):
        raise UserError("LAVIS's files leave the language model out, and adapters are merged into it: take --format hf")
    tensors = to_lavis(export.tensors, model.config.LANGUAGE)
    write_pth(
        path, {name: on_host(tensor) for name, tensor in tensors.items()}, asdict(export.config) | model.constants()
    )


def export_transformers(folder: Path, export: Export) -> None:
    """`launch/export.py --format hf`: what `Blip2ForConditionalGeneration.from_pretrained` and its processor load."""
    from transformers import Blip2Processor, BlipImageProcessor, GenerationConfig

    tokenizer = copy.deepcopy(export.tokenizer)
    size = {"height": export.config.image_size, "width": export.config.image_size}
    image_processor = BlipImageProcessor(
        size=size, image_mean=list(export.image_mean), image_std=list(export.image_std), resample=3
    )
    model: Any = export.model
    layout = model.checkpoint_format()
    processor = Blip2Processor(image_processor, tokenizer, num_query_tokens=model.config.num_query_token)
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)  # which the processor has added
    is_t5 = model.language_model.config.is_encoder_decoder
    end = tokenizer.eos_token_id if is_t5 else tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    config = transformers_config(model, image_token, end)
    tensors = {
        to_transformers_name(name): on_host(with_rows(tensor, image_token + 1) if name in layout.words else tensor)
        for name, tensor in export.tensors.items()
        if name not in layout.tied
    }
    check_complete(tensors, config, [to_transformers_name(name) for name in layout.tied])
    with new_folder(folder, export.overwrite, config.model_type) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        generation = {key: value for key, value in export.generation.items() if key != "max_length"}
        settings = GenerationConfig(
            eos_token_id=end, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, **generation
        )
        settings.save_pretrained(temporary)
        card = model_card(folder, export, "BLIP-2", usage(export))
        (temporary / "README.md").write_text(card, "utf-8")


def with_rows(tensor: Tensor, rows: int) -> Tensor:
    """The words' embeddings with a row for every token, new ones 0: only their number counts."""
    return torch.cat([tensor, tensor.new_zeros(max(rows - len(tensor), 0), tensor.shape[1])])


def transformers_config(model: Any, image_token: int, end: int) -> Any:
    """The Blip2Config of a built model (on the meta device is enough)."""
    from transformers import Blip2Config

    vit, text = model.visual_encoder, copy.deepcopy(model.language_model.config)
    text.vocab_size = max(text.vocab_size, image_token + 1)
    text.eos_token_id = end  # `generate` asks the language model, not the folder's generation_config.json
    if text.is_encoder_decoder:
        text.decoder_start_token_id = text.pad_token_id
    (patch, _), (size, _) = vit.patch_embed.patch_size, vit.patch_embed.img_size
    return Blip2Config(
        vision_config={
            "hidden_size": vit.embed_dim,
            "intermediate_size": vit.blocks[0].mlp.fc1.out_features,
            "num_hidden_layers": len(vit.blocks),
            "num_attention_heads": vit.blocks[0].attn.num_heads,
            "image_size": size,
            "patch_size": patch,
            "layer_norm_eps": vit.blocks[0].norm1.eps,
        },
        qformer_config=model.bridge.qformer.config.to_dict(),
        text_config=text.to_dict() | {"tie_word_embeddings": text.tie_word_embeddings and not has_own_head(text)},
        num_query_tokens=model.config.num_query_token,
        image_token_index=image_token,
        architectures=["Blip2ForConditionalGeneration"],
        dtype="float32",
    )


def check_complete(tensors: Mapping[str, Tensor], config: Any, tied: Collection[str]) -> None:
    """Every tensor of transformers' model of this config is there but `tied`, and no other (built without memory)."""
    from transformers import Blip2ForConditionalGeneration

    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(copy.deepcopy(config))
    parameters = model.named_parameters(remove_duplicate=False)
    if wrong := misfits(tensors, {name: parameter for name, parameter in parameters if name not in tied}):
        raise UserError(f"transformers' BLIP-2 cannot express this model: {wrong}; export with --format blip")


def usage(export: Export) -> str:
    """The call that captions as this project does."""
    model: Any = export.model
    is_t5 = model.language_model.config.is_encoder_decoder
    words = "ids[0]" if is_t5 else 'ids[0, inputs["input_ids"].shape[1] :]'
    longest = export.generation.get("max_length", 30)
    arguments = ", ".join(f"{key}={value!r}" for key, value in export.generation.items() if key != "max_length")
    return f"""
```python
from PIL import Image
from transformers import AutoProcessor, Blip2ForConditionalGeneration

folder = "{{name}}"
processor = AutoProcessor.from_pretrained(folder)
model = Blip2ForConditionalGeneration.from_pretrained(folder).eval()

inputs = processor(images=Image.open("photo.jpg"), text={export.config.prompt.rstrip()!r}, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens={longest}, {arguments})
caption = processor.decode({words}, skip_special_tokens=True).strip()
```

- The prompt must be given: the model was trained {"with" if is_t5 else "to continue"} it.
- Greedy search (`num_beams=1`) gives the captions of blipds. Beam search may choose another of its beams: transformers
  counts lengths otherwise than the code behind BLIP-2's published numbers.
"""
