"""Drawn scenes with questions: the embedded task, made by the program from a seed.

World: 48 x 48 RGB, 4 x 4 cells of 12 pixels named a1 (top left) to d4 (bottom right), letter =
column. Objects of six colours and four shapes, three sizes, shifted by fractions of a pixel over
their cell's border, under pixel noise; no two objects of a scene share colour and shape. Four of
the 24 pairs of colour and shape are held out of everything that trains.

Question kinds: `at` (what is in a cell), `count`, and walks of n hops from a named object (`walk1`
... `walk5`): one cell a hop, never straight back, always on the board; the answer is what stands
where the walk ends, or "nothing".

Splits: the table `SPLITS`, below. What a whole world asks, in training and in tests, is a `World`;
data/worlds.py has them.
"""
import random
from dataclasses import dataclass, field, replace
from typing import Callable, NamedTuple

import numpy as np

from data.chat import SECTIONS
from data.sample import Sample

SIZE, CELLS = 48, 4
CELL = SIZE // CELLS
COLORS = {"red": (214, 48, 44), "green": (46, 160, 67), "blue": (45, 92, 210), "yellow": (236, 205, 48),
          "purple": (140, 62, 180), "cyan": (60, 196, 208)}
SHAPES = ("circle", "square", "triangle", "cross")
HELD_OUT = (("red", "cross"), ("yellow", "circle"), ("purple", "triangle"), ("cyan", "square"))
PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
BOARD = tuple((column, row) for row in range(CELLS) for column in range(CELLS))
HOPS = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
NOTHING = "nothing"
MIX = {"at": 0.2, "count": 0.15, "walk1": 0.35, "walk2": 0.3}  # kinds of question and their shares
# The same test prompts for every method and every training seed; others to tune by.
TEST_SEED = {"test": 1_000_001, "val": 2_000_002}


@dataclass(frozen=True)
class Split:
    """What the scenes of a split have in common.

    objects     fewest and most objects of a scene (a walk adds its end if that must hold one)
    kinds       kind of question -> its share
    held_out    the answer is a held-out pair, or counts one; elsewhere no scene holds such a pair
    """
    objects: tuple = (1, 6)
    kinds: dict = field(default_factory=lambda: MIX)
    held_out: bool = False

    def draw_kind(self, rng):
        kinds = list(self.kinds)
        shares = list(self.kinds.values())
        if len(kinds) == 1:
            return kinds[0]
        # another draw than below: the scenes of a seed stay what they were
        if len(set(shares)) == 1:
            return rng.choice(kinds)
        return rng.choices(kinds, shares)[0]

    def make(self, rng):
        """A scene of the split."""
        return make_scene(rng, self.draw_kind(rng), *self.objects, self.held_out)

    def finish(self, picture, rng):
        """A drawn picture (48, 48, 3) uint8 -> the one that is shown; rng: a numpy Generator of the
        sample's own."""
        return picture


TRAIN = Split()             # of train and val

# The splits that are evaluated. A new one is an entry here; what Split has no field for, make_scene has to learn.
SPLITS = {
    "id": TRAIN,
    # Out of distribution.
    "crowded": Split(objects=(7, 10)),
    "pairs": Split(held_out=True),
    "walk3": Split(kinds={"walk3": 1}),                 # held out of every prompt that trains
    "walk4": Split(kinds={"walk4": 1, "walk5": 1}),
}
LOOKING = {"clip": 5, "align": 8, "sft": 8}  # most objects of what the first stages look at


@dataclass(frozen=True)
class World:
    """What a world of drawn scenes asks.

    train       of the stages that learn to think, and of validation
    splits      name -> Split that is evaluated
    parts       name -> Split that a stage may train on in place of `train`
    words       beside `pieces`, each to be one token
    teacher     its chains of thought: (slip, confuse, drop_hop) -> a teacher; None: data.teachers.SceneTeacher
    """
    train: Split = TRAIN
    splits: dict = field(default_factory=lambda: SPLITS)
    parts: dict = field(default_factory=dict)
    words: tuple = ()
    teacher: Callable | None = None

    @property
    def asking(self):
        """Name -> Split of all samples that need thinking."""
        return {"train": self.train, "val": self.train, **self.parts, **self.splits}

    def load(self, split, count, seed, teacher=None, staged=False):
        """As `load` below, of this world."""
        return load(split, count, seed, teacher, staged, self)

    def pieces(self):
        """As `pieces` below, of this world."""
        return pieces(self)


GRID = World()              # the default


def name(cell):
    """(column, row) -> "b3"."""
    return "abcd"[cell[0]] + "1234"[cell[1]]


@dataclass(frozen=True)
class Thing:
    """An object. radius and shift from the middle of its cell (x, y) in pixels."""
    cell: tuple                     # (column, row), from 0
    color: str
    shape: str
    radius: float = 4.5
    shift: tuple = (0.0, 0.0)

    def has(self, word):
        """Whether it has this colour or this shape."""
        return word in (self.color, self.shape)

    @property
    def words(self):
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Question:
    kind: str
    cell: tuple = ()            # at: the cell asked about
    word: str = ""              # count: the colour or shape that is counted
    start: Thing = None         # walks: where they begin ..
    hops: tuple = ()            # .. and where they go
    swap: tuple = ()            # a rule that it states: two words that mean each other here

    @property
    def text(self):
        rule = f"swap {' '.join(self.swap)} : " if self.swap else ""
        if self.kind == "at":
            return f"{rule}what is at {name(self.cell)} ?"
        if self.kind == "count":
            return f"{rule}how many {self.word} things ?"
        return f"{rule}from the {self.start.words} go {' '.join(self.hops)} ?"

    def meant(self, text):
        """A text with the words of the rule exchanged.

        >>> Question("at", swap=("red", "blue")).meant("red circle")
        'blue circle'
        """
        other = dict(zip(self.swap, reversed(self.swap)))
        return " ".join(other.get(word, word) for word in text.split())


@dataclass(frozen=True)
class Scene:
    things: tuple               # in reading order
    question: Question
    by_cell: dict = field(default_factory=dict)

    @classmethod
    def of(cls, things, question):
        """A scene of things in any order."""
        order = tuple(sorted(things, key=lambda thing: (thing.cell[1], thing.cell[0])))
        return cls(order, question, {thing.cell: thing for thing in order})

    def at(self, cell):
        """Words of what stands in a cell."""
        if cell not in self.by_cell:
            return NOTHING
        return self.by_cell[cell].words


def step(cell, hop):
    """The neighbouring cell, or None off the board."""
    column = cell[0] + HOPS[hop][0]
    row = cell[1] + HOPS[hop][1]
    if 0 <= column < CELLS and 0 <= row < CELLS:
        return column, row
    return None


def gold(scene):
    """The right answer, under the rule that the question states."""
    question = scene.question
    if question.kind == "at":
        return question.meant(scene.at(question.cell))
    if question.kind == "count":
        return NUMBERS[sum(thing.has(question.word) for thing in scene.things)]
    cell = question.start.cell
    for hop in question.hops:
        cell = step(cell, question.meant(hop))
    return scene.at(cell)


def decoy(scene):
    """What would be right without the rule that the question states; "" where it states none."""
    if not scene.question.swap:
        return ""
    return gold(replace(scene, question=replace(scene.question, swap=())))


# ---------------------------------------------------------------- making a scene

BACK = {"up": "down", "down": "up", "left": "right", "right": "left"}


def _walk(rng, hops):
    """(start cell, hops, end cell) of a random walk that stays on the board, never goes straight
    back and does not end where it starts."""
    while True:
        start = rng.choice(BOARD)
        cell = start
        path = []
        back = None
        for _ in range(hops):
            hop = rng.choice([hop for hop in HOPS if hop != back and step(cell, hop)])
            path.append(hop)
            back = BACK[hop]
            cell = step(cell, hop)
        if cell != start:
            return start, tuple(path), cell


def make_scene(rng, kind, low, high, held_out=False):
    """A scene of low..high objects with a question of `kind`; held_out: the answer is, or counts, a
    held-out pair."""
    amount = rng.randint(low, high)
    cells = rng.sample(BOARD, len(BOARD))
    empty_answer = not held_out and rng.random() < 0.12
    hops = ()
    if kind.startswith("walk"):
        start, hops, end = _walk(rng, int(kind.removeprefix("walk")))
        fixed = [start] if empty_answer else [start, end]
        amount = max(amount, len(fixed))
        cells = fixed + [cell for cell in cells if cell not in (start, end)]
    things = _things(rng, cells, amount, held_out, 1 if hops else 0)
    if kind == "at":
        question = Question("at", cell=cells[-1] if empty_answer else cells[0])
    elif kind == "count":
        word = _counted_word(rng, things[0], held_out)
        if sum(thing.has(word) for thing in things) >= len(NUMBERS):
            # Crowded: answers stay words seen in training.
            return make_scene(rng, kind, low, high, held_out)
        question = Question("count", word=word)
    elif hops:
        question = Question(kind, start=things[0], hops=hops)
    else:
        raise ValueError(f"question kind {kind!r} must be at, count or walkN with N of 1 or more")
    return Scene.of(things, question)


def _things(rng, cells, amount, held_out, asked):
    """`amount` objects, the first in the first of the cells and so on; held_out: the object number
    `asked`, the one that the question is about (a walk's end comes second), is a held-out pair."""
    known = [pair for pair in PAIRS if pair not in HELD_OUT]
    pairs = rng.sample(known, amount)
    if held_out:
        pairs[asked] = rng.choice(HELD_OUT)
    things = []
    for cell, (color, shape) in zip(cells, pairs):
        radius = rng.choice((3.6, 4.4, 5.2))
        shift = (rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5))
        things.append(Thing(cell, color, shape, radius, shift))
    return things


def _counted_word(rng, thing, held_out):
    """A colour or shape to count: mostly one that `thing` has."""
    if held_out or rng.random() < 0.7:
        return rng.choice((thing.color, thing.shape))
    return rng.choice((*COLORS, *SHAPES))


# ---------------------------------------------------------------- drawing

def draw(scenes, rng):
    """Scenes -> (B, 48, 48, 3) uint8, anti-aliased, all scenes at once; rng: a numpy Generator."""
    count = len(scenes)
    half = 7                                        # window around an object's centre, in pixels
    margin = half + 2  # windows may reach over the border, which is cut off
    side = SIZE + 2 * margin
    canvas = np.empty((count, side, side, 3), np.float32)
    canvas[:] = rng.uniform(225, 250, (count, 1, 1, 1))
    offset = np.arange(-half, half)                 # W entries, the window's side
    # The first object of every scene at once, then the second, ..: n of the scenes have one.
    for slot in range(max(len(scene.things) for scene in scenes)):
        here = np.array([i for i, scene in enumerate(scenes) if len(scene.things) > slot])
        things = [scenes[i].things[slot] for i in here]
        centre = np.array([_centre(thing, margin) for thing in things], np.float32)     # (n, 2)
        corner = np.floor(centre).astype(int)
        xs = (corner[:, 0, None] + offset)[:, None, :]                                  # (n, 1, W)
        ys = (corner[:, 1, None] + offset)[:, :, None]                                  # (n, W, 1)
        x = (xs + 0.5 - centre[:, 0, None, None]).astype(np.float32)
        y = (ys + 0.5 - centre[:, 1, None, None]).astype(np.float32)
        radius = np.array([thing.radius for thing in things], np.float32)[:, None, None]
        shape = np.array([SHAPES.index(thing.shape) for thing in things])
        alpha = np.empty((len(here), 2 * half, 2 * half), np.float32)
        for index, name_of_shape in enumerate(SHAPES):
            same = shape == index
            distance = _distance(name_of_shape, abs(x[same]), y[same], radius[same])
            alpha[same] = np.clip(0.5 - distance, 0, 1)
        paint = np.array([COLORS[thing.color] for thing in things], np.float32)
        paint += 10 * rng.standard_normal(paint.shape, np.float32)
        at = here[:, None, None], ys, xs
        below = canvas[at]
        canvas[at] = below + alpha[..., None] * (paint[:, None, None] - below)
    canvas = canvas[:, margin:-margin, margin:-margin]
    canvas = canvas + 6 * rng.standard_normal(canvas.shape, np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _centre(thing, margin):
    """(x, y) of an object on a canvas with a margin, in pixels."""
    (column, row), (right, down) = thing.cell, thing.shift
    return margin + (column + 0.5) * CELL + right, margin + (row + 0.5) * CELL + down


def _distance(shape, x, y, radius):
    """Signed distance in pixels from the outline, negative inside; x is absolute, since all shapes
    are symmetric."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "square":
        return np.maximum(x, abs(y)) - 0.88 * radius
    if shape == "triangle":
        return np.maximum(y - 0.75 * radius, 0.88 * x - 0.48 * y - 0.55 * radius)
    # A cross: two bars.
    return np.maximum(np.minimum(x, abs(y)) - 0.34 * radius, np.maximum(x, abs(y)) - radius)


# ---------------------------------------------------------------- words

def caption(scene):
    """Every object in reading order with its cell: "a2 red circle , c3 blue square"."""
    return " , ".join(f"{name(thing.cell)} {thing.words}" for thing in scene.things)


def shuffled_caption(scene, rng):
    """For alignment: objects and up to two empty cells in random order, each cell first or name
    first.

    "red circle a2 , c3 blue square , d1 nothing": every entry exercises reading a cell or finding
    an object, the two skills that chains of thought are made of. Alone they are too hard a start;
    captions in reading order break the ice.
    """
    empty = [cell for cell in BOARD if cell not in scene.by_cell]
    cells = [*scene.by_cell, *rng.sample(empty, min(2, len(empty)))]
    entries = []
    for cell in cells:
        words = scene.at(cell)
        if words == NOTHING or rng.random() < 0.5:
            entries.append(f"{name(cell)} {words}")
        else:
            entries.append(f"{words} {name(cell)}")
    return " , ".join(rng.sample(entries, len(entries)))


def partial_caption(scene, rng):
    """For contrastive training: each object by colour, by shape or by both, in random order,
    without cells.

    Dropping attributes makes the towers tell shapes and colours apart; full names let them learn
    whole pairs by heart.
    """
    entries = []
    for thing in scene.things:
        entries.append(rng.choice((thing.shape, thing.shape, thing.color, thing.words)))
    return " , ".join(rng.sample(entries, len(entries)))


class Look(NamedTuple):
    """A question about looking alone, its answer, and the cells that it takes a look at."""
    question: str
    answer: str
    cells: tuple


def looking_question(scene, rng):
    """-> a Look, for the first fine-tuning."""
    kind = rng.randrange(3)
    thing = rng.choice(scene.things)
    if kind == 0:
        cell = rng.choice(BOARD) if rng.random() < 0.3 else thing.cell
        return Look(f"what is at {name(cell)} ?", scene.at(cell), (cell,))
    if kind == 1:
        return Look(f"where is the {thing.words} ?", name(thing.cell), (thing.cell,))
    word = rng.choice((thing.color, thing.shape))
    cells = tuple(other.cell for other in scene.things if other.has(word))
    return Look(f"where are {word} things ?", " ".join(map(name, cells)), cells)


def pieces(world=GRID):
    """The words of a world, each to be one token, with the space before it."""
    words = {*COLORS, *SHAPES, *HOPS, *NUMBERS, NOTHING}
    words |= {name(cell) for cell in BOARD}
    words |= set("what is at how many things where are the from go think inside then answer ? . ,".split())
    words |= {*world.words}
    return [f"▁{word}" for word in sorted(words)]


# ---------------------------------------------------------------- samples

def load(split, count, seed, teacher=None, staged=False, world=GRID):
    """`count` samples of a split, made from `seed`.

    split: "clip" (partial captions), "align" (captions in reading order and shuffled), "sft"
    (questions about looking); or one of world.asking (questions that need thinking).
    For the latter `teacher(scene, rng) -> (reasoning, conclusion)` fills those two fields; with
    `staged`, `teacher.sections(scene, rng)` fills the summary and the caption as well. Scenes,
    words, chains and noise have random streams of their own: a sample is the same whatever
    `count`, and its picture and question whatever the teacher. Raises ValueError for another split.
    """
    asking = world.asking
    if split not in LOOKING and split not in asking:
        raise ValueError(f"split {split!r} must be one of {', '.join((*LOOKING, *asking))}")
    rng = random.Random(f"{split} {seed}")
    scenes = []
    for _ in range(in_whole_groups(count)):
        if split in LOOKING:
            scenes.append(make_scene(rng, "at", 1, LOOKING[split]))
        else:
            scenes.append(asking[split].make(rng))
    images = pictures(scenes, split, seed)
    samples = []
    for i, scene in enumerate(scenes[:count]):
        words = random.Random(f"words {split} {seed} {i}")
        if split in LOOKING:
            texts = _looking_texts(split, scene, words)
            image = images[i]
        else:
            chain = random.Random(f"chain {split} {seed} {i}")
            texts = _asking_texts(scene, chain, teacher, staged)
            image = asking[split].finish(images[i], np.random.default_rng([seed, i, *f"shown {split}".encode()]))
        samples.append(Sample(id=f"{split}-{seed}-{i}", images=(image,), split=split,
                              source=f"scenes/{scene.question.kind}", **texts))
    return samples


DRAWN = 64                  # scenes drawn at once, with one stream of noise


def in_whole_groups(count):
    """The least multiple of DRAWN that is `count` or more.

    >>> in_whole_groups(1), in_whole_groups(128)
    (64, 128)
    """
    return -(-count // DRAWN) * DRAWN


def pictures(scenes, name, seed):
    """A multiple of DRAWN scenes -> (B, 48, 48, 3) uint8; name, seed: of the streams of noise.

    Every group of DRAWN has a stream of its own, so that the first pictures are the same however
    many follow.
    """
    drawn = np.empty((len(scenes), SIZE, SIZE, 3), np.uint8)
    for first in range(0, len(scenes), DRAWN):
        noise = np.random.default_rng([seed, first // DRAWN, *name.encode()])
        drawn[first:first + DRAWN] = draw(scenes[first:first + DRAWN], noise)
    return drawn


def _looking_texts(split, scene, rng):
    """The fields of a sample of "clip", "align" or "sft" that hold its texts."""
    if split == "clip":
        return dict(caption=partial_caption(scene, rng))
    if split == "align":
        if rng.random() < 0.5:
            return dict(caption=caption(scene))
        return dict(caption=shuffled_caption(scene, rng))
    look = looking_question(scene, rng)
    return dict(question=look.question, answer=look.answer)


def _asking_texts(scene, rng, teacher, staged):
    """The fields of a sample of one of the other splits that hold its texts."""
    texts = dict(question=scene.question.text, answer=gold(scene), decoy=decoy(scene), caption=caption(scene))
    if teacher and staged:
        sections = teacher.sections(scene, rng)
        texts |= zip(SECTIONS, sections)
    elif teacher:
        texts["reasoning"], texts["conclusion"] = teacher(scene, rng)
    return texts


def guess(sample):
    """Chance of being right on a walk without walking: by naming some thing of the picture other
    than the start."""
    things = [entry.split(" ", 1)[1] for entry in sample.caption.split(" , ")]
    others = [words for words in things if f"from the {words} go" not in sample.question]
    if not others:
        others = [NOTHING]
    return others.count(sample.answer) / len(others)


def difficulty(sample):
    """Hops of a drawn sample's walk, 0 of another question. Raises ValueError for a sample that was not drawn."""
    if not sample.source.startswith("scenes/"):
        raise ValueError(f"sample {sample.id!r} of {sample.source!r} has no difficulty; expected a drawn "
                         "scene, whose walk has hops")
    kind = sample.source.removeprefix("scenes/")
    return int(kind.removeprefix("walk")) if kind.startswith("walk") else 0
