"""Two captioners with the same weights, ours and transformers', and the batches that both are given."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blipds.data.caption_rows import caption_rows
from blipds.engine import checkpointed
from blipds.models import build_model
from blipds.models.blip.config import BlipConfig
from blipds.models.blip.export import transformers_config
from blipds.models.blip.geometry import BlipGeometry, geometry_of
from blipds.models.blip.model import BlipCaption
from blipds.models.blip.names import to_transformers_name
from blipds.models.initialisation import initialise
from blipds.models.parameters import copy_into

GEOMETRIES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vit_kwargs": {"embed_dim": 128, "depth": 4, "num_heads": 4},
        "med_config_path": "configs/models/med_config_tiny.json",
    },
    "base": {},
    "large": {"vit_type": "large", "vit_kwargs": {"drop_path_rate": 0.0}},  # transformers' BLIP drops no paths
}
PROMPT = [30522, 1037, 3861, 1997]  # [DEC] a picture of
SEP = 102


def build_ours(
    geometry: str, image_size: int, dropout: float, device: torch.device, grad_ckpt: bool = False
) -> BlipCaption:
    """A captioner with a run's random weights, in training mode. `dropout` is the decoder's, wherever it has one.

    torch's own start would not do: words of length 1 give logits of hundreds, and probabilities too small for a float
    cost a CPU fifty times what others do.
    """
    config = BlipConfig(
        image_size=image_size, vit_grad_ckpt=grad_ckpt, text_grad_ckpt=grad_ckpt, **GEOMETRIES[geometry]
    )
    model = build_model(config, checkpointed)
    initialise(model, 0, partial(copy_into, model))
    model.to(device)
    text = model.text_decoder
    text.config = replace(text.config, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    for module in text.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        elif hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = dropout
    return model.train()


def transformers_twin(model: BlipCaption) -> nn.Module:
    """transformers' BlipForConditionalGeneration with copies of the model's weights, in training mode."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    with next(model.parameters()).device:  # draws its own start there: seconds less on a GPU
        twin = BlipForConditionalGeneration(BlipConfig(**transformers_config(geometry_of(model))))
    state = {str(to_transformers_name(name)): tensor.detach() for name, tensor in model.named_parameters()}
    found = twin.load_state_dict(state, strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    tied = {"text_decoder.cls.predictions.decoder.weight", "text_decoder.cls.predictions.decoder.bias"}
    assert set(found.missing_keys) <= tied, found.missing_keys
    return twin.train()


@dataclass(frozen=True)
class Size:
    """How much a benchmark works on: captions of `length` tokens, prompt and closing token included."""

    images: int = 4
    captions: int = 5  # an image
    length: int = 12


def random_pixels(images: int, g: BlipGeometry, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 3, g.image_size, g.image_size, generator=generator).to(device)


def random_captions(images: int, captions: int, length: int, g: BlipGeometry, device: torch.device) -> Tensor:
    """(I, K, T): the prompt, random words, [SEP]."""
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(1000, min(30000, g.vocab_size), (images, captions, length), generator=generator)
    input_ids[..., : len(PROMPT)] = torch.tensor(PROMPT)
    input_ids[..., -1] = SEP
    return input_ids.to(device)


def our_inputs(pixels: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
    """What the collator makes of them: labels at every token behind the prompt."""
    return {"pixel_values": pixels, **caption_rows(input_ids.tolist(), PROMPT, pad_token_id=0).to(pixels.device)}


def their_inputs(pixels: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
    """One caption an image, (I, T): a mask of ones, and labels whose prompt is masked as the original masks it."""
    labels = input_ids.clone()
    labels[:, : len(PROMPT)] = -100
    return {
        "pixel_values": pixels,
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
    }
