"""Reward functions, each f(sample, text) -> float, and the table that names them.

Only the text inside the single answer tag is judged; data.chat.parse decides what that is, here as in evaluation. All
are linear in the length of the text. Which answers count as right stands in data/answers.py.
"""
import ast
import math
import os
import re
from collections import Counter
from dataclasses import dataclass

import torch

from data.chat import ALL_TAGS, form_of, is_right, parse, verdict
from model.runs.config import check_fields, choice, number
from rl.worker import Worker

COSINE_WORDS = 64               # words of a completion at which the length reward has gone all its way; for you to edit
HEAVIEST = 1000000              # weight of a reward; far heavier ones are infinite in fp32
GATED = ("correctness", "iou", "caption")  # earn nothing in a malformed completion, where the gate is on
TAG = re.compile("|".join(ALL_TAGS))
WORD = re.compile(r"[-+]?\w+(?:[.,]\w+)*|%")
NUMBERS = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")


def correctness(sample, text):
    """+1 when the answer is the gold one."""
    return float(is_right(sample, parse(text).answer))


def format(sample, text):
    """+1 when the completion is exactly <think>..</think><answer>..</answer>, or LLaVA-CoT's four sections, and nothing
    else but white space."""
    return float(parse(text).well_formed)


def format_think(sample, text):
    """+1 when the completion is exactly <think>..</think><answer>..</answer>."""
    return float(form_of(text) == "think" and parse(text).well_formed)


def format_llava_cot(sample, text):
    """+1 when the completion is exactly LLaVA-CoT's four sections."""
    return float(form_of(text) == "llava_cot" and parse(text).well_formed)


def boxes_of(answer, most=64):
    """ "[1, 2, 3.5, 4], [..]" -> list of (x1, y1, x2, y2) with x1 < x2, y1 < y2; [] when it is anything else."""
    if len(answer) > 32 * 4 * most or not re.fullmatch(r"[-+0-9.,\s\[\]()]*", answer):
        return []
    values = [float(value) for value in NUMBERS.findall(answer)]
    if len(values) % 4 or len(values) > 4 * most or not all(map(math.isfinite, values)):
        return []
    boxes = []
    for i in range(0, len(values), 4):
        x1, y1, x2, y2 = values[i:i + 4]
        if x1 >= x2 or y1 >= y2:
            return []
        boxes.append((x1, y1, x2, y2))
    return boxes


def area(box):
    x1, y1, x2, y2 = box
    return (x2 - x1) * (y2 - y1)


def overlap(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    return both / (area(a) + area(b) - both)


def iou(sample, text):
    """Intersection over union of the answer's boxes with the sample's: pairs from the best down, each box once; the sum
    over the larger of the two counts, so that boxes too many cost as much as boxes too few. In [0, 1]."""
    given = boxes_of(parse(text).answer)
    gold = [tuple(map(float, box)) for box in sample.boxes]
    if not given or not gold:
        return 0.0
    pairs = []                                  # (overlap, place in given, place in gold)
    for i, box in enumerate(given):
        for j, gold_box in enumerate(gold):
            pairs.append((overlap(box, gold_box), i, j))
    pairs.sort(reverse=True)
    given_used = set()
    gold_used = set()
    total = 0.0
    for value, i, j in pairs:
        if i in given_used or j in gold_used:
            continue
        given_used.add(i)
        gold_used.add(j)
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
    grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    if not grams:
        return 0.0
    return len(set(grams)) / len(grams) - 1


def consistency(sample, text):
    """+1 when the thought ends in the answer: its last words are those of the answer, a unit at the end aside. What is
    said before them, "not" for instance, it does not see."""
    parsed = parse(text)

    def words(text):
        found = WORD.findall(text.lower())
        unit = WORD.findall(sample.unit.lower())
        if unit and found[-len(unit):] == unit:
            return found[:-len(unit)]
        return found

    answer = words(parsed.answer)
    thought = words(parsed.think)
    return float(bool(answer) and thought[-len(answer):] == answer)


def caption(sample, text):
    """F1 of the answer's words with the caption's: how much of what is shown it says, and how much else (SQuAD's token
    F1, arXiv 1606.05250, section 6.1). Case, order and punctuation do not count; a word as often as both have it."""
    given = Counter(WORD.findall(parse(text).answer.lower()))
    shown = Counter(WORD.findall(sample.caption.lower()))
    shared = (given & shown).total()
    if not shared:
        return 0.0
    return 2 * shared / (given.total() + shown.total())


# A reward of your own: a function above, whose docstring's first line is what reports say of it, and
# its name here. Or, without touching this file, --rewards=FILE.py:NAME:WEIGHT.
REWARDS = {
    "correctness": correctness,
    "format": format,
    "format_think": format_think,
    "format_llava_cot": format_llava_cot,
    "iou": iou,
    "length": length,
    "repetition": repetition,
    "consistency": consistency,
    "caption": caption,
}


@dataclass(frozen=True)
class RewardOptions:
    """what completions earn"""
    rewards: str = "correctness:1,format:0.1"       # weighted: rl/rewards.py's, or FILE.py:NAME:WEIGHT
    gated: bool = True                              # a right answer counts only in a well-formed completion
    reward_timeout: float = number(5.0, "(0, 86400]")  # seconds that a reward of one's own may take for a completion
    reward_errors: str = choice("zero", "stop")     # one that raises or hangs counts zero | stops the run

    def __post_init__(self):
        check_fields(self)


def overlong(length, budget, share):
    """Soft penalty on long completions (DAPO, arXiv 2503.14476, eq. 13): 0 up to the last `share` of the budget, from
    there falling to -1 at its end. length: int tensor of any shape."""
    buffer = share * budget
    return -((length - (budget - buffer)) / buffer).clamp(0, 1)


class Rewards:
    """The weighted rewards of a run, made once from its options.

    weights: name -> weight, in the order of the options, "overlong" last where `overlong_share` of the `budget` of
    tokens is on. `functions`: rewards of the caller's, name -> f(sample, text), beside those of REWARDS. Functions of a
    user's file run in a process of their own (rl/worker.py); `close` ends it, and so does a `with`.

    Raises ValueError in one sentence about what is wrong with the options.
    """

    def __init__(self, options, overlong_share=0.0, budget=0, functions=()):
        self.options = options
        self.overlong_share = overlong_share
        self.budget = budget
        self.functions = REWARDS | dict(functions)
        self.workers = {}
        self.weights = {}
        for entry in options.rewards.split(","):
            self._add(entry.strip())
        if overlong_share:
            self.weights["overlong"] = 1.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _add(self, entry):
        """Takes in one entry of --rewards: NAME, NAME:WEIGHT, FILE.py:NAME or FILE.py:NAME:WEIGHT."""
        options = self.options
        head, _, last = entry.rpartition(":")
        path, _, name = head.rpartition(":")
        if path.endswith(".py"):
            weight = last
        elif head.endswith(".py"):
            path, name, weight = head, last, ""
        else:
            path = ""
            name, _, weight = entry.partition(":")
        if name in self.weights:
            raise ValueError(f"--rewards={options.rewards}: {name} is given twice")
        if path:
            check_file(f"--rewards={options.rewards}", path, name)
            if name in self.functions:
                raise ValueError(f"--rewards={options.rewards}: {name!r} is the name of a built-in reward; give yours "
                                 "another")
            self.workers[name] = Worker(path, name, options.reward_timeout, options.reward_errors)
            self.functions[name] = self.workers[name]
        if name not in self.functions:
            raise ValueError(f"--rewards={options.rewards}: {name!r} must be one of {', '.join(REWARDS)}, or "
                             "FILE.py:NAME")
        self.weights[name] = weight_of(options.rewards, name, weight)

    @property
    def names(self):
        """Of the weighted rewards that read the text of a completion: all but "overlong"."""
        return tuple(name for name in self.weights if name != "overlong")

    def start(self):
        """Starts the processes of rewards of one's own. Raises ValueError when a file cannot be loaded."""
        for worker in self.workers.values():
            worker.start()

    def close(self):
        for worker in self.workers.values():
            worker.close()

    @property
    def failures(self):
        """How often rewards of one's own raised or hung so far."""
        return sum(worker.failed for worker in self.workers.values())

    def parts(self, sample, text):
        """{name: what the reward gives for a completion}, before gate and weight."""
        return {name: self.functions[name](sample, text) for name in self.names}

    def score(self, samples, texts, lengths):
        """P samples, P lists of G texts, lengths (P, G) in tokens -> (parts {name: (P, G)}, rewards (P, G, R)), fp32.

        parts: of every weighted reward, and of correctness and format in any case. rewards: of the weighted ones, in
        their order; with the gate, an answer in a malformed completion earns nothing for being right.
        """
        parts = {}
        for name in dict.fromkeys([*self.names, "correctness", "format"]):
            function = self.functions[name]
            values = []
            for sample, group in zip(samples, texts):
                values.append([function(sample, text) for text in group])
            parts[name] = torch.tensor(values)
        if self.overlong_share:
            parts["overlong"] = overlong(lengths, self.budget, self.overlong_share)
        rewards = []
        for name in self.weights:
            gated = self.options.gated and name in GATED
            rewards.append(parts[name] * parts["format"] if gated else parts[name])
        return parts, torch.stack(rewards, -1)

    def total(self, rewards):
        """rewards (.., R) in the order of the weights -> their weighted sum (..)."""
        return (rewards * rewards.new_tensor(list(self.weights.values()))).sum(-1)

    def why(self, sample, text):
        """One line for people: what a completion earned by its text, and what the rewards saw in it."""
        parsed = parse(text)
        right, reason = verdict(sample, parsed.answer)
        parts = self.parts(sample, text)
        earned = 0.0
        for name, value in parts.items():
            gate = format(sample, text) if self.options.gated and name in GATED else 1.0
            earned += self.weights[name] * value * gate
        answer = repr(parsed.answer) if parsed.answer else "no answer"
        judged = "right" if right else "wrong"
        if reason not in ("the gold answer", "no answer"):
            judged += f", {reason}"
        return f"reward {earned:g}; {answer}: {judged}; {parsed.fault or 'well-formed'}"

    def reason(self, name, sample, text):
        """What one reward saw in a completion, in a few words."""
        parsed = parse(text)
        if name in ("correctness", "length"):
            reason = verdict(sample, parsed.answer)[1]
            return f"{parsed.answer!r}: {reason}" if name == "correctness" else reason
        if name == "format":
            return parsed.fault or "well-formed"
        if name == "iou":
            return f"{parsed.answer!r} against {list(sample.boxes)}"
        if name == "overlong":
            return "tokens near the budget"
        if name in self.workers:
            return ""
        return (self.functions[name].__doc__ or "").strip().split("\n")[0]


def weight_of(spec, name, text):
    """Text of a weight, empty for 1 -> number."""
    try:
        weight = float(text or 1)
    except ValueError:
        raise ValueError(f"--rewards={spec}: the weight {text!r} of {name} must be a number") from None
    if not abs(weight) <= HEAVIEST:
        raise ValueError(f"--rewards={spec}: the weight of {name} must lie in [-{HEAVIEST}, {HEAVIEST}]")
    return weight


def check_file(option, path, name):
    """Raises ValueError when a user's file cannot hold the reward `name`. The file is read, not run: only the worker
    does that. option: "--rewards=..", as the error names it."""
    if name == "overlong":
        raise ValueError(f"{option}: 'overlong' is the soft penalty on length (--overlong-share); give yours "
                         "another name")
    if not os.path.isfile(path):
        raise ValueError(f"{option}: the file {path!r} does not exist")
    with open(path, encoding="utf-8") as file:
        try:
            tree = ast.parse(file.read())
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{option}: {path!r} is not Python: {error}") from None
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not defined and name not in bound_names(tree):
        raise ValueError(f"{option}: {path!r} defines no {name}(sample, text)")
    if defined and not takes_two(defined[-1].args):
        raise ValueError(f"{option}: {name} of {path!r} must take two arguments, sample and text")


def bound_names(tree):
    """Names that a parsed file imports or assigns at its top level."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def takes_two(arguments):
    """Whether a parsed function can be called with two arguments."""
    least = len(arguments.args) - len(arguments.defaults)
    return bool(arguments.vararg) or least <= 2 <= len(arguments.args)
