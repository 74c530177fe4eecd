"""What reinforcement learning logs: a definition for every name, and the estimators."""
import time

import torch

from kernels import is_flat

DEFINITIONS = {
    "reward": "mean over all completions of the weighted reward, in reward units",
    "correctness": "share of completions whose answer is right, whatever their form",
    "format": "share of completions that are exactly <think>..</think><answer>..</answer>",
    "flat": "share of groups whose rewards are all equal; they are left out of the update",
    "length": "mean tokens of a completion, EOS included",
    "length_right": "the same over right completions",
    "length_wrong": "the same over wrong completions",
    "truncated": "share of completions that hit the budget without EOS",
    "entropy": "mean exact entropy of the policy over the completion tokens of the update, in nats",
    "advantage_abs": "mean |advantage| over the completions of the update",
    "drift": "max |ratio - 1| between the update's log-prob and the one at sampling time, before any update",
    "clip_low": "share of tokens whose ratio is under the lower clip with a negative advantage",
    "clip_high": "share of tokens whose ratio is over the upper clip with a positive advantage",
    "ratio_off": "mean |ratio - 1| over the tokens of all updates of the step",
    "ratio_off_max": "max |ratio - 1| over the tokens of all updates of the step",
    "kl": "k3 estimate of KL(old policy || policy), mean over tokens, in nats",
    "loss": "the policy loss, summed over micro-batches; near zero by construction, since advantages average to zero",
    "grad_norm": "global L2 norm of the gradient before clipping, mean over the step's updates",
    "lr": "learning rate",
    "flops": "matmul FLOPs executed since the stage began: encoding, sampling, scoring, update",
    "samples": "completions sampled since the stage began",
    "tokens_per_second": "sampled tokens per second of rollout (encoding, prefill and decoding)",
    "seconds_encode": "encoding the pictures", "seconds_prefill": "prompts", "seconds_decode": "sampling",
    "seconds_score": "decoding text and rewards", "seconds_update": "old log-probs, loss, backward, optimizer",
}


def of_rollout(rollout, eos_id):
    """Rollout -> the metrics that need no update."""
    length = rollout.mask.sum(-1).float()
    right = rollout.parts.get("correctness", torch.zeros_like(rollout.reward)) > 0
    ended = ((rollout.ids == eos_id) & rollout.mask).any(-1)

    def mean(values):
        return values.float().mean().item() if values.numel() else 0.0

    return {
        "reward": mean(rollout.reward), **{name: mean(part) for name, part in rollout.parts.items()},
        "flat": mean(is_flat(rollout.reward)), "length": mean(length), "length_right": mean(length[right]),
        "length_wrong": mean(length[~right]), "truncated": mean(~ended),
    }


def add(sums, statistics):
    """The statistics of a micro-batch join those before: sums add up, of a name ending in _max the largest stays."""
    for name, value in statistics.items():
        before = sums.get(name, torch.zeros_like(value))
        sums[name] = torch.maximum(before, value) if name.endswith("_max") else before + value


def means(sums, tokens):
    """Sums over tokens -> means; what ends in _max as it is."""
    return {name: (value if name.endswith("_max") else value / tokens).item() for name, value in sums.items()}


class Clock:
    """Wall time of consecutive parts of a step."""

    def __init__(self, device):
        self.device, self.laps, self.last = device, {}, time.perf_counter()

    def lap(self, name):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now
