"""Prompting in stages against a slow loop over single sequences without a cache, scripted replies, counts by hand.

The slow loop asks `chat.encode` for the whole conversation, replies among Sample.turns, and computes it anew.
"""
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import eval as evaluation
from data import chat
from data.prompting import METHODS, Stage, budgets, opening
from data.sample import Sample
from model import generate as generation
from model.generate import Sampler
from rl.rollout import prompts
from rl.staged import answer_in_stages, stop_at
from test_flops import counted
from tiny import BOS, EOS, IMAGE, PAD, difference, make_vlm, picture, speak_for

WORDS = {3: "</answer>", 4: "</CONCLUSION>", 5: "<image>"}
START, END = 9, 10          # ChatML's tokens; a model with them may also end its turns by EOS


class Toy:
    """A tokenizer of 37 tokens, one a word: a reply among Sample.turns has the ids that were sampled."""
    pad_id, bos_id, eos_id, image_id = PAD, BOS, EOS, IMAGE

    def encode(self, text):
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text):
        ids = []
        spans = []
        at = 0
        for word in text.split():
            start = text.index(word, at)
            at = start + len(word)
            ids.append(self.number(word))
            spans.append((start, at))
        return ids, spans

    def number(self, word):
        for token, known in WORDS.items():
            if word == known:
                return token
        if word[0] == "w" and word[1:].isdigit():
            return int(word[1:])
        return 11 + sum(word.encode()) % 26

    def decode(self, ids):
        return "".join(" " + WORDS.get(i, f"w{i}") for i in ids if i > EOS and i not in (START, END))

    def special(self, name):
        return {"<|im_start|>": START, "<|im_end|>": END}[name]

    def banned(self, vocab):
        return (PAD, BOS, 5, START, END)         # Sample.turns may not hold <image>; scripted replies do


class EndsTurns(Toy):
    """As Qwen's chat models: the EOS is the token that ends a turn."""

    def special(self, name):
        return {"<|im_start|>": START, "<|im_end|>": EOS}[name]


TOY = Toy()


# One picture, none, two with a turn before, three; the prompts have other lengths.
SAMPLES = [Sample(id="a", images=(picture(0),), question="what", answer="two"),
           Sample(id="b", question="which of the two", answer="three"),
           Sample(id="c", images=(picture(1), picture(2)), turns=(("a <image> b", "yes"),), question="and <image> so",
                  answer="two"),
           Sample(id="d", images=(picture(3), picture(4), picture(5)), question="a b c d e f g", answer="three")]
PICTURES = 6


def model(dtype=torch.float64, often=0.0, seed=3):
    """often: how much all states speak for EOS and </answer>, so that replies end at other lengths."""
    vlm = make_vlm(dtype, seed=seed)
    if often:
        speak_for(vlm, range(EOS, 4), often)
    return vlm


class Watched(Sampler):
    """Notes, at the start of every reply, the rows' states, and the reply."""

    def __init__(self, vlm):
        super().__init__(vlm)
        self.replies = []       # (logits (R, V), Completions) of each stage

    def decode(self, *args, **options):
        logits = (self.state @ self.llm.head.T).flatten(0, 1)
        completions = super().decode(*args, **options)
        self.replies.append((logits, completions))
        return completions


def answered(vlm, stages, max_new, tok=TOY, samples=SAMPLES, template="brief", **options):
    """-> P lists of Staged, the sampler."""
    sampler = Watched(vlm)
    return answer_in_stages(sampler, tok, samples, stages, template, max_new, **options), sampler


# ---------------------------------------------------------------- a slow loop over single sequences

@torch.no_grad()
def logits_after(vlm, tok, sample, template, new):
    """Logits (n + 1, V) behind a prompt and each of n new tokens, one sequence, everything computed anew."""
    batch = prompts(vlm, tok, [sample], "direct", template)
    x = torch.cat([vlm.embed(batch), vlm.llm.embed_tokens(torch.tensor([new], dtype=torch.long))], dim=1)
    states = vlm.llm(x, torch.tensor([x.shape[1]]))[0][0]
    return states[-len(new) - 1:] @ vlm.llm.head.T


def conversations(tok, sample, stages, template, replies):
    """The Sample whose prompt stage number len(replies) answers; replies: ids of each."""
    texts = [tok.decode(reply).strip() for reply in replies]
    said = []
    asked = opening(sample, stages[0], template)
    for stage, text in zip(stages[1:], texts):
        said.append((stages[len(said)].name, text))
        if stage.sees == "all":
            words = stage.brief if template == "brief" else stage.instruction
            asked = replace(asked, turns=(*asked.turns, (asked.question, text)), question=words)
        else:
            asked = opening(sample, stage, template, said)
    return asked


def slow_greedy(vlm, tok, sample, stages, template, max_new):
    """-> ids of each reply."""
    replies = []
    for stage, limit in zip(stages, budgets(stages, max_new)):
        asked = conversations(tok, sample, stages, template, replies)
        reply = []
        while len(reply) < limit and reply[-1:] != [EOS] and not (stage.stop and stage.stop in tok.decode(reply)):
            logits = logits_after(vlm, tok, asked, template, reply)[-1]
            logits[list(tok.banned(0))] = float("-inf")
            reply.append(int(logits.argmax()))
        replies.append(reply)
    return replies


def replies_of(sampler, row):
    """Ids of each of a row's replies, as the sampler gave them."""
    found = []
    for _, completions in sampler.replies:
        mask = completions.mask.flatten(0, 1)[row]
        found.append(completions.ids.flatten(0, 1)[row][mask].tolist())
    return found


def put_in(tok, sample, stages, template, replies):
    """Tokens behind the first prompt that were not sampled, from the lengths of the whole conversations."""
    lengths = []
    for number in range(len(stages)):
        asked = conversations(tok, sample, stages, template, replies[:number])
        lengths.append(len(chat.encode(asked, tok, 9, "direct", template)[0]))
    ends_by_eos = template != "chatml" or isinstance(tok, EndsTurns)
    total = 0
    for number, stage in enumerate(stages[1:], 1):
        if stage.sees != "all":
            total += lengths[number]
            continue
        before = replies[number - 1]
        has_eos = before[-1] == EOS
        total += lengths[number] - lengths[number - 1] - (len(before) - has_eos)
        total -= has_eos and ends_by_eos
    return total


def check_counts(answer, tok, sample, stages, template, max_new, replies, happened):
    limits = budgets(stages, max_new)
    assert answer.tokens == sum(len(reply) for reply in replies) <= max_new
    assert all(len(reply) <= limit for reply, limit in zip(replies, limits))
    assert answer.appended == put_in(tok, sample, stages, template, replies)
    assert answer.text == tok.decode(replies[-1])
    assert answer.stages == {stage.name: tok.decode(reply).strip() for stage, reply in zip(stages, replies)}
    cut = False
    for number, (stage, reply) in enumerate(zip(stages, replies)):
        stopped = bool(stage.stop) and stage.stop in tok.decode(reply)
        kind = "EOS" if reply[-1] == EOS else "stop" if stopped else "budget"
        cut = cut or kind == "budget"
        happened[f"{kind} early" if number + 1 < len(stages) else f"{kind} at last"] += 1
        happened["at once"] += reply == [EOS] and number + 1 < len(stages)
    assert answer.cut == cut


CASES = [*[(name, "brief", Toy) for name in METHODS], ("stages", "vicuna_v1", Toy), ("ddcot", "llama_2", Toy),
         ("ccot", "llama_2", Toy), ("stages", "chatml", Toy), ("caption_first", "chatml", EndsTurns)]


@pytest.mark.parametrize("method, template, tokenizer", CASES)
def test_greedy_stages_on_the_cache_equal_the_same_text_from_scratch(method, template, tokenizer):
    tok, stages, vlm, max_new = tokenizer(), METHODS[method], model(often=2.0), 14
    answers, sampler = answered(vlm, stages, max_new, tok, template=template, group=2)
    happened = Counter()
    for p, sample in enumerate(SAMPLES):
        wanted = slow_greedy(vlm, tok, sample, stages, template, max_new)
        for g in range(2):
            replies = replies_of(sampler, p * 2 + g)
            assert replies == wanted
            check_counts(answers[p][g], tok, sample, stages, template, max_new, replies, happened)


# Every kind of end, in early and last stages: a stop text early too, which no method of METHODS has.
STOPS = (Stage("plan", "Plan.", "plan .", "</answer>", 0.4), Stage("look", "Look.", "look .", "", 0.3),
         Stage("conclusion", "Answer.", "so .", "</answer>", 0.3))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("stages, template", [
    (STOPS, "brief"), (STOPS, "chatml"), (METHODS["ddcot"], "brief"), (METHODS["ddcot"], "vicuna_v1")],
    ids=["stops", "stops chatml", "ddcot", "ddcot vicuna_v1"])
def test_logits_of_sampled_stages_equal_those_from_scratch(stages, template, dtype, tolerance):
    vlm, max_new, group = model(dtype, often=1.5), 19, 12
    answers, sampler = answered(vlm, stages, max_new, template=template, group=group, temperature=1.0,
                                generator=torch.Generator().manual_seed(15))
    happened = Counter()
    for row in range(len(SAMPLES) * group):
        sample = SAMPLES[row // group]
        replies = replies_of(sampler, row)
        check_counts(answers[row // group][row % group], TOY, sample, stages, template, max_new, replies, happened)
        for number, reply in enumerate(replies):
            asked = conversations(TOY, sample, stages, template, replies[:number])
            wanted = logits_after(vlm, TOY, asked, template, reply[:-1])
            at_start, completions = sampler.replies[number]
            assert difference(at_start[row], wanted[0]) < tolerance
            logp = wanted.log_softmax(-1).gather(1, torch.tensor(reply)[:, None])[:, 0]
            given = completions.logp.flatten(0, 1)[row, :len(reply)]
            assert difference(given, logp) < 2 * tolerance
    kinds = ["EOS early", "budget early", "EOS at last", "stop at last", "budget at last", "at once"]
    if stages == STOPS:
        kinds.append("stop early")
    assert all(happened[kind] for kind in kinds), happened


# ---------------------------------------------------------------- scripted replies

def scripted(monkeypatch, script):
    """The sampler draws these tokens: script[step] holds one for each row, (R,)."""
    steps = iter(script)

    def draw(logits, *args, **options):
        token = torch.tensor(next(steps)).view(logits.shape[:2])
        return token, torch.zeros(token.shape, dtype=logits.dtype), None
    monkeypatch.setattr(generation, "sample", draw)


def test_tokens_appended_and_cut_are_those_counted_by_hand(monkeypatch):
    # caption_first of 6 tokens, 3 a stage, brief. The next turn is EOS and "conclusion .", 3 tokens.
    # Replies: EOS at once, then the stop text at once; a word and EOS, then cut off; cut off, then EOS; EOS as the last
    # token that the budget has, then the stop text there.
    scripted(monkeypatch, [[2, 20, 20, 20], [PAD, 2, 21, 21], [PAD, PAD, 22, 2],
                           [3, 20, 2, 20], [PAD, 21, PAD, 21], [PAD, 22, PAD, 3]])
    answers, _ = answered(model(), METHODS["caption_first"], 6)
    rows = [answer for answer, in answers]
    assert [row.tokens for row in rows] == [2, 5, 4, 6]
    assert [row.appended for row in rows] == [2, 2, 3, 2]
    assert [row.cut for row in rows] == [False, True, True, False]
    assert [list(row.stages.items()) for row in rows] == [
        [("caption", ""), ("conclusion", "</answer>")],
        [("caption", "w20"), ("conclusion", "w20 w21 w22")],
        [("caption", "w20 w21 w22"), ("conclusion", "")],
        [("caption", "w20 w21"), ("conclusion", "w20 w21 </answer>")]]
    assert [row.text for row in rows] == [" </answer>", " w20 w21 w22", "", " w20 w21 </answer>"]


def test_a_new_conversation_counts_its_whole_prompt_and_answers_stand_beside_their_sample(monkeypatch):
    # ddcot of 3 tokens, group 2: each reply is one token. The second prompt: BOS, 9 image tokens, "what", the first
    # reply, "caption .", 14 in all, and 13 where the reply is EOS. Then EOS and "conclusion ." behind it, 3 more.
    scripted(monkeypatch, [[20, 2], [21, 22], [23, 3]])
    answers, _ = answered(model(), METHODS["ddcot"], 3, samples=SAMPLES[:1], group=2)
    [[first, second]] = answers
    assert first.stages == dict(steps="w20", caption="w21", conclusion="w23")
    assert second.stages == dict(steps="", caption="w22", conclusion="</answer>")
    assert (first.tokens, first.appended, first.cut) == (3, 14 + 3, True)
    assert (second.tokens, second.appended, second.cut) == (3, 13 + 3, True)


def test_a_reply_that_spells_the_placeholder_shows_no_picture(monkeypatch):
    scripted(monkeypatch, [[5], [20], [3]])
    [[answer]], _ = answered(model(), METHODS["ddcot"], 3, samples=SAMPLES[:1])
    assert answer.stages["steps"] == "<image>" and answer.appended == 15 + 3     # "< image>" is two words


def test_the_stop_text_is_found_across_tokens_and_only_where_it_was_just_said():
    class Letters(Toy):
        def decode(self, ids):
            return "".join(chr(i) for i in ids)
    said = ["no end", "the</b>", "</b", "x</b>y" + "z" * 9]
    tests = [stop_at(Letters(), "</b>")(torch.tensor([[ord(letter) for letter in text]])).tolist() for text in said]
    assert tests == [[False], [True], [False], [False]]


def test_fewer_tokens_than_stages_is_one_sentence():
    with pytest.raises(ValueError, match="^max_new=2 must be at least 3, one token for each stage of the prompting$"):
        answered(model(), METHODS["ddcot"], 2)


# ---------------------------------------------------------------- cost

@pytest.mark.parametrize("method", METHODS)
def test_the_meter_counts_what_is_executed(method):
    vlm = model(torch.float32, often=2.0)
    sampler = Sampler(vlm)
    executed = counted(lambda: answer_in_stages(
        sampler, TOY, SAMPLES, METHODS[method], "brief", 17, 3, 1.0, generator=torch.Generator().manual_seed(0)))
    assert executed == sampler.meter.total > 0


@pytest.mark.parametrize("method", METHODS)
def test_every_picture_is_encoded_once_whatever_the_group(method, monkeypatch):
    vlm = model(often=2.0)
    seen = []
    original = vlm.features
    monkeypatch.setattr(vlm, "features", lambda pixels: seen.append(len(pixels)) or original(pixels))
    answered(vlm, METHODS[method], 8, group=3)
    assert sum(seen) == PICTURES


# ---------------------------------------------------------------- in eval.py

@pytest.fixture
def loaded(monkeypatch):
    """eval.py finds this model behind any --checkpoint."""
    vlm = model(often=2.0)
    state = dict(stage="rl", method="think",
                 config=dict(template="brief", max_new=14, data="scenes", val_percent=20, seed=0))
    monkeypatch.setattr(evaluation, "load_any", lambda options: (vlm, TOY, state))
    monkeypatch.setattr(evaluation, "test_samples", lambda cfg, trained: {"id": SAMPLES})
    return vlm


def test_a_question_asked_in_stages_prints_each_reply_under_its_name(loaded, capsys):
    for name, stages in METHODS.items():
        evaluation.main(["--checkpoint=x.pt", "--ask=what", f"--prompting={name}"])
        [[answer]], _ = answered(loaded, stages, 14, samples=[Sample(question="what")])
        wanted = [f"{stage.name}: {answer.stages[stage.name]}" for stage in stages]
        assert capsys.readouterr().out.splitlines() == wanted


def test_tables_name_the_prompting_behind_the_stage(loaded, capsys):
    evaluation.main(["--checkpoint=x.pt", "--prompting=ccot", "--eval-samples=2"])
    said = capsys.readouterr().out
    for title in ("Accuracy, greedy", "Accuracy, T = 1"):
        table = said[said.index(title):].split("\n\n")[0]
        assert [line for line in table.splitlines() if line.startswith("rl+ccot  ")], table


def test_scores_of_a_prompting_judge_the_last_reply_and_count_the_tokens_of_all(loaded):
    options = evaluation.JudgeOptions(eval_greedy=4, eval_sampled=2, eval_samples=3, eval_batch=6)
    prompting = evaluation.Prompting("think", "brief", 14, METHODS["ccot"])
    scores = evaluation.evaluate(loaded, TOY, SAMPLES, prompting, options)
    answers, _ = answered(loaded, METHODS["ccot"], 14)
    rows = [answer for answer, in answers]
    raw = scores["greedy"]
    assert raw["text"] == [row.text for row in rows] and raw["before"] == [row.stages["graph"] for row in rows]
    assert raw["length"] == [[row.tokens] for row in rows] and raw["cut"] == [[int(row.cut)] for row in rows]
    assert np.shape(scores["t1"]["right"]) == (2, 3)


def test_a_prompting_and_a_method_are_one_sentence():
    with pytest.raises(ValueError) as caught:
        evaluation.main(["--checkpoint=x.pt", "--prompting=ccot", "--method=think"])
    assert str(caught.value) == "--prompting=ccot and --method=think both say how to ask; expected one of them"
