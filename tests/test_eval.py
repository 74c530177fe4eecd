"""From scores to rows, intervals and tables, by hand; and eval.py from a checkpoint to its table and its answers."""
import json
import math

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
import train
from rl.report import page
from rl.report.statistics import (by_kind, differences, interval, majority_right, over_seeds, per_prompt, rows,
                           seeds_table, table, training_rows, training_table)


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
    # 0, 0.5, 1, 0.5: mean 0.5, sd sqrt(0.5 / 3) = 0.408248, half 1.96 * 0.408248 / 2 = 0.400083
    assert interval([0.0, 0.5, 1.0, 0.5]) == pytest.approx((0.5, 0.0999167, 0.9000833), abs=1e-6)


def test_one_value_that_is_not_0_or_1_has_no_interval():
    assert interval([0.5]) == (0.5, -math.inf, math.inf)


def test_a_paired_difference_by_hand():
    # Prompt by prompt 1 - 0, 0.5 - 0.5, 0 - 0.5, 1 - 0.5: mean 0.25, sd sqrt((0.5625 + 0.0625 + 0.5625 + 0.0625) / 3).
    a, b = scored([[1, 1], [1, 0], [0, 0], [1, 1]]), scored([[0, 0], [0, 1], [1, 0], [1, 0]])
    [row] = differences({"cot": {"id": {"t1": a}}, "grpo": {"id": {"t1": b}}}, "grpo")
    half = 1.96 * math.sqrt(1.25 / 3) / 2
    assert (row["method"], row["split"], row["decoding"], row["metric"], row["n"]) == (
        "cot", "id", "t1", "accuracy - grpo", 4)
    assert (row["value"], row["low"], row["high"]) == pytest.approx((0.25, 0.25 - half, 0.25 + half))


def test_a_paired_difference_is_narrower_than_two_intervals_when_methods_agree():
    right = [[n % 2] for n in range(40)]
    other = [[1 - right[0][0]], *right[1:]]
    [row] = differences({"cot": {"id": {"t1": scored(other)}}, "grpo": {"id": {"t1": scored(right)}}}, "grpo")
    _, low, high = interval([group[0] for group in right])
    assert row["value"] == pytest.approx(1 / 40) and row["high"] - row["low"] < (high - low) / 2


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
    assert "class-averaged accuracy" not in {row["metric"] for row in rows("cot", "id", {"t1": scored([[1, 0]])}, 0)}


def test_the_commonest_answer_is_judged_by_the_checker_on_the_whole_split():
    # Five prompts: 1 and 1.0 are one answer, and so is 1.2 within its tolerance; 2 is right for two of them.
    golds = [("1", 0), ("2", 0), ("1.0", 0), ("2", 0), ("1.2", 0.5)]
    samples = [evaluation.Sample(question="?", answer=gold, tolerance=tolerance) for gold, tolerance in golds]
    assert evaluation.commonest_answer(samples) == ("1", 0.6)
    assert "always answering '1', the commonest answer of val, is right with 0.600\n" == (
        evaluation.without_looking("val", samples, drawn=False))


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
    # 0.4, 0.5, 0.6: mean 0.5, sd 0.1, t(0.975, 2) = 4.303: half 4.303 * 0.1 / sqrt(3)
    values = [dict(method="grpo", split="id", decoding="t1", metric="accuracy", value=v) for v in (0.4, 0.5, 0.6)]
    [row] = over_seeds(values)
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (row["value"], row["sd"], row["n"]) == pytest.approx((0.5, 0.1, 3))
    assert (row["low"], row["high"]) == pytest.approx((0.5 - half, 0.5 + half))
    assert "0.500 [0.25, 0.75] 0.100" in seeds_table(values)


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


def test_the_table_prints_every_method_split_and_metric():
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
        names = [line.split()[0] for line in part.splitlines()[2:]]
        assert names == ["teacher", *(m for m in methods if "difference" not in title or m != "grpo")], title
    [accuracy] = [part for part in text.split("\n\n") if part.startswith("Accuracy, T = 1")]
    assert accuracy.splitlines()[1].split() == ["id", "crowded"]
    assert "0.750 [0.26, 1.00]" in accuracy         # 0.75 -+ 1.96 * 0.353553 / sqrt(2), but no share is above 1


# ---------------------------------------------------------------- eval.py

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of clip, align and cot, a step each."""
    out = tmp_path_factory.mktemp("eval") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "curves", lambda *_: b"none")
        train.main(["--preset=tiny", "--patch=24", "--clip-steps=1", "--align-steps=1", "--sft-steps=0",
                    "--cot-steps=1", "--pictures=8", "--traces=8", "--clip-batch=4", "--batch=4", "--eval-greedy=3",
                    "--eval-sampled=2", "--stage=clip,align,cot", f"--out={out}"])
    return out


def test_eval_gives_the_numbers_of_the_run_itself(run, capsys):
    evaluation.main([f"--checkpoint={run / 'cot.pt'}", "--eval-greedy=3", "--eval-sampled=2", "--eval-samples=2"])
    said = capsys.readouterr().out
    found = {(r["split"], r["decoding"], r["metric"]): r for r in json.loads((run / "results.json").read_text())
             if r["method"] == "cot"}
    for title, decoding, metric in (("Accuracy, greedy", "greedy", "accuracy"), ("Accuracy, T = 1", "t1", "accuracy"),
                                    ("length, T = 1", "t1", "length")):
        [part] = [part for part in said.split("\n\n") if part.startswith(title)]
        splits, line = (row.split() for row in part.splitlines()[1:3])
        assert splits == ["id", "crowded", "pairs", "walk3", "walk4"] and line[0] == "cot"
        numbers = [word for word in line[1:] if "[" not in word and "]" not in word]
        form = "{:.1f}" if metric == "length" else "{:.3f}"
        assert numbers == [form.format(found[split, decoding, metric]["value"]) for split in splits]


def test_eval_asks_the_prompts_that_the_run_asked(run, monkeypatch):
    asked, evaluate = {}, evaluation.evaluate

    def spy(vlm, tokenizer, samples, settings):
        asked[samples[0].split] = [evaluation.chat.normalise(sample.answer) for sample in samples[:3]]
        return evaluate(vlm, tokenizer, samples, settings)

    monkeypatch.setattr(evaluation, "evaluate", spy)
    evaluation.main([f"--checkpoint={run / 'cot.pt'}", "--eval-greedy=3", "--eval-sampled=2", "--eval-samples=2"])
    scores = json.loads((run / "scores.json").read_text())["cot"]
    assert asked == {split: of["greedy"]["gold"] for split, of in scores.items()}


def test_the_first_validation_pictures_are_of_every_class(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(80):
        folder = tmp_path / ("train", "val")[n % 2] / "abcd"[n // 2 % 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    splits, _ = evaluation.real_data(f"images:{tmp_path}", 20)
    assert {sample.answer for sample in splits["val"][:16]} == set("abcd")


def test_the_sets_test_and_val_hold_other_prompts():
    one, two = (evaluation.scenes.load("id", 50, evaluation.TEST_SEED[name]) for name in ("test", "val"))
    assert not {sample.images[0].tobytes() for sample in one} & {sample.images[0].tobytes() for sample in two}


def test_ask_answers_about_a_picture_and_without_one(run, tmp_path, capsys):
    Image.new("RGB", (50, 60), "red").save(tmp_path / "a.png")
    evaluation.main([f"--checkpoint={run / 'cot.pt'}", "--ask=what is at b2 ?", f"--image={tmp_path / 'a.png'}"])
    seen = capsys.readouterr().out
    evaluation.main([f"--checkpoint={run / 'cot.pt'}", "--ask=what is at b2 ?", f"--image={tmp_path / 'a.png'}"])
    assert capsys.readouterr().out == seen and seen.strip() and "Accuracy" not in seen
    vlm, tokenizer, state = evaluation.load_vlm(run / "cot.pt")
    settings = evaluation.SimpleNamespace(method="think", template="brief", max_new=16, eval_batch=8)
    pictures = (np.asarray(Image.new("RGB", (50, 60), "red")),)
    texts, _ = evaluation.complete(vlm, tokenizer, [evaluation.Sample(images=pictures, question="what is at b2 ?")],
                                   settings)
    assert seen == texts[0][0] + "\n"
    evaluation.main([f"--checkpoint={run / 'cot.pt'}", "--ask=what is at b2 ?", "--max-new=3"])
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("flags, said", [
    (["--checkpoint="], "either --checkpoint= must name a stage's .pt file or --llava="),
    (["--chekpoint=x"], "unknown option --chekpoint; did you mean --checkpoint?"),
    (["--method=guess"], "--method=guess must be one of direct, think, asked"),
    (["--template=x"], "--template=x must be one of brief, vicuna_v1"),
    (["--set=train"], "--set=train must be one of test, val"),
    (["--splits=id,far"], "--splits=id,far: 'far' must be one of id, crowded, pairs, walk3, walk4"),
    (["--eval-samples=0"], "--eval-samples=0 must lie in [1, 10000]"),
    (["--max-new=-1"], "--max-new=-1 must lie in [0, 131072]"),
    (["--ask=what ?", "--image=/no/such.png"], "image '/no/such.png' does not exist"),
    (["--device=tpu"], "--device=tpu is not available here"),
    (["--data=nonsense:x"], "--data=nonsense:x must be scenes, images:DIR, jsonl:FILE or llava:FILE"),
    (["--data=llava:x"], "--data=llava:x holds conversations, which nothing can check; expected images:DIR or jsonl:"),
    (["--checkpoint=/no/such.pt"], "checkpoint '/no/such.pt' does not exist")])
def test_what_eval_does_not_understand_is_one_sentence(run, flags, said):
    with pytest.raises(ValueError) as caught:
        evaluation.main([f"--checkpoint={run / 'cot.pt'}", *flags])
    assert str(caught.value).startswith(said) and str(caught.value).isprintable()


def test_training_rows_by_hand():
    log = [dict(stage="cot", step=0, loss=1.0)]
    log += [{"stage": "rl", "method": "grpo", "step": n, "reward": 1.0, "reward/correctness": n / 4,
              "reward/format": 1.0, "samples": 8 * (n + 1), "seconds": 9.0, "seconds_decode": 1.0,
              "seconds_update": float(n), **(dict(clip_low=0.1, clip_high=0.3, entropy=0.5) if n else {})}
            for n in range(3)]
    found = training_rows(log, 7, last=2)
    assert {row["split"]: row["value"] for row in found} == pytest.approx({
        "1000 samples": 0.024, "s/step": 2.0, "clipped, %": 40, "right": 0.375, "format": 1, "entropy": 0.5})
    assert all(row["method"] == "grpo" and row["seed"] == 7 for row in found)
    assert training_table(found).splitlines()[2].split() == ["grpo", "0.024", "2.000", "40.000", "0.375",
                                                                      "1.000", "0.500"]
    assert training_table([]) == "" == training_table(training_rows(log[:1], 0))
