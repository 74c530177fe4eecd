"""Reward functions, each f(sample, text) -> float, and the table that names them.

Only the text inside the single answer tag is judged; data.chat.parse decides what that is, here as in evaluation. All
are linear in the length of the text. Which answers count as right stands in data/answers.py.
"""
import ast
import math
import os
import re

import torch

from data.chat import TAGS, is_right, parse, verdict
from rl.worker import Worker

COSINE_WORDS = 64               # words of a completion at which the length reward has gone all its way; for you to edit
HEAVIEST = 1000000              # weight of a reward; far heavier ones are infinite in fp32
GATED = ("correctness", "iou")  # earn nothing in a malformed completion, where the gate is on
TAG = re.compile("|".join(TAGS))
WORD = re.compile(r"[-+]?\w+(?:[.,]\w+)*|%")
NUMBERS = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")


def correctness(sample, text):
    """+1 when the answer is the gold one."""
    return float(is_right(sample, parse(text).answer))


def format(sample, text):
    """+1 when the completion is exactly <think>..</think><answer>..</answer> and nothing else but white space."""
    return float(parse(text).well_formed)


def boxes_of(answer, most=64):
    """ "[1, 2, 3.5, 4], [..]" -> list of (x1, y1, x2, y2) with x1 < x2, y1 < y2; [] when it is anything else."""
    if len(answer) > 32 * 4 * most or not re.fullmatch(r"[-+0-9.,\s\[\]()]*", answer):
        return []
    values = [float(value) for value in NUMBERS.findall(answer)]
    boxes = [tuple(values[i:i + 4]) for i in range(0, len(values), 4)]
    good = len(values) % 4 == 0 and len(boxes) <= most and all(
        b[0] < b[2] and b[1] < b[3] and all(map(math.isfinite, b)) for b in boxes)
    return boxes if good else []


def overlap(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    both = max(0.0, width) * max(0.0, height)
    areas = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
    return both / (areas - both)


def iou(sample, text):
    """Intersection over union of the answer's boxes with the sample's: pairs from the best down, each box once; the sum
    over the larger of the two counts, so that boxes too many cost as much as boxes too few. In [0, 1]."""
    given, gold = boxes_of(parse(text).answer), [tuple(map(float, box)) for box in sample.boxes]
    if not given or not gold:
        return 0.0
    pairs = sorted(((overlap(a, b), i, j) for i, a in enumerate(given) for j, b in enumerate(gold)), reverse=True)
    used, total = (set(), set()), 0.0
    for value, i, j in pairs:
        if i not in used[0] and j not in used[1]:
            used[0].add(i)
            used[1].add(j)
            total += value
    return total / max(len(given), len(gold))


def length(sample, text):
    """Cosine in the words of the completion (arXiv 2502.03373, section 4.1): right answers earn more for fewer words, 1
    down to .5, wrong ones less for fewer, -1 up to -.5: think when it is needed. Words count wherever they stand."""
    share = min(1.0, len(TAG.sub(" ", text).split()) / COSINE_WORDS)
    saved = 0.25 * (1 + math.cos(math.pi * share))              # .5 for no word, 0 from COSINE_WORDS on
    return 0.5 + saved if is_right(sample, parse(text).answer) else -0.5 - saved


def repetition(sample, text, n=3):
    """Less the share of n-grams of words that occurred before: 0 down to -1."""
    words = text.lower().split()
    grams = list(zip(*(words[i:] for i in range(n))))
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


def consistency(sample, text):
    """+1 when the thought ends in the answer: its last words are those of the answer, a unit at the end aside. What is
    said before them, "not" for instance, it does not see."""
    parsed = parse(text)

    def words(text):
        found = WORD.findall(text.lower())
        unit = WORD.findall(sample.unit.lower())
        return found[:-len(unit)] if unit and found[-len(unit):] == unit else found

    answer, thought = words(parsed.answer), words(parsed.think)
    return float(bool(answer) and thought[-len(answer):] == answer)


REWARDS = {"correctness": correctness, "format": format, "iou": iou, "length": length, "repetition": repetition,
           "consistency": consistency}


def _of_file(spec, path, name, timeout, errors):
    """Puts a user's reward into the table after a look at the file, which only the worker runs; -> its name."""
    if not os.path.isfile(path):
        raise ValueError(f"--rewards={spec}: the file {path!r} does not exist")
    with open(path, encoding="utf-8") as file:
        try:
            tree = ast.parse(file.read())
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"--rewards={spec}: {path!r} is not Python: {error}") from None
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    bound = {alias.asname or alias.name for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))
             for alias in node.names} | {target.id for node in tree.body if isinstance(node, ast.Assign)
                                         for target in node.targets if isinstance(target, ast.Name)}
    if not defined and name not in bound:
        raise ValueError(f"--rewards={spec}: {path!r} defines no {name}(sample, text)")
    arguments = defined[-1].args if defined else None
    if arguments and not arguments.vararg and not len(arguments.args) - len(arguments.defaults) <= 2 <= len(
            arguments.args):
        raise ValueError(f"--rewards={spec}: {name} of {path!r} must take two arguments, sample and text")
    if name == "overlong":
        raise ValueError(f"--rewards={spec}: 'overlong' is the soft penalty on length (--overlong-share); give yours "
                         "another name")
    if name in REWARDS:
        if not isinstance(REWARDS[name], Worker):
            raise ValueError(f"--rewards={spec}: {name!r} is the name of a built-in reward; give yours another")
        if REWARDS[name].is_for(path, timeout, errors):
            return name                 # every stage asks for it anew; one process serves them all
        REWARDS[name].close()
    REWARDS[name] = Worker(path, name, timeout, errors)
    return name


def parse_weights(spec, timeout=5.0, errors="zero"):
    """ "correctness:1,format:0.1,mine.py:brevity:0.2" -> {"correctness": 1.0, "format": 0.1, "brevity": 0.2}.

    Raises ValueError naming what is wrong. A function of a file of one's own is called in a worker, at most `timeout`
    seconds a completion; one that raises or hangs counts 0, or stops the run (errors "stop").
    """
    weights = {}
    for entry in spec.split(","):
        head, _, weight = entry.strip().rpartition(":")
        path, _, name = head.rpartition(":")
        if path.endswith(".py"):                        # FILE.py:NAME:WEIGHT
            name = _of_file(spec, path, name, timeout, errors)
        elif head.endswith(".py"):                      # FILE.py:NAME
            name, weight = _of_file(spec, head, weight, timeout, errors), "1"
        else:
            name, _, weight = entry.strip().partition(":")
        if name not in REWARDS:
            raise ValueError(f"--rewards={spec}: {name!r} must be one of {', '.join(REWARDS)}, or FILE.py:NAME")
        if name in weights:
            raise ValueError(f"--rewards={spec}: {name} is given twice")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise ValueError(f"--rewards={spec}: the weight {weight!r} of {name} must be a number") from None
        if not abs(weights[name]) <= HEAVIEST:
            raise ValueError(f"--rewards={spec}: the weight of {name} must lie in [-{HEAVIEST}, {HEAVIEST}]")
    return weights


def weights_of(cfg):
    """All rewards of a run and their weights: --rewards, and the soft penalty on length (rl/rollout.py) if it is on."""
    weights = parse_weights(cfg.rewards, cfg.reward_timeout, cfg.reward_errors)
    return weights | ({"overlong": 1.0} if cfg.overlong_share else {})


def start(cfg):
    """Starts the workers of rewards of one's own, so that what cannot be loaded is said first; -> the weights."""
    weights = weights_of(cfg)
    for name in weights:
        if isinstance(REWARDS.get(name), Worker):
            REWARDS[name].start()
    return weights


def failures():
    """How often rewards of one's own raised or hung so far."""
    return sum(reward.failed for reward in REWARDS.values() if isinstance(reward, Worker))


def score(samples, texts, weights, gated):
    """P samples, P lists of G texts -> (parts {name: (P, G)}, rewards (P, G, R)), fp32.

    parts: of every reward in `weights`, and of correctness and format in any case. rewards: of those in `weights`, in
    their order; gated: an answer in a malformed completion earns nothing for being right.
    """
    names = [name for name in weights if name in REWARDS]
    parts = {name: torch.tensor([[REWARDS[name](sample, text) for text in group]
                                 for sample, group in zip(samples, texts)])
             for name in dict.fromkeys([*names, "correctness", "format"])}
    return parts, torch.stack([parts[name] * parts["format"] if gated and name in GATED else parts[name]
                               for name in names], -1)


def total(rewards, weights):
    """rewards (P, G, R), weights {name: weight} in the same order -> the weighted sum (P, G)."""
    return (rewards * rewards.new_tensor(list(weights.values()))).sum(-1)


def why(sample, text, weights, gated):
    """One line for people: what a completion earned, and what the rewards saw in it."""
    parsed = parse(text)
    right, reason = verdict(sample, parsed.answer)
    answer = repr(parsed.answer) if parsed.answer else "no answer"
    judged = ("right" if right else "wrong") + ("" if reason in ("the gold answer", "no answer") else f", {reason}")
    earned = total(score([sample], [[text]], weights, gated)[1], weights).item()
    return f"reward {earned:g}; {answer}: {judged}; {parsed.fault or 'well-formed'}"
