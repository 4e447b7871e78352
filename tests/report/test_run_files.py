"""What the report reads of a run directory."""

import json

from blipds.report.run_files import (
    best_of,
    by_split,
    read_cider,
    read_evaluation,
    read_lines,
    seconds_spent,
    write_cider,
)


def evaluation(step, value, split="val", **other):
    return {"kind": "eval", "split": split, "epoch": 0, "step": step, "agg_metrics": value, "note": "", **other}


def test_lines_that_a_crash_tore_are_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n\n7\n{"kind": "tra')
    assert read_lines(tmp_path) == [{"kind": "train", "step": 1}]
    assert read_lines(tmp_path / "nothing") == []


def test_the_best_is_the_first_of_the_highest():
    lines = [evaluation(1, 0.5), evaluation(2, None), evaluation(3, 0.7), evaluation(4, 0.7)]
    assert best_of(lines)["step"] == 3
    assert best_of([evaluation(2, None), {"step": 3}]) is None


def test_an_evaluation_made_twice_counts_once():
    lines = [evaluation(1, 0.5), evaluation(1, 0.5, "test"), evaluation(1, 0.6)]
    assert {split: [line["agg_metrics"] for line in lines] for split, lines in by_split(lines).items()} == {
        "val": [0.6],
        "test": [0.5],
    }


def test_time_is_that_of_all_starts_together():
    """60 s, then killed; an hour later it went on for 30 s."""
    kinds = [("start", 100.0), ("train", 150.0), ("save", 160.0), ("start", 3760.0), ("eval", 3790.0)]
    assert seconds_spent([{"kind": kind, "time": time} for kind, time in kinds]) == 90.0
    assert seconds_spent([{"kind": "train", "step": 1}]) is None


def test_captions_are_found_whatever_the_evaluation(tmp_path):
    (tmp_path / "results").mkdir()
    for name in ("val_epoch0", "val_step7", "test"):
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps([{"image_id": 3, "caption": name}]))
    found = [read_evaluation(tmp_path, evaluation(step, 1.0)).captions for step in (7, 20)]
    assert found == [{"3": "val_step7"}, {"3": "val_epoch0"}]
    assert read_evaluation(tmp_path, evaluation(0, 1.0, "test", epoch=None)).captions == {"3": "test"}
    assert read_evaluation(tmp_path, evaluation(0, 1.0, "other")) is None


def test_cider_comes_back(tmp_path):
    results = tmp_path / "results" / "val_epoch0.json"
    assert read_cider(results) is None
    write_cider(results, {"3": 0.1 + 0.2, "ä": 0.0})
    assert read_cider(results) == {"3": 0.1 + 0.2, "ä": 0.0}
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["val_epoch0.json"]
