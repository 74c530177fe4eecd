"""The drawn world of the question whether thinking grows: walks longer than any trained one, and a
start that one look often does not find.

All questions are walks, of 1 to 3 hops in training and of up to 6 in the tests:

    with blue square left from the red circle go two to three of
    one down two up three up four left five right six up seven left eight down ?

Two or three things are red circles, and one of them is meant: the one with a blue square to its
left. There is another blue square, too, so that it takes both things to tell. The list has eight
numbered hops, of which only some are asked for. So a question of six hops is as long as one of
one, and what comes next, and whether anything does, can be read off the numbers: only the thought is
longer than any trained one.

A thought names the start and where it takes it to stand, and looks at the cell on the stated side;
then each number, hop, the cell it leads to, and what stands there:

    red circle b3 left a3 nothing                   a look; a3 does not hold what was wanted
    wait red circle d3 left c3 blue square          a second look
    two up d2 nothing three up d1 green cross

The teacher often looks at a wrong red circle, mostly goes on from there without noticing, and in a
few per cent of its chains looks again. No reward is paid for a look or a token.
"""
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from data import chat, scenes
from data.teachers import SceneTeacher

WAIT = "wait"
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")      # of the hops of a list
OBJECTS = (6, 9)                # of all splits but the crowded one
TRAINED = (1, 2, 3)             # hops of the walks that train
LONGEST = 6                     # hops of a test's walk


# ---------------------------------------------------------------- questions and scenes

@dataclass(frozen=True)
class Question(scenes.Question):
    """A walk. side: where the start has `beside`, which tells it from its doubles; listed: the hops
    of the list, those of the walk among them; first: the place in it of the walk's first hop."""
    beside: scenes.Thing = None
    side: str = ""
    listed: tuple = ()
    first: int = 0

    @property
    def text(self):
        listed = " ".join(f"{number} {hop}" for number, hop in zip(NUMBERS, self.listed))
        asked = f"{NUMBERS[self.first]} to {NUMBERS[self.first + len(self.hops) - 1]}"
        return f"with {self.beside.words} {self.side} from the {self.start.words} go {asked} of {listed} ?"

    def candidates(self, things):
        """Those of the things that are called like the start."""
        return [thing for thing in things if thing.words == self.start.words]


def make_walk(rng, hops, objects):
    """A scene with a walk of so many hops, whose start has one or two doubles. objects: fewest and
    most."""
    while True:
        scene = scenes.make_scene(rng, f"walk{hops}", *objects)
        asked = scene.question
        side = rng.choice(list(scenes.HOPS))
        beside = scene.by_cell.get(scenes.step(asked.start.cell, side))
        if beside is None:
            continue
        first = rng.randint(0, len(NUMBERS) - hops)
        listed = rng.choices(list(scenes.HOPS), k=len(NUMBERS))
        listed[first:first + hops] = asked.hops
        question = Question(asked.kind, start=asked.start, hops=asked.hops, beside=beside, side=side,
                            listed=tuple(listed), first=first)
        scene = _with_doubles(scene, question, rng)
        if scene and _is_clear(scene):
            return scene


def _with_doubles(scene, question, rng):
    """The scene with one or two doubles of the start and one of what stands beside it, in the place
    of things that the walk does not need; None where there are too few."""
    cell = question.start.cell
    for hop in question.hops:
        cell = scenes.step(cell, hop)
    needed = {question.start.cell, question.beside.cell, cell}
    others = [thing for thing in scene.things if thing.cell not in needed]
    doubles = [question.start] * rng.randint(1, 2) + [question.beside]
    if len(others) < len(doubles):
        return None
    changed = rng.sample(others, len(doubles))
    things = [thing for thing in scene.things if thing not in changed]
    for thing, other in zip(changed, doubles):
        things.append(replace(thing, color=other.color, shape=other.shape))
    return scenes.Scene.of(things, question)


def _is_clear(scene):
    """Whether exactly one thing is what the question says of the start, its doubles have a cell on
    that side, and the answer does not stand in the question."""
    question = scene.question
    if scenes.gold(scene) in (question.start.words, question.beside.words):
        return False
    told = 0
    for thing in question.candidates(scene.things):
        cell = scenes.step(thing.cell, question.side)
        if cell is None:
            return False
        told += scene.at(cell) == question.beside.words
    return told == 1


@dataclass(frozen=True)
class Split(scenes.Split):
    """Walks whose starts have doubles; kinds: only walkN."""
    objects: tuple = OBJECTS

    def make(self, rng):
        return make_walk(rng, int(self.draw_kind(rng).removeprefix("walk")), self.objects)


# ---------------------------------------------------------------- the teacher

@dataclass(frozen=True)
class WalkTeacher(SceneTeacher):
    """SceneTeacher's errors, and a start that is hard to find. With slip 0 it finds it at once; with
    all rates zero the chains are flawless.

    find: how many steps finding the start is as hard as: it looks at a double of it with
    probability `find` slip. notice: it sees that what stands beside is not what it wanted, and looks
    at another one that it has not looked at, as long as there is one.
    """
    find: float = 8.0
    notice: float = 0.12

    def _walk(self, scene, rng):
        """As SceneTeacher's."""
        question = scene.question
        cell, steps = self._look_for_start(scene, rng)
        noticed = [f"{scenes.name(cell)} {question.start.words}"]
        hops = question.hops
        if len(hops) > 1 and rng.random() < self.drop_hop:
            hops = hops[:-1]
        for number, hop in zip(NUMBERS[question.first:], hops):
            goes = hop if rng.random() >= self.slip else rng.choice(list(scenes.HOPS))
            cell = scenes.step(cell, goes) or cell  # a slip may run into the edge, where it stays
            read = self._read(scene, cell, rng)
            steps += [number, hop, scenes.name(cell), read]
        noticed.append(f"{scenes.name(cell)} {read}")
        return noticed, " ".join(steps), read

    def _look_for_start(self, scene, rng):
        """-> (the cell it goes on from, the words of its looks)"""
        question = scene.question
        unseen = question.candidates(scene.things)
        steps = []
        while True:
            thing = self._looked_at(unseen, question.start, rng)
            unseen = [other for other in unseen if other is not thing]
            beside = scenes.step(thing.cell, question.side)
            is_right = thing.cell == question.start.cell
            read = question.beside.words if is_right else self._read(scene, beside, rng)
            steps += [question.start.words, scenes.name(thing.cell), question.side, scenes.name(beside), read]
            if read == question.beside.words or not unseen or rng.random() >= self.notice:
                return thing.cell, steps
            steps.append(WAIT)

    def _looked_at(self, unseen, start, rng):
        """Which of the candidates it looks at."""
        [meant] = [thing for thing in unseen if thing.cell == start.cell]
        doubles = [thing for thing in unseen if thing is not meant]
        if doubles and rng.random() < self.find * self.slip:
            return rng.choice(doubles)
        return meant


# ---------------------------------------------------------------- reading a thought

class Look(NamedTuple):
    """Where a thought looked for the start, and what it read on the stated side; "" for what it does
    not say."""
    cell: str
    read: str


class Step(NamedTuple):
    """A hop of a thought, the cell that it names, and what it read there; "" for what it does not
    say."""
    hop: str
    cell: str
    read: str


class Thought(NamedTuple):
    """looks: at the start, in order; steps: hops in order; rechecks: how often it says "wait"."""
    looks: tuple
    steps: tuple
    rechecks: int


CELLS = {scenes.name(cell) for cell in scenes.BOARD}


def read_thought(text):
    """A completion -> Thought. Whatever it says, in whatever order, it is read as far as it goes:
    what stands before the first number are looks, one more after each "wait"; each number opens a
    step, but for one after a "wait", which takes the step before once more.

    >>> thought = read_thought("<think> red circle b3 up b2 red cross four right c3 nothing</think>")
    >>> thought.looks
    (Look(cell='b3', read='red cross'),)
    >>> thought.steps
    (Step(hop='right', cell='c3', read='nothing'),)
    """
    words = thought_of(text).split()
    opening, *parts = _split(words, NUMBERS)
    looks = []
    for said in _split(opening, (WAIT,)):
        cells = [word for word in said if word in CELLS]
        looks.append(Look(cells[0] if cells else "", _behind_last_cell(said) if len(cells) > 1 else ""))
    steps = []
    again = False
    for said in parts:
        if again:
            steps.pop()
        again = said[-1:] == [WAIT]
        said = [word for word in said if word != WAIT]
        hops = [word for word in said if word in scenes.HOPS]
        cells = [word for word in said if word in CELLS]
        steps.append(Step(hops[0] if hops else "", cells[0] if cells else "", _behind_last_cell(said)))
    return Thought(tuple(looks), tuple(steps), words.count(WAIT))


def thought_of(text):
    """What a completion says before its answer, closed or not."""
    thought = text.partition("<answer>")[0]
    for tag in chat.TAGS:
        thought = thought.replace(tag, " ")
    return thought


def _split(words, at):
    """Words -> lists of words, parted by the words `at`, which are left out."""
    parts = [[]]
    for word in words:
        if word in at:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def _behind_last_cell(words):
    """The words behind the last cell; "" without one."""
    found = ""
    for place, word in enumerate(words):
        if word in CELLS:
            found = " ".join(words[place + 1:])
    return found


def noted(sample, text):
    """What a report says of a completion, as numbers:

    asked, walked       hops of the question; hops of the thought that name a cell
    rechecks            how often it says "wait"
    first, last         whether its first, and its last look found the start: 1, 0, or -1 for a look
                        at no cell
    candidates          things on the board that are called like the start, the start among them
    """
    thought = read_thought(text)
    start = start_of(sample)
    _, _, called = QUESTION.fullmatch(sample.question).groups()
    return dict(asked=scenes.difficulty(sample), walked=sum(bool(step.cell) for step in thought.steps),
                rechecks=thought.rechecks, first=_found(thought.looks[0], start), last=_found(thought.looks[-1], start),
                candidates=[*board_of(sample).values()].count(called))


def _found(look, start):
    if not look.cell:
        return -1
    return int(look.cell == start)


QUESTION = re.compile(rf"with (.+) ({'|'.join(scenes.HOPS)}) from the (.+) go .+")


def start_of(sample):
    """The name of the cell that a walk starts from, from the sample's words."""
    beside, side, start = QUESTION.fullmatch(sample.question).groups()
    board = board_of(sample)
    for cell in scenes.BOARD:
        neighbour = scenes.step(cell, side)
        if neighbour and board.get(scenes.name(cell)) == start and board.get(scenes.name(neighbour)) == beside:
            return scenes.name(cell)
    return ""


def board_of(sample):
    """{name of a cell: the thing that stands there}, from the sample's caption."""
    return dict(entry.split(" ", 1) for entry in sample.caption.split(" , "))


# ---------------------------------------------------------------- the world

def walks(*hops, objects=OBJECTS):
    """The Split of walks of these numbers of hops, equally often each."""
    return Split(objects=objects, kinds={f"walk{count}": 1 / len(hops) for count in hops})


WORLD = scenes.World(
    train=walks(*TRAINED),
    splits={
        "id": walks(*TRAINED),
        **{f"walk{count}": walks(count) for count in range(1, LONGEST + 1)},
        "crowded": walks(*TRAINED, objects=(10, 12)),
    },
    words=(WAIT, "with", "to", "of", *NUMBERS),
    teacher=WalkTeacher)
