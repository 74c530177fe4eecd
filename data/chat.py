"""Templates, tags, the prompt of every method, and the one parser of answers.

Training, evaluation and data generation all come through here, so that what a model is taught,
asked and judged by is the same text.
"""
from dataclasses import dataclass
from typing import NamedTuple

# What counts as right belongs to the parser.
from data.answers import is_right, normalise, verdict       # noqa: F401

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
IMAGE = "<image>"

# What a method appends to the question.
PROMPTS = {
    "direct": "",               # answer at once
    "think": " think .",        # chain of thought, taught by examples
    # The tags are only asked for.
    "asked": " think inside <think> </think> then answer inside <answer> </answer> .",
}


# ---------------------------------------------------------------- templates

class Say(NamedTuple):
    """A stretch of text: `asked`, then what is `taught` in answer to it. Tokenised as one text."""
    asked: str
    taught: str = ""


class Put(NamedTuple):
    """One token, appended as its id and never spelt: "bos", "eos" or the name of a special
    token."""
    token: str
    taught: bool = False


# One template, one function: it yields the pieces (Say and Put) of a turn.
#
# system: the text that opens the conversation, "" for none; None in later turns.
# answer: None where the model is to speak.
#
# vicuna_v1 and llama_2 are LLaVA's (its llava/conversation.py), so that its checkpoints are asked as
# they were taught; chatml is that of Qwen2.5 and SmolLM2.

def _brief(system, question, answer):
    # Question and answer are tokenised apart: this template's own tokenizers add no space in front
    # of a text.
    yield Say(system or "")
    yield Say(question)
    if answer is not None:
        yield Say("", answer)
        yield Put("eos", True)


def _vicuna_v1(system, question, answer):
    # LLaVA's conversation style TWO: later turns follow the EOS directly.
    front = "" if system is None else f"{system} "
    asked = f"{front}USER: {question} ASSISTANT:"
    if answer is None:
        yield Say(asked)
    else:
        yield Say(asked, f" {answer}")
        yield Put("eos", True)


def _llama_2(system, question, answer):
    # Every turn has a BOS of its own; the first one's opens the text.
    if system is None:
        yield Put("bos")
    front = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    asked = f"[INST] {front}{question} [/INST]"
    if answer is None:
        yield Say(asked)
    else:
        yield Say(asked, f" {answer} ")
        yield Put("eos", True)


def _chatml(system, question, answer):
    if system:
        yield Put("<|im_start|>")
        yield Say(f"system\n{system}")
        yield Put("<|im_end|>")
        yield Say("\n")
    yield Put("<|im_start|>")
    yield Say(f"user\n{question}")
    yield Put("<|im_end|>")
    yield Say("\n")
    yield Put("<|im_start|>")
    yield Say("assistant\n", answer or "")
    if answer is not None:
        yield Put("<|im_end|>", True)
        yield Say("\n")


TEMPLATES = {"brief": _brief, "vicuna_v1": _vicuna_v1, "llama_2": _llama_2, "chatml": _chatml}

# What opens a conversation unless `encode` is told otherwise.
SYSTEM = {
    "brief": "",
    "vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. The "
                 "assistant gives helpful, detailed, and polite answers to the user's questions.",
    "llama_2": "You are a helpful language and vision assistant. You are able to understand the "
               "visual content that the user provides, and assist the user with a variety of tasks "
               "using natural language.",
    "chatml": "You are a helpful assistant.",
}


def template_for(tokenizer):
    """Name of the template that a model with this tokenizer was most likely taught: ChatML where
    the tokenizer has its tokens."""
    try:
        tokenizer.special("<|im_start|>")
    except ValueError:
        return "vicuna_v1"
    return "chatml"


# ---------------------------------------------------------------- from samples to tokens

def target_text(answer, reasoning=None, close_think=True):
    """The text that a model is taught: "<think> .. </think><answer> ..</answer>", or the answer tag
    alone.

    >>> target_text("two", "a1 b2")
    '<think> a1 b2</think><answer> two</answer>'
    """
    thought = ""
    if reasoning is not None:
        thought = f"<think> {reasoning}"
        if close_think:
            thought += "</think>"
    return f"{thought}<answer> {answer}</answer>"


def _turns(sample, method, template, target):
    """All turns as (question, answer or None), with a placeholder for every picture where it
    stands.

    Without a placeholder in the text the pictures stand in front of the first question, each with a
    new line after it as in LLaVA's data, in brief without one.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template={template!r} must be one of {', '.join(TEMPLATES)}")
    if method not in PROMPTS:
        raise ValueError(f"method={method!r} must be one of {', '.join(PROMPTS)}")
    turns = list(sample.turns)
    question = sample.question + PROMPTS[method]
    if template == "brief":             # its texts begin with a space; a target has what it needs
        turns = [(f" {asked}", f" {answer}") for asked, answer in turns]
        question = f" {question}"
    turns.append((question, target))
    for _, answer in turns:
        if answer and IMAGE in answer:
            raise ValueError(f"an answer must not hold {IMAGE}, which stands for a picture: {answer!r}")
    placed = sum(asked.count(IMAGE) for asked, _ in turns)
    images = len(sample.images)
    if placed and placed != images:
        raise ValueError(f"the questions of sample {sample.id!r} hold {placed} {IMAGE} and must "
                         f"hold none or {images}, one for each of its images")
    if not placed:
        front = IMAGE if template == "brief" else f"{IMAGE}\n"
        asked, answer = turns[0]
        turns[0] = (front * images + asked, answer)
    return turns


def _stretch(tokenizer, image_tokens, say):
    """Say -> (ids, mask of what is taught). The text between two pictures is tokenised as a whole,
    as LLaVA does it.

    What is taught are the tokens that begin inside the answer. A token that begins before it and
    ends inside it would make the prompt, without its answer, other ids than in training: then
    prompt and answer are tokenised apart.
    """
    *before, asked = say.asked.split(IMAGE)
    ids = []
    for text in before:
        ids += tokenizer.encode(text)
        ids += [tokenizer.image_id] * image_tokens
    mask = [False] * len(ids)
    found, spans = tokenizer.encode_with_offsets(asked + say.taught)
    border = len(asked)
    if any(start < border < end for start, end in spans):
        prompt = tokenizer.encode(asked)
        answer = tokenizer.encode(say.taught)
        return ids + prompt + answer, mask + [False] * len(prompt) + [True] * len(answer)
    return ids + found, mask + [start >= border for start, _ in spans]


def encode(sample, tokenizer, image_tokens, method="think", template="brief", target=None, system=None):
    """Sample -> (ids, target mask, images): the prompt, and `target` text with its end when given.

    Every picture becomes `image_tokens` image ids where an <image> in a question stands for it, without
    any in front of the first question. system: what opens the conversation, None for the template's
    own text. With a target the answers of earlier turns are targets too. Prompt ids are the
    beginning of the ids with a target. ValueError for an unknown template or method, an <image> in
    an answer or in `system`, and another number of <image> than of pictures.
    """
    turns = _turns(sample, method, template, target)
    if system is None:
        system = SYSTEM[template]
    if IMAGE in system:
        raise ValueError(f"system must not hold {IMAGE}, which stands for a picture: {system!r}")
    pieces = [Put("bos")]
    for number, (question, answer) in enumerate(turns):
        opening = system if number == 0 else None
        pieces += TEMPLATES[template](opening, question, answer)
    ids, mask = [], []
    for piece in pieces:
        if isinstance(piece, Say):
            new_ids, taught = _stretch(tokenizer, image_tokens, piece)
        else:
            new_ids = _token(tokenizer, piece.token)
            taught = [piece.taught] * len(new_ids)
        ids += new_ids
        if target is None:
            taught = [False] * len(new_ids)
        mask += taught
    return ids, mask, sample.images


def _token(tokenizer, name):
    """"bos", "eos" or the name of a special token -> [its id], [] for the BOS of a tokenizer
    without."""
    if name == "eos":
        return [tokenizer.eos_id]
    if name != "bos":
        return [tokenizer.special(name)]
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def prompt_text(sample, method, template):
    """The text of the last turn of `encode`: <image> for a picture, the names of special tokens, no
    BOS."""
    turns = _turns(sample, method, template, None)
    system = SYSTEM[template] if len(turns) == 1 else None
    text = ""
    for piece in TEMPLATES[template](system, *turns[-1]):
        if isinstance(piece, Say):
            text += piece.asked
        elif piece != Put("bos"):
            text += piece.token
    return text


def encode_plain(sample, tokenizer, image_tokens, template="brief"):
    """Sample -> (ids, target mask, images) of the alignment stage: pictures, then the caption as
    target; the question is discarded.

    brief: the caption as an answer, with EOS. Any other template: LLaVA's `plain`, the caption and
    a new line, no EOS. ValueError for a caption that holds <image>.
    """
    if IMAGE in sample.caption:
        raise ValueError(f"a caption must not hold {IMAGE}, which stands for a picture: "
                         f"{sample.caption!r}")
    if template == "brief":
        caption = tokenizer.encode(" " + sample.caption) + [tokenizer.eos_id]
    else:
        caption = tokenizer.encode(sample.caption + "\n")
    front = _token(tokenizer, "bos") + [tokenizer.image_id] * (image_tokens * len(sample.images))
    return front + caption, [False] * len(front) + [True] * len(caption), sample.images


def too_long(samples, tokenizer, max_new, text_length):
    """Notes on samples that the token budgets cut; raises ValueError when not one answer fits."""
    answers = [len(tokenizer.encode(target_text(sample.answer))) + 1 for sample in samples]
    captions = [len(tokenizer.encode(" " + sample.caption)) + 1 for sample in samples]
    if min(answers) > max_new:
        raise ValueError(f"--max-new={max_new} must be at least {min(answers)}, the tokens of the "
                         "shortest answer with its tags")
    notes = []
    if max(answers) > max_new:
        notes.append(_cut_note(answers, max_new, "answers with their tags are longer than "
                               f"--max-new={max_new} tokens and can never be given in full"))
    if max(captions) > text_length:
        notes.append(_cut_note(captions, text_length, "captions are longer than "
                               f"--text-length={text_length} tokens and CLIP reads only their beginnings"))
    return notes


def _cut_note(lengths, limit, problem):
    long = sum(length > limit for length in lengths)
    return f"{long} of {len(lengths)} {problem}, the longest has {max(lengths)}"


# ---------------------------------------------------------------- from a completion to an answer

@dataclass(frozen=True)
class Parsed:
    answer: str         # the text inside the single answer tag, "" without one
    think: str          # the text inside the single think tag, "" without one
    fault: str          # why it is not well-formed, "" if it is

    @property
    def well_formed(self):
        return not self.fault


def _between(text, opening, closing):
    """Text between the only `opening` and the only `closing` after it, or None."""
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start = text.index(opening) + len(opening)
    stop = text.index(closing)
    return text[start:stop] if start <= stop else None


def parse(text):
    """Completion -> Parsed, in linear time.

    Well-formed is exactly one <think>..</think> followed by exactly one <answer>..</answer>, and
    only white space elsewhere. The answer counts when there is exactly one answer tag, wherever the
    rest went wrong, unless that tag stands inside the thought.

    >>> parse("<think> so</think><answer> two</answer>")
    Parsed(answer='two', think='so', fault='')
    >>> parse("<think> so<answer> two</answer>").fault
    'no single <think>..</think>'
    """
    answer = _between(text, "<answer>", "</answer>")
    think = _between(text, "<think>", "</think>")
    thought = "" if think is None else think.strip()
    if answer is None or any(tag in answer for tag in TAGS):
        return Parsed("", thought, "no single <answer>..</answer>")
    before = text.split("<answer>")[0]
    after = text.split("</answer>")[1]
    if think is None:
        if "<think>" in before and "</think>" in after:
            return Parsed("", "", "<answer> stands inside <think>")
        return Parsed(answer.strip(), "", "no single <think>..</think>")
    if "<answer>" in think or "</answer>" in think:
        return Parsed("", thought, "<answer> stands inside <think>")
    if text.index("<think>") > text.index("<answer>"):
        return Parsed(answer.strip(), thought, "<answer> stands before <think>")
    in_front = text.split("<think>")[0]
    in_between = text.split("</think>")[1].split("<answer>")[0]
    if in_front.strip() or in_between.strip() or after.strip():
        return Parsed(answer.strip(), thought, "text outside the tags")
    return Parsed(answer.strip(), thought, "")
