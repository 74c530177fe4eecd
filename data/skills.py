"""Small skills of drawn scenes, which a base model learns beside looking, and the two procedures that it knows.

    records = skills(12000, seed)       # [(sample, target text)], for stage sft with --skills
    procedure(completion)               # "walk", "list" or "none"

The base is asked nothing but small questions: what is in a cell, where a thing is, what stands a
hop from a cell, which cell is a hop or two from it, how many cells are named. It answers them at
once, after a thought, or in the stages of every method of data/prompting.py, so that it knows what
each instruction asks for. No question of the task itself, and no chain that solves one, is among
them: those have to be put together from these skills.

A thought follows one of two procedures. "list" names everything there is, in reading order; "walk"
goes to the one place that matters, hop by hop. Both solve the small questions; which one solves a
question of the task, the base is not told.
"""
import random
import re
from dataclasses import replace
from typing import NamedTuple

from data import chat, scenes
from data.prompting import METHODS, opening
from data.sample import Sample
from data.teachers import LIST_PLAN, WALK_PLAN

OBJECTS = 8                         # most objects of a picture, as in scenes.LOOKING
# How a small question is answered: data.prompting's method -> share. "direct" is an answer at once.
SHARES = {"direct": 0.40, "think": 0.20, "caption_first": 0.07, "stages_one_call": 0.10, "stages": 0.09, "ccot": 0.07,
          "ddcot": 0.07}
# Which small question: kind -> share.
KINDS = {"look": 0.4, "neighbour": 0.25, "cell": 0.2, "tally": 0.15}


class Small(NamedTuple):
    """A small question about a scene.

    walked: the thought that goes to the place that matters; cells: those that it looks at; seen: whether it takes a
    look at the picture to answer it.
    """
    question: str
    answer: str
    walked: str
    cells: tuple
    seen: bool


def skills(count, seed):
    """`count` conversations -> [(Sample, target text)], the last reply as target, the others in Sample.turns.

    Pictures, words and noise have random streams of their own, as in scenes.load.
    """
    scene_rng = random.Random(f"skills {seed}")
    drawn = []
    for _ in range(scenes.in_whole_groups(count)):
        drawn.append(scenes.make_scene(scene_rng, "at", 1, OBJECTS))
    images = scenes.pictures(drawn, "skills", seed)
    records = []
    for i in range(count):
        rng = random.Random(f"skills {seed} {i}")
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        small = QUESTIONS[kind](drawn[i], rng)
        method = rng.choices(list(SHARES), list(SHARES.values()))[0]
        sample = Sample(id=f"skills-{seed}-{i}", question=small.question, images=(images[i],), answer=small.answer,
                        split="skills", source=f"scenes/{kind}")
        records.append(conversation(sample, method, replies(small, drawn[i], rng), rng))
    return records


# ---------------------------------------------------------------- small questions

def _look(scene, rng):
    look = scenes.looking_question(scene, rng)
    entries = [f"{scenes.name(cell)} {scene.at(cell)}" for cell in look.cells]
    return Small(look.question, look.answer, " ".join(entries), look.cells, True)


def _neighbour(scene, rng):
    """What stands a hop from a cell."""
    start = rng.choice(scenes.BOARD)
    (hop,), cell = _hops(start, 1, rng)
    read = scene.at(cell)
    walked = f"{scenes.name(start)} {hop} {scenes.name(cell)} {read}"
    return Small(f"from {scenes.name(start)} go {hop} ?", read, walked, (cell,), True)


def _cell(scene, rng):
    """Which cell is a hop or two from a cell: the board alone, no look at the picture."""
    start = rng.choice(scenes.BOARD)
    hops, cell = _hops(start, rng.choice((1, 2)), rng)
    steps = [scenes.name(start)]
    at = start
    for hop in hops:
        at = scenes.step(at, hop)
        steps += [hop, scenes.name(at)]
    return Small(f"where is {' '.join(hops)} from {steps[0]} ?", scenes.name(cell), " ".join(steps), (cell,), False)


def _hops(cell, count, rng):
    """-> (as many hops from a cell as `count`, on the board, the cell that they lead to)."""
    hops = []
    for _ in range(count):
        hop = rng.choice([hop for hop in scenes.HOPS if scenes.step(cell, hop)])
        cell = scenes.step(cell, hop)
        hops.append(hop)
    return hops, cell


def _tally(scene, rng):
    """How many cells are named."""
    number = rng.randrange(len(scenes.NUMBERS))
    cells = sorted(rng.sample(scenes.BOARD, number), key=lambda cell: (cell[1], cell[0]))
    names = " ".join(map(scenes.name, cells)) or scenes.NOTHING
    total = scenes.NUMBERS[number]
    return Small(f"how many : {names} ?", total, f"{names} {total}", tuple(cells), False)


QUESTIONS = {"look": _look, "neighbour": _neighbour, "cell": _cell, "tally": _tally}


# ---------------------------------------------------------------- replies

def replies(small, scene, rng):
    """{stage name: what is to be said in it}; the thought, the summary and the caption follow one procedure."""
    listed = scenes.caption(scene)
    noticed = " , ".join(f"{scenes.name(cell)} {scene.at(cell)}" for cell in small.cells) or scenes.NOTHING
    thought = small.walked
    plan = WALK_PLAN
    if small.seen and rng.random() < 0.5:
        thought = listed
        noticed = listed
        plan = LIST_PLAN
    conclusion = chat.target_text(small.answer)
    return {
        "summary": plan,
        "caption": noticed,
        "reasoning": thought,
        "conclusion": conclusion,
        "graph": " , ".join(f"{thing.words} {scenes.name(thing.cell)}" for thing in scene.things),
        "steps": "uncertain" if small.seen else small.walked,
        "direct": conclusion,
        "think": chat.target_text(small.answer, thought),
        "stages_one_call": chat.staged_text(plan, noticed, thought, small.answer),
    }


def conversation(sample, method, said, rng):
    """The stages of a method about a sample, with the replies `said` -> (Sample, target text).

    Where a stage opens a new conversation, the method has several; one of them is drawn. What opens it and what is
    asked later are the words of data/prompting.py.
    """
    stages = METHODS[method]
    starts = [number for number, stage in enumerate(stages) if number == 0 or stage.sees != "all"]
    first = rng.choice(starts)
    earlier = [(stage.name, said[stage.name]) for stage in stages[:first]]
    opened = opening(sample, stages[first], "brief", earlier)
    question = opened.question
    target = _reply(said, method, stages[first])
    turns = []
    for stage in stages[first + 1:]:
        if stage.sees != "all":
            break
        turns.append((question, target))
        question = stage.brief
        target = _reply(said, method, stage)
    if not target.startswith("<"):          # a plain text begins with a space
        target = f" {target}"
    return replace(opened, question=question, turns=tuple(turns)), target


def _reply(said, method, stage):
    """What a stage of a method is answered; one that is a method of its own is called "answer"."""
    return said[method if stage.name == "answer" else stage.name]


def pieces():
    """The words of the skills, each to be one token, with the space before it."""
    words = set(f"{LIST_PLAN} {WALK_PLAN} uncertain : how many".split())
    for stages in METHODS.values():
        for stage in stages:
            words |= set(stage.brief.split())
    return [f"▁{word}" for word in sorted(words)]


# ---------------------------------------------------------------- procedures

_CELL = r"\b[abcd][1234]\b"
_HOP = rf"\b(?:{'|'.join(scenes.HOPS)})\b"
_CELL_WITHOUT_HOP = re.compile(rf"{_CELL}(?!\s+{_HOP}).*{_CELL}", re.DOTALL)
_COUNT = re.compile(rf"\b(?:{'|'.join(scenes.NUMBERS)})\b")


def procedure(text):
    """The procedure that the thought of a completion follows, of either form.

    "walk": places one after the other, each but the first behind a hop, or a single place. "list": places without a hop
    between them, or a number of them. "none": no closed thought, or neither in it.

    >>> procedure("<think> red circle b2 left a2 cyan cross</think><answer> cyan cross</answer>")
    'walk'
    >>> procedure("<think> a1 red circle , b2 blue cross</think><answer> two</answer>")
    'list'
    """
    thought = chat.parse(text).think
    if _COUNT.search(thought) or _CELL_WITHOUT_HOP.search(thought):
        return "list"
    if re.search(_CELL, thought):
        return "walk"
    return "none"
