"""A CLIP with small random weights, and what belongs to it, in a folder."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz,.'0123456789"
MAX_TOKENS = 77


def save_clip(folder: Path, seed: int = 3, image_size: int = 32) -> Path:
    """Letters are its tokens. Images are cropped to `image_size` with a mean and std of their own."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocabulary, [], model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    processor = CLIPImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.25, 0.3],
    )
    processor.save_pretrained(folder)
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    layers = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    text = {"vocab_size": len(words), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end, **layers}
    vision = {"image_size": image_size, "patch_size": 8, **layers}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    with torch.no_grad():  # the initial weights are so small that all images are alike
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    return folder
