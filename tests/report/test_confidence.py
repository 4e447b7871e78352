"""Rank correlations and shades, worked out by hand."""

import math

import pytest

from blipds.captioning.confidence import Caption, Confidence
from blipds.report.confidence import against_cider, shaded_words, spearman
from blipds.report.run_files import Evaluation, read_evaluation, write_confidence


def confidence(*shares, words="a red dog runs far"):
    logs = [math.log(share) for share in shares]
    return Confidence(sum(logs), sum(logs) / len(logs), tuple(zip(words.split(), logs, strict=False)))


def test_spearman_by_hand():
    """Without ties 1 - 6 sum(d^2) / (n (n^2 - 1)); here d is 0, 1, 1, 1, 1."""
    assert spearman([1, 2, 3, 4, 5], [10, 30, 20, 60, 40]) == pytest.approx(1 - 6 * 4 / 120)
    assert spearman([1, 2, 3, 4, 5], [1, 8, 27, 64, 125]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [0.3, 0.2, 0.1]) == pytest.approx(-1.0)


def test_equal_values_share_the_mean_of_their_ranks():
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4; from their means -1.5, 0, 0, 1.5 and -1.5, -0.5, 0.5, 1.5."""
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman([7, 7, 7], [1, 2, 3]) is None


def test_a_word_has_a_shade_for_each_limit_that_it_is_below():
    assert shaded_words("a red dog runs far", confidence(0.95, 0.89, 0.69, 0.49, 0.004)) == [
        ("a", "95%", 0),
        ("red", "89%", 1),
        ("dog", "69%", 2),
        ("runs", "49%", 3),
        ("far", "below 1%", 4),
    ]
    assert shaded_words("a red cat runs far", confidence(0.9, 0.9, 0.9, 0.9, 0.9)) == []  # somebody changed it


def test_images_without_one_of_both_are_left_out():
    line = {"kind": "eval"}
    sure = {str(number): confidence(0.1 * number) for number in (1, 2, 3)}
    captions = dict.fromkeys("1234", "a")
    chart, sentence = against_cider(Evaluation(line, captions, {"2": 0.5, "3": 1.0, "4": 2.0}, confidence=sure))
    assert sentence == "Spearman's rank correlation of confidence with CIDEr over 2 images: 1.00."
    assert [mark.label for mark in chart.scattered] == ["2", "3"]
    # from -1.7 to -1.2 across (log .2 is -1.609, log .3 is -1.204), from .5 to 1 up: 354 x 184
    assert [chart.x_ticks[0].label, chart.x_ticks[-1].label] == ["-1.7", "-1.2"]
    assert chart.scattered[0].y == 184 and chart.scattered[1].y == 0
    assert chart.scattered[0].x == pytest.approx(354 * (1.7 + math.log(0.2)) / 0.5, abs=0.1)
    assert against_cider(Evaluation(line, captions, {"3": 1.0}, confidence=sure)) is None
    assert against_cider(Evaluation(line, captions, None, confidence=sure)) is None
    equal = against_cider(Evaluation(line, captions, {"2": 0.0, "3": 0.0}, confidence=sure))
    assert equal is not None and equal[1].endswith("over 2 images: none, since all are equal in one of them.")


def test_confidence_comes_back_for_captions_that_are_still_the_same(tmp_path):
    results = tmp_path / "results" / "val.json"
    results.parent.mkdir()
    results.write_text('[{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": "mine"}]')
    found = Confidence(-0.75, -0.25, (("a", -0.25), ("dog", -0.5)))
    write_confidence(results, {1: Caption("a dog", found), 2: Caption("a cat", found)})
    read = read_evaluation(tmp_path, {"split": "val", "step": 0, "epoch": None})
    assert read is not None and read.confidence == {"1": found}
    (tmp_path / "confidence" / "val.json").unlink()
    read = read_evaluation(tmp_path, {"split": "val", "step": 0, "epoch": None})
    assert read is not None and read.confidence == {}
