"""CLIPScore and PAC-S against the formula written down once more, on transformers' CLIPModel."""

import math
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_clip import MAX_TOKENS, save_clip
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPVisionModel

from blipds.errors import UserError
from blipds.scoring.clip import ClipScorer, ClipScores, ImageScore, clip_lines

CAPTIONS = ["a dog", "two cats on a sofa", "a red bus", "a man, a plan", "zebras"]
REFERENCES = [["the dog runs", "a cat"], ["cats"], ["bus", "red", "a blue bus"], ["a man"], ["a horse", "zebra"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def images():
    """Of several shapes, so that the shorter side is scaled and the middle cropped."""
    noise = [Image.effect_noise((30 + 17 * n, 70 - 9 * n), 80).convert("RGB") for n in range(len(CAPTIONS))]
    colours = [Image.new("RGB", image.size, (50 * n, 200 - 40 * n, 90)) for n, image in enumerate(noise)]
    return [Image.blend(first, second, 0.5) for first, second in zip(noise, colours, strict=True)]


def cosine(first, second):
    first, second = first.double().flatten(), second.double().flatten()
    return (first @ second / first.norm() / second.norm()).item()


def by_the_formula(folder, images, captions, references, factor):
    """One image and one text at a time, each as transformers prepares it by itself."""
    model = CLIPModel.from_pretrained(folder).eval()
    processor, tokenizer = CLIPImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def text(words):
        tokens = tokenizer("A photo depicts " + words, truncation=True, max_length=77, return_tensors="pt")
        return model.get_text_features(**tokens).pooler_output

    found = []
    with torch.no_grad():
        for image, caption, group in zip(images, captions, references, strict=True):
            seen = model.get_image_features(**processor(image, return_tensors="pt")).pooler_output
            score = factor * max(cosine(seen, text(caption)), 0)
            near = max(max(cosine(text(caption), text(other)) for other in group), 0)
            found.append((score, 2 * score * near / (score + near) if score + near else 0))
    return found


def scored(scorer, images, captions, references, size):
    pixels = torch.stack([scorer.image_processor(image) for image in images])
    starts = range(0, len(images), size)
    batches = [
        scorer.scores(pixels[i : i + size], captions[i : i + size], references and references[i : i + size])
        for i in starts
    ]
    return [score for batch in batches for score in batch]


@pytest.mark.parametrize(("metric", "factor"), [("CLIPScore", 2.5), ("PAC-S", 2.0)])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_formula_in_batches_of_any_size(folder, images, metric, factor, size):
    found = scored(ClipScorer(metric, str(folder)), images, CAPTIONS, REFERENCES, size)
    expected = by_the_formula(folder, images, CAPTIONS, REFERENCES, factor)
    assert [score.value for score in found] == pytest.approx([value for value, _ in expected], abs=1e-6)
    assert [score.with_references for score in found] == pytest.approx([value for _, value in expected], abs=1e-6)
    values = [score.value for score in found]
    assert len({round(value, 4) for value in values}) > 3 and min(values) == 0  # one cosine is negative


def test_without_references(folder, images):
    scorer = ClipScorer("CLIPScore", str(folder))
    alone = scored(scorer, images, CAPTIONS, None, 5)
    beside = scored(scorer, images, CAPTIONS, REFERENCES, 5)
    assert [score.value for score in alone] == [score.value for score in beside]
    assert {score.with_references for score in alone} == {None}


def test_texts_that_are_too_long_are_cut_and_counted(folder, images):
    """A letter is a token: the prefix has 13, start and end are two more."""
    fits, cut = "a" * (MAX_TOKENS - 15), "a" * (MAX_TOKENS - 14)
    captions, references = [fits, cut], [[cut, "a", cut + "b"], ["a"]]
    found = scored(ClipScorer("CLIPScore", str(folder)), images[:2], captions, references, 2)
    assert [(score.cut_captions, score.cut_references) for score in found] == [(0, 2), (1, 0)]
    expected = by_the_formula(folder, images[:2], captions, references, 2.5)
    assert torch.tensor([score[:2] for score in found]).allclose(torch.tensor(expected), rtol=0, atol=1e-6)


def test_large_photographs_are_read_at_twice_the_pixels(folder):
    shrink = ClipScorer("CLIPScore", str(folder)).image_processor.shrink
    assert [shrink(*size) for size in ((64, 64), (200, 128), (640, 480))] == [1, 2, 7]


def test_scores_of_a_split(folder):
    scorer, scores = ClipScorer("CLIPScore", str(folder)), ClipScores()
    scores.add(scorer, {"5": ImageScore(0.5, 0.8, 1, 2), "7": ImageScore(0.25, 0.4, 0, 1)})
    assert scores.per_image == {"CLIPScore": {"5": 0.5, "7": 0.25}, "RefCLIPScore": {"5": 0.8, "7": 0.4}}
    assert scores.means(["5", "7", "unreadable"]) == pytest.approx({"CLIPScore": 0.375, "RefCLIPScore": 0.6})
    assert scores.means(["7"]) == {"CLIPScore": 0.25, "RefCLIPScore": 0.4}
    assert scores.means([]) == {}
    assert clip_lines(scores.settings) == [
        f"CLIPScore: 2.5 x max(cos, 0) by {folder}, behind the prefix 'A photo depicts '; cut at 77 tokens: 1 "
        "captions, 3 references"
    ]
    scores.add(ClipScorer("PAC-S", str(folder)), {"5": ImageScore(0.5, None, 0, 0)})
    assert set(scores.per_image) == {"CLIPScore", "RefCLIPScore", "PAC-S"} and scores.settings["PAC-S"]["factor"] == 2


def test_loading_leaves_the_random_state_alone(folder):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    ClipScorer("CLIPScore", str(folder))
    assert torch.equal(torch.rand(2), expected)


def test_a_clip_without_a_text_tower(folder, tmp_path):
    CLIPVisionModel.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^run.clip_score '{tmp_path}' has no text tower; needs a whole CLIP"):
        ClipScorer("CLIPScore", str(tmp_path))


def test_a_clip_whose_text_tower_has_no_weights(folder, tmp_path):
    """transformers says so among its warnings, and goes on with random ones."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    images_only = {name: tensor for name, tensor in tensors.items() if not name.startswith("text_")}
    save_file(images_only, tmp_path / "model.safetensors", {"format": "pt"})
    missing = len(tensors) - len(images_only)
    with pytest.raises(UserError, match=rf"^run.pac_score '{tmp_path}' has no text tower: {missing} weights are mi"):
        ClipScorer("PAC-S", str(tmp_path))


@pytest.mark.parametrize(
    ("content", "said"), [(None, "config.json"), ('{"model_type": "bert"}', "is a bert; needs a whole CLIP")]
)
def test_what_is_no_clip(tmp_path, content, said):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=rf"^run.clip_score '{tmp_path}'.*{said}"):
        ClipScorer("CLIPScore", str(tmp_path))


def test_a_score_of_zero_has_a_harmonic_mean(folder):
    scorer = ClipScorer("CLIPScore", str(folder))
    scorer.factor = 0.0
    (score,) = scorer.scores(torch.zeros(1, 3, 32, 32), ["a"], [["a"]])
    assert score.value == 0 and score.with_references == 0 and not math.isnan(score.with_references)
