"""Rewards against an adversary: nothing earns what it should not, nothing raises, nothing is slow."""
import math
import random
import re
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import hostile
import train
from data import chat, scenes
from data.sample import Sample
from model.runs.config import change
from rl import rewards, worker
from rl.rewards import (RewardOptions, Rewards, boxes_of, caption, consistency, correctness, format, iou, length,
                        repetition)


def gold(answer, **fields):
    return Sample(answer=answer, **fields)


def says(answer, think="a1 b2"):
    return f"<think> {think}</think><answer> {answer}</answer>"


# ---------------------------------------------------------------- the one answer parser

FORMED = says("two")
SAME = [FORMED, " <think>\n</think> \n <answer>two</answer>\n", "<think></think><answer>Two.</answer>"]
# A right answer in a single tag, but a malformed completion.
LOOSE = ["<answer> two</answer>", "<think> so<answer> two</answer>", "so <think> a</think><answer>two</answer>",
         "<think> a</think> then <answer>two</answer>", "<think> a</think><answer>two</answer> done",
         "<answer>two</answer><think> a</think>", "<think> a</think></think><answer>two</answer>",
         "<think><think> a</think><answer>two</answer>", "</think><think><answer>two</answer>"]
EVERY = ", ".join(["one", "two", "three", "four", "five"])
ZERO = "\u200b"
# Nothing in here may count as the answer "two".
CHEATS = {
    "empty": ["", "<answer></answer>", "<think></think><answer></answer>", "<think> two</think><answer></answer>",
              "<answer/>", "<think/><answer/>"],
    "white space": [" ", "\n\t", "<answer> </answer>", "<think> </think><answer>\n\t \n</answer>",
                    f"<answer>{ZERO}</answer>", "<answer>\u00a0\u3000</answer>"],
    "no tag": ["two", "two two two", "the answer is two", "answer: two", "\\boxed{two}", "**two**"],
    "several answers": ["<answer>one</answer><answer>two</answer>", "<answer>two</answer><answer>two</answer>",
                        FORMED + FORMED, FORMED + "<answer>", FORMED + "</answer>", FORMED + "<answer></answer>",
                        "<answer>two</answer><answer>two</answer><answer>two</answer>"],
    "answer in the thought": ["<think> two</think>", "<think><answer>two</answer></think>",
                              "<think> the count is two .</think><answer> seven</answer>",
                              "<think> a <answer>two</think></answer>",
                              "<think><answer>two</think><answer>two</answer>",
                              "<think><answer>two</answer></think><answer>one</answer>",
                              "<think> x <answer>two</answer> y</think></think>",
                              "<think><think> x <answer>two</answer> y</think>",
                              "<think> a</think><answer>two</answer></think>"],
    "nested": ["<answer><answer>two</answer></answer>", "<answer><answer>two</answer>",
               "<answer><think>two</think></answer>", "<answer>two<think></answer>", "<answer></think>two</answer>",
               "<answer>two<think>so</think></answer>"],
    "unclosed": ["<answer>two", "two</answer>", "</answer>two<answer>", "<answer two</answer>", "<answer>two</answer",
                 "<think> a <answer>two"],
    "upper case": ["<ANSWER>two</ANSWER>", "<Answer>two</Answer>", "<answer>two</ANSWER>",
                   "<THINK></THINK><ANSWER>two"],
    "zero width": [f"<ans{ZERO}wer>two</answer>", f"<answer>t{ZERO}wo</answer>", f"<{ZERO}answer>two</{ZERO}answer>",
                   "<answer>two\u200d</answer>", "<answer>\ufefftwo</answer>", "<answer>two\u2060</answer>"],
    "look-alikes": ["< answer>two</answer>", "<answer >two</answer >", "\uff1canswer\uff1etwo\uff1c/answer\uff1e",
                    "<answer>tw\u043e</answer>", "<answer>\uff54\uff57\uff4f</answer>", "[answer]two[/answer]"],
    "HTML entities": ["&lt;answer&gt;two&lt;/answer&gt;", "<answer>&#116;wo</answer>", "<answer>two&nbsp;</answer>",
                      "<answer>&#x74;&#x77;&#x6f;</answer>"],
    "A or B or C": [says("one or two or three"), says("two or three"), says("one, two"), says("two/three"),
                    says("two (or three)"), says("either two"), says("two; one"), says("one\ntwo"),
                    says("two and one")],
    "all classes": [says(EVERY), says(EVERY.replace(",", "")), says(f"[{EVERY}]"), says(EVERY.replace(", ", "\n"))],
    "parts of words": [says("tw"), says("twotwo"), says("twoo"), says("network"), says("two three"), says("not two"),
                       says("the two"), says("*"), says(".*"), says("t.o"), says("%")],
    "other tags": ["<answer>two<|im_end|>", "<ANSWER/>two<answer/>", "<answer>..</answer>", "<answer>two</s></answer>",
                   "<CONCLUSION>two</CONCLUSION><answer>two</answer>",
                   "<SUMMARY>two</SUMMARY><CONCLUSION>no</CONCLUSION>"],
}
ALL = [(category, text) for category, texts in CHEATS.items() for text in texts]
# As numbers, against 3.
NOT_THREE = {
    "not a number": ["nan", "NaN", "inf", "-inf", "Infinity", "none", "null"],
    "huge": ["1e999", "-1e999", "1e99999999999", "9" * 400, "3" + "0" * 300, "99**98**97", "3e0e0", "10**1000",
             "3." + "0" * 60],
    "other digits": ["\u0663", "\uff13", "\u2462", "\u00b3", "\u0969", "III", "three"],
    "written otherwise": ["0x3", "0b11", "3_0", "3,", "3,00", ",3", "3..0", "--3", "+-3", "3 3", "3 4", "3-3", "2+1"],
    "several": ["3 or 4", "2, 3", "[3]", "3;", "{3}", "1 2 3", "3 4 5"],
    "close": ["2.999", "3.001", "-3", "30", "13", "33", "1/3", "3%"],
}
NUMBERS = [(category, text) for category, texts in NOT_THREE.items() for text in texts]


def test_the_suite_is_as_large_as_it_claims():
    assert len(ALL) + len(NUMBERS) >= 120 and len(set(chain(ALL, NUMBERS))) == len(ALL) + len(NUMBERS)


@pytest.mark.parametrize("text", SAME)
def test_well_formed_and_right(text):
    assert correctness(gold("two"), text) == format(gold("two"), text) == 1
    assert chat.parse(text).fault == ""


@pytest.mark.parametrize("text", LOOSE)
def test_right_but_malformed(text):
    assert (correctness(gold("two"), text), format(gold("two"), text)) == (1, 0)
    assert chat.parse(text).fault


@pytest.mark.parametrize("category, text", ALL)
def test_a_cheat_is_not_right(category, text):
    sample = gold("two", choices=("one", "two", "three", "four", "five"), aliases=("2",))
    assert correctness(gold("two"), text) == correctness(sample, text) == 0
    assert iou(gold("two", boxes=((0, 0, 1, 1),)), text) == 0
    assert length(sample, text) < 0         # what is wrong never earns by its length


@pytest.mark.parametrize("category, text", [(category, text) for category, text in ALL if text.count("<answer>") != 1
                                            or text.count("</answer>") != 1])
def test_a_cheat_without_one_answer_is_malformed_too(category, text):
    assert format(gold("two"), text) == 0


@pytest.mark.parametrize("category, given", NUMBERS)
def test_what_is_no_three_is_not_three(category, given):
    assert correctness(gold("3"), says(given)) == 0
    assert correctness(gold("3", unit="cm"), says(given)) == correctness(gold("3 cm", unit="cm"), says(given)) == 0
    if category != "close":
        assert correctness(gold("3", tolerance=0.5), says(given)) == 0


@pytest.mark.parametrize("fields, given", [
    ({}, "3"), ({}, "3.0"), ({}, "+3"), ({}, "03"), ({}, "3e0"), ({}, "30e-1"), ({}, " 3. "),
    (dict(tolerance=0.5), "3.5"), (dict(tolerance=0.5), "2.5"), (dict(unit="cm"), "3 cm"), (dict(unit="cm"), "3cm"),
    (dict(unit="cm"), "3"),
    (dict(unit="cm"), "3.00 CM."), (dict(unit="%"), "3%"), (dict(unit="cm", tolerance=0.1), "3.1 cm"),
    (dict(aliases=("4",)), "4.0")])
def test_numbers_may_be_written_in_several_ways(fields, given):
    assert correctness(gold("3", **fields), says(given)) == 1


@pytest.mark.parametrize("fields, given", [
    (dict(tolerance=0.5), "3.51"), (dict(unit="cm"), "3 mm"), (dict(unit="cm"), "3 cm cm"), (dict(unit="cm"), "cm"),
    (dict(unit="m"), "3 cm"), ({}, "3 cm"), (dict(tolerance=0.1, unit="cm"), "3.2 cm")])
def test_other_units_and_larger_errors_are_wrong(fields, given):
    assert correctness(gold("3", **fields), says(given)) == 0


def test_thousands():
    assert correctness(gold("12500"), says("12,500")) == correctness(gold("12,500"), says("12500.0")) == 1
    assert correctness(gold("12500"), says("1,2500")) == correctness(gold("12500"), says("12,50")) == 0


CHOICES = dict(choices=("red", "blue", "dark green"), question="Which colour? (A) red (B) blue (C) dark green")


@pytest.mark.parametrize("answer, given, right", [
    ("blue", "blue", 1), ("blue", "B", 1), ("blue", "(b)", 1), ("blue", "b.", 1), ("blue", "B) blue", 1),
    ("blue", "b: blue", 1), ("B", "blue", 1), ("B", "b", 1), ("(dark green)", "C", 0),
    ("dark green", "C. Dark green", 1),
    ("blue", "a", 0), ("blue", "B) red", 0), ("blue", "a or b", 0), ("blue", "a b", 0), ("blue", "b, c", 0),
    ("blue", "ab", 0), ("blue", "b b", 0), ("blue", "bb", 0), ("blue", "d", 0), ("blue", "b) a) blue", 0),
    ("blue", "light blue", 0), ("dark green", "green", 0), ("blue", "(a)(b)(c)", 0)])
def test_multiple_choice(answer, given, right):
    assert correctness(gold(answer, **CHOICES), says(given)) == right


@pytest.mark.parametrize("question", ["", "Which colour?", "red, blue or dark green?",
                                      "A) red B) blueish C) dark green", "(A) red (B) dark green (C) blue"])
def test_a_letter_counts_only_where_the_question_shows_it(question):
    sample = gold("blue", **{**CHOICES, "question": question})
    assert correctness(sample, says("b")) == 0 and correctness(sample, says("blue")) == 1
    for shown in ("A. red\nB. blue\nC. dark green", "a: Red, b: Blue, c: Dark green"):
        assert correctness(gold("blue", **{**CHOICES, "question": shown}), says("b")) == 1


def test_an_alias_that_is_a_letter_names_no_choice():
    gases = ("oxygen", "nitrogen", "helium", "carbon")
    shown = "".join(f"({letter}) {gas} " for letter, gas in zip("ABCD", gases))
    sample = gold("carbon", aliases=("C",), choices=gases, question=shown)
    assert [correctness(sample, says(text)) for text in ("c) helium", "helium", "C", "d", "carbon")] == [0, 0, 1, 1, 1]


def test_letters_are_no_names_of_choices_that_are_letters():
    sample = gold("b", choices=("b", "a"), question="(A) b (B) a")
    assert correctness(sample, says("b")) == 1 and correctness(sample, says("a")) == 0


def test_r1v_the_thought_is_not_the_answer():
    text = "<think>The count is 3.</think><answer>7</answer>"
    assert correctness(gold("3"), text) == 0 and correctness(gold("7"), text) == 1


@pytest.mark.parametrize("answer, given", [("cat", "catfish"), ("catfish", "cat"), ("cat", ""), ("cat", "the cat"),
                                           ("sea gull", "gull"), ("sea gull", "seagull"), ("", ""), ("", "  "),
                                           (".", "."), ("cat", "cat or dog or bird"), ("1", "1.5"), ("1.5", "15")])
def test_visual_rft_a_class_name_inside_another_is_not_it(answer, given):
    assert correctness(gold(answer), says(given)) == 0


@pytest.mark.parametrize("answer, given", [("cat", " Cat. "), ("sea gull", "Sea  gull"), ("1.5", "1.5"),
                                           ("\u00c9", "\u00e9")])
def test_case_spaces_and_a_full_stop_may_differ(answer, given):
    assert correctness(gold(answer), says(given)) == 1


def test_aliases_count_as_right():
    assert correctness(gold("two", aliases=("2", "a pair")), "<answer>A pair</answer>") == 1
    assert correctness(gold("two", aliases=("2", "a pair")), "<answer>pair</answer>") == 0


def test_what_data_generation_writes_is_well_formed_and_right():
    assert chat.parse(chat.target_text("two", "a1 b2")) == chat.Parsed("two", "a1 b2", "")
    assert not chat.parse(chat.target_text("two", "a1 b2", close_think=False)).well_formed
    assert chat.parse(chat.target_text("two")).answer == "two"


def test_gold_answers_of_drawn_scenes_are_right_and_their_neighbours_wrong():
    for sample in scenes.load("id", 50, 0):
        assert correctness(sample, chat.target_text(sample.answer, "so")) == 1
        assert correctness(sample, chat.target_text(f"{sample.answer} or nothing", "so")) == 0


# ---------------------------------------------------------------- time

UNITS = ["<think>", "</think>", "<answer>", "</answer>", "<answer></answer>", "<", "a", " ", "<think></think>",
         "99**98**97 ", "1,", "(", "a) ", "\n", ".", "3 ", "<think>a</think><answer>b</answer>", "1e"]
FUNCTIONS = [*rewards.REWARDS.values()]
ODD = gold("two", choices=("one", "two"), question="(A) one (B) two", boxes=((0, 0, 1, 1),), unit="cm", tolerance=0.5,
           caption="two cats")


@pytest.mark.parametrize("unit", UNITS)
def test_a_hundred_thousand_characters_take_less_than_50_ms(unit):
    long = unit * (100_000 // len(unit))
    for text in (long, f"<think>{long[:50_000]}</think><answer>{long[:50_000]}</answer>", f"<answer>{long}</answer>"):
        for function in FUNCTIONS:
            seconds = []
            for _ in range(3):      # the fastest of three: this machine may be busy with something else
                began = time.process_time()
                function(ODD, text)
                seconds.append(time.process_time() - began)
            assert min(seconds) < 0.05, (function.__name__, min(seconds))


# ---------------------------------------------------------------- fuzzing

PIECES = st.sampled_from([*chat.TAGS, "two", " ", "3", ".", "\n", "b", "B)", "1e999", "nan", "\u0663", ZERO, "&lt;",
                          "<", "</", ">", "cm", "[0, 0, 1, 1]", ",", "-", "\ud800", "\x00"])
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=14).map("".join))


CORRECTNESS = Rewards(RewardOptions(rewards="correctness:1"))


@settings(max_examples=400, deadline=None)
@given(TEXTS)
@example("<think></think><answer>1e999</answer>")
def test_no_text_makes_a_reward_raise_or_leave_its_range(text):
    for name, low, high in (("correctness", 0, 1), ("format", 0, 1), ("iou", 0, 1), ("length", -1, 1),
                            ("repetition", -1, 0), ("consistency", 0, 1), ("caption", 0, 1)):
        value = rewards.REWARDS[name](ODD, text)
        assert isinstance(value, float) and low <= value <= high
    assert isinstance(CORRECTNESS.why(ODD, text), str)


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_right_means_that_the_one_answer_says_it(text):
    if correctness(ODD, text):
        assert text.count("<answer>") == text.count("</answer>") == 1
        inside = text.split("<answer>")[1].split("</answer>")[0]
        assert re.fullmatch(r"(two|\(?b([).:]+\s*(two)?)?)\.*", chat.normalise(inside))


# ---------------------------------------------------------------- the other rewards, by hand

def test_iou_by_hand():
    one = gold("", boxes=((0, 0, 2, 2),))
    assert iou(one, says("[0, 0, 2, 2]")) == 1 and iou(one, says("(1, 0, 3, 2)")) == pytest.approx(1 / 3)
    assert iou(one, says("[0, 0, 2, 2], [5, 5, 6, 6]")) == 0.5         # a box too many
    assert iou(one, says("[0, 0, 2, 2] " * 3)) == pytest.approx(1 / 3)
    two = gold("", boxes=((0, 0, 2, 2), (4, 4, 6, 6)))
    assert iou(two, says("[4, 4, 6, 6], [0, 0, 2, 1]")) == pytest.approx(0.75) and iou(two, says("0 0 2 2")) == 0.5
    nested = gold("", boxes=((0, 0, 2, 2), (0, 0, 2, 4)))
    assert iou(nested, says("[0, 0, 2, 2]")) == 0.5                     # a box counts once
    for answer in ("[2, 2, 0, 0]", "[0, 0, 0, 0]", "[0, 0, 2]", "[nan, 0, 2, 2]", "[0, 0, inf, 2]", "a [0, 0, 2, 2]",
                   "[0, 0, 2, 2] or [1, 1, 2, 2]", "1e5", "[0, 0, 2, 2" * 300):
        assert iou(one, says(answer)) == 0 or answer.startswith("[0, 0, 2, 2" * 2), answer
    assert iou(gold("two"), says("[0, 0, 2, 2]")) == 0 and boxes_of("0 0 1 1 " * 65) == []
    assert iou(one, "<think>[0, 0, 2, 2]</think><answer></answer>") == 0


def test_length_by_hand():
    words = rewards.COSINE_WORDS
    assert 0.999 < length(gold("two"), says("two", "")) < 1 and -1 < length(gold("two"), says("one", "")) < -0.999
    for n in (words, 5 * words):
        for text in (says("two", "a " * n), f"<think> {'a ' * n}<answer> two</answer>", "a " * n + says("two", "")):
            assert length(gold("two"), text) == pytest.approx(0.5)
        assert length(gold("two"), says("one", "a " * n)) == pytest.approx(-0.5)
    assert length(gold("two"), says("two", "a " * (words // 2 - 1))) == pytest.approx(0.75)


def test_repetition_by_hand():
    assert repetition(None, "a b c d e") == 0 and repetition(None, "a b") == 0 and repetition(None, "") == 0
    assert repetition(None, "a b c a b c") == pytest.approx(3 / 4 - 1)        # abc bca cab abc
    assert repetition(None, "a " * 100) == pytest.approx(1 / 98 - 1)


@pytest.mark.parametrize("think, answer, value", [
    ("it is a cat .", "cat", 1), ("it is a cat . no , a dog .", "cat", 0), ("it is a catfish", "cat", 0),
    ("a sea gull", "Sea gull.", 1), ("", "cat", 0), ("cat", "", 0), ("a cat or a dog", "cat", 0),
    ("cat dog bird", "dog", 0), ("I count 3", "3", 1), ("I count 3", "-3", 0), ("it is -3.5", "-3.5", 1),
    ("the length is 3.5 cm .", "3.5", 1), ("3.5", "3.5 cm", 1), ("it is dark green", "green", 1),
    ("it is dark green", "dark green", 1), ("3 . 5", "3.5", 0)])
def test_consistency_by_hand(think, answer, value):
    assert consistency(gold("bird", unit="cm"), says(answer, think)) == value


@pytest.mark.parametrize("answer, value", [
    ("a cat on a mat", 1), ("on a mat, a CAT.", 1), ("cat", 2 / 6), ("a a a cat", 6 / 9), ("dog", 0), ("", 0),
    ("a cat on a mat and a dog", 10 / 13)])
def test_caption_by_hand(answer, value):
    sample = gold("cat", caption="a cat on a mat")
    assert caption(sample, says(answer)) == pytest.approx(value)
    assert caption(sample, f"<think>{answer}</think>{answer}") == 0         # nothing outside of the tag counts
    assert caption(gold("cat"), says(answer)) == 0                          # no caption to agree with


def test_the_gate_holds_for_caption_and_it_is_off_by_default():
    assert "caption" not in Rewards(RewardOptions()).weights
    sample = gold("cat", caption="a cat")
    texts = [[says("a cat"), "<answer> a cat</answer>"]]
    _, earned = Rewards(RewardOptions(rewards="caption:2")).score([sample], texts, None)
    assert earned.tolist() == [[[1.0], [0.0]]]


# ---------------------------------------------------------------- a reward of one's own

MINE = '''
import sys, time
print("loading")
def brevity(sample, text):
    print("called", sample.answer)
    if "hang" in text:
        while True: pass
    if "raise" in text:
        raise RuntimeError("no\\nway")
    if "exit" in text:
        sys.exit(3)
    if "nan" in text:
        return float("nan")
    if "more than fp32 holds" in text:
        return 1e39
    if "die" in text:
        import os
        os._exit(1)
    if "picture" in text:
        sample.images[0][1] = 0
        return float(sample.images[0][0, 1, 2]) + len(sample.images[1])
    return 1 / (1 + len(text))
'''


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


@pytest.fixture
def load():
    """load("FILE.py:NAME", timeout=1.0) -> Rewards of it; their processes end with the test."""
    loaded = []

    def call(spec, timeout=5.0, errors="zero"):
        loaded.append(Rewards(RewardOptions(rewards=spec, gated=False, reward_timeout=timeout, reward_errors=errors)))
        return loaded[-1]
    yield call
    for one in loaded:
        one.close()


def test_a_reward_of_ones_own_is_called_in_a_worker_and_survives_what_it_does(mine, load, capfd, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    both = load(f"correctness:1,{mine}:brevity:0.5", timeout=1.0)
    assert both.weights == {"correctness": 1.0, "brevity": 0.5}
    reward = both.workers["brevity"]
    assert reward(gold("two"), "abc") == 0.25
    first = reward.process.pid
    texts = ["raise", "raise", "nan", "more than fp32 holds", "exit", ""]
    assert [reward(gold("two", id="s7"), text) for text in texts] == [0, 0, 0, 0, 0, 1]
    assert reward.failed == both.failures == 5 and reward.process.pid == first
    began = time.time()
    assert reward(gold("two"), "hang") == 0 and time.time() - began < 10
    assert reward(gold("two"), "") == 1 and reward.process.pid != first         # another one took over
    said, printed = capfd.readouterr()
    assert "called two" in printed
    assert said.count("RuntimeError: no; sample 's7', text 'raise'; it counts 0") == 1
    for reason in ("no answer within 1 s", "SystemExit", "it returned nan", "it returned 1e+39"):
        assert reason in said
    assert reward(gold("two"), "die") == 0 and reward(gold("two"), "") == 1
    assert "its process died" in capfd.readouterr().out
    parts, _ = both.score([gold("two")], [[FORMED, "nan"]], torch.ones(1, 2).long())
    assert parts["brevity"].tolist() == [[pytest.approx(1 / (1 + len(FORMED))), 0]]


def test_one_process_serves_all_stages_of_a_run_with_the_same_rewards_and_ends_with_it(mine, tmp_path):
    cfg = change(train.Config(), rewards=f"correctness:1,{mine}:brevity:0.5", device="cpu")
    with train.Run(cfg, tmp_path) as run:
        first = run.rewards(cfg)
        first.start()
        process = first.workers["brevity"].process
        again = run.rewards(change(cfg, kl_coef=0.1, rl_lr=1.0))
        again.start()
        assert again is first and process.poll() is None and first.workers["brevity"].process is process
        assert run.rewards(change(cfg, reward_timeout=2.0)) is not first
    assert first.workers["brevity"].process is None and process.wait(10) is not None


def test_it_sees_pictures_as_arrays_and_paths(mine, load):
    reward = load(f"{mine}:brevity").workers["brevity"]
    picture = torch.arange(24, dtype=torch.uint8).view(2, 4, 3).numpy()
    assert reward(gold("two", images=(picture, "a.png")), "picture") == 5 + 5


@pytest.mark.parametrize("line", [
    '{"number": 1, "value": "x", "error": ""}', '{"number": 1, "value": NaN, "error": ""}', "[]", "3",
    '{"number": true, "value": 1.0, "error": ""}', '{"number": 1, "value": 1e39, "error": ""}',
    '{"number": 1, "value": 1.0, "error": null}', '{"number": 1, "value": 1.0}'])
def test_what_has_another_form_than_an_answer_is_none(line):
    assert worker._answer(line.encode()) is worker.GARBLED
    assert worker._answer(b'{"number": 1, "value": 1.0, "error": ""}')["value"] == 1


def test_one_that_hangs_again_and_again_is_given_up(mine, load):
    # On a busy machine an innocent call takes some tenths.
    reward = load(f"{mine}:brevity", timeout=1.0).workers["brevity"]
    assert reward(gold("two"), "hang") == reward(gold("two"), "hang") == 0 and reward(gold("two"), "") == 1
    with pytest.raises(ValueError, match="no answer within 1 s; .*3 times in a row"):
        for _ in range(3):
            reward(gold("two"), "hang")


@pytest.mark.parametrize("source", ["def f(sample, text, k=3):\n    return k", "f = lambda sample, text: 3",
                                    "from three import f",
                                    "import numpy\ndef f(sample, text): return numpy.float32(3)",
                                    "import sys\ndef f(sample, text): return 3 + ('torch' in sys.modules)",
                                    "import torch\ndef f(sample, text): return torch.tensor(3)",
                                    "class F(float): pass\ndef f(sample, text): return F(True + 2)",
                                    "from __future__ import annotations\nimport dataclasses\n"
                                    "@dataclasses.dataclass\nclass A:\n    x: int\ndef f(*args):\n    return A(3).x"])
def test_any_callable_of_two_arguments_will_do(source, tmp_path, load):
    (tmp_path / "three.py").write_text("def f(sample, text): return 3")
    (tmp_path / "x.py").write_text(source)
    assert load(f"{tmp_path}/x.py:f").workers["f"](gold("two", id=torch.tensor(3).numpy()), "") == 3


def test_one_that_fails_can_stop_the_run_instead(mine, load):
    reward = load(f"{mine}:brevity:1", timeout=1.0, errors="stop").workers["brevity"]
    with pytest.raises(ValueError, match="reward brevity of .*mine.py: RuntimeError: no; sample 'why', text 'raise'"):
        reward(gold("two", question="why"), "raise")


@pytest.mark.parametrize("text, spec, said", [
    (None, "none.py:f:1", "the file .*none.py' does not exist"),
    ("def f(x): pass", "x.py:f", "f of .* must take two arguments"),
    ("def f(x, y, z): pass", "x.py:f", "f of .* must take two arguments"),
    ("def g(a, b): pass", "x.py:f:1", "defines no f"), ("def f(:", "x.py:f:1", "is not Python"),
    ("def format(a, b): pass", "x.py:format:1", "name of a built-in reward"),
    ("def length(a, b): pass", "x.py:length:1", "name of a built-in reward"),
    ("def overlong(a, b): pass", "x.py:overlong:1", "'overlong' is the soft penalty on length"),
    ("def f(a, b): 0", "x.py:f:x", "must be a number"),
    ("def f(a, b): 0", "x.py:f:1,{folder}/x.py:f:2", "f is given twice")])
def test_a_reward_file_that_cannot_be_used_is_named_before_it_runs(text, spec, said, tmp_path, load):
    if text:
        (tmp_path / "x.py").write_text(text)
    with pytest.raises(ValueError, match=said):
        load(f"{tmp_path}/{spec.format(folder=tmp_path)}")


def test_a_file_that_fails_on_import_is_one_sentence(tmp_path, load):
    (tmp_path / "x.py").write_text("import nowhere\ndef f(a, b): return 1")
    own = load(f"{tmp_path}/x.py:f")
    for call in (lambda: own.workers["f"](gold("two"), ""), own.start):
        with pytest.raises(ValueError, match="reward f of .* cannot be loaded: ModuleNotFoundError"):
            call()


# ---------------------------------------------------------------- one that harms its own process

HOSTILE = Path(__file__).with_name("hostile.py")


def judged(load, harms, timeout):
    """Rewards of one completion for each of `harms` ("": none) by hostile.py, each of which is worth its number.

    -> (values that came, values that should have come, the Rewards).
    """
    own = load(f"{HOSTILE}:hostile", timeout)
    texts = [f"{harm} {number}" for number, harm in enumerate(harms, 1)]
    parts, _ = own.score([gold("two")], [texts], torch.ones(1, len(texts)).long())
    bad = {harm.__name__ for harm in [*hostile.FAILING, *hostile.FATAL, hostile.hang]}
    wanted = [0.0 if harm in bad else float(number) for number, harm in enumerate(harms, 1)]
    return parts["hostile"][0].tolist(), wanted, own


def test_whatever_a_call_does_to_its_process_every_other_value_is_its_own(load, capfd):
    mild = [*hostile.HARMLESS, *hostile.FAILING]
    harms = [name for harm in mild for name in ("", harm.__name__, harm.__name__, "")]
    harms += [name for harm in hostile.FATAL for name in (harm.__name__, "")]       # each costs a start
    values, wanted, own = judged(load, harms, timeout=10.0)
    assert values == wanted
    assert own.workers["hostile"].failed == own.failures == 2 * len(hostile.FAILING) + len(hostile.FATAL)
    said = capfd.readouterr().out
    assert "no answer" not in said and "ValueError: \\ud800; " in said
    assert said.count("its process died") == said.count("it wrote into the pipe of its answers") == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_soak_among_hundreds_of_random_misdeeds_every_value_is_exact(seed, load):
    names = ["", *hostile.HARM]
    weights = [{"": 20, "hang": 0.2}.get(name, 1) for name in names]
    fatal = {harm.__name__ for harm in [*hostile.FATAL, hostile.hang]}
    harms = []
    for harm in random.Random(seed).choices(names, weights, k=300):
        third = len(harms) > 1 and {harm, *harms[-2:]} <= fatal         # would end the run
        harms.append("" if third else harm)
    values, wanted, own = judged(load, harms, timeout=5.0)
    assert values == wanted and own.failures == wanted.count(0.0) > 80


@pytest.mark.parametrize("harm, reason", [("kill", "its process died"),
                                          ("write_a_line", "it wrote into the pipe of its answers")])
def test_one_whose_process_is_lost_again_and_again_is_given_up(harm, reason, load):
    values, _, own = judged(load, [harm, harm, "", harm, harm], timeout=10.0)
    assert values == [0, 0, 3, 0, 0]
    with pytest.raises(ValueError, match=f"reward hostile of .*{reason}; .*; its process was lost 3 times in a row"):
        own.workers["hostile"](gold("two"), f"{harm} 1")


def test_one_that_dies_between_calls_is_asked_anew_until_it_has_died_three_times(load, capfd):
    reward = load(f"{HOSTILE}:dies_between_calls", timeout=10.0).workers["dies_between_calls"]
    for _ in range(3):
        assert reward(gold("two"), "") == 1
        reward.process.wait(10)
    assert reward.failed == 0 and capfd.readouterr().out.count("its process died between two calls; before") == 1
    with pytest.raises(ValueError, match="died between two calls; .*; its process was lost 3 times in a row"):
        reward(gold("two"), "")


def test_what_is_written_between_calls_fails_none_and_fills_no_memory(load, capfd):
    reward = load(f"{HOSTILE}:writes_between_calls", timeout=10.0).workers["writes_between_calls"]
    assert reward(gold("two"), "") == 1
    time.sleep(0.5)
    assert reward.answers.qsize() <= 2          # the line, and that the process died of the closed pipe
    assert reward(gold("two"), "") == 1 and reward.failed == 0
    assert "it wrote into the pipe of its answers between two calls; before sample" in capfd.readouterr().out


def test_a_death_can_stop_the_run_instead(load):
    reward = load(f"{HOSTILE}:hostile", timeout=10.0, errors="stop").workers["hostile"]
    with pytest.raises(ValueError, match="reward hostile of .*: its process died; sample 'why', text 'kill 1'"):
        reward(gold("two", question="why"), "kill 1")


def test_one_that_reads_no_more_is_given_up_however_large_the_picture(load):
    reward = load(f"{HOSTILE}:reads_no_more", timeout=1.0).workers["reads_no_more"]
    large = gold("two", images=(torch.zeros(600, 600, 3, dtype=torch.uint8).numpy(),))    # more than a pipe holds
    assert reward(gold("two"), "") == 1
    time.sleep(0.5)
    assert reward(large, "") == 0 and reward(large, "") == 1 and reward.failed == 1


def test_what_a_reward_left_running_ends_with_the_run(load):
    reward = load(f"{HOSTILE}:runs_on", timeout=10.0).workers["runs_on"]
    assert reward(gold("two"), "") == 1
    reward.requests.put(b"")            # its pipe is closed, as when the run has ended
    reward.process.wait(10)
