"""Methods of prompting that train nothing: a method is a row of stages, and each stage asks the model once.

    stages = METHODS["ccot"]
    budgets(stages, max_new)                            # tokens that each may sample
    opening(sample, stages[0], template)                # what opens a conversation, as a Sample for chat.encode
    next_turn(tokenizer, stages[1], template)           # what follows an answer, as ids

rl/staged.py carries a method out. Every method ends in the text that `chat.parse` judges, and all sample
at most the same number of tokens.
"""
from dataclasses import replace
from typing import NamedTuple

from data import chat
from data.chat import IMAGE, TEMPLATES, Say


class Stage(NamedTuple):
    """One question to the model.

    name: what its reply is called.
    instruction: what a real model is told.
    brief: the few words of it that models of the drawn world know, of template "brief".
    stop: text that ends the reply; "" for none but the end of the turn.
    share: of the token budget; the shares of a method add up to 1.
    sees: "all", a later turn of the same conversation (the first stage: a new one with the picture);
        "picture", a new conversation with the picture; "text", a new one without. A new one holds the
        earlier replies in its question.
    """
    name: str
    instruction: str
    brief: str
    stop: str = ""
    share: float = 1.0
    sees: str = "all"


ANSWER = "Give only the final answer, inside <answer> </answer>."
END = "</answer>"

METHODS = {
    "direct": (
        Stage("answer", ANSWER, "", END),
    ),
    # Zero-shot chain of thought (arXiv 2205.11916), in one call.
    "think": (
        Stage("answer", f"Think step by step first. {ANSWER}", "think .", END),
    ),
    "caption_first": (
        Stage("caption", "Describe what of the picture matters for this question. Do not answer it yet.",
              "caption .", share=0.5),
        Stage("conclusion", f"Now answer the question. {ANSWER}", "conclusion .", END, share=0.5),
    ),
    # LLaVA-CoT's form (arXiv 2411.10440), asked for in one call.
    "stages_one_call": (
        Stage("answer", "Reply in four parts: your plan inside <SUMMARY> </SUMMARY>, what of the picture matters "
              "inside <CAPTION> </CAPTION>, your reasoning step by step inside <REASONING> </REASONING>, and only "
              "the final answer inside <CONCLUSION> </CONCLUSION>.", "stages .", "</CONCLUSION>"),
    ),
    "stages": (
        Stage("summary", "Outline briefly how you will find the answer. Do not answer yet.", "summary .", share=0.2),
        Stage("caption", "Describe what of the picture matters for the question.", "caption .", share=0.3),
        Stage("reasoning", "Reason step by step from what you described.", "reasoning .", share=0.3),
        Stage("conclusion", ANSWER, "conclusion .", END, share=0.2),
    ),
    # Compositional chain of thought (arXiv 2311.17076); there both calls are new conversations.
    "ccot": (
        Stage("graph", "Write a scene graph of the picture as JSON: the objects that matter for this question, "
              "their attributes, and the relations between them. Write nothing else.", "graph .", share=0.6),
        Stage("conclusion", f"Use the picture and the scene graph to answer the question. {ANSWER}", "conclusion .",
              END, share=0.4),
    ),
    # Duty-distinct chain of thought (arXiv 2310.16436); there a model of its own answers the sub-questions.
    "ddcot": (
        Stage("steps", "You cannot see the picture that this question is about. Break the question down into "
              "sub-questions, one a line, and answer each behind it. Where the answer needs a look at the picture, "
              "write: uncertain.", "steps .", share=0.3, sees="text"),
        Stage("caption", "The sub-questions above were written without a look at the picture. Look at it, and answer "
              "each one that is marked uncertain.", "caption .", share=0.3, sees="picture"),
        Stage("conclusion", "Some of these answers may be wrong. Reason step by step from the picture and all of "
              f"them, then answer the question. {ANSWER}", "conclusion .", END, share=0.4),
    ),
}


def budgets(stages, max_new):
    """Tokens that each stage may sample, together max_new: the last gets what the others' shares leave.

    ValueError unless that is a token or more for each.

    >>> budgets(METHODS["stages"], 32)
    [6, 9, 9, 8]
    """
    if max_new < len(stages):
        raise ValueError(f"max_new={max_new} must be at least {len(stages)}, one token for each stage of the prompting")
    limits = []
    left = max_new
    for number, stage in enumerate(stages):
        later = len(stages) - number - 1
        limit = left
        if later:
            limit = max(1, min(int(stage.share * max_new), left - later))
        limits.append(limit)
        left -= limit
    return limits


def _said(stage, template):
    """What a stage adds to a question."""
    return stage.brief if template == "brief" else stage.instruction


def opening(sample, stage, template, earlier=()):
    """The Sample whose prompt (`chat.encode`, method "direct") opens a conversation with this stage.

    earlier: (name, text) of the replies so far, which go into the question.
    """
    question = sample.question
    turns = sample.turns
    images = sample.images
    if stage.sees == "text":
        images = ()
        question = _without_pictures(question)
        turns = tuple((_without_pictures(asked), answer) for asked, answer in turns)
    parts = [question]
    for name, text in earlier:
        text = chat.as_words(text)
        parts.append(text if template == "brief" else f"{name}: {text}")
    parts.append(_said(stage, template))
    between = " " if template == "brief" else "\n"
    question = between.join(part for part in parts if part)
    return replace(sample, question=question, turns=turns, images=images)


def _without_pictures(question):
    return question.replace(IMAGE, "").strip()


def next_turn(tokenizer, stage, template):
    """Ids that follow a reply: the end of its turn, and the next turn that asks for this stage.

    They are those that `chat.encode` gives for the conversation with the reply among Sample.turns: no piece
    of a template is tokenised together with one behind the answer. The reply itself may differ there: a model may
    spell a text by other tokens than the tokenizer does, and llama_2's space before the EOS is part of what is taught,
    so that the model says it or leaves it out.
    """
    asked = _said(stage, template)
    if template == "brief":             # its texts begin with a space
        asked = f" {asked}"
    ids = []
    for piece in [*_after_answer(template), *TEMPLATES[template](None, asked, None)]:
        if isinstance(piece, Say):
            ids += tokenizer.encode(piece.asked)
        else:
            ids += chat.token_ids(tokenizer, piece.token)
    return ids


def _after_answer(template):
    """The pieces of a turn behind its answer."""
    mark = "answer"
    pieces = list(TEMPLATES[template](None, "", mark))
    places = [place for place, piece in enumerate(pieces) if isinstance(piece, Say) and mark in piece.taught]
    return pieces[places[-1] + 1:]
