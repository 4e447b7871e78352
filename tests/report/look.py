"""Opens the report of any run in Chromium, at the width of a desk and of a phone, and takes screenshots to look at.

    PYTHONPATH=.:tests python tests/report/look.py output/caption_coco_base/RUN --output screenshots

Checks on the way what can be checked of any run: nothing is asked for or complained about, nothing is wider than the
screen, each gallery sorts both ways, and its captions are those in results/.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from browser import DESKTOP, PHONE, chromium, complaints, open_page, requests

SORT = """
const [gallery, order] = arguments;
gallery.querySelector(`input[value=${order}]`).click();
return [...gallery.querySelectorAll('.card')].filter(card => card.offsetParent).map(card => [
    card.querySelector('.id').textContent, card.querySelector('.caption').textContent, Number(card.dataset.cider)]);
"""
SHOW_HEAT = (
    "for (const w of document.querySelectorAll('.words')) w.children[Math.min(1, w.children.length - 1)].click()"
)


def check(browser: Any, run: Path, size: tuple[int, int]) -> None:
    report = run / "report.html"
    open_page(browser, report, size)
    assert requests(browser) == [report.resolve().as_uri()]
    width = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= size[0], width
    galleries = browser.find_elements("class name", "gallery")
    assert galleries, f"{report} shows no captions"
    for gallery in galleries:
        split = gallery.find_element("tag name", "h2").text.removeprefix("Captions of ")
        written = {
            (str(entry["image_id"]), entry["caption"] or "(empty)")
            for results in (run / "results").glob(f"{split}*.json")
            for entry in json.loads(results.read_text())
        }
        worst = browser.execute_script(SORT, gallery, "worst")
        best = browser.execute_script(SORT, gallery, "best")
        assert [cider for *_, cider in worst] == sorted(cider for *_, cider in worst)
        assert [cider for *_, cider in best] == sorted((cider for *_, cider in best), reverse=True)
        assert best[0][2] > worst[0][2] and {(name, caption) for name, caption, _ in worst + best} <= written
        print(f"{size[0]} wide, {split}: best {best[0]}, worst {worst[0]}")
    assert complaints(browser) == []


def screenshot(browser: Any, place: str, file: Path) -> None:
    """Of what is below an element, as far as the screen reaches."""
    browser.execute_script("document.querySelector(arguments[0]).scrollIntoView()", place)
    browser.execute_async_script("setTimeout(arguments[0], 500)")  # pictures are decoded as they come into sight
    browser.save_screenshot(str(file))
    print(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, default=Path("screenshots"), metavar="DIR")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for name, size in (("desktop", DESKTOP), ("phone", PHONE)):
            check(browser, args.run, size)
            for scheme in ("light", "dark"):
                open_page(browser, args.run / "report.html", size, scheme)
                for place in ("header", "#curves", "#metrics", "#captions-1", "#run"):
                    if place == "#captions-1":
                        browser.execute_script("document.querySelector('#captions-1 input[value=best]').click()")
                        browser.execute_script(SHOW_HEAT)
                    screenshot(browser, place, args.output / f"{name}_{scheme}_{place.strip('#')}.png")


if __name__ == "__main__":
    main()
