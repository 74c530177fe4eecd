"""What flows from a policy to a loss. Shapes: P prompts, G completions of each, C completion tokens, R rewards.

Absent means empty: a run without a reference policy has `ref_logp` of zero elements, never None.
"""
import math
from dataclasses import dataclass, field, fields, replace
from typing import Protocol

import torch

from data.sample import Batch


class Policy(Protocol):
    """All that reinforcement learning asks of a model: `Output` has logp and entropy, each (P, G, C), and read only
    where `mask` (P, G, C) is True. It may make use of `upstream`, the gradients (of logp, of entropy or None), each
    (P, G, C), that the loss will send back to them, or None where they are not known ahead.

    A critic asks for `Output.hidden` too, (P, G, C + 1, D), the states before each token and after the last; a
    reference, or a critic apart, for a copy, `twin()`, and for its `states(batch, completions)`, a reference first for
    `base()`, the policy without adapters, None if it has none; exact KL for `kl(hidden, theirs, reference,
    mask, temperature)`.
    """

    def __call__(self, batch: Batch, completions: torch.Tensor, temperature: float, mask: torch.Tensor,
                 upstream: tuple | None = None): ...


def empty():
    return field(default_factory=lambda: torch.zeros(0))


def stack(tensors):
    """Tensors (P_i, G, C_i, ..) or (P_i, ..) -> one, (sum P_i, ..), C filled up with zeros to the longest."""
    if tensors[0].ndim < 3:
        return torch.cat(tensors)
    rows = sum(len(t) for t in tensors)
    longest = max(t.shape[2] for t in tensors)
    out = tensors[0].new_zeros(rows, tensors[0].shape[1], longest, *tensors[0].shape[3:])
    row = 0
    for t in tensors:
        P, _, C = t.shape[:3]
        out[row:row + P, :, :C] = t
        row += P
    return out


@dataclass
class Rollout:
    """What a policy did with a batch of prompts, and what it earned.

    ids, mask, logp (P, G, C): tokens, True up to and including EOS, log-prob at sampling time; ended (P, G): whether
    EOS came within the budget; samples: the P asked about; texts: P lists of G; parts: name -> (P, G), each reward as
    its function gave it; rewards (P, G, R): the same after the gate, in the order of the weights; reward (P, G): their
    weighted sum.

    Two prompts, a group of two, correctness weighted 1 and format .1. The first completion is right and well-formed,
    the second nothing, the third right but malformed, the fourth well-formed but wrong; with the gate:

        parts    correctness [[1, 0], [1, 0]]      format [[1, 0], [0, 1]]
        rewards  [[[1, 1], [0, 0]], [[0, 0], [0, 1]]]
        reward   [[1.1, 0], [0, .1]]
    """
    ids: torch.Tensor
    mask: torch.Tensor
    logp: torch.Tensor
    ended: torch.Tensor
    samples: list = field(default_factory=list)
    texts: list = field(default_factory=list)
    parts: dict = field(default_factory=dict)
    rewards: torch.Tensor = empty()
    reward: torch.Tensor = empty()

    TENSORS = ("ids", "mask", "logp", "ended", "rewards", "reward")

    @staticmethod
    def join(rollouts):
        """Rollouts one after the other, as one."""
        if len(rollouts) == 1:
            return rollouts[0]
        tensors = {}
        for name in Rollout.TENSORS:
            tensors[name] = stack([getattr(rollout, name) for rollout in rollouts])
        samples = []
        texts = []
        for rollout in rollouts:
            samples += rollout.samples
            texts += rollout.texts
        parts = {}
        for name in rollouts[0].parts:
            parts[name] = stack([rollout.parts[name] for rollout in rollouts])
        return Rollout(**tensors, samples=samples, texts=texts, parts=parts)


@dataclass
class Experience:
    """What a loss takes: the groups of a rollout that have something to teach, or count.

    ids, mask (P, G, C) as sampled; trained (P, G, C): the part of the mask that the loss is about (not completions that
    were cut off, when those are left out); ended (P, G), rewards (P, G, R), sampled_logp (P, G, C): of the rollout;
    active (P,): groups that can move the policy. The others are only counted.
    Scored before the update, empty where no switch asks for it: old_logp, ref_logp, entropy, kl (P, G, C), of the
    policy as it was, of the reference, and between them; values (P, G, C + 1), before each token and after the last.
    Then advantage (P, G, C) and, with a critic, returns (P, G, C). All are constants.

    A group of two, rewards 1 and 0, of one and three tokens, against the mean and unscaled:

        mask       [[[1, 0, 0], [1, 1, 1]]]
        advantage  [[[.5, .5, .5], [-.5, -.5, -.5]]]       what stands outside the mask is never read
    """
    batch: Batch
    ids: torch.Tensor
    mask: torch.Tensor
    trained: torch.Tensor
    ended: torch.Tensor
    rewards: torch.Tensor
    sampled_logp: torch.Tensor
    active: torch.Tensor
    old_logp: torch.Tensor = empty()
    ref_logp: torch.Tensor = empty()
    entropy: torch.Tensor = empty()
    kl: torch.Tensor = empty()
    values: torch.Tensor = empty()
    advantage: torch.Tensor = empty()
    returns: torch.Tensor = empty()

    def _tensors(self):
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "batch"}

    def rows(self, index):
        """The part of it that belongs to the prompts `index` (1-d int tensor)."""
        tensors = self._tensors()
        for name, value in tensors.items():
            if len(value):
                tensors[name] = value[index]
        return Experience(batch=self.batch.rows(index), **tensors)

    @staticmethod
    def join(experiences):
        """Experiences of several rollouts as one."""
        if len(experiences) == 1:
            return experiences[0]
        batch = Batch.join([experience.batch for experience in experiences])
        tensors = {}
        for name in experiences[0]._tensors():
            tensors[name] = stack([getattr(experience, name) for experience in experiences])
        return Experience(batch=batch, **tensors)

    def first(self, count):
        """Its first `count` prompts, or all."""
        if len(self.ids) <= count:
            return self
        return self.rows(torch.arange(count, device=self.ids.device))

    def split(self, mini_batches, micro_batch, ranks=1):
        """[(rows, micro-batches)] of each of at most `mini_batches` optimizer steps: the indices of its prompts, and
        those of the active ones, at most `micro_batch` (0: all) at a time, and so many that each of the `ranks` gets
        one."""
        P = len(self.ids)
        prompts_a_step = max(1, math.ceil(P / mini_batches))
        steps = []
        for rows in torch.arange(P, device=self.ids.device).split(prompts_a_step):
            active = rows[self.active[rows]]
            share = math.ceil(len(active) / ranks)
            micros = active.split(min(micro_batch or share, share)) if len(active) else ()
            steps.append((rows, micros))
        return steps

    def trim(self):
        """Completions cut to the longest of them: padding costs as much as tokens do."""
        surplus = self.mask.shape[-1] - int(self.mask.sum(-1).max())
        trimmed = {}
        for name, value in self._tensors().items():
            if value.ndim == 3 and name != "rewards":
                trimmed[name] = value[:, :, :value.shape[2] - surplus]
        return replace(self, **trimmed)
