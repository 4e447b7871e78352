"""CLIPScore and PAC-S: how well a caption fits its image, by a CLIP that the user names. References are optional.

Hessel et al. 2021 (arXiv 2104.08718, github.com/jmhessel/clipscore). PAC-S is the same formula with another factor and
other weights: Sarto et al. 2023 (arXiv 2303.12112, github.com/aimagelab/pacscore).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from blipds.errors import UserError

PREFIX = "A photo depicts "  # in front of captions and references, as in the code of both papers
TEXTS_AT_ONCE = 256


class ClipMetric(NamedTuple):
    """`key`: the run key that names the CLIP. `factor`: on the cosine, which alone stays between 0 and about 0.4."""

    key: str
    factor: float


CLIP_METRICS = {"CLIPScore": ClipMetric("clip_score", 2.5), "PAC-S": ClipMetric("pac_score", 2.0)}


class ImageScore(NamedTuple):
    """Of a caption. `with_references`: RefCLIPScore or RefPAC-S; None without references. Texts that were cut."""

    value: float
    with_references: float | None
    cut_captions: int
    cut_references: int


@dataclass(frozen=True)
class ClipImages:
    """The CLIP's own image processor, as its folder configures it, by Pillow as in the papers' code."""

    processor: Any

    def shrink(self, width: int, height: int) -> int:
        """Leaves twice the pixels asked for on each side, as `BlipImageEval`."""
        sizes = (self.processor.size or {}, self.processor.crop_size or {})
        longest = max((length or 0 for size in sizes for length in dict(size).values()), default=0)
        return min(width, height) // (2 * longest) if longest else 1

    def __call__(self, image: Image.Image) -> Tensor:
        """pixel_values (3, H, W), normalised."""
        pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels


class ClipScorer:
    """Scores captions by a CLIP of transformers, in fp32. `source`: its folder or hub name.

    Raises UserError where it cannot be read, or is no CLIP with an image tower and a text tower.
    """

    def __init__(self, metric: str, source: str) -> None:
        self.metric, self.source = metric, source
        self.factor = CLIP_METRICS[metric].factor
        place = f"run.{CLIP_METRICS[metric].key} '{source}'"
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # one on each rank
        try:
            kind = AutoConfig.from_pretrained(source).model_type
            if kind != "clip":
                towers = {"clip_vision_model": "has no text tower", "clip_text_model": "has no image tower"}
                raise UserError(f"{place} {towers.get(kind, f'is a {kind}')}; needs a whole CLIP (CLIPModel)")
            with torch.random.fork_rng(devices=[]):  # what is drawn here must not move the training's dropout
                whole: Any = CLIPModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
            self.image_processor = ClipImages(AutoImageProcessor.from_pretrained(source, backend="pil"))
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"{place}: {' '.join(str(error).split())[:300]}") from error
        self.model, report = whole
        if missing := sorted(report["missing_keys"]):  # transformers would go on with random weights
            tower = "has no text tower" if any(name.startswith("text_") for name in missing) else "is not whole"
            raise UserError(f"{place} {tower}: {len(missing)} weights are missing, the first is {missing[0]}")
        self.model.eval().requires_grad_(False)
        self.max_tokens: int = self.model.config.text_config.max_position_embeddings

    def to(self, device: torch.device) -> None:
        """Moves the weights: to the device while a split is captioned, back to the host for the training."""
        self.model.to(device)

    @torch.inference_mode()
    def scores(
        self, pixel_values: Tensor, captions: Sequence[str], references: Sequence[Sequence[str]] | None = None
    ) -> list[ImageScore]:
        """Of the captions of images (I, 3, H, W), with the references of each image, if there are any.

        CLIPScore = factor x max(cos(image, caption), 0). RefCLIPScore is its harmonic mean with
        max(cos(caption, reference), 0), the highest of all references.
        """
        pooled = self.model.vision_model(pixel_values=pixel_values.to(self.model.device)).pooler_output
        images = normalize(self.model.visual_projection(pooled), dim=-1).cpu()
        texts, cut = self.text_features(captions)
        values = (self.factor * (images * texts).sum(-1).clamp(min=0)).tolist()
        if references is None:
            return [ImageScore(value, None, long, 0) for value, long in zip(values, cut, strict=True)]
        known, known_cut = self.text_features([text for group in references for text in group])
        scores, start = [], 0
        for value, text, long, group in zip(values, texts, cut, references, strict=True):
            own = slice(start, start + len(group))
            nearest = (known[own] @ text).max().clamp(min=0).item()
            scores.append(ImageScore(value, _harmonic_mean(value, nearest), long, sum(known_cut[own])))
            start = own.stop
        return scores

    def text_features(self, texts: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Features (T, width) of length 1, on the host, and for each text 1 if it is cut, else 0.

        Of a text that is longer than the CLIP can read the first tokens count, as in the papers' code.
        """
        rows: list[list[int]] = self.tokenizer([PREFIX + text for text in texts], verbose=False)["input_ids"]
        cut = [int(len(row) > self.max_tokens) for row in rows]
        rows = [[*row[: self.max_tokens - 1], row[-1]] if long else row for row, long in zip(rows, cut, strict=True)]
        features = []
        for start in range(0, len(rows), TEXTS_AT_ONCE):
            part = {"input_ids": rows[start : start + TEXTS_AT_ONCE]}
            padded = self.tokenizer.pad(part, return_tensors="pt").to(self.model.device)
            features.append(self.model.text_projection(self.model.text_model(**padded).pooler_output))
        return normalize(torch.cat(features), dim=-1).cpu(), cut


@dataclass
class ClipScores:
    """Of a split. `settings`: {metric: how it was computed}. `per_image`: {metric: {image id: value}}."""

    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    per_image: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, clip: ClipScorer, found: Mapping[str, ImageScore]) -> None:
        """What a CLIP said of captions, by image id."""
        self.settings[clip.metric] = {
            "model": clip.source,
            "prefix": PREFIX,
            "factor": clip.factor,
            "max_tokens": clip.max_tokens,
            "cut_captions": sum(score.cut_captions for score in found.values()),
            "cut_references": sum(score.cut_references for score in found.values()),
        }
        self.per_image[clip.metric] = {image_id: score.value for image_id, score in found.items()}
        nearest = {image_id: score.with_references for image_id, score in found.items()}
        if known := {image_id: value for image_id, value in nearest.items() if value is not None}:
            self.per_image[f"Ref{clip.metric}"] = known

    def means(self, ids: Sequence[str]) -> dict[str, float]:
        """{metric: the mean over some images}"""
        found = {
            metric: [values[image_id] for image_id in ids if image_id in values]
            for metric, values in self.per_image.items()
        }
        return {metric: sum(values) / len(values) for metric, values in found.items() if values}


def clip_lines(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How CLIPScore and PAC-S were computed, a sentence each."""
    return [
        f"{metric}: {of['factor']} x max(cos, 0) by {of['model']}, behind the prefix '{of['prefix']}'; cut at "
        f"{of['max_tokens']} tokens: {of['cut_captions']:,} captions, {of['cut_references']:,} references"
        for metric, of in settings.items()
        if metric in CLIP_METRICS
    ]


def _harmonic_mean(first: float, second: float) -> float:
    return 2 * first * second / (first + second) if first + second else 0.0
