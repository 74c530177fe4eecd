"""Sampled completions become a rollout: read, reward."""
import torch

from rl.rewards import score, total
from rl.types import Rollout


def read(completions, tokenizer):
    """Completions with ids, mask (P, G, C) -> P lists of G texts."""
    return [[tokenizer.decode(row[keep].tolist()) for row, keep in zip(ids, mask)]
            for ids, mask in zip(completions.ids.cpu(), completions.mask.cpu())]


def overlong(length, budget, share):
    """Soft penalty on long completions (DAPO, arXiv 2503.14476, eq. 13): 0 up to the last `share` of the budget, from
    there falling to -1 at its end. length: int tensor of any shape."""
    buffer = share * budget
    return -((length - (budget - buffer)) / buffer).clamp(0, 1)


def collect(completions, samples, tokenizer, weights, gated, budget=0, share=0.0):
    """Sampled completions of P samples -> Rollout with texts and rewards, on the completions' device.

    weights: name -> weight; where "overlong" is among them, the last, the soft penalty on length is one more reward.
    """
    texts = read(completions, tokenizer)
    device = completions.ids.device
    parts, rewards = score(samples, texts, weights, gated)
    if "overlong" in weights:
        parts["overlong"] = overlong(completions.mask.sum(-1).cpu(), budget, share)
        rewards = torch.cat([rewards, parts["overlong"][..., None]], -1)
    ended = ((completions.ids == tokenizer.eos_id) & completions.mask).any(-1)
    return Rollout(completions.ids, completions.mask, completions.logp, ended, texts,
                   {name: part.to(device) for name, part in parts.items()}, rewards.to(device),
                   total(rewards, weights).to(device))
