"""What post-training did to a model besides its accuracy: what it retained, how far it moved, what it does when begun.

    nats = caption_logp(vlm, tokenizer, samples, "brief")                       # mean log-prob of a caption's token
    found = divergence(Sampler(start), now, tokenizer, samples, "think", "brief", 32, generator)  # KL(start || now)
    texts = begun(Sampler(vlm), tokenizer, samples, ["<think> b2", ..], "think", "brief", 32)
    rows = probe(Sampler(vlm), Sampler(start), probes, asking)                  # all of it

Nothing here trains. Samplers are handed in, each with its model.
"""
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data import chat
from data.sample import collate
from model import parallel
from rl.report import generalisation
from rl.rollout import prompts

ROWS = 64                   # prompts, or captions, computed at once


@torch.no_grad()
def caption_logp(vlm, tokenizer, samples, template):
    """Mean log-prob, in nats a token, EOS included, of the samples' captions given their pictures; all tokens count
    alike."""
    total = 0.0
    tokens = 0
    for first in range(0, len(samples), ROWS):
        rows = []
        for sample in samples[first:first + ROWS]:
            rows.append(chat.encode_plain(sample, tokenizer, vlm.config.image_tokens, template))
        batch = collate(rows, tokenizer.pad_id, **vlm.config.pixels).to(vlm.llm.head.device)
        logp = vlm(batch).logp
        total += logp.sum().item()
        tokens += logp.numel()
    return total / tokens


@dataclass
class Divergence:
    """kl: KL(speaker || other), nats a completion, of each of n prompts; entropy: of the speaker, nats a token, mean
    over all tokens of the completions."""
    kl: list
    entropy: float


@torch.no_grad()
def divergence(sampler, other, tokenizer, samples, method, template, max_new, generator):
    """KL(speaker || other) -> Divergence. The speaker, the sampler's model, says one completion of each prompt at
    temperature 1; the divergence is exact over the vocabulary before every token of it, and summed over them.

    Its expectation is the divergence of the two models' distributions of completions, up to the budget `max_new` and to
    tokens that sampling bans, neither of which the models know of. Both models must have the same tokenizer.
    """
    speaker = sampler.vlm
    kl = []
    entropy = 0.0
    tokens = 0
    for first in range(0, len(samples), ROWS):
        batch = prompts(speaker, tokenizer, samples[first:first + ROWS], method, template)
        sampler.prefill(batch, 1, max_new)
        said = sampler.decode(max_new, tokenizer.eos_id, generator=generator, pad_id=tokenizer.pad_id,
                              banned=tokenizer.banned(speaker.config.llm.vocab))
        mine = speaker(batch, said.ids, mask=said.mask)
        theirs = other.states(prompts(other, tokenizer, samples[first:first + ROWS], method, template), said.ids)
        each = speaker.kl(mine.hidden, theirs, other, said.mask)                # (P, 1, C)
        kl += each.sum(-1).flatten().tolist()
        entropy += mine.entropy.sum().item()
        tokens += int(said.mask.sum())
    return Divergence(kl, entropy / tokens)


@torch.no_grad()
def begun(sampler, tokenizer, samples, beginnings, method, template, max_new):
    """Greedy completions that begin with a given text, which may be empty -> n texts, the beginnings included; max_new:
    tokens of each in all, of the beginning as well.

    A beginning must end where a token ends. Of several ranks each completes a part, and all return all texts.
    """
    texts = []
    at_once = ROWS * parallel.world()
    for first in range(0, len(samples), at_once):
        some = samples[first:first + at_once]
        own = parallel.own_rows(len(some))
        mine = []
        if some[own]:
            given = [tokenizer.encode(text) for text in beginnings[first:first + at_once][own]]
            mine = _begun_at_once(sampler, tokenizer, some[own], given, method, template, max_new)
        texts += parallel.chained(mine)
    return texts


def _begun_at_once(sampler, tokenizer, samples, given, method, template, max_new):
    """As `begun`, of samples that are completed side by side; given: the tokens of each beginning."""
    longest = max(map(len, given))
    batch = prompts(sampler.vlm, tokenizer, samples, method, template)
    device = batch.ids.device
    ids = torch.full((len(samples), 1, longest), tokenizer.pad_id, device=device)
    alive = torch.zeros(len(samples), 1, longest, dtype=torch.bool, device=device)
    for row, tokens in enumerate(given):
        ids[row, 0, :len(tokens)] = torch.tensor(tokens, device=device)
        alive[row, 0, :len(tokens)] = True
    left = torch.tensor([[max(1, max_new - len(tokens))] for tokens in given], device=device)
    most = int(left.max())
    sampler.prefill(batch, 1, longest + most)
    if longest:
        sampler.extend(ids, alive)
    said = sampler.decode(most, tokenizer.eos_id, temperature=0.0, pad_id=tokenizer.pad_id, limit=left,
                          banned=tokenizer.banned(sampler.vlm.config.llm.vocab))
    texts = []
    for tokens, row, kept in zip(given, said.ids[:, 0].cpu(), said.mask[:, 0].cpu()):
        texts.append(tokenizer.decode(tokens + row[kept].tolist()))
    return texts


# ---------------------------------------------------------------- all of it

@dataclass(frozen=True)
class Probes:
    """What is asked of post-training on a part of the questions, beside the splits.

    start: the method that all were trained from; parts: part -> prompts, on which models are compared; begun: kind of
    question -> (samples, the first words of a flawless completion of each); looking: questions that are answered at
    once; captioned: pictures with captions in reading order.
    """
    start: str
    parts: dict
    begun: dict
    looking: list
    captioned: list


@dataclass(frozen=True)
class Asking:
    """How models are asked: the tokenizer and method of the start, the template, the token budget."""
    tokenizer: Any
    method: str
    template: str
    max_new: int


def probe(sampler, start, probes, asking):
    """One model beside the start, each in its sampler -> rows (split, decoding, metric, value)."""
    tokenizer = asking.tokenizer
    asked = (asking.method, asking.template, asking.max_new)
    rows = []

    # 1. Retention: captions, and questions that are answered at once.
    logp = caption_logp(sampler.vlm, tokenizer, probes.captioned, asking.template)
    rows.append(dict(split="captions", decoding="log-prob", metric=generalisation.RETAINED, value=logp))
    unbegun = [""] * len(probes.looking)
    texts = begun(sampler, tokenizer, probes.looking, unbegun, "direct", asking.template, asking.max_new)
    rows.append(dict(split="looking", decoding="greedy", metric=generalisation.RETAINED,
                     value=share_right(probes.looking, texts)))

    # 2. How far it moved, on the prompts of each part.
    for part, samples in probes.parts.items():
        def compared(speaker, other):
            generator = torch.Generator(other.vlm.llm.head.device).manual_seed(1)
            return divergence(speaker, other.vlm, tokenizer, samples, *asked, generator)
        forward = compared(start, sampler)
        reverse = compared(sampler, start)
        found = {generalisation.FORWARD: np.mean(forward.kl), generalisation.REVERSE: np.mean(reverse.kl),
                 generalisation.ENTROPY: reverse.entropy}
        for metric, value in found.items():
            rows.append(dict(split=part, decoding="t1", metric=metric, value=float(value)))

    # 3. What it does once its thought has begun as a flawless one.
    for kind, (samples, beginnings) in probes.begun.items():
        texts = begun(sampler, tokenizer, samples, beginnings, *asked)
        rows.append(dict(split=kind, decoding="greedy", metric=generalisation.BEGUN,
                         value=share_right(samples, texts)))
    return rows


def share_right(samples, texts):
    """The share of samples whose text holds a right answer."""
    right = [chat.is_right(sample, chat.parse(text).answer) for sample, text in zip(samples, texts)]
    return float(np.mean(right))
