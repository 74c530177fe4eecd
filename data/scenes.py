"""Drawn scenes with questions: the embedded task, made by the program from a seed.

World: 48 x 48 RGB, 4 x 4 cells of 12 pixels named a1 (top left) to d4 (bottom right), letter = column. Objects of six
colours and four shapes, three sizes, shifted by fractions of a pixel over their cell's border, under pixel noise; no
two objects of a scene share colour and shape. Four of the 24 pairs are held out of everything that trains.

Question kinds: `at` (what is in a cell), `count`, and walks of n hops from a named object (`walk1` ... `walk5`): one
cell a hop, never straight back, always on the board; the answer is what stands where the walk ends, or "nothing".

Splits: train, val, id (walks up to 2 hops, 1-6 objects); out of distribution: crowded (7-10 objects), pairs (the answer
is, or counts, a held-out pair), walk3 (held out of every prompt that trains), walk4 (4 or 5 hops).
"""
import random
from dataclasses import dataclass, field

import numpy as np

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
SPLITS = ("id", "crowded", "pairs", "walk3", "walk4")
MIX = {"at": 0.2, "count": 0.15, "walk1": 0.35, "walk2": 0.3}      # of every split that does not fix the kind


def name(cell):
    """(column, row) -> "b3"."""
    return "abcd"[cell[0]] + "1234"[cell[1]]


@dataclass(frozen=True)
class Thing:
    cell: tuple
    color: str
    shape: str
    radius: float = 4.5
    shift: tuple = (0.0, 0.0)

    @property
    def words(self):
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Question:
    """kind; cell asked about (`at`); word counted (`count`); start and hops (walks)."""
    kind: str
    cell: tuple = ()
    word: str = ""
    start: Thing = None
    hops: tuple = ()

    @property
    def text(self):
        if self.kind == "at":
            return f"what is at {name(self.cell)} ?"
        if self.kind == "count":
            return f"how many {self.word} things ?"
        return f"from the {self.start.words} go {' '.join(self.hops)} ?"


@dataclass(frozen=True)
class Scene:
    things: tuple
    question: Question
    by_cell: dict = field(default_factory=dict)

    def at(self, cell):
        """Words of what stands in a cell."""
        return self.by_cell[cell].words if cell in self.by_cell else NOTHING


def step(cell, hop):
    """The neighbouring cell, or None off the board."""
    column, row = cell[0] + HOPS[hop][0], cell[1] + HOPS[hop][1]
    return (column, row) if 0 <= column < CELLS and 0 <= row < CELLS else None


def gold(scene):
    """The right answer."""
    q = scene.question
    if q.kind == "at":
        return scene.at(q.cell)
    if q.kind == "count":
        return NUMBERS[sum(q.word in (thing.color, thing.shape) for thing in scene.things)]
    cell = q.start.cell
    for hop in q.hops:
        cell = step(cell, hop)
    return scene.at(cell)


def _walk(rng, hops):
    """(start cell, hops, end cell) of a random walk that stays on the board and never goes straight back."""
    while True:
        start = cell = rng.choice(BOARD)
        path, back = [], None
        for _ in range(hops):
            way = [hop for hop in HOPS if hop != back and step(cell, hop)]
            path.append(rng.choice(way))
            back = {"up": "down", "down": "up", "left": "right", "right": "left"}[path[-1]]
            cell = step(cell, path[-1])
        if cell != start:
            return start, tuple(path), cell


def make_scene(rng, kind, low, high, held_out=False):
    """A scene of low..high objects with a question of `kind`; held_out: the answer is, or counts, a held-out pair."""
    known = [pair for pair in PAIRS if pair not in HELD_OUT]
    amount = rng.randint(low, high)
    cells = rng.sample(BOARD, len(BOARD))
    empty_answer = not held_out and rng.random() < 0.12
    hops = ()
    if kind.startswith("walk"):
        start, hops, end = _walk(rng, int(kind[4:]))
        fixed = [start] if empty_answer else [start, end]
        amount = max(amount, len(fixed))
        cells = fixed + [cell for cell in cells if cell not in (start, end)]
    pairs = rng.sample(known, amount)
    if held_out:
        # The object asked about comes second in a walk (its end), first elsewhere.
        pairs[1 if hops else 0] = rng.choice(HELD_OUT)
    things = tuple(Thing(cell, color, shape, radius=rng.choice((3.6, 4.4, 5.2)),
                         shift=(rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5)))
                   for cell, (color, shape) in zip(cells, pairs))
    if kind == "at":
        question = Question("at", cell=cells[-1] if empty_answer else cells[0])
    elif kind == "count":
        words = things[0].color, things[0].shape
        word = rng.choice(words if held_out or rng.random() < 0.7 else (*COLORS, *SHAPES))
        if sum(word in (thing.color, thing.shape) for thing in things) >= len(NUMBERS):
            return make_scene(rng, kind, low, high, held_out)      # crowded: answers stay words seen in training
        question = Question("count", word=word)
    else:
        question = Question(kind, start=things[0], hops=hops)
    order = tuple(sorted(things, key=lambda thing: (thing.cell[1], thing.cell[0])))
    return Scene(order, question, {thing.cell: thing for thing in order})


def draw(scenes, rng):
    """Scenes -> (B, 48, 48, 3) uint8, anti-aliased, all scenes at once."""
    count = len(scenes)
    half = 7                                        # window around an object's centre, in pixels
    margin = half + 2                               # windows may reach over the border; cropped at the end
    side = SIZE + 2 * margin
    canvas = np.empty((count, side, side, 3), np.float32)
    canvas[:] = rng.uniform(225, 250, (count, 1, 1, 1))
    offset = np.arange(-half, half)
    for slot in range(max(len(scene.things) for scene in scenes)):
        here = np.array([i for i, scene in enumerate(scenes) if len(scene.things) > slot])
        things = [scenes[i].things[slot] for i in here]
        centre = np.array([[margin + (cell + 0.5) * CELL + shift for cell, shift in zip(thing.cell, thing.shift)]
                           for thing in things], np.float32)
        corner = np.floor(centre).astype(int)
        xs, ys = (corner[:, 0, None] + offset)[:, None, :], (corner[:, 1, None] + offset)[:, :, None]
        x = (xs + 0.5 - centre[:, 0, None, None]).astype(np.float32)      # (things, 1, window)
        y = (ys + 0.5 - centre[:, 1, None, None]).astype(np.float32)      # (things, window, 1)
        radius = np.array([thing.radius for thing in things], np.float32)[:, None, None]
        shape = np.array([SHAPES.index(thing.shape) for thing in things])
        alpha = np.empty((len(here), 2 * half, 2 * half), np.float32)
        for index, kind in enumerate(SHAPES):
            mine = shape == index
            alpha[mine] = np.clip(0.5 - _distance(kind, abs(x[mine]), y[mine], radius[mine]), 0, 1)
        paint = np.array([COLORS[thing.color] for thing in things], np.float32)
        paint += 10 * rng.standard_normal(paint.shape, np.float32)
        at = here[:, None, None], ys, xs
        below = canvas[at]
        canvas[at] = below + alpha[..., None] * (paint[:, None, None] - below)
    canvas = canvas[:, margin:-margin, margin:-margin]
    canvas = canvas + 6 * rng.standard_normal(canvas.shape, np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _distance(shape, x, y, radius):
    """Signed distance in pixels from the outline, negative inside; x is absolute, since all shapes are symmetric."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "square":
        return np.maximum(x, abs(y)) - 0.88 * radius
    if shape == "triangle":
        return np.maximum(y - 0.75 * radius, 0.88 * x - 0.48 * y - 0.55 * radius)
    return np.maximum(np.minimum(x, abs(y)) - 0.34 * radius, np.maximum(x, abs(y)) - radius)      # cross


def caption(scene):
    """Every object in reading order with its cell: "a2 red circle , c3 blue square"."""
    return " , ".join(f"{name(thing.cell)} {thing.words}" for thing in scene.things)


def shuffled_caption(scene, rng):
    """For alignment: objects and up to two empty cells in random order, each cell first or name first.

    "red circle a2 , c3 blue square , d1 nothing": every entry exercises reading a cell or finding an object, the two
    skills that chains of thought are made of. Alone they are too hard a start; captions in reading order break the ice.
    """
    empty = [cell for cell in BOARD if cell not in scene.by_cell]
    entries = [(name(cell), scene.at(cell)) for cell in [*scene.by_cell, *rng.sample(empty, min(2, len(empty)))]]
    entries = [f"{cell} {words}" if words == NOTHING or rng.random() < 0.5 else f"{words} {cell}"
               for cell, words in entries]
    return " , ".join(rng.sample(entries, len(entries)))


def partial_caption(scene, rng):
    """For contrastive training: each object by colour, by shape or by both, in random order, without cells.

    Dropping attributes makes the towers tell shapes and colours apart; full names let them learn whole pairs by heart.
    """
    words = [rng.choice((thing.shape, thing.shape, thing.color, thing.words)) for thing in scene.things]
    return " , ".join(rng.sample(words, len(words)))


def _seeing_question(scene, rng):
    """A question about looking alone, for alignment and the first fine-tuning: (question, answer)."""
    kind, thing = rng.randrange(3), rng.choice(scene.things)
    if kind == 0:
        cell = rng.choice(BOARD) if rng.random() < 0.3 else thing.cell
        return f"what is at {name(cell)} ?", scene.at(cell)
    if kind == 1:
        return f"where is the {thing.words} ?", name(thing.cell)
    word = rng.choice((thing.color, thing.shape))
    cells = [name(other.cell) for other in scene.things if word in (other.color, other.shape)]
    return f"where are {word} things ?", " ".join(cells)


def load(split, count, seed, teacher=None):
    """`count` samples of a split, made from `seed`.

    split: "clip" (partial captions), "align" (captions in reading order and shuffled), "sft" (questions about looking),
    on 1-5, 1-8 and 1-8 objects; "train", "val" or one of SPLITS. `teacher(scene, rng) -> (reasoning, conclusion)` fills
    those two fields.
    """
    rng = random.Random(f"{split} {seed}")
    noise = np.random.default_rng([seed, *split.encode()])
    scenes, texts = [], []
    for _ in range(count):
        if split in ("clip", "align", "sft"):
            scene = make_scene(rng, "at", 1, 8 if split != "clip" else 5)
            if split == "clip":
                texts.append(dict(caption=partial_caption(scene, rng)))
            elif split == "align":
                texts.append(dict(caption=caption(scene) if rng.random() < 0.5 else shuffled_caption(scene, rng)))
            else:
                question, answer = _seeing_question(scene, rng)
                texts.append(dict(question=question, answer=answer))
        else:
            if split == "walk3":
                kind = "walk3"
            elif split == "walk4":
                kind = rng.choice(("walk4", "walk5"))
            else:
                kind = rng.choices(list(MIX), list(MIX.values()))[0]
            low, high = (7, 10) if split == "crowded" else (1, 6)
            scene = make_scene(rng, kind, low, high, held_out=split == "pairs")
            fields = dict(question=scene.question.text, answer=gold(scene), caption=caption(scene))
            if teacher:
                fields["reasoning"], fields["conclusion"] = teacher(scene, rng)
            texts.append(fields)
        scenes.append(scene)
    pictures = np.concatenate([draw(scenes[i:i + 512], noise) for i in range(0, count, 512)])
    return [Sample(id=f"{split}-{seed}-{i}", images=(picture,), split=split, source=f"scenes/{scene.question.kind}",
                   **fields)
            for i, (picture, scene, fields) in enumerate(zip(pictures, scenes, texts))]


def guess(sample):
    """Chance of being right on a walk without walking: by naming some thing of the picture other than the start."""
    things = [entry.split(" ", 1)[1] for entry in sample.caption.split(" , ")]
    others = [words for words in things if f"from the {words} go" not in sample.question] or [NOTHING]
    return others.count(sample.answer) / len(others)


def pieces():
    """The words of the task, each to be one token, with the space before it."""
    words = {*COLORS, *SHAPES, *HOPS, *NUMBERS, NOTHING, *(name((c, r)) for c in range(CELLS) for r in range(CELLS))}
    words |= set("what is at how many things where are the from go think inside then answer ? . ,".split())
    return [f"▁{word}" for word in sorted(words)]
