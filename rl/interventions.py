"""What a model answers when its picture or its thought is taken away: does it look, does its thought matter?

    found = intervene(Sampler(vlm), asking, samples)        # for interventions.json; read by rl/report/verdicts.py

Greedy completions of the same prompts throughout; nothing here trains or draws at random.
"""
from dataclasses import replace

import numpy as np

from data import chat
from data.sample import to_array
from rl.measures import begun

MOST = 200                  # prompts: a loss of five points can be told from none


def intervene(sampler, asking, samples):
    """A Sampler, measures.Asking and samples -> {"looking": {..}, "thinking": {..}} as rl/report/verdicts.py takes
    them; {} in place of one that does not apply: samples without pictures, or no completion with a thought in <think>
    tags."""
    samples = samples[:MOST]

    def complete(asked, beginnings):
        return begun(sampler, asking.tokenizer, asked, beginnings, asking.method, asking.template, asking.max_new)

    seen = [sample for sample in samples if sample.images]
    looks = {}
    if seen:
        config = sampler.vlm.config
        looks = look(complete, seen, config.pixels, config.clip.patch)
    texts = complete(samples, [""] * len(samples))
    return {"looking": looks, "thinking": think(complete, samples, texts)}


def judged(samples, texts):
    """n samples and their completions -> {"right": 0 or 1 of each, "answer": each, normalised}."""
    answers = [chat.parse(text).answer for text in texts]
    right = [int(chat.is_right(sample, answer)) for sample, answer in zip(samples, answers)]
    return {"right": right, "answer": [chat.normalise(answer) for answer in answers]}


# ---------------------------------------------------------------- the picture

def look(complete, samples, pixels, patch):
    """Answers with the picture as it is, a blank one, another prompt's, and every second patch blank; of the samples
    for which there is another picture, {} where there is none.

    complete(samples, beginnings) -> texts; pixels: VlmConfig.pixels; patch: pixels of a patch's side.
    """
    fitted = []                         # of each sample its pictures (size, size, 3), as the model sees them
    for sample in samples:
        fitted.append([to_array(image, pixels["image_size"], pixels["fit"], pixels["mean"])
                       for image in sample.images])
    others = other_pictures(fitted)
    kept = [place for place, other in enumerate(others) if other is not None]
    if not kept:
        return {}
    swapped = [fitted[others[place]] for place in kept]
    fitted = [fitted[place] for place in kept]
    samples = [samples[place] for place in kept]
    unbegun = [""] * len(samples)
    grey = np.array([round(255 * channel) for channel in pixels["mean"]], dtype=np.uint8)
    variants = {
        "as it is": fitted,
        "blanked": [[np.broadcast_to(grey, image.shape).copy() for image in images] for images in fitted],
        "shuffled": swapped,
        "masked": [[masked(image, grey, patch) for image in images] for images in fitted],
    }
    found = {"gold": [chat.normalise(sample.answer) for sample in samples],
             "kind": [sample.source.rpartition("/")[2] for sample in samples]}
    for name, pictures in variants.items():
        asked = [replace(sample, images=tuple(images)) for sample, images in zip(samples, pictures)]
        found[name] = judged(samples, complete(asked, unbegun))
    return found


def masked(image, grey, patch):
    """A picture (S, S, 3) with every second patch, as on a chessboard, of one colour."""
    row, column = np.indices(image.shape[:2]) // patch
    covered = (row + column) % 2 == 1
    return np.where(covered[..., None], grey, image)


def other_pictures(pictures):
    """n lists of pictures -> of each the place of another list, as long and of other pictures; None where there is
    none. The search begins half way round, so that neighbours do not trade with each other."""
    digests = [tuple(image.tobytes() for image in images) for images in pictures]
    n = len(pictures)
    places = []
    for place in range(n):
        order = [(place + n // 2 + step) % n for step in range(n)]
        fits = (other for other in order if len(digests[other]) == len(digests[place])
                and digests[other] != digests[place])
        places.append(next(fits, None))
    return places


# ---------------------------------------------------------------- the thought

def think(complete, samples, texts):
    """Answers behind the model's own thought, none, another prompt's, and the first half of its own; {} without
    well-formed completions in <think> tags, or where all of them have one answer. texts: what the model said of each
    sample.

    The other prompt is one of the same kind of question whose thought led to another answer, where there is one. All
    four go on from an opened answer tag, so that they differ in the thought alone.
    """
    thoughts = []                       # (sample, thought, answer) of the completions that have one
    for sample, text in zip(samples, texts):
        parsed = chat.parse(text)
        if parsed.well_formed and parsed.think and chat.form_of(text) == "think":
            thoughts.append((sample, parsed.think, chat.normalise(parsed.answer)))
    if len({answer for _, _, answer in thoughts}) < 2:
        return {}
    asked = [sample for sample, _, _ in thoughts]
    own = [thought for _, thought, _ in thoughts]
    answers = [answer for _, _, answer in thoughts]
    donors = other_thoughts([sample.source for sample in asked], answers)
    variants = {
        "own": own,
        "removed": [""] * len(own),
        "replaced": [own[donor] for donor in donors],
        "cut": [first_half(thought) for thought in own],
    }
    found = {"donor": [answers[donor] for donor in donors]}
    for name, chosen in variants.items():
        beginnings = [f"<think> {thought}".rstrip() + "</think><answer>" for thought in chosen]
        found[name] = judged(asked, complete(asked, beginnings))
    return found


def first_half(thought):
    """The first half of a text's words, rounded down."""
    words = thought.split()
    return " ".join(words[:len(words) // 2])


def other_thoughts(kinds, answers):
    """Kinds of question and answers of n prompts, not all equal -> of each the place of the next prompt with another
    answer, of the same kind if there is one."""
    n = len(kinds)
    places = []
    for place in range(n):
        others = [(place + step) % n for step in range(1, n)]
        differing = [other for other in others if answers[other] != answers[place]]
        alike = [other for other in differing if kinds[other] == kinds[place]]
        places.append((alike or differing)[0])
    return places
