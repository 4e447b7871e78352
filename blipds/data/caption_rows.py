"""Captions as the text decoder takes them: all those of an image in one row, behind a prompt that they share."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class CaptionRows(NamedTuple):
    """The captions of I images, those of each in a row of L tokens: the prompt, then the words of every caption.

    `segment_ids` (I, L): 0 at the prompt, k at the k-th caption, which sees the prompt and itself; a number of its own
    at the padding. `position_ids` (I, L): a token's place in its caption, prompt included. `label_positions` (P,) are
    indices into the flattened I x L; the token after each is in `labels` (P,). The prompt's last position is there
    once for every caption; [SEP] is only a label, since nothing follows it. Prompt and padding have no label.
    `label_weights` (P,): of the labels' log-probabilities, where an objective gives them.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    label_positions: Tensor
    labels: Tensor
    label_weights: Tensor | None = None

    def to(self, device: torch.device) -> dict[str, Tensor]:
        """The arguments of `CaptioningModel.forward` that they are."""
        found = {name: tensor for name, tensor in self._asdict().items() if tensor is not None}
        return {name: tensor.to(device, non_blocking=True) for name, tensor in found.items()}

    def captions(self, prompt_ids: Sequence[int]) -> list[list[list[int]]]:
        """What `caption_rows` made them from."""
        captions: list[list[list[int]]] = [[] for _ in self.input_ids]
        for position, label in zip(self.label_positions.tolist(), self.labels.tolist(), strict=True):
            image, place = divmod(position, self.input_ids.shape[1])
            if place == len(prompt_ids) - 1:
                captions[image].append([*prompt_ids])
            captions[image][-1].append(label)
        return captions


def caption_rows(
    captions: Sequence[Sequence[Sequence[int]]], prompt_ids: Sequence[int], pad_token_id: int
) -> CaptionRows:
    """`captions`: of each image the token ids of its captions, from the prompt to [SEP]. An image may have none.

    The prompt is the same for all captions of an image, [SEP] is never looked from, and rows are padded instead of
    captions: of Flickr8k's five captions an image, 16 images at a time, 80 tokens an image are left of 142.
    """
    start = len(prompt_ids)
    length = max(start + sum(len(ids) - start - 1 for ids in row) for row in captions)
    input_ids = torch.full((len(captions), length), pad_token_id)
    position_ids, segment_ids = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    label_positions: list[int] = []
    labels: list[int] = []
    for i, row in enumerate(captions):
        input_ids[i, :start] = torch.tensor(prompt_ids)
        position_ids[i, :start] = torch.arange(start)
        end = start
        for segment, ids in enumerate(row, start=1):
            begin, end = end, end + len(ids) - start - 1
            input_ids[i, begin:end] = torch.tensor(ids[start:-1], dtype=torch.long)
            position_ids[i, begin:end] = torch.arange(start, len(ids) - 1)
            segment_ids[i, begin:end] = segment
            label_positions += [i * length + place for place in (start - 1, *range(begin, end))]
            labels += ids[start:]
        segment_ids[i, end:] = len(row) + 1
    return CaptionRows(
        input_ids,
        position_ids,
        segment_ids,
        torch.tensor(label_positions, dtype=torch.long),
        torch.tensor(labels, dtype=torch.long),
    )
