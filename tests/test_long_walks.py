"""The world of long walks: its splits, its teacher's chains re-read word by word, and the reader of thoughts."""
import re
from collections import Counter

import numpy as np
import pytest

from data import chat, long_walks, scenes
from data.long_walks import WalkTeacher
from data.supply import DataOptions, Supply
from data.teachers import TeacherOptions
from test_scenes import HELD_OUT
from tiny import unpainted

WORLD = long_walks.WORLD
SPLITS = (*WORLD.splits, "train")
FLAWLESS = WalkTeacher(slip=0.0, confuse=0.0, drop_hop=0.0)


@pytest.fixture(scope="module")
def drawn():
    """drawn(split, teacher, count=600) -> samples, not painted."""
    kept = {}

    def of(split, teacher=FLAWLESS, count=600):
        key = split, teacher, count
        if key not in kept:
            kept[key], _ = unpainted(split, count, 3, teacher, WORLD)
        return kept[key]
    return of


# ---------------------------------------------------------------- an independent, slow reader

NUMBERS = "one two three four five six seven eight".split()
THING = r"(?:red|green|blue|yellow|purple|cyan) (?:circle|square|triangle|cross)"
HOP = "up|down|left|right"
LOOK = rf"({THING}) ([a-d][1-4]) ({HOP}) ([a-d][1-4]) (nothing|{THING})"
STEP = rf"({'|'.join(NUMBERS)}) ({HOP}) ([a-d][1-4]) (nothing|{THING})"


def chain_of(sample):
    """A teacher's chain, by its whole grammar -> ([(wanted, cell, side, cell there, read)], [(number, hop, cell,
    read)])."""
    assert re.fullmatch(rf"{LOOK}(?: wait {LOOK})*(?: {STEP})+", sample.reasoning), sample.reasoning
    looks = [re.match(LOOK, look).groups() for look in sample.reasoning.split(" wait ")]
    return looks, re.findall(STEP, sample.reasoning)


def question_of(sample):
    """-> (what stands beside the start, on which side, the start, [(number, hop)])"""
    form = rf"with ({THING}) ({HOP}) from the ({THING}) go (\w+) to (\w+) of ((?:\w+ (?:{HOP}) )+)\?"
    beside, side, start, first, last, listed = re.fullmatch(form, sample.question).groups()
    words = listed.split()
    assert words[::2] == NUMBERS
    asked = list(zip(words[::2], words[1::2]))[NUMBERS.index(first):NUMBERS.index(last) + 1]
    return beside, side, start, asked


def board_of(sample):
    return dict(entry.split(" ", 1) for entry in sample.caption.split(" , "))


def next_to(cell, hop):
    """The cell a hop away; one with a name like "e2" where it leaves the board."""
    column, row = " abcde".index(cell[0]), int(cell[1])
    column, row = column + (hop == "right") - (hop == "left"), row + (hop == "down") - (hop == "up")
    return " abcde"[column] + str(row)


def starts_of(sample):
    """Cells of all things that are called like the start, those first that stand as the question says."""
    beside, side, start, _ = question_of(sample)
    board = board_of(sample)
    called = [cell for cell, words in board.items() if words == start]
    return sorted(called, key=lambda cell: board.get(next_to(cell, side)) != beside)


def meant_by(sample):
    return starts_of(sample)[0]


# ---------------------------------------------------------------- the world

@pytest.mark.parametrize("split", SPLITS)
def test_the_start_is_told_by_both_things_of_the_question_and_by_neither_alone(drawn, split):
    for sample in drawn(split):
        board = board_of(sample)
        beside, side, start, _ = question_of(sample)
        called = starts_of(sample)
        assert len(called) in (2, 3) and list(board.values()).count(beside) >= 2
        assert [board.get(next_to(cell, side)) == beside for cell in called] == [True] + [False] * (len(called) - 1)
        assert all(re.fullmatch("[a-d][1-4]", next_to(cell, side)) for cell in called)
        assert long_walks.start_of(sample) == called[0]
        assert sample.answer not in (beside, start) and not HELD_OUT & {*board.values()}


@pytest.mark.parametrize("split", SPLITS)
def test_answers_equal_an_independent_reader_who_stays_on_the_board(drawn, split):
    for sample in drawn(split):
        cell = meant_by(sample)
        *_, hops = question_of(sample)
        for _, hop in hops:
            cell = next_to(cell, hop)
            assert re.fullmatch("[a-d][1-4]", cell)
        assert sample.answer == board_of(sample).get(cell, "nothing")


@pytest.mark.parametrize("split, hops, things", [
    ("train", {1, 2, 3}, (6, 9)), ("id", {1, 2, 3}, (6, 9)), ("crowded", {1, 2, 3}, (10, 12)),
    *((f"walk{hops}", {hops}, (6, 9)) for hops in range(1, 7))])
def test_a_split_holds_the_hops_and_the_things_that_it_says(drawn, split, hops, things):
    samples = drawn(split)
    asked = Counter(len(question_of(sample)[-1]) for sample in samples)
    least, most = things
    assert {*asked} == hops and {len(board_of(sample)) for sample in samples} == {*range(least, most + 1)}
    assert all(abs(count / 600 - 1 / len(hops)) < 0.08 for count in asked.values())
    assert all(scenes.difficulty(sample) == len(question_of(sample)[-1]) for sample in samples)


def test_the_asked_hops_stand_anywhere_in_the_list_and_all_questions_are_equally_long(drawn):
    begun = {(question_of(sample)[-1][0][0], len(question_of(sample)[-1])) for sample in drawn("train", FLAWLESS, 3000)}
    assert begun == {(NUMBERS[first], hops) for hops in (1, 2, 3) for first in range(9 - hops)}
    assert len({len(sample.question.split()) for split in SPLITS for sample in drawn(split)}) == 1


def test_only_what_is_drawn_has_a_difficulty():
    assert scenes.difficulty(scenes.load("walk4", 1, 0)[0]) in (4, 5)
    assert [scenes.difficulty(sample) for sample in scenes.load("sft", 3, 0)] == [0, 0, 0]
    with pytest.raises(ValueError, match="^sample 'a' of 'cats' has no difficulty; expected a drawn scene"):
        scenes.difficulty(scenes.Sample(id="a", source="cats"))


def test_every_word_of_the_world_is_one_token():
    _, pieces = Supply(DataOptions(world="long_walks"), TeacherOptions(), 0).corpus()
    known = {piece.removeprefix("▁") for piece in pieces}
    for sample in scenes.load("walk6", 300, 5, WalkTeacher(), world=WORLD):
        assert {*f"{sample.question} {sample.answer} {sample.reasoning} {sample.conclusion}".split()} <= known


# ---------------------------------------------------------------- the teacher

@pytest.mark.parametrize("split", SPLITS)
def test_a_flawless_chain_finds_the_start_at_once_and_every_cell_and_thing_on_the_way(drawn, split):
    for sample in drawn(split):
        looks, steps = chain_of(sample)
        board = board_of(sample)
        beside, side, start, hops = question_of(sample)
        cell = meant_by(sample)
        assert looks == [(start, cell, side, next_to(cell, side), beside)]
        assert [(number, hop) for number, hop, _, _ in steps] == hops
        for _, hop, named, read in steps:
            cell = next_to(cell, hop)
            assert (named, read) == (cell, board.get(cell, "nothing"))
        assert sample.conclusion == sample.answer == read


def test_looks_are_wrong_and_second_looks_are_taken_at_the_stated_shares(drawn):
    # The start is as hard to find as eight steps are: .48 of the first looks are wrong, and .12 of these are noticed,
    # but for the few where a slip reads what was wanted.
    first_is_wrong, again = [], []
    for sample in drawn("train", WalkTeacher(), 6000):
        looks, _ = chain_of(sample)
        first_is_wrong.append(looks[0][1] != meant_by(sample))
        if first_is_wrong[-1]:
            again.append(len(looks) > 1)
    for seen, stated in ((first_is_wrong, 0.48), (again, 0.12)):
        assert abs(np.mean(seen) - stated) < 4 * (stated * (1 - stated) / len(seen)) ** 0.5
    assert 0.03 < np.mean(first_is_wrong) * np.mean(again) < 0.08


def test_a_wait_always_follows_a_wrong_read_and_no_candidate_is_looked_at_twice(drawn):
    counts = Counter()
    for sample in drawn("train", WalkTeacher(slip=0.1, notice=1.0), 3000):
        looks, _ = chain_of(sample)
        beside = question_of(sample)[0]
        *before, last = looks
        assert all(read != beside for *_, read in before)
        assert last[-1] == beside, "this teacher notices all, and goes on when it has found the start, or thinks so"
        cells = [cell for _, cell, *_ in looks]
        assert len({*cells}) == len(cells) and {*cells} <= {*starts_of(sample)}
        counts[len(looks)] += 1
    assert {*counts} == {1, 2, 3}


def test_a_wrong_look_is_read_as_what_stands_there(drawn):
    honest = []
    for sample in drawn("train", WalkTeacher(slip=0.1, confuse=0.0), 3000):
        board = board_of(sample)
        for _, cell, side, there, read in chain_of(sample)[0]:
            assert there == next_to(cell, side)
            if cell != meant_by(sample):
                honest.append(read == board.get(there, "nothing"))
    assert 0.88 < np.mean(honest) < 0.95            # a slip in ten, which may hit upon the same


def test_the_last_hop_is_dropped_at_its_rate_never_from_a_walk_of_one_and_slips_are_not_said(drawn):
    for split, stated in (("walk1", 0.0), ("walk3", 0.6)):
        samples = drawn(split, WalkTeacher(), 1500)
        dropped = []
        for sample in samples:
            hops = question_of(sample)[-1]
            said = [(number, hop) for number, hop, _, _ in chain_of(sample)[1]]
            assert said == hops[:len(said)]
            dropped.append(len(hops) - len(said))
        assert {*dropped} <= {0, 1} and abs(np.mean(dropped) - stated) < 0.06


# ---------------------------------------------------------------- reading thoughts

def test_the_reader_of_thoughts_reads_a_teachers_chains_as_the_slow_one_does(drawn):
    for close in (True, False):
        for sample in drawn("walk3", WalkTeacher(notice=0.5), 1500):
            looks, steps = chain_of(sample)
            text = chat.target_text(sample.conclusion, sample.reasoning, close_think=close)
            thought = long_walks.read_thought(text)
            assert thought.looks == tuple((cell, read) for _, cell, _, _, read in looks)
            assert thought.steps == tuple(step[1:] for step in steps) and thought.rechecks == len(looks) - 1
            right = [cell == meant_by(sample) for _, cell, *_ in looks]
            assert long_walks.noted(sample, text) == dict(
                asked=3, walked=len(steps), rechecks=len(looks) - 1, first=right[0], last=right[-1],
                candidates=len(starts_of(sample)))


@pytest.mark.parametrize("thought, walked, rechecks, first, last", [
    ("red circle d3 left c3 nothing wait red circle b2 left a2 blue cross two left a2 blue cross three up a1 nothing",
     2, 1, 0, 1),
    ("b2 two left a2", 1, 0, 1, 1),                                     # few words
    ("red circle two left a2 blue cross three up a1 nothing", 2, 0, -1, -1),    # no look
    ("b2 left a2 wait wait d3 two left c3", 1, 2, 1, 0),                # an empty look between two waits
    ("b2 two left a2 wait three left a1 wait three up a1 nothing", 1, 2, 1, 1),    # hops taken again
    ("b2 two left three up a1 nothing", 1, 0, 1, 1),                    # a hop without a cell
    ("b2 two left wait a2 three up a1 nothing", 2, 1, 1, 1),            # no hop is taken again
    ("", 0, 0, -1, -1), ("wait wait", 0, 2, -1, -1)])
def test_a_thought_is_read_as_far_as_it_goes(thought, walked, rechecks, first, last):
    sample = scenes.Sample(source="scenes/walk2",
                           question="with blue cross left from the red circle go two to three of two left three up ?",
                           caption="a2 blue cross , b2 red circle , d3 red circle")
    for text in (f"<think> {thought}</think><answer> nothing</answer>", f"<think> {thought}<answer> b1", thought):
        assert long_walks.noted(sample, text) == dict(
            asked=2, walked=walked, rechecks=rechecks, first=first, last=last, candidates=2)


def test_a_hop_that_is_taken_again_replaces_the_one_before():
    thought = long_walks.read_thought("b2 left a2 red cross two left a2 nothing wait two left a1 nothing "
                                      "three up a1 blue cross")
    assert thought.looks == (("b2", "red cross"),)
    assert thought.steps == (("left", "a1", "nothing"), ("up", "a1", "blue cross"))
