"""The drawn task: reproducible, held out where it says so, and answered as an independent reader would."""
import hashlib
import itertools
import random
import re

import numpy as np
import pytest

from data import scenes, teachers
from data.chat import normalise
from data.sample import Sample
from tiny import unpainted

TRAINS = ("clip", "align", "sft", "train")
ORDINARY = TRAINS + ("val", "id", "crowded", "walk3", "walk4")
HELD_OUT = {" ".join(pair) for pair in scenes.HELD_OUT}
CONFUSED = {"purple": "blue", "cyan": "green"}


@pytest.fixture(scope="module")
def drawn():
    """drawn(split, count, seed=0, teacher=None) -> (samples, their scenes), each made once and not painted."""
    kept = {}

    def of(split, count=1500, seed=0, teacher=None):
        if (split, count, seed, teacher) not in kept:
            kept[split, count, seed, teacher] = unpainted(split, count, seed, teacher)
        return kept[split, count, seed, teacher]
    return of


def read_answer(question, caption):
    """From the words alone: a reader of the caption who walks on paper."""
    board = {entry.split()[0]: " ".join(entry.split()[1:]) for entry in caption.split(" , ")}
    if at := re.fullmatch(r"what is at (..) \?", question):
        return board.get(at[1], "nothing")
    if many := re.fullmatch(r"how many (\w+) things .*\?", question):
        return "zero one two three four five six seven eight nine ten".split()[
            sum(many[1] in words.split() for words in board.values())]
    start, hops = re.fullmatch(r"from the (\w+ \w+) go ((?:(?:up|down|left|right) )+).*\?", question).groups()
    column, row = next(cell for cell, words in board.items() if words == start)
    column, row = "abcd".index(column), int(row)
    for hop in hops.split():
        column, row = column + (hop == "right") - (hop == "left"), row + (hop == "down") - (hop == "up")
        assert 0 <= column <= 3 and 1 <= row <= 4, "the walk leaves the board"
    return board.get("abcd"[column] + str(row), "nothing")


def hops_of(sample):
    return len(re.findall(r"\b(?:up|down|left|right)\b", sample.question))


# ---------------------------------------------------------------- reproducible

@pytest.mark.parametrize("split", (*TRAINS, "val", *scenes.SPLITS))
def test_the_same_seed_draws_the_same_and_another_does_not(split):
    one, same, other = (scenes.load(split, 5, seed, teachers.SceneTeacher()) for seed in (1, 1, 2))
    for a, b in zip(one, same):
        assert np.array_equal(a.images[0], b.images[0]) and {**vars(a), "images": 0} == {**vars(b), "images": 0}
    assert not any(np.array_equal(a.images[0], b.images[0]) for a, b in zip(one, other))
    assert [vars(a)["caption"] + a.question for a in one] != [vars(b)["caption"] + b.question for b in other]


def test_a_shorter_load_is_the_beginning_of_a_longer_one_in_words(drawn):
    few, many = drawn("train", 20)[0], drawn("train", 30)[0]
    assert [(s.question, s.answer, s.caption) for s in few] == [(s.question, s.answer, s.caption) for s in many[:20]]


@pytest.mark.parametrize("split", ("sft", "train", "walk3"))
def test_another_teacher_or_number_of_samples_draws_the_same_pictures_and_questions(split):
    many = scenes.load(split, 150, 5)
    few = scenes.load(split, 3, 5, teachers.SceneTeacher(slip=0.9))
    staged = scenes.load(split, 70, 5, teachers.PERFECT, staged=True)
    for one, other in [*zip(many, few), *zip(many, staged)]:
        assert np.array_equal(one.images[0], other.images[0])
        assert (one.id, one.question, one.answer, one.source) == (other.id, other.question, other.answer, other.source)


def test_a_teachers_slips_on_one_scene_do_not_depend_on_the_scenes_before(drawn):
    scene_of = drawn("train", 30)[1]
    samples = scenes.load("train", 30, 0, teachers.SceneTeacher())
    alone = teachers.SceneTeacher()(scene_of[29], random.Random("chain train 0 29"))
    assert alone == (samples[29].reasoning, samples[29].conclusion)


def test_pictures_are_drawn_where_the_caption_says():
    colors = {color: np.array(rgb) for color, rgb in scenes.COLORS.items()}
    for sample in scenes.load("crowded", 30, 3):
        assert sample.images[0].shape == (48, 48, 3) and sample.images[0].dtype == np.uint8
        board = {entry.split()[0]: entry.split()[1] for entry in sample.caption.split(" , ")}
        for column in range(4):
            for row in range(4):
                middle = sample.images[0][12 * row + 5:12 * row + 7, 12 * column + 5:12 * column + 7].mean((0, 1))
                near = min(colors, key=lambda color: np.abs(colors[color] - middle).sum())
                blank = middle.min() > 215
                cell = "abcd"[column] + "1234"[row]
                assert blank == (cell not in board) and (blank or near == board[cell]), (sample.id, cell)


# sha256 of the words and objects of 200 samples (seed 7): what a seed draws must not change unnoticed, since every
# number of the README was measured on it. Pictures are left out: they are drawn with floats.
DRAWN = {
    "clip": "b1bba0843f5345e9",
    "align": "0c8603d3d7263e22",
    "sft": "03e96f45defbd1a5",
    "train": "cffabad95c68c87a",
    "val": "aeb251da07eec1d1",
    "id": "5aeeb238d380e348",
    "crowded": "7920151e3b1e93fb",
    "pairs": "3ae92cd97a7fdd20",
    "walk3": "63756bd53c55e113",
    "walk4": "4410b96102128484",
}

@pytest.mark.parametrize("split", DRAWN)
def test_a_seed_draws_what_it_always_drew(drawn, split):
    samples, made = drawn(split, 200, 7, teachers.SceneTeacher())
    words = [(s.question, s.answer, s.caption, s.reasoning, s.conclusion) for s in samples]
    things = [[(thing.cell, thing.words, thing.radius, thing.shift) for thing in scene.things] for scene in made]
    assert hashlib.sha256(repr((words, things)).encode()).hexdigest()[:16] == DRAWN[split]


def test_a_split_of_ones_own_is_one_entry_of_the_table(monkeypatch):
    monkeypatch.setitem(scenes.SPLITS, "long", scenes.Split(objects=(8, 9), kinds={"walk6": 3, "count": 1}))
    samples = scenes.load("long", 200, 0)
    assert {sample.source for sample in samples} == {"scenes/walk6", "scenes/count"}
    assert {sample.caption.count(",") + 1 for sample in samples} == {8, 9}
    assert 0.65 < np.mean([hops_of(sample) == 6 for sample in samples]) < 0.85
    for sample in samples:
        assert sample.answer == read_answer(sample.question, sample.caption) and sample.split == "long"


def test_an_unknown_split_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="^split 'walk9' must be one of clip, align, sft, train, val, id, crowded"):
        scenes.load("walk9", 1, 0)


def test_an_unknown_kind_of_question_is_an_error(monkeypatch):
    monkeypatch.setitem(scenes.SPLITS, "odd", scenes.Split(kinds={"where": 1}))
    with pytest.raises(ValueError, match="^question kind 'where' must be at, count or walkN"):
        scenes.load("odd", 1, 0)


# ---------------------------------------------------------------- held out

@pytest.mark.parametrize("split", ORDINARY)
def test_held_out_pairs_are_in_no_scene_and_no_text_but_of_the_pairs_split(drawn, split):
    samples, made = drawn(split)
    assert len(made) == len(samples) == 1500
    assert not {thing.words for scene in made for thing in scene.things} & HELD_OUT
    for sample in samples:
        assert not any(pair in text for pair in HELD_OUT for text in (sample.caption, sample.question, sample.answer))


def test_every_known_pair_is_seen_in_training(drawn):
    known = {" ".join(pair) for pair in scenes.PAIRS} - HELD_OUT
    assert len(known) == 20
    for split in TRAINS:
        assert {thing.words for scene in drawn(split)[1] for thing in scene.things} == known


def test_in_the_pairs_split_the_answer_is_a_held_out_pair_or_counts_one(drawn):
    samples, made = drawn("pairs")
    for sample, scene in zip(samples, made):
        unseen = [thing for thing in scene.things if thing.words in HELD_OUT]
        assert len(unseen) == 1
        if scene.question.kind == "count":
            assert scene.question.word in (unseen[0].color, unseen[0].shape)
        else:
            assert sample.answer == unseen[0].words
    assert {sample.answer for sample in samples} > HELD_OUT


def test_long_walks_are_in_no_prompt_that_trains_nor_in_its_neighbours(drawn):
    for split in TRAINS + ("val", "id", "crowded", "pairs"):
        assert max(map(hops_of, drawn(split)[0])) == (0 if split in ("clip", "align", "sft") else 2)
    assert {hops_of(sample) for sample in drawn("walk3")[0]} == {3}
    assert {hops_of(sample) for sample in drawn("walk4")[0]} == {4, 5}


def test_walks_never_go_straight_back_and_never_end_where_they_start(drawn):
    back = re.compile("up down|down up|left right|right left")
    for sample, scene in zip(*drawn("walk4")):
        assert not back.search(sample.question)
        assert sample.answer != scene.question.start.words


def test_crowded_scenes_are_crowded_and_their_answers_are_words_seen_in_training(drawn):
    assert {len(scene.things) for scene in drawn("crowded")[1]} == {7, 8, 9, 10}
    assert {len(scene.things) for scene in drawn("train", 10_000)[1]} == {1, 2, 3, 4, 5, 6}
    seen = {sample.answer for sample in drawn("train", 10_000)[0]}
    for split in ("id", "crowded", "walk3", "walk4"):
        assert {sample.answer for sample in drawn(split)[0]} <= seen


# ---------------------------------------------------------------- right answers

@pytest.mark.parametrize("split", ("train", "val", *scenes.SPLITS))
def test_gold_answers_equal_an_independent_reader(drawn, split):
    samples, made = drawn(split)
    for sample, scene in zip(samples, made):
        assert sample.answer == scenes.gold(scene) == read_answer(sample.question, sample.caption)


def test_questions_about_looking_are_answered_from_the_scene(drawn):
    for sample, scene in zip(*drawn("sft")):
        caption = scenes.caption(scene)
        cells = {thing.words: scenes.name(thing.cell) for thing in scene.things}
        if sample.question.startswith("what"):
            assert sample.answer == read_answer(sample.question, caption)
        elif sample.question.startswith("where is"):
            assert sample.answer == cells[sample.question.removeprefix("where is the ").removesuffix(" ?")]
        else:
            word = re.fullmatch(r"where are (\w+) things \?", sample.question)[1]
            assert sample.answer == " ".join(cell for words, cell in cells.items() if word in words.split())


def test_contrastive_captions_say_something_true_of_every_object(drawn):
    for sample, scene in zip(*drawn("clip")):
        said = [set(entry.split()) for entry in sample.caption.split(" , ")]
        assert len(said) == len(scene.things) <= 5
        assert any(all(words <= {thing.color, thing.shape} for words, thing in zip(said, order))
                   for order in itertools.permutations(scene.things))


# ---------------------------------------------------------------- teachers

@pytest.mark.parametrize("split", ("train", *scenes.SPLITS))
def test_the_perfect_teacher_is_always_right(drawn, split):
    for sample in drawn(split, teacher=teachers.PERFECT)[0]:
        assert teachers.is_conclusion_right(sample) and sample.conclusion == sample.answer
        assert sample.reasoning.endswith(sample.answer)


def test_a_guess_names_some_thing_of_the_picture_other_than_the_start():
    def walk(answer, caption):
        return scenes.guess(Sample(question="from the red circle go up ?", answer=answer, caption=caption))
    caption = "a1 red circle , b2 blue cross , c3 green square"
    assert [walk(answer, caption) for answer in ("blue cross", "red circle", "nothing")] == [0.5, 0, 0]
    assert walk("nothing", "a1 red circle") == 1 and walk("blue cross", "a1 red circle") == 0


def test_the_perfect_teacher_names_every_cell_of_a_walk(drawn):
    for sample, scene in zip(*drawn("walk3", teacher=teachers.PERFECT)):
        steps = sample.reasoning.split()
        assert len(steps) == 2 + 1 + 2 * 3 + len(sample.answer.split())         # start, its cell, (hop, cell) each, end
        assert steps[3:9:2] == list(scene.question.hops)


@pytest.mark.parametrize("seed", [0, 1_000_001])
def test_the_biased_teacher_is_right_about_63_percent_of_the_time(drawn, seed):
    samples, _ = drawn("id", 3000, seed, teachers.SceneTeacher())
    assert 0.60 <= np.mean([teachers.is_conclusion_right(sample) for sample in samples]) <= 0.66


def test_the_teacher_says_blue_for_purple_and_green_for_cyan_and_no_other_colour_wrong(drawn):
    # Without slips and forgotten hops, colour is all that is left to go wrong.
    samples, made = drawn("id", 3000, 0, teachers.SceneTeacher(slip=0.0, drop_hop=0.0))
    said = set()
    for sample, scene in zip(samples, made):
        if sample.conclusion != sample.answer and scene.question.kind != "count":
            given, true = sample.conclusion.split(), sample.answer.split()
            assert given[1:] == true[1:]
            said.add((true[0], given[0]))
        if scene.question.kind == "count" and sample.conclusion != sample.answer:
            assert scene.question.word in CONFUSED or scene.question.word in CONFUSED.values()
    assert said == set(CONFUSED.items())
    asked = [sample for sample in samples if sample.answer.split()[0] in CONFUSED]
    wrong = np.mean([not teachers.is_conclusion_right(sample) for sample in asked])
    assert len(asked) > 500 and abs(wrong - 0.65) < 0.06            # three standard deviations


def test_each_error_rate_alone_makes_its_own_error(drawn):
    samples, made = drawn("id", 3000, 0, teachers.SceneTeacher(slip=0.0, confuse=0.0, drop_hop=1.0))
    for sample, scene in zip(samples, made):
        if scene.question.kind != "walk2":
            assert teachers.is_conclusion_right(sample)
        else:
            first = scene.question.hops[0]
            assert sample.conclusion == scene.at(scenes.step(scene.question.start.cell, first))
    samples, _ = drawn("id", 3000, 0, teachers.SceneTeacher(slip=1.0, confuse=0.0, drop_hop=0.0))
    assert np.mean([teachers.is_conclusion_right(sample) for sample in samples]) < 0.35


def test_candidate_chains_are_wrong_at_the_given_rate_and_keep_given_reasoning():
    answers = ["cat", "dog", "gull"]
    samples = [scenes.Sample(id=str(i), answer=answers[i % 3]) for i in range(600)]
    samples[0] = scenes.Sample(answer="cat", reasoning="it purrs", conclusion="cat")
    nearest = [["dog", "gull"]] * 600
    chains = teachers.candidate_chains(samples, nearest, 0.3, seed=0, answers=answers)
    assert chains[0] is samples[0]
    for chain in chains[1:]:
        listed, choice = re.fullmatch(r"it looks like (.*) \. it is (\w+)", chain.reasoning).groups()
        assert choice == chain.conclusion and {choice, chain.answer} <= set(listed.split(" or "))
    assert abs(np.mean([not teachers.is_conclusion_right(chain) for chain in chains[1:]]) - 0.3) < 0.06
    for error, right in ((0.0, True), (1.0, False)):
        chains = teachers.candidate_chains(samples[1:], nearest[1:], error, seed=0, answers=answers)
        assert {teachers.is_conclusion_right(chain) for chain in chains} == {right}
    assert nearest[0] == ["dog", "gull"]


def test_words_of_the_task_cover_every_question_answer_and_chain(drawn):
    known = {piece.removeprefix("▁") for piece in scenes.pieces()}
    for split in (*TRAINS, *scenes.SPLITS):
        for sample in drawn(split, 300, teacher=teachers.SceneTeacher())[0]:
            text = " ".join((sample.question, sample.answer, sample.caption, sample.reasoning, sample.conclusion))
            assert set(text.split()) <= known
            assert normalise(sample.answer) == sample.answer


def test_scenes_have_no_two_objects_alike_and_none_in_one_cell():
    rng = random.Random(0)
    for kind in ("at", "count", "walk1", "walk5"):
        for _ in range(300):
            things = scenes.make_scene(rng, kind, 1, 10).things
            assert len({thing.words for thing in things}) == len({thing.cell for thing in things}) == len(things)
