"""Drawn monitors: pictures show what they say, answers are what an independent reader finds, teachers err as stated."""
import json
import random
import re
from collections import defaultdict

import numpy as np
import pytest

import train
from data import monitors
from data.answers import is_right
from data.digit_probe import digit_cells
from data.supply import DataOptions, Supply
from data.teachers import TeacherOptions, is_conclusion_right
from rl.report import misread

TRAINS = ("clip", "align", "sft", "train")
ALL = (*TRAINS, "val", *monitors.SPLITS)
BIASED = monitors.MonitorTeacher()
SPELT = dict(zip("zero one two three four five six seven eight nine ten".split(), range(11)))


@pytest.fixture(scope="module")
def drawn():
    """drawn(split, count, teacher=None) -> (samples, their cases), each made once and not painted."""
    kept = {}

    def of(split, count=600, teacher=None):
        if (split, count, teacher) not in kept:
            made = []

            def see(case_of):
                def make(self, rng):
                    made.append(case_of(self, rng))
                    return made[-1]
                return make
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(monitors, "draw", lambda monitor, rng: np.zeros((1, 1, 3), np.uint8))
                patch.setattr(monitors.Split, "make", see(monitors.Split.make))
                kept[split, count, teacher] = monitors.load(split, count, 3, teacher), made
        return kept[split, count, teacher]
    return of


def shown(caption):
    """A caption -> ({"hr": number or None, ..}, beats)."""
    *rows, trace = caption.split(" , ")
    numbers = {}
    for row in rows:
        name, *digits = row.split()
        numbers[name] = None if digits == ["hidden"] else int("".join(digits))
    return numbers, len(re.findall(r"c\d", trace))


def read_answer(question, caption):
    """From the words alone -> (answer, how far another may lie from it)."""
    numbers, beats = shown(caption)
    if question == "does hr agree with the trace ?":
        return ("yes" if abs(numbers["hr"] - 20 * beats) <= 10 else "no"), 0
    if question == "how fast is the trace ?":
        return f"{20 * beats} bpm", 10
    if question == "which value is out of range ?":
        normal = {"hr": (60, 100), "spo2": (90, 100), "bp": (90, 140)}
        out = [name for name, (low, high) in normal.items() if not low <= numbers[name] <= high]
        assert len(out) <= 1
        return (out or ["none"])[0], 0
    name = re.fullmatch(r"what is (\w+) \?", question)[1]
    if numbers[name] is None:
        return f"{20 * beats} bpm", 10
    return f"{numbers[name]} {dict(hr='bpm', spo2='%', bp='mmhg')[name]}", 0


# ---------------------------------------------------------------- reproducible, held out

@pytest.mark.parametrize("split", ALL)
def test_the_same_seed_draws_the_same_whatever_the_count_and_another_does_not(split):
    one, longer, other = (monitors.load(split, count, seed, BIASED) for count, seed in ((3, 1), (5, 1), (3, 2)))
    for a, b in zip(one, longer):
        assert np.array_equal(a.images[0], b.images[0]) and {**vars(a), "images": 0} == {**vars(b), "images": 0}
    assert not any(np.array_equal(a.images[0], b.images[0]) for a, b in zip(one, other))


def test_another_teacher_draws_the_same_pictures_and_questions():
    for a, b in zip(monitors.load("train", 5, 1), monitors.load("train", 5, 1, monitors.PERFECT)):
        assert np.array_equal(a.images[0], b.images[0]) and (a.question, a.answer) == (b.question, b.answer)


def test_numbers_of_the_split_values_are_in_no_other_and_layout_alone_has_another_order(drawn):
    numbers = defaultdict(set)
    orders = defaultdict(set)
    for split in ALL:
        for case in drawn(split)[1]:
            monitor = case.monitor
            numbers[split] |= {monitor.hr, monitor.spo2, monitor.bp}
            orders[split].add(tuple(sorted(monitors.VALUES, key=monitor.row)))
            assert bool(monitor.glare) == (split == "glare")
    for split in set(ALL) - {"values"}:
        assert not numbers[split] & numbers["values"]
        assert orders[split] == {("bp", "hr", "spo2") if split == "layout" else ("hr", "spo2", "bp")}
    for digit in "0123456789":          # every digit is seen in training at the last place or before it
        assert any(digit in str(number) for number in numbers["train"])


def test_an_unknown_split_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="^split 'crowded' must be one of clip, align, sft, train, val, id, layout, "):
        monitors.load("crowded", 1, 0)


# ---------------------------------------------------------------- what a picture shows

def read_digit(cell):
    """The digit whose glyph, shifted by at most a pixel, is most like a cell (16, 16) of brightness 0 to 1."""
    best = {}
    for digit, glyph in enumerate(monitors.DIGIT_MASKS):
        height, width, _ = glyph.shape
        for x in range(17 - width):
            for y in range(17 - height):
                template = np.zeros((16, 16))
                template[y:y + height, x:x + width] = glyph[..., 0]
                best[digit] = min(best.get(digit, np.inf), np.abs(template - cell).sum())
    return min(best, key=best.get)


@pytest.mark.parametrize("split", ("id", "layout", "values"))
def test_digits_are_matched_back_from_the_picture(split):
    for sample in monitors.load(split, 8, 5):
        light = sample.images[0].max(-1) / 255
        for cell, digit in digit_cells(sample.caption):
            row, column = divmod(cell, 5)
            patch = light[16 * row:16 * row + 16, 16 * column:16 * column + 16]
            assert read_digit(np.clip(2 * patch - 0.5, 0, 1)) == digit, (sample.id, cell)
        hidden = shown(sample.caption)[0]["hr"] is None
        row = 2 + ([entry.split()[0] for entry in sample.caption.split(" , ")].index("hr"))
        covered = sample.images[0][16 * row + 3:16 * row + 13, 35:78].astype(int)
        assert hidden == (covered.max() < 190 and covered.min() > 60)


def test_the_colour_of_a_row_tells_its_value():
    for sample in monitors.load("layout", 10, 6):
        for row, entry in enumerate(sample.caption.split(" , ")[:3], 2):
            patch = sample.images[0][16 * row:16 * row + 16, :16].astype(float)
            light = patch[patch.max(-1) > 150].mean(0)
            assert int(light.argmax()) == {"hr": 1, "spo2": 2, "bp": 0}[entry.split()[0]]


def test_beats_are_counted_back_from_the_picture_where_the_caption_says():
    for sample in monitors.load("id", 60, 4):
        high = sample.images[0][:18, :, 1].max(0) > 120         # spikes alone reach so high
        starts = np.flatnonzero(high & ~np.roll(high, 1))
        ends = np.flatnonzero(high & ~np.roll(high, -1))
        middles = (starts + ends + 1) / 2
        columns = [int(column) for column in re.findall(r"c(\d)", sample.caption)]
        assert len(middles) == len(columns) == shown(sample.caption)[1]
        assert all(16 * (column - 1) - 1.5 <= middle <= 16 * column + 1.5 for middle, column in zip(middles, columns))


def test_glare_brightens_and_noise_roughens():
    quiet = monitors.Monitor(82, 97, 121, 4, noise=0.0)
    rng = np.random.default_rng(0)
    plain = monitors.draw(quiet, rng).astype(int)
    glaring = monitors.draw(monitors.Monitor(82, 97, 121, 4, noise=0.0, glare=(20, 60, 10)), rng).astype(int)
    noisy = monitors.draw(monitors.Monitor(82, 97, 121, 4, noise=8.0), rng).astype(int)
    assert (glaring >= plain - 1).all() and glaring[60, 20].min() > 200 > plain[60, 28].max()
    background = noisy[40:48, 17:31] - plain[40:48, 17:31]
    assert plain[40:48, 17:31].std(axis=(0, 1)).max() == 0 and 4 < background.std() < 10


# ---------------------------------------------------------------- questions

@pytest.mark.parametrize("split", ("train", *monitors.SPLITS))
def test_gold_answers_equal_an_independent_reader(drawn, split):
    for sample in drawn(split)[0]:
        answer, tolerance = read_answer(sample.question, sample.caption)
        assert (sample.answer, sample.tolerance) == (answer, tolerance)
        if answer[0].isdigit():
            number, unit = answer.split()
            assert unit == sample.unit and is_right(sample, number)
            assert is_right(sample, f"{int(number) + tolerance} {unit}")
            assert not is_right(sample, f"{int(number) + tolerance + 1} {unit}")
            assert not is_right(sample, f"{number} cm")


def test_shares_of_kinds_answers_covered_and_contradicted_are_as_stated(drawn):
    samples, cases = drawn("train", 4000)
    kinds = defaultdict(list)
    for sample, case in zip(samples, cases):
        kinds[case.question.kind].append((sample, case.monitor))
    for kind, share in monitors.MIX.items():
        assert abs(len(kinds[kind]) / 4000 - share) < 0.03
        contradicted = np.mean([not monitor.agrees for _, monitor in kinds[kind]])
        assert abs(contradicted - monitors.CONTRADICTED[kind]) < 0.06
        for _, monitor in kinds[kind]:
            assert abs(monitor.hr - 20 * monitor.beats) <= 8 or abs(monitor.hr - 20 * monitor.beats) > 30
    out = [sample.answer for sample, _ in kinds["range"]]
    assert all(abs(out.count(name) / len(out) - 0.25) < 0.07 for name in ("none", "hr", "spo2", "bp"))
    asked = [monitor.hidden for sample, monitor in kinds["read"] if sample.question == "what is hr ?"]
    assert abs(np.mean(asked) - 0.3) < 0.07
    assert not any(monitor.hidden for sample, monitor in kinds["agree"] + kinds["range"] + kinds["rate"])


def test_questions_about_looking_are_answered_by_the_caption(drawn):
    for sample in drawn("sft")[0]:
        numbers, _ = shown(sample.caption)
        order = [*numbers]
        name = sample.question.split()[-2]
        if sample.question.startswith("where is"):
            assert sample.answer == f"r{order.index(name) + 1}"
        elif sample.question == "where are the beats ?":
            assert f"trace {sample.answer}" == sample.caption.split(" , ")[-1]
        elif sample.question.startswith("which digits"):
            assert f"{name} {sample.answer}" in sample.caption.split(" , ")
        else:
            assert int(sample.answer.split()[0]) == numbers[name]


def test_words_of_the_task_cover_every_text(drawn):
    known = {piece.removeprefix("▁") for piece in monitors.pieces()}
    for split in ALL:
        for sample in drawn(split, 600, BIASED)[0]:
            assert set(f"{sample.question} {sample.caption}".split()) <= known
            texts = f"{sample.answer} {sample.reasoning} {sample.conclusion}"       # whole numbers are digits in a row
            assert {word for word in texts.split() if not word.isdigit()} <= known


# ---------------------------------------------------------------- teachers

@pytest.mark.parametrize("split", ("train", *monitors.SPLITS))
def test_the_perfect_teacher_is_always_right(drawn, split):
    for sample in drawn(split, 600, monitors.PERFECT)[0]:
        assert is_right(sample, sample.conclusion), sample


def test_a_chain_reads_row_digits_and_beats_as_they_stand(drawn):
    for sample, case in zip(*drawn("layout", 600, monitors.PERFECT)):
        numbers, beats = shown(sample.caption)
        words = sample.reasoning
        if "trace" in words:
            assert sample.caption.split(" , ")[-1] in words
            assert f"{monitors.NUMBERS[beats]} x 20 {' '.join(str(20 * beats))}" in words
        if case.question.kind == "read":
            name = case.question.value
            assert words.startswith(f"{name} r{[*numbers].index(name) + 1} ")
            digits = "hidden" if numbers[name] is None else " ".join(str(numbers[name]))
            assert f" {digits}" in words


def test_the_biased_teacher_is_right_about_two_times_in_three(drawn):
    samples, cases = drawn("id", 4000, BIASED)
    right = defaultdict(list)
    for sample, case in zip(samples, cases):
        right[case.question.kind].append(is_right(sample, sample.conclusion))
        right["all"].append(right[case.question.kind][-1])
    assert 0.62 <= np.mean(right["all"]) <= 0.70
    assert all(0.5 <= np.mean(of_kind) <= 0.9 for of_kind in right.values())


def test_confusing_alone_swaps_three_and_eight_and_nothing_else(drawn):
    samples, cases = drawn("id", 4000, monitors.MonitorTeacher(slip=0.0, confuse=0.65, drop_hop=0.0))
    swapped = []
    for sample, case in zip(samples, cases):
        if case.question.kind == "rate":
            assert is_right(sample, sample.conclusion)
        if case.question.kind != "read" or "hidden" in sample.reasoning:
            continue
        said, true = sample.conclusion.split()[0], sample.answer.split()[0]
        assert len(said) == len(true)
        for a, b in zip(said, true):
            assert a == b or {a, b} == {"3", "8"}
            if b in "38":
                swapped.append(a != b)
    assert len(swapped) > 500 and abs(np.mean(swapped) - 0.65) < 0.06


def test_trusting_alone_ignores_the_trace_where_a_number_is_shown(drawn):
    samples, cases = drawn("id", 4000, monitors.MonitorTeacher(slip=0.0, confuse=0.0, drop_hop=0.6))
    looked = []
    for sample, case in zip(samples, cases):
        if case.question.kind in ("rate", "agree"):
            looked.append("trace" in sample.reasoning)
            assert is_conclusion_right(sample) == (looked[-1] or case.monitor.agrees)     # within its tolerance
        else:
            assert is_right(sample, sample.conclusion)
    assert abs(np.mean(looked) - 0.4) < 0.05


def test_slipping_alone_reads_another_row_or_counts_one_beat_off(drawn):
    samples, cases = drawn("id", 4000, monitors.MonitorTeacher(slip=0.06, confuse=0.0, drop_hop=0.0))
    other_row = []
    off = []
    for sample, case in zip(samples, cases):
        monitor, question = case
        if question.kind == "read" and not monitor.hidden:
            number = int(sample.conclusion.split()[0])
            row = int(re.match(r"\w+ r(\d)", sample.reasoning)[1]) - 1
            other_row.append(row != monitor.row(question.value))
            assert number == getattr(monitor, monitors.LAYOUTS["standard"][row])
        if question.kind == "rate":
            off.append(abs(int(sample.conclusion.split()[0]) - monitor.rate) // 20)
    assert set(off) == {0, 1} and abs(np.mean(off) - 0.12) < 0.04 and abs(np.mean(other_row) - 0.12) < 0.03
    always = monitors.MonitorTeacher(slip=0.5, confuse=0.0, drop_hop=0.0)
    case = monitors.Case(monitors.Monitor(82, 97, 121, 4, hidden=True), monitors.Question("read", "spo2"))
    assert always(case, random.Random(0))[1] == "121 %"         # a covered number is none to take by mistake


# ---------------------------------------------------------------- who misreads as the teacher does

def test_misreadings_are_counted_by_prompt_and_only_where_they_can_be():
    raw = dict(kind=["read", "read", "read", "rate"], gold=["83 bpm", "97 %", "138 mmhg", "80 bpm"],
               answer=[["88 bpm", "83 bpm"], ["97 %", "91 %"], ["183 mmhg", "133 mmhg"], ["30 bpm", "80 bpm"]])
    three, eight = misread.rows({"cot": {"id": {"t1": raw}}}, 7)
    # A 3 as an 8 in half of the first prompt's completions and of the third's; an 8 as a 3 in all of the third's.
    assert (three["metric"], three["value"], three["n"], three["seed"]) == ("3 read as 8", 0.5, 2, 7)
    assert (eight["metric"], eight["value"], eight["n"]) == ("8 read as 3", 0.5, 2)
    taught = dict(kind=raw["kind"], text=[f"<think> so</think><answer> {a[0]}</answer>" for a in raw["answer"]])
    found = misread.rows({"teacher": {"id": {"t1": taught}}, "cot": {"id": {"t1": raw}}}, 7)
    assert [row["value"] for row in found] == [1.0, 0.5, 0.5, 0.5]      # the teacher's are read from its chains
    assert "Numbers in which 3 is read as 8, T = 1" in misread.misread_text(found)
    assert misread.rows({"cot": {"id": {"t1": dict(raw, kind=["rate"] * 4)}}}, 7) == []


# ---------------------------------------------------------------- the command

def test_a_supply_of_monitors_serves_every_purpose():
    supply = Supply(DataOptions(data="monitors"), TeacherOptions(), 0)
    assert [*supply.tests(2)] == ["id", "layout", "values", "glare"]
    assert supply.samples("clip", 2, "clip")[0].source.startswith("monitors/") and not supply.own()
    texts, words = supply.corpus()
    assert "▁mmhg" in words and "▁red" not in words and len(texts) > 1000


@pytest.mark.parametrize("flags, message", [
    ("--data=monitors --compare=generalisation --world=transfer",
     "--compare=generalisation must come with drawn scenes and --world=transfer"),
    ("--data=monitors --stage=cot,rl_walks --world=transfer",
     "--stage=cot,rl_walks must come with drawn scenes and --world=transfer"),
    ("--data=monitors --image-size=48 --patch=12", "--image-size=48 must be 80, with --patch=16, for drawn monitors"),
    ("--data=monitors --skills", "--skills=True must be false with --data=monitors"),
    ("--data=monitors --cot-format=llava_cot", "--cot-format=llava_cot must be think with --data=monitors"),
    ("--data=monitors:x", "--data=monitors:x must be scenes, monitors, images:DIR"),
    ("--data=monitors --stage=teach --records=x.jsonl", "--data=monitors must be scenes, images:DIR"),
    ("--data=monitors --curriculum", "--curriculum=True must be false with --data=monitors"),
    ("--data=monitors --compare=routes", "--compare=routes must come with drawn scenes")])
def test_what_monitors_cannot_do_is_said_in_one_sentence(flags, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        train.main(flags.split())


@pytest.mark.slow
def test_a_tiny_run_goes_through_all_stages_and_probes_the_digits(tmp_path):
    train.main(["--preset=tiny", "--data=monitors", "--image-size=80", "--patch=16", "--max-new=48", "--threads=1",
                "--eval-set=val", f"--out={tmp_path}"])
    probe = json.loads((tmp_path / "probe.json").read_text())
    assert set(probe) == set(monitors.SPLITS) and all(0 < share <= 1 for share in probe.values())
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {row["split"] for row in rows} == set(monitors.SPLITS)
    assert {"teacher", "cot", "grpo_token", "filtered"} <= {row["method"] for row in rows}
    assert "teacher" in {row["method"] for row in json.loads((tmp_path / "misread.json").read_text())}
