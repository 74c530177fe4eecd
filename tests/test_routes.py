"""The ladder of learning rates, and the tables of the three routes."""
import pytest

import train
from rl.report import ladder, routes
from train import needed_for


def peak_at(best):
    """measure(rate), highest at `best`; the rates that were asked for are in its `asked`."""
    def measure(rate):
        measure.asked.append(rate)
        return dict(value=1 / (1 + abs(rate / best - 1)), low=0.0, high=1.0, n=10)
    measure.asked = []
    return measure


def test_the_ladder_finds_a_peak_inside_without_further_rates():
    measure = peak_at(5e-4)
    best, rungs = ladder.climb(measure)
    assert best == 5e-4 and measure.asked == list(ladder.RATES) and list(rungs) == sorted(ladder.RATES)


@pytest.mark.parametrize("peak, further", [(4e-3, [4e-3, 8e-3]), (6.25e-5, [6.25e-5, 3.125e-5])])
def test_the_ladder_is_extended_where_the_best_lies_at_an_end(peak, further):
    measure = peak_at(peak)
    best, _ = ladder.climb(measure)
    assert best == peak and measure.asked == [*ladder.RATES, *further]


def test_a_ladder_without_a_peak_ends_and_says_so():
    measure = peak_at(1e9)
    best, rungs = ladder.climb(measure)
    assert len(rungs) == ladder.MOST and best == max(rungs)
    assert "the best lies at an end of the ladder" in ladder.ladder_text("arm", best, rungs)


def test_of_equal_rates_the_lower_one_is_taken():
    best, _ = ladder.climb(lambda rate: dict(value=float(2.5e-4 <= rate <= 1e-3), low=0.0, high=1.0, n=4))
    assert best == 2.5e-4


def test_rates_that_nothing_tells_apart_extend_no_ladder_and_the_text_says_so():
    asked = []
    best, rungs = ladder.climb(lambda rate: asked.append(rate) or dict(value=0.0, low=0.0, high=0.1, n=4))
    assert asked == list(ladder.RATES) and best == min(ladder.RATES)
    text = ladder.ladder_text("arm", best, rungs)
    assert "no rate is better than another" in text and "<- best" not in text


def test_an_arm_needs_what_it_starts_from_and_what_its_budget_is_taken_from():
    stages = ["clip", "align", "sft", "rl_from_base", "llava_o1", "llava_o1_blind", "rl_from_o1"]
    assert needed_for("llava_o1", stages) == ["clip", "align", "sft", "rl_from_base"]
    assert needed_for("rl_from_o1", stages) == ["clip", "align", "sft", "rl_from_base", "llava_o1_blind"]
    assert needed_for("cot", ["clip", "align", "cot"]) == ["clip", "align"]


def test_a_rate_of_rates_is_its_stages_own_and_no_others():
    cfg = train.change(train.Config(), rates="sft:0.5,llava_o1:0.25")
    assert train.config_of(cfg, "sft").supervised.sft_lr == 0.5
    llava_o1 = train.config_of(cfg, "llava_o1")
    assert (llava_o1.supervised.cot_lr, llava_o1.rl.rl_lr) == (0.25, cfg.rl.rl_lr)
    assert train.config_of(cfg, "rl_from_base") == cfg


def test_the_rates_of_a_preset_give_way_to_a_rate_on_the_command_line():
    cfg = train.change(train.Config(), rates="rl:0.5,filtered:0.25", rl_lr=0.1, flags="rl_lr")
    assert train.config_of(cfg, "rl").rl.rl_lr == 0.1
    assert train.config_of(cfg, "filtered").supervised.cot_lr == 0.25
    cfg = train.change(cfg, flags="rl_lr rates")
    assert train.config_of(cfg, "rl").rl.rl_lr == 0.5


def test_a_presets_rate_of_rl_is_for_the_default_algorithm_and_one_that_was_given_for_any():
    cfg = train.change(train.Config(), rates="rl:0.5,reinforce:0.25")
    other = train.change(cfg, algorithm="grpo")
    assert train.config_of(other, "rl").rl.rl_lr == train.config_of(cfg, "grpo").rl.rl_lr == cfg.rl.rl_lr
    assert train.config_of(other, "reinforce").rl.rl_lr == 0.25
    assert train.config_of(train.change(other, flags="algorithm rates"), "rl").rl.rl_lr == 0.5
    assert train.config_of(train.change(cfg, flags="algorithm"), "rl").rl.rl_lr == 0.5      # the default, said aloud


@pytest.mark.parametrize("flags, said", [
    (["--rates=cot"], "--rates=cot: 'cot' must be NAME:RATE, as in llava_o1:5e-4"),
    (["--rates=cot:0"], "--rates=cot:0 must hold rates in (0, 10000]"),
    (["--rates=cott:1"], "--rates=cott:1 must name stages of train.py's STAGES; 'cott' is none"),
    (["--tune=cot", "--eval-set=val"], "--seed=0 must be at least 100 with --tune"),
    (["--tune=cot", "--seed=100"], "--eval-set=test must be val with --tune"),
    (["--tune=ppo", "--seed=100", "--eval-set=val"], "--tune=ppo must name stages of this run, among clip"),
    (["--compare=routes", "--data=jsonl:/no"], "--compare=routes must come with drawn scenes")])
def test_rates_and_tuning_that_cannot_work_are_one_sentence(flags, said):
    with pytest.raises(ValueError) as caught:
        train.main(["--preset=tiny", *flags])
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def raw(right, text, kind, **more):
    return dict(right=right, length=[[4, 6]] * len(right), text=text, kind=kind, **more)


def test_the_table_of_routes_shows_accuracy_cost_and_each_failure():
    scores = {"one": {"id": {"t1": raw([[1, 0], [1, 1]], ["as given", "so"], ["at", "walk1"],
                                       cut=[[0, 1], [0, 0]], answer=[["two", ""], ["no", "no"]],
                                       format=[[1, 0], [0, 0]])}},
              "two": {"id": {"t1": raw([[0, 0], [0, 0]], ["so", "so"], ["at", "walk1"], spent=[[9, 11], [10, 10]])},
                      "crowded": {"t1": raw([[1, 1]], ["so"], ["at"])}}}
    found = routes.rows(scores, {"one": 2.5e12}, lambda text: "given" in text, lambda text: "walk", seed=3)
    head, columns, one, two = routes.routes_table(scores, found, "t1").splitlines()
    assert columns.split() == ["id", "crowded", "tokens", "TFLOP", "no", "answer", "malformed", "cut", "off",
                               "leaked"]
    assert one.split()[0] == "one" and one.split()[1] == "0.750"
    assert one.split()[-6:] == ["5.0", "2.50", "0.25", "0.75", "0.25", "0.50"]
    assert two.split()[-2:] == ["10.0", "0.00"] and two.split()[0] == "two"
    table = routes.procedures_table(found, "t1").splitlines()
    assert table[2].split() == ["one", *"0.00 / 1.00 / 0.00".split() * 2] and {row["seed"] for row in found} == {3}


def test_what_was_said_in_earlier_stages_is_the_thought_of_the_last():
    scores = raw([[1], [0]], ["<answer> x</answer>", "so"], ["at", "at"], before=["a1 b2", ""])
    assert routes.whole_texts(scores) == ["<think> a1 b2</think><answer> x</answer>", "so"]


def test_procedures_are_counted_by_question_kind():
    found = routes.procedures_by_kind(raw([[1]] * 4, ["list", "walk", "walk", "none"], ["at", "at", "walk1", "at"]),
                                      lambda text: text)
    assert found["walk1"] == {"list": 0.0, "walk": 1.0, "none": 0.0}
    assert found["at"] == pytest.approx({"list": 1 / 3, "walk": 1 / 3, "none": 1 / 3})
