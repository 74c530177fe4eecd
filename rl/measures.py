"""What post-training did to a model besides its accuracy: what it retained, how far it moved, what it does when begun.

    nats = caption_logp(vlm, tokenizer, samples, "brief")                       # mean log-prob of a caption's token
    found = divergence(Sampler(start), now, tokenizer, samples, "think", "brief", 32, generator)  # KL(start || now)
    texts = begun(Sampler(vlm), tokenizer, samples, ["<think> b2", ..], "think", "brief", 32)

Nothing here trains. Samplers are handed in, each with its model.
"""
from dataclasses import dataclass

import torch

from data.chat import encode_plain
from data.sample import collate
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
            rows.append(encode_plain(sample, tokenizer, vlm.config.image_tokens, template))
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
        mine = speaker(batch, said.ids)
        theirs = other.states(prompts(other, tokenizer, samples[first:first + ROWS], method, template), said.ids)
        each = speaker.kl(mine.hidden, theirs, other)                           # (P, 1, C)
        kl += torch.where(said.mask, each, 0).sum(-1).flatten().tolist()
        entropy += torch.where(said.mask, mine.entropy, 0).sum().item()
        tokens += int(said.mask.sum())
    return Divergence(kl, entropy / tokens)


@torch.no_grad()
def begun(sampler, tokenizer, samples, beginnings, method, template, max_new):
    """Greedy completions that begin with a given text -> n texts, the beginnings included; max_new: tokens of each in
    all, of the beginning as well.

    A beginning must end where a token ends.
    """
    texts = []
    for first in range(0, len(samples), ROWS):
        some = samples[first:first + ROWS]
        given = [tokenizer.encode(text) for text in beginnings[first:first + ROWS]]
        longest = max(map(len, given))
        batch = prompts(sampler.vlm, tokenizer, some, method, template)
        device = batch.ids.device
        ids = torch.full((len(some), 1, longest), tokenizer.pad_id, device=device)
        alive = torch.zeros(len(some), 1, longest, dtype=torch.bool, device=device)
        for row, tokens in enumerate(given):
            ids[row, 0, :len(tokens)] = torch.tensor(tokens, device=device)
            alive[row, 0, :len(tokens)] = True
        left = torch.tensor([[max(1, max_new - len(tokens))] for tokens in given], device=device)
        most = int(left.max())
        sampler.prefill(batch, 1, longest + most)
        sampler.extend(ids, alive)
        said = sampler.decode(most, tokenizer.eos_id, temperature=0.0, pad_id=tokenizer.pad_id, limit=left,
                              banned=tokenizer.banned(sampler.vlm.config.llm.vocab))
        for tokens, row, kept in zip(given, said.ids[:, 0].cpu(), said.mask[:, 0].cpu()):
            texts.append(tokenizer.decode(tokens + row[kept].tolist()))
    return texts
