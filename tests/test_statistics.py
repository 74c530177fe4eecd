"""From scores to rows, intervals, the result in three lines, and tables, by hand."""
import math

import numpy as np
import pytest

from rl.report.inference import bootstrap, minimum_detectable
from rl.report.statistics import (by_kind, decoding_name, decoding_title, differences, interval, main_decoding,
                                  main_split, majority_right, over_seeds, per_prompt, result_lines, rows, seeds_table,
                                  table, training_rows, training_table)


OVER_PROMPTS = "[95 % interval over prompts]"


def scored(right, answer=None, gold="two", **more):
    """Raw scores of a decoding with `right` (n, G); answers follow from it unless given."""
    answer = answer or [[gold if r else "one" for r in group] for group in right]
    n = len(right)
    return dict(dict(right=right, format=right, length=[[4] * len(group) for group in right], answer=answer,
                     gold=[gold] * n, aliases=[[]] * n, kind=["at"] * n, text=[""] * n), **more)


# ---------------------------------------------------------------- intervals

def test_wilsons_interval_by_hand():
    # 8 of 10: (0.8 + 3.8416/20) / (1 + 0.38416) = 0.71674; 1.96/1.38416 * sqrt(0.016 + 0.009604) = 0.22658
    assert interval([1] * 8 + [0] * 2) == pytest.approx((0.8, 0.4901568, 0.9433191), abs=1e-6)


def test_wilsons_interval_of_no_success_and_of_all():
    # z^2 / (n + z^2) = 3.8416 / 13.8416
    assert interval([0.0] * 10) == pytest.approx((0.0, 0.0, 0.2775402), abs=1e-6)
    assert interval([1.0] * 10) == pytest.approx((1.0, 0.7224598, 1.0), abs=1e-6)


def test_the_interval_of_means_over_completions_is_over_prompts():
    # Wilson's of a half of 4 prompts, not of 8 or more completions: 1.96 / (2 sqrt(4 + 3.8416))
    assert interval([0.0, 0.5, 1.0, 0.5]) == pytest.approx((0.5, 0.150036, 0.849964), abs=1e-6)
    # Each of two hundred prompts is one value, not eight: as many completions of a prompt as there may be.
    many = np.linspace(0, 1, 200)
    assert interval(many) == bootstrap(many)


def test_one_value_that_is_not_0_or_1_has_no_interval():
    assert interval([0.5]) == (0.5, -math.inf, math.inf)


def test_a_paired_difference_by_hand():
    # Prompt by prompt 1 - 0, 0.5 - 0.5, 0 - 1, 1 - 1: 1/4 above 0 and 1/4 below, correlation -1/3. Wilson's limits of 1
    # in 4 are 0.045587 and 0.699363, at distances a = 0.204413 and b = 0.449363: sqrt(a^2 + 2/3 a b + b^2) = 0.552223.
    a, b = scored([[1, 1], [1, 0], [0, 0], [1, 1]]), scored([[0, 0], [0, 1], [1, 1], [1, 1]])
    [row] = differences({"cot": {"id": {"t1": a}}, "grpo": {"id": {"t1": b}}}, "grpo")
    assert (row["method"], row["split"], row["decoding"], row["metric"], row["n"]) == (
        "cot", "id", "t1", "accuracy - grpo", 4)
    assert (row["value"], row["low"], row["high"]) == pytest.approx((0.0, -0.552223, 0.552223), abs=1e-5)


def test_arms_that_agree_on_every_prompt_may_still_differ_on_others():
    right = [[n % 2] for n in range(200)]
    [row] = differences({"cot": {"id": {"greedy": scored(right)}}, "grpo": {"id": {"greedy": scored(right)}}}, "grpo")
    # Wilson's upper limit of none of 200, 3.8416 / 203.8416, to either side
    assert (row["value"], row["low"], row["high"]) == pytest.approx((0, -0.018846, 0.018846), abs=1e-6)


def test_a_paired_difference_is_narrower_than_two_intervals_when_methods_agree():
    right = [[n % 2] for n in range(200)]
    other = [[1 - right[0][0]], *right[1:]]
    [row] = differences({"cot": {"id": {"t1": scored(other)}}, "grpo": {"id": {"t1": scored(right)}}}, "grpo")
    _, low, high = interval([group[0] for group in right])
    assert row["value"] == pytest.approx(1 / 200) and row["high"] - row["low"] < (high - low) / 2


def test_a_method_without_its_counterpart_has_no_difference():
    one = scored([[1], [0]])
    assert differences({"cot": {"id": {"t1": one}}}, "grpo") == []
    assert differences({"cot": {"id": {"t1": one}}, "grpo": {"crowded": {"t1": one}}}, "grpo") == []
    assert differences({"teacher": {"id": {"t1": one}}, "grpo": {"id": {"greedy": one}}}, "grpo") == []
    assert differences({"cot": {"id": {"t1": one}}}, "") == []


# ---------------------------------------------------------------- votes and metrics

@pytest.mark.parametrize("answers, right", [
    (["two", "two", "one"], 1), (["one", "one", "two"], 0), (["two", "one"], 1), (["one", "two"], 0),
    (["", "", "", "two"], 1), (["", ""], 0), (["2", "2", "one"], 1), ([], 0)])
def test_the_majority_ignores_empty_answers_takes_aliases_and_gives_ties_to_the_first(answers, right):
    assert majority_right(answers, "two", ["2"]) == right


def test_accuracy_pass_and_majority_of_the_same_completions():
    scores = scored([[1, 1, 0], [0, 0, 1], [0, 0, 0]])
    assert per_prompt(scores, "accuracy").tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert per_prompt(scores, "pass@3").tolist() == [1, 1, 0]
    assert per_prompt(scores, "maj@3").tolist() == [1, 0, 0]


def test_one_completion_has_neither_pass_nor_majority():
    found = rows("cot", "id", {"greedy": scored([[1], [0]])}, seed=3)
    assert [row["metric"] for row in found] == ["accuracy", "format", "length"]
    assert {(row["method"], row["split"], row["decoding"], row["n"], row["seed"]) for row in found} == {
        ("cot", "id", "greedy", 2, 3)}


def test_accuracy_by_question_kind_counts_its_prompts():
    scores = scored([[1, 0], [1, 1], [0, 0]], kind=["at", "walk1", "walk1"])
    assert by_kind(scores) == {"at": (0.5, 1), "walk1": (0.5, 2)}


def test_the_mean_of_classes_counts_each_class_alike():
    # Three pictures of cats, all right, and one of an owl, half right: .875 of completions, but (1 + .5) / 2 by class.
    scores = scored([[1, 1], [1, 1], [1, 1], [1, 0]], kind=["Cat", "Cat", "Cat", "Owl"])
    scores["gold"] = ["cat", "cat", "cat", "owl"]
    found = {row["metric"]: row for row in rows("cot", "val", {"t1": scores}, 0)}
    assert found["accuracy"]["value"] == 0.875
    assert (found["class-averaged accuracy"]["value"], found["class-averaged accuracy"]["n"]) == (0.75, 2)
    text = table(list(found.values()), {"cot": {"val": {"t1": scores}}})
    assert "Class-averaged accuracy, T = 1 (classes)" in text and "0.750 (2)" in text
    assert "Accuracy on val by question kind" in text and "(a constant)" not in text    # of a class its name is right
    assert "class-averaged accuracy" not in {row["metric"] for row in rows("cot", "id", {"t1": scored([[1, 0]])}, 0)}


def test_a_table_of_many_kinds_shows_the_worst_five_a_line_each():
    kinds = [f"class {n:02}" for n in range(31)]
    right = [[int(n >= 3), 1] for n in range(31)]               # of three classes one completion is wrong
    scores = {method: {"val": {"t1": scored(right, kind=kinds)}} for method in ("cot", "ppo")}
    [part] = [part for part in table(rows("cot", "val", scores["cot"]["val"], 0), scores).split("\n\n")
              if "by question kind" in part]
    title, head, *lines = part.splitlines()
    assert title.endswith("the worst 5 of 31; kinds.json has all") and head.split() == ["cot", "ppo"]
    assert [line[:8] for line in lines[:3]] == kinds[:3] and len(lines) == 5
    assert lines[0].split()[2:] == ["0.500", "(1)"] * 2 and max(map(len, part.splitlines()[1:])) < 60


# ---------------------------------------------------------------- tables

def test_the_interval_over_seeds_by_hand():
    # 0.4, 0.5, 0.6: mean 0.5, sd 0.1, t(0.975, 2) = 4.30265: half 4.30265 * 0.1 / sqrt(3)
    values = [dict(method="grpo", split="id", decoding="t1", metric="accuracy", value=v) for v in (0.4, 0.5, 0.6)]
    [row] = over_seeds(values)
    half = 4.30265 * 0.1 / math.sqrt(3)
    assert (row["value"], row["sd"], row["n"]) == pytest.approx((0.5, 0.1, 3))
    assert (row["low"], row["high"]) == pytest.approx((0.5 - half, 0.5 + half))
    assert "0.500 [0.25, 0.75] 0.100" in seeds_table(values)


def test_columns_over_seeds_stand_in_the_order_of_the_fullest_line():
    asked = [("teacher", "leaked"), ("cot", "tokens"), ("cot", "leaked"), ("cot", "TFLOP")]
    values = [dict(method=method, split=column, decoding="t1", metric="costs", value=value) for method, column in asked
              for value in (1.0, 2.0)]
    assert seeds_table(values).splitlines()[1].split() == ["tokens", "leaked", "TFLOP"]


def test_one_seed_has_no_interval():
    [row] = over_seeds([dict(method="grpo", split="id", decoding="t1", metric="accuracy", value=0.4)])
    assert (row["value"], row["low"], row["high"], row["n"]) == (0.4, -math.inf, math.inf, 1)


@pytest.mark.parametrize("n", range(2, 26))
def test_the_interval_over_seeds_is_students_for_any_number_of_them(n):
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262, 11: 2.228,
         12: 2.201, 13: 2.179, 14: 2.160, 15: 2.145, 16: 2.131, 17: 2.120, 18: 2.110, 19: 2.101, 20: 2.093, 21: 2.086,
         22: 2.080, 23: 2.074, 24: 2.069, 25: 2.064}[n]
    values = [float(seed % 2) for seed in range(n)]
    [row] = over_seeds([dict(method="m", split="id", decoding="t1", metric="accuracy", value=v) for v in values])
    assert row["high"] - row["value"] == pytest.approx(t * np.std(values, ddof=1) / math.sqrt(n), rel=1e-3)


def test_the_table_prints_every_split_and_metric_and_the_methods_that_have_them():
    teacher = {"t1": {name: value for name, value in scored([[1], [0]]).items()
                      if name in ("right", "text", "kind")}}
    methods = ("cot", "cot_continued", "filtered", "grpo", "rejection", "sft_direct", "perfect", "ppo_zero", "mine")
    scores = {"teacher": {split: teacher for split in ("id", "crowded")}}
    scores |= {method: {split: dict(greedy=scored([[1], [0]]), t1=scored([[1, 0], [1, 1]], kind=["at", "count"]))
                        for split in ("id", "crowded")} for method in methods}
    text = table([row for method, of in scores.items() for split, raw in of.items()
                  for row in rows(method, split, raw, 0)], scores, "grpo")
    for title in ("Accuracy, greedy", "Accuracy, T = 1", "Paired difference to grpo in points, T = 1", "pass@2, T = 1",
                  "maj@2, T = 1", "format, T = 1", "length, T = 1", "Accuracy on id by question kind"):
        [part] = [part for part in text.split("\n\n") if part.startswith(title)]
        names = [line.split()[0] for line in part.splitlines()[2:]
                 if not line.startswith(("(a constant)", "One constant answer"))]
        shown = [method for method in methods if "difference" not in title or method != "grpo"]
        if title.startswith(("Accuracy, T", "Paired", "Accuracy on")):
            shown.insert(0, "teacher")          # judged as one sampled completion, without a form or a length
        assert names == shown, title
    [accuracy] = [part for part in text.split("\n\n") if part.startswith("Accuracy, T = 1")]
    assert accuracy.splitlines()[1].split() == ["id", "crowded"]
    # Wilson's of .75 of 2 prompts: (.75 + 3.8416/4) / 2.9208 = .5856; 1.96/2.9208 sqrt(.1875/2 + 3.8416/16) = .3878
    assert "0.750 [0.20, 0.97]" in accuracy


def test_a_table_of_differences_corrects_for_all_its_cells():
    # Of three seeds t = 2 sqrt(3), p = 1 - sqrt(12 / 14) = .0742; of four cells, two of them without a test, .297 both.
    values = {("cot", "id"): (0.01, 0.02, 0.03), ("cot", "far"): (-0.01, -0.02, -0.03), ("ppo", "id"): (0.5,),
              ("ppo", "far"): (0.4, 0.4, 0.4)}
    found = [dict(method=method, split=split, decoding="t1", metric="accuracy - grpo", value=value)
             for (method, split), of_seeds in values.items() for value in of_seeds]
    title, _, cot, ppo, note, untested = seeds_table(found).splitlines()
    assert "over these 4 comparisons" in title and "mean over 3 seeds" in title
    assert cot.split() == ["cot", "+2.0", "[-0.5,", "+4.5]", "0.297", "-2.0", "[-4.5,", "+0.5]", "0.297"]
    assert "before the correction from 3.3 points on in half of those tested, from 3.3 in all" in note   # 3.26 sd: t, 2
    smallest = 100 * minimum_detectable(0.01, 3, 0.05 / 4)
    assert smallest > 6 and f"of all 4 from {smallest:.1f} on in half, from {smallest:.1f} in all" in note
    assert ppo.split() == ["ppo", "+50.0", "+40.0"] and untested.startswith("Without an interval: 2, ")


def test_differences_that_are_equal_with_every_seed_are_not_shown():
    equal = [dict(method="cot", split="id", decoding="t1", metric="accuracy - grpo", value=0.4) for _ in range(3)]
    [over] = over_seeds(equal)
    assert (over["value"], over["low"], over["high"]) == (pytest.approx(0.4), -math.inf, math.inf)
    found = [row("cot", "id", 0.9, 0.8, 1.0), row("grpo", "id", 0.5, 0.4, 0.6)]
    assert "a difference is not shown: cot minus grpo" in result_lines(found, [over], "grpo", over="seeds")[1]


def test_a_star_stands_where_the_corrected_p_is_below_a_twentieth():
    found = [dict(method=method, split="id", decoding="t1", metric="accuracy - grpo", value=value)
             for method, of_seeds in (("cot", (0.10, 0.11, 0.12)), ("ppo", (0.01, 0.03, -0.02))) for value in of_seeds]
    _, _, cot, ppo, _ = seeds_table(found).splitlines()
    assert cot.endswith(" *") and not ppo.endswith("*")


def test_another_point_of_an_arm_is_not_the_best_other_method():
    found = [row("grpo", "id", 0.9, 0.8, 1.0), row("filtered", "id", 0.7, 0.6, 0.8),
             row("filtered@best", "id", 0.8, 0.7, 0.9)]
    assert result_lines(found, [], "grpo")[1].startswith("Best other method on id: filtered with 0.700")


def test_training_rows_by_hand():
    log = [dict(stage="cot", step=0, loss=1.0)]
    log += [{"stage": "rl", "method": "grpo", "step": n, "reward": 1.0, "reward/correctness": n / 4,
              "reward/format": 1.0, "samples": 8 * (n + 1), "seconds": 9.0, "seconds_decode": 1.0,
              "seconds_update": float(n), "updates": 4 * n,
              **(dict(clip_low=0.1, clip_high=0.3, entropy=0.5) if n else {})}
            for n in range(3)]
    found = training_rows(log, 7, last=2)
    assert {row["split"]: row["value"] for row in found} == pytest.approx({
        "1000 samples": 0.024, "updates": 12, "s/step": 2.0, "clipped, %": 40, "right": 0.375, "format": 1,
        "entropy": 0.5})
    assert all(row["method"] == "grpo" and row["seed"] == 7 for row in found)
    assert training_table(found).splitlines()[2].split() == ["grpo", "0.024", "12.000", "2.000", "40.000", "0.375",
                                                                      "1.000", "0.500"]
    assert training_table([]) == "" == training_table(training_rows(log[:1], 0))
    unclipped = [{**line, "method": "sapo"} for line in log[1:]]
    for line in unclipped:
        line.pop("clip_low", None)
    text = training_table(training_rows(log + unclipped, 7, last=2))
    assert "40.000" in text and text.splitlines()[3].split() == ["sapo", "0.024", "12.000", "2.000", "0.375", "1.000",
                                                                 "0.500"]


# ---------------------------------------------------------------- decodings and splits

@pytest.mark.parametrize("settings, name, title", [
    ((0.0, 1.0, 0), "greedy", "greedy"), ((0.0, 0.9, 50), "greedy", "greedy"), ((1.0, 1.0, 0), "t1", "T = 1"),
    ((0.7, 1.0, 0), "t0.7", "T = 0.7"), ((1.0, 0.9, 50), "t1-p0.9-k50", "T = 1, top-p 0.9, top-k 50"),
    ((2, 1, 5), "t2-k5", "T = 2, top-k 5"), ((1e-7, 1e-7, 0), "t1e-07-p1e-07", "T = 1e-07, top-p 1e-07"),
    ((0.7000001, 1.0, 0), "t0.7000001", "T = 0.7000001")])
def test_a_decoding_is_named_by_its_settings_and_titled_by_its_name(settings, name, title):
    assert decoding_name(*settings) == name and decoding_title(name) == title


def test_what_is_no_decoding_is_its_own_title():
    assert decoding_title("training") == "training" and decoding_title("teacher") == "teacher"


def test_tables_follow_from_the_decodings_that_were_sampled():
    scores = {"cot": {"far": {"t0.7-p0.9": scored([[1, 0], [1, 1]]), "greedy": scored([[1], [0]])}}}
    text = table(rows("cot", "far", scores["cot"]["far"], 0), scores)
    titles = [part.splitlines()[0] for part in text.split("\n\n")]
    words = "T = 0.7, top-p 0.9"
    assert titles == [f"Accuracy, greedy {OVER_PROMPTS}", f"Accuracy, {words} {OVER_PROMPTS}",
                      f"maj@2, {words} {OVER_PROMPTS}", f"pass@2, {words} {OVER_PROMPTS}",
                      f"format, {words} {OVER_PROMPTS}", f"length, {words}",
                      f"pass@k and Cover@tau on far, {words} {OVER_PROMPTS}"]


def test_accuracies_stand_over_what_one_constant_answer_earns():
    # Of one kind of question there is no table by kind, and skewed answers are most to be feared there.
    scores = {"cot": {}}
    for split, gold in (("id", ["two", "two", "two", "one"]), ("far", ["six", "two", "one", "five"])):
        scores["cot"][split] = {"t1": dict(scored([[1, 0]] * 4), gold=gold)}
    text = table([row for split, raw in scores["cot"].items() for row in rows("cot", split, raw, 0)], scores)
    accuracy, *_ = text.split("\n\n")
    assert accuracy.splitlines()[-1] == ("One constant answer to all prompts would be right on: id 0.750 (two), "
                                         "far 0.250 (five)")
    # A method that was asked the first prompts alone does not decide it.
    first = dict(few={"far": {"t1": dict(scored([[1, 0]]), gold=["six"])}}, **scores)
    assert "far 0.250 (five)" in table(rows("cot", "far", scores["cot"]["far"], 0), first)


def test_the_first_sampled_decoding_is_the_main_one():
    assert main_decoding([dict(decoding="greedy"), dict(decoding="t0.7"), dict(decoding="t2")]) == "t0.7"
    assert main_decoding([dict(decoding="greedy")]) == "greedy" and main_decoding([]) == "t1"


def test_the_main_split_is_like_training():
    assert [main_split(splits) for splits in (["far", "id"], ["far", "val"], ["far", "near"])] == ["id", "val", "far"]


# ---------------------------------------------------------------- the result in three lines

def row(method, split, value, low, high, metric="accuracy", n=200, decoding="t1"):
    return dict(method=method, split=split, decoding=decoding, metric=metric, value=value, low=low, high=high, n=n)


def difference(method, split, value, low, high, to="grpo"):
    return row(method, split, value, low, high, f"accuracy - {to}")


SPLITS = ("id", "crowded", "pairs", "walk3", "walk4")
ROWS = [row("teacher", split, 0.6, 0.5, 0.7) for split in SPLITS]
ROWS += [row("cot", split, 0.607, 0.551, 0.661) for split in SPLITS]
ROWS += [row("grpo", "id", 0.98, 0.97, 0.99, decoding="greedy")]
ROWS += [row("grpo", split, 0.934, 0.91, 0.96) for split in SPLITS]
ROWS += [row("filtered", split, 0.866, 0.84, 0.9) for split in SPLITS]
DIFFERENCES = [difference("cot", split, -0.4, -0.5, -0.3) for split in SPLITS]
DIFFERENCES += [difference("filtered", "id", -0.068, -0.091, -0.043),
                difference("filtered", "crowded", 0.04, 0.01, 0.07),
                difference("filtered", "pairs", 0.0, -0.12, 0.12),
                difference("filtered", "walk3", -0.1, -0.2, -0.01),
                difference("filtered", "walk4", 0.02, 0.0, 0.04)]


def test_the_result_of_the_main_job_in_three_lines():
    assert result_lines(ROWS, DIFFERENCES, "grpo") == [
        "Result on id, T = 1 [95 % interval over 200 prompts]: grpo is right on 0.934 [0.91, 0.96]; cot, imitation "
        "alone, on 0.607 [0.55, 0.66].",
        "Best other method on id: filtered with 0.866 [0.84, 0.90]; filtered minus grpo, paired by prompt, -6.8 points "
        "[-9.1, -4.3].",
        "On the other splits filtered minus grpo is above 0 on 1 (crowded), below 0 on 1 (walk3), not shown on 2 "
        "(pairs, walk4)."]


def test_a_difference_whose_interval_includes_0_is_not_shown():
    differences = [difference("filtered", "id", -0.01, -0.04, 0.02)]
    first, second, third = result_lines(ROWS, differences, "grpo")
    assert second == ("Best other method on id: filtered with 0.866 [0.84, 0.90]; a difference is not shown: filtered "
                      "minus grpo, paired by prompt, -1.0 points [-4.0, +2.0], an interval that includes 0.")
    # Without differences on the other splits the main method's accuracies there.
    assert third == ("On the other splits grpo is right on: crowded 0.934 [0.91, 0.96], pairs 0.934 [0.91, 0.96], "
                     "walk3 0.934 [0.91, 0.96], walk4 0.934 [0.91, 0.96].")


def test_differences_to_another_method_or_of_another_decoding_are_passed_over():
    other = [difference("filtered", "id", -0.07, -0.09, -0.04, to="ppo"),
             dict(difference("filtered", "id", -0.07, -0.09, -0.04), decoding="greedy")]
    assert result_lines(ROWS, other, "grpo")[1].endswith("[0.84, 0.90]; no paired difference was computed.")


def test_the_result_of_real_data_is_about_val_and_about_form_and_length():
    rows = [row("ppo", "val", 0.5, 0.4, 0.6), row("ppo", "val", 0.99, 0.98, 1.0, "format"),
            row("ppo", "val", 12.34, 11.0, 13.0, "length"),
            row("ppo", "val", 0.4, None, None, "class-averaged accuracy")]
    assert result_lines(rows, [], "ppo") == [
        "Result on val, T = 1 [95 % interval over 200 prompts]: ppo is right on 0.500 [0.40, 0.60].",
        "No other method was evaluated.",
        "ppo keeps the form in 0.990 [0.98, 1.00], with 12.3 tokens a completion."]


def test_the_result_without_reinforcement_learning_is_about_the_last_method():
    rows = [row("teacher", "val", 0.6, 0.5, 0.7), row("cot", "val", 0.4, 0.3, 0.5)]
    assert result_lines(rows, [], "") == [
        "Result on val, T = 1 [95 % interval over 200 prompts]: cot is right on 0.400 [0.30, 0.50].",
        "Best other method on val: teacher with 0.600 [0.50, 0.70]; no paired difference was computed.",
        "Form and length were not measured."]


def test_the_result_on_splits_with_names_of_their_own():
    rows = [row(method, split, 0.5, 0.4, 0.6, decoding="t0.7") for method in ("grpo", "ppo")
            for split in ("near", "night", "fog")]
    differences = [dict(difference("ppo", split, 0.1, 0.05, 0.15), decoding="t0.7") for split in ("near", "fog")]
    first, second, third = result_lines(rows, differences, "grpo")
    assert first.startswith("Result on near, T = 0.7 [95 %") and "+10.0 points [+5.0, +15.0]." in second
    assert third == ("On the other splits ppo minus grpo is above 0 on 1 (fog), below 0 on 0, not shown on 1 (night).")


@pytest.mark.parametrize("low, high", [(None, None), (-math.inf, math.inf)])
def test_a_result_from_one_prompt_has_no_interval(low, high):
    rows = [row(method, "id", 1.0, low, high, n=1) for method in ("ppo", "grpo")]
    first, second, _ = result_lines(rows, [difference("ppo", "id", 0.0, low, high)], "grpo")
    assert first == "Result on id, T = 1 [95 % interval over 1 prompt]: grpo is right on 1.000."
    assert second == ("Best other method on id: ppo with 1.000; a difference is not shown: ppo minus grpo, paired by "
                      "prompt, +0.0 points, without an interval.")


def test_the_result_of_real_scores_agrees_with_rows_and_differences():
    scores = {"cot": {"id": {"t1": scored([[0, 0], [0, 0], [1, 0]])}},
              "grpo": {"id": {"t1": scored([[1, 1], [1, 1], [1, 0]])}}}
    found = [line for method in scores for line in rows(method, "id", scores[method]["id"], 0)]
    first, second, third = result_lines(found, differences(scores, "grpo"), "grpo")
    # Wilson's of 1/6 of 3 prompts: (.1667 + 3.8416/6) / 2.2805 = .3538; 1.96/2.2805 sqrt(.1389/3 + 3.8416/36) = .3362
    assert "grpo is right on 0.833 [0.31, 0.98]; cot, imitation alone, on 0.167 [0.02, 0.69]." in first
    # 2 of 3 lost, .2077 to .9385, and none won, at most .5615: up to -.6667 + sqrt(.4590^2 + .5615^2)
    assert "-66.7 points [-93.9, +5.9], an interval that includes 0." in second and "cot keeps the form in" in third


def test_a_result_of_nothing_is_three_lines_too():
    assert len(result_lines([], [], "grpo")) == 3 and all(result_lines([], [], "grpo"))
