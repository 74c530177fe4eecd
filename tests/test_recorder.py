"""rollouts.jsonl: the numbers that the losses used, nothing more, whatever interrupts a run."""
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import eval as evaluation
import train
from data import tokenizer
from data.sample import Sample
from kernels import policy_loss
from model.flops import Meter
from model.generate import Sampler
from model.runs import checkpoint
from model.runs.config import change
from model.vlm import VLM
from rl import losses, metrics, update
from rl.learner import Guard, make_learner
from rl.recorder import FILE, FOLLOWED, Recorder, chosen, clip_sign, compact, expanded, of_tokens, pieces
from rl.report.inspector import sample_of
from rl.report.log import read_log
from rl.rewards import Rewards
from rl.rollout import prompts, roll_out
from rl.types import Rollout
from test_algorithms import config
from test_algorithms import problem as experience
from test_rl import problem
from tiny import make_vlm, picture

TOK = tokenizer.train(["<think> a b c d</think><answer> one two three</answer>"] * 3,
                      ["<think>", "</think>", "<answer>", "</answer>", "▁one", "▁two"], 300)
SAMPLES = [Sample(id=f"s{i}", images=(picture(i),), question=f"what is {i} ?", answer="one") for i in range(4)]


def lines_of(folder):
    return read_log(Path(folder) / FILE)


# ---------------------------------------------------------------- one step, as train.py takes it

class Step:
    """A model, a learner and a Recorder, and steps that do not learn. options: of train.py's Config."""

    def __init__(self, folder, **options):
        options = dict(rewards="length:1,format:0", gated=False, inspect_every=1, group=3, max_new=6, rl_batch=4,
                       template="brief") | options
        self.cfg = change(config(options.pop("algorithm", "grpo_token")), **options)
        self.vlm = make_vlm(llm=dict(vocab=len(TOK)))
        self.rewards = Rewards(self.cfg.reward)
        self.learner = make_learner(self.vlm, self.vlm.config.llm.width, self.cfg.algorithm)
        self.recorder = self.new_recorder(folder)
        self.noise = torch.Generator().manual_seed(0)

    def new_recorder(self, folder):
        follow = partial(self.roll_out, SAMPLES[:FOLLOWED], 7)
        return Recorder(folder, "rl", "grpo", self.cfg, TOK, self.rewards, lambda: follow()[1],
                        checkpoint.write_atomically)

    def roll_out(self, samples, seed):
        return roll_out(Sampler(self.vlm, Meter()), TOK, samples, "think", self.cfg, self.rewards,
                        torch.Generator().manual_seed(seed), metrics.Clock(torch.device("cpu")))

    def take(self, step, take_step=None):
        """-> the step's Rollout."""
        self.recorder.begin(step)
        batch, rollout = self.roll_out(SAMPLES, step)
        experience = update.select_groups(batch, rollout, self.cfg)
        experience = update.score(self.learner, experience, self.cfg, Meter())
        experience, _ = update.estimate_advantages(self.learner, experience, self.rewards, self.cfg)
        update.update(self.learner, experience, self.cfg, take_step or self.shake, Meter(), Guard(None, "rl", 1, None),
                      self.recorder.see)
        self.recorder.write(rollout)
        return rollout

    def shake(self, drop=False):
        """A step that moves the policy: ratios are no longer 1."""
        with torch.no_grad():
            for p in self.vlm.llm.parameters():
                p += 0.02 * torch.randn(p.shape, dtype=p.dtype, generator=self.noise)
                p.grad = None
        return {"grad_norm": 1.0}


ALGORITHMS = {
    "grpo_token": {}, "grpo": dict(epochs=2, mini_batches=2), "ppo": dict(epochs=2), "cispo": dict(mini_batches=2),
    "gspo": dict(epochs=2, mini_batches=4), "rloo": dict(mini_batches=2), "sapo": dict(mini_batches=2),
    "dapo": dict(kl_coef=0.1, kl="exact", correct="truncate", mini_batches=2),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_recorded_is_what_the_losses_used(algorithm, tmp_path, monkeypatch):
    step = Step(tmp_path, algorithm=algorithm, micro_batch=1, **ALGORITHMS[algorithm])
    kind = step.cfg.algorithm.loss
    loss_of, loss, of_micro = update.loss_of, losses.LOSSES[kind], {}
    under_way = []

    def my_loss_of(learner, micro, *rest):
        under_way.append(tuple(micro.ids[micro.mask].tolist()))
        return loss_of(learner, micro, *rest)

    def my_loss(logp, old_logp, ref_logp, advantage, mask, denominator, **options):
        of_micro[under_way[-1]] = dict(logp=logp, loss_old=old_logp, ref_logp=ref_logp, advantage=advantage, mask=mask,
                                       **options)
        return loss(logp, old_logp, ref_logp, advantage, mask, denominator, **options)

    monkeypatch.setattr(update, "loss_of", my_loss_of)
    monkeypatch.setitem(losses.LOSSES, kind, my_loss)
    step.take(0)
    recorded = [line for line in lines_of(tmp_path) if line["updated"]]
    assert {"best", "worst"} <= {line["role"] for line in recorded} <= {"best", "worst", "flat"}
    moved = 0
    for line in recorded:
        completions = line["completions"]
        used = of_micro[tuple(i for completion in completions for i in completion["ids"])]
        for g, completion in enumerate(completions):
            count = len(completion["ids"])
            mine = {name: torch.tensor(expanded(completion[name], count)).double()
                    for name in ("logp", "ratio", "advantage", "weight", "ref_logp", "clipped") if name in completion}
            theirs = {name: used[name][0, g, :count].detach() for name in ("logp", "advantage", "weight")}
            theirs["ratio"] = (used["logp"] - used["loss_old"])[0, g, :count].detach().exp()
            if used["ref_logp"] is not None:
                theirs["ref_logp"] = used["ref_logp"][0, g, :count]
            for name, value in theirs.items():
                assert (mine[name] - value).abs().max() < 1e-5, name
            moved += int((theirs["ratio"] != 1).sum())
    assert (moved > 0) == bool(ALGORITHMS[algorithm])
    first = recorded[0]["completions"][0]
    switches = step.cfg.algorithm
    assert ("old_logp" in first) == (algorithm != "grpo_token")
    assert ("ref_logp" in first) == (algorithm in ("grpo", "ppo", "rloo"))
    assert ("kl" in first) == bool(switches.kl_coef)
    assert ("clipped" in first) == (algorithm != "sapo")


def test_the_kl_of_a_line_is_that_of_the_penalty(tmp_path):
    step = Step(tmp_path, algorithm="grpo", mini_batches=2, kl="k2")
    step.take(0)
    line = next(line for line in lines_of(tmp_path) if line["updated"])
    for completion in line["completions"]:
        count = len(completion["ids"])
        logp, ref_logp, kl = (torch.tensor(expanded(completion[name], count)) for name in ("logp", "ref_logp", "kl"))
        assert ((ref_logp - logp) ** 2 / 2 - kl).abs().max() < 1e-4


def test_clipped_tokens_are_those_that_the_loss_counts():
    logp, old, advantage, mask = problem(spread=0.5)
    advantage = advantage[..., None].expand_as(logp)
    _, stats = policy_loss(logp, old, None, advantage, mask, 11, 0.1, 0.3)
    signs = clip_sign((logp - old).exp(), advantage, 0.1, 0.3)[mask]
    assert (signs == -1).sum() == stats["clip_low"] > 0 and (signs == 1).sum() == stats["clip_high"] > 0


def test_a_loss_that_is_held_at_ratio_one_clips_nothing():
    _, e = experience()
    e = replace(e, advantage=e.old_logp)
    values = dict(logp=e.old_logp, ratio=e.old_logp.exp())
    assert "clipped" not in of_tokens(e, values, config("cispo", clip_low=0.0, clip_high=0.0).algorithm)
    assert "clipped" in of_tokens(e, values, config("cispo").algorithm)


def test_a_group_outside_the_update_has_no_values_of_one_and_costs_no_forward(tmp_path, monkeypatch):
    step = Step(tmp_path, rewards="format:1")            # random tokens have no form: all groups are flat
    calls = []
    forward = VLM.forward
    monkeypatch.setattr(VLM, "forward", lambda *args, **options: calls.append(1) or forward(*args, **options))
    step.recorder.begin(0)
    _, rollout = step.roll_out(SAMPLES, 0)
    step.recorder.write(rollout)
    lines = lines_of(tmp_path)
    assert not calls and [line["role"] for line in lines] == ["best", "flat", "followed", "followed"]
    for line in lines:
        assert line["flat"] and not line["updated"]
        assert not {"logp", "ratio", "entropy", "advantage"} & {*line["completions"][0]}


def test_a_line_tells_what_a_completion_earned_and_why(tmp_path):
    step = Step(tmp_path, rewards="correctness:1,format:0.5", gated=True)
    rollout = step.roll_out(SAMPLES[:1], 0)[1]
    rewards = step.rewards
    rollout.texts = [["<think> one</think><answer> one</answer>", "<answer> one</answer>", "<think> a</think>"
                      "<answer> two</answer>"]]
    rollout.parts, rollout.rewards = rewards.score(SAMPLES[:1], rollout.texts, rollout.mask.sum(-1))
    rollout.reward = rewards.total(rollout.rewards)
    step.recorder.begin(0)
    step.recorder.write(rollout)
    right, formless, wrong = lines_of(tmp_path)[0]["completions"]
    assert right["parts"] == [["correctness", 1, 1, 1, "'one': the gold answer"], ["format", 1, 0.5, 1, "well-formed"]]
    assert formless["parts"][0] == ["correctness", 1, 1, 0, "'one': the gold answer"]
    assert (right["right"], formless["right"], wrong["right"]) == (True, True, False)
    assert (right["agrees"], formless["agrees"], wrong["agrees"]) == (True, None, False)
    assert (right["reward"], formless["reward"], wrong["reward"]) == (1.5, 0, 0.5)
    assert formless["fault"] == "no single <think>..</think>"


# ---------------------------------------------------------------- which groups

def rollout_of(rewards):
    reward = torch.tensor(rewards)
    return Rollout(*[torch.zeros(*reward.shape, 1)] * 3, torch.ones(reward.shape), reward=reward)


@pytest.mark.parametrize("rewards, used, roles", [
    ([[1, 0], [1, 1], [0, 0], [1, 0.5]], {0, 3}, {3: "best", 0: "worst", 2: "flat"}),
    ([[1, 1], [0, 0]], {}, {0: "best", 1: "worst"}),
    ([[1, 0], [1, 1]], {0}, {0: "best", 1: "flat"}),
    ([[0.5, 0]], {0}, {0: "best"})])
def test_the_groups_that_are_recorded_by_hand(rewards, used, roles):
    assert chosen(rollout_of(torch.tensor(rewards).tolist()), used) == roles


def test_a_model_that_gives_no_numbers_is_recorded_too(tmp_path):
    step = Step(tmp_path)
    step.recorder.begin(0)
    rollout = step.roll_out(SAMPLES, 0)[1]
    rollout.logp = torch.full_like(rollout.logp, math.nan)
    micro = SimpleNamespace(ids=rollout.ids, mask=rollout.mask, sampled_logp=rollout.logp, trained=rollout.mask,
                            advantage=rollout.logp, old_logp=torch.zeros(0), ref_logp=torch.zeros(0))
    step.recorder.see(micro, logp=rollout.logp, ratio=rollout.logp)
    step.recorder.write(rollout)
    best, *_ = lines_of(tmp_path)
    assert best["updated"]
    assert {*expanded(best["completions"][0]["logp"], 6)} == {None}


# ---------------------------------------------------------------- texts of tokens, numbers

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, len(TOK) - 1), max_size=30))
def test_the_texts_of_tokens_make_the_text_of_all(ids):
    assert "".join(pieces(ids, TOK.decode)) == TOK.decode(ids)


def test_a_character_of_several_tokens_is_the_last_ones():
    ids = TOK.encode("a é") + TOK.encode("😀")
    found = pieces(ids, TOK.decode)
    assert "".join(found) == "a é😀" and found[-1] == "😀" and found[-4:-1] == ["", "", ""]


def test_a_leading_space_that_a_decoder_drops_is_kept_inside_a_text():
    words = ["▁go", "▁up", "▁", "▁now"]
    found = pieces([0, 1, 2, 3], lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" "))
    assert found == ["go", " up", " ", " now"]


def test_numbers_are_written_short_and_read_back():
    nan = float("nan")
    assert compact(torch.tensor([0.123456789, -2.0])) == [0.12346, -2.0]
    assert compact(torch.tensor([1.0, 1.0, 1.0])) == 1.0 and expanded(1.0, 3) == [1.0, 1.0, 1.0]
    assert compact(torch.tensor([nan, 1.0])) == [None, 1.0] and compact(torch.tensor([])) == []
    assert compact(torch.tensor([3.0])) == [3.0] == expanded([3.0], 1)


# ---------------------------------------------------------------- the file

def test_a_resumed_stage_repeats_no_step_and_a_torn_line_is_cut(tmp_path):
    step = Step(tmp_path)
    for number in range(3):
        step.take(number)
    path = tmp_path / FILE
    whole = path.read_bytes()
    other = json.dumps(dict(lines_of(tmp_path)[0], stage="rl_zero")).encode() + b"\n"
    path.write_bytes(other + whole[:-40])               # killed in the last line of step 2
    assert [line["step"] for line in lines_of(tmp_path)][-1] == 2
    step.recorder = step.new_recorder(tmp_path)
    step.recorder.begin(2)
    assert path.read_bytes() == other + whole[:len(whole) - sum(len(json.dumps(line)) + 1 for line in lines_of_bytes(
        whole) if line["step"] == 2)]
    step.recorder = step.new_recorder(tmp_path)
    step.take(1)
    steps = [(line["stage"], line["step"]) for line in lines_of(tmp_path)]
    assert steps[0] == ("rl_zero", 0) and {number for stage, number in steps if stage == "rl"} == {0, 1}
    assert len(steps) == len({(*place, line["role"], line["prompt"]) for place, line in zip(steps, lines_of(tmp_path))})


def lines_of_bytes(data):
    return [json.loads(line) for line in data.splitlines()]


def test_the_file_stays_within_its_limit_and_keeps_the_whole_run_in_view(tmp_path):
    step = Step(tmp_path)
    step.take(0)
    of_one = (tmp_path / FILE).stat().st_size
    step.recorder.limit = int(5.5 * of_one)
    for number in range(1, 23):
        step.take(number)
        assert (tmp_path / FILE).stat().st_size <= step.recorder.limit
    lines = lines_of(tmp_path)
    every = step.recorder.every
    assert every in (4, 8) and {line["every"] for line in lines} == {every}
    assert sorted({line["step"] for line in lines}) == list(range(0, 23, every))
    step.recorder = step.new_recorder(tmp_path)         # resumed: as thin
    for number in range(23, 26):
        step.take(number)
    assert sorted({line["step"] for line in lines_of(tmp_path)}) == list(range(0, 26, every))


def test_a_step_larger_than_the_file_may_be_is_left_out_with_a_word(tmp_path, capsys):
    step = Step(tmp_path)
    step.recorder.limit = 1000
    step.take(0)
    step.take(1)
    assert not (tmp_path / FILE).exists() and capsys.readouterr().out.count("--inspect-mb") == 1


def test_only_every_nth_step_is_recorded_and_zero_records_none(tmp_path):
    step = Step(tmp_path / "some", inspect_every=2)
    (tmp_path / "some").mkdir()
    follow = step.recorder.follow
    asked = []
    step.recorder.follow = lambda: asked.append(step.recorder.step) or follow()
    for number in range(4):
        step.take(number)
    assert sorted({line["step"] for line in lines_of(tmp_path / "some")}) == asked == [0, 2]
    none = Step(tmp_path / "none", inspect_every=0)
    none.recorder.follow = None                         # and asks for nothing
    none.take(0)
    assert not (tmp_path / "none").exists()


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path):
    step = Step(tmp_path)
    step.recorder.begin(0)
    step.recorder.path = tmp_path / "absent" / FILE
    with pytest.raises(OSError, match="cannot write '.*rollouts.jsonl': No such file or directory; what was saved"):
        step.recorder.write(step.roll_out(SAMPLES, 0)[1])


# ---------------------------------------------------------------- runs

SHORT = ["--preset=tiny", "--clip-steps=2", "--align-steps=2", "--sft-steps=2", "--cot-steps=2", "--threads=1",
         "--device=cpu", "--rl-steps=4", "--rewards=length:1,format:0.1", "--gated=False"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint that RL starts from."""
    out = tmp_path_factory.mktemp("start") / "run"
    train.main([*SHORT, f"--out={out}", "--stage=clip,align,sft,cot"])
    return out / "cot.pt"


def rl(start, out, *flags):
    train.main([*SHORT, f"--out={out}", "--stage=rl", f"--init={start}", *flags])


def test_recording_changes_no_bit_of_a_run_and_none_of_its_counted_costs(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "compare_methods", lambda run: None)
    states = []
    capsys.readouterr()
    for every in (0, 1):
        rl(start, tmp_path / str(every), f"--inspect-every={every}", "--mini-batches=2")
        states.append(checkpoint.load(tmp_path / str(every) / "rl.pt"))
    without, recorded = states
    assert (tmp_path / "1" / FILE).exists() and not (tmp_path / "0" / FILE).exists()
    assert without["flops"] == recorded["flops"]
    assert all(torch.equal(value, recorded["vlm"][name]) for name, value in without["vlm"].items())
    out = capsys.readouterr().out
    said = re.findall(r"^  rl (\d): reward .* \(length .*, format .*\), flat .* tokens/s", out, re.M)
    assert said == ["0", "1", "2", "3"] * 2             # a line a step, recorded or not
    start_weights = checkpoint.load(start)["vlm"]
    assert any(not torch.equal(value, start_weights[name]) for name, value in without["vlm"].items())


def test_values_on_the_page_equal_those_recomputed_with_the_weights_of_their_step(start, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "compare_methods", lambda run: None)
    saved = []
    follow = train.followed

    def my_follow(run, name, cfg, vlm, *rest):
        saved.append({key: value.clone() for key, value in vlm.state_dict().items()})
        return follow(run, name, cfg, vlm, *rest)

    monkeypatch.setattr(train, "followed", my_follow)
    out = tmp_path / "run"
    rl(start, out, "--inspect-every=1")
    evaluation.main([f"--inspect={out}"])
    page = page_data(out / "inspect.html")
    state = checkpoint.load(out / "rl.pt")
    tok = tokenizer.from_saved(state["tokenizer"])
    compared = 0
    for line, group in zip(lines_of(out), page["groups"]):
        if line["step"] != 2:
            continue
        vlm = VLM.from_config(state["vlm_config"], dict(saved[2]))
        batch = prompts(vlm, tok, [sample_of(line)], state["method"], "brief")
        for completion in group["completions"]:
            ids = torch.tensor(completion["ids"])[None, None]
            with torch.no_grad():
                found = vlm(batch, ids)
            for name, value in (("sampled", found.logp), ("logp", found.logp), ("entropy", found.entropy)):
                if name in completion:
                    mine = torch.tensor(expanded(completion[name], ids.shape[-1]))
                    assert (mine - value[0, 0]).abs().max() < 1e-4
                    compared += 1
    assert compared > 20 and not torch.equal(saved[2]["llm.embed_tokens.weight"], saved[1]["llm.embed_tokens.weight"])


def page_data(path):
    """What a page is made from."""
    _, _, text = path.read_text().partition('<script type="application/json" id="data">')
    return json.loads(text.partition("</script>")[0])


@pytest.mark.slow
def test_a_run_killed_while_recording_leaves_a_page_and_once_resumed_the_same_lines(start, tmp_path):
    flags = ["--stage=rl", f"--init={start}", "--inspect-every=1", "--rl-steps=40", "--save-every=7", "--eval-greedy=1",
             "--eval-sampled=1"]
    root = Path(train.__file__).parent
    for name in ("whole", "killed"):
        command = [sys.executable, "train.py", *SHORT, f"--out={tmp_path / name}", *flags]
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while name == "killed" and process.poll() is None:
            path = tmp_path / name / FILE
            if path.exists() and len(read_log(path)) > 60:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.005)
        process.wait(300)
    killed = tmp_path / "killed"
    lines = lines_of(killed)
    assert 60 < len(lines) < len(lines_of(tmp_path / "whole"))
    evaluation.main([f"--inspect={killed}"])
    assert len(page_data(killed / "inspect.html")["groups"]) == len(lines)
    subprocess.run([sys.executable, "train.py", "--resume", f"--out={killed}"], cwd=root, check=True, timeout=300,
                   stdout=subprocess.DEVNULL)
    assert lines_of(killed) == lines_of(tmp_path / "whole")
