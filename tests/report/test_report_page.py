"""report.html of a real run, opened in a browser."""

import itertools
import json
import math
import re
import shutil
import statistics

import pytest
from browser import DESKTOP, PHONE, chromium, complaints, open_page, requests
from launching import launch
from PIL import Image

from blipds.report.gallery import Shown
from blipds.report.page import write_report

HOSTILE = """</script><img src=x onerror="document.title='owned'"> & "quotes" {{ 7 * 7 }}"""
JOB = """<i onclick="x">run</i>"""
IMAGES = 20


def more(number):
    """Words that only one reference of an image has, more or fewer, so that scores differ."""
    return ["near", "the", "old", "grey", "house"][: number % 6]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run directory of a captioner that has learnt two sentences, each an image of its own colour."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "images").mkdir()
    entries = []
    for number in range(IMAGES):
        name, colour, said = f"{number}.png", *(("red", "a small dog"), ("blue", "two tall birds"))[number % 2]
        Image.new("RGB", (60 + number, 50), colour).save(folder / "images" / name)
        captions = [said, " ".join([said, *more(number)]), HOSTILE if number == 3 else said]
        entries.append({"image": name, "caption": captions, "image_id": f"<b>{number}</b>"})
    (folder / "captions.json").write_text(json.dumps(entries))
    (folder / "run.yaml").write_text(
        f"""
model: {{model_type: tiny, med_config_path: tests/engine/no_dropout.json, vit_kwargs: {{patch_size: 16}}}}
datasets:
  custom_caption:
    build_info: {{annotations: {{train: {folder}/captions.json, val: {folder}/captions.json}}}}
    images: {folder}/images
    captions_per_image: all
    vis_processor: {{train: {{name: blip_image_eval}}}}
run: {{output_dir: {folder}, job_id: {json.dumps(JOB.replace("/", ""))}, max_epoch: 24, val_freq: 12, save_freq: 12,
  init_lr: 3e-3, batch_size_train: 10, num_workers: 0, log_freq: 2}}
"""
    )
    process = launch(1, "launch/finetune.py", "--cfg-path", folder / "run.yaml")
    assert process.returncode == 0, process.stdout[-4000:]
    return folder / JOB.replace("/", "")


@pytest.fixture(scope="module")
def rebuilt(run, tmp_path_factory):
    """What launch/report.py makes, with heat maps, of the same run without scores/ and with another caption."""
    copy = tmp_path_factory.mktemp("rebuilt") / "run"
    shutil.copytree(run, copy, symlinks=True)
    shutil.rmtree(copy / "scores")
    (copy / "report.html").unlink()
    for results in (copy / "results").glob("*.json"):
        entries = json.loads(results.read_text())
        entries[5]["caption"] = HOSTILE
        results.write_text(json.dumps(entries))
    process = launch(1, "launch/report.py", copy, "--attention", "6")
    assert process.returncode == 0, process.stdout[-4000:]
    return copy


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def page(request, browser, run):
    open_page(browser, run / "report.html", request.param)
    return browser


def best_evaluation(run):
    """The name of its files, by what the log says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert [line["epoch"] for line in evaluations] == [11, 23]
    return f"val_epoch{max(evaluations, key=lambda line: line['agg_metrics'])['epoch']}"


def kept(run, folder):
    return json.loads((run / folder / f"{best_evaluation(run)}.json").read_text())


def texts(browser, selector):
    """Of what is shown, in the order in which it is."""
    script = "return [...document.querySelectorAll(arguments[0])].filter(e => e.offsetParent).map(e => e.textContent)"
    return browser.execute_script(script, selector)


def choose(browser, order):
    browser.execute_script("document.querySelector(`input[value=${arguments[0]}]`).click()", order)


def shown_ids(browser):
    return texts(browser, ".card .id")


def by_id(run, folder, key):
    return {entry["image_id"]: entry[key] for entry in kept(run, folder)}


def test_confidence_by_word(page, run):
    """Shades for those who see them, percents in titles and in text."""
    choose(page, "dataset")
    words = by_id(run, "confidence", "words")
    shown = page.execute_script(
        "return [...document.querySelectorAll('.card')].map(card => [card.querySelector('.id').textContent,"
        "[...card.querySelectorAll('.caption span')].map(word => [word.title, word.className]),"
        "card.querySelector('.by-word').textContent])"
    )
    assert [image_id for image_id, *_ in shown] == list(words)
    for image_id, spans, text in shown:
        shares = [(word, math.exp(log_prob)) for word, log_prob in words[image_id]]
        said = [f"{word}: {share:.0%}" if share >= 0.01 else f"{word}: below 1%" for word, share in shares]
        assert spans == [
            [title, f"shade-{sum(share < limit for limit in (0.9, 0.7, 0.5, 0.25))}"]
            for title, (_, share) in zip(said, shares, strict=True)
        ]
        assert text == f"Confidence by word: {', '.join(said).replace(':', '')}"
    mean = by_id(run, "confidence", "mean_log_prob").values()
    assert texts(page, ".confidence") == [f"Confidence {math.exp(log_prob):.0%}" for log_prob in mean]


def test_sorts_by_confidence(page, run):
    sure = by_id(run, "confidence", "mean_log_prob")
    for order, sign in (("unsure", 1), ("sure", -1)):
        choose(page, order)
        assert shown_ids(page) == sorted(sure, key=lambda image_id: sign * sure[image_id])


def test_confidence_against_cider(page, run):
    sure, cider = by_id(run, "confidence", "mean_log_prob"), by_id(run, "scores", "CIDEr")
    ranks = [
        [sum(other < value for other in found) + (sum(other == value for other in found) + 1) / 2 for value in found]
        for found in (list(sure.values()), [cider[image_id] for image_id in sure])
    ]
    found = statistics.correlation(*ranks)
    said = f"Spearman's rank correlation of confidence with CIDEr over {IMAGES} images: {found:.2f}."
    assert said in texts(page, ".gallery .note")
    dots = page.execute_script(
        "return [...document.querySelectorAll('.scattered')].map(dot => [dot.textContent,"
        "Number(dot.getAttribute('cx')), Number(dot.getAttribute('cy'))])"
    )
    assert {image_id for image_id, *_ in dots} == set(sure)
    across, up = [{image_id: dot[axis] for image_id, *dot in dots} for axis in (0, 1)]
    assert all(0 <= across[image_id] <= 354 and 0 <= up[image_id] <= 184 for image_id in sure)
    assert min(across.values()) == across[min(sure, key=sure.get)] < across[max(sure, key=sure.get)]
    assert min(up.values()) == up[max(cider, key=cider.get)] < up[min(cider, key=cider.get)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_shaded_words_can_be_read(browser, run, scheme):
    """WCAG 2.2, 1.4.3: a contrast of 4.5; and shades differ from each other and from the card."""
    open_page(browser, run / "report.html", DESKTOP, scheme)
    colours = browser.execute_script(
        """const card = getComputedStyle(document.querySelector('.card article')).backgroundColor;
        return [1, 2, 3, 4].map(shade => {
            const word = document.body.appendChild(document.createElement('span'));
            word.className = `shade-${shade}`;
            return [getComputedStyle(word).color, getComputedStyle(word).backgroundColor];
        }).concat([[card, card]]);"""
    )
    assert all(contrast(*pair) >= 4.5 for pair in colours[:-1])
    assert len({background for _, background in colours}) == 5


def contrast(first, second):
    """By WCAG's definition of relative luminance."""

    def luminance(colour):
        channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def test_percents_are_written_where_nothing_hovers(browser, run):
    heights = []
    for size in (DESKTOP, PHONE):
        open_page(browser, run / "report.html", size)
        heights.append(browser.execute_script("return document.querySelector('.by-word').offsetHeight"))
    assert heights[0] == 1 and heights[1] > 15


def test_needs_nothing_and_complains_about_nothing(page, run):
    assert requests(page) == [(run / "report.html").resolve().as_uri()]
    assert complaints(page) == []
    assert page.title.startswith(run.name)


def test_fits_the_screen(page):
    assert page.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    page.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_fits_a_small_phone(browser, run):
    open_page(browser, run / "report.html", (360, 640))
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360


def test_captions_scores_and_references_are_those_of_the_run(page, run):
    choose(page, "dataset")
    results, scores = kept(run, "results"), kept(run, "scores")
    assert shown_ids(page) == [entry["image_id"] for entry in results] == [f"<b>{n}</b>" for n in range(IMAGES)]
    assert texts(page, ".caption") == [entry["caption"] for entry in results]
    assert {"a small dog", "two tall birds"} <= {entry["caption"] for entry in results}  # it did learn
    assert texts(page, ".cider") == [f"CIDEr {entry['CIDEr']:.3f}" for entry in scores]
    captions = json.loads((run.parent / "captions.json").read_text())
    assert texts(page, ".references li") == [text for entry in captions for text in entry["caption"]]
    decoded = """Promise.all([...document.querySelectorAll('.photo')].map(async photo => {
        photo.loading = 'eager'; await photo.decode(); return [photo.naturalWidth, photo.naturalHeight];
    })).then(arguments[0])"""
    assert page.execute_async_script(decoded) == [[60 + number, 50] for number in range(IMAGES)]


def test_sorts_by_cider(page, run):
    scores = {entry["image_id"]: entry["CIDEr"] for entry in kept(run, "scores")}
    assert len(set(scores.values())) >= 3
    worst_first = sorted(scores, key=lambda image_id: scores[image_id])  # equal ones in the order of the dataset
    assert shown_ids(page) == worst_first
    choose(page, "best")
    assert shown_ids(page) == sorted(scores, key=lambda image_id: -scores[image_id])
    choose(page, "worst")
    assert shown_ids(page) == worst_first


def test_sorts_by_keyboard(browser, run):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, run / "report.html", DESKTOP)
    checked = browser.find_element("css selector", "input[type=radio]:checked")
    checked.send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element.get_attribute("value") == "best"
    scores = {entry["image_id"]: entry["CIDEr"] for entry in kept(run, "scores")}
    assert shown_ids(browser) == sorted(scores, key=lambda image_id: -scores[image_id])


def test_filter(page):
    from selenium.webdriver.common.keys import Keys

    search = page.find_element("css selector", "input[type=search]")
    search.send_keys("HOUSE")
    assert len(shown_ids(page)) == sum("house" in more(number) for number in range(IMAGES)) > 0
    assert texts(page, ".count") == [f"{len(shown_ids(page))} images"]
    search.send_keys(" no such word")
    assert shown_ids(page) == [] and texts(page, ".count") == ["0 images"]
    search.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.BACKSPACE)
    assert len(shown_ids(page)) == IMAGES


def test_what_data_say_is_text(page, run):
    """A reference, the image ids and the name of the run are markup; nothing of it comes to life."""
    assert page.title == f"{run.name} - blipds"
    assert page.find_element("tag name", "h1").text == run.name
    assert HOSTILE in texts(page, ".references li")
    assert page.execute_script("return document.querySelectorAll('h1 i, .id b, img[src=x]').length") == 0
    assert page.execute_script("return document.scripts.length") == 1


def test_curves_and_table(page, run):
    assert texts(page, "#curves .chart h3") == [
        *("CIDEr", "BLEU-4", "METEOR", "ROUGE-L"),
        *("Training loss", "Learning rate", "Gradient norm", "Captions a second"),
    ]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = [line for line in lines if line["kind"] == "train"]
    points = page.execute_script("return document.querySelectorAll('.chart polyline')[4].points.length")
    assert points == len(loss)
    best = max((line for line in lines if line["kind"] == "eval"), key=lambda line: line["agg_metrics"])
    (row,) = page.find_elements("css selector", "tr.best")
    assert row.text.replace("\n", " ").startswith(f"{best['epoch'] + 1} best")
    assert f"{best['CIDEr']:.3f}" in row.text


def test_says_what_the_run_was(page):
    terms, values = texts(page, "dt"), texts(page, "dd")
    said = dict(zip(terms, values, strict=True))
    assert said["Trained on"] == f"{IMAGES} images, {3 * IMAGES} captions"
    assert said["Split val"] == f"{IMAGES} images, {3 * IMAGES} references"
    assert said["Progress"] == "step 48 of 48, epoch 24 of 24"
    assert {"Parameters", "Ranks", "Processor", "Versions", "Captions", "Time so far"} <= said.keys()
    (command,) = texts(page, "#run > pre")
    assert "launch/finetune.py --cfg-path" in command


def test_accessible(page):
    levels = page.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1 and all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    assert levels.count(1) == 1
    assert page.execute_script("return document.querySelectorAll('img:not([alt]), svg:not([aria-label])').length") == 0
    assert page.execute_script("return document.querySelectorAll('th:not([scope])').length") == 0


def test_can_be_touched(browser, rebuilt):
    """44 CSS pixels are what Apple's guidelines ask of anything to be touched; WCAG 2.2 asks for 24."""
    open_page(browser, rebuilt / "report.html", PHONE)
    low = browser.execute_script(
        """return [...document.querySelectorAll('button, nav a, summary, fieldset span, input[type=search]')]
           .filter(e => e.offsetParent && Math.min(e.offsetHeight, e.offsetWidth) < 44).map(e => e.outerHTML)"""
    )
    assert low == []


def test_dark_and_light(browser, run):
    def brightness():
        colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(",")))

    open_page(browser, run / "report.html", PHONE, "light")
    light = brightness()
    open_page(browser, run / "report.html", PHONE, "dark")
    assert brightness() < 3 * 64 < 3 * 192 < light


def test_rebuilt_with_cider_and_heat_maps(browser, rebuilt, run):
    open_page(browser, rebuilt / "report.html", DESKTOP)
    assert complaints(browser) == [] and len(requests(browser)) == 1
    choose(browser, "dataset")
    found = dict(zip(shown_ids(browser), texts(browser, ".cider"), strict=True))
    expected = {entry["image_id"]: f"CIDEr {entry['CIDEr']:.3f}" for entry in kept(run, "scores")}
    assert found.pop("<b>5</b>") == "CIDEr 0.000" and expected.pop("<b>5</b>")
    assert found == expected
    assert texts(browser, ".caption")[5] == HOSTILE and browser.title == "run - blipds"

    with_words = [
        card for card in browser.find_elements("class name", "card") if card.find_elements("class name", "words")
    ]
    assert len(with_words) == 6
    card = next(card for card in with_words if card.find_element("class name", "caption").text == "a small dog")
    buttons, heat = card.find_elements("css selector", ".words button"), card.find_element("class name", "heat")
    assert [button.text for button in buttons] == ["a", "small", "dog"]
    assert not heat.is_displayed()
    for button in buttons[:2]:
        browser.execute_script("arguments[0].click()", button)
        pressed = [other.text for other in buttons if other.get_attribute("aria-pressed") == "true"]
        assert pressed == [button.text] and heat.is_displayed()
        assert heat.get_attribute("alt") == f'where the decoder looked for "{button.text}"'
    browser.execute_script("arguments[0].click()", buttons[1])
    assert not heat.is_displayed()
    assert complaints(browser) == []


def test_a_failure_is_one_line(run, tmp_path):
    said = []
    (tmp_path / "report.html").mkdir()  # nothing can take its place
    shutil.copy(run / "config.yaml", tmp_path)
    assert write_report(tmp_path, [Shown("val", [], None)], said.append) is False
    assert len(said) == 1 and "report.html is not written: IsADirectoryError" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "report.html"]


def test_mistakes_are_one_line(tmp_path):
    process = launch(1, "launch/report.py", tmp_path, timeout=120)
    assert process.returncode == 1
    assert process.stdout == f"error: {tmp_path} is no run directory: it has no config.yaml\n"
