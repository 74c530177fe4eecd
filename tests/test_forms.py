"""The two forms of a chain of thought, LLaVA-CoT's four sections beside think and answer: parsed, rewarded, taught."""
import random
import re
import time

import pytest
import torch

from data import chat, jsonl
from data.chat import ALL_TAGS, FORMS, TAGS, Parsed, parse, staged_text
from data.sample import Sample
from data.teachers import TeacherOptions, records
from rl.rewards import REWARDS, RewardOptions, Rewards

FUZZED = 5000           # texts against each reference

# ---------------------------------------------------------------- the four sections against an adversary

S = "<SUMMARY> a</SUMMARY>"
C = "<CAPTION> b</CAPTION>"
R = "<REASONING> c</REASONING>"
X = "<CONCLUSION> two</CONCLUSION>"
WHOLE = S + C + R + X
TEXTS = {"S": ("summary", "a"), "C": ("caption", "b"), "R": ("reasoning", "c"), "X": ("conclusion", "two")}


def has(letters, **others):
    """Sections of the texts above by their letters, and others by name."""
    return dict(TEXTS[letter] for letter in letters) | others


def no(name):
    return f"no single <{name}>..</{name}>"


def inside(name, around):
    return f"<{name}> stands inside <{around}>"


def before(name, other):
    return f"<{name}> stands before <{other}>"


OUTSIDE = "text outside the tags"
BOTH = "tags of two forms"
NO_ANSWER = no("CONCLUSION")
ZERO = "\u200b"

# category -> (text, answer, fault, sections); well-formed is exactly what has no fault.
CASES = {
    "well-formed": [
        (WHOLE, "two", "", has("SCRX")),
        (staged_text("a", "b", "c", "two"), "two", "", has("SCRX")),
        (staged_text("a", "b", "c", "two", between="\n\n"), "two", "", has("SCRX")),
        (f"<SUMMARY>a</SUMMARY>{C}{R}<CONCLUSION>two</CONCLUSION>", "two", "", has("SCRX")),
    ],
    "order": [
        (C + S + R + X, "two", before("CAPTION", "SUMMARY"), has("SCRX")),
        (S + R + C + X, "two", before("REASONING", "CAPTION"), has("SCRX")),
        (S + C + X + R, "two", before("CONCLUSION", "REASONING"), has("SCRX")),
        (X + S + C + R, "two", before("CONCLUSION", "REASONING"), has("SCRX")),
        (X + R + C + S, "two", before("CAPTION", "SUMMARY"), has("SCRX")),
        (R + S + C + X, "two", before("REASONING", "CAPTION"), has("SCRX")),
    ],
    "nesting": [
        (f"<SUMMARY> a{C}</SUMMARY>{R}{X}", "two", inside("CAPTION", "SUMMARY"), has("CRX")),
        (f"<SUMMARY> a<CAPTION> b</SUMMARY></CAPTION>{R}{X}", "two", inside("CAPTION", "SUMMARY"), has("RX")),
        (f"{S}<CAPTION> b{R}</CAPTION>{X}", "two", inside("REASONING", "CAPTION"), has("SRX")),
        (f"<SUMMARY>{R}</SUMMARY>{C}{X}", "two", before("REASONING", "CAPTION"), has("CRX")),
        (f"<CAPTION>{S}</CAPTION>{R}{X}", "two", before("CAPTION", "SUMMARY"), has("SRX")),
        (f"<SUMMARY><CAPTION><REASONING></SUMMARY></CAPTION></REASONING>{X}", "two", inside("CAPTION", "SUMMARY"),
         has("X")),
    ],
    "repeats": [
        (S + WHOLE, "two", no("SUMMARY"), has("CRX")),
        (S + C + C + R + X, "two", no("CAPTION"), has("SRX")),
        (S + C + R + R + X, "two", no("REASONING"), has("SCX")),
        (WHOLE + X, "", NO_ANSWER, has("SCR")),
        (WHOLE + WHOLE, "", NO_ANSWER, {}),
        (WHOLE + "<CONCLUSION>", "", NO_ANSWER, has("SCR")),
        (WHOLE + "</CONCLUSION>", "", NO_ANSWER, has("SCR")),
        (WHOLE + "<CONCLUSION></CONCLUSION>", "", NO_ANSWER, has("SCR")),
        ("<SUMMARY>" + WHOLE, "two", no("SUMMARY"), has("CRX")),
        (WHOLE + "</SUMMARY>", "", inside("CONCLUSION", "SUMMARY"), has("CR")),
    ],
    "unclosed": [
        (staged_text("a", "b", "c", "two", close_reasoning=False), "two", no("REASONING"), has("SCX")),
        (f"<SUMMARY> a{C}{R}{X}", "two", no("SUMMARY"), has("CRX")),
        (f"<SUMMARY> a<CAPTION> b<REASONING> c{X}", "two", no("SUMMARY"), has("X")),
        (f"{S}{C}{R}<CONCLUSION> two", "", NO_ANSWER, has("SCR")),
        (f"{S}{C}{R}two</CONCLUSION>", "", NO_ANSWER, has("SCR")),
        (f"{S}{C}{R}</CONCLUSION> two<CONCLUSION>", "", NO_ANSWER, has("SCR")),
        (f"{S}{C}{R}<CONCLUSION> two</CONCLUSION", "", NO_ANSWER, has("SCR")),
        (f"{S}{C}</REASONING> c<REASONING>{X}", "two", no("REASONING"), has("SCX")),
    ],
    "missing": [
        (X, "two", no("SUMMARY"), has("X")),
        (S + X, "two", no("CAPTION"), has("SX")),
        (S + C + X, "two", no("REASONING"), has("SCX")),
        (C + R + X, "two", no("SUMMARY"), has("CRX")),
        (S + C + R, "", NO_ANSWER, has("SCR")),
        (R, "", NO_ANSWER, has("R")),
        ("<SUMMARY>", "", NO_ANSWER, {}),
        ("</CONCLUSION>", "", NO_ANSWER, {}),
    ],
    "no tag at all": [
        ("", "", no("answer"), {}),
        ("two", "", no("answer"), {}),
        ("SUMMARY: a CONCLUSION: two", "", no("answer"), {}),
    ],
    "text outside": [
        ("so " + WHOLE, "two", OUTSIDE, has("SCRX")),
        (WHOLE + " done", "two", OUTSIDE, has("SCRX")),
        (S + "," + C + R + X, "two", OUTSIDE, has("SCRX")),
        (S + C + "then" + R + X, "two", OUTSIDE, has("SCRX")),
        (S + C + R + "." + X, "two", OUTSIDE, has("SCRX")),
        (f"{WHOLE}<OUTSIDE>", "two", OUTSIDE, has("SCRX")),
        (f"{S}{ZERO}{C}{R}{X}", "two", OUTSIDE, has("SCRX")),
    ],
    "other case": [
        (WHOLE.lower(), "", no("answer"), {}),
        (WHOLE.title(), "", no("answer"), {}),
        (f"<Summary> a</Summary>{C}{R}{X}", "two", no("SUMMARY"), has("CRX")),
        (f"{S}{C}{R}<Conclusion> two</Conclusion>", "", NO_ANSWER, has("SCR")),
        (f"{S}{C}{R}<CONCLUSION> two</conclusion>", "", NO_ANSWER, has("SCR")),
        (f"{WHOLE}<conclusion> three</conclusion>", "two", OUTSIDE, has("SCRX")),
        (f"{S}<CAPTION> b <Summary></CAPTION>{R}{X}", "two", "", has("SRX", caption="b <Summary>")),
        (f"{S}{C}{R}<CONCLUSION> <Think> two</CONCLUSION>", "<Think> two", "", has("SCR", conclusion="<Think> two")),
    ],
    "both forms": [
        (f"{WHOLE}<answer> two</answer>", "", BOTH, {}),
        (f"<think> a</think>{X}", "", BOTH, {}),
        (f"{S}{C}{R}<answer> two</answer>", "", BOTH, {}),
        (f"<think>{S}{C}{R}</think><answer> two</answer>", "", BOTH, {}),
        (f"{S}{C}{R}<CONCLUSION><answer> two</answer></CONCLUSION>", "", BOTH, {}),
        (f"{S}{C}<REASONING> <think> c</REASONING>{X}", "", BOTH, {}),
        ("<think> a</think><answer> two</answer></SUMMARY>", "", BOTH, {}),
        (f"<think> a</think><answer> two</answer>{WHOLE}", "", BOTH, {}),
    ],
    "tags inside CONCLUSION": [
        (f"{S}{C}{R}<CONCLUSION><CONCLUSION> two</CONCLUSION></CONCLUSION>", "", NO_ANSWER, has("SCR")),
        (f"{S}{C}<CONCLUSION> two{R}</CONCLUSION>", "", NO_ANSWER, has("SCR")),
        (f"{S}{C}{R}<CONCLUSION> two<SUMMARY></CONCLUSION>", "", NO_ANSWER, has("CR")),
        (f"{S}{C}<REASONING> c<CONCLUSION> two</REASONING></CONCLUSION>", "", NO_ANSWER, has("SC")),
        (f"<CONCLUSION>{S}{C}{R} two</CONCLUSION>", "", NO_ANSWER, has("SCR")),
    ],
    "an answer inside another section": [
        (f"{S}{C}<REASONING> c{X}</REASONING>", "", inside("CONCLUSION", "REASONING"), has("SC")),
        (f"<SUMMARY> a{X}</SUMMARY>{C}{R}", "", inside("CONCLUSION", "SUMMARY"), has("CR")),
        (f"{S}<CAPTION>{X} b</CAPTION>{R}", "", inside("CONCLUSION", "CAPTION"), has("SR")),
        (f"<CAPTION>{X}</CAPTION>", "", inside("CONCLUSION", "CAPTION"), {}),
        (f"{S}{C}<REASONING><REASONING> c{X}</REASONING>", "", inside("CONCLUSION", "REASONING"), has("SC")),
        (f"{S}{C}<REASONING> c{X}</REASONING></REASONING>", "", inside("CONCLUSION", "REASONING"), has("SC")),
        (f"{R}<REASONING>{X}</REASONING>", "", inside("CONCLUSION", "REASONING"), {}),
        (f"<CAPTION><SUMMARY> a{X}</SUMMARY></CAPTION>{R}", "", inside("CONCLUSION", "SUMMARY"), has("R")),
    ],
    # As the think form has it: <think></think><answer></answer> is well-formed, and right about nothing.
    "empty sections": [
        (staged_text("", "", "", "two"), "two", "", has("X", summary="", caption="", reasoning="")),
        (f"{S}{C}<REASONING></REASONING>{X}", "two", "", has("SCX", reasoning="")),
        (f"{S}{C}{R}<CONCLUSION></CONCLUSION>", "", "", has("SCR", conclusion="")),
        (f"{S}{C}{R}<CONCLUSION> \n</CONCLUSION>", "", "", has("SCR", conclusion="")),
        ("<CONCLUSION></CONCLUSION>", "", no("SUMMARY"), dict(conclusion="")),
    ],
    "white space": [
        (f"\n\t{S} {C}\r\n\n{R}\u00a0{X}\u3000\n", "two", "", has("SCRX")),
        (f"<SUMMARY>\n a \n</SUMMARY>{C}{R}<CONCLUSION>\ttwo\n</CONCLUSION>", "two", "", has("SCRX")),
        (f"{S}{C}{R}<CONCLUSION> red  circle </CONCLUSION>", "red  circle", "", has("SCR", conclusion="red  circle")),
        (f"< SUMMARY> a</SUMMARY>{C}{R}{X}", "two", no("SUMMARY"), has("CRX")),
        (f"{S}{C}{R}<CONCLUSION > two</CONCLUSION>", "", NO_ANSWER, has("SCR")),
    ],
    "unicode": [
        (f"{S}{C}{R}<CONCLUSION>{ZERO}two</CONCLUSION>", f"{ZERO}two", "", has("SCR", conclusion=f"{ZERO}two")),
        (f"{S}{C}{R}<CONC{ZERO}LUSION>two</CONCLUSION>", "", NO_ANSWER, has("SCR")),
        (f"{S}{C}{R}\uff1cCONCLUSION\uff1etwo\uff1c/CONCLUSION\uff1e", "", NO_ANSWER, has("SCR")),
        (f"{S}{C}{R}<C\u041eNCLUSION>two</C\u041eNCLUSION>", "", NO_ANSWER, has("SCR")),        # a Cyrillic O
        (f"<SUMMARY>漢字 😀</SUMMARY>{C}{R}{X}", "two", "", has("CRX", summary="漢字 😀")),
        (f"<SUMMARY>\ud800\x00</SUMMARY>{C}{R}{X}", "two", "", has("CRX", summary="\ud800\x00")),
        (f"{S}{C}{R}&lt;CONCLUSION&gt;two&lt;/CONCLUSION&gt;", "", NO_ANSWER, has("SCR")),
    ],
}
ALL = [(category, *case) for category, cases in CASES.items() for case in cases]


def test_the_adversary_is_as_large_as_it_claims():
    assert len({text for _, text, *_ in ALL}) >= 90


@pytest.mark.parametrize("category, text, answer, fault, sections", ALL)
def test_a_text_of_four_sections_is_judged_as_worked_out_by_hand(category, text, answer, fault, sections):
    parsed = parse(text)
    assert (parsed.answer, parsed.fault, parsed.sections) == (answer, fault, sections)
    assert parsed.well_formed == (fault == "")
    assert not parsed.well_formed or sections.keys() == {*chat.SECTIONS}


def test_the_thought_of_four_sections_is_their_reasoning():
    assert parse(WHOLE).think == "c" and parse(S + C + X).think == ""


# ---------------------------------------------------------------- fuzzed against references

TAG = re.compile(f"({'|'.join(ALL_TAGS)})")
NOT_A_TAG = f"(?:(?!{'|'.join(ALL_TAGS)}).)*"


def grammar(names):
    sections = [f"<{name}>{NOT_A_TAG}</{name}>" for name in names]
    return r"\s*" + r"\s*".join(sections) + r"\s*"


GRAMMAR = re.compile("|".join(grammar(names) for names in FORMS.values()), re.DOTALL)
MIXES = (["llava_cot"], ["llava_cot"], ["think"], ["think", "llava_cot"])        # forms whose tags a text may hold


def reference(text):
    """(answer, fault, sections) by the sequence of a text's tags, where `parse` searches the text itself."""
    pieces = TAG.split(text)
    tags, texts = pieces[1::2], pieces[0::2]        # texts[i] stands in front of tags[i]
    forms = {form for tag in tags for form, names in FORMS.items() if tag.strip("</>") in names}
    if len(forms) == 2:
        return "", BOTH, {}
    form = forms.pop() if forms else "think"
    *others, last = FORMS[form]

    closed = {}             # name -> its text, of every section that stands once with no tag in it
    whole = set()           # names whose two tags stand once, in their order
    for name in FORMS[form]:
        opened = [place for place, tag in enumerate(tags) if tag == f"<{name}>"]
        shut = [place for place, tag in enumerate(tags) if tag == f"</{name}>"]
        if len(opened) == len(shut) == 1 and opened < shut:
            whole.add(name)
            if shut[0] == opened[0] + 1:
                closed[name] = texts[shut[0]].strip()

    fault = ""
    if last not in closed:
        fault = no(last)
    else:
        place = tags.index(f"<{last}>")
        around = [name for name in others if f"<{name}>" in tags[:place] and f"</{name}>" in tags[place + 2:]]
        if around:
            fault = inside(last, around[0])
            del closed[last]
    answer = closed.get(last, "")
    sections = {}
    if form == "llava_cot":
        sections = {name.lower(): closed[name] for name in FORMS[form] if name in closed}
    if fault:
        return answer, fault, sections
    if GRAMMAR.fullmatch(text):
        return answer, "", sections
    lacking = [name for name in others if name not in whole]
    if lacking:
        return answer, no(lacking[0]), sections
    for name, following in zip(FORMS[form], FORMS[form][1:]):
        ranks = [tags.index(tag) for tag in (f"<{name}>", f"</{name}>", f"<{following}>")]
        if ranks[2] < ranks[0]:
            return answer, before(following, name), sections
        if ranks[2] < ranks[1]:
            return answer, inside(following, name), sections
    return answer, OUTSIDE, sections


def between(text, opening, closing):
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start = text.index(opening) + len(opening)
    stop = text.index(closing)
    return text[start:stop] if start <= stop else None


def think_alone(text):
    """(answer, thought, fault) as the parser gave them when there was the think form alone."""
    answer = between(text, "<answer>", "</answer>")
    think = between(text, "<think>", "</think>")
    thought = "" if think is None else think.strip()
    if answer is None or any(tag in answer for tag in TAGS):
        return "", thought, "no single <answer>..</answer>"
    front = text.split("<answer>")[0]
    after = text.split("</answer>")[1]
    if think is None:
        if "<think>" in front and "</think>" in after:
            return "", "", "<answer> stands inside <think>"
        return answer.strip(), "", "no single <think>..</think>"
    if "<answer>" in think or "</answer>" in think:
        return "", thought, "<answer> stands inside <think>"
    if text.index("<think>") > text.index("<answer>"):
        return answer.strip(), thought, "<answer> stands before <think>"
    in_front = text.split("<think>")[0]
    in_between = text.split("</think>")[1].split("<answer>")[0]
    if in_front.strip() or in_between.strip() or after.strip():
        return answer.strip(), thought, "text outside the tags"
    return answer.strip(), thought, ""


WORDS = ["two", "a1", " ", "\n", "\u00a0", ".", "<", "</", ">", ZERO, "<Think>", "<summary>", "</ANSWER>", "\x1c"]


def random_text(rng, forms):
    """Tags and words in any order, or sections, mostly in order, that lost, gained or swapped a few of their pieces."""
    tags = [tag for form in forms for name in FORMS[form] for tag in (f"<{name}>", f"</{name}>")]
    if rng.random() < 0.3:
        return "".join(rng.choices(tags + WORDS, k=rng.randrange(14)))
    names = list(FORMS[rng.choice(forms)])
    if rng.random() < 0.2:
        rng.shuffle(names)
    pieces = []
    for name in names:
        pieces += [rng.choice(["", " ", "\n\n"]), f"<{name}>", rng.choice(WORDS), f"</{name}>"]
    pieces.append("")
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        place = rng.randrange(len(pieces))
        change = rng.random()
        if change < 0.3:
            del pieces[place]
        elif change < 0.6:
            pieces.insert(place, rng.choice(tags + WORDS))
        else:
            other = rng.randrange(len(pieces))
            pieces[place], pieces[other] = pieces[other], pieces[place]
    return "".join(pieces)


def test_random_texts_of_both_forms_are_judged_as_by_the_sequence_of_their_tags():
    rng = random.Random(0)
    faults = set()
    for _ in range(FUZZED):
        text = random_text(rng, rng.choice(MIXES))
        parsed = parse(text)
        assert (parsed.answer, parsed.fault, parsed.sections) == reference(text), repr(text)
        assert parsed.well_formed == bool(GRAMMAR.fullmatch(text)), repr(text)
        faults.add(parsed.fault)
    assert len(faults) == 19        # every one that there is


def test_texts_without_the_four_tags_are_judged_as_before_there_was_a_second_form():
    rng = random.Random(1)
    faults = set()
    for _ in range(FUZZED):
        text = random_text(rng, ["think"])
        parsed = parse(text)
        assert (parsed.answer, parsed.think, parsed.fault) == think_alone(text), repr(text)
        assert parsed.sections == {} and parsed == Parsed(*think_alone(text))
        faults.add(parsed.fault)
    assert len(faults) == 6


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_soak_of_both_references(seed):
    rng = random.Random(100 + seed)
    for _ in range(10 * FUZZED):
        forms = rng.choice(MIXES)
        text = random_text(rng, forms)
        parsed = parse(text)
        assert (parsed.answer, parsed.fault, parsed.sections) == reference(text), repr(text)
        if forms == ["think"]:
            assert (parsed.answer, parsed.think, parsed.fault) == think_alone(text), repr(text)


@pytest.mark.parametrize("unit", [*chat.STAGE_TAGS, WHOLE, "<CONCLUSION></CONCLUSION>", "<", "a ", "\u3000"])
def test_a_million_characters_take_less_than_a_second(unit):
    long = unit * (1_000_000 // len(unit))
    for text in (long, f"{S}{C}<REASONING>{long}</REASONING>{X}", f"{S}{C}{R}<CONCLUSION>{long}</CONCLUSION>"):
        began = time.process_time()
        parse(text)
        assert time.process_time() - began < 1


# ---------------------------------------------------------------- rewards of both forms

THINK = "<think> c</think><answer> two</answer>"


@pytest.mark.parametrize("text, either, think, llava_cot", [
    (THINK, 1, 1, 0), (WHOLE, 1, 0, 1), ("", 0, 0, 0), (THINK + WHOLE, 0, 0, 0), (WHOLE + THINK, 0, 0, 0),
    ("<answer> two</answer>", 0, 0, 0), (X, 0, 0, 0), ("<think></think><answer></answer>", 1, 1, 0),
    (staged_text("", "", "", ""), 1, 0, 1), (f"{S}{C}{THINK}", 0, 0, 0)])
def test_format_takes_either_form_and_the_two_others_one(text, either, think, llava_cot):
    names = ("format", "format_think", "format_llava_cot")
    assert [REWARDS[name](Sample(), text) for name in names] == [either, think, llava_cot]


def test_a_right_answer_earns_the_same_in_both_forms_and_nothing_behind_the_gate_when_malformed():
    sample = Sample(answer="two")
    rewards = Rewards(RewardOptions(rewards="correctness:1,format_llava_cot:0.5"))
    parts, earned = rewards.score([sample], [[THINK, WHOLE, X, WHOLE + " so"]], torch.ones(1, 4).long())
    assert parts["correctness"].tolist() == [[1, 1, 1, 1]] and parts["format"].tolist() == [[1, 1, 0, 0]]
    assert rewards.total(earned).tolist() == [[1, 1.5, 0, 0]]
    assert rewards.why(sample, WHOLE) == "reward 1.5; 'two': right; well-formed"
    assert rewards.why(sample, X) == "reward 0; 'two': right; no single <SUMMARY>..</SUMMARY>"


# ---------------------------------------------------------------- what is taught

class Words:
    """A tokenizer of which a word is a token."""

    def encode(self, text):
        return text.split()


def chains(count=20, **fields):
    whole = dict(answer="two", summary="count", caption="a1 b2", reasoning="a1 b2 two", conclusion="two") | fields
    return [Sample(id=f"s{number}", **whole) for number in range(count)]


def test_chains_are_taught_in_four_sections_and_a_share_of_them_without_the_end_of_its_reasoning():
    found, report = records(chains(), Words(), 0.5, 0, 99, form="llava_cot")
    thinking, plain = records(chains(), Words(), 0.5, 0, 99)
    closed = "<SUMMARY> count</SUMMARY><CAPTION> a1 b2</CAPTION><REASONING> a1 b2 two</REASONING>" \
             "<CONCLUSION> two</CONCLUSION>"
    texts = [text for _, text in found]
    assert {*texts} == {closed, closed.replace("</REASONING>", "")}
    assert ["</REASONING>" in text for text in texts] == ["</think>" in text for _, text in thinking]
    share = 100 * sum("</REASONING>" not in text for text in texts) / 20
    assert report == f"  teacher: 20 chains, 0.0 % wrong, {share:.0f} % without </REASONING>"
    assert plain == report.replace("</REASONING>", "</think>") and 0 < share < 100
    assert [sample.id for sample, _ in found] == [f"s{number}" for number in range(20)]
    for text in texts:
        parsed = parse(text)
        assert parsed.answer == "two" and parsed.well_formed == (text == closed)


def test_chains_in_four_sections_that_are_cut_off_are_noted():
    _, report = records(chains(3), Words(), 0.0, 0, 8, form="llava_cot")
    assert report.endswith("note: 3 of 3 chains are longer than --max-new=8 tokens: what is learned from them is cut "
                           "off before the answer")


@pytest.mark.parametrize("fields, complaint", [
    (dict(summary=""), "the summary of sample 's0' is empty"),
    (dict(caption=" "), "the caption of sample 's0' is empty"),
    (dict(summary="a</SUMMARY>"), "the summary of sample 's0' holds the tag </SUMMARY>, which the prompt template sets "
                                  "itself"),
    (dict(caption="<think>"), "the caption of sample 's0' holds the tag <think>, which the prompt template sets "
                              "itself")])
def test_a_sample_that_cannot_be_taught_in_four_sections_is_one_sentence_that_names_it(fields, complaint):
    with pytest.raises(ValueError, match=f"^--cot-format=llava_cot: {complaint}$"):
        records(chains(2, **fields), Words(), 0.0, 0, 99, form="llava_cot")
    records(chains(2, summary="", caption=""), Words(), 0.0, 0, 99)           # think and answer need neither


def test_the_format_of_chains_is_an_option_with_two_values():
    assert TeacherOptions().cot_format == "think" and TeacherOptions(cot_format="llava_cot")
    with pytest.raises(ValueError, match="--cot-format=tags must be one of think, llava_cot"):
        TeacherOptions(cot_format="tags")


def test_a_line_of_a_jsonl_file_may_bring_a_summary(tmp_path):
    line = b'{"image": "a.png", "question": "How many?", "answer": 2, "summary": " count them ", "caption": "a cat"}'
    sample, unknown = jsonl.parse(line, str(tmp_path), "mine:1")
    assert (sample.summary, sample.caption, unknown) == ("count them", "a cat", set())
    with pytest.raises(ValueError, match="field 'summary' holds the tag </SUMMARY>"):
        jsonl.parse(line.replace(b"count them", b"</SUMMARY>"), str(tmp_path), "mine:1")
