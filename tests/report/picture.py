"""The README's picture: six drawings of the quickstart's test split, with the captions that a run gave them.

    python tests/report/picture.py output/shapes_tiny/RUN [.github/captions.png]

Takes the first six of the split, whatever the model says of them.
"""

import argparse
import json
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from blipds.config.run import load_run_config
from blipds.data.shapes import make_scenes

COLUMNS, ROWS = 3, 2
SIDE, GAP, TEXT = 300, 24, 64  # pixels: a drawing, what is between two, the caption's two lines below it
INK, PAPER, EDGE = (31, 35, 40), (255, 255, 255), (208, 215, 222)


def picture(run_dir: Path) -> Image.Image:
    config, _ = load_run_config(run_dir / "config.yaml")
    (results,) = (run_dir / "results").glob("test_epoch*.json")
    captions = {entry["image_id"]: entry["caption"] for entry in json.loads(results.read_text())}
    font = ImageFont.load_default(size=20)
    page = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, ROWS * (SIDE + TEXT + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(page)
    for index, scene in enumerate(make_scenes("test", COLUMNS * ROWS, config.run.seed)):
        left, top = GAP + index % COLUMNS * (SIDE + GAP), GAP + index // COLUMNS * (SIDE + TEXT + GAP)
        page.paste(scene.open(image_size=SIDE), (left, top))
        draw.rectangle((left - 1, top - 1, left + SIDE, top + SIDE), outline=EDGE)
        draw.multiline_text((left, top + SIDE + 8), textwrap.fill(captions[scene.id], 32), INK, font, spacing=6)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("output", type=Path, nargs="?", default=Path(".github/captions.png"), metavar="PNG")
    args = parser.parse_args()
    picture(args.run).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
