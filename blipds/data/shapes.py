"""A dataset drawn on the fly: coloured shapes, where they are, and five captions for each picture.

The quickstart's input, without a file or a network. A picture holds one shape with a position ("in the top left") or,
three times in four, two shapes with a relation ("left of", "above", ...). Everything follows from (split, seed, index):
the same three give the same pixels and captions on any machine.

A fifth of the combinations is held out of training: of two objects (colour, shape) together, and of one object with one
of 5 positions. Add up the numbers of the colours, shapes and position: where 5 divides the sum, no training picture
shows that combination, and every picture of any other split does. So a captioner has to read each object for itself.

The captions say where things are, so pictures must not be flipped: use the processor `blip_image_eval` in training too.

`Scene.right_captions` knows every sentence that is true of a picture, so generated captions can be counted as right or
wrong, where CIDEr only compares words.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import TypeVar

from PIL import Image, ImageDraw

from blipds.data.processors import Shrink

T = TypeVar("T")
Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (220, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 220, 20),
    "green": (30, 160, 60),
    "blue": (30, 80, 220),
    "purple": (130, 40, 170),
    "pink": (255, 130, 190),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.12, "big": 0.19}  # radius of the circle around a shape, as a share of the picture's side

PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT = 5  # one combination in so many

NUM_CAPTIONS = 5
SUPERSAMPLING = 2  # pictures are drawn this much larger and averaged down: smooth edges, 0.1 ms at 128 pixels

# Where a single shape may be: (x, y) of its centre, as shares of the picture's side.
POSITIONS = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
    "middle": (0.50, 0.50),
}
JITTER = 0.01


# --- scenes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SceneObject:
    """One shape; x and y of its centre as shares of the picture's side, from the top left."""

    shape: str
    colour: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """One picture and what there is to say about it."""

    id: str
    objects: tuple[SceneObject, ...]  # one or two; of two, the left or upper one comes first
    background: Colour

    def open(self, shrink: Shrink | None = None, *, image_size: int = 128) -> Image.Image:
        """The picture, RGB, image_size x image_size: too small for `shrink` to matter."""
        side = image_size * SUPERSAMPLING
        image = Image.new("RGB", (side, side), self.background)
        canvas = ImageDraw.Draw(image)
        for item in self.objects:
            _draw_shape(canvas, item, side)
        return image.reduce(SUPERSAMPLING)

    def captions(self) -> list[str]:
        """Five captions, the same at every call."""
        rng = random.Random(f"captions of {self.id}")
        return [_caption(self.objects, rng) for _ in range(NUM_CAPTIONS)]

    def right_captions(self) -> set[str]:
        """Every sentence of the captions' grammar that is true of this picture, with sizes said or left out.

        Two objects may come in either order. A sentence that is not in the set has a wrong word, or is none.
        """
        return {
            template.format(first=nouns[0], second=nouns[-1], **words)
            for objects in permutations(self.objects)
            for nouns in product(*map(_noun_phrases, objects))
            for template in (_ONE_OBJECT if len(objects) == 1 else _TWO_OBJECTS)
            for words in _place_words(objects)
        }


def make_scenes(split: str, count: int, seed: int) -> list[Scene]:
    """The first `count` scenes of a split: "train" shows no held-out combination, any other split nothing else.

    Scene k is the same whatever `count` is.
    """
    return [make_scene(f"{split}-{seed}-{number:06d}") for number in range(count)]


def make_scene(scene_id: str) -> Scene:
    """The scene with this id, "<split>-<seed>-<number>"."""
    rng = random.Random(scene_id)
    unseen = not scene_id.startswith("train-")
    background = (rng.randint(205, 250), rng.randint(205, 250), rng.randint(205, 250))
    alone = rng.random() < 0.25
    position = rng.choice(list(POSITIONS))
    while True:
        pairs = rng.sample(PAIRS, 1 if alone else 2)
        if is_held_out(pairs, position if alone else None) == unseen:
            break
    if alone:
        x, y = POSITIONS[position]
        spots = [(x + _jitter(rng), y + _jitter(rng))]
    else:
        across = rng.choice((0.25, 0.5, 0.75))  # the coordinate that both share, but for a little
        spots = [(0.25 + _jitter(rng), across + _jitter(rng)), (0.75 + _jitter(rng), across + _jitter(rng))]
        if rng.random() < 0.5:
            spots = [(y, x) for x, y in spots]
    objects = tuple(
        SceneObject(shape, colour, rng.choice(list(SIZES)), x, y)
        for (colour, shape), (x, y) in zip(pairs, spots, strict=True)
    )
    return Scene(scene_id, objects, background)


def is_held_out(pairs: Sequence[tuple[str, str]], position: str | None) -> bool:
    """Whether a combination of objects (colour, shape), or of one object and its position, is kept from training."""
    numbers = [list(COLOURS).index(colour) + SHAPES.index(shape) for colour, shape in pairs]
    if position is not None:
        numbers.append(list(POSITIONS).index(position))
    return sum(numbers) % HELD_OUT == 0


def _jitter(rng: random.Random) -> float:
    return rng.uniform(-JITTER, JITTER)


# --- drawing ---------------------------------------------------------------------------------------------------------


def _draw_shape(canvas: ImageDraw.ImageDraw, item: SceneObject, side: int) -> None:
    x, y, radius = item.x * side, item.y * side, SIZES[item.size] * side
    colour = COLOURS[item.colour]
    box = (x - radius, y - radius, x + radius, y + radius)
    if item.shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif item.shape == "ring":
        canvas.ellipse(box, outline=colour, width=round(0.36 * radius))
    else:
        outline = [(x + radius * dx, y + radius * dy) for dx, dy in _OUTLINES[item.shape]]
        canvas.polygon(outline, fill=colour)


def _spikes(radii: Sequence[float]) -> list[tuple[float, float]]:
    """Corners at these distances from the centre, evenly turned, the first straight up."""
    turn = 2 * math.pi / len(radii)
    return [(radius * math.sin(turn * k), -radius * math.cos(turn * k)) for k, radius in enumerate(radii)]


# Corners as (x, y) in units of the radius, y downwards.
_OUTLINES = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)],
    "star": _spikes([1.05, 0.45] * 5),
    "cross": [
        (-0.3, -1.0), (0.3, -1.0), (0.3, -0.3), (1.0, -0.3), (1.0, 0.3), (0.3, 0.3),
        (0.3, 1.0), (-0.3, 1.0), (-0.3, 0.3), (-1.0, 0.3), (-1.0, -0.3), (-0.3, -0.3),
    ],
}  # fmt: skip


# --- captions --------------------------------------------------------------------------------------------------------
# The weights balance two numbers (measured on 1,000 validation scenes, CIDEr): one caption of a scene scored against
# its other four gets 6.4, so nothing is gained by rote; always the likeliest sentence, without a mistake, gets 7.8.

_RELATIONS = {
    "left": {"left of": 6, "to the left of": 1},
    "right": {"right of": 6, "to the right of": 1},
    "above": {"above": 6, "over": 1},
    "below": {"below": 6, "under": 1},
}
_TWO_OBJECTS = {
    "{first} {relation} {second}": 10,
    "{first} is {relation} {second}": 1,
    "there is {first} {relation} {second}": 1,
    "{second} {opposite} {first}": 2,
    "{first} and {second}": 1,
}
_ONE_OBJECT = {
    "{first} in the {position}": 10,
    "{first} at the {position}": 1,
    "there is {first} in the {position}": 1,
    "in the {position} is {first}": 1,
}
_POSITION_WORDS = {
    "top left": {"top left": 6, "upper left corner": 1},
    "top right": {"top right": 6, "upper right corner": 1},
    "bottom left": {"bottom left": 6, "lower left corner": 1},
    "bottom right": {"bottom right": 6, "lower right corner": 1},
    "middle": {"middle": 6, "center": 1},
}
_SIZE_WORDS = {"small": {"small": 16, "little": 1}, "big": {"big": 16, "large": 1}}
_SIZES_SAID = 0.9  # share of the captions that mention sizes


def _caption(objects: tuple[SceneObject, ...], rng: random.Random) -> str:
    with_size = rng.random() < _SIZES_SAID
    nouns = [_noun_phrase(item, _pick(_SIZE_WORDS[item.size], rng) if with_size else "") for item in objects]
    if len(objects) == 1:
        position = _pick(_POSITION_WORDS[_position(objects[0])], rng)
        return _pick(_ONE_OBJECT, rng).format(first=nouns[0], position=position)
    first, second = objects
    return _pick(_TWO_OBJECTS, rng).format(
        first=nouns[0],
        second=nouns[1],
        relation=_pick(_RELATIONS[_relation(first, second)], rng),
        opposite=_pick(_RELATIONS[_relation(second, first)], rng),
    )


def _noun_phrase(item: SceneObject, size: str) -> str:
    if size:
        return f"a {size} {item.colour} {item.shape}"
    return f"{'an' if item.colour == 'orange' else 'a'} {item.colour} {item.shape}"


def _noun_phrases(item: SceneObject) -> list[str]:
    return [_noun_phrase(item, size) for size in ("", *_SIZE_WORDS[item.size])]


def _place_words(objects: Sequence[SceneObject]) -> list[dict[str, str]]:
    """All that the templates may be filled with, beside the objects."""
    if len(objects) == 1:
        return [{"position": words} for words in _POSITION_WORDS[_position(objects[0])]]
    first, second = objects
    pairs = product(_RELATIONS[_relation(first, second)], _RELATIONS[_relation(second, first)])
    return [{"relation": relation, "opposite": opposite} for relation, opposite in pairs]


def _relation(first: SceneObject, second: SceneObject) -> str:
    """Where the first object is, seen from the second."""
    across, down = second.x - first.x, second.y - first.y
    if abs(across) > abs(down):
        return "left" if across > 0 else "right"
    return "above" if down > 0 else "below"


def _position(item: SceneObject) -> str:
    return min(POSITIONS, key=lambda name: math.dist(POSITIONS[name], (item.x, item.y)))


def _pick(weights: dict[T, int], rng: random.Random) -> T:
    return rng.choices(list(weights), list(weights.values()))[0]
