"""Files that people open after a run: drawn with and without their parts, and safe whatever a model wrote."""
import base64
import io
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from data.sample import Sample
from rl.report.curves import curves, draw
from rl.report.log import mean_log, read_log
from rl.report.samples import OPEN, STYLE, entries_of, section
from rl.report.web import document


def supervised(stage, steps=3):
    return [dict(stage=stage, step=n, loss=2.0 / (n + 1), lr=1e-3, seconds=0.1 * n) for n in range(steps)]


def learned(stage, method, steps=3):
    """The last rollout is all flat: it has no update, so no entropy."""
    lines = [{"stage": stage, "method": method, "step": n, "reward": 1.1, "reward/correctness": 0.5,
              "reward/format": 1.0, "flat": 0.2, "length": 9.0, "entropy": 0.3, "loss": 0.0} for n in range(steps)]
    del lines[-1]["entropy"]
    return lines


def result(method, split="id", value=0.5, low=0.4, high=0.6):
    return dict(method=method, split=split, decoding="t1", metric="accuracy", value=value, low=low, high=high, n=30,
                seed=0)


RESULTS = [result(method, split) for method in ("teacher", "cot", "grpo_token", "mine") for split in ("id", "crowded")]
LOG = supervised("clip", 40) + supervised("cot") + learned("rl", "grpo_token") + supervised("filtered")
LOG += learned("rl_zero", "grpo_token_zero")


@pytest.mark.parametrize("log, results", [
    (LOG, RESULTS), (LOG, []), ([], RESULTS), ([], []), (supervised("clip"), []), (learned("rl", "ppo"), RESULTS),
    (supervised("clip", 1) + learned("rl", "grpo", 1) + supervised("filtered", 1), [result("grpo", "val")]),
    (LOG, [result("cot", "val", value=1.0, low=-np.inf, high=np.inf)]),       # one prompt has no interval
    (LOG, [dict(result("cot"), metric="length", value=9.0)]),
    ([dict(stage="clip", step=0, loss=float("nan")), dict(stage="sft", step=0, loss=0.0)], []),
    ([dict(stage="sft", step=0, loss=None), dict(stage="sft", step=1, loss=1.0)], []),
], ids=["all", "no results", "results alone", "nothing", "one stage", "RL alone", "one step", "one prompt",
        "no accuracy", "loss nan and zero", "a step without records"])
def test_curves_are_drawn_with_and_without_their_parts(log, results):
    pytest.importorskip("matplotlib")
    with Image.open(io.BytesIO(curves(log, results))) as picture:
        assert picture.width == 1600 and np.asarray(picture.convert("L")).min() < 200      # not blank


def test_the_picture_has_the_methods_that_were_asked_on_every_split():
    pytest.importorskip("matplotlib")
    few = [result(f"base+{n}", "id") for n in range(12)]
    axes = draw(LOG, RESULTS + few).get_axes()
    [legend] = [ax.get_legend() for ax in axes if ax.get_legend()]
    assert [text.get_text() for text in legend.get_texts()] == ["teacher", "cot", "grpo_token", "mine"]


def panels(log):
    """Title of a panel -> its axes."""
    pytest.importorskip("matplotlib")
    return {ax.get_title("left"): ax for ax in draw(log, []).get_axes()}


def curve(ax, name):
    """The smoothed values drawn under that name."""
    [line] = [line for line in ax.get_lines() if line.get_label() == name]
    return line.get_ydata()


def test_rewards_and_tokens_are_drawn_on_axes_of_their_own():
    log = learned("rl", "grpo_token", 40)
    rewards = panels(log)["RL: rewards"]
    assert [text.get_text() for text in rewards.texts] == ["correctness", "format", "weighted sum"]       # from below
    assert all(0 <= y <= 1.2 for line in rewards.get_lines() for y in line.get_ydata())
    assert rewards.get_ylim()[0] >= -0.1 and rewards.get_ylim()[1] <= 1.2

    with_length = [line | {"reward/length": -0.7, "reward/mine": 1.05} for line in log]
    drawn = panels(with_length)
    rewards = drawn["RL: rewards"]
    assert {text.get_text() for text in rewards.texts} == {"correctness", "format", "weighted sum", "length", "mine"}
    assert len({text.get_color() for text in rewards.texts}) == 5
    heights = {text.get_text(): text.get_position()[1] for text in rewards.texts}
    for name, y in (("correctness", 0.5), ("length", -0.7)):        # at the end of its line where there is room
        assert heights[name] == pytest.approx((rewards.transScale + rewards.transLimits).transform((1, y))[1])
    assert heights["format"] < heights["mine"] < heights["weighted sum"] <= 1
    assert np.allclose(curve(rewards, "reward/length"), -0.7)
    assert np.allclose(curve(drawn["Tokens of a completion"], "length"), 9)
    assert rewards.get_ylim()[0] >= -1.1 and rewards.get_ylim()[1] <= 1.2


def test_the_accuracies_are_those_of_the_sampled_decoding_whatever_the_splits_are_called():
    pytest.importorskip("matplotlib")
    rows = [result("teacher", "night", 0.25), result("ppo", "night"), result("ppo", "fog", 0.75)]
    rows = [dict(row, decoding="greedy", value=0.0) for row in rows] + [dict(row, decoding="t0.7-k5") for row in rows]
    found = {ax.get_title("left"): ax for ax in draw(learned("rl", "ppo"), rows).get_axes()}
    accuracies = found["Accuracy by split, T = 0.7, top-k 5, with 95 % intervals"]
    assert [label.get_text() for label in accuracies.get_xticklabels()] == ["night", "fog"]
    assert {text.get_text() for text in accuracies.texts} == {"50", "75"}
    assert "teacher's\nanswers 0.25" in [text.get_text() for text in found["RL: rewards"].texts]


def test_without_matplotlib_there_are_no_curves(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert curves(LOG, RESULTS) is None


def test_curves_leaves_matplotlib_as_it_was():
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    curves(LOG, RESULTS)
    assert dict(matplotlib.rcParams) == before


def completion(text, correct=1.0, method="grpo", why="'two': right; well-formed"):
    return dict(method=method, text=text, right=correct > 0, reward={"correctness": correct, "format": 0.5}, why=why)


def page(*completions, **fields):
    """The HTML of one entry."""
    entry = dict(images=(np.zeros((4, 4, 3), np.uint8),), prompt="how many ?", answer="two", kind="scenes/count")
    return document("A title", section([{**entry, **fields, "completions": completions}]), STYLE).decode()


class Reader(HTMLParser):
    """Elements, attributes and visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.seen = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.seen += data


EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"' &lt; </style></div>"


@pytest.mark.parametrize("where", ["text", "why", "method", "prompt", "answer", "kind"])
def test_untrusted_text_is_shown_and_never_runs(tmp_path, where):
    tidy = completion("two")
    text = page({**tidy, where: EVIL}) if where in tidy else page(tidy, **{where: EVIL})
    assert "<script" not in text
    read, plain = Reader(text), Reader(page(tidy))
    assert sorted(read.tags) == sorted(plain.tags + ["span"] * (4 if where == "text" else 0))     # coloured tags
    assert not any(name.startswith("on") for name, _ in read.attributes)
    assert EVIL in read.seen


def test_tags_of_a_chain_are_visible(tmp_path):
    text = "<think> a1 b1</think><answer> two</answer>"
    html = page(completion(text))
    assert "&lt;think&gt;" in html and "&lt;/answer&gt;" in html and "<think>" not in html
    assert text in Reader(html).seen


def test_right_and_wrong_are_said_in_words(tmp_path):
    seen = Reader(page(completion("a"), completion("b", 0.0, "cot", "'b': wrong"))).seen
    assert seen.count("✓ right") == 1 and seen.count("✗ wrong") == 1
    assert "correctness 1, format 0.5" in seen and "correctness 0" in seen and "'b': wrong" in seen
    assert "grpo1 of 1 right" in seen and "cot0 of 1 right" in seen


def test_without_a_correctness_reward_nothing_is_judged(tmp_path):
    seen = Reader(page(dict(completion("a"), right=None, reward={"format": 1.0}))).seen
    assert "✓" not in seen and "✗" not in seen and "1 of" not in seen


def test_empty_completions_and_half_surrogates_are_shown(tmp_path):
    seen = Reader(page(completion(""), completion("x \ud800 y"))).seen
    assert "(empty)" in seen and "x ? y" in seen


def test_the_picture_is_inside_the_file(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    for source in (picture, str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        [data] = re.findall(r'src="data:image/png;base64,([^"]+)"', page(images=(source,)))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), picture)
    assert "<img" not in page(images=()) and page(images=(picture, picture)).count("<img") == 2


class Rewards:
    """Correctness pays by the character; `parts` knows more names than are rewarded."""
    names = ("mine", "correctness")

    def parts(self, sample, text):
        return {"correctness": float(len(text)), "format": 1.0, "mine": len(text)}

    def why(self, sample, text):
        return f"{text} for {sample.answer}"


def test_the_page_of_a_run_shows_the_first_completion_of_each_method_and_what_it_earned():
    picture = np.zeros((4, 4, 3), np.uint8)
    one = Sample(images=(picture,), question="how many ?", answer="two", source="scenes/count")
    two = Sample(question="and without a picture ?", answer="three", source="scenes/at")
    right = "<answer>three</answer>"
    scores = {"teacher": {"far": {"t0.7": {"text": ["<answer>two</answer>"]}}},
              "ppo": {"far": {"t0.7": {"text": ["one", right]}, "greedy": {"text": ["never shown"]}}}}
    html = section(entries_of({"far": [one, two, one]}, scores, Rewards(), "t0.7"))
    seen = Reader(html).seen
    assert html.count("<img") == 1 and "2 prompts." in seen and "never shown" not in seen
    assert seen.count("Gold answer: two") == seen.count("Gold answer: three") == 1
    assert "mine 3, correctness 3 · one for two" in seen and f"mine 22, correctness 22 · {right} for three" in seen
    assert "teacher1 of 1 right" in seen and "ppo1 of 2 right" in seen and "far, scenes/count" in seen
    few = section(entries_of({"far": [one, two]}, scores, Rewards(), "t0.7", each=1))
    assert "1 prompts." in few and "without a picture" not in few


def test_more_than_a_few_prompts_are_folded():
    entry = dict(images=(), prompt="how many ?", answer="two", kind="id", completions=[])
    assert "<details>" not in section([entry] * OPEN)
    assert "<details><summary>2 more prompts</summary>" in section([entry] * (OPEN + 2))


def test_read_log_skips_a_last_line_cut_off(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"stage": "clip", "step": 0}) + "\n" + '{"stage": "clip", "st')
    assert read_log(path) == [{"stage": "clip", "step": 0}]


def test_read_log_names_a_broken_line_in_the_middle(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_log(path)


def test_a_run_without_a_log_has_an_empty_one(tmp_path):
    assert read_log(tmp_path / "log.jsonl") == []


def test_the_mean_of_logs_by_hand():
    rl = dict(stage="rl", method="ppo")
    one = [dict(rl, step=0, reward=1.0, entropy=2.0), dict(rl, step=1, reward=3.0)]
    two = [dict(rl, step=0, reward=2.0), dict(stage="cot", step=0, loss=5.0)]
    assert mean_log([one, two]) == [dict(rl, step=0, reward=1.5), dict(rl, step=1, reward=3.0),
                                    dict(stage="cot", step=0, loss=5.0)]
