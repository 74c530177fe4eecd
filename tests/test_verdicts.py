"""What a run shows beside its accuracy: runs whose truth is made up are told for what they are, with every seed."""
import json
from types import SimpleNamespace

import numpy as np
import pytest

from data.chat import target_text
from data.sample import Sample
from rl import interventions
from rl.interventions import first_half, look, masked, other_pictures, other_thoughts, think
from rl.metrics import reflects
from rl.report import verdicts as report
from rl.report.verdicts import (difference, form, looking, over_seeds_text, reflection, sharpening, start_of, thinking,
                                verdicts, verdicts_text, within_prompts)

SEEDS = range(8)
N, G = 200, 8


def drawn(rng, chances, formed=None):
    """Raw scores of G completions: right with a chance for each prompt, well-formed with another."""
    right = rng.random((len(chances), G)) < np.asarray(chances)[:, None]
    formed = np.ones_like(right) if formed is None else formed
    return {"right": (right & formed).astype(int).tolist(), "format": formed.astype(int).tolist()}


def spread(rng):
    """What a start may be: of three prompts one that it mostly gets right, one hardly ever, one never."""
    return rng.permutation(np.resize([0.6, 0.08, 0.0], N))


# ---------------------------------------------------------------- sharpening or capability

@pytest.mark.parametrize("seed", SEEDS)
def test_a_pure_sharpener_is_told_from_a_new_skill_and_from_nothing(seed):
    rng = np.random.default_rng(seed)
    chances = spread(rng)
    start = drawn(rng, chances)
    mode_wins = drawn(rng, np.where(chances > 0.5, 0.98, 0.0))          # what was rare is lost
    learned = drawn(rng, np.where(chances == 0.0, 0.7, chances))        # what was impossible is mostly right
    assert sharpening(start, mode_wins).finding == "sharpening"
    assert sharpening(start, learned).finding == "capability"
    assert sharpening(start, drawn(rng, chances)).finding == "not shown"


def test_prompts_that_the_start_merely_missed_are_no_new_skill():
    # Rare everywhere: of the prompts unsolved in four samples its next four solve a third, as the same model does.
    found = []
    false = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        start, again = (drawn(rng, np.full(N, 0.1)) for _ in range(2))
        verdict = sharpening(start, again)
        found.append(verdict.measures["new"].value)
        false += verdict.finding == "capability"
        assert np.mean([any(row) for row in again["right"]]) > 0.4
    assert false <= 3 and abs(np.mean(found)) < 0.02        # a 95 % interval lies above 0 once in forty times


def test_coverage_by_hand():
    start = {"right": [[0, 0, 1, 0]] * 10 + [[0, 0, 0, 0]] * 10 + [[1, 0, 0, 0]] * 10}
    main = {"right": [[1, 1, 1, 1]] * 20 + [[0, 0, 0, 0]] * 10}
    verdict = sharpening(start, main)
    # Unsolved in the first two samples: 20 prompts, of which the next two solve 10, and the other model all.
    assert verdict.measures["new"].n == 20 and verdict.measures["new"].value == 0.5
    assert verdict.measures["pass@1"].value == pytest.approx((10 * 0.75 + 10 * 1 - 10 * 0.25) / 30)
    assert verdict.measures["pass@k"].value == 0.0 and verdict.numbers == {"k": 4, "half": 2}


def test_a_half_of_one_sample_is_one_sample():
    start = {"right": [[0, 0]] * 20}
    verdict = sharpening(start, {"right": [[1, 1]] * 20})
    assert verdict.finding == "capability" and "did not solve in 1 sample it solves" in verdict.sentence("b", "a", "id")
    assert "did not solve in 1 sample." in sharpening(start, start).sentence("b", "a", "id")


def test_one_completion_a_prompt_has_no_such_verdict():
    one = {"right": [[1]] * 20}
    assert sharpening(one, one).finding == "not measured"
    assert sharpening(one, one).sentence("b", "a", "id") == "On id nothing was measured of it."


# ---------------------------------------------------------------- reward or form

@pytest.mark.parametrize("seed", SEEDS)
def test_a_gain_of_form_alone_is_told_from_one_of_answers(seed):
    rng = np.random.default_rng(seed)
    chances = rng.permutation(np.resize([0.95, 0.3, 0.05], N))
    half = rng.random((N, G)) < 0.4
    start = drawn(rng, chances, half)
    assert form(start, drawn(rng, chances)).finding in ("form alone", "not shown")
    assert form(start, drawn(rng, np.clip(chances + 0.3, 0, 1))).finding == "more than form"
    certain = (chances > 0.5).astype(float)             # nothing but the form varies
    assert form(drawn(rng, certain, half), drawn(rng, certain)).finding == "form alone"
    assert form(start, drawn(rng, chances, half)).finding == "not shown"


def test_prompts_without_a_well_formed_completion_of_both_are_left_out():
    start = {"right": [[0, 1]] * 12 + [[0, 0]] * 5, "format": [[0, 1]] * 12 + [[0, 0]] * 5}
    main = {"right": [[1, 1]] * 17, "format": [[1, 1]] * 17}
    measures = form(start, main).measures
    assert measures["formed"].n == 12 and measures["formed"].value == 0.0
    assert measures["all"].n == 17 and measures["form"].value == pytest.approx((12 * 0.5 + 5) / 17)


# ---------------------------------------------------------------- did it look, does the thought matter

def scene_samples(n=200, seed=0):
    """Prompts whose answer stands in the brightness of a picture, and in nothing else."""
    rng = np.random.default_rng(seed)
    samples = []
    for place in range(n):
        answer = int(rng.integers(4))
        picture = np.full((8, 8, 3), 40 + 50 * answer, np.uint8)
        picture[0, 0] = rng.integers(0, 256, 3)
        samples.append(Sample(id=str(place), images=(picture,), question="how bright ?", answer=str(answer),
                              source="made/bright"))
    return samples


PIXELS = dict(image_size=8, fit="crop", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def seeing(rng, share=0.95):
    """A model that reads the picture, right in `share`, and says what it read after a thought."""
    def complete(samples, beginnings):
        texts = []
        for sample in samples:
            level = round((float(np.median(sample.images[0])) - 40) / 50)
            answer = str(level) if rng.random() < share else "9"
            texts.append(target_text(answer, f"it is {answer}"))
        return texts
    return complete


def blind(samples, beginnings):
    """A model that knows that one answer is common, and looks at nothing."""
    return [target_text("1", "it is 1")] * len(samples)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_model_that_ignores_the_picture_is_told_from_one_that_looks(seed):
    rng = np.random.default_rng(seed)
    samples = scene_samples(seed=seed)
    assert looking(look(seeing(rng), samples, PIXELS, 2)).finding == "looks"
    found = looking(look(blind, samples, PIXELS, 2))
    assert found.finding == "does not look" and found.measures["changed"].value == 0
    assert 0.2 < found.measures["as it is"].value < found.measures["constant"].value + 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_a_model_that_is_never_right_but_sees_is_not_called_blind(seed):
    def contrary(samples, beginnings):
        texts = seeing(np.random.default_rng(seed), 1.0)(samples, beginnings)
        return [text.replace("<answer> ", "<answer> minus ") for text in texts]
    assert looking(look(contrary, scene_samples(seed=seed), PIXELS, 2)).finding == "not shown"


def silent(samples, beginnings):
    return [""] * len(samples)


def test_a_model_that_never_answers_is_not_judged():
    assert looking(look(silent, scene_samples(), PIXELS, 2)).finding == "not measured"
    unanswered = {"right": [0] * 50, "answer": [""] * 50}
    thoughts = dict.fromkeys(("own", "removed", "replaced", "cut"), unanswered) | {"donor": ["1"] * 50}
    assert thinking(thoughts).finding == "not measured"


def test_an_answer_that_falls_silent_has_changed_and_two_empty_ones_are_none():
    looks = look(blind, scene_samples(), PIXELS, 2)
    answers = looks["shuffled"]["answer"]
    looks["shuffled"]["answer"] = ["2"] + answers[1:100] + [""] * 100
    assert looking(looks).measures["changed"].n == 200 and looking(looks).measures["changed"].value == 0.505
    looks["as it is"]["answer"] = answers[:100] + [""] * 100
    assert looking(looks).measures["changed"].n == 100 and looking(looks).measures["changed"].value == 0.01
    looks["as it is"]["answer"] = looks["shuffled"]["answer"] = answers[:9] + [""] * 191
    assert looking(looks).finding == "not measured"


def test_a_model_that_is_never_right_and_silent_with_another_picture_is_not_called_blind():
    looks = look(blind, scene_samples(), PIXELS, 2)
    for name in ("as it is", "blanked", "shuffled", "masked"):
        looks[name]["right"] = [0] * 200
    assert looking(looks).finding == "does not look"
    looks["shuffled"]["answer"] = [""] * 200
    assert looking(looks).finding == "not shown"


def test_a_model_that_is_right_only_with_its_picture_looks_even_if_it_says_nothing_without():
    samples = scene_samples()
    looks = look(seeing(np.random.default_rng(0)), samples, PIXELS, 2)
    for name in ("blanked", "shuffled"):
        looks[name] = {"right": [0] * len(samples), "answer": [""] * len(samples)}
    found = looking(looks)
    assert found.finding == "looks" and "{" not in found.sentence("rl", "", "id")


def reading(rng, slips=0.03):
    """A model whose answer is the last word of its thought."""
    def complete(samples, beginnings):
        texts = []
        for sample, beginning in zip(samples, beginnings):
            if not beginning:
                answer = sample.answer if rng.random() > slips else "9"
                texts.append(target_text(answer, f"so it is {answer}"))
                continue
            thought = beginning.removeprefix("<think>").removesuffix("</think><answer>").split()
            texts.append(f"{beginning} {thought[-1] if thought else 'none'}</answer>")
        return texts
    return complete


def decorated(rng, slips=0.05):
    """A model that knows its answer whatever it thought."""
    def complete(samples, beginnings):
        texts = []
        for sample, beginning in zip(samples, beginnings):
            known = sample.answer if int(sample.id) % 20 > 20 * slips - 1 else "9"
            texts.append(f"{beginning} {known}</answer>" if beginning else target_text(known, "let me see"))
        return texts
    return complete


def thoughts_of(complete, samples):
    return think(complete, samples, complete(samples, [""] * len(samples)))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_decorative_thought_is_told_from_one_that_matters(seed):
    rng = np.random.default_rng(seed)
    samples = scene_samples(seed=seed)
    read = thinking(thoughts_of(reading(rng), samples))
    assert read.finding == "matters" and read.measures["follows"].value == 1.0
    told = thinking(thoughts_of(decorated(rng), samples))
    assert told.finding == "decorative" and told.measures["changed"].value == 0.0
    assert thinking(thoughts_of(reading(rng), samples[:25])).finding == "matters"
    few = thoughts_of(decorated(rng), samples[:25])
    assert thinking(few).finding == "not shown"             # nothing changed, of too few to say so


def test_thoughts_end_in_the_answer_or_do_not():
    raw = {"right": [[1, 0]] * 12, "agrees": [[1, 0]] * 12}
    found = thinking(thoughts_of(decorated(np.random.default_rng(0)), scene_samples(40)), raw).measures
    assert found["thought ends in the answer"].value == 0.5
    assert found["right, where it does less where it does not"].value == 1.0


# ---------------------------------------------------------------- what is taken away

def test_a_shuffled_picture_is_never_ones_own_nor_one_like_it():
    a, b, c = (np.full((2, 2, 3), value, np.uint8) for value in (1, 2, 3))
    assert other_pictures([[a], [b], [a], [c]]) == [3, 3, 1, 1]         # from half way round
    assert other_pictures([[a], [a]]) == [None, None]
    assert other_pictures([[a], [a, b]]) == [None, None]                # not as many
    assert look(blind, [Sample(images=(a,), answer="1")] * 3, dict(PIXELS, image_size=2), 1) == {}


def test_every_second_patch_is_covered_as_on_a_chessboard():
    grey = np.array([9, 9, 9], np.uint8)
    found = masked(np.zeros((4, 4, 3), np.uint8), grey, 2)[..., 0]
    assert found.tolist() == [[0, 0, 9, 9], [0, 0, 9, 9], [9, 9, 0, 0], [9, 9, 0, 0]]


def test_the_pictures_that_a_model_is_shown():
    seen = []

    def complete(samples, beginnings):
        assert beginnings == ["", ""]
        seen.append([sample.images[0][0, 0, 0] for sample in samples])
        return ["<answer> 1</answer>"] * 2
    pictures = [np.full((2, 2, 3), value, np.uint8) for value in (10, 20)]
    samples = [Sample(images=(picture,), answer=str(n), source="a/b") for n, picture in enumerate(pictures)]
    found = look(complete, samples, dict(PIXELS, image_size=2), 1)
    assert seen == [[10, 20], [128, 128], [20, 10], [10, 20]]
    assert found["gold"] == ["0", "1"] and found["kind"] == ["b", "b"] and found["masked"]["right"] == [0, 1]


def test_another_thought_led_to_another_answer_of_the_same_kind_where_there_is_one():
    assert other_thoughts(["a", "b", "a", "a"], ["1", "2", "1", "3"]) == [3, 2, 3, 0]
    assert first_half("one two three") == "one" and first_half("one") == ""


def test_the_beginnings_that_a_model_is_given():
    given = {}

    def complete(samples, beginnings):
        given[len(given)] = beginnings
        return [f"{beginning} 1</answer>" for beginning in beginnings]
    samples = [Sample(answer=str(n), source="a/b") for n in (1, 2)]
    texts = [target_text("1", "a1 one two"), target_text("2", "b2 x")]
    found = think(complete, samples, texts)
    assert given[0] == ["<think> a1 one two</think><answer>", "<think> b2 x</think><answer>"]
    assert given[1] == ["<think></think><answer>"] * 2
    assert given[2] == given[0][::-1]
    assert given[3] == ["<think> a1</think><answer>", "<think> b2</think><answer>"]
    assert found["donor"] == ["2", "1"] and found["own"]["right"] == [1, 0]
    assert think(complete, samples, ["<answer> 1</answer>"] * 2) == {}          # no thought
    assert think(complete, samples, [texts[0]] * 2) == {}                       # one answer
    assert think(complete, samples, ["<SUMMARY> a</SUMMARY><CAPTION> b</CAPTION><REASONING> c</REASONING><CONCLUSION> "
                                     f"{n}</CONCLUSION>" for n in (1, 2)]) == {}


def test_samples_without_pictures_are_not_looked_at(monkeypatch):
    monkeypatch.setattr(interventions, "begun", lambda sampler, tok, samples, beginnings, *asked: [""] * len(samples))

    sampler = SimpleNamespace(vlm=SimpleNamespace(config=None))
    asking = SimpleNamespace(tokenizer=None, method="", template="", max_new=1)
    assert interventions.intervene(sampler, asking, [Sample(answer="1")] * 3) == {"looking": {}, "thinking": {}}
    assert looking({}).finding == thinking({}).finding == looking(None).finding == "not measured"


# ---------------------------------------------------------------- words of reflection

@pytest.mark.parametrize("seed", SEEDS)
def test_words_that_stand_where_questions_are_hard_are_not_taken_for_harm(seed):
    rng = np.random.default_rng(seed)
    chances = rng.permutation(np.resize([0.9, 0.1], N))
    says = rng.random((N, G)) < np.where(chances > 0.5, 0.1, 0.7)[:, None]      # mostly where it is mostly wrong
    raw = drawn(rng, chances)
    assert np.array(raw["right"])[says].mean() < 0.5 < np.array(raw["right"])[~says].mean()
    raw["reflects"] = says.astype(int).tolist()
    assert abs(reflection(raw).measures["difference"].value) < 0.08
    raw["right"] = (rng.random((N, G)) < np.where(says, 0.8, 0.4)).astype(int).tolist()
    assert reflection(raw).finding == "more often right"
    raw["right"] = (rng.random((N, G)) < np.where(says, 0.3, 0.6)).astype(int).tolist()
    assert reflection(raw).finding == "less often right"
    raw["reflects"] = np.zeros((N, G), int).tolist()
    assert reflection(raw).finding == "absent"


def test_the_effect_within_prompts_by_hand():
    chosen = np.array([[1, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 0]], dtype=bool)
    right = np.array([[1, 0, 1], [1, 1, 1], [0, 0, 0], [1, 0, 1]])
    assert within_prompts(chosen, right).tolist() == [0.5, -0.5]
    few = reflection({"right": right, "reflects": chosen})
    assert few.finding == "not shown" and few.measures["difference"].low is None


def test_a_word_of_reflection_is_a_whole_word():
    assert reflects("Wait, a2") and reflects("I check .") and not reflects("waiter") and not reflects("")


# ---------------------------------------------------------------- all of them

def run_of(seed):
    rng = np.random.default_rng(seed)
    chances = spread(rng)
    raw = drawn(rng, np.where(chances == 0.0, 0.7, chances))
    raw["reflects"] = raw["agrees"] = raw["right"]
    return {split: {"t1": dict(raw), "greedy": {}} for split in ("crowded", "id")}, {
        split: {"t1": drawn(rng, chances)} for split in ("crowded", "id")}


def test_every_question_is_answered_on_every_split_and_is_written_as_json():
    main, start = run_of(0)
    samples = scene_samples()
    probed = {"rl": {"looking": look(blind, samples, PIXELS, 2),
                     "thinking": thoughts_of(reading(np.random.default_rng(0)), samples)}}
    found = verdicts({"cot": start, "rl": main}, "cot", "rl", probed, seed=3)
    assert json.loads(json.dumps(found)) == found
    told = {(row["split"], row["question"]): row["finding"] for row in found}
    assert told == {
        ("id", "sharpening"): "capability", ("id", "form"): "more than form", ("id", "looking"): "does not look",
        ("id", "thinking"): "matters", ("id", "reflection"): "more often right",
        ("crowded", "sharpening"): "capability", ("crowded", "form"): "more than form",
        ("crowded", "reflection"): "more often right"}
    text = verdicts_text(found)
    assert "sharpening: capability. On id, T = 1, rl solves prompts that cot does not" in text
    assert "looking: does not look. On id, greedy, no dependence of rl on the picture" in text
    assert text.endswith("form on the other splits: crowded more than form")
    assert over_seeds_text([]) == verdicts_text([]) == ""
    less = [dict(row, measures={"all": dict(value=value, low=0, high=1, n=9, is_difference=True)})
            for row, value in zip(3 * [found[4]], (0.1, 0.2, 0.3))]
    assert found[4]["question"] == "form"
    # A t-interval of three: 20 points, give or take 4.303 times 10 points over the root of 3.
    assert over_seeds_text(less).splitlines()[1] == ("  form, id: more than form 3. rl less cot: accuracy +20.0 [-4.8, "
                                                     "+44.8]")
    less[1]["measures"]["all"]["n"] = 0         # nothing to compare with that seed: no 0 in the mean
    assert "accuracy +20.0 of 2 of 3 seeds" in over_seeds_text(less)
    assert "form, crowded: more than form 2" in over_seeds_text(found + found)


def test_without_a_start_what_needs_one_is_left_out():
    main, _ = run_of(0)
    found = verdicts({"rl": main}, "", "rl", {})
    assert {row["question"] for row in found} == {"looking", "thinking", "reflection"}
    text = verdicts_text(found)
    assert text.startswith("What answers of rl depend on, split id, by fixed rules") and "gain" not in text
    assert over_seeds_text(found).startswith("What answers of rl depend on, by how many seeds")
    assert verdicts({"cot": main}, "", "rl", {}) == []
    assert start_of(["before", "cot", "rl"], "rl") == "cot" and start_of(["base", "cot"], "cot") == "base"
    assert start_of(["rl"], "rl") == ""


@pytest.mark.parametrize("question, finding", report.SENTENCES)
def test_every_template_is_filled_from_its_measures_and_names_no_cause(question, finding):
    main, start = run_of(0)
    samples = scene_samples(40)
    found = {"sharpening": sharpening(start["id"]["t1"], main["id"]["t1"]), "form": form(
        start["id"]["t1"], main["id"]["t1"]), "looking": looking(look(blind, samples, PIXELS, 2)),
        "thinking": thinking(thoughts_of(reading(np.random.default_rng(0)), samples)),
        "reflection": reflection(main["id"]["t1"])}[question]
    sentence = report.Verdict(question, finding, found.measures, found.numbers).sentence("rl", "cot", "id")
    assert sentence.startswith("On id ") and "{" not in sentence
    for word in ("because", "cause", "due to", "leads", "teaches", "improves", "makes"):
        assert word not in sentence


def test_a_difference_of_few_prompts_has_no_interval():
    assert difference([]).n == 0 and difference([1.0] * 9).low is None and difference([1.0] * 10).low > 0
