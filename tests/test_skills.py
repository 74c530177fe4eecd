"""The small skills of the routes' base, their words, and the two procedures."""
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from data import chat, scenes, skills, teachers, tokenizer
from data.prompting import METHODS, opening

RECORDS = skills.skills(1500, 3)


def answer_of(text):
    return chat.parse(text).answer


def last_question(sample):
    """What was asked at first, without the words of a stage."""
    questions = [asked for asked, _ in sample.turns] + [sample.question]
    return questions[0].split("?")[0] + "?"


def walked(question):
    """On paper: where the hops of "from b2 go left ?" or "where is left up from b2 ?" lead."""
    if question.startswith("from"):
        start, hops = re.fullmatch(r"from (..) go (\w+) \?", question).groups()
    else:
        hops, start = re.fullmatch(r"where is (.*) from (..) \?", question).groups()
    column, row = "abcd".index(start[0]), int(start[1])
    for hop in hops.split():
        column, row = column + (hop == "right") - (hop == "left"), row + (hop == "down") - (hop == "up")
    assert 0 <= column <= 3 and 1 <= row <= 4, "the walk leaves the board"
    return "abcd"[column] + str(row)


def test_every_answer_of_a_neighbour_a_cell_and_a_tally_is_right():
    seen = Counter()
    for sample, target in RECORDS:
        question = last_question(sample)
        if " from " in question:
            assert sample.answer == walked(question) and answer_of(target) in (sample.answer, "")
            seen["cell"] += 1
        elif question.startswith("from"):
            at_end = re.search(rf"{walked(question)} (\w+ \w+|nothing)\b", target)
            assert at_end is None or at_end[1] == sample.answer
            seen["neighbour"] += at_end is not None
        elif question.startswith("how many"):
            cells = re.findall(r"\b[abcd][1234]\b", question)
            assert sample.answer == "zero one two three four five six".split()[len(cells)]
            seen["tally"] += 1
    assert len(seen) == 3 and min(seen.values()) > 50


def test_no_question_and_no_chain_of_the_task_is_among_the_skills():
    for sample, target in RECORDS:
        texts = " ".join([sample.question, target, *(text for turn in sample.turns for text in turn)])
        assert not re.search(r"how many \w+ things|from the \w+ \w+ go", texts)
        # A walk of the task starts from a thing, or takes a second hop before it looks.
        assert not re.search(r"(red|green|blue|yellow|purple|cyan) \w+ [abcd][1234] (left|right|up|down)", texts)
        hop = "(left|right|up|down)"
        assert not re.search(rf"{hop} .. {hop} .. (red|green|blue|yellow|purple|cyan)", texts)
        assert not any(" ".join(pair) in texts for pair in scenes.HELD_OUT)


def test_every_method_is_spoken_in_its_own_words_and_shares():
    method_of = {("",): "direct", ("think .",): "think", ("caption .", "conclusion ."): "caption_first",
                 ("stages .",): "stages_one_call", ("graph .", "conclusion ."): "ccot", ("steps .",): "ddcot",
                 ("summary .", "caption .", "reasoning .", "conclusion ."): "stages"}
    found = Counter()
    for sample, target in RECORDS:
        first, *later = [question for question, _ in sample.turns] + [sample.question]
        asked = (first.split("?")[1].strip(), *later)
        if asked[0].endswith("caption .") and asked[0] != "caption .":     # of ddcot, behind its steps
            asked = ("steps .",)
        found[method_of[asked]] += 1
        assert chat.parse(target).well_formed == (asked in (("think .",), ("stages .",)))
        assert bool(chat.parse(target).answer) == (asked != ("steps .",) or bool(later))
    for method, share in skills.SHARES.items():
        assert 0.75 * share < found[method] / len(RECORDS) < 1.25 * share, method


def test_a_conversation_asks_what_staged_prompting_asks():
    sample = replace(RECORDS[0][0], question="what is at b2 ?", turns=())
    end = "<answer> red circle</answer>"
    said = {"summary": "plan", "caption": "b2 red circle", "reasoning": "so", "conclusion": end}
    asked, target = skills.conversation(sample, "stages", said, random.Random(0))
    first = opening(sample, METHODS["stages"][0], "brief")
    assert asked.turns == ((first.question, "plan"), ("caption .", "b2 red circle"), ("reasoning .", "so"))
    assert asked.question == "conclusion ." and target == end


def test_all_words_of_the_skills_are_single_tokens():
    pieces = [*chat.ALL_TAGS, *scenes.pieces(), *skills.pieces()]
    tok = tokenizer.train(["what is at b2 ?"] * 2, list(dict.fromkeys(pieces)), 512)
    words = set()
    for sample, target in RECORDS:
        for text in (sample.question, target, *(text for turn in sample.turns for text in turn)):
            words |= set(re.sub("<[^>]*>", " ", text).split())
    assert len(words) > 60
    assert all(len(tok.encode(f" {word}")) == 1 for word in words)


def test_a_longer_load_begins_with_the_shorter_one():
    for (one, target), (other, same) in zip(skills.skills(5, 1), skills.skills(70, 1)):
        assert target == same and one.question == other.question and one.turns == other.turns
        assert all(np.array_equal(a, b) for a, b in zip(one.images, other.images))


@pytest.mark.parametrize("thought, found", [
    ("red circle b2 left a2 cyan cross", "walk"), ("b2 red circle", "walk"), ("b2 left a2 up a1 nothing", "walk"),
    ("a1 red circle , b2 blue cross", "list"), ("a1 b2 two", "list"), ("zero", "list"), ("a4 one", "list"),
    ("red circle b2 left a2 cyan cross d4 red square", "list"), ("", "none"), ("uncertain", "none"),
    ("left up", "none")])
def test_the_procedure_of_a_thought(thought, found):
    assert skills.procedure(f"<think> {thought}</think><answer> x</answer>") == found
    assert skills.procedure(chat.staged_text("s", "c", thought, "x")) == found
    assert skills.procedure(f"<think> {thought}<answer> x</answer>") == "none"


def test_the_drawn_worlds_teacher_lists_to_count_and_walks_to_walk():
    for sample in scenes.load("train", 200, 0, teachers.SceneTeacher(), staged=True):
        counts = sample.source.endswith("count")
        assert skills.procedure(chat.target_text(sample.conclusion, sample.reasoning)) == ("list" if counts else "walk")
        assert sample.summary == (teachers.LIST_PLAN if counts else teachers.WALK_PLAN)
        assert sample.conclusion in sample.caption or counts
