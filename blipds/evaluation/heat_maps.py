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

PIECE = "##"  # before a wordpiece that continues a word


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
    """A map for each word of a caption of one image, pixel_values (1, 3, H, W): the mean of its wordpieces.

    A piece's map is what the decoder looked at from the position before, where the piece was chosen. Each word is
    scaled to 0 to 1 by itself: what differs between its patches shows, not how much the image counts in all.
    """
    ids = tokenizer.encode(tokenizer.prompt + caption)[:-1]  # without the closing token
    maps = model.cross_attention(pixel_values, torch.tensor(ids, device=pixel_values.device))
    words: list[tuple[str, list[Tensor]]] = []
    for position in range(len(tokenizer.prompt_ids), len(ids)):
        piece = tokenizer.tokenizer.convert_ids_to_tokens(ids[position])
        if piece.startswith(PIECE) and words:
            word, parts = words.pop()
            words.append((word + piece.removeprefix(PIECE), [*parts, maps[position - 1]]))
        else:
            words.append((piece, [maps[position - 1]]))
    return [HeatMap(word, scaled(torch.stack(parts).mean(dim=0))) for word, parts in words]


def scaled(weights: Tensor) -> Sequence[Sequence[float]]:
    """From 0 to 1."""
    low, high = weights.min(), weights.max()
    return ((weights - low) / (high - low).clamp(min=1e-12)).tolist()
