import re
from collections import defaultdict

import pytest
from pycocoevalcap.cider.cider import Cider

from blipds.data.shapes import (
    COLOURS,
    HELD_OUT_PAIRS,
    PAIRS,
    SHAPES,
    SIZES,
    TRAIN_PAIRS,
    Scene,
    SceneObject,
    make_scenes,
)

TRAIN, VAL = make_scenes("train", 400, seed=0), make_scenes("val", 400, seed=0)


def pairs_of(scene: Scene) -> set[tuple[str, str]]:
    return {(item.colour, item.shape) for item in scene.objects}


# --- what is in a split ---


def test_scenes_follow_from_split_seed_and_number():
    assert make_scenes("train", 10, seed=0) == TRAIN[:10]
    assert make_scenes("train", 10, seed=1) != TRAIN[:10]
    assert make_scenes("test", 10, seed=0) != VAL[:10]
    assert make_scenes("train", 1, seed=0)[0].open().tobytes() == TRAIN[0].open().tobytes()
    assert make_scenes("train", 1, seed=0)[0].captions() == TRAIN[0].captions()


def test_ids_are_unique():
    scenes = [*TRAIN, *VAL, *make_scenes("test", 400, seed=0), *make_scenes("train", 400, seed=1)]
    assert len({scene.id for scene in scenes}) == 1600
    assert TRAIN[7].id == "train-0-000007"


def test_scenes_are_the_same_on_every_python():
    """Pinned, since only some of `random`'s methods promise it; a deliberate change of the dataset changes this too."""
    assert VAL[0].objects == (SceneObject("star", "green", "small", VAL[0].objects[0].x, VAL[0].objects[0].y),)
    assert VAL[0].captions() == [
        "a small green star in the top left",
        "a small green star in the top left",
        "in the upper left corner is a small green star",
        "a small green star in the top left",
        "a little green star in the upper left corner",
    ]


def test_arithmetic_of_the_combinations():
    assert (len(PAIRS), len(TRAIN_PAIRS), len(HELD_OUT_PAIRS)) == (48, 40, 8)
    assert {colour for colour, _ in HELD_OUT_PAIRS} == set(COLOURS)
    for colour in COLOURS:
        assert sum(pair[0] == colour for pair in TRAIN_PAIRS) == 5
    for shape in SHAPES:
        assert sum(pair[1] == shape for pair in TRAIN_PAIRS) >= 6


def test_held_out_pairs_are_in_every_val_scene_and_in_no_train_scene():
    for scene in TRAIN:
        assert pairs_of(scene) <= set(TRAIN_PAIRS)
    for scene in [*VAL, *make_scenes("test", 400, seed=0)]:
        assert pairs_of(scene) & set(HELD_OUT_PAIRS)
    assert set().union(*map(pairs_of, TRAIN)) == set(TRAIN_PAIRS)
    assert set().union(*map(pairs_of, VAL)) == set(PAIRS)


def test_three_in_four_scenes_have_two_different_objects():
    pairs = [scene for scene in TRAIN if len(scene.objects) == 2]
    assert len(pairs) / len(TRAIN) == pytest.approx(0.75, abs=0.06)
    assert all(len(pairs_of(scene)) == 2 for scene in pairs)


# --- pictures ---


def test_objects_lie_inside_and_apart():
    for scene in TRAIN:
        for item in scene.objects:
            radius = SIZES[item.size]
            assert radius < item.x < 1 - radius and radius < item.y < 1 - radius
        if len(scene.objects) == 2:
            first, second = scene.objects
            distance = max(abs(first.x - second.x), abs(first.y - second.y))
            assert distance > SIZES[first.size] + SIZES[second.size]


@pytest.mark.parametrize("image_size", [64, 128])
def test_centres_have_the_objects_colour(image_size):
    for scene in TRAIN[:50]:
        image = scene.open(image_size)
        assert (image.mode, image.size) == ("RGB", (image_size, image_size))
        for item in scene.objects:
            colour = scene.background if item.shape == "ring" else COLOURS[item.colour]
            assert image.getpixel((round(item.x * image_size), round(item.y * image_size))) == colour


@pytest.mark.parametrize("size", SIZES)
def test_shapes_look_different_at_64_pixels(size):
    pictures = {}
    for shape in SHAPES:
        item = SceneObject(shape, "black", size, 0.5, 0.5)
        pictures[shape] = Scene(shape, (item,), (255, 255, 255)).open(64).convert("1", dither=0).tobytes()

    area = {shape: sum(8 - byte.bit_count() for byte in picture) for shape, picture in pictures.items()}
    for first in SHAPES:
        for second in SHAPES[: SHAPES.index(first)]:
            different = sum((a ^ b).bit_count() for a, b in zip(pictures[first], pictures[second], strict=True))
            assert different > 0.15 * max(area.values()), (first, second)


# --- captions ---


def centre_of_colour(scene: Scene, colour: str) -> tuple[float, float]:
    """Mean position of the pixels that have exactly this colour, measured on the picture."""
    image = scene.open(64)
    spots = [(x, y) for x in range(64) for y in range(64) if image.getpixel((x, y)) == COLOURS[colour]]
    return sum(x for x, _ in spots) / len(spots), sum(y for _, y in spots) / len(spots)


NOUN = rf"an? (?:\w+ )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
RELATION = re.compile(rf"{NOUN} (?:is )?(?:to the )?(left of|right of|above|over|below|under) {NOUN}$")


def test_relations_agree_with_the_picture():
    seen = defaultdict(int)
    for scene in TRAIN[:100]:
        if len(scene.objects) == 1 or scene.objects[0].colour == scene.objects[1].colour:
            continue
        for caption in scene.captions():
            found = RELATION.search(caption)
            if not found:
                assert re.fullmatch(f"{NOUN} and {NOUN}", caption), caption
                continue
            colour, _, relation, other_colour, _ = found.groups()
            x, y = centre_of_colour(scene, colour)
            other_x, other_y = centre_of_colour(scene, other_colour)
            holds = {
                "left of": x + 20 < other_x,
                "right of": x > other_x + 20,
                "above": y + 20 < other_y,
                "over": y + 20 < other_y,
                "below": y > other_y + 20,
                "under": y > other_y + 20,
            }
            assert holds[relation], (scene.id, caption)
            seen[relation] += 1
    assert len(seen) == 6


def test_positions_agree_with_the_picture():
    seen = set()
    for scene in TRAIN:
        if len(scene.objects) == 2:
            continue
        (item,) = scene.objects
        for caption in scene.captions():
            words = set(caption.split())
            assert bool(words & {"left"}) == (item.x < 0.35)
            assert bool(words & {"right"}) == (item.x > 0.65)
            assert bool(words & {"top", "upper"}) == (item.y < 0.35)
            assert bool(words & {"bottom", "lower"}) == (item.y > 0.65)
            seen |= words
    assert {"top", "upper", "bottom", "lower", "left", "right", "middle", "center"} <= seen


def test_captions_name_every_object():
    for scene in [*TRAIN, *VAL]:
        captions = scene.captions()
        assert len(captions) == 5
        for caption in captions:
            assert set(re.findall(NOUN, caption)) == pairs_of(scene), caption
            assert "a orange" not in caption


def likeliest_sentence(scene: Scene) -> str:
    nouns = [f"a {item.size} {item.colour} {item.shape}" for item in scene.objects]
    if len(nouns) == 1:
        (item,) = scene.objects
        column = "left" if item.x < 0.35 else "right"
        place = "middle" if 0.35 < item.x < 0.65 else f"{'top' if item.y < 0.35 else 'bottom'} {column}"
        return f"{nouns[0]} in the {place}"
    first, second = scene.objects
    relation = "left of" if second.x - first.x > second.y - first.y else "above"
    return f"{nouns[0]} {relation} {nouns[1]}"


def test_captions_vary_and_yet_can_be_predicted():
    captions = {scene.id: scene.captions() for scene in VAL}
    human, _ = Cider().compute_score(
        {name: others for name, (_, *others) in captions.items()}, {name: [one] for name, (one, *_) in captions.items()}
    )
    perfect, _ = Cider().compute_score(captions, {scene.id: [likeliest_sentence(scene)] for scene in VAL})
    assert 5.5 < human < 7.5
    assert 7.0 < perfect < 9.0
