"""The toy world: small pictures, what is true of them, and the files a real data set would have.

    python -m toy.world                     writes toy/data (about 20 seconds)
    python -m toy.world --sheet sheet.png   draws a contact sheet of a dozen scenes

A scene is a 48 x 48 picture with a background and four places; two to four of them hold an object
with a size, a color and a shape. One example, worked by hand:

    Scene(
        background="navy",
        objects=(Thing("large", "cyan", "heart"), None, Thing("small", "pink", "square"), None),
    )

            left      right      the large cyan heart is in the top left,
    top     heart       -        the small pink square in the bottom left, so the heart is above
    bottom  square      -        the square; neither is left of the other, they share a column.

    a short caption   "A pink square is below a cyan heart."      says a part of the truth
    its paraphrase    "The picture shows a cyan heart above a pink square."
    a long caption    "There are two objects on a navy background. In the top left there is ..."
    swap_att          "A cyan square is below a pink heart."      same words, false: who owns what?
    the twin          the scene with the two colors exchanged, of which that negative is true and
                      the caption false

The pictures of a data set are alike in groups: photographs of kitchens show the same few things. So
the scenes of the files have one of 16 themes, each of four of the 12 colors and four of the 16
shapes. Most pictures of a batch can be told apart by their words alone, the short-cut that makes a
contrastive model read captions like bags of words; some only by who owns which.

Every caption is written from the scene, then read back by `truth`, which knows only the grammar of
the sentences and the scene. Captions have to pass it, negatives have to fail it. A scene belongs to
the split that a hash of its set of (color, shape) pairs chooses, so the sets of the test scenes
never occur in training.
"""

import argparse
import functools
import itertools
import json
import random
import re
import shutil
import zlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

VERSION = 3  # raise it whenever the files would change: an older folder is then built anew
TRAINING_PICTURES = "images/train.bin"  # all of them, as PNGs one behind the other
IMAGE_SIZE = 48  # pixels; a place is a quarter of the picture
PLACE_SIZE = IMAGE_SIZE // 2
JITTER = 2  # pixels an object may lie off the middle of its place

SIZES = {"small": 12, "large": 19}  # pixels
COLORS = {
    "red": (220, 40, 40),
    "green": (35, 140, 55),
    "blue": (50, 80, 235),
    "yellow": (245, 220, 50),
    "purple": (130, 50, 190),
    "orange": (250, 140, 30),
    "white": (245, 245, 245),
    "cyan": (60, 215, 225),
    "pink": (250, 165, 195),
    "lime": (165, 240, 60),
    "magenta": (240, 50, 200),
    "brown": (150, 95, 45),
}
# Drawn in this order in the unit square, y down: box and ellipse by left, top, right, bottom,
# polygon by its corners.
SHAPES = {
    "circle": [("ellipse", 0, 0, 1, 1)],
    "square": [("box", 0.06, 0.06, 0.94, 0.94)],
    "triangle": [("polygon", 0.5, 0, 1, 1, 0, 1)],
    "cross": [("box", 0.36, 0, 0.64, 1), ("box", 0, 0.36, 1, 0.64)],
    "diamond": [("polygon", 0.5, 0, 1, 0.5, 0.5, 1, 0, 0.5)],
    "ring": [("ellipse", 0, 0, 1, 1), ("erase ellipse", 0.25, 0.25, 0.75, 0.75)],
    "star": [("polygon", 0.5, 0, 0.63, 0.35, 1, 0.36, 0.71, 0.6, 0.82, 0.97, 0.5, 0.76)]
    + [("polygon", 0.5, 0, 0.37, 0.35, 0, 0.36, 0.29, 0.6, 0.18, 0.97, 0.5, 0.76)],
    "heart": [("ellipse", 0, 0.05, 0.54, 0.6), ("ellipse", 0.46, 0.05, 1, 0.6)]
    + [("polygon", 0.03, 0.42, 0.97, 0.42, 0.5, 1)],
    "moon": [("ellipse", 0, 0, 1, 1), ("erase ellipse", 0.32, -0.08, 1.2, 0.85)],
    "arrow": [("polygon", 1, 0.5, 0.48, 0, 0.48, 1), ("box", 0, 0.34, 0.5, 0.66)],
    "frame": [("box", 0, 0, 1, 1), ("erase box", 0.25, 0.25, 0.75, 0.75)],
    "bar": [("box", 0, 0.3, 1, 0.7)],
    "hourglass": [("polygon", 0, 0, 1, 0, 0.5, 0.55), ("polygon", 0, 1, 1, 1, 0.5, 0.45)],
    "dome": [("ellipse", 0, 0.15, 1, 1.5), ("erase box", 0, 0.82, 1, 1)],
    "ladder": [
        ("box", 0, 0, 0.24, 1),
        ("box", 0.76, 0, 1, 1),
        ("box", 0, 0.2, 1, 0.4),
        ("box", 0, 0.62, 1, 0.82),
    ],
    "corner": [("box", 0, 0, 0.34, 1), ("box", 0, 0.66, 1, 1)],
}
BACKGROUNDS = {
    "black": (12, 12, 12),
    "gray": (120, 120, 120),
    "maroon": (85, 15, 30),
    "navy": (20, 20, 90),
}
PLACES = ["top left", "top right", "bottom left", "bottom right"]  # p is row p // 2, column p % 2
RELATIONS = ["left of", "right of", "above", "below"]
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
ATTRIBUTES = {"size": list(SIZES), "color": list(COLORS), "shape": list(SHAPES)}  # a Thing's fields
OPENINGS = ["", "there is ", "a picture of ", "the picture shows "]
# So many that a random batch of 128 has about eight scenes of each.
THEMES = 16


class Thing(NamedTuple):
    """An object of a scene, or what a caption says about one: None where it says nothing."""

    size: str | None
    color: str | None
    shape: str


# What a negative may say is there as well.
EXTRA_THINGS = [Thing(None, color, shape) for color in COLORS for shape in SHAPES]


class Scene(NamedTuple):
    background: str
    objects: tuple[Thing | None, ...]  # one entry a place

    def occupied(self) -> list[int]:
        return [place for place in range(4) if self.objects[place]]


class Caption(NamedTuple):
    """What a short caption says; `str(caption)` is its sentence.

    A relation holds between the first two things."""

    opening: str
    things: tuple[Thing, ...]
    relation: str | None = None
    place: str | None = None  # of the only thing
    background: str | None = None

    def __str__(self) -> str:
        phrases = [with_article(thing) for thing in self.things]
        if self.relation:
            verb = "" if self.opening else "is "
            text = f"{phrases[0]} {verb}{self.relation} {', with '.join(phrases[1:])}"
        elif len(phrases) == 1:
            text = phrases[0]
        else:
            text = f"{', '.join(phrases[:-1])} and {phrases[-1]}"
        if self.place:
            text += f" in the {self.place}"
        if self.background:
            text += f" on a {self.background} background"
        text = self.opening + text + "."
        return text[0].upper() + text[1:]


def name(thing: Thing) -> str:
    return " ".join(word for word in thing if word)


def with_article(thing: Thing) -> str:
    words = name(thing)
    sounds_like_a_vowel = words[0] in "aeiou" or words.startswith("hour")
    return f"an {words}" if sounds_like_a_vowel else f"a {words}"


def holds(relation: str, first: int, second: int) -> bool:
    """Does the object at place `first` stand in this relation to the one at place `second`?"""
    row, column = divmod(first, 2)
    other_row, other_column = divmod(second, 2)
    if relation == "left of":
        return column < other_column
    if relation == "right of":
        return column > other_column
    if relation == "above":
        return row < other_row
    return row > other_row  # below


# ---- scenes and pictures


def split_of(objects: tuple[Thing | None, ...]) -> str:
    """The split that a scene belongs to: "train" (80 %), "val" (10 %) or "test" (10 %).

    It is chosen by a hash of the scene's set of (color, shape) pairs."""
    pairs = sorted(f"{thing.color} {thing.shape}" for thing in objects if thing)
    digit = zlib.crc32(", ".join(pairs).encode()) % 10
    if digit == 0:
        return "test"
    if digit == 1:
        return "val"
    return "train"


def is_valid(objects: tuple[Thing | None, ...], split: str) -> bool:
    """Whether no two objects share color and shape (a caption could not tell them apart), and the
    set is of this split."""
    pairs = [thing[1:] for thing in objects if thing]
    return len(set(pairs)) == len(pairs) and split_of(objects) == split


class Theme(NamedTuple):
    """What is found together. Photographs of kitchens, or of beaches, show the same few things."""

    colors: list[str]
    shapes: list[str]


def sample_theme(rng: random.Random) -> Theme:
    """One of THEMES, each of four colors and four shapes: the same in every world and split."""
    theme = random.Random(f"theme {rng.randrange(THEMES)}")
    return Theme(theme.sample(list(COLORS), 4), theme.sample(list(SHAPES), 4))


def sample_scene(
    rng: random.Random, split: str, number: int | None = None, theme: Theme | None = None
) -> Scene:
    """A scene of `split` with `number` objects (by default two to four, rarely four).

    It is of a theme; without one, of all colors and shapes."""
    number = number or rng.choices([2, 3, 4], [0.5, 0.35, 0.15])[0]
    theme = theme or Theme(list(COLORS), list(SHAPES))
    while True:
        objects: list[Thing | None] = [None] * 4
        for place in rng.sample(range(4), number):
            size = rng.choice(list(SIZES))
            color = rng.choice(theme.colors)
            shape = rng.choice(theme.shapes)
            objects[place] = Thing(size, color, shape)
        if is_valid(tuple(objects), split):
            return Scene(rng.choice(list(BACKGROUNDS)), tuple(objects))


def exchange(
    things: tuple[Thing | None, ...], first: int, second: int, what: str
) -> tuple[Thing | None, ...]:
    """The same things, but two of them have exchanged their `what`.

    what: "size", "color", "shape", or "place", where they stand in `things`."""
    a = things[first]
    b = things[second]
    swapped = list(things)
    if what == "place":
        swapped[first] = b
        swapped[second] = a
    else:
        swapped[first] = a._replace(**{what: getattr(b, what)})
        swapped[second] = b._replace(**{what: getattr(a, what)})
    return tuple(swapped)


def sample_twin(scene: Scene, rng: random.Random, split: str) -> Scene:
    """A scene of the same split, made of the same words: two objects have exchanged one attribute
    or their places."""
    twins = []
    for first, second in itertools.combinations(scene.occupied(), 2):
        for what in ("size", "color", "place"):
            objects = exchange(scene.objects, first, second, what)
            if objects != scene.objects and is_valid(objects, split):
                twins.append(objects)
    # There is one: two objects never share color and shape, so their places can be exchanged.
    return Scene(scene.background, rng.choice(twins))


@functools.cache
def shape_mask(shape: str, size: int) -> np.ndarray:
    """How much of each pixel a shape covers, (size, size, 1) float in [0, 1].

    It is drawn eight times larger, then shrunk: its edges become soft."""
    image = Image.new("L", (8 * size, 8 * size))
    draw = ImageDraw.Draw(image)
    paint = {"polygon": draw.polygon, "box": draw.rectangle, "ellipse": draw.ellipse}
    for form, *unit in SHAPES[shape]:
        corners = [8 * size * value for value in unit]
        fill = 0 if form.startswith("erase") else 255
        paint[form.removeprefix("erase ")](corners, fill=fill)
    small = image.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, np.float32)[:, :, None] / 255


def render(scene: Scene, rng: random.Random) -> np.ndarray:
    """The picture, (48, 48, 3) uint8.

    `rng` moves every object a little, and changes its brightness a little."""
    pixels = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    pixels[:] = BACKGROUNDS[scene.background]
    for place in scene.occupied():
        thing = scene.objects[place]
        side = SIZES[thing.size]
        mask = shape_mask(thing.shape, side)
        row, column = divmod(place, 2)
        top = PLACE_SIZE * row + sample_shift(PLACE_SIZE - side, rng)
        left = PLACE_SIZE * column + sample_shift(PLACE_SIZE - side, rng)
        color = np.array(COLORS[thing.color], np.float32) + rng.uniform(-15, 15)
        window = pixels[top : top + side, left : left + side]  # a view
        window += mask * (color - window)
    return pixels.clip(0, 255).astype(np.uint8)


def sample_shift(free: int, rng: random.Random) -> int:
    """Where an object begins in a place that has so many pixels more than it: near the middle."""
    shift = free // 2 + rng.randint(-JITTER, JITTER)
    return min(max(shift, 0), free)


# ---- captions


def sample_caption(
    scene: Scene, rng: random.Random, number: int | None = None, related: bool | None = None
) -> Caption:
    """A true but partial short caption.

    number: of objects that it names, one to three; None: mostly two.
    related: whether it says how the first two lie to each other; None: in three of four."""
    occupied = scene.occupied()
    if number is None:
        number = rng.choices([1, 2, 3], [0.1, 0.7, 0.2])[0]
    number = min(number, len(occupied))
    places = rng.sample(occupied, number)
    things = []
    for place in places:
        thing = scene.objects[place]
        size = thing.size if rng.random() < 0.5 else None
        color = thing.color if rng.random() < 0.92 else None
        things.append(Thing(size, color, thing.shape))
    if related is None:
        related = rng.random() < 0.75
    relation = None
    place = None
    if number > 1 and related:
        relation = rng.choice([relation for relation in RELATIONS if holds(relation, *places[:2])])
    if number == 1 and rng.random() < 0.5:
        place = PLACES[places[0]]
    opening = rng.choice(OPENINGS)
    background = scene.background if rng.random() < 0.35 else None
    return Caption(opening, tuple(things), relation, place, background)


def paraphrase(caption: Caption, rng: random.Random) -> Caption:
    """Another caption that says the same: with another opening, and the first two things in the
    other order."""
    others = [opening for opening in OPENINGS if opening != caption.opening]
    first_two = caption.things[:2]
    return caption._replace(
        opening=rng.choice(others),
        things=first_two[::-1] + caption.things[2:],
        relation=OPPOSITE.get(caption.relation),
    )


def long_caption(scene: Scene, rng: random.Random) -> str:
    """Everything about the scene, in 50 to 74 tokens: the number of objects, the background, each
    object with its place, two relations."""
    occupied = scene.occupied()
    sentences = [f"There are {NUMBERS[len(occupied)]} objects on a {scene.background} background."]
    for place in occupied:
        sentences.append(f"In the {PLACES[place]} there is {with_article(scene.objects[place])}.")
    facts = []
    for first, second in itertools.permutations(occupied, 2):
        for relation in RELATIONS:
            if holds(relation, first, second):
                facts.append((first, relation, second))
    for first, relation, second in rng.sample(facts, 2):
        one = name(scene.objects[first]._replace(size=None))
        other = name(scene.objects[second]._replace(size=None))
        sentences.append(f"The {one} is {relation} the {other}.")
    return " ".join(sentences)


def possible_changes(caption: Caption, picked: int) -> dict[str, list[dict]]:
    """Everything that may be changed to make a negative, by SugarCrepe's kinds. A change is what
    `_replace` takes; of attributes only those of the thing `picked` are changed."""
    things = caption.things
    changes = defaultdict(list)
    for what, words in ATTRIBUTES.items():
        said = getattr(things[picked], what)
        if what == "shape":
            kind = "replace_obj"
        else:
            kind = "replace_att" if said else "add_att"
        for word in words:
            changed = things[picked]._replace(**{what: word})
            changes[kind].append({"things": (*things[:picked], changed, *things[picked + 1 :])})
        if len(things) > 1:
            kind = "swap_obj" if what == "shape" else "swap_att"
            changes[kind].append({"things": exchange(things, 0, 1, what)})
    if caption.relation:
        changes["replace_rel"].append({"relation": OPPOSITE[caption.relation]})
    if len(things) < 3:
        for thing in EXTRA_THINGS:
            changes["add_obj"].append({"things": (*things, thing), "place": None})
    if not caption.background:
        for background in BACKGROUNDS:
            changes["add_att"].append({"background": background})
    return changes


def sample_negatives(
    caption: Caption, scene: Scene, rng: random.Random, known: Iterable[str] = ()
) -> dict[str, Caption]:
    """For each SugarCrepe file, but those `known`, a caption that differs from `caption` in one
    respect and is false of `scene`.

    A kind is missing where the caption gives no chance for it, e.g. swap_obj with one thing."""
    table = SceneTable([scene])
    negatives = {}
    picked = rng.randrange(len(caption.things))
    for kind, changes in possible_changes(caption, picked).items():
        rng.shuffle(changes)  # also where the kind is known: the world depends on it
        if kind in known:
            continue
        for change in changes:
            negative = caption._replace(**change)
            if str(negative) != str(caption) and not truth(str(negative), table)[0]:
                negatives[kind] = negative
                break
    return negatives


# ---- truth


def one_of(words) -> str:
    return "(" + "|".join(words) + ")"


THING = re.compile(rf"(?:an?|the) (?:{one_of(SIZES)} )?(?:{one_of(COLORS)} )?{one_of(SHAPES)}")
RELATION = re.compile(one_of(RELATIONS))
BACKGROUND = re.compile(one_of(BACKGROUNDS))
NUMBER = re.compile(one_of(NUMBERS.values()))
PLACE = re.compile(f"in the {one_of(PLACES)}")
OBJECT_AT_PLACE = re.compile(
    rf"{PLACE.pattern} there is an? {one_of(SIZES)} {one_of(COLORS)} {one_of(SHAPES)}"
)
SENTENCE = re.compile(
    rf"there are {NUMBER.pattern} objects on a {BACKGROUND.pattern} background"
    rf"|(there is |a picture of |the picture shows |{PLACE.pattern} there is )?{THING.pattern}"
    rf"((?: is)? {RELATION.pattern} {THING.pattern})?((, with|,| and) {THING.pattern})*"
    rf"( {PLACE.pattern})?( on a {BACKGROUND.pattern} background)?"
)


class SceneTable:
    """Many scenes as arrays, so that one caption is checked against all of them at once."""

    def __init__(self, scenes: list[Scene]):
        codes = {}
        for words in ATTRIBUTES.values():
            for code, word in enumerate(words):
                codes[word] = code
        rows = []
        for scene in scenes:
            for thing in scene.objects:
                rows.append([codes[word] for word in thing] if thing else [-1, -1, -1])
        objects = np.array(rows).reshape(len(scenes), 4, 3)
        self.objects = objects.transpose(2, 1, 0)  # (3 attributes, 4 places, scenes), -1: nothing
        self.background = np.array([scene.background for scene in scenes])
        self.number = np.array([NUMBERS[len(scene.occupied())] for scene in scenes])


@functools.cache
def arrangements(things: int, relation: str | None, place: str | None) -> list[tuple[int, ...]]:
    """At which places the things of a sentence may stand: no two at the same, the first two in this
    relation, the first at this place (None: the sentence says nothing of it)."""
    allowed = []
    for places in itertools.permutations(range(4), things):
        if relation and not holds(relation, *places[:2]):
            continue
        if place and PLACES[places[0]] != place:
            continue
        allowed.append(places)
    return allowed


def truth(text: str, scenes: SceneTable) -> np.ndarray:
    """Of which scenes every sentence of `text` is true, (scenes,) bool.

    It reads the text alone, not how it was made. Things named in one sentence are different
    objects. Raises ValueError for a sentence outside the grammar."""
    answer = np.ones(len(scenes.background), bool)
    for sentence in text.lower().rstrip(".").split(". "):
        if not SENTENCE.fullmatch(sentence):
            raise ValueError(f"toy world: cannot read the sentence {sentence!r}")
        background = BACKGROUND.search(sentence)
        if background:
            answer &= scenes.background == background[0]
        number = NUMBER.search(sentence)
        if number:
            answer &= scenes.number == number[0]
        # For each thing: does the object at a place fit what is said of it? (4 places, scenes)
        fits = []
        for words in THING.findall(sentence):
            fit = scenes.objects[2] >= 0
            for codes, known, word in zip(scenes.objects, ATTRIBUTES.values(), words):
                if word:
                    fit = fit & (codes == known.index(word))
            fits.append(fit)
        # Is there a choice of places at which all of them fit?
        relation = RELATION.search(sentence)
        place = PLACE.search(sentence)
        found = np.zeros_like(answer)
        for places in arrangements(len(fits), relation and relation[0], place and place[1]):
            all_fit = True
            for fit, at in zip(fits, places):
                all_fit = all_fit & fit[at]
            found |= all_fit
        answer &= found
    return answer


def score_captions(generated: list[str], references: list[list[str]]) -> dict[str, float]:
    """How right long captions are, in percent: "attributes" (size, color, shape) and whole
    "objects".

    They are compared place by place with the first true long caption. An object that is not there
    counts as one with all its attributes wrong."""
    objects = 0
    right_objects = 0
    right_attributes = 0
    for guess, texts in zip(generated, references, strict=True):
        found = described_objects(guess)
        true = described_objects(texts[0])
        for place in found.keys() | true.keys():
            objects += 1
            if place in found and place in true:
                right = sum(a == b for a, b in zip(found[place], true[place]))
                right_attributes += right
                right_objects += right == 3
    objects = max(objects, 1)
    return {
        "attributes": 100 * right_attributes / (3 * objects),
        "objects": 100 * right_objects / objects,
    }


def described_objects(text: str) -> dict[str, tuple[str, str, str]]:
    """{place: (size, color, shape)} of "in the top left there is a large cyan heart", and so on."""
    found = {}
    for place, *words in OBJECT_AT_PLACE.findall(text.lower()):
        found[place] = tuple(words)
    return found


# ---- files


def save_picture(path: Path, scene: Scene, rng: random.Random) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(render(scene, rng)).save(path)


def save_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def save_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def training_record(
    scene: Scene, twin: Scene | None, pictures: BinaryIO, rng: random.Random
) -> dict:
    """Draw the picture behind the others in one file -> its record, with five short captions, which
    are false of the twin, and a long one."""
    start = pictures.tell()
    Image.fromarray(render(scene, rng)).save(pictures, "PNG")
    part = [start, pictures.tell() - start]
    table = SceneTable([scene, twin] if twin else [scene])
    short = []
    while len(short) < 5:
        caption = str(sample_caption(scene, rng, number=rng.choice([2, 2, 3])))
        true = truth(caption, table)
        assert true[0], (scene, caption)
        if not true[1:].any():
            short.append(caption)
    long = [long_caption(scene, rng)]
    return {"image": TRAINING_PICTURES, "part": part, "short": short, "long": long}


def build_training(folder: Path, rng: random.Random, number: int, progress: tqdm) -> None:
    """Half of the scenes stand alone, half come as groups of a scene and its twin.

    All pictures stand in one file, one behind the other: thousands of small ones are slow to write
    where a virus scanner or a network folder looks at each."""
    records = []
    path = folder / TRAINING_PICTURES
    path.parent.mkdir(parents=True)
    with open(path, "wb") as pictures:
        while len(records) < number:
            scene = sample_scene(rng, "train", theme=sample_theme(rng))
            if len(records) % 4 < 2:
                records.append(training_record(scene, None, pictures, rng))
            else:
                twin = sample_twin(scene, rng, "train")
                group = {"group": f"g{len(records) // 4}"}
                records.append(training_record(scene, twin, pictures, rng) | group)
                records.append(training_record(twin, scene, pictures, rng) | group)
            progress.update(len(records) - progress.n)
    save_lines(folder / "train.jsonl", records)


def build_evaluation(
    folder: Path, split: str, rng: random.Random, number: int, progress: tqdm
) -> dict[str, int]:
    """Write the retrieval, SugarCrepe, SugarCrepe++ and Winoground files of one split -> how many
    captions there are, false negatives, and SugarCrepe items."""
    scenes: list[Scene] = []
    while len(scenes) < number:
        scene = sample_scene(rng, split, theme=sample_theme(rng))
        if scene not in scenes:
            scenes.append(scene)
    table = SceneTable(scenes)
    records = []
    negatives = SugarCrepe()
    false_negatives = 0
    for index, scene in enumerate(scenes):
        file = f"{index:06d}.png"
        save_picture(folder / "images" / split / file, scene, rng)
        captions = []
        for _ in range(5):
            caption, number_true = sample_telling_caption(scene, index, table, rng)
            captions.append(caption)
            false_negatives += number_true - 1
        same = paraphrase(captions[0], rng)
        assert truth(str(same), table)[index], (scene, same)
        negatives.add(file, scene, captions, same, rng)
        long = long_caption(scene, rng)
        assert truth(long, table)[index], (scene, long)
        short = [str(caption) for caption in captions]
        records.append({"image": f"images/{split}/{file}", "short": short, "long": [long]})
        progress.update()
    save_lines(folder / f"{split}.jsonl", records)
    save_karpathy(folder / split / "karpathy.json", records, split)
    negatives.save(folder / split)
    build_winoground(folder / split / "winoground", split, rng, number * 2 // 5)
    tests = {  # where eval.py finds them, relative to this file
        "retrieval": {"file": "karpathy.json", "images": "../images", "split": split},
        "sugarcrepe": {"file": "sugarcrepe", "images": f"../images/{split}"},
        "sugarcrepe++": {"file": "sugarcrepe++", "images": f"../images/{split}"},
        "winoground": {"file": "winoground/examples.jsonl", "images": "winoground/images"},
        "captioning": {"file": f"../{split}.jsonl", "images": ".."},
    }
    save_json(folder / split / "tests.json", tests)
    return {
        "captions": 5 * number,
        "false negative pairs": false_negatives,
        "SugarCrepe items": sum(len(items) for items in negatives.items.values()),
    }


def sample_telling_caption(
    scene: Scene, index: int, table: SceneTable, rng: random.Random
) -> tuple[Caption, int]:
    """A caption of scene number `index` that is true of no other of the table, if one of 25 is ->
    the caption, and of how many scenes it is true."""
    for _ in range(25):
        caption = sample_caption(scene, rng, number=rng.choice([2, 2, 3]))
        true = truth(str(caption), table)
        assert true[index], (scene, caption)
        if true.sum() == 1:
            break
    return caption, int(true.sum())


class SugarCrepe:
    """The items of both test sets, as they collect: {kind: items}."""

    def __init__(self):
        self.items: dict[str, dict[str, dict]] = defaultdict(dict)
        self.items_with_paraphrase: dict[str, list[dict]] = defaultdict(list)  # SugarCrepe++

    def add(self, file: str, scene: Scene, captions: list[Caption], same: Caption, rng) -> None:
        """One item of each kind that a picture's captions allow. `same`: what the first one says,
        in other words."""
        known = set()
        for caption in captions:  # where the first allows no negative of a kind, a later one may
            for kind, negative in sample_negatives(caption, scene, rng, known).items():
                known.add(kind)
                item = {
                    "filename": file,
                    "caption": str(caption),
                    "negative_caption": str(negative),
                }
                items = self.items[kind]
                items[str(len(items))] = item
                # SugarCrepe++ asks what a paraphrase keeps, so it has no kinds that add something.
                if caption is captions[0] and not kind.startswith("add"):
                    items = self.items_with_paraphrase[kind]
                    items.append({"id": len(items), **item, "caption2": str(same)})

    def save(self, folder: Path) -> None:
        for kind, items in self.items.items():
            save_json(folder / "sugarcrepe" / f"{kind}.json", items)
        for kind, items in self.items_with_paraphrase.items():
            save_json(folder / "sugarcrepe++" / f"{kind}.json", items)


def save_karpathy(path: Path, records: list[dict], split: str) -> None:
    """Pictures and short captions in the format of Karpathy's Flickr30k and COCO files."""
    images = []
    for index, record in enumerate(records):
        sentences = []
        for i, text in enumerate(record["short"]):
            sentences.append({"raw": text, "imgid": index, "sentid": 5 * index + i})
        image = {
            "filename": Path(record["image"]).name,
            "filepath": split,
            "imgid": index,
            "split": split,
            "sentences": sentences,
        }
        images.append(image)
    save_json(path, {"images": images, "dataset": "toy"})


def winoground_captions(
    scene: Scene, twin: Scene, what: str, rng: random.Random
) -> list[tuple[Caption, Caption]]:
    """Up to four pairs of captions of the same words, the first true of `scene` only, the second of
    its twin only."""
    found = {}
    table = SceneTable([scene, twin])
    for _ in range(20):
        caption = sample_caption(scene, rng, number=2, related=True)
        other = caption._replace(things=exchange(caption.things, 0, 1, what))
        same_words = sorted(str(caption).lower().split()) == sorted(str(other).lower().split())
        own = truth(str(caption), table)
        swapped = truth(str(other), table)
        if same_words and [*own, *swapped] == [True, False, False, True]:
            found[str(caption)] = (caption, other)
        if len(found) == 4:
            break
    return list(found.values())


def build_winoground(folder: Path, split: str, rng: random.Random, number: int) -> None:
    """Quadruples as in Winoground: two pictures, two captions of the same words, each true of its
    own picture only. `number` pairs of pictures, each with up to four pairs of captions."""
    examples = []
    for pair in range(number):
        what = ["color", "size", "place"][pair % 3]
        found = []
        while not found:
            scene = sample_scene(rng, split, number=2, theme=sample_theme(rng))
            twin = Scene(scene.background, exchange(scene.objects, *scene.occupied(), what))
            if is_valid(twin.objects, split):
                found = winoground_captions(scene, twin, what, rng)
        stems = [f"ex_{pair}_img_{i}" for i in range(2)]
        for stem, picture in zip(stems, (scene, twin)):
            save_picture(folder / "images" / f"{stem}.png", picture, rng)
        for caption, other in found:
            example = {
                "id": len(examples),
                "image_0": stems[0],
                "image_1": stems[1],
                "caption_0": str(caption),
                "caption_1": str(other),
                "tag": what,
            }
            examples.append(example)
    save_lines(folder / "examples.jsonl", examples)


def build(
    folder: str | Path = "toy/data",
    seed: int = 0,
    train_scenes: int = 8192,
    test_scenes: int = 1000,
) -> Path:
    """Write the world's files into `folder` and return it; at once if they are there already.

    train.jsonl, val.jsonl, test.jsonl   records {"image", "short", "long"}; of training also
                                         "part", and "group", which joins a scene and its twin
    images/train.bin                     the training pictures, one behind the other
    images/{val,test}/                   the others, a file each
    {val,test}/karpathy.json             retrieval, the format of Flickr30k and COCO (Karpathy)
    {val,test}/sugarcrepe/*.json         seven files, pictures in images/{val,test}
    {val,test}/sugarcrepe++/*.json       five files
    {val,test}/winoground/               examples.jsonl and images/
    {val,test}/tests.json                lists all of these for eval.py

    Everything is written into a folder beside it, which is renamed when it is complete. Raises
    FileExistsError if `folder` holds anything that is not a toy world, rather than delete it."""
    folder = Path(folder)
    description = {
        "version": VERSION,
        "seed": seed,
        "train_scenes": train_scenes,
        "test_scenes": test_scenes,
    }
    label = folder / "world.json"
    if label.exists() and json.loads(label.read_text())["description"] == description:
        return folder
    if folder.exists() and any(folder.iterdir()) and not label.exists():
        raise FileExistsError(
            f"{folder} holds something else than a toy world: name another folder or empty it"
        )
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    counts = {}
    scenes = train_scenes + 2 * test_scenes
    with tqdm(total=scenes, desc="drawing the toy world", unit="scene") as progress:
        build_training(unfinished, random.Random(f"train {seed}"), train_scenes, progress)
        for split in ("val", "test"):
            rng = random.Random(f"{split} {seed}")
            counts[split] = build_evaluation(unfinished, split, rng, test_scenes, progress)
    save_json(unfinished / "world.json", {"description": description, "counts": counts})
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    pairs = counts["test"]["captions"] * (test_scenes - 1)
    also_true = counts["test"]["false negative pairs"]
    print(
        f"toy world in {folder}: of {pairs:,} pairs of a test picture and another picture's "
        f"caption, {also_true} are true all the same (false negatives)"
    )
    return folder


def contact_sheet(
    path: str | Path, seed: int = 0, columns: int = 4, rows: int = 3, scale: int = 4
) -> None:
    """Save a PNG of enlarged scenes, a theme in each row, each with one short caption below."""
    rng = random.Random(seed)
    font = ImageFont.load_default(13)
    side = IMAGE_SIZE * scale  # all in pixels
    gap = 12
    text_height = 54
    width = columns * (side + gap) + gap
    height = rows * (side + text_height) + gap
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    themes = [sample_theme(rng) for _ in range(rows)]
    for row, column in itertools.product(range(rows), range(columns)):
        scene = sample_scene(rng, "train", theme=themes[row])
        x = gap + column * (side + gap)
        y = gap + row * (side + text_height)
        picture = Image.fromarray(render(scene, rng)).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (x, y))
        lines = [""]
        for word in str(sample_caption(scene, rng, number=2)).split():
            longer = f"{lines[-1]} {word}".strip()
            if draw.textlength(longer, font) <= side:
                lines[-1] = longer
            else:
                lines.append(word)
        draw.multiline_text((x, y + side + 3), "\n".join(lines), fill="black", font=font, spacing=1)
    sheet.save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Builds the toy world.")
    parser.add_argument("--out", default="toy/data", help="folder for the files")
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed, another world of the same kind"
    )
    parser.add_argument(
        "--sheet", metavar="FILE.png", help="only draw a contact sheet into this file"
    )
    arguments = parser.parse_args()
    if arguments.sheet:
        contact_sheet(arguments.sheet, arguments.seed)
    else:
        try:
            build(arguments.out, arguments.seed)
        except FileExistsError as error:
            parser.error(str(error))
