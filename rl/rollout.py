"""Rollouts: completions of prompts, read and rewarded. The sampler is handed in.

    batch, rollout = roll_out(Sampler(vlm, meter), tokenizer, samples, "think", cfg, rewards, generator, clock)
"""
from dataclasses import dataclass

import torch

from data.chat import encode
from data.sample import Batch, collate
from model import parallel, sharding
from model.runs.config import check_fields, need, number
from rl.types import Rollout


@dataclass(frozen=True)
class SamplingOptions:
    """how completions are sampled"""
    group: int = number(8, "[1, 10000]")            # completions of each prompt
    temperature: float = number(1.0, "[0.01, 100]")  # of sampling and of the log-probs; colder is greedy
    top_k: int = number(0, "[0, 1000000]")          # only so many most probable tokens are sampled; 0: all
    top_p: float = number(1.0, "(0, 1]")            # only the most probable tokens of this mass are sampled
    max_new: int = number(32, "[1, 131072]")        # token budget, the same in training and evaluation
    min_new: int = number(0, "[0, 131072]")         # no EOS before this many tokens
    rollout_rows: int = number(0, "[0, 1000000]")   # completions sampled at a time; 0: as many as memory has room for

    def __post_init__(self):
        check_fields(self)
        need(self.min_new <= self.max_new, "min_new", self.min_new, f"not exceed --max-new={self.max_new}")


def prompts(vlm, tokenizer, samples, method, template):
    """Samples -> Batch of prompts, on the model's device."""
    rows = [encode(sample, tokenizer, vlm.config.image_tokens, method, template) for sample in samples]
    return collate(rows, tokenizer.pad_id, **vlm.config.pixels).to(vlm.llm.head.device)


def read(completions, tokenizer):
    """Completions with ids, mask (P, G, C) -> P lists of G texts."""
    texts = []
    for ids, mask in zip(completions.ids.cpu(), completions.mask.cpu()):
        texts.append([tokenizer.decode(row[kept].tolist()) for row, kept in zip(ids, mask)])
    return texts


def roll_out(sampler, tokenizer, samples, method, cfg, rewards, generator, clock):
    """Samples cfg.sampling.group completions of each sample and rewards them -> (Batch, Rollout).

    The batch keeps its encoded pictures, so that the update need not encode them again, unless the image tower trains.
    clock: a metrics.Clock, which gets the laps encode, prefill, decode, score. Of several ranks each samples and
    rewards its own part of the samples, the same tokens as one process would, and all return the whole.
    """
    vlm = sampler.vlm
    sampling = cfg.sampling
    own = parallel.own_rows(len(samples))
    # With fewer samples than ranks some have none: they sample one whose row is another rank's.
    asked = samples[own] or samples[:1]
    batch = prompts(vlm, tokenizer, asked, method, cfg.data.template)
    vlm.encode(batch)
    if len(batch.features):
        sampler.meter.encode(vlm, len(batch.pixels))
    clock.lap("encode")
    with sharding.whole(vlm):
        completions = sampler.complete(
            batch, sampling.group, sampling.max_new, tokenizer.eos_id, generator, sampling.rollout_rows, clock.lap,
            temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p,
            banned=tokenizer.banned(vlm.config.llm.vocab), min_new=sampling.min_new, pad_id=tokenizer.pad_id,
            place=(min(own.start, len(samples) - 1), len(samples)))
    rollout = read_and_reward(completions, asked, tokenizer, rewards)
    if parallel.world() > 1:
        batch, rollout = gathered(batch, rollout, samples, own.stop - own.start)
    clock.lap("score")
    return batch, rollout


def gathered(batch, rollout, samples, count):
    """This rank's Batch and Rollout, of which the first `count` prompts count -> those of all ranks, on each of them;
    samples: of all ranks."""
    batch = batch.rows(torch.arange(count, device=batch.ids.device))
    texts = parallel.chained(rollout.texts[:count])
    parts = {f"part {name}": part for name, part in rollout.parts.items()}
    tensors = {}
    for name, tensor in ({name: getattr(rollout, name) for name in Rollout.TENSORS} | parts).items():
        tensors[name] = tensor[:count]
    batches = [Batch(**found) for found in parallel.exchange(vars(batch))]
    rollouts = []
    for found in parallel.exchange(tensors):
        of_rank = {name: found[name] for name in Rollout.TENSORS}
        rollouts.append(Rollout(**of_rank, parts={name: found[f"part {name}"] for name in rollout.parts}))
    whole = Rollout.join([found for found in rollouts if len(found.ids)])
    whole.samples = list(samples)
    whole.texts = texts
    return Batch.join([found for found in batches if len(found.ids)]), whole


def read_and_reward(completions, samples, tokenizer, rewards):
    """Sampled completions of P samples -> Rollout with texts and rewards, on the completions' device."""
    device = completions.ids.device
    texts = read(completions, tokenizer)
    lengths = completions.mask.sum(-1).cpu()
    parts, per_reward = rewards.score(samples, texts, lengths)
    return Rollout(
        ids=completions.ids,
        mask=completions.mask,
        logp=completions.logp,
        ended=((completions.ids == tokenizer.eos_id) & completions.mask).any(-1),
        samples=list(samples),
        texts=texts,
        parts={name: part.to(device) for name, part in parts.items()},
        rewards=per_reward.to(device),
        reward=rewards.total(per_reward).to(device))
