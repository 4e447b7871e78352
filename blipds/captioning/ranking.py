"""Captions that somebody has, instead of generated ones: how likely a model finds each."""

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blipds.captioning.captioner import CaptionModel, few_images
from blipds.captioning.confidence import Caption, confidence_in
from blipds.data.annotations import read_splits
from blipds.data.caption_rows import caption_rows
from blipds.data.images import Images
from blipds.errors import UserError

CAPTIONS_A_ROW = 16  # their attention to each other is computed, and masked: 16 captions are some 200 tokens

OF_DATASETS = "give a folder above it as datasets.<name>.images"  # what a reader of annotations advises
UNCUT = 1 << 30  # tokens: as many as a candidate has
KEPT = ("weights", "precision", "prompt", "images")  # settings of captioning that ranking depends on, too

Candidates = Mapping[str, Sequence[str]]  # the path of an image -> captions


def read_candidates(path: Path, folders: Sequence[str], say: Callable[[str], None]) -> Candidates:
    """The captions of each image in a file of any layout (data/layouts.py); image names start in the folder, if given.

    UserError for an image that is not there or has no caption.
    """
    if not path.exists():
        raise UserError(f"--rank {path}: no such file")
    root = Path(folders[0]) if folders else None
    found: dict[str, list[str]] = {}
    notices: dict[str, None] = {}
    try:
        splits = read_splits([path], root, None)
    except UserError as error:
        hint = "give a folder above it as IMAGE"
        raise UserError(f"--rank {path}: {str(error).replace(OF_DATASETS, hint)}") from error
    for annotations in splits.values():
        for record in annotations.records:
            found.setdefault(str(record.image), []).extend(record.captions)
        notices |= dict.fromkeys(annotations.notices)
    for notice in notices:
        say(f"--rank {path}: {notice}")
    for names, fault in (
        ([name for name in found if not os.path.isfile(name)], "are not there"),  # noqa: PTH113 (a Path each is slow)
        ([name for name, captions in found.items() if not captions], "have no caption"),
    ):
        if names:
            raise UserError(f"--rank {path}: {len(names):,} of {len(found):,} images {fault}; the first is {names[0]}")
    return found


Row = tuple[int, list[tuple[str, list[int]]]]  # the place of an image in its batch, and candidates with their tokens


@dataclass(kw_only=True)
class Ranker(CaptionModel):
    """A model that scores the candidates of images instead of captioning them."""

    candidates: Candidates

    @classmethod
    def of(cls, model: CaptionModel, candidates: Candidates, say: Callable[[str], None]) -> "Ranker":
        """Says how many candidates are too long for the model."""
        ranker = cls(**{**vars(model), "scores": True}, candidates=candidates)
        too_long = [name for name, texts in candidates.items() for text in texts if ranker.ids(text) is None]
        if too_long:
            of = sum(map(len, candidates.values()))
            say(
                f"{len(too_long):,} of {of:,} candidates have more tokens than the text decoder has positions "
                f"({model.model.max_positions}): they come last, without scores; the first is of {too_long[0]}"
            )
        return ranker

    @property
    def num_captions(self) -> int:
        return max(map(len, self.candidates.values()), default=1)

    def settings(self) -> dict[str, Any]:
        """Decoding plays no part; the candidates do."""
        kept = {key: value for key, value in super().settings().items() if key in KEPT}
        content = repr(sorted((name, list(texts)) for name, texts in self.candidates.items()))
        return kept | {"candidates": hashlib.sha256(content.encode(errors="replace")).hexdigest()[:16]}

    def ids(self, text: str) -> list[int] | None:
        """Tokens of prompt, candidate and closing token; None if the decoder has no position for each but the last."""
        tokenizer, most = self.captioner.tokenizer, self.model.max_positions
        ids = tokenizer.encode(tokenizer.prompt + text, longest=UNCUT)
        return ids if most is None or len(ids) - 1 <= most else None

    @torch.no_grad()
    def captions(self, images: Images, names: Sequence[str]) -> list[list[Caption]]:
        """The candidates of each image, the one with the highest mean log-probability of a token first.

        Each image is encoded once, and decoded with up to `CAPTIONS_A_ROW` of its captions in a row.
        """
        with few_images(len(names)):
            return self._captions(images, names)

    def _captions(self, images: Images, names: Sequence[str]) -> list[list[Caption]]:
        image_embeds = self.model.encode(images.model_inputs(self.device, self.dtype)["pixel_values"], None)
        ranked: list[list[Caption]] = [[] for _ in names]
        rows: list[Row] = []
        most = CAPTIONS_A_ROW if self.model.reads_rows else 1
        for image, name in enumerate(names):
            encoded = [(text, self.ids(text)) for text in self.candidates[name]]
            ranked[image] = [Caption(text) for text, ids in encoded if ids is None]
            fitting = [(text, ids) for text, ids in encoded if ids is not None]
            rows += [(image, fitting[first : first + most]) for first in range(0, len(fitting), most)]
        for first in range(0, len(rows), len(names)):
            part = rows[first : first + len(names)]
            for (image, _), captions in zip(part, self.scored(part, image_embeds), strict=True):
                ranked[image] += captions
        for captions in ranked:
            captions.sort(key=likeliest_first)
        return ranked

    def scored(self, rows: Sequence[Row], image_embeds: Tensor) -> list[list[Caption]]:
        """The candidates of each row, in its order; image_embeds (I, N, width) of all images of the batch."""
        tokenizer = self.captioner.tokenizer
        captions = [[ids for _, ids in candidates] for _, candidates in rows]
        inputs = caption_rows(captions, tokenizer.prompt_ids, tokenizer.pad_token_id).to(self.device)
        places = torch.tensor([image for image, _ in rows], device=self.device)
        log_probs = iter(self.model.log_probs(inputs, image_embeds[places]).tolist())

        def scored(text: str, ids: list[int]) -> Caption:
            found = list(islice(log_probs, len(ids) - len(tokenizer.prompt_ids)))
            return Caption(text, confidence_in(tokenizer, ids[:-1], found))

        return [[scored(text, ids) for text, ids in candidates] for _, candidates in rows]


def likeliest_first(caption: Caption) -> float:
    return math.inf if caption.confidence is None else -caption.confidence.mean_log_prob
