"""What flows from a policy to a loss. Shapes: P prompts, G completions of each, C completion tokens.

Absent means empty: a run without a reference policy has `ref_logp` of zero elements, never None.
"""
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from data.sample import Batch


class Policy(Protocol):
    """All that reinforcement learning asks of a model: `Output` has logp and entropy, each (P, G, C)."""

    def __call__(self, batch: Batch, completions: torch.Tensor, temperature: float): ...


@dataclass
class Rollout:
    """What a policy did with a batch of prompts, and what it earned.

    ids, mask, logp (P, G, C): tokens, True up to and including EOS, log-prob at sampling time; texts P lists of G;
    parts: reward name -> (P, G), before weighting; reward (P, G): their weighted sum, what the advantage is made of.

    Two prompts, a group of two, one completion right: reward [[1.1, 0.1], [0.0, 0.0]]; the second group is flat.
    """
    ids: torch.Tensor
    mask: torch.Tensor
    logp: torch.Tensor
    texts: list = field(default_factory=list)
    parts: dict = field(default_factory=dict)
    reward: torch.Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass
class Experience:
    """What a loss takes. advantage (P, G); old_logp, ref_logp, values, returns (P, G, C) or empty."""
    batch: Batch
    ids: torch.Tensor
    mask: torch.Tensor
    advantage: torch.Tensor
    old_logp: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    ref_logp: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    values: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    returns: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def rows(self, index):
        """The part of it that belongs to the prompts `index` (1-d int tensor)."""
        tensors = {name: value[index] if len(value) else value for name, value in vars(self).items() if name != "batch"}
        return Experience(batch=self.batch.rows(index), **tensors)

    def split(self, size):
        """Consecutive parts of `size` prompts (0: one part)."""
        return [self.rows(part) for part in torch.arange(len(self.ids), device=self.ids.device).split(
            size or max(1, len(self.ids)))]

    def trim(self):
        """Completions cut to the longest of them: padding costs as much as tokens do."""
        longest = int(self.mask.sum(-1).max())
        cut = {name: getattr(self, name)[..., :longest] for name in ("ids", "mask", "old_logp")}
        return replace(self, **cut)
