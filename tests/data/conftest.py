"""What the tests of layouts share."""

import json

import pytest


@pytest.fixture(scope="session")
def photographs(shared):
    """The first 200 images of Flickr8k's validation split, in an order that is not the names'; captions stripped."""
    folder = shared / "data" / "flickr8k"
    entries = json.loads((folder / "annotations" / "val.json").read_text())[:200]
    images = [(folder / "images" / entry["image"], [text.strip() for text in entry["caption"]]) for entry in entries]
    return sorted(images)  # a folder has no other order to give
