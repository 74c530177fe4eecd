"""inspect.html: the groups of rollouts.jsonl, token by token, and what tests were answered, in one file.

    runs = [InspectedRun("embedded-1", lines, asked, scores)]
    inspector_page("Rollouts of embedded-1", runs)              # a page's bytes

The page needs no network and no other file. What it holds stands in inspector.html, how it looks in inspector.css, what
it does in inspector.js; the frame around them, which keeps texts from being anything but text, in web.py.
"""
import base64
from dataclasses import dataclass, field
from pathlib import Path

from data.chat import FORMS, parse
from data.sample import Sample
from rl.recorder import FILE, agrees, prompt_key, thumbnail
from rl.report.log import read_log
from rl.report.web import data_block, document
from rl.rewards import RewardOptions, Rewards

HERE = Path(__file__).parent
ANSWERS = [names[-1] for names in FORMS.values()]       # the tags that hold answers

# What a token may be coloured by. kind decides the colours: logp (the further below 0 the stronger), size (from 0 up),
# signed (blue above 0, orange below), ratio (signed, by its logarithm). minus: the difference of two others.
QUANTITIES = [
    dict(name="sampled", label="log-prob at sampling", kind="logp",
         what="of the token, when it was sampled, in nats"),
    dict(name="logp", label="log-prob at the update", kind="logp",
         what="of the token, in the last pass of the update that read it, in nats"),
    dict(name="moved", label="update - sampling", kind="signed", minus=["logp", "sampled"],
         what="log-prob at the update less that at sampling, in nats"),
    dict(name="old_logp", label="log-prob before the update", kind="logp",
         what="of the token, scored before the first optimizer step of the rollout, in nats"),
    dict(name="ref_logp", label="log-prob of the reference", kind="logp", what="of the token, in nats"),
    dict(name="from_reference", label="update - reference", kind="signed", minus=["logp", "ref_logp"],
         what="log-prob at the update less that of the reference, in nats"),
    dict(name="entropy", label="entropy", kind="size", what="of the policy before the token, in nats"),
    dict(name="ratio", label="ratio", kind="ratio", what="of the policy to the old one, as the loss used it"),
    dict(name="clipped", label="clipped", kind="signed",
         what="-1: ratio under the lower clip, negative advantage; 1: over the upper one, positive advantage"),
    dict(name="advantage", label="advantage", kind="signed", what="in units of the reward, or of its deviation"),
    dict(name="kl", label="KL to the reference", kind="signed",
         what="as the loss or the reward used it, estimated or exact, in nats"),
    dict(name="weight", label="weight", kind="size",
         what="what multiplies the token's term in the loss, before the denominator"),
    dict(name="trained", label="trained", kind="size", what="1 where the token is part of the loss"),
]


@dataclass
class InspectedRun:
    """A run as the page has it. lines: of its rollouts.jsonl; asked: split -> the first samples of its tests; scores:
    method -> split -> raw scores of the sampled decoding, of which the first texts are shown."""
    name: str
    lines: list
    asked: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)

    def tests(self):
        """(split, place, sample, {method: raw scores}) of the samples that any method answered."""
        found = []
        for split, samples in self.asked.items():
            for place, sample in enumerate(samples):
                answers = {}
                for method, splits in self.scores.items():
                    raw = splits.get(split, {})
                    if place < len(raw.get("text", ())):
                        answers[method] = raw
                if answers:
                    found.append((split, place, sample, answers))
        return found


def read_rollouts(folder):
    """The lines of a run's rollouts.jsonl; a last one that a kill cut off is skipped. Raises ValueError without the
    file."""
    path = Path(folder) / FILE
    if not path.exists():
        raise ValueError(f"--inspect={folder} must be a run folder with a {FILE}, as train.py writes it in one "
                         "process unless --inspect-every=0; there is none, and runs of several processes write none")
    return read_log(path)


def sample_of(line):
    """A line of rollouts.jsonl -> the Sample that was asked; a picture that is no file any more, or never was one, is
    its thumbnail: that of a large one is only nearly the picture."""
    images = []
    for path, url in zip(line["paths"], line["pictures"]):
        is_there = bool(path) and Path(path).is_file()
        images.append(path if is_there else base64.b64decode(url.partition(",")[2]))
    return Sample(id=line["id"], images=tuple(images), turns=tuple(map(tuple, line["turns"])),
                  question=line["question"], answer=line["gold"], source=line["source"])


def answer_tokens(tokens):
    """Texts of the tokens of a completion -> the numbers of those inside its answer, in any form; [] without one.

    >>> answer_tokens(["<think>", " so", "</think>", "<answer>", " two", "</answer>", ""])
    [4]
    """
    text = "".join(tokens)
    for name in ANSWERS:
        start = text.rfind(f"<{name}>") + len(name) + 2
        stop = text.find(f"</{name}>", start)
        if f"<{name}>" in text and stop >= 0:
            return overlapping(tokens, start, stop)
    return []


def overlapping(tokens, start, stop):
    """Numbers of the tokens that have a character in text[start:stop]."""
    found = []
    at = 0
    for number, token in enumerate(tokens):
        if at < stop and at + len(token) > start and token:
            found.append(number)
        at += len(token)
    return found


def inspector_page(title, runs):
    """InspectedRuns -> one HTML page, bytes. Texts are untrusted."""
    prompts = {}
    groups = []
    for number, run in enumerate(runs):
        for line in run.lines:
            groups.append(recorded(line, number, prompts))
        groups += tested(run, number, prompts)
    data = dict(runs=[run.name for run in runs], quantities=QUANTITIES, prompts=prompts, groups=groups)
    body, style, script = (read_text(f"inspector.{kind}") for kind in ("html", "css", "js"))
    return document(title, body + data_block("data", data), style, script)


def read_text(name):
    return (HERE / name).read_text(encoding="utf-8")


# ---------------------------------------------------------------- groups

def recorded(line, run, prompts):
    """A line of rollouts.jsonl -> a group of the page. The prompt, with its pictures, goes into `prompts` once."""
    prompts.setdefault(line["prompt"], {name: line[name] for name in ("id", "question", "gold", "source", "pictures")})
    completions = []
    for completion in line["completions"]:
        completion = dict(completion)
        if "".join(completion["tokens"]) == completion["text"]:
            del completion["text"]
        completions.append(completion)
    group = {name: line[name] for name in ("method", "step", "role", "prompt", "flat", "updated")}
    if "look" in line:
        group["look"] = line["look"]
    return dict(group, run=run, completions=completions)


def tested(run, number, prompts):
    """The tests of a run -> groups of the page: one a prompt, in which every method's first completion stands beside
    the others'."""
    rewards = Rewards(RewardOptions(rewards="correctness:1,format:0"))      # for its reasons
    groups = []
    for split, place, sample, answers in run.tests():
        completions = [answered(method, sample, raw, place, rewards) for method, raw in answers.items()]
        pictures = [thumbnail(image) for image in sample.images]
        key = prompt_key(sample, pictures)
        prompts.setdefault(key, dict(id=sample.id, question=sample.question, gold=sample.answer, source=sample.source,
                                     pictures=pictures))
        groups.append(dict(run=number, method="tests", role=split, prompt=key, flat=False, completions=completions))
    return groups


def answered(method, sample, raw, place, rewards):
    """A method's first completion of a test. raw: raw scores, as rl/report/statistics.py has them."""
    text = raw["text"][place]
    parts = []
    for name, column in (("correctness", "right"), ("format", "format")):
        if column in raw:           # a teacher is not judged by its form
            parts.append([name, raw[column][place][0], 0, 0, rewards.reason(name, sample, text)])
    is_cut = bool(raw["cut"][place][0]) if "cut" in raw else False
    return dict(label=method, text=text, right=bool(raw["right"][place][0]), ended=not is_cut, parts=parts,
                fault=parse(text).fault, agrees=agrees(sample, text))
