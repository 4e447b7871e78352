import re
from collections import defaultdict
from pathlib import Path

import pytest
from pycocoevalcap.cider.cider import Cider

from blipds.data.shapes import (
    COLOURS,
    PAIRS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    is_held_out,
    make_scene,
    make_scenes,
)
from blipds.data.tokenizer import CaptionTokenizer
from blipds.models.blip.text_decoder import TextConfig

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
    assert [make_scene(scene.id) for scene in (TRAIN[5], VAL[5])] == [TRAIN[5], VAL[5]]


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


# --- which captions are right ---

BIG_RED_CIRCLE = SceneObject("circle", "red", "big", 0.25, 0.5)
SMALL_ORANGE_STAR = SceneObject("star", "orange", "small", 0.75, 0.49)


def drawing(*objects: SceneObject) -> Scene:
    return Scene("by hand", objects, (255, 255, 255))


@pytest.mark.parametrize(
    "caption",
    [
        "a big red circle left of a small orange star",
        "a large red circle is to the left of a little orange star",
        "there is a red circle left of an orange star",
        "a small orange star right of a big red circle",
        "an orange star is to the right of a red circle",
        "a red circle and a small orange star",
        "a little orange star and a big red circle",
    ],
)
def test_right_captions_of_two_objects_by_hand(caption):
    assert caption in drawing(BIG_RED_CIRCLE, SMALL_ORANGE_STAR).right_captions()


@pytest.mark.parametrize(
    "caption",
    [
        "a big red square left of a small orange star",  # shape
        "a big red circle left of a small yellow star",  # colour
        "a big red circle left of a big orange star",  # size
        "a big red star left of a small orange circle",  # each shape with the other's colour
        "a big red circle right of a small orange star",  # side
        "a small orange star left of a big red circle",
        "a big red circle above a small orange star",  # axis
        "a big red circle left of a big red circle",  # one object twice
        "a big red circle in the middle",  # an object is missing
        "a big red circle left of a small orange star star",  # no sentence
        "a big red circle left of an small orange star",
        "",
    ],
)
def test_wrong_captions_of_two_objects_by_hand(caption):
    assert caption not in drawing(BIG_RED_CIRCLE, SMALL_ORANGE_STAR).right_captions()


def test_above_and_below_by_hand():
    captions = drawing(
        SceneObject("ring", "blue", "small", 0.5, 0.25), SceneObject("cross", "pink", "big", 0.51, 0.75)
    ).right_captions()
    assert {"a blue ring above a pink cross", "a big pink cross is under a small blue ring"} <= captions
    assert not captions & {"a blue ring below a pink cross", "a pink cross over a blue ring"}
    assert not captions & {"a blue ring left of a pink cross", "a blue ring right of a pink cross"}


def test_one_object_by_hand():
    captions = drawing(SceneObject("triangle", "green", "small", 0.26, 0.74)).right_captions()
    nouns = ("a green triangle", "a small green triangle", "a little green triangle")
    places = ("bottom left", "lower left corner")
    assert captions == {
        sentence
        for noun in nouns
        for place in places
        for sentence in (
            f"{noun} in the {place}",
            f"{noun} at the {place}",
            f"there is {noun} in the {place}",
            f"in the {place} is {noun}",
        )
    }


def test_given_captions_are_right_and_those_of_other_drawings_wrong():
    for scene, other in zip(VAL, TRAIN, strict=True):
        assert set(scene.captions()) <= scene.right_captions()
        assert not scene.right_captions() & other.right_captions()


def test_quickstart_vocabulary_is_the_words_of_the_captions():
    """run_configs/shapes_tiny.yaml reads it; a word that it lacked would be learnt as [UNK]."""
    folder = Path(__file__).parents[2] / "run_configs"
    special, words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], {"picture", "of"}
    for scene in make_scenes("train", 4000, seed=0):
        words |= set(" ".join(scene.captions()).split())
    assert (folder / "vocabulary_shapes.txt").read_text().splitlines() == special + sorted(words)
    tokenizer = CaptionTokenizer(str(folder / "vocabulary_shapes.txt"))
    assert TextConfig.from_json(folder / "med_config_shapes.json").vocab_size == len(tokenizer)
