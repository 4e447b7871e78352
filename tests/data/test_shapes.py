import re
from collections import defaultdict

import pytest
from pycocoevalcap.cider.cider import Cider

from blipds.data.shapes import COLOURS, PAIRS, POSITIONS, SHAPES, SIZES, Scene, SceneObject, is_held_out, make_scenes

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


def combination(scene: Scene):
    """What may be held out of training: the objects in any order, and a single one's place."""
    pairs = frozenset(pairs_of(scene))
    return pairs if len(scene.objects) == 2 else (pairs, position_of(scene.objects[0]))


def position_of(item: SceneObject) -> str:
    return min(POSITIONS, key=lambda name: abs(POSITIONS[name][0] - item.x) + abs(POSITIONS[name][1] - item.y))


def test_the_rule_by_hand():
    # red is colour 0 and blue 4; circle is shape 0, square 1, star 3; top left is position 0 and top right 1
    assert is_held_out([("red", "circle"), ("blue", "square")], None)  # 0 + 0 + 4 + 1 = 5
    assert not is_held_out([("red", "circle"), ("blue", "star")], None)  # 7
    assert is_held_out([("blue", "circle")], "top right")  # 4 + 0 + 1 = 5
    assert not is_held_out([("blue", "circle")], "top left")  # 4


def test_no_combination_of_val_is_in_train():
    train = {combination(scene) for scene in make_scenes("train", 4000, seed=0)}
    assert not train & {combination(scene) for scene in [*VAL, *make_scenes("test", 400, seed=0)]}


def test_every_object_is_in_train():
    assert set().union(*map(pairs_of, make_scenes("train", 1000, seed=0))) == set(PAIRS)


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
        image = scene.open(image_size=image_size)
        assert (image.mode, image.size) == ("RGB", (image_size, image_size))
        for item in scene.objects:
            colour = scene.background if item.shape == "ring" else COLOURS[item.colour]
            assert image.getpixel((round(item.x * image_size), round(item.y * image_size))) == colour


@pytest.mark.parametrize("size", SIZES)
def test_shapes_look_different_at_64_pixels(size):
    pictures = {}
    for shape in SHAPES:
        item = SceneObject(shape, "black", size, 0.5, 0.5)
        pictures[shape] = Scene(shape, (item,), (255, 255, 255)).open(image_size=64).convert("1", dither=0).tobytes()

    area = {shape: sum(8 - byte.bit_count() for byte in picture) for shape, picture in pictures.items()}
    for first in SHAPES:
        for second in SHAPES[: SHAPES.index(first)]:
            different = sum((a ^ b).bit_count() for a, b in zip(pictures[first], pictures[second], strict=True))
            assert different > 0.15 * max(area.values()), (first, second)


# --- captions ---


def centre_of_colour(scene: Scene, colour: str) -> tuple[float, float]:
    """Mean position of the pixels that have exactly this colour, measured on the picture."""
    image = scene.open(image_size=64)
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
