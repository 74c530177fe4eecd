"""Reward functions, each f(sample, text) -> float, and the table that names them.

Only the text inside the single answer tag is judged; data.chat.parse decides what that is, here as in evaluation.
"""
import math

import torch

from data.chat import is_right, parse


def correctness(sample, text):
    """+1 when the answer is the gold one or an alias of it, after normalisation."""
    return float(is_right(sample, parse(text).answer))


def format(sample, text):
    """+1 when the completion is exactly <think>..</think><answer>..</answer> and nothing else but white space."""
    return float(parse(text).well_formed)


REWARDS = {"correctness": correctness, "format": format}


def parse_weights(spec):
    """ "correctness:1,format:0.1" -> {"correctness": 1.0, "format": 0.1}; raises ValueError naming what is wrong."""
    weights = {}
    for entry in spec.split(","):
        name, _, weight = entry.strip().partition(":")
        if name not in REWARDS:
            raise ValueError(f"--rewards={spec}: {name!r} must be one of {', '.join(REWARDS)}")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise ValueError(f"--rewards={spec}: the weight {weight!r} of {name} must be a number") from None
        if not math.isfinite(weights[name]):
            raise ValueError(f"--rewards={spec}: the weight of {name} must be finite")
    return weights


def score(samples, texts, weights, gated):
    """P samples, P lists of G texts -> (parts {name: (P, G)}, rewards (P, G, R)), fp32.

    gated: a right answer in a malformed completion earns nothing for being right: in `rewards`, not in `parts`.
    """
    parts = {name: torch.tensor([[REWARDS[name](sample, text) for text in group]
                                 for sample, group in zip(samples, texts)]) for name in weights if name in REWARDS}
    earned = dict(parts)
    if gated and "correctness" in weights:
        well_formed = torch.tensor([[format(sample, text) for text in group]
                                    for sample, group in zip(samples, texts)])
        earned["correctness"] = parts["correctness"] * well_formed
    return parts, torch.stack(list(earned.values()), -1)


def weights_of(cfg):
    """All rewards of a run and their weights: --rewards, and the soft penalty on length (rl/rollout.py) if it is on."""
    return parse_weights(cfg.rewards) | ({"overlong": 1.0} if cfg.overlong_share else {})


def total(rewards, weights):
    """rewards (P, G, R), weights {name: weight} in the same order -> the weighted sum (P, G)."""
    return (rewards * rewards.new_tensor(list(weights.values()))).sum(-1)


def why(sample, text, weights, gated):
    """One line for people: what a completion earned, and what each reward saw in it."""
    parsed = parse(text)
    answer = repr(parsed.answer) if parsed.answer else "no answer"
    judged = "right" if is_right(sample, parsed.answer) else f"wrong, expected {sample.answer!r}"
    earned = total(score([sample], [[text]], weights, gated)[1], weights).item()
    return f"reward {earned:g}; {answer}: {judged}; {parsed.fault or 'well-formed'}"
