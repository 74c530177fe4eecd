"""What reinforcement learning logs: a definition for every name, and the estimators."""
import re
import time

import torch

from kernels import is_flat

DEFINITIONS = {
    # of the rollout
    "reward": "mean over all completions of the weighted reward, in reward units",
    "reward_std": "deviation of that",
    # of each reward under a name of its own, so that a reward may be called length, loss or step
    "reward/<name>": "mean over completions of a reward, before gate and weight",
    "reward_std/<name>": "deviation of that",
    "reward/correctness": "share of completions whose answer is right, whatever their form; logged in any case",
    "reward/format": "share of completions that are exactly <think>..</think><answer>..</answer>; logged in any case",
    "flat": "share of groups whose rewards are all equal; as a rule they are left out of the update",
    "groups": "groups that went through the update", "reward_failures": "calls of rewards of one's own that raised, "
    "hung, died or gave no finite number, so far", "rollouts": "batches of prompts sampled for it, refills included",
    "length": "mean tokens of a completion, EOS included", "length_right": "the same over right completions",
    "length_wrong": "the same over wrong completions", "truncated": "share of completions that hit the budget, no EOS",
    "words_<word>": "share of completions with a word of reflection (wait, again, ...), as a whole word",
    # of the update: advantages and values over all sampled tokens of its groups; the rest are means over the tokens
    # that train, weighted by nothing, of all its optimizer steps
    "advantage_abs": "mean |advantage|", "advantage_std": "deviation of the advantage",
    "advantage_max": "largest advantage",
    "advantage_min": "smallest advantage",
    "entropy": "exact entropy of the policy, in nats", "loss": "the policy loss with its penalties; near zero by "
    "construction where advantages average to zero: it says nothing about progress",
    "drift_max": "max |ratio - 1| between the update's log-prob and the one at sampling time, before any step",
    "clip_low": "share of tokens whose ratio is under the lower clip with a negative advantage",
    "clip_high": "share of tokens whose ratio is over the upper clip with a positive advantage",
    "ratio_off": "mean |ratio - 1|", "ratio_off_max": "max |ratio - 1|",
    "ratio_max": "largest ratio", "ratio_min": "smallest ratio",
    "kl": "k3 estimate of KL(old policy || policy), in nats a token; of sequences' ratios where those are used",
    "kl_ref": "KL(policy || reference), in nats a token: in the loss the k3 estimate or exact, in the reward as --kl",
    "kl_coef": "coefficient of that KL", "updates": "optimizer steps taken", "stopped": "1 when --kl-stop ended it",
    "value_loss": "half the squared error of the critic", "value_clipped": "share of tokens where its clip acts",
    "explained_variance": "1 - Var(return - value) / Var(return), before the update",
    "value": "mean of the critic before the update", "return": "mean return", "return_std": "deviation of the returns",
    "grad_norm": "L2 norm of the policy's gradient before clipping, mean over the steps; the critic's is clipped apart",
    "grad_norm_<module>": "the same of projector, decoder (llm), critic alone",
    "lr": "learning rate", "lr_critic": "that of the critic",
    # cost
    "flops": "matmul FLOPs executed since the stage began: encoding, sampling, scoring, update",
    "samples": "completions sampled since the stage began",
    "tokens_per_second": "sampled tokens per second of rollout (encoding, prefill and decoding)",
    "update_tokens_per_second": "completion tokens that went through the update, each pass counted, per second of it",
    "seconds_encode": "encoding the pictures", "seconds_prefill": "prompts", "seconds_decode": "sampling",
    "seconds_score": "decoding text and rewards", "seconds_update": "old log-probs, loss, backward, optimizer",
    "seconds": "since the stage began, or was resumed",
}
# Of "aha" fame (MAYE's list, arXiv 2504.02587, and R1's "wait"); a share of completions each, not proof of reflection.
REFLECTION = ("wait", "again", "check", "verify", "however", "alternatively")


def mean(values):
    return values.float().mean().item() if values.numel() else 0.0


def deviation(values):
    return values.float().std().item() if values.numel() > 1 else 0.0


def of_rollout(rollout):
    """Rollout -> the metrics that need no update."""
    length = rollout.mask.sum(-1).float()
    right = rollout.parts["correctness"] > 0
    words = [set(re.findall(r"[a-z]+", text.lower())) for group in rollout.texts for text in group]
    return {
        "reward": mean(rollout.reward), "reward_std": deviation(rollout.reward),
        **{f"reward/{name}": mean(part) for name, part in rollout.parts.items()},
        **{f"reward_std/{name}": deviation(part) for name, part in rollout.parts.items()},
        "flat": mean(is_flat(rollout.reward)), "length": mean(length), "truncated": mean(~rollout.ended),
        **{f"length_{name}": mean(some) for name, some in (("right", length[right]), ("wrong", length[~right]))
           if len(some)},
        **{f"words_{word}": sum(word in said for said in words) / max(1, len(words)) for word in REFLECTION},
    }


def of_advantages(advantage, mask):
    """advantage, mask (P, G, C) -> its size over the mask."""
    a = advantage[mask]
    return {"advantage_abs": mean(a.abs()), "advantage_std": deviation(a), "advantage_max": a.max().item(),
            "advantage_min": a.min().item()}


def of_values(values, returns, mask):
    """values, returns, mask (P, G, C) -> how well the critic knew, before the update, what came."""
    v, r = values[mask], returns[mask]
    explained = {"explained_variance": (1 - (r - v).var() / r.var()).item()} if len(r) > 1 and r.var() > 0 else {}
    return explained | {"value": mean(v), "return": mean(r), "return_std": deviation(r)}


def add(sums, statistics):
    """The statistics of a micro-batch join those before: sums add up, of names in _max or _min the extreme stays."""
    for name, value in statistics.items():
        join = {"_max": torch.maximum, "_min": torch.minimum}.get(name[-4:], torch.add)
        sums[name] = join(sums[name], value) if name in sums else value


def means(sums, tokens):
    """Sums over tokens -> means; extremes as they are."""
    return {name: (value if name[-4:] in ("_max", "_min") else value / tokens).item() for name, value in sums.items()}


def costs(laps, rollout, passed):
    """Seconds of each part of a step, and the tokens that went through its update -> what is logged of them."""
    sampling = sum(laps[name] for name in ("encode", "prefill", "decode"))
    return {"tokens_per_second": int(rollout.mask.sum()) / sampling,
            "update_tokens_per_second": passed / laps["update"],
            **{f"seconds_{name}": round(seconds, 4) for name, seconds in laps.items()}}


class Clock:
    """Wall time of consecutive parts of a step."""

    def __init__(self, device):
        self.device, self.laps, self.last = device, {}, time.perf_counter()

    def lap(self, name):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[name], self.last = self.laps.get(name, 0.0) + now - self.last, now
