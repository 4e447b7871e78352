"""Intervals against scipy's bootstrap, metrics of resamples against pycocoevalcap on the resampled captions."""

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from scipy.stats import bootstrap

from blipds.scoring import bootstrap as ours
from blipds.scoring.metrics import score_captions

CAPTIONS = ["a dog runs on the grass", "two cats sleep on a sofa", "a man", "a red bus in the street", "a a a a a"]
REFERENCES = [
    ["a dog is running on the grass", "the brown dog runs on grass"],
    ["two cats are asleep on a sofa", "cats"],
    ["a man in a hat rides a horse"],
    ["a bus drives down a street", "the red bus in the street is late"],
    ["a bird"],
]


@pytest.mark.parametrize("images", [2, 37, 400])
def test_the_interval_is_that_of_scipy(images, monkeypatch):
    """The same draws: scipy takes them from its generator in the same order."""
    random = np.random.default_rng(5)
    first = random.normal(1, 0.3, images)
    other = first + random.normal(0.02, 0.2, images)
    theirs = bootstrap(
        (first, other),
        lambda a, b, axis: b.mean(axis) - a.mean(axis),
        paired=True,
        n_resamples=2000,
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(ours.SEED),
    ).confidence_interval
    monkeypatch.setattr(ours, "DRAWN_AT_ONCE", 1000)  # in many parts
    sums = ours.resampled_sums(np.stack([first, other], axis=1), resamples=2000)
    draws = [ours.mean(part, images) for part in np.split(sums, 2, axis=1)]
    assert ours.interval(*draws) == pytest.approx(theirs, rel=0, abs=1e-12)


def test_10_000_draws_by_default_always_the_same():
    added = np.arange(12.0).reshape(6, 2)
    assert ours.resampled_sums(added).shape == (10_000, 2)
    assert np.array_equal(ours.resampled_sums(added), ours.resampled_sums(added))


@pytest.mark.parametrize("drawn", [[0, 1, 2, 3, 4], [0, 0, 0, 0, 0], [3, 1, 1, 0, 3], [4, 4, 4, 4, 4]])
def test_bleu_of_drawn_images(drawn):
    counts = np.array([ours.bleu_counts(*of) for of in zip(CAPTIONS, REFERENCES, strict=True)], dtype=float)
    drawn_captions = {place: [CAPTIONS[image]] for place, image in enumerate(drawn)}
    drawn_references = {place: REFERENCES[image] for place, image in enumerate(drawn)}
    theirs, _ = Bleu(4).compute_score(drawn_references, drawn_captions, verbose=0)
    sums = np.stack([counts[drawn].sum(0)] * 2)
    for n in (1, 2, 3, 4):
        assert ours.bleu(n)(sums, 5).tolist() == pytest.approx([theirs[n - 1]] * 2, rel=1e-12)


def test_parts_make_up_the_metrics():
    """Ids and references in any order; what images add makes the metric of all."""
    references = {str(number): texts for number, texts in enumerate(REFERENCES)}
    captions = {str(number): text for number, text in reversed(list(enumerate(CAPTIONS)))}
    poor = dict.fromkeys(captions, "A DOG!")
    for of, parts in zip((captions, poor), ours.image_parts([captions, poor], references), strict=True):
        expected = score_captions(of, references, ("Bleu", "ROUGE_L", "CIDEr"))
        assert expected.missing == {}
        for metric in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"):
            part, value = ours.part_and_value(metric)
            assert value(parts[part].sum(0), 5) == pytest.approx(expected.values[metric], rel=1e-12)
        assert parts["CIDEr"][:, 0].tolist() == pytest.approx([expected.per_image_cider[key] for key in references])
