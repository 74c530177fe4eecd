"""What a person sees while reinforcement learning runs: a plain line a step; on a terminal one that is written over."""
import io
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

from data.sample import Sample
from model.look import looked_at
from rl import live
from rl.live import Live, shortened, step_text
from rl.rewards import RewardOptions, Rewards
from tiny import difference, make_vlm, prompts, random_completions, to_batch

LINE = {"reward": 0.62, "reward/correctness": 0.55, "reward/format": 0.98, "flat": 0.41, "entropy": 0.523,
        "length": 21.34, "tokens_per_second": 811.7}
TEXT = "reward 0.62 (correctness 0.55, format 0.98), flat 0.41, entropy 0.52, 21.3 tokens, 812 tokens/s"
REWARDS = Rewards(RewardOptions())


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still but for what a test adds to clock.now."""
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr(live.time, "perf_counter", lambda: found.now)
    return found


def test_a_step_is_one_line_by_hand():
    assert step_text(LINE, ["correctness", "format"]) == TEXT
    without = {name: value for name, value in LINE.items() if name != "entropy"}        # no update: all groups flat
    assert step_text(without, ["format"]) == "reward 0.62 (format 0.98), flat 0.41, 21.3 tokens, 812 tokens/s"


def test_without_a_terminal_each_step_is_a_plain_line_with_the_time_left(capsys, clock):
    shown = Live("rl", REWARDS)
    bar = tqdm(disable=True)
    for step in range(3):                                   # of ten, the first of them timed from its end on
        shown.show(bar, step, (step + 1) / 10, LINE)
        clock.now += 30
    shown.say(bar, Sample(question="q"), "a completion")
    shown.close()
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"  rl 0: {TEXT}", f"  rl 1: {TEXT}, 04:00 left", f"  rl 2: {TEXT}, 03:30 left"]
    assert err == ""


def test_a_stage_that_is_given_flops_and_ends_beyond_them_has_no_time_left_below_zero(capsys, clock):
    shown = Live("rl", REWARDS)
    for share in (0.5, 1.25):
        shown.show(tqdm(disable=True), 0, share, LINE)
        clock.now += 30
    assert capsys.readouterr().out.splitlines()[1].endswith(", 00:00 left")


def test_on_a_terminal_one_line_is_written_over_and_now_and_then_a_completion_stands_above(capsys, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    with tqdm(total=3, file=screen, disable=False) as bar:
        shown = Live("rl", REWARDS)
        shown.show(bar, 0, 1 / 3, LINE)
        shown.say(bar, Sample(question="what ?", answer="two"), "<answer>\x1b[31m two\n</answer>")
        shown.show(bar, 1, 2 / 3, LINE)
        shown.close()
    text = screen.getvalue()
    assert capsys.readouterr().out == "" and "rl 0:" not in text
    assert text.count("reward 0.62") >= 2 and "\n\r  reward 0.62" in text           # below the bar
    assert r"  rl: 'what ?' ('two'): '<answer>\x1b[31m two\n</answer>'" in text


def test_a_completion_is_one_line_whatever_it_holds():
    assert shortened("a\x1b[2J\r\n\u202eb") == repr("a\x1b[2J\r\n\u202eb")
    assert len(shortened("w" * 100_000)) < 450


def test_a_bench_says_nothing(capsys):
    Live("bench", REWARDS, quiet=True).show(tqdm(disable=True), 0, 1.0, LINE)
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- where the decoder looks

def test_where_it_looks_is_the_attention_of_the_forward_that_the_losses_take(monkeypatch):
    vlm = make_vlm()
    rows = prompts()
    ids = random_completions(1, 1, 5)[0, 0]
    for row in (rows[0], rows[2]):                          # one picture, two
        batch = to_batch([row])
        found = looked_at(vlm, batch, ids)
        assert found.shape == (5, 9 * len(row[2])) and (found > 0).all() and (found.sum(1) < 1).all()
        assert difference(found, attention_by_gradient(vlm, batch, ids, monkeypatch)) < 1e-6


def attention_by_gradient(vlm, batch, ids, monkeypatch):
    """As looked_at, from the kernel's own output: what a query gathers is linear in the values, so that with all values
    of a head alike but one it tells how much that one weighs."""
    shares = []
    completions = type(vlm.llm.layers[0].self_attn).completions

    def probed(self, q, ky, vy, kx, vx, lengths):
        T = kx.shape[2]
        of_slots = []
        for slot in range(T):
            values = torch.zeros_like(vx)
            values[:, :, slot] = 1
            of_slots.append(completions(self, q, ky, torch.zeros_like(vy), kx, values, lengths)[0, 0, :, :, 0].mean(0))
        shares.append(torch.stack(of_slots, -1))            # (C, T)
        return completions(self, q, ky, vy, kx, vx, lengths)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(type(vlm.llm.layers[0].self_attn), "completions", probed)
        vlm.states(batch, ids[None, None])
    mean = torch.stack(shares).mean(0)
    is_image = batch.ids[0] == vlm.config.image_id
    # State t + 1 of a completion predicts its token t + 1; the first is predicted by the prompt's last state.
    first = looked_at(vlm, batch, ids)[:1]
    return torch.cat([first, mean[:-1, is_image]])
