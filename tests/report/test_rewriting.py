"""The report of a run directory, with the data that its config names, or without."""

import json

import pytest

from blipds.config.run import load_run_config
from blipds.training.building import evaluators_of_run, rewrite_report


@pytest.fixture
def run(tmp_path):
    """Of two datasets; `drawn` images are always there, the others' annotations were never made."""
    (tmp_path / "config.yaml").write_text(
        f"""
model: {{model_type: tiny}}
run: {{num_workers: 0}}
datasets:
  shapes_caption: {{num_images: {{train: 5, val: 5, test: 5}}}}
  custom_caption: {{build_info: {{annotations: {{val: {tmp_path}/missing.json}}}}, images: {tmp_path}}}
"""
    )
    return tmp_path


def evaluated(run_dir, *splits):
    lines = [{"kind": "eval", "split": split, "epoch": None, "step": 0, "note": "x.pth, fp32"} for split in splits]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_run_config(run_dir / "config.yaml")[0]


def test_only_what_was_evaluated_is_read(run):
    assert [found.split for found in evaluators_of_run(evaluated(run), run)] == []
    config = evaluated(run, "shapes_caption_test", "shapes_caption_test_near-domain")
    assert [found.split for found in evaluators_of_run(config, run)] == ["shapes_caption_test"]


def test_without_the_data_the_page_has_numbers_alone(run):
    said = []
    rewrite_report(evaluated(run, "custom_caption_val"), run, said.append)
    assert len(said) == 1
    assert "report.html shows no captions: no such annotation file" in said[0] and "missing.json" in said[0]
    page = (run / "report.html").read_text()
    assert "custom_caption_val" in page and "x.pth, fp32" in page and "Captions of" not in page


def test_the_samples_of_the_newest_step_are_shown(run):
    config = evaluated(run, "shapes_caption_test")
    with (run / "metrics.jsonl").open("a") as lines:
        for step in (10, 1020):
            samples = [{"caption": f"a <b>dog</b> at {step}", "reward": 1.25}, {"caption": "", "reward": 0.0}]
            image = {"image_id": "7", "references": ["one dog"], "samples": samples, "baseline": 0.625}
            lines.write(json.dumps({"kind": "examples", "step": step, "images": [image]}) + "\n")
    rewrite_report(config, run, [].append)
    page = (run / "report.html").read_text()
    assert "step 1,020" in page and "<dt>1.250</dt><dd>a &lt;b&gt;dog&lt;/b&gt; at 1020</dd>" in page
    assert "<dt>0.000</dt><dd>(empty)</dd>" in page and "<dd>one dog</dd>" in page and "at 10<" not in page


def test_diversity_and_the_clip_are_told_below_the_table(run):
    config = evaluated(run, "custom_caption_val")
    line = json.loads((run / "metrics.jsonl").read_text())
    clip = {"model": "a/clip", "prefix": "A photo depicts ", "factor": 2.5, "max_tokens": 77}
    clip |= {"cut_captions": 1, "cut_references": 2}
    line |= {"CLIPScore": 0.7512, "settings": {"CLIPScore": clip}, "seen_in_training": 0.25}
    line |= {"distinct_1": 0.125, "distinct_2": 0.5, "vocabulary": 1234, "words_per_caption": 9.46}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    rewrite_report(config, run, lambda said: None)
    page = (run / "report.html").read_text()
    assert ">CLIPScore</th>" in page and "<td >0.751</td>" in page
    assert "CLIPScore: 2.5 x max(cos, 0) by a/clip" in page and "77 tokens: 1 captions, 2 references" in page
    assert (
        "distinct-1 0.125, distinct-2 0.500, 1,234 different words, 9.5 words a caption; 25.0% of the captions" in page
    )
