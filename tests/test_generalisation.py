"""Post-training on a part of the questions: what is measured, and the table that it ends in."""
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from data import scenes, tokenizer, transfer
from data.chat import encode_plain, target_text
from model.clip import ClipConfig
from model.generate import Sampler
from model.llama import LlamaConfig
from model.runs.config import change
from model.runs.presets import PRESETS
from model.vlm import VLM, VlmConfig
from rl import algorithms, measures
from rl.report import generalisation as report
from rl.rollout import prompts
from tiny import shake

PARTS = transfer.PARTS
BUDGET = 6


@pytest.fixture(scope="module")
def tok():
    texts = [" swap left right : what is at a1 ?"] * 4
    return tokenizer.train(texts, ["<think>", "</think>", "<answer>", "</answer>", *scenes.pieces(transfer.WORLD)], 400)


def model(tok, seed):
    config = VlmConfig(ClipConfig(image_size=48, patch=12, width=12, layers=2, heads=3, embed=7),
                       LlamaConfig(vocab=len(tok), width=24, layers=2, heads=4, kv_heads=2, ff=28, tied=False),
                       image_positions=True)
    torch.manual_seed(0)
    return shake(VLM(config), seed, 0.3).double()


@pytest.fixture(scope="module")
def samples():
    return scenes.load("train", 7, 1, world=transfer.WORLD)


# ---------------------------------------------------------------- what is measured

def logits_of(vlm, tok, sample, ids):
    """(n, V): before each of the tokens `ids`, the row by itself, nothing shared."""
    batch = prompts(vlm, tok, [sample], "think", "brief")
    text = int(batch.length[0])
    x = torch.cat([vlm.embed(batch), vlm.llm.embed_tokens(torch.tensor([ids]))], dim=1)
    hidden, _ = vlm.llm(x, torch.tensor([x.shape[1]]))
    return hidden[0, text - 1:-1] @ vlm.llm.head.T


@torch.no_grad()
def test_divergence_equals_a_loop_over_tokens_and_the_vocabulary(tok, samples, monkeypatch):
    speaker, other = model(tok, 1), model(tok, 2)
    # Some completions shall end early: the head speaks for EOS.
    states = speaker(prompts(speaker, tok, samples, "think", "brief"), torch.full((7, 1, 3), 5)).hidden.flatten(0, 2)
    speaker.llm.lm_head.weight[tok.eos_id] += 9 * states.mean(0) / states.mean(0).square().sum()
    monkeypatch.setattr(measures, "ROWS", 3)            # batches of three, three and one prompt
    said = []
    decode = Sampler.decode

    def remember(self, *args, **options):
        done = decode(self, *args, **options)
        for ids, mask in zip(done.ids[:, 0], done.mask[:, 0]):
            said.append(ids[mask].tolist())
        return done
    monkeypatch.setattr(Sampler, "decode", remember)
    found = measures.divergence(Sampler(speaker), other, tok, samples, "think", "brief", BUDGET,
                                torch.Generator().manual_seed(3))
    wanted = []
    entropies = []
    for sample, ids in zip(samples, said):
        p = logits_of(speaker, tok, sample, ids).log_softmax(-1).tolist()
        q = logits_of(other, tok, sample, ids).log_softmax(-1).tolist()
        total = 0.0
        for ours, theirs in zip(p, q):
            entropy = 0.0
            for one, another in zip(ours, theirs):
                total += math.exp(one) * (one - another)
                entropy -= math.exp(one) * one
            entropies.append(entropy)
        wanted.append(total)
    assert {len(ids) < BUDGET for ids in said} == {True, False} and len(said) == 7 and min(wanted) > 0.01
    assert found.kl == pytest.approx(wanted, rel=1e-9)
    assert found.entropy == pytest.approx(np.mean(entropies), rel=1e-9)


def test_a_model_is_nowhere_from_itself(tok, samples):
    vlm = model(tok, 1)
    found = measures.divergence(Sampler(vlm), vlm, tok, samples, "think", "brief", BUDGET, torch.Generator())
    assert found.kl == pytest.approx([0.0] * 7, abs=1e-12)


@torch.no_grad()
def test_a_captions_log_prob_is_the_mean_over_all_tokens_of_all_captions(tok, samples, monkeypatch):
    vlm = model(tok, 1)
    wanted = []
    for sample in samples:
        ids, mask, _ = encode_plain(sample, tok, vlm.config.image_tokens, "brief")
        target = [token for token, taught in zip(ids, mask) if taught]
        batch = prompts(vlm, tok, [sample], "direct", "brief")
        batch.ids = batch.ids[:, :len(ids) - len(target)]
        batch.length[:] = batch.ids.shape[1]
        x = torch.cat([vlm.embed(batch), vlm.llm.embed_tokens(torch.tensor([target]))], dim=1)
        hidden, _ = vlm.llm(x, torch.tensor([x.shape[1]]))
        logp = (hidden[0, len(ids) - len(target) - 1:-1] @ vlm.llm.head.T).log_softmax(-1)
        wanted += [logp[place, token].item() for place, token in enumerate(target)]
    monkeypatch.setattr(measures, "ROWS", 3)
    assert measures.caption_logp(vlm, tok, samples, "brief") == pytest.approx(np.mean(wanted), rel=1e-9)


@torch.no_grad()
def test_a_begun_completion_goes_on_greedily_from_what_it_was_given(tok, samples, monkeypatch):
    vlm = model(tok, 1)
    monkeypatch.setattr(measures, "ROWS", 3)
    beginnings = ["<think> b2", "<think> red circle b2", "<think> zero"] * 2 + ["<think>"]      # of different lengths
    texts = measures.begun(Sampler(vlm), tok, samples, beginnings, "think", "brief", BUDGET)
    for sample, beginning, text in zip(samples, beginnings, texts):
        ids = tok.encode(beginning)
        while len(ids) < BUDGET:
            logits = logits_of(vlm, tok, sample, [*ids, 0])[-1]
            logits[list(tok.banned(len(tok)))] = -torch.inf
            ids.append(int(logits.argmax()))
            if ids[-1] == tok.eos_id:
                break
        assert text == tok.decode(ids) and text.startswith(beginning)


def test_a_probe_tells_start_from_now_and_judges_what_the_trained_model_says(tok, samples, monkeypatch):
    start, now = model(tok, 1), model(tok, 2)
    judged = []

    def begun(sampler, tokenizer, asked, beginnings, method, template, max_new):
        """One completion of three is right if looked at, two of two if begun."""
        judged.append((sampler.vlm, method, beginnings))
        said = [sample.answer if beginning or i == 0 else "nothing" for i, (sample, beginning)
                in enumerate(zip(asked, beginnings))]
        return [f"{beginning} </think><answer> {answer}</answer>" for beginning, answer in zip(beginnings, said)]
    monkeypatch.setattr(measures, "begun", begun)
    probes = measures.Probes("cot", dict(walks=samples[:3]), dict(at=(samples[:2], ["<think> b2", "<think> a1"])),
                             looking=samples[2:5], captioned=samples[5:])
    rows = measures.probe(Sampler(now), Sampler(start), probes, measures.Asking(tok, "think", "brief", BUDGET))
    found = {(row["split"], row["metric"]): row["value"] for row in rows}

    def told(speaker, other):
        return measures.divergence(Sampler(speaker), other, tok, samples[:3], "think", "brief", BUDGET,
                                   torch.Generator().manual_seed(1))
    there, back = told(start, now), told(now, start)
    assert abs(np.mean(there.kl) - np.mean(back.kl)) > 0.01 and abs(there.entropy - back.entropy) > 0.01
    assert found["walks", report.FORWARD] == pytest.approx(np.mean(there.kl))
    assert found["walks", report.REVERSE] == pytest.approx(np.mean(back.kl))
    assert found["walks", report.ENTROPY] == pytest.approx(back.entropy)
    assert found["captions", report.RETAINED] == pytest.approx(measures.caption_logp(now, tok, samples[5:], "brief"))
    assert (found["looking", report.RETAINED], found["at", report.BEGUN]) == (pytest.approx(1 / 3), 1.0)
    assert judged == [(now, "direct", ["", "", ""]), (now, "think", ["<think> b2", "<think> a1"])] and len(rows) == 6


# ---------------------------------------------------------------- the table, by hand

def raw(*right, answer=()):
    """Raw scores of a decoding: a prompt a number, two completions each, so many of them right."""
    answers = answer or [["x", "x"]] * len(right)
    return dict(right=[[int(n > 0), int(n > 1)] for n in right], answer=answers)


def made_up():
    """Scores of three methods on two prompts a split: shares of .5 (start) and others."""
    def of(at, count, walk1, walk2, mirrored):
        found = dict(at=at, count=count, walk1=walk1, walk2=walk2)
        splits = {kind: {"t1": raw(*right)} for kind, right in found.items()}
        return splits | {"mirrored": {"t1": mirrored}}
    old = raw(0, 1, answer=[["left", "left"], ["right", "left"]])
    return {"teacher": {"at": {"t1": raw(1, 1)}},
            "cot": of((1, 1), (1, 1), (1, 1), (0, 0), old),
            "rl_walks": of((1, 0), (2, 2), (2, 2), (1, 0), raw(2, 2)),
            "gold_looks@0.5": of((2, 2), (1, 1), (0, 0), (0, 0), raw(0, 0))}


def found_rows(seed=3):
    measured = {name: [] for name in ("cot", "rl_walks", "gold_looks@0.5")}
    measured["cot"] = [dict(split="captions", decoding="log-prob", metric=report.RETAINED, value=-0.5)]
    return report.rows(made_up(), measured, {"mirrored": ["left", "left"]}, dict(at=0.1), "cot", PARTS, seed)


def value_of(rows, method, split, metric):
    [value] = [row["value"] for row in rows if (row["method"], row["split"], row["metric"]) == (method, split, metric)]
    return value


def test_gain_and_forgetting_are_means_over_kinds_of_differences_to_the_start():
    rows = found_rows()
    # walks: .5 -> 1 and 0 -> .25; at: .5 -> .25, count: .5 -> 1
    assert value_of(rows, "rl_walks", "walks", "gain") == (0.5 + 0.25) / 2
    assert value_of(rows, "rl_walks", "walks", "forgetting") == (0.25 - 0.5) / 2
    assert value_of(rows, "rl_walks", "at", "change") == -0.25
    # at: .5 -> 1, count as before; walk1: .5 -> 0
    assert value_of(rows, "gold_looks@0.5", "looks", "gain") == 0.25
    assert value_of(rows, "gold_looks@0.5", "looks", "forgetting") == 0.25
    assert {row["method"] for row in rows if row["metric"] == "gain"} == {"rl_walks", "gold_looks@0.5"}
    assert {row["seed"] for row in rows} == {3}


def test_an_answer_under_the_old_rule_is_counted_beside_and_never_as_right():
    rows = found_rows()
    assert value_of(rows, "cot", "mirrored", report.NEW_RULE) == 0.25
    assert value_of(rows, "cot", "mirrored", report.OLD_RULE) == 0.75
    assert value_of(rows, "rl_walks", "mirrored", report.OLD_RULE) == 0


def test_every_method_stands_in_the_table_of_its_part_and_the_start_in_both():
    text = report.generalisation_text(found_rows(), PARTS)
    walks, looks = (text[text.index(f"Trained on {part}"):].split("\n\n")[0] for part in PARTS)
    for table, inside, outside in ((walks, "rl_walks", "gold_looks"), (looks, "gold_looks@0.5", "rl_walks")):
        assert inside in table and "cot" in table and outside not in table
        assert "always the commonest answer: at 0.100" in table
    assert "0.375" in walks and "-0.125" in walks
    assert "teacher" not in text


def test_arms_of_a_part_are_compared_with_rl_on_it_seed_by_seed():
    rows = []
    for seed, rl, arm in ((0, 0.5, 0.4), (1, 0.6, 0.4), (2, 0.7, 0.4)):
        for method, value in (("rl_walks", rl), ("gold_walks", arm), ("rl_looks", 0.9)):
            part = method.rpartition("_")[2]
            rows.append(dict(method=method, split=part, decoding="t1", metric="gain", value=value, seed=seed))
            rows.append(dict(method=method, split="mirrored", decoding="t1", metric=report.NEW_RULE, value=1 - value,
                             seed=seed))
    title, head, *lines = report.against_rl(rows, PARTS).splitlines()
    assert "over 3 seeds" in title and "these 2 is" in title and head.split() == ["gain", "mirrored:", "new"]
    # -.1, -.2, -.3: mean -.2, half 4.30265 x .1 / sqrt(3) = .248
    assert lines == ["gold_walks  -20.0 [-44.8, +4.8]    +20.0 [-4.8, +44.8]  "]
    assert report.against_rl([row for row in rows if row["method"] == "gold_walks"], PARTS) == ""


def test_a_methods_name_tells_arm_part_and_rate():
    assert report.trained_on("rl_kl_walks@0.001", PARTS) == ("rl_kl", "walks", 0.001)
    assert report.trained_on("rl_looks[kl_coef=0.1]", PARTS) == ("rl[kl_coef=0.1]", "looks", None)
    assert report.trained_on("cot", PARTS) == ("cot", "", None)


def test_the_picture_is_drawn_with_and_without_rates_and_over_seeds():
    pytest.importorskip("matplotlib")
    assert report.picture(found_rows(), PARTS).startswith(b"\x89PNG")
    assert report.picture([*found_rows(0), *found_rows(1)], PARTS).startswith(b"\x89PNG")


# ---------------------------------------------------------------- the arms

def test_records_of_a_replay_have_the_share_that_was_asked_for_and_a_method_of_their_own():
    def drawn(purpose, count, stream):
        return scenes.load(purpose, count, 5)
    run = SimpleNamespace(samples=drawn)
    records = [(sample, "<think> a1</think>") for sample in scenes.load("train", 30, 1)]
    cfg = change(train.Config(), replay=0.25)
    mixed = [train.Record(*record) for record in train.with_replay(run, cfg, records, "replay")]
    captions = [record for record in mixed if record.target is None]
    looks = [record for record in mixed if record.method == "direct"]
    assert (len(mixed), len(captions), len(looks)) == (40, 5, 5)
    for record in looks:
        assert record.target == target_text(record.sample.answer)
    assert train.with_replay(run, train.Config(), records, "replay") is records


def test_a_record_is_asked_by_its_own_method_and_else_by_that_of_the_stage(tok, samples):
    def asked(record):
        ids, mask, _ = record.encoded(tok, 16, "think", "brief")
        return tok.decode([token for token, taught in zip(ids, mask) if not taught and token != tok.image_id])
    for method in ("think", "direct"):
        own = asked(train.Record(samples[0], "<answer> two</answer>", "" if method == "think" else method))
        assert own.endswith("think .") == (method == "think")
    assert asked(train.Record(samples[0], None)) == ""


def test_every_arm_of_a_part_starts_from_cot_and_gets_the_flops_of_its_parts_rl():
    for part in PARTS:
        for name in train.COMPARISONS["generalisation"]:
            if name.endswith(part):
                stage = train.STAGES[name]
                assert stage.starts_from == ("cot",)
                assert stage.costs_like == (() if name == f"rl_{part}" else (f"rl_{part}",))
    assert set(algorithms.OF_PARTS) < set(train.COMPARISONS["generalisation"])
    assert {part for part, _ in algorithms.OF_PARTS.values()} == set(transfer.PARTS)
    cfg = change(train.Config(), **PRESETS["generalisation"])
    assert algorithms.labels(cfg, cfg.stages())["rl_kl_looks"] == "rl_kl_looks"
    kl = [train.config_of(cfg, name).algorithm.kl_coef for name in ("rl_walks", "rl_kl_walks", "rl_kl_looks")]
    assert kl == [0, 0.04, 0.04]


@pytest.mark.parametrize("options, named", [
    (dict(compare="generalisation", stage="cot"), "--compare=generalisation must come with drawn scenes and --world"),
    (dict(stage="rl_looks"), "--stage=rl_looks must come with drawn scenes and --world=transfer"),
    (dict(compare="generalisation", world="transfer", cot_format="llava_cot"), "--cot-format=llava_cot"),
    (dict(data="jsonl:x", replay=0.5), "--replay=0.5"),
    (dict(compare="generalisation", world="transfer", algorithm="grpo"), "--algorithm=grpo must be grpo_token"),
    (dict(world="transfer", tune="cot", seed=100, eval_set="val"), "--tune=cot must name stages that learn"),
    (dict(world="transfer", tune="rl_looks,rl", stage="cot,rl,rl_looks", seed=100, eval_set="val"),
     "--tune=rl_looks,rl must name stages that learn from a part of the questions with --world=transfer; 'rl' does")])
def test_options_that_do_not_go_together_are_refused_in_one_sentence(options, named):
    with pytest.raises(ValueError) as error:
        change(train.Config(), **options).check()
    assert str(error.value).startswith(named) and "\n" not in str(error.value)


# ---------------------------------------------------------------- from the command line

def tiny(out, *argv):
    """What train.py prints in a run of seconds."""
    given = [f"--{name.replace('_', '-')}={value}" for name, value in PRESETS["tiny"].items()]
    done = subprocess.run([sys.executable, train.__file__, "--preset=generalisation", *given, "--threads=1",
                           f"--out={out}", *argv], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_tiny_run_trains_every_arm_and_leaves_every_row(tmp_path):
    out = tmp_path / "run"
    said = tiny(out, "--seed=3")
    arms = train.COMPARISONS["generalisation"]
    rows = json.loads((out / "generalisation.json").read_text())
    assert {row["method"] for row in rows} == {"cot", report.GUESS, *arms}
    assert all({*row} == {"method", "split", "decoding", "metric", "value", "seed"} for row in rows)
    for name in ("cot", *arms):
        own = {(row["split"], row["decoding"], row["metric"]) for row in rows if row["method"] == name}
        _, part, _ = report.trained_on(name, PARTS)
        wanted = {("captions", "log-prob", report.RETAINED), ("looking", "greedy", report.RETAINED)}
        wanted |= {(kind, "greedy", report.BEGUN) for kind in transfer.KINDS}
        wanted |= {(of, "t1", metric) for of in PARTS for metric in (report.FORWARD, report.REVERSE, report.ENTROPY)}
        for decoding in ("greedy", "t1"):
            for rule in transfer.RULES:
                wanted |= {(rule, decoding, report.NEW_RULE), (rule, decoding, report.OLD_RULE)}
            if part:
                wanted |= {(part, decoding, "gain"), (part, decoding, "forgetting")}
                wanted |= {(kind, decoding, "change") for kind in transfer.KINDS}
        assert own == wanted, name
        assert f"measured {name} " in said
    assert {row["value"] for row in rows if row["method"] == "cot" and row["metric"] == report.FORWARD} == {0.0}
    flops = {name: train.checkpoint.load(out / f"{name}.pt")["flops"] for name in arms}
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for name, spent in flops.items():
        _, part, _ = report.trained_on(name, PARTS)
        behind = [line["flops"] for line in lines if line["stage"] == name]
        step = max(np.diff(behind), default=0)
        assert 0.5 * flops[f"rl_{part}"] < spent <= flops[f"rl_{part}"] + step, name
    assert (out / "generalisation.png").read_bytes().startswith(b"\x89PNG")
    assert "Trained on walks" in said and "Skill and habit" in said


@pytest.mark.slow
def test_a_ladder_of_rates_is_judged_by_the_arms_part_and_ends_in_the_same_rows(tmp_path):
    out = tmp_path / "run"
    said = tiny(out, "--seed=100", "--eval-set=val", "--tune=continued_looks", "--compare=generalisation")
    rungs = json.loads((out / "ladder.json").read_text())
    assert {row["split"] for row in rungs} == {"looks"}
    rows = json.loads((out / "generalisation.json").read_text())
    gains = {row["method"] for row in rows if row["metric"] == "gain"}
    assert gains == {f"continued_looks@{row['rate']:g}" for row in rungs}
    assert "Trained on looks" in said and json.loads((out / "results.json").read_text())
