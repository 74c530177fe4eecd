"""What reinforcement learning logs: what every name means, and the estimators.

    line = of_rollout(rollout) | costs(clock.laps, rollout, passed)     # goes to log.jsonl
"""
import re
import time

import torch

from kernels import is_flat
from model import parallel

# name -> (what, unit, estimator). rl/README.md shows the same as a table.
DEFINITIONS = {
    # Of the rollout.
    "reward": ("weighted sum of a completion's rewards", "reward", "mean over all completions"),
    "reward_std": ("the same", "reward", "standard deviation over all completions"),
    # Each reward has a prefix, so that one may be called length, loss or step.
    "reward/<name>": ("one reward, before gate and weight", "reward", "mean over all completions"),
    "reward_std/<name>": ("the same", "reward", "standard deviation over all completions"),
    "reward/correctness": (
        "whether the answer is right, whatever the form; logged in any case",
        "share", "mean over all completions"),
    "reward/format": (
        "whether a completion is exactly `<think>..</think><answer>..</answer>`, or LLaVA-CoT's four "
        "sections; logged in any case",
        "share", "mean over all completions"),
    "flat": (
        "groups whose rewards are all equal; as a rule they are left out of the update",
        "share", "mean over all groups"),
    "all_right": ("groups whose completions all earn correctness", "share", "mean over all groups"),
    "none_right": ("groups none of whose completions does", "share", "mean over all groups"),
    "groups": ("groups that went through the update", "groups", "count"),
    "reward_failures": (
        "calls of rewards of one's own that raised, hung, died or gave no finite number",
        "calls", "sum over the rollout"),
    "rollouts": (
        "batches of prompts that were sampled for the step, refills included",
        "batches", "count"),
    "length": ("length of a completion, EOS included", "tokens", "mean over all completions"),
    "length_right": ("the same", "tokens", "mean over right completions"),
    "length_wrong": ("the same", "tokens", "mean over wrong completions"),
    "truncated": (
        "completions that hit the budget without EOS",
        "share", "mean over all completions"),
    "words_<word>": (
        "completions with a word of reflection (wait, again, ...), as a whole word",
        "share", "mean over all completions"),

    # Of the update. Advantages and values: over all sampled tokens of the groups in it.
    "advantage_abs": ("size of the advantage", "reward, or deviations", "mean over sampled tokens"),
    "advantage_std": (
        "advantage",
        "reward, or deviations", "standard deviation over sampled tokens"),
    "advantage_max": ("advantage", "reward, or deviations", "maximum over sampled tokens"),
    "advantage_min": ("advantage", "reward, or deviations", "minimum over sampled tokens"),
    # The others: over the tokens that train, each counting alike, of all optimizer steps.
    "entropy": (
        "entropy of the policy, exact over the vocabulary",
        "nats", "mean over trained tokens"),
    "loss": (
        "the policy loss with its penalties; near zero by construction where advantages average "
        "to zero: it says nothing about progress",
        "reward, or deviations", "mean over optimizer steps, weighted by trained tokens"),
    "drift_max": (
        "|ratio - 1| of the update's log-prob to the one at sampling time, before any step",
        "1", "maximum over sampled tokens"),
    "clip_low": (
        "tokens whose ratio is under the lower clip with a negative advantage",
        "share", "mean over trained tokens"),
    "clip_high": (
        "tokens whose ratio is over the upper clip with a positive advantage",
        "share", "mean over trained tokens"),
    "ratio_off": ("|ratio - 1| of the policy to the old one", "1", "mean over trained tokens"),
    "ratio_off_max": ("the same", "1", "maximum over trained tokens"),
    "ratio_max": ("ratio of the policy to the old one", "1", "maximum over trained tokens"),
    "ratio_min": ("the same", "1", "minimum over trained tokens"),
    "kl": (
        "KL(old policy || policy); of sequences' ratios where those are used",
        "nats a token", "k3, mean over trained tokens; after a stop, of the last mini-batch"),
    "kl_ref": (
        "KL(policy || reference)",
        "nats a token", "in the loss k3 or exact, in the reward as --kl; mean over tokens"),
    "kl_coef": ("coefficient of that KL", "reward a nat", "as it is"),
    "updates": ("optimizer steps taken", "steps", "count"),
    "stopped": ("1 when --kl-stop ended the update", "0 or 1", "as it is"),
    "value_loss": (
        "half the squared error of the critic",
        "reward squared", "mean over trained tokens"),
    "value_clipped": ("tokens where the value clip acts", "share", "mean over trained tokens"),
    "explained_variance": (
        "1 - Var(return - value) / Var(return), before the update",
        "1", "over sampled tokens"),
    "value": ("value of the critic before the update", "reward", "mean over sampled tokens"),
    "return": ("return", "reward", "mean over sampled tokens"),
    "return_std": ("return", "reward", "standard deviation over sampled tokens"),
    "grad_norm": (
        "L2 norm of the policy's gradient before clipping; the critic's is clipped apart",
        "1", "mean over optimizer steps"),
    "grad_norm_<module>": (
        "the same of projector, decoder (llm) or critic alone",
        "1", "mean over optimizer steps"),
    "lr": ("learning rate", "1", "as it is"),
    "lr_critic": ("learning rate of the critic", "1", "as it is"),

    # Costs.
    "flops": (
        "FLOPs of matrix products: encoding, sampling, scoring, update",
        "FLOPs", "counted as executed, since the stage began"),
    "samples": ("completions sampled", "completions", "count since the stage began"),
    "tokens_per_second": (
        "speed of the rollout: encoding, prefill and decoding",
        "tokens a second", "sampled tokens over seconds"),
    "update_tokens_per_second": (
        "speed of the update",
        "tokens a second", "completion tokens, each pass counted, over seconds"),
    "seconds_encode": ("encoding the pictures", "seconds", "wall time"),
    "seconds_prefill": ("computing the prompts", "seconds", "wall time"),
    "seconds_decode": ("sampling the completions", "seconds", "wall time"),
    "seconds_score": ("decoding texts and computing rewards", "seconds", "wall time"),
    "seconds_update": ("old log-probs, loss, backward, optimizer", "seconds", "wall time"),
    "seconds": ("time since the stage began, or was resumed", "seconds", "wall time"),
}
# Words of "aha" fame (MAYE's list, arXiv 2504.02587, and R1's "wait"). A share of completions for
# each; that a word is there does not prove reflection.
REFLECTION = ("wait", "again", "check", "verify", "however", "alternatively")


def mean(values):
    return values.float().mean().item() if values.numel() else 0.0


def deviation(values):
    return values.float().std().item() if values.numel() > 1 else 0.0


def of_rollout(rollout):
    """Rollout -> the metrics that need no update."""
    line = {"reward": mean(rollout.reward), "reward_std": deviation(rollout.reward)}
    for name, values in rollout.parts.items():
        line[f"reward/{name}"] = mean(values)
    for name, values in rollout.parts.items():
        line[f"reward_std/{name}"] = deviation(values)
    line["flat"] = mean(is_flat(rollout.reward))

    length = rollout.mask.sum(-1).float()               # (P, G)
    right = rollout.parts["correctness"] > 0
    line["all_right"] = mean(right.all(1))
    line["none_right"] = mean(~right.any(1))
    line["length"] = mean(length)
    line["truncated"] = mean(~rollout.ended)
    for name, chosen in (("length_right", length[right]), ("length_wrong", length[~right])):
        if len(chosen):
            line[name] = mean(chosen)

    words = []                                          # of each completion
    for group in rollout.texts:
        words += [words_of(text) for text in group]
    for word in REFLECTION:
        count = sum(word in words_of_text for words_of_text in words)
        line[f"words_{word}"] = count / max(1, len(words))
    return line


def words_of(text):
    """The set of a text's words, in lower case."""
    return set(re.findall(r"[a-z]+", text.lower()))


def reflects(text):
    """Whether a text holds a word of REFLECTION."""
    return not words_of(text).isdisjoint(REFLECTION)


def of_advantages(advantage, mask):
    """advantage, mask (P, G, C) -> its size over the mask."""
    a = advantage[mask]
    return {"advantage_abs": mean(a.abs()), "advantage_std": deviation(a),
            "advantage_max": a.max().item(), "advantage_min": a.min().item()}


def of_values(values, returns, mask):
    """values, returns, mask (P, G, C) -> how well the critic predicted, before the update."""
    v = values[mask]
    r = returns[mask]
    line = {}
    if len(r) > 1 and r.var() > 0:
        line["explained_variance"] = (1 - (r - v).var() / r.var()).item()
    line["value"] = mean(v)
    line["return"] = mean(r)
    line["return_std"] = deviation(r)
    return line


def add(sums, statistics):
    """Adds a micro-batch's statistics to `sums`; names in _max or _min keep the extreme instead."""
    for name, value in statistics.items():
        if name not in sums:
            sums[name] = value
        elif name.endswith("_max"):
            sums[name] = torch.maximum(sums[name], value)
        elif name.endswith("_min"):
            sums[name] = torch.minimum(sums[name], value)
        else:
            sums[name] = sums[name] + value


def of_all_ranks(statistics):
    """The statistics of this rank's micro-batches -> of all ranks', by the rules of `add`; of one process as they are.
    A rank without a micro-batch has none."""
    if parallel.world() == 1:
        return statistics
    sums = {}
    for of_rank in parallel.gather({name: value.item() for name, value in statistics.items()}):
        add(sums, {name: torch.tensor(value, dtype=torch.float64) for name, value in of_rank.items()})
    return sums


def means(sums, tokens):
    """Sums over tokens -> means; extremes as they are."""
    found = {}
    for name, value in sums.items():
        extreme = name.endswith(("_max", "_min"))
        found[name] = value.item() if extreme else (value / tokens).item()
    return found


def costs(laps, rollout, passed):
    """What is logged of a step's seconds, {part: seconds}, and of the speed of its parts.

    passed: completion tokens that went through the update, each pass counted.
    """
    sampling = laps["encode"] + laps["prefill"] + laps["decode"]
    line = {"tokens_per_second": int(rollout.mask.sum()) / sampling,
            "update_tokens_per_second": passed / laps["update"]}
    for name, seconds in laps.items():
        line[f"seconds_{name}"] = round(seconds, 4)
    return line


class Clock:
    """Wall time of consecutive parts of a step."""

    def __init__(self, device):
        self.device = device
        self.laps = {}                  # name of a part -> its seconds so far
        self.last = time.perf_counter()

    def lap(self, name):
        """The time since the last lap was spent on the part `name`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.last = now
