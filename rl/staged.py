"""Prompting in stages: several questions to a model about each sample, on one cache where that is possible.

    stages = METHODS["ccot"]
    answers = answer_in_stages(Sampler(vlm), tokenizer, samples, stages, "vicuna_v1", max_new=256)
    answers[0][0].text, answers[0][0].stages["graph"]

The first stage's prompt is prefilled. A later turn is appended to the cache by `Sampler.extend`: the picture and what
was said are never computed again. The sampler is handed in, as in rl/rollout.py, and its meter counts the FLOPs.

Shapes: P samples, G answers to each; R = P G rows, the G answers of a sample side by side; C tokens of a reply.
"""
from dataclasses import asdict, dataclass, field

import torch

from data.prompting import budgets, next_turn, opening
from model import parallel
from rl.rollout import prompts


@dataclass
class Staged:
    """One answer in stages.

    text: the last stage's reply, which chat.parse judges.
    stages: {name: reply} of all stages, in order.
    tokens: sampled in all stages, each EOS included.
    appended: tokens put in after the first prompt that were not sampled: ends of turns and questions; of a later
        new conversation its whole prompt.
    cut: whether a reply used up its stage's budget without an end.
    """
    text: str = ""
    stages: dict = field(default_factory=dict)
    tokens: int = 0
    appended: int = 0
    cut: bool = False


def answer_in_stages(sampler, tokenizer, samples, stages, template, max_new, group=1, temperature=0.0, top_k=0,
                     top_p=1.0, generator=None):
    """Asks P samples in stages (a value of data.prompting.METHODS) -> P lists of `group` Staged.

    max_new: tokens that all stages of an answer may sample together; a stage that is cut off is closed all the same.
    temperature 0 is greedy; top_k, top_p as in kernels.sample. ValueError when max_new is fewer than the stages. Of
    several ranks each asks a part of the samples, the same as one process would, and all return all answers.
    """
    limits = budgets(stages, max_new)
    own = parallel.own_rows(len(samples))
    noise = [None] * len(stages)
    if temperature:             # of all samples, since a rank must leave the generator as the others do
        noise = [sampler.noise((len(samples), group), limit, generator)[own] for limit in limits]
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, pad_id=tokenizer.pad_id,
                    banned=tokenizer.banned(sampler.llm.config.vocab))
    answers = []
    for _ in samples[own]:
        answers.append([Staged() for _ in range(group)])
    if answers:
        _answer(sampler, tokenizer, samples[own], stages, template, limits, noise, answers, sampling)
    if parallel.world() == 1:
        return answers
    of_all = parallel.chained([[asdict(answer) for answer in answers_of_one] for answers_of_one in answers])
    return [[Staged(**answer) for answer in answers_of_one] for answers_of_one in of_all]


def _answer(sampler, tokenizer, samples, stages, template, limits, noise, answers, sampling):
    """Asks P samples in stages, and notes the replies in `answers`, P lists of G Staged. limits, noise (P, G, limit):
    of each stage; sampling: options of Sampler.decode."""
    group = len(answers[0])
    rows = [answer for answers_of_one in answers for answer in answers_of_one]
    ids = mask = None
    for number, stage in enumerate(stages):
        later = stages[number + 1:]
        # 1. A new conversation, or a later turn of the one there is.
        if number == 0 or stage.sees != "all":
            capacity = _capacity(tokenizer, stages[number:], limits[number:], template)
            _open(sampler, tokenizer, samples, stage, template, rows, group, capacity)
        else:
            _append(sampler, tokenizer, next_turn(tokenizer, stage, template), rows, ids, mask)
        # 2. The reply. Rows may be dropped only where nothing is appended to them afterwards.
        drop = not later or later[0].sees != "all"
        stop = stop_at(tokenizer, stage.stop) if stage.stop else None
        completions = sampler.decode(limits[number], tokenizer.eos_id, drop=drop, stop=stop, noise=noise[number],
                                     **sampling)
        ids = completions.ids.flatten(0, 1)                                 # (R, C)
        mask = completions.mask.flatten(0, 1)
        # 3. What it says.
        _read(tokenizer, stage, rows, ids, mask)


def _capacity(tokenizer, stages, limits, template):
    """Slots that a row needs for the conversation that the first of these stages opens: its replies, and the turns
    between them."""
    capacity = limits[0]
    for stage, limit in zip(stages[1:], limits[1:]):
        if stage.sees != "all":
            break
        capacity += len(next_turn(tokenizer, stage, template)) + limit
    return capacity


def _open(sampler, tokenizer, samples, stage, template, rows, group, capacity):
    """Prefills a new conversation: of the P samples before anything was said, else of the R rows, one prompt each."""
    said = bool(rows[0].stages)
    asked = []
    for p, sample in enumerate(samples):
        if not said:
            asked.append(opening(sample, stage, template))
            continue
        for answer in rows[p * group:(p + 1) * group]:
            asked.append(opening(sample, stage, template, answer.stages.items()))
    vlm = sampler.vlm
    batch = prompts(vlm, tokenizer, asked, "direct", template)
    if not said:
        sampler.prefill(batch, group, capacity)
        return
    # The pictures are encoded once a sample, not once a row.
    every = torch.arange(len(asked), device=batch.ids.device)
    once = vlm.encode(batch.rows(every[::group]))
    if len(once.features):
        sampler.meter.encode(vlm, len(once.pixels))
        batch.features = once.rows(every // group).features
    sampler.prefill(batch, 1, capacity)
    for answer, length in zip(rows, batch.length.tolist()):
        answer.appended += length


def _append(sampler, tokenizer, turn, rows, ids, mask):
    """Puts the end of the last reply and the next question behind every row's cache.

    turn: ids, the same for all rows; ids, mask (R, C): the last reply. A row's cache holds all of it but the last
    token. If that is EOS, the turn's own end stands for it; else it has to be put in first, and rows that need no
    such token get a hole.
    """
    length = mask.sum(-1)                                                   # (R,), at least 1
    last = ids.gather(1, length[:, None] - 1)                               # (R, 1)
    ended = last[:, 0] == tokenizer.eos_id
    question = torch.tensor(turn, device=ids.device).expand(len(ids), -1)
    put = torch.cat([last, question], dim=1)                                # (R, 1 + n)
    alive = torch.ones_like(put, dtype=torch.bool)
    alive[:, 0] = ~ended
    P, G = sampler.position.shape
    sampler.extend(put.view(P, G, -1), alive.view(P, G, -1))
    for answer, its_end in zip(rows, ended.tolist()):
        says_it = its_end and turn[0] == tokenizer.eos_id
        answer.appended += len(turn) - int(says_it)


def stop_at(tokenizer, text):
    """A test for Sampler.decode: which rows (R, t) of ids have just said `text`."""
    # A token is a byte or more, so that no more of the last ones can hold it; one more than that, because
    # sentencepiece drops a space in front.
    recent = len(text.encode()) + 1

    def test(ids):
        said = [text in tokenizer.decode(row) for row in ids[:, -recent:].tolist()]
        return torch.tensor(said, dtype=torch.bool)
    return test


def _read(tokenizer, stage, rows, ids, mask):
    """Notes a stage's replies (R, C) down in the rows' answers."""
    for answer, its_ids, kept in zip(rows, ids.cpu(), mask.cpu()):
        its_ids = its_ids[kept].tolist()
        text = tokenizer.decode(its_ids)
        has_end = its_ids[-1] == tokenizer.eos_id
        if stage.stop:
            has_end = has_end or stage.stop in text
        answer.text = text
        answer.stages[stage.name] = text.strip()
        answer.tokens += len(its_ids)
        answer.cut = answer.cut or not has_end
