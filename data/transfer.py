"""The drawn world of the question what post-training on some kinds of question does to the others.

Start: all four kinds, and a share of them under a rule that the question states, two words that
swap their meaning:

    swap left right : from the red circle go left up ?      the walk goes right, then up
    swap red blue : what is at b2 ?                         a red circle is to be called blue circle

Each such question has another answer without its rule, on the board as well: the sample's `decoy`.
Counting is about zero, one or two things, a third each, so that no number is right much more often
than another.

Post-training is on a part of the kinds, `walks` or `looks`, without rules. The splits are one kind
each, so that what was gained and what was forgotten can be read off, or one visual change each.
"""
from dataclasses import dataclass, replace
from typing import Callable

import numpy as np

from data import scenes

# The kinds of each part, which are splits as well.
PARTS = {"walks": ("walk1", "walk2"), "looks": ("at", "count")}
KINDS = PARTS["looks"] + PARTS["walks"]
RULES = ("mirrored", "renamed")             # splits whose questions state a rule
MIRRORS = (("left", "right"), ("up", "down"))
COUNTS = scenes.NUMBERS[:3]                 # what is counted, equally often each
# Kinds of question of the start and their shares; those under a rule are .2 in all.
MIX = {"at": 0.20, "count": 0.16, "walk1": 0.22, "walk2": 0.22, "mirrored1": 0.06, "mirrored2": 0.06, "renamed": 0.08}
EMPTY = 0.12                                # of walks under a rule: nothing stands where the old one leads


# ---------------------------------------------------------------- questions

def counted(rng, objects):
    """A scene with a question of kind `count` whose answer is each of COUNTS equally often."""
    wanted = rng.choice(COUNTS)
    while True:
        scene = scenes.make_scene(rng, "count", *objects)
        if scenes.gold(scene) == wanted:
            return scene


def mirrored(rng, kind, objects):
    """A scene with a walk (`kind`: as scenes.make_scene takes it) under a stated rule that swaps two
    opposite hops.

    With and without its rule the walk stays on the board and has different answers. Where the old
    rule leads stands a thing, too, but for EMPTY of the walks: hence three things at least.
    """
    least, most = objects
    while True:
        scene = scenes.make_scene(rng, kind, max(3, least), most)
        gone = scene.question
        pair = rng.choice(MIRRORS)
        if rng.random() < 0.5:
            pair = pair[::-1]
        question = replace(gone, swap=pair, hops=tuple(replace(gone, swap=pair).meant(hop) for hop in gone.hops))
        old_end = end_of(question.start.cell, question.hops)
        if question.hops == gone.hops or old_end is None:
            continue
        scene = replace(scene, question=question)
        if rng.random() >= EMPTY:
            scene = with_thing_at(scene, old_end, rng)
        if scenes.decoy(scene) != scenes.gold(scene):
            return scene


def end_of(cell, hops):
    """The cell that hops lead to, as they are said; None where they leave the board."""
    for hop in hops:
        cell = scenes.step(cell, hop)
        if cell is None:
            return None
    return cell


def with_thing_at(scene, cell, rng):
    """The scene with a thing in this cell: one that the walk does not need moves there."""
    question = scene.question
    needed = {question.start.cell, end_of(question.start.cell, map(question.meant, question.hops))}
    free = [thing for thing in scene.things if thing.cell not in needed]
    if cell in scene.by_cell:
        return scene
    moved = rng.choice(free)
    others = [thing for thing in scene.things if thing is not moved]
    return scenes.Scene.of([*others, replace(moved, cell=cell)], question)


def renamed(rng, objects):
    """A scene with a question of kind `at` under a stated rule that swaps the colour of what is
    asked for with another.

    The name under the rule is none of the pairs that are held out of everything that trains.
    """
    while True:
        scene = scenes.make_scene(rng, "at", *objects)
        thing = scene.by_cell.get(scene.question.cell)
        if thing is None:
            continue
        pair = [thing.color, rng.choice([color for color in scenes.COLORS if color != thing.color])]
        rng.shuffle(pair)
        scene = replace(scene, question=replace(scene.question, swap=tuple(pair)))
        if tuple(scenes.gold(scene).split()) not in scenes.HELD_OUT:
            return scene


def beginning(sample):
    """The first words of a sample's flawless chain, which say where to look and not yet what is
    there: the cell asked about, the first cell that is counted (where there is none "zero", which is
    the answer), the start of a walk and its cell."""
    words = sample.reasoning.split()
    if sample.source.startswith("scenes/walk"):
        return " ".join(words[:3])
    return words[0]


# ---------------------------------------------------------------- pictures

def darkened(picture, rng):
    """Two thirds of the light; with half of it nothing is recognised any more."""
    return (picture * 0.66).astype(np.uint8)


def textured(picture, rng):
    """Stripes on the background, of any direction, one every 5 to 9 pixels.

    Where a pixel is background is read off its darkest channel: every colour of a thing has a dark
    one.
    """
    side = np.arange(len(picture))
    angle = rng.uniform(0, np.pi)
    along = np.cos(angle) * side[:, None] + np.sin(angle) * side[None]
    stripe = 0.5 + 0.5 * np.sin(2 * np.pi * (along / rng.uniform(5, 9) + rng.uniform()))        # (48, 48), 0 to 1
    is_background = np.clip((picture.min(-1).astype(float) - 160) / 50, 0, 1)
    shade = 1 - 0.3 * stripe * is_background
    return (picture * shade[..., None]).astype(np.uint8)


@dataclass(frozen=True)
class Split(scenes.Split):
    """As scenes.Split, with the kinds mirrored1, mirrored2 and renamed, and balanced counts.

    radii       of all things in place of those of training; () leaves these
    change      (picture, rng) -> the picture that is shown; None: as it is drawn
    """
    radii: tuple = ()
    change: Callable | None = None

    def make(self, rng):
        kind = self.draw_kind(rng)
        if kind == "count":
            scene = counted(rng, self.objects)
        elif kind == "renamed":
            scene = renamed(rng, self.objects)
        elif kind.startswith("mirrored"):
            scene = mirrored(rng, kind.replace("mirrored", "walk"), self.objects)
        else:
            scene = scenes.make_scene(rng, kind, *self.objects)
        if not self.radii:
            return scene
        return resized(scene, self.radii, rng)

    def finish(self, picture, rng):
        if self.change is None:
            return picture
        return self.change(picture, rng)


def resized(scene, radii, rng):
    """The scene with other radii of its things, in pixels."""
    things = [replace(thing, radius=rng.choice(radii)) for thing in scene.things]
    return scenes.Scene.of(things, scene.question)


# ---------------------------------------------------------------- the world

def alike(kinds):
    """Kinds of question -> {kind: its share}, the same for each."""
    return {kind: 1 / len(kinds) for kind in kinds}


SPLITS = {
    **{kind: Split(kinds={kind: 1}) for kind in KINDS},
    # a rule is stated
    "mirrored": Split(kinds=alike(("mirrored1", "mirrored2"))),
    "renamed": Split(kinds={"renamed": 1}),
    # a visual change, all four kinds
    "dark": Split(kinds=alike(KINDS), change=darkened),
    "textured": Split(kinds=alike(KINDS), change=textured),
    "small": Split(kinds=alike(KINDS), radii=(2.6, 3.0)),
    "crowded": Split(kinds=alike(KINDS), objects=(7, 10)),
}
VISUAL = ("dark", "textured", "small", "crowded")

WORLD = scenes.World(
    train=Split(kinds=MIX),
    splits=SPLITS,
    parts={part: Split(kinds=alike(kinds)) for part, kinds in PARTS.items()},
    words=("swap", ":"))
