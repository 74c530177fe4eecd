"""Templates, tags, the prompt of every method, and the one parser of answers.

Training, evaluation and data generation all come through here, so that what a model is taught,
asked and judged by is the same text.
"""
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

# What counts as right belongs to the parser.
from data.answers import is_right, key, normalise, verdict       # noqa: F401

# A form of a chain of thought: the tags that a completion consists of, in order; the last holds the answer.
FORMS = {
    "think": ("think", "answer"),                                   # DeepSeek-R1's (arXiv 2501.12948)
    "llava_cot": ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION"),     # LLaVA-CoT's (arXiv 2411.10440)
}


def _tags(form):
    tags = []
    for name in FORMS[form]:
        tags += [f"<{name}>", f"</{name}>"]
    return tuple(tags)


TAGS = _tags("think")
STAGE_TAGS = _tags("llava_cot")
ALL_TAGS = TAGS + STAGE_TAGS
SECTIONS = tuple(name.lower() for name in FORMS["llava_cot"])       # as the fields of a Sample are called
IMAGE = "<image>"


class Prompt(NamedTuple):
    """How a method asks.

    brief: what it appends to the question, in the few words that models from nothing know, of template "brief".
    english: the same for models that know English, of all other templates.
    system: the text that opens the conversation; None for the template's own.
    example: a turn without a picture, (question, reply), in front of the conversation; () for none.
    """
    brief: str
    english: str
    system: str | None = None
    example: tuple = ()

    def appended(self, template):
        return self.brief if template == "brief" else self.english


# The tags only asked for: of models from nothing in the words that their tokenizers know whole; of pretrained ones as
# R1-V and Visual-RFT (arXiv 2503.01785) do.
_ASKED = " think inside <think> </think> then answer inside <answer> </answer> ."
_ASKED_IN_ENGLISH = (" Output the thinking process in <think> </think> and only the final answer in <answer> </answer> "
                     "tags.")
# DeepSeek-R1-Zero's template (arXiv 2501.12948, table 1), shortened.
_SYSTEM = ("A conversation between User and Assistant. The assistant first thinks about the reasoning process and then "
           "provides the user with the answer. The reasoning process and the answer are enclosed within <think> "
           "</think> and <answer> </answer> tags, i.e., <think> reasoning process here </think> <answer> answer here "
           "</answer>")
_EXAMPLE = ("Which is larger, 12 or 5?" + _ASKED_IN_ENGLISH,
            "<think> 12 is 7 more than 5, so 12 is larger.</think><answer> 12</answer>")

PROMPTS = {
    "direct": Prompt("", ""),                               # answer at once
    "think": Prompt(" think .", " think ."),                # chain of thought, taught by examples
    "asked": Prompt(_ASKED, _ASKED_IN_ENGLISH),             # the tags are only asked for
    # by a system text besides, and with an example of a reply in front: for models that know English
    "asked_system": Prompt(_ASKED, _ASKED_IN_ENGLISH, system=_SYSTEM),
    "asked_example": Prompt(_ASKED, _ASKED_IN_ENGLISH, example=_EXAMPLE),
    "llava_cot": Prompt(" stages .", " stages ."),          # LLaVA-CoT's four sections, taught by examples
}
ASKED = ("asked", "asked_system", "asked_example")


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


def staged_text(summary, caption, reasoning, conclusion, close_reasoning=True, between=""):
    """The text that a model is taught in LLaVA-CoT's form; between: what stands between two sections, a blank line in
    LLaVA-CoT's own data.

    >>> staged_text("walk left", "a1 red circle", "a1 b1", "two")[:49]
    '<SUMMARY> walk left</SUMMARY><CAPTION> a1 red cir'
    """
    sections = []
    for name, text in zip(FORMS["llava_cot"], (summary, caption, reasoning, conclusion)):
        section = f"<{name}> {text}"
        if name != "REASONING" or close_reasoning:
            section += f"</{name}>"
        sections.append(section)
    return between.join(sections)


def as_words(text):
    """A text in which <image> no longer stands for a picture, such as a model's own or a client's.

    >>> as_words("an <<image>>")
    'an << image>>'
    """
    return text.replace(IMAGE, "< image>")


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
    question = sample.question + PROMPTS[method].appended(template)
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
    own text. With a target the answers of earlier turns are targets too, but not a method's example.
    Prompt ids are the beginning of the ids with a target. ValueError for an unknown template or
    method, an <image> in an answer or in `system`, and another number of <image> than of pictures.
    """
    turns = _turns(sample, method, template, target)
    if system is None:
        system = _system(method, template)
    if IMAGE in system:
        raise ValueError(f"system must not hold {IMAGE}, which stands for a picture: {system!r}")
    pieces = [Put("bos")]
    if PROMPTS[method].example:
        pieces += _shown(template, system, PROMPTS[method].example)
        system = None
    for question, answer in turns:
        pieces += TEMPLATES[template](system, question, answer)
        system = None
    ids, mask = [], []
    for piece in pieces:
        if isinstance(piece, Say):
            new_ids, taught = _stretch(tokenizer, image_tokens, piece)
        else:
            new_ids = token_ids(tokenizer, piece.token)
            taught = [piece.taught] * len(new_ids)
        ids += new_ids
        if target is None:
            taught = [False] * len(new_ids)
        mask += taught
    return ids, mask, sample.images


def _system(method, template):
    """What opens a conversation."""
    system = PROMPTS[method].system
    return SYSTEM[template] if system is None else system


def _shown(template, system, example):
    """The pieces of a turn that is shown and not taught. example: (question, reply)."""
    pieces = []
    for piece in TEMPLATES[template](system, *example):
        if isinstance(piece, Say):
            pieces.append(Say(piece.asked + piece.taught))
        else:
            pieces.append(Put(piece.token))
    return pieces


def token_ids(tokenizer, name):
    """"bos", "eos" or the name of a special token -> [its id], [] for the BOS of a tokenizer
    without."""
    if name == "eos":
        return [tokenizer.eos_id]
    if name != "bos":
        return [tokenizer.special(name)]
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def prompt_text(sample, method, template):
    """The text of the last turn of `encode`, and of a method's example in front of it: <image> for a
    picture, the names of special tokens, no BOS."""
    turns = _turns(sample, method, template, None)
    system = _system(method, template) if len(turns) == 1 else None
    pieces = []
    if PROMPTS[method].example:
        pieces += _shown(template, system, PROMPTS[method].example)
        system = None
    text = ""
    for piece in [*pieces, *TEMPLATES[template](system, *turns[-1])]:
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
    front = token_ids(tokenizer, "bos") + [tokenizer.image_id] * (image_tokens * len(sample.images))
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


def not_given_back(texts, tokenizer):
    """Notes on texts that a tokenizer does not decode to what it has encoded, white space aside: a model that reads
    such a text reads another one."""
    lost = []                           # (text, what came back)
    for text in texts:
        back = tokenizer.decode(tokenizer.encode(text))
        if back.split() != text.split():
            lost.append((text.strip(), back.strip()))
    if not lost:
        return []
    text, back = min(lost, key=lambda pair: len(pair[0]))
    note = (f"{len(lost)} of {len(texts)} texts do not come back from the tokenizer as they are: {text[:200]!r} comes "
            f"back as {back[:200]!r}")
    changed = Counter()                 # (word, the word in its place) -> how often
    for text, back in lost:
        words, others = text.split(), back.split()
        if len(words) == len(others):           # else words have moved
            changed.update(pair for pair in zip(words, others) if pair[0] != pair[1])
    if changed:
        (word, other), times = changed.most_common(1)[0]
        note += f"; most often {word[:50]!r} as {other[:50]!r}, {times} times"
    return [note]


# ---------------------------------------------------------------- from a completion to an answer

@dataclass(frozen=True)
class Parsed:
    answer: str         # the text inside the single answer tag, "" without one
    think: str          # the text inside the single think tag, or REASONING, "" without one
    fault: str          # why it is not well-formed, "" if it is
    sections: dict = field(default_factory=dict, repr=False)    # name -> text of each single section without tags in it

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


def _holds_tag(text):
    return any(tag in text for tag in ALL_TAGS)


def form_of(text):
    """The form that a completion's tags belong to: a name of FORMS, "think" without any tag, "" for tags of both."""
    staged = any(tag in text for tag in STAGE_TAGS)
    thinks = any(tag in text for tag in TAGS)
    if staged and thinks:
        return ""
    return "llava_cot" if staged else "think"


def parse(text):
    """Completion -> Parsed, in linear time; of either form.

    Well-formed is exactly one <think>..</think> followed by exactly one <answer>..</answer>, or exactly one of each of
    LLaVA-CoT's sections in their order, and only white space elsewhere. What stands inside a tag may be empty, in both
    forms, and an empty answer is never right. The answer counts when there is exactly one answer tag, wherever the rest
    went wrong, unless that tag stands inside another, or tags of both forms occur. Tags in another case are text.

    `sections` is empty in the think form; in a well-formed text of the other it has all four, empty ones too.

    >>> parse("<think> so</think><answer> two</answer>")
    Parsed(answer='two', think='so', fault='')
    >>> parse("<think> so<answer> two</answer>").fault
    'no single <think>..</think>'
    >>> parse("<SUMMARY> a</SUMMARY><CAPTION> b</CAPTION><REASONING> c</REASONING><CONCLUSION> d</CONCLUSION>").sections
    {'summary': 'a', 'caption': 'b', 'reasoning': 'c', 'conclusion': 'd'}
    """
    form = form_of(text)
    if not form:
        return Parsed("", "", "tags of two forms")
    found = {name: _between(text, f"<{name}>", f"</{name}>") for name in FORMS[form]}
    thought = found["think" if form == "think" else "REASONING"]
    thought = "" if thought is None else thought.strip()
    counts, fault = _judge(text, FORMS[form], found)
    *_, last = FORMS[form]
    if not counts:
        found[last] = None
    sections = {}
    if form == "llava_cot":
        for name, inside in found.items():
            if inside is not None and not _holds_tag(inside):
                sections[name.lower()] = inside.strip()
    answer = "" if found[last] is None else found[last].strip()
    return Parsed(answer, thought, fault, sections)


def _judge(text, names, found):
    """names: the tags of a form in order, the answer's last; found: name -> what stands in the only tag of that name,
    or None. -> (whether the answer counts, why the text is not well-formed, "" if it is)."""
    *thoughts, last = names
    answer = found[last]
    if answer is None or _holds_tag(answer):
        return False, f"no single <{last}>..</{last}>"
    before = text.split(f"<{last}>")[0]
    after = text.split(f"</{last}>")[1]

    # 1. An answer inside a thought is none.
    missing = ""
    for name in thoughts:
        if f"<{name}>" in before and f"</{name}>" in after:
            return False, f"<{last}> stands inside <{name}>"
        if found[name] is None and not missing:
            missing = f"no single <{name}>..</{name}>"
    if missing:
        return True, missing

    # 2. All tags are there: their order, and what stands between them.
    for name, following in zip(names, names[1:]):
        if text.index(f"<{name}>") > text.index(f"<{following}>"):
            return True, f"<{following}> stands before <{name}>"
        if text.index(f"</{name}>") > text.index(f"<{following}>"):
            return True, f"<{following}> stands inside <{name}>"
    end = 0
    for name in names:
        start = text.index(f"<{name}>")
        if text[end:start].strip():
            return True, "text outside the tags"
        end = text.index(f"</{name}>") + len(f"</{name}>")
    if text[end:].strip():
        return True, "text outside the tags"
    return True, ""
