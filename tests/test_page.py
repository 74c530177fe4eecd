"""report.html: what stands on it, what it tells when hovered, and that nothing on it runs but its own script."""
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest

import train
from browser import MISSING, PATH, Browser
from model.runs import environment as environment_module
from model.runs.config import change
from model.runs.environment import add, commit, environment, processor
from rl.metrics import DEFINITIONS
from rl.report.alarms import alarms
from rl.report.charts import LEFT, MOST_POINTS, RIGHT, Axis, Charts, short, smoothed, thinned, ticks
from rl.report.page import definition, gather, in_order, run_page, stage_seconds
from rl.report.web import document

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\u202e"


def row(method, value, metric="accuracy", split="id", decoding="t1", seed=0, low=None, high=None):
    return dict(method=method, split=split, decoding=decoding, metric=metric, value=value,
                low=value - 0.1 if low is None else low, high=value + 0.1 if high is None else high, n=90, seed=seed)


def rl_line(step, **more):
    line = {"stage": "rl", "method": "grpo", "step": step, "reward": 0.5 + 0.01 * step, "reward/correctness": 0.4 +
            0.01 * step, "reward/format": 1.0, "flat": 0.2, "all_right": 0.1, "none_right": 0.05, "length": 9.0,
            "entropy": 0.3, "loss": 0.0, "updates": 1, "lr": 1e-3, "grad_norm": 1.0, "truncated": 0.0,
            "seconds": 1.0 + step, "drift_max": 1e-6}
    return line | more


def sft_line(step, **more):
    return dict(dict(stage="sft", step=step, loss=3.0 / (1 + step), lr=1e-3, grad_norm=2.0, seconds=0.5 * step), **more)


LOG = [sft_line(step) for step in range(30)] + [rl_line(step) for step in range(40)]


def found(**given):
    parts = dict(results=[], differences=[], kinds=[], training=[], verdicts=[], environment=[], probe=[], log=LOG,
                 seeds=1, faults=[])
    return parts | given


# ---------------------------------------------------------------- numbers and axes

@pytest.mark.parametrize("low, high, wanted", [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0, 149, [0, 50, 100]), (-3, 3, [-2, 0, 2]), (0.001, 0.0023, [0.001, 0.0015,
                                                                                                   0.002])])
def test_ticks_are_round_and_inside(low, high, wanted):
    assert ticks(low, high) == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(50))
def test_there_are_never_too_many_ticks_nor_one_outside(seed):
    rng = np.random.default_rng(seed)
    low = float(rng.normal() * 10.0 ** rng.integers(-6, 6))
    high = low + float(10.0 ** rng.uniform(-6, 6))
    found_ticks = ticks(low, high)
    room = 1e-6 * (high - low)
    assert 1 <= len(found_ticks) <= 6 and low - room <= min(found_ticks) and max(found_ticks) <= high + room


def test_axes_put_the_least_and_the_largest_value_at_their_ends():
    linear, log = Axis(2.0, 4.0, 100, 0), Axis(0.01, 100.0, 0, 40, is_log=True)
    assert (linear(2.0), linear(3.0), linear(4.0)) == (100, 50, 0)
    assert log(1.0) == pytest.approx(20) and log.ticks() == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert Axis(5.0, 5.0, 0, 10)(5.0) == 5                  # one value: in the middle


def test_long_lines_are_means_of_neighbours():
    points = [(step, float(step % 2)) for step in range(4 * MOST_POINTS)]
    thin = thinned(points)
    assert len(thin) == MOST_POINTS and {value for _, value in thin} == {0.5} and thin[0][0] == 1.5
    assert thinned(points[:5]) == points[:5]
    assert smoothed(np.arange(45.0))[20] == 20.0 and smoothed(np.ones(45)).tolist() == pytest.approx([1.0] * 45)


def test_what_is_not_finite_or_missing_has_no_point():
    charts = Charts()
    assert charts.lines("a", "", {"x": [(0, None), (1, math.nan)]}) == "" and charts.shown == []
    charts.lines("a", "", {"x": [(0, 1.0), (1, math.inf), (2, 3.0)], "empty": []})
    [shown] = charts.shown
    assert shown["series"] == [{"name": "x", "points": [(0, 1.0), (2, 3.0)]}]
    assert "logarithmic axis" in charts.lines("b", "", {"x": [(0, 0.01), (1, 10.0)]})
    assert "logarithmic axis" not in charts.lines("b", "", {"x": [(0, 0.01), (1, 10.0)]}, from_zero=True)


def test_shares_show_their_intervals_and_nothing_infinite():
    html = Charts.shares("t", "", [row("a", 0.5), row("b", 0.9, low=-math.inf, high=math.inf)])
    assert "a on id: 0.500 [0.400, 0.600]" in html and "b on id: 0.900<" in html and "inf" not in html
    assert html.count('class="whisker') == 1
    assert Charts.shares("t", "", []) == ""


# ---------------------------------------------------------------- what to look at first

def test_a_healthy_log_has_nothing_to_look_at():
    assert alarms(LOG) == []


@pytest.mark.parametrize("spoil, said", [
    (dict(reward=lambda n: 1 - 0.02 * n), "rl: the reward falls from 0.97 to 0.25"),
    ({"reward/correctness": lambda n: 0.6 - 0.01 * n}, "while the share of right answers does not"),
    ({"reward/correctness": lambda n: 0.9 + 0.01 * n}, "correctness is a share, and outside of 0 and 1 in 29 of 40"),
    (dict(length=lambda n: 9.0 + n), "rl: completions go from 10.5 to 46.5 tokens"),
    (dict(lr=lambda n: 1e-3 * 1.2 ** n), "rl: the learning rate is higher at the end"),
    (dict(grad_norm=lambda n: 100.0 if n == 30 else 1.0), "rl: the gradient's norm reaches 100 in step 30, 100 times"),
    (dict(loss=lambda n: math.nan if n > 35 else 0.0), "no finite number in 4 steps, first in step 36"),
    (dict(truncated=lambda n: 0.9), "0.90 of the completions at the end are cut off"),
    (dict(flat=lambda n: 0.95), "0.95 of the groups at the end have one reward for all completions, which teaches "
                                "nothing; in 0.10 all completions earn correctness, in 0.05 none"),
    (dict(updates=lambda n: 0), "40 of 40 rollouts had no update"),
    (dict(drift_max=lambda n: 0.3), "|ratio - 1| up to 0.3"),
    (dict(entropy=lambda n: 0.5 ** n), "the entropy falls from"),
    (dict(clip_low=lambda n: 0.5), "0.50 of the tokens lie beyond the clip"),
    (dict(stopped=lambda n: n % 2), "--kl-stop ended 20 of 40 updates early"),
    (dict(reward_failures=lambda n: 2), "80 calls of rewards of one's own failed"),
])
def test_what_is_wrong_in_a_log_is_said_in_numbers(spoil, said):
    spoilt = []
    for line in LOG:
        changed = {name: of(line["step"]) for name, of in spoil.items()} if line["stage"] == "rl" else {}
        spoilt.append(line | changed)
    sentences = alarms(spoilt)
    assert any(said in sentence for sentence in sentences), sentences


def test_what_is_rounding_depends_on_the_precision():
    drifts = [dict(line, drift_max=0.03) if "reward" in line else line for line in LOG]
    assert "|ratio - 1| up to 0.03" in str(alarms(drifts)) and alarms(drifts, dtype="mixed") == []


def test_notes_and_bad_records_and_a_rising_loss_are_said():
    log = [sft_line(step, loss=1.0 + step) for step in range(20)]
    log[3]["loss"] = None
    log.append(dict(stage="sft", bad_record="no answer", number=3))
    assert alarms(log, ["a note", "a note"]) == [
        "Noted at the start: a note", "1 records could not be used; the first, of sft: no answer",
        "sft: 1 of 20 steps had no usable record",
        "sft: the loss is higher at the end than at the beginning, 20 after 1"]


# ---------------------------------------------------------------- the page

def test_the_result_comes_first_and_may_be_not_shown():
    results = [row("cot", 0.40), row("grpo", 0.45)]
    differences = [row("cot", -0.05, "accuracy - grpo", low=-0.15, high=0.05)]
    html = run_page("a run", found(results=results, differences=differences)).decode()
    first, *_ = re.findall("<p>(.*?)</p>", html)
    assert first.startswith("Result on id, T = 1 [95 % interval over 90 prompts]: grpo is right on 0.450 [0.35, 0.55]")
    assert "a difference is not shown: cot minus grpo" in html
    sections = re.findall('<section id="([a-z-]+)">', html)
    assert sections == ["result", "accuracy", "reinforcement-learning", "supervised-stages", "what-was-run",
                        "what-the-numbers-mean"]
    assert re.findall('<a href="#([a-z-]+)">', html) == sections


def test_a_page_of_nothing_is_a_page():
    html = run_page("x", found(log=[])).decode()
    assert "Result: no method was evaluated." in html and "<figure" not in html


def test_several_seeds_are_told_with_intervals_over_seeds(tmp_path):
    rows = [row("grpo", value, seed=seed) for seed, value in ((3, 0.4), (4, 0.6))]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    for seed, reward in ((3, 0.0), (4, 1.0)):
        (tmp_path / f"seed-{seed}").mkdir()
        line = json.dumps(rl_line(0, reward=reward))
        (tmp_path / f"seed-{seed}/log.jsonl").write_text(line + "\n")
    gathered = gather(tmp_path)
    assert gathered["seeds"] == 2 and gathered["log"][0]["reward"] == 0.5
    assert "interval over 2 seeds]: grpo is right on 0.500" in run_page("x", gathered).decode()


def test_every_number_of_a_log_has_its_definition_and_numbers_that_stand_still_have_no_chart():
    assert definition("reward/mine").startswith("one reward, before gate and weight")
    assert definition("reward/correctness").startswith("whether the answer is right")
    assert definition("length_wrong") == "length of a completion, EOS included, tokens, mean over wrong completions"
    assert definition("grad_norm_llm").startswith("L2 norm of the policy's gradient before clipping; the critic's")
    assert definition("words_wait") and definition("unheard_of") == ""
    assert all(definition(name) and "the same" not in definition(name) for name in DEFINITIONS)
    assert in_order({"seconds_update", "kl", "reward", "length", "groups"}) == ["length", "kl", "groups",
                                                                                "seconds_update"]
    html = run_page("x", found()).decode()
    assert "Equal in every step: " in html and "flat 0.2" in html and "<b>flat</b>" not in html
    assert "<b>Rewards of grpo</b>" in html and "<b>sft: loss</b>" in html


def test_seconds_of_a_stage_that_was_resumed_are_those_of_both_processes():
    log = [dict(stage="a", seconds=1.0), dict(stage="a", seconds=3.0), dict(stage="a", seconds=0.5),
           dict(stage="a", seconds=2.0), dict(stage="b", seconds=4.0)]
    assert stage_seconds(log) == {"a": 5.0, "b": 4.0}


def test_verdicts_are_told_by_sentence_on_the_first_split_and_by_finding_on_others():
    verdicts = [dict(question=question, split=split, finding=finding, sentence=f"{question} of {split}.", seed=0,
                     start="cot")
                for question, split, finding in (("sharpening", "crowded", "capability"), ("sharpening", "id",
                                                 "not shown"), ("looking", "id", "looks"))]
    html = run_page("x", found(verdicts=verdicts)).decode()
    assert "sharpening of id." in html and "sharpening of crowded." not in html
    assert "Did it look?" in html and ">capability<" in html


# ---------------------------------------------------------------- what was run

def test_an_entry_says_on_what_a_run_was_made(tmp_path):
    cfg = change(train.Config(), rl_steps=7, rates="", out="x")
    entry = environment(cfg, "cpu", ["a note"])
    assert entry["differs"] == {"rl_steps": [7, 150]} and entry["notes"] == ["a note"] and entry["torch"]
    add(tmp_path, entry)
    (tmp_path / "results.json").write_text("[]")
    add(tmp_path, entry | {"started": "later"})
    gathered = gather(tmp_path)
    assert [one["started"] for one in gathered["environment"]] == [entry["started"], "later"]
    html = run_page("x", gathered).decode()
    assert "rl_steps" in html and "150" in html and entry["processor"][:5] in html and "a note" in html
    (tmp_path / "environment.json").write_text("[{")
    assert gather(tmp_path)["environment"] == []
    add(tmp_path, entry)
    assert len(gather(tmp_path)["environment"]) == 1


def test_a_page_that_cannot_be_made_is_noted_and_ends_no_run(tmp_path, capsys):
    run = SimpleNamespace(folder=tmp_path, is_writer=True)
    (tmp_path / "environment.json").write_text("[{")
    train.show_page(run, "loss is not finite")
    assert "The run stopped: loss is not finite" in (tmp_path / "report.html").read_text()
    assert capsys.readouterr().out == ""
    (tmp_path / "log.jsonl").write_text("torn\n{}\n")
    train.show_page(run)
    assert "line 1: not JSON" in (tmp_path / "report.html").read_text()
    (tmp_path / "environment.json").write_text('["damaged"]')
    train.show_page(run)
    [told] = capsys.readouterr().out.splitlines()
    assert told.startswith("no report.html: TypeError: ")


def test_without_git_a_run_has_no_commit(monkeypatch, tmp_path):
    assert processor()
    monkeypatch.setattr(environment_module, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() == ""
    monkeypatch.setenv("PATH", "")
    assert commit() == ""


# ---------------------------------------------------------------- in a browser

needs_browser = pytest.mark.skipif(PATH is None, reason=MISSING)


def hostile_page():
    """A page whose every text is hostile, of a run and of its samples."""
    log = [line | ({"method": HOSTILE} if "method" in line else {"stage": HOSTILE}) for line in LOG]
    for line in log:
        line[f"reward/{HOSTILE}"] = 0.1
    entry = dict(images=(np.zeros((4, 4, 3), np.uint8),), prompt=HOSTILE, answer="😀" + "x" * 100000, kind=HOSTILE,
                 completions=[dict(method=HOSTILE, text=HOSTILE, right=True, reward={"correctness": 1.0}, why=HOSTILE)])
    verdict = dict(question="sharpening", split="id", finding=HOSTILE, sentence=HOSTILE, seed=0,
                   start="cot")
    started = dict(started=HOSTILE, command=[HOSTILE], notes=[HOSTILE], differs={"out": [HOSTILE, ""]})
    parts = found(results=[row(HOSTILE, 0.5, split=HOSTILE), row("b", 0.6, split=HOSTILE)], log=log,
                  verdicts=[verdict], environment=[started])
    return run_page(HOSTILE, parts, [entry], HOSTILE)


@needs_browser
def test_the_page_runs_in_light_and_dark_tells_values_and_hostile_texts_stay_text(tmp_path):
    path = tmp_path / "report.html"
    path.write_bytes(hostile_page())
    colours = set()
    with Browser() as browser:
        for theme in ("light", "dark"):
            page = browser.open(path, theme)
            colours.add(page.run("getComputedStyle(document.body).backgroundColor"))
            assert page.run("document.title") == f"Run {HOSTILE}".strip()
            assert page.run("document.querySelectorAll('script:not([type])').length") == 1
            assert page.run("document.querySelectorAll('img[src=x], [onerror]').length") == 0
            assert page.run("document.documentElement.scrollWidth <= innerWidth")
            first = "document.querySelector('figure[data-chart]')"
            page.run(f"{first}.scrollIntoView({{block: 'center'}})")
            page.hover("figure[data-chart] svg.plot")
            page.wait(f"!{first}.querySelector('.tip').hidden")
            told = page.run(f"{first}.querySelector('.tip').textContent").split("\n")
            step = int(told[0].removeprefix("step "))
            assert 15 <= step <= 25 and told[1] == f"weighted sum  {short(0.5 + 0.01 * step)}"
            assert told[-1] == f"{HOSTILE}  0.1"
            assert page.said == []
            page.close()
    assert len(colours) == 2


@needs_browser
def test_the_arrow_keys_walk_a_chart(tmp_path):
    path = tmp_path / "report.html"
    charts = Charts()
    body = charts.lines("a", "", {"x": [(2, 1.0), (7, 2.0), (12, 4.0)], "y": [(2, 7.0), (12, 9.0)]})
    path.write_bytes(document("t", body + charts.data(), Charts.STYLE, Charts.SCRIPT))
    with Browser() as browser:
        page = browser.open(path)
        page.run("document.querySelector('figure').focus()")
        told = []
        places = []
        for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
            page.press(key)
            told.append(page.run("document.querySelector('.tip').textContent").split("\n"))
            places.append(float(page.run("document.querySelector('.cursor').getAttribute('x1')")))
        assert [lines[0] for lines in told] == ["step 2", "step 7", "step 12", "step 12", "step 7"]
        assert places == [LEFT, (LEFT + RIGHT) / 2, RIGHT, RIGHT, (LEFT + RIGHT) / 2]
        assert told[1][1] == "x  2" and told[2][1:] == ["x  4", "y  9"]
        page.press("Escape")
        assert page.run("document.querySelector('.tip').hidden") and page.said == []
