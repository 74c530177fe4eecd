"""Templates, tags, the prompt of every method, and the one parser of answers.

Training, evaluation and data generation all come through here, so that what a model is taught, asked and judged by is
the same text.
"""
from dataclasses import dataclass

from data.answers import is_right, normalise, verdict       # noqa: F401: what counts as right belongs to the parser

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
IMAGE = "<image>"

# What a method appends to the question.
PROMPTS = {
    "direct": "",                                       # answer at once
    "think": " think .",                          # chain of thought, taught by examples
    "asked": " think inside <think> </think> then answer inside <answer> </answer> .",   # tags only asked for
}

# Text around question and answer; {image} is where the placeholders go. `system` opens the conversation.
TEMPLATES = {
    "brief": dict(system="", user="{image}{question}", assistant="", end=""),
    "vicuna_v1": dict(
        system="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
               "detailed, and polite answers to the user's questions.",
        user=" USER: {image}\n{question}", assistant=" ASSISTANT:", end=""),
}


def target_text(answer, reasoning=None, close_think=True):
    """The text a model is taught: " <think> .. </think><answer> ..</answer>", or the answer tag alone.

    >>> target_text("two", "a1 b2")
    '<think> a1 b2</think><answer> two</answer>'
    """
    thought = "" if reasoning is None else f"<think> {reasoning}" + ("</think>" if close_think else "")
    return f"{thought}<answer> {answer}</answer>"


def encode(sample, tokenizer, patches, method="think", template="brief", target=None):
    """Sample -> (ids, target mask, images): the prompt, and `target` text with EOS when given.

    Every image becomes `patches` image ids in front of the first question. Each segment is tokenised by itself, so
    the mask is exact by construction; earlier turns are targets too when there is one.
    """
    t = TEMPLATES[template]
    ids, mask = [tokenizer.bos_id], [False]

    def add(tokens, predicted):
        ids.extend(tokens)
        mask.extend([predicted] * len(tokens))

    add(tokenizer.encode(t["system"]) if t["system"] else [], False)
    images = sample.images
    turns = [*sample.turns, (" " + sample.question + PROMPTS[method], target)]
    for n, (question, answer) in enumerate(turns):
        before, after = t["user"].split("{image}")
        add(tokenizer.encode(before) if before else [], False)
        if n == 0:
            add([tokenizer.image_id] * (patches * len(images)), False)
        add(tokenizer.encode(after.replace("{question}", question) + t["assistant"]), False)
        if answer is not None:
            add(tokenizer.encode(answer + t["end"]) + [tokenizer.eos_id], target is not None)
    return ids, mask, images


def prompt_text(sample, method, template):
    """What the last turn of `encode` says, as text."""
    t = TEMPLATES[template]
    user = t["user"].replace("{image}", IMAGE * len(sample.images))
    return t["system"] + user.replace("{question}", " " + sample.question + PROMPTS[method]) + t["assistant"]


def too_long(samples, tokenizer, max_new, text_length):
    """Notes on samples that the token budgets cut; raises ValueError when not one answer fits."""
    answers = [len(tokenizer.encode(target_text(sample.answer))) + 1 for sample in samples]
    captions = [len(tokenizer.encode(" " + sample.caption)) + 1 for sample in samples]
    if min(answers) > max_new:
        raise ValueError(f"--max-new={max_new} must be at least {min(answers)}, the tokens of the shortest answer with "
                         "its tags")
    return [f"{sum(length > limit for length in lengths)} of {len(samples)} {what}, the longest has {max(lengths)}"
            for lengths, limit, what in (
                (answers, max_new, f"answers with their tags are longer than --max-new={max_new} tokens and can never "
                                   "be given in full"),
                (captions, text_length, f"captions are longer than --text-length={text_length} tokens and CLIP reads "
                                        "only their beginnings")) if max(lengths) > limit]


def encode_plain(sample, tokenizer, patches):
    """LLaVA's alignment format: picture, then the caption as target; the question is discarded."""
    caption = tokenizer.encode(" " + sample.caption) + [tokenizer.eos_id]
    front = [tokenizer.bos_id] + [tokenizer.image_id] * (patches * len(sample.images))
    return front + caption, [False] * len(front) + [True] * len(caption), sample.images


@dataclass(frozen=True)
class Parsed:
    """answer: the text inside the single answer tag, "" without one. fault: why it is not well-formed, "" if it is."""
    answer: str
    think: str
    fault: str

    @property
    def well_formed(self):
        return not self.fault


def _between(text, opening, closing):
    """Text between the only `opening` and the only `closing` after it, or None."""
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, stop = text.index(opening) + len(opening), text.index(closing)
    return text[start:stop] if start <= stop else None


def parse(text):
    """Completion -> Parsed, in linear time.

    Well-formed is exactly one <think>..</think> followed by exactly one <answer>..</answer>, and only white space
    elsewhere. The answer counts when there is exactly one answer tag, wherever the rest went wrong, unless that tag
    stands inside the thought.

    >>> parse("<think> so</think><answer> two</answer>")
    Parsed(answer='two', think='so', fault='')
    >>> parse("<think> so<answer> two</answer>").fault
    'no single <think>..</think>'
    """
    answer = _between(text, "<answer>", "</answer>")
    think = _between(text, "<think>", "</think>")
    if answer is None or any(tag in answer for tag in TAGS):
        return Parsed("", (think or "").strip(), "no single <answer>..</answer>")
    before, after = text.split("<answer>")[0], text.split("</answer>")[1]
    fault = ""
    if think is None and "<think>" in before and "</think>" in after:
        return Parsed("", "", "<answer> stands inside <think>")
    if think is None:
        fault = "no single <think>..</think>"
    elif "<answer>" in think or "</answer>" in think:
        return Parsed("", think.strip(), "<answer> stands inside <think>")
    else:
        rest = text.split("<think>")[0], text.split("</think>")[1].split("<answer>")[0], after
        if text.index("<think>") > text.index("<answer>"):
            fault = "<answer> stands before <think>"
        elif any(part.strip() for part in rest):
            fault = "text outside the tags"
    return Parsed(answer.strip(), (think or "").strip(), fault)
