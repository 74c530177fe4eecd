"""A teacher's records: what is kept and why not, the file, the way back to samples, LLaVA-CoT's form."""
import json
import os
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import train
from data import llava, records, scenes, teachers, teaching
from data.chat import SECTIONS, staged_text
from data.records import HELD_OUT, Record, RecordFile, Tally, check_reply, export_llava, is_leak, key_of, load
from data.sample import Sample
from data.supply import Supply
from data.teaching import Reply, make_records
from model.runs.config import change

SAMPLE = Sample(question="How many dogs?", answer="two", aliases=("a pair",))
PARTS = dict(summary="count them", caption="dogs on grass", reasoning="one and one", conclusion="two")


def text(**parts):
    return staged_text(**{**PARTS, **parts})


# ---------------------------------------------------------------- the checks

@pytest.mark.parametrize("reply, finish_reason, reason", [
    (text(), "stop", ""),
    (text(conclusion=" A pair. "), "stop", ""),
    (staged_text(**PARTS, between="\n\n") + "\n", "stop", ""),
    (text(), "length", "cut_off"),
    (text(), "content_filter", "cut_off"),
    ("", "length", "cut_off"),
    ("", "stop", "empty"),
    (" \n", "stop", "empty"),
    (text(), "refusal", "refused"),
    ("I’m sorry, but I can’t help with that.", "stop", "refused"),
    ("", "failed", "failed"),
    ("two", "stop", "malformed"),
    (text().replace("</REASONING>", ""), "stop", "malformed"),
    (text().replace("<CAPTION> dogs on grass</CAPTION>", ""), "stop", "malformed"),
    (text(caption="  "), "stop", "malformed"),
    (text(conclusion=""), "stop", "malformed"),
    (text() + text(), "stop", "malformed"),
    ("Here you are. " + text(), "stop", "malformed"),
    (text().lower(), "stop", "malformed"),
    (text(summary="see <image>"), "stop", "malformed"),
    ("<think> so</think><answer> two</answer>", "stop", "malformed"),
    (text(conclusion="three"), "stop", "wrong"),
    (text(conclusion="two or three"), "stop", "wrong"),
    (text(conclusion="the answer is two"), "stop", "wrong"),
    (text(summary="reach the standard answer"), "stop", "leaked"),
    (text(caption="as the hint says"), "stop", "leaked"),
    (text(reasoning="this agrees with the provided answer"), "stop", "leaked"),
    (text(reasoning="this agrees with the provided answer", conclusion="three"), "stop", "wrong"),
    (text(reasoning="I'm sorry to say there are two"), "stop", ""),
    # stage by stage
    (PARTS, "stop", ""),
    ({**PARTS, "conclusion": "<answer> two </answer>"}, "stop", ""),
    ({**PARTS, "conclusion": "<CONCLUSION>two</CONCLUSION>"}, "stop", ""),
    ({**PARTS, "caption": "<CAPTION> dogs</CAPTION>"}, "stop", ""),
    ({**PARTS, "conclusion": "<answer> two"}, "stop", "malformed"),
    ({**PARTS, "caption": "<REASONING> dogs</REASONING>"}, "stop", "malformed"),
    ({**PARTS, "summary": ""}, "stop", "malformed"),
    ({"summary": "count"}, "stop", "malformed"),
    ({"summary": "I cannot help with this picture."}, "stop", "refused"),
    (dict.fromkeys(SECTIONS, ""), "stop", "empty"),
    ({**PARTS, "conclusion": "three"}, "stop", "wrong"),
])
def test_a_reply_is_kept_or_dropped_for_the_first_reason_that_holds(reply, finish_reason, reason):
    assert check_reply(reply, SAMPLE, finish_reason)[1] == reason


def test_the_sections_of_a_reply_stand_without_their_tags():
    assert check_reply(text(), SAMPLE)[0] == PARTS
    assert check_reply({**PARTS, "conclusion": "<answer> two </answer>"}, SAMPLE)[0] == PARTS
    assert check_reply("two", SAMPLE)[0] == {}


def test_a_hint_in_the_question_is_no_leak_of_a_teacher_that_was_told_nothing():
    sample = replace(SAMPLE, question="How many dogs? Hint: look at the grass.")
    reply = text(reasoning="the hint says to look at the grass, one and one")
    assert check_reply(reply, sample)[1] == ""
    assert check_reply(reply, sample, saw_gold=True)[1] == "leaked"
    assert check_reply(reply, SAMPLE)[1] == "leaked"


@pytest.mark.parametrize("chain", [
    "This agrees with the standard answer.", "the provided answer is B", "matches the given final answer",
    "the ground truth says two", "The ground-truth label", "as the hint suggests", "Hints point to B",
    "the answer that was given is two", "the solution I was given", "in line with the reference solution",
    "The expected answer is two", "the gold answer", "the golden answers", "the official response"])
def test_a_chain_that_speaks_of_an_answer_it_was_given_leaks(chain):
    assert is_leak(chain)


@pytest.mark.parametrize("chain", [
    "so the answer is two", "Of the given answer choices, B fits.", "the provided answer options are A and B",
    "the right answer is B", "the final answer follows", "given the picture, the answer is two", "a standard lamp",
    "he is expected to answer", "the ground is wet, in truth", "chintz curtains", "the given triangle",
    "a hint of blue", "the shadow hints at noon"])
def test_a_chain_that_reaches_its_own_answer_does_not_leak(chain):
    assert not is_leak(chain)


# ---------------------------------------------------------------- a hundred records with planted faults

class Scripted:
    """A teacher that says what a test has written down for each question and attempt."""
    name, model, prompt, parameters, sees_answer = "scripted", "scripted-1", "", {"temperature": 1.0}, False
    batch = 1

    def __init__(self, script, tries=1, jobs=4, batch=1):
        self.script, self.tries, self.jobs, self.batch = script, tries, jobs, batch
        self.asked = []

    def ask(self, samples, attempt):
        self.asked += [(sample.id, attempt) for sample in samples]
        return [self.script[sample.id, attempt] for sample in samples]

    def stop(self):
        pass


USAGE = {"prompt_tokens": 100, "completion_tokens": 9}
FAULTS = {
    "": Reply(text(), "stop", USAGE),
    "leaked": Reply(text(reasoning="as the standard answer has it"), "stop", USAGE),
    "malformed": Reply(text().replace("</CAPTION>", ""), "stop", USAGE),
    "wrong": Reply(text(conclusion="three"), "stop", USAGE),
    "cut_off": Reply(text()[:40], "length", USAGE),
    "refused": Reply("I cannot assist with that.", "stop", USAGE),
    "empty": Reply("", "stop", USAGE),
    "failed": Reply("", "failed", {}, error="HTTP 500"),
}
PLANTED = {"": 60, "leaked": 11, "malformed": 9, "wrong": 8, "cut_off": 5, "refused": 4, "empty": 2, "failed": 1}


def dots(count, **fields):
    """`count` questions, each about a picture of its own, as an array."""
    for i in range(count):
        pixels = np.zeros((5, 7, 3), np.uint8)
        pixels[0, 0] = i, i // 256, 9
        yield Sample(id=f"q{i}", images=(pixels,), question=f"How many dogs in {i}?", answer="two", **fields)


def planted():
    reasons = [reason for reason, count in PLANTED.items() for _ in range(count)]
    random.Random(0).shuffle(reasons)
    return reasons


def test_of_a_hundred_replies_with_planted_faults_the_tally_names_each(tmp_path):
    reasons = planted()
    script = {(f"q{i}", 1): FAULTS[reason] for i, reason in enumerate(reasons)}
    tally = make_records(tmp_path / "a.jsonl", dots(100), (), 100, Scripted(script))
    assert dict(tally.count) == PLANTED
    assert (tally.kept, tally.dropped, tally.tokens_in, tally.tokens_out) == (60, 40, 9900, 891)
    found = {record.id: record for record in records.read(tmp_path / "a.jsonl")}
    assert [found[f"q{i}"].reason for i in range(100)] == reasons
    assert all((record.text == "") == (record.reason in ("", "empty", "failed")) for record in found.values())
    lines = tally.text().splitlines()
    assert lines[0] == "60 of 100 replies kept, 9900 tokens in, 891 out"
    assert {tuple(line.split()[:2]) for line in lines[1:]} == {
        (str(count), reason) for reason, count in PLANTED.items() if reason}
    with RecordFile(tmp_path / "a.jsonl") as file:                      # the same, read from the file
        assert file.tally.text() == tally.text()


@pytest.mark.parametrize("batch", [1, 7])
def test_dropped_replies_are_asked_for_again_but_failures_only_in_a_later_run(tmp_path, batch):
    reasons = planted()
    script = {}
    for i, reason in enumerate(reasons):
        script[f"q{i}", 1] = FAULTS[reason]
        script[f"q{i}", 2] = FAULTS["" if i % 2 else "wrong"]
    teacher = Scripted(script, tries=2, jobs=2, batch=batch)
    make_records(tmp_path / "a.jsonl", dots(100), (), 100, teacher)
    again = [i for i, reason in enumerate(reasons) if reason not in ("", "failed")]
    assert Counter(teacher.asked) == Counter([(f"q{i}", 1) for i in range(100)] + [(f"q{i}", 2) for i in again])

    teacher = Scripted(script | {(f"q{i}", 1): FAULTS[""] for i in range(100)}, tries=2, batch=batch)
    tally = make_records(tmp_path / "a.jsonl", dots(100), (), 100, teacher)
    assert teacher.asked == [(f"q{reasons.index('failed')}", 1)]
    assert tally.kept == 61 + sum(i % 2 for i in again) and tally.count["failed"] == 0


def test_the_same_question_twice_is_asked_once(tmp_path):
    teacher = Scripted({("q0", 1): FAULTS[""], ("q1", 1): FAULTS[""]}, batch=3)
    tally = make_records(tmp_path / "a.jsonl", [*dots(2), *dots(1)], (), 3, teacher)
    assert (tally.kept, len(teacher.asked)) == (2, 2)


def test_a_sample_with_earlier_turns_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sample 'q0' has earlier turns"):
        make_records(tmp_path / "a.jsonl", dots(1, turns=(("a", "b"),)), (), 1, Scripted({}))


def test_whatever_a_reply_depends_on_changes_its_key():
    def key(model="m", prompt="p", sample=SAMPLE, pictures=("0a",), parameters=(("t", 1),), attempt=1):
        return key_of(model, prompt, sample, pictures, dict(parameters), attempt)

    keys = [key(), key(model="n"), key(prompt="q"), key(pictures=("0b",)), key(parameters=(("t", 2),)), key(attempt=2),
            key(sample=replace(SAMPLE, question="How many?")), key(sample=replace(SAMPLE, answer="three")),
            key(sample=replace(SAMPLE, aliases=()))]
    assert len(set(keys)) == len(keys)
    assert key() == key() == key(sample=replace(SAMPLE, id="other"))


def test_digests_of_pictures_are_those_of_their_bytes(tmp_path):
    one, other = (next(iter(dots(1))).images[0] + value for value in (0, 1))
    assert records.digest(one) == records.digest(one.copy()) != records.digest(other)
    assert records.digest(np.zeros((2, 3, 3), np.uint8)) != records.digest(np.zeros((3, 2, 3), np.uint8))
    (tmp_path / "a.png").write_bytes(b"bytes")
    assert records.digest(str(tmp_path / "a.png")) == records.digest(b"bytes")
    with pytest.raises(ValueError, match="none.png.*cannot be read"):
        records.digest(str(tmp_path / "none.png"))


# ---------------------------------------------------------------- the file

def record(i=0, **values):
    return Record(key=f"{i:032x}" * 2, **{"question": f"{i} ?", "ground_truth": "two", **PARTS, **values})


def test_a_torn_last_line_is_cut_off_and_the_rest_goes_on(tmp_path):
    path = tmp_path / "a.jsonl"
    with RecordFile(path) as file:
        file.put(record(0))
        file.put(record(1, reason="wrong"))
    whole = path.read_bytes()
    third = record(2).line().encode()
    for torn in (third[:1], third[:50], third, b"\x00" * 30, b"\x00\n", third[:50] + b"\n"):
        path.write_bytes(whole + torn)
        assert len(list(records.read(path))) == 2
        with RecordFile(path) as file:
            assert (file.tally.kept, file.tally.count["wrong"]) == (1, 1)
            assert [file.reason(f"{i:032x}" * 2) for i in range(3)] == ["", "wrong", None]
            file.put(record(2))
        assert path.read_bytes() == whole + third + b"\n"


def test_a_damaged_line_before_the_last_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(record(i).line().encode() + b"\n" for i in range(3)).replace(b'"1 ?"', b'"1 ?'))
    for use in (RecordFile, lambda path: list(records.read(path))):
        with pytest.raises(ValueError, match="a.jsonl.*line 2: not valid JSON"):
            use(path)


def test_a_file_that_is_something_else_is_left_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    for content in ('{"image": "a.png"}\n{"image": "b.png"}\n', '{"image": "a.png"}', '[{"id": 1},\n', "3"):
        path.write_text(content)
        with pytest.raises(ValueError, match="line 1: (expected a JSON object with a key|not valid JSON)"):
            RecordFile(path)
        assert path.read_text() == content
    with pytest.raises(ValueError, match="is a folder"):
        RecordFile(tmp_path)


def test_two_processes_cannot_write_one_file(tmp_path):
    with RecordFile(tmp_path / "a.jsonl"):
        with pytest.raises(ValueError, match="in use by another process"):
            RecordFile(tmp_path / "a.jsonl")
    RecordFile(tmp_path / "a.jsonl").__exit__()


def test_a_line_is_on_the_disk_when_put_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    with RecordFile(tmp_path / "a.jsonl") as file:
        file.put(record(0))
        assert synced == [os.path.getsize(tmp_path / "a.jsonl")]


# ---------------------------------------------------------------- back to samples

def test_samples_come_back_with_their_chains_pictures_and_splits(tmp_path):
    path = tmp_path / "a.jsonl"
    asked = list(dots(6, split="train", tolerance=0.5, unit="dogs", choices=("two", "six"),
                      boxes=((0.0, 1.0, 2.0, 3.0),)))
    held_out = [replace(sample, id=f"v{sample.id}", images=(sample.images[0] + 99,), split=split)
                for sample, split in zip(dots(2), ("val", "hospital_b"))]
    script = {(f"q{i}", 1): FAULTS["wrong" if i == 3 else ""] for i in range(6)}
    for _ in range(2):                                                  # the second time nothing is added
        tally = make_records(path, asked, held_out, 6, Scripted(script))
    assert (tally.kept, tally.dropped, tally.count[HELD_OUT]) == (5, 1, 2)
    splits, found = load(path)
    assert {split: sorted(sample.id for sample in samples) for split, samples in splits.items()} == {
        "train": ["q0", "q1", "q2", "q4", "q5"], "val": ["vq0"], "hospital_b": ["vq1"]}
    assert "5 train, 1 val, 1 hospital_b" in found
    by_id = {sample.id: sample for samples in splits.values() for sample in samples}
    for sample in [*asked[:3], *asked[4:]]:
        back = by_id[sample.id]
        assert np.array_equal(np.asarray(Image.open(back.images[0])), sample.images[0])
        assert replace(back, images=sample.images) == replace(sample, **PARTS, source="records")
    assert (by_id["vq0"].reasoning, by_id["vq0"].answer, by_id["vq0"].split) == ("", "two", "val")


def test_a_picture_inside_the_files_folder_moves_with_it(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "pictures").mkdir(parents=True)
    for name in ("pictures/a.png", "../b.png"):
        Image.new("RGB", (4, 4), "red" if "a" in name else "blue").save(old / name)
    samples = [Sample(id="a", images=(str(old / "pictures/a.png"),), question="1?", answer="two", split="train"),
               Sample(id="b", images=(str(old / "../b.png"),), question="2?", answer="two", split="val")]
    make_records(old / "a.jsonl", samples, (), 2, Scripted({("a", 1): FAULTS[""], ("b", 1): FAULTS[""]}))
    old.rename(new)
    splits, _ = load(new / "a.jsonl")
    assert splits["train"][0].images == (str(new / "pictures/a.png"),)
    assert splits["val"][0].images == (str(tmp_path / "b.png"),)


def test_without_a_split_the_pixels_decide(tmp_path):
    script = {(f"q{i}", 1): FAULTS[""] for i in range(40)}
    make_records(tmp_path / "a.jsonl", dots(40), (), 40, Scripted(script))
    splits, _ = load(tmp_path / "a.jsonl", val_percent=50)
    assert len(splits["train"]) + len(splits["val"]) == 40 and 10 < len(splits["val"]) < 30


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match="none.jsonl' does not exist; expected what train.py --stage=teach writes"):
        load(tmp_path / "none.jsonl")


def test_a_file_without_a_kept_reply_says_why_nothing_was_kept(tmp_path):
    script = {("q0", 1): FAULTS["wrong"], ("q1", 1): FAULTS["malformed"], ("q2", 1): FAULTS["wrong"]}
    held_out = [replace(sample, id="v", images=(sample.images[0] + 99,), split="val") for sample in dots(1)]
    make_records(tmp_path / "a.jsonl", dots(3, split="train"), held_out, 3, Scripted(script))
    with pytest.raises(ValueError, match=r"a.jsonl' holds no reply that was kept \(1 malformed, 2 wrong\)"):
        load(tmp_path / "a.jsonl")


def test_the_export_is_llava_cots_json_and_opens_as_llava_data(tmp_path):
    script = {(f"q{i}", 1): FAULTS["leaked" if i == 1 else ""] for i in range(3)}
    make_records(tmp_path / "a.jsonl", dots(3), (), 3, Scripted(script, jobs=1))
    assert export_llava(tmp_path / "a.jsonl", tmp_path / "out.json") == 2
    found = json.loads((tmp_path / "out.json").read_text())
    name = records.digest(next(iter(dots(1))).images[0])
    assert found[0] == {"id": "q0", "image": f"a.jsonl.pictures/{name}.png", "conversations": [
        {"from": "human", "value": "How many dogs in 0?"},
        {"from": "gpt", "value": "<SUMMARY> count them</SUMMARY>\n\n<CAPTION> dogs on grass</CAPTION>\n\n"
                                 "<REASONING> one and one</REASONING>\n\n<CONCLUSION> two</CONCLUSION>"}]}
    assert [row["id"] for row in found] == ["q0", "q2"]
    opened = llava.Records(str(tmp_path / "out.json"), str(tmp_path))
    assert len(opened) == 2 and opened[1].answer == found[1]["conversations"][1]["value"]


# ---------------------------------------------------------------- the command

def teach(tmp_path, *flags):
    path = tmp_path / "a.jsonl"
    train.main(["--stage=teach", f"--records={path}", "--threads=1", *flags])
    return list(records.read(path))


def test_the_drawn_worlds_teacher_makes_records_with_its_own_mistakes(tmp_path, capsys):
    found = teach(tmp_path, "--traces=60", "--val-percent=10", f"--export=llava_cot:{tmp_path / 'out.json'}")
    train_records = [record for record in found if record.reason != HELD_OUT]
    assert (len(train_records), len(found)) == (60, 66)
    seed = Supply(train.Config().data, train.Config().teacher, 0).stream("records")
    samples = scenes.load("train", 60, seed, teachers.SceneTeacher(), True)
    wrong = sum(not teachers.is_conclusion_right(sample) for sample in samples)
    assert 0 < wrong < 60
    assert Counter(record.reason for record in train_records) == {"": 60 - wrong, "wrong": wrong}
    assert [record.reasoning for record in train_records] == [sample.reasoning for sample in samples]
    assert f"{60 - wrong} of 60 replies kept" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out.json").read_text())) == 60 - wrong
    before = (tmp_path / "a.jsonl").read_bytes()
    teach(tmp_path, "--traces=60", "--val-percent=10")
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_a_teacher_of_the_drawn_world_that_sees_the_answer_concludes_with_it(tmp_path):
    found = teach(tmp_path, "--traces=40", "--teacher-sees-answer")
    assert {record.reason for record in found} == {"", HELD_OUT}


def test_drawn_questions_are_the_same_however_many_are_drawn_and_come_in_blocks(monkeypatch):
    monkeypatch.setattr(teaching, "BLOCK", 3)
    drawn = [sample.question for sample in teaching.drawn("train", 8, 5)]
    assert len(drawn) == 8 and [sample.question for sample in teaching.drawn("train", 4, 5)] == drawn[:4]
    assert len(set(drawn)) > 4


def test_a_function_in_a_file_gives_four_texts_or_two(tmp_path):
    source = tmp_path / "mine.py"
    source.write_text("def four(sample, rng):\n    return 'plan', 'seen', 'so', sample.answer\n"
                      "def two(sample, rng):\n    return 'so it is', sample.answer if rng.random() < .5 else 'x'\n"
                      "def bad(sample, rng):\n    return sample.answer\n")
    found = teach(tmp_path, "--traces=20", f"--teacher={source}:four")
    kept = [record for record in found if record.reason == ""]
    assert len(kept) == 20 and (kept[0].summary, kept[0].caption, kept[0].reasoning) == ("plan", "seen", "so")
    found = teach(tmp_path, "--traces=20", f"--teacher={source}:two", "--teacher-tries=3")
    kept = [record for record in found if record.reasoning == "so it is" and not record.reason]
    assert 12 <= len(kept) <= 20 and max(record.attempt for record in kept) > 1
    assert {record.summary for record in kept} <= {teachers.LIST_PLAN, teachers.WALK_PLAN}
    with pytest.raises(ValueError, match="teacher, sample 'train-12-0': expected .summary, caption, reasoning"):
        teach(tmp_path, "--traces=20", f"--teacher={source}:bad")


@pytest.mark.parametrize("flags, problem", [
    (["--stage=teach"], "--records= must name the file"),
    (["--stage=teach", "--records=a.jsonl", "--export=hf:x"], "--export=hf:x must be llava_cot:OUT.json"),
    (["--stage=teach,cot", "--records=a.jsonl"], "or teach alone"),
    (["--teacher=http://h/v1"], "--teacher=http://h/v1 must be FILE.py:NAME"),
    (["--stage=teach", "--records=a.jsonl", "--teacher=http://h/v1"], "needs --teacher-model"),
    (["--stage=teach", "--records=a.jsonl", "--teacher=none.pt"], "none.pt' does not exist"),
    (["--stage=teach", "--records=a.jsonl", "--teacher-tries=0"], "--teacher-tries=0 must lie in"),
    (["--stage=teach", "--records=a.jsonl", "--teacher-prompting=ccot"], "must be one of stages_one_call, stages")])
def test_options_that_cannot_work_are_refused_in_one_sentence(tmp_path, monkeypatch, flags, problem):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        train.main(flags)
    assert problem in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "a.jsonl").exists()


TINY = ["--preset=tiny", "--image-size=24", "--patch=12", "--vocab=400", "--clip-steps=1", "--align-steps=1",
        "--sft-steps=0", "--cot-steps=2", "--clip-batch=8", "--batch=8", "--threads=1", "--cot-format=llava_cot",
        "--max-new=48"]


def test_records_train_cot_in_llava_cots_form_and_the_checkpoint_is_a_teacher(tmp_path, capsys):
    found = teach(tmp_path, "--traces=40")
    kept = sum(record.reason == "" for record in found)
    out = tmp_path / "run"
    train.main([*TINY, f"--data=records:{tmp_path / 'a.jsonl'}", "--stage=clip,align,cot", f"--out={out}"])
    said = capsys.readouterr().out
    assert f"records: {kept + 8} rows about {kept + 8} pictures; {kept} train, 8 val; {kept} with" in said
    assert f"teacher: {kept} chains, 0.0 % wrong, 0 % without </REASONING>" in said
    assert json.loads((out / "results.json").read_text())

    for prompting in ("stages", "stages_one_call"):
        found = teach(tmp_path, "--traces=9", f"--teacher={out / 'cot.pt'}", f"--teacher-prompting={prompting}",
                      "--teacher-tries=1")
        found = [record for record in found if record.parameters.get("prompting") == prompting]
        assert len(found) == 9 and all(record.usage["completion_tokens"] > 0 for record in found)
        assert {type(record.text) for record in found} == ({dict} if prompting == "stages" else {str})
    assert change(train.Config(), stage="teach").stages() == ["teach"]


def test_a_tally_without_replies_says_so():
    assert Tally().text() == "0 of 0 replies kept, 0 tokens in, 0 out"
