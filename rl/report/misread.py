"""Who reads a 3 as an 8 and an 8 as a 3, as the teacher of drawn monitors does: misread.json and its tables.

    found = rows(scores, seed)
    print(misread_text(found))

Asked are the prompts of kind "read" whose gold number has such a digit; raw scores as in rl/report/statistics.py.
"""
from itertools import product

from data.chat import normalise, parse
from rl.report.inference import interval
from rl.report.statistics import decoding_title, main_decoding, share_grid

# metric -> (the digits that are shown, the digits that they are read as)
METRICS = {
    "3 read as 8": ("3", "8"),
    "8 read as 3": ("8", "3"),
}
ALIKE = "38"


def is_misread(answer, gold, shown, read):
    """Whether an answer is the gold number but for ALIKE's digits, one of which is `shown` and stands there as `read`.

    >>> is_misread("88 bpm", "83 bpm", "3", "8"), is_misread("88 bpm", "83 bpm", "8", "3")
    (True, False)
    >>> is_misread("93 bpm", "83 bpm", "8", "3")
    False
    """
    pairs = list(zip(answer, gold))
    is_number = len(answer) == len(gold) and all(a == g or (a in ALIKE and g in ALIKE) for a, g in pairs)
    return is_number and (read, shown) in pairs


def answers_of(raw):
    """n lists of normalised answers; of a teacher, whose scores have none, those of its chains."""
    if "answer" in raw:
        return raw["answer"]
    return [[normalise(parse(text).answer)] for text in raw["text"]]


def misread_shares(raw, gold, shown, read):
    """The share of completions of each prompt with a digit `shown` that take it for `read`."""
    shares = []
    for kind, right, answers in zip(raw["kind"], gold, answers_of(raw)):
        if kind == "read" and shown in right.partition(" ")[0]:
            shares.append(sum(is_misread(answer, right, shown, read) for answer in answers) / len(answers))
    return shares


def each(scores):
    """{method: {split: {decoding: raw}}}, as (method, split, decoding, raw)."""
    for method, splits in scores.items():
        for split, of_split in splits.items():
            for decoding, raw in of_split.items():
                yield method, split, decoding, raw


def gold_of(scores):
    """{(split, decoding): gold answers}, which a teacher's scores lack."""
    return {(split, decoding): raw["gold"] for _, split, decoding, raw in each(scores) if "gold" in raw}


def rows(scores, seed):
    """{method: {split: {decoding: raw}}} -> a row for each of METRICS, in the form of results.json's; none where no
    prompt shows the digit."""
    gold = gold_of(scores)
    found = []
    for (method, split, decoding, raw), metric in product(each(scores), METRICS):
        shares = misread_shares(raw, gold.get((split, decoding), ()), *METRICS[metric])
        if shares:
            value, low, high = interval(shares)
            found.append(dict(method=method, split=split, decoding=decoding, metric=metric, value=value, low=low,
                              high=high, n=len(shares), seed=seed))
    return found


def misread_text(found):
    """A table for each of METRICS: a line a method, a column a split, sampled decoding; "" without rows."""
    if not found:
        return ""
    decoding = main_decoding(found)
    tables = []
    for metric in METRICS:
        chosen = [row for row in found if row["decoding"] == decoding and row["metric"] == metric]
        title = f"Numbers in which {metric}, {decoding_title(decoding)} [95 % interval over prompts]"
        if chosen:
            tables.append(share_grid(title.replace(" read", " is read"), chosen))
    return "\n\n".join(tables)
