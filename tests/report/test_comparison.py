"""Runs beside each other: the numbers of the page, and the page in a browser. The run directories are written here."""

import json

import numpy as np
import pytest
from browser import DESKTOP, PHONE, chromium, complaints, open_page, requests
from launching import launch
from PIL import Image
from scipy.stats import bootstrap

from blipds.data.annotations import ImageFile, Record
from blipds.errors import UserError
from blipds.report.comparison import compare, read_runs, table_of, write_comparison
from blipds.report.gallery import Shown
from blipds.scoring.bootstrap import SEED
from blipds.scoring.metrics import score_captions

QUICK = ("Bleu", "ROUGE_L", "CIDEr")
THINGS = ["a red dog", "two small cats", "a tall man", "an old house", "three birds"]
IMAGES = 60
HOSTILE = """<img src=x onerror="document.title='owned'"> {{ 7 * 7 }}"""
REFERENCES = {
    f"<b>{number}</b>": [f"{THINGS[number % 5]} near water {number % 7}", f"{THINGS[number % 5]} in the sun"]
    for number in range(IMAGES)
}
REFERENCES["<b>3</b>"][0] = HOSTILE


def captions_of(first_wrong):
    """{image id: caption}; from `first_wrong` on, every third is about another thing."""
    return {
        image_id: f"{THINGS[(number + (number >= first_wrong and number % 3 == 0)) % 5]} near water"
        for number, image_id in enumerate(REFERENCES)
    }


def clip_of(run, factor=2.5):
    """Of image n: 0.5 + n / 500, more for the second run."""
    values = {image_id: 0.5 + number / 500 + 0.01 * run for number, image_id in enumerate(REFERENCES)}
    settings = {"model": "a/clip", "prefix": "A photo depicts ", "factor": factor, "max_tokens": 77}
    return {
        "settings": {"CLIPScore": settings | {"cut_captions": run, "cut_references": 4}},
        "per_image": {"CLIPScore": values},
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Annotations and pictures."""
    folder = tmp_path_factory.mktemp("data")
    entries = []
    for number, (image_id, texts) in enumerate(REFERENCES.items()):
        Image.new("RGB", (80, 60), (4 * number, 90, 200 - 3 * number)).save(folder / f"{number}.png")
        entries.append({"image": f"{number}.png", "caption": texts, "image_id": image_id})
    (folder / "captions.json").write_text(json.dumps(entries))
    return folder


def make_run(folder, data, captions, clip, *, epochs=3):
    """A run that validated three times, the second time best."""
    for name in ("results", "scores"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"""
model: {{model_type: tiny}}
datasets: {{custom_caption: {{images: {data}, build_info: {{annotations: {{val: {data}/captions.json}}}}}}}}
run: {{num_workers: 0}}
"""
    )
    values = score_captions(captions, {key: REFERENCES[key] for key in captions}, QUICK).values
    diversity = {"distinct_1": 0.1, "distinct_2": 0.2, "vocabulary": 1200 + len(folder.name), "words_per_caption": 5.25}
    lines = []
    for epoch in range(epochs):
        step, share = 10 * (epoch + 1), (0.8, 1.0, 0.9)[epoch]
        lines += [
            {"kind": "train", "step": s, "epoch": epoch, "loss": 3 / s, "lr": 1e-4} for s in range(step - 9, step)
        ]
        scored = {metric: share * value for metric, value in values.items()} | {"METEOR": 0.2 * share} | diversity
        lines.append({"kind": "eval", "split": "val", "epoch": epoch, "step": step, "note": "training weights, fp32"})
        lines[-1] |= scored | {"settings": clip["settings"]}
    entries = [{"image_id": key, "caption": text} for key, text in captions.items()]
    (folder / "results" / "val_epoch1.json").write_text(json.dumps(entries))
    (folder / "scores" / "val_epoch1.clip.json").write_text(json.dumps(clip))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    first = make_run(folder / "<i>base<i>", data, captions_of(first_wrong=30), clip_of(0))
    return first, make_run(folder / "longer-name-of-a-run", data, captions_of(first_wrong=0), clip_of(1))


def shown(data):
    records = [Record(ImageFile(data / f"{n}.png"), tuple(REFERENCES[key]), key) for n, key in enumerate(REFERENCES)]
    return Shown("val", records, REFERENCES)


def rows_of(table):
    return {row["title"]: row["cells"] for row in table["rows"]}


def test_values_differences_and_intervals(runs, data):
    compared = compare(read_runs(runs), "val", shown(data))
    table = table_of(compared, read_runs(runs))
    rows = rows_of(table)
    scores = [score_captions(captions_of(wrong), REFERENCES, QUICK) for wrong in (30, 0)]
    for title, metric in (("CIDEr", "CIDEr"), ("BLEU-4", "Bleu_4"), ("BLEU-1", "Bleu_1"), ("ROUGE-L", "ROUGE_L")):
        first, second = (of.values[metric] for of in scores)
        assert [cell["value"] for cell in rows[title]] == [f"{first:.3f}", f"{second:.3f}"]
        assert rows[title][1]["difference"] == f"{second - first:+.3f}"
    pairs = [list(of.per_image_cider.values()) for of in scores]
    theirs = bootstrap(
        pairs,
        lambda a, b, axis: b.mean(axis) - a.mean(axis),
        paired=True,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    assert rows["CIDEr"][1]["interval"] == f"{theirs.low:+.3f} to {theirs.high:+.3f}"
    assert theirs.high < 0 and rows["CIDEr"][1]["verdict"] == "worse"
    assert rows["CLIPScore"][1] == {
        "value": "0.569",  # 0.559 + 0.01
        "difference": "+0.010",
        "interval": "+0.010 to +0.010",
        "verdict": "better",
    }
    assert rows["METEOR"][1] == {"value": "0.200", "difference": "0.000", "interval": "", "verdict": ""}
    assert [cell["value"] for cell in rows["Different words"]] == ["1,210", "1,220"]
    assert rows["Different words"][1]["difference"] == "+10"
    assert table["uncertain"] == ["METEOR", "Distinct-1", "Distinct-2", "Different words", "Words a caption"]
    assert "longer-name-of-a-run: CLIPScore: 2.5 x max(cos, 0) by a/clip" in table["notes"][1]


def test_without_the_data_what_was_kept_has_intervals(runs):
    rows = rows_of(table_of(compare(read_runs(runs), "val", None), read_runs(runs)))
    assert rows["CLIPScore"][1]["interval"] and not rows["CIDEr"][1]["interval"]
    assert rows["CIDEr"][1]["difference"].startswith("-")


def test_only_images_of_all_runs_are_compared(runs, data, tmp_path):
    half = dict(list(captions_of(0).items())[::2])
    runs = [runs[0], make_run(tmp_path / "half", data, half, clip_of(1))]
    compared = compare(read_runs(runs), "val", shown(data))
    table = table_of(compared, read_runs(runs))
    assert table["images"] == 30 and table["notes"][0].startswith("Over the 30 images that all runs captioned, of 60.")
    known = {key: REFERENCES[key] for key in half}
    expected = score_captions({key: captions_of(30)[key] for key in half}, known, QUICK).values
    assert rows_of(table)["CIDEr"][0]["value"] == f"{expected['CIDEr']:.3f}"
    assert "METEOR" not in rows_of(table)


def test_clips_that_differ_are_named(runs, data, tmp_path):
    clip = clip_of(1)
    clip["settings"]["CLIPScore"]["model"] = "another"
    runs = [runs[0], make_run(tmp_path / "other", data, captions_of(0), clip)]
    table = table_of(compare(read_runs(runs), "val", None), read_runs(runs))
    assert table["notes"][-1] == "The CLIPScore of these runs cannot be compared: it is by different CLIPs."


def test_mistakes_are_one_line(runs, tmp_path):
    with pytest.raises(UserError, match=r"^a run is given twice: "):
        write_comparison([runs[0], runs[0]], [], tmp_path / "page.html")
    with pytest.raises(UserError, match=r"^no split was evaluated in all of these runs \(.*: val; .*: none\)$"):
        write_comparison([runs[0], tmp_path], [], tmp_path / "page.html")
    with pytest.raises(UserError, match="cannot be written"):
        write_comparison(runs, [], tmp_path / "missing" / "page.html")


def test_two_runs_with_one_name_go_by_their_paths(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert [run.name for run in read_runs(folders)] == list(map(str, folders))


@pytest.fixture(scope="module")
def page_file(runs, tmp_path_factory):
    """As launch/report.py writes it."""
    path = tmp_path_factory.mktemp("page") / "comparison.html"
    process = launch(1, "launch/report.py", *runs, "--output", path)
    assert process.returncode == 0 and process.stdout.endswith(" MB\n"), process.stdout[-4000:]
    return path


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def page(request, browser, page_file):
    open_page(browser, page_file, request.param)
    return browser


def texts(browser, selector):
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].filter(e => e.offsetParent).map(e => e.textContent)",
        selector,
    )


def test_needs_nothing_and_fits(page, page_file):
    assert requests(page) == [page_file.resolve().as_uri()] and complaints(page) == []
    assert page.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.execute_script("return document.scripts.length") == 0
    assert page.title == "<i>base<i>, longer-name-of-a-run - blipds"
    assert page.execute_script("return document.querySelectorAll('main i, .id b, img[src=x]').length") == 0


def test_both_runs_in_every_chart(page, runs):
    assert texts(page, ".chart h3") == ["CIDEr", "BLEU-4", "METEOR", "ROUGE-L", "Training loss", "Learning rate"]
    names = [run.name for run in runs]
    assert {tuple(texts(page, f".chart:nth-child({n}) .legend span")) for n in range(1, 7)} == {tuple(names)}
    points = page.execute_script("return [...document.querySelectorAll('polyline')].map(line => line.points.length)")
    assert points == [3] * 8 + [27] * 4


def test_images_that_differ_most_come_first(page, runs):
    scores = [score_captions(captions_of(wrong), REFERENCES, ("CIDEr",)).per_image_cider for wrong in (30, 0)]
    spread = {key: abs(scores[0][key] - scores[1][key]) for key in REFERENCES}
    expected = sorted((key for key in REFERENCES if spread[key]), key=lambda key: -spread[key])
    found = texts(page, ".card .text > .about .id")
    assert set(found) == set(expected) and len(found) == 10  # below 30, every third
    assert [round(spread[key], 1) for key in found] == [round(spread[key], 1) for key in expected]
    captions = texts(page, ".card .caption")
    assert captions[:2] == [captions_of(30)[found[0]], captions_of(0)[found[0]]]
    assert HOSTILE in texts(page, ".references li")


def test_accessible(page):
    levels = page.execute_script("return [...document.querySelectorAll('h1,h2,h3')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert page.execute_script("return document.querySelectorAll('img:not([alt]), svg:not([aria-label])').length") == 0
    assert page.execute_script("return document.querySelectorAll('th:not([scope])').length") == 0
