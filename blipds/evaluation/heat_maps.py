"""Heat maps for the report: where a checkpoint's decoder looked when it chose each word of a caption."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from blipds.data.images import stack
from blipds.data.tokenizer import CaptionTokenizer
from blipds.evaluation.evaluator import Evaluator
from blipds.models.protocol import CaptioningModel
from blipds.report.gallery import HeatMap


def heat_maps(
    model: CaptioningModel, evaluator: Evaluator, captions: Mapping[str, str], device: torch.device
) -> dict[str, list[HeatMap]]:
    """{image id: a heat map for each word} of {image id: caption}; images that cannot be read are left out."""
    places = {str(record.image_id): place for place, record in enumerate(evaluator.dataset.records)}
    tokenizer = evaluator.captioner.tokenizer
    found = {}
    for image_id, caption in tqdm(captions.items(), desc=f"attention {evaluator.split}", unit="image", disable=None):
        image = evaluator.dataset.image(places[image_id]).image
        if image is not None:
            pixel_values = stack([image], evaluator.dataset.image_processor).to(device, torch.float32)
            found[image_id] = word_maps(model, tokenizer, pixel_values, caption)
    return found


def word_maps(model: CaptioningModel, tokenizer: CaptionTokenizer, pixel_values: Tensor, caption: str) -> list[HeatMap]:
    """A map for each word of a caption of one image, pixel_values (1, 3, H, W): the mean of its tokens.

    A token's map is what the decoder looked at from the position before, where the token was chosen. Each word is
    scaled to 0 to 1 by itself: what differs between its patches shows, not how much the image counts in all.
    """
    ids = tokenizer.encode(tokenizer.prompt + caption)[:-1]  # without the closing token
    maps = model.cross_attention(pixel_values, torch.tensor(ids, device=pixel_values.device))
    words, places = tokenizer.words(ids)
    parts: list[list[Tensor]] = [[] for _ in words]
    for position, place in enumerate(places, start=len(tokenizer.prompt_ids)):
        parts[place].append(maps[position - 1])
    pairs = zip(words, parts, strict=True)
    return [HeatMap(word, scaled(torch.stack(found).mean(dim=0))) for word, found in pairs]


def scaled(weights: Tensor) -> Sequence[Sequence[float]]:
    """From 0 to 1."""
    low, high = weights.min(), weights.max()
    return ((weights - low) / (high - low).clamp(min=1e-12)).tolist()
