"""The world of rules and parts: answered as an independent reader would, and balanced where it says so."""
import random
import re
from collections import Counter

import numpy as np
import pytest

from data import scenes, teachers, transfer
from data.supply import DataOptions, Supply
from data.teachers import TeacherOptions
from test_scenes import HELD_OUT, read_answer
from tiny import unpainted

WORLD = transfer.WORLD
SPOKEN = (*WORLD.splits, "train", *WORLD.parts)
RULE = re.compile(r"swap (\w+) (\w+) : (.*)")


@pytest.fixture(scope="module")
def drawn():
    """drawn(split, teacher=None) -> 600 samples, not painted, and their scenes."""
    kept = {}

    def of(split, teacher=None):
        if (split, teacher) not in kept:
            kept[split, teacher] = unpainted(split, 600, 3, teacher, WORLD)
        return kept[split, teacher]
    return of


def exchanged(text, one, other):
    return " ".join({one: other, other: one}.get(word, word) for word in text.split())


def read_ruled(sample):
    """(the answer under the rule that the question states, the one without), from its words and the caption."""
    found = RULE.fullmatch(sample.question)
    if not found:
        return read_answer(sample.question, sample.caption), ""
    one, other, question = found.groups()
    without = read_answer(question, sample.caption)
    if question.startswith("what"):
        return exchanged(without, one, other), without
    start, hops = re.fullmatch(r"(from the \w+ \w+ go )(.*)", question).groups()
    return read_answer(start + exchanged(hops, one, other), sample.caption), without


@pytest.mark.parametrize("split", SPOKEN)
def test_answers_and_decoys_equal_an_independent_reader_who_stays_on_the_board(drawn, split):
    for sample in drawn(split)[0]:
        assert (sample.answer, sample.decoy) == read_ruled(sample)
        assert sample.decoy != sample.answer


@pytest.mark.parametrize("split", SPOKEN)
def test_a_rule_is_stated_where_it_should_be(drawn, split):
    ruled = np.mean([bool(RULE.match(sample.question)) for sample in drawn(split)[0]])
    if split == "train":
        assert abs(ruled - 0.2) < 0.05
    else:
        assert ruled == (split in transfer.RULES)


def test_the_splits_of_rules_swap_what_they_are_named_after(drawn):
    hops = {RULE.fullmatch(sample.question).groups()[:2] for sample in drawn("mirrored")[0]}
    colors = {RULE.fullmatch(sample.question).groups()[:2] for sample in drawn("renamed")[0]}
    assert hops == {("left", "right"), ("right", "left"), ("up", "down"), ("down", "up")}
    assert {word for pair in colors for word in pair} == {*scenes.COLORS} and len(colors) == 30


def test_no_name_under_a_rule_is_a_held_out_pair(drawn):
    for split in ("renamed", "train"):
        for sample in drawn(split, teachers.PERFECT)[0]:
            assert sample.answer not in HELD_OUT and sample.decoy not in HELD_OUT


def test_where_the_old_rule_leads_stands_a_thing_as_often_as_where_the_new_one_does(drawn):
    samples = drawn("mirrored")[0]
    empty = np.mean([[sample.answer == "nothing", sample.decoy == "nothing"] for sample in samples], axis=0)
    assert np.all(abs(empty - 0.1) < 0.04)


@pytest.mark.parametrize("split", ("count", "looks", "crowded", "train"))
def test_zero_one_and_two_are_right_equally_often(drawn, split):
    counts = Counter(sample.answer for sample in drawn(split)[0] if sample.question.startswith("how many"))
    total = sum(counts.values())
    assert {*counts} == {"zero", "one", "two"}
    assert all(abs(n / total - 1 / 3) < 4 * (2 / 9 / total) ** 0.5 for n in counts.values())


@pytest.mark.parametrize("part, kinds", transfer.PARTS.items())
def test_a_part_asks_its_kinds_half_each_and_the_splits_of_kinds_one_each(drawn, part, kinds):
    asked = Counter(sample.source for sample in drawn(part)[0])
    assert {*asked} == {f"scenes/{kind}" for kind in kinds}
    assert all(abs(n / 600 - 0.5) < 0.08 for n in asked.values())
    for kind in kinds:
        assert {sample.source for sample in drawn(kind)[0]} == {f"scenes/{kind}"}


def test_visual_changes_change_the_picture_alone():
    def shown(change):
        settings = transfer.SPLITS[change]
        world = scenes.World(splits={"x": settings})
        changed = scenes.load("x", 40, 3, world=world)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transfer.Split, "finish", lambda self, picture, rng: picture)
            return changed, scenes.load("x", 40, 3, world=world)
    for change in ("dark", "textured"):
        changed, plain = shown(change)
        assert [sample.question for sample in changed] == [sample.question for sample in plain]
        light = np.array([sample.images[0].mean() for sample in changed])
        before = np.array([sample.images[0].mean() for sample in plain])
        assert np.all(light < (0.7 if change == "dark" else 0.95) * before)
    # Stripes leave the things alone.
    for now, before in zip(changed, plain):
        is_thing = before.images[0].min(-1) < 150
        assert is_thing.any() and np.array_equal(now.images[0][is_thing], before.images[0][is_thing])


def test_small_things_are_smaller_than_any_in_training_and_crowds_larger(drawn):
    trained = {thing.radius for scene in drawn("train")[1] for thing in scene.things}
    small = {thing.radius for scene in drawn("small")[1] for thing in scene.things}
    assert max(small) < min(trained)
    assert max(len(scene.things) for scene in drawn("train")[1]) == 6
    assert {len(scene.things) for scene in drawn("crowded")[1]} == {7, 8, 9, 10}


@pytest.mark.parametrize("split", SPOKEN)
def test_the_perfect_teacher_follows_the_rule_in_the_words_of_its_result(drawn, split):
    for sample in drawn(split, teachers.PERFECT)[0]:
        assert sample.conclusion == sample.answer and sample.reasoning.endswith(sample.answer)
        found = RULE.fullmatch(sample.question)
        if found and " go " in sample.question:
            said = sample.question.split(" go ")[1].removesuffix(" ?")
            gone = sample.reasoning.split()[3::2][:len(said.split())]
            assert " ".join(gone) == exchanged(said, *found.groups()[:2])


def test_a_beginning_is_the_start_of_the_flawless_chain_and_says_no_answer_but_zero(drawn):
    for split in transfer.KINDS + transfer.RULES:
        for sample in drawn(split, teachers.PERFECT)[0]:
            begun = transfer.beginning(sample)
            assert f"{sample.reasoning} ".startswith(f"{begun} ")
            assert len(begun.split()) == (3 if " go " in sample.question else 1)
            assert sample.answer not in begun or begun == "zero"


def test_every_word_of_the_world_is_one_token():
    supply = Supply(DataOptions(world="transfer"), TeacherOptions(), seed=0)
    known = {piece.removeprefix("▁") for piece in supply.corpus()[1]}
    for split in SPOKEN:
        for sample in scenes.load(split, 200, 5, teachers.SceneTeacher(), world=WORLD):
            said = f"{sample.question} {sample.answer} {sample.decoy} {sample.reasoning} {sample.conclusion}"
            assert {*said.split()} <= known


def test_a_question_without_a_rule_means_what_it_says():
    rng = random.Random(0)
    for kind in transfer.KINDS:
        scene = scenes.make_scene(rng, kind, 1, 6)
        assert scene.question.meant("red left") == "red left" and scenes.decoy(scene) == ""
