"""The reward of drawn captions against pycocoevalcap and against arithmetic by hand."""

import json
import math
import random

import pytest

from blipds.errors import UserError
from blipds.scoring import metrics, rewards
from blipds.scoring.rewards import CaptionReward, RewardWeights

CIDER, BLEU = RewardWeights(), RewardWeights(cider=0, bleu=1)
REFERENCES = {"one": ["A dog."], "two": ["a cat", "a small cat"]}


@pytest.fixture(scope="module")
def drawn(shared):
    """References of 1,000 images, and for 60 of them five captions, each with whether it ended.

    Some are captions of the image, some of other images, some with other words, cut off or empty.
    """
    entries = json.loads((shared / "data" / "flickr8k" / "annotations" / "val.json").read_text())
    references = {entry["image"]: entry["caption"] for entry in entries}
    draw = random.Random(0)
    images = draw.sample(list(references), 60)

    def sample(image):
        caption = draw.choice(references[draw.choice([image, draw.choice(images)])]).split()
        for _ in range(draw.randrange(3)):
            caption[draw.randrange(len(caption))] = draw.choice(["a", "dog", "the", "zebra"])
        return " ".join(caption[: draw.choice([0, 3, 7, 99, 99])]), draw.random() < 0.7

    references[images[0]] = references[images[0]][:1]
    return references, {image: [sample(image) for _ in range(5)] for image in images}


def cooked(references, samples, end):
    """For each sample: its tokens by Java, and those of its image's references."""
    tokens = iter(metrics._tokenize([text for texts in references.values() for text in texts]))
    known = {image: [f"{next(tokens)}{end}" for _ in texts] for image, texts in references.items()}
    tokens = iter(metrics._tokenize([text for drawn in samples.values() for text, _ in drawn]))
    rows = [
        (f"{next(tokens)}{end if ended else ''}", known[image])
        for image, drawn in samples.items()
        for _, ended in drawn
    ]
    return known, rows


def rewarded(reward, samples):
    return [value for image, drawn in samples.items() for value in reward(image, *zip(*drawn, strict=True))]


@pytest.mark.parametrize("end_token", [True, False])
def test_is_what_pycocoevalcap_computes(drawn, end_token):
    import numpy as np
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    class TrainingScorer(CiderScorer):
        ref_len = property(lambda self: np.log(float(len(references))), lambda self, value: None)

    references, samples = drawn
    known, rows = cooked(references, samples, " ENDTOKEN" if end_token else "")
    counted, cider, bleu = CiderScorer(), TrainingScorer(), BleuScorer()
    for texts in known.values():
        counted.cook_append(None, texts)
    counted.compute_doc_freq()
    cider.document_frequency = counted.document_frequency
    for row in rows:
        cider.cook_append(*row)
        bleu.cook_append(*row)
    expected = {CIDER: cider.compute_cider(), BLEU: bleu.compute_score("closest")[1][3]}
    for weights, values in expected.items():
        reward = CaptionReward(references, weights, None, end_token=end_token)
        assert rewarded(reward, samples) == pytest.approx(values, rel=0, abs=1e-12)
        assert reward.counting == f"PTB tokens, end token {'counted' if end_token else 'not counted'}"
    both = CaptionReward(references, RewardWeights(cider=0.5, bleu=2), None, end_token=end_token)
    mixed = 0.5 * np.array(expected[CIDER]) + 2 * np.array(expected[BLEU])
    assert rewarded(both, samples) == pytest.approx(mixed, rel=0, abs=1e-12)


def test_by_hand():
    """Two images: what both have, "a" and the end, weighs log 2/2 = 0, "dog" and all with it log 2/1.

    "a dog" has the reference's 1-, 2- and 3-grams, and neither has a 4-gram. Without its end it has one of the two
    2-grams of weight log 2, a cosine of 1/sqrt(2), no 3-gram, and one word less.
    """
    reward = CaptionReward(REFERENCES, CIDER, None)
    whole, cut, other = reward("one", ["A dog", "a dog", "a a cat"], [True, False, True])
    assert whole == pytest.approx(10 * 3 / 4)
    assert cut == pytest.approx(10 * (1 + 1 / math.sqrt(2)) / 4 * math.exp(-1 / (2 * 6**2)))
    assert other == 0
    assert CaptionReward(REFERENCES, CIDER, None, end_token=False)("one", ["a dog"], [True]) == pytest.approx([5])


def test_frequencies_are_counted_once(tmp_path, monkeypatch):
    expected = CaptionReward(REFERENCES, CIDER, tmp_path)("two", ["a cat"], [True])
    count = rewards._count
    monkeypatch.setattr(rewards, "_count", None)
    assert CaptionReward(dict(REFERENCES), CIDER, tmp_path)("two", ["a cat"], [True]) == expected
    monkeypatch.setattr(rewards, "_count", count)
    (kept,) = (tmp_path / "document_frequencies").iterdir()
    content = kept.read_text()
    kept.write_text(content[:-3])  # damaged: counted again
    assert CaptionReward(REFERENCES, CIDER, tmp_path)("two", ["a cat"], [True]) == expected
    assert kept.read_text() == content
    CaptionReward(REFERENCES, CIDER, tmp_path, end_token=False)
    CaptionReward({"one": ["a dog", "a cat"], "two": ["a small cat"]}, CIDER, tmp_path)
    assert len(list((tmp_path / "document_frequencies").iterdir())) == 3


def test_a_cache_without_room_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    assert CaptionReward(REFERENCES, CIDER, tmp_path / "file")("one", ["a dog"], [True])[0] > 0


def test_an_image_without_references():
    with pytest.raises(UserError, match=r"^three: no reference caption"):
        CaptionReward({**REFERENCES, "three": []}, CIDER, None)
    with pytest.raises(UserError, match=r"^three: no reference caption"):
        CaptionReward(REFERENCES, CIDER, None)("three", ["a dog"], [True])
