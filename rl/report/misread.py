"""Who reads a 3 as an 8 and an 8 as a 3, as the teacher of drawn monitors does: misread.json and its table.

    found = rows(scores, seed)
    print(misread_text(found))

Asked are the prompts of kind "read" whose gold number has such a digit; raw scores as in rl/report/statistics.py.
"""
from data.chat import normalise, parse
from rl.report.inference import interval
from rl.report.statistics import decoding_title, grid, main_decoding, share_text

ALIKE = "38"
METRIC = "misread"


def is_misread(answer, gold):
    """Whether an answer is the gold one but for one or more of ALIKE's digits in each other's place.

    >>> is_misread("88 bpm", "83 bpm"), is_misread("83 bpm", "83 bpm"), is_misread("93 bpm", "83 bpm")
    (True, False, False)
    """
    if len(answer) != len(gold) or answer == gold:
        return False
    return all(a == g or (a in ALIKE and g in ALIKE) for a, g in zip(answer, gold))


def answers_of(raw):
    """n lists of normalised answers; of a teacher, whose scores have none, those of its chains."""
    if "answer" in raw:
        return raw["answer"]
    return [[normalise(parse(text).answer)] for text in raw["text"]]


def rows(scores, seed):
    """{method: {split: {decoding: raw}}} -> the share of completions that misread, in the form of results.json's
    rows; one that holds no prompt to be misread has none."""
    gold = {}                           # (split, decoding) -> gold answers, which a teacher's scores lack
    for splits in scores.values():
        for split, of_split in splits.items():
            for decoding, raw in of_split.items():
                if "gold" in raw:
                    gold[split, decoding] = raw["gold"]
    found = []
    for method, splits in scores.items():
        for split, of_split in splits.items():
            for decoding, raw in of_split.items():
                shares = misread_shares(raw, gold.get((split, decoding), ()))
                if shares:
                    value, low, high = interval(shares)
                    found.append(dict(method=method, split=split, decoding=decoding, metric=METRIC, value=value,
                                      low=low, high=high, n=len(shares), seed=seed))
    return found


def misread_shares(raw, gold):
    """The share of misread completions of each prompt that can be misread."""
    shares = []
    for kind, right, answers in zip(raw["kind"], gold, answers_of(raw)):
        number = right.partition(" ")[0]
        if kind == "read" and any(digit in number for digit in ALIKE):
            shares.append(sum(is_misread(answer, right) for answer in answers) / len(answers))
    return shares


def misread_text(found):
    """The table: a line a method, a column a split, sampled decoding."""
    decoding = main_decoding(found)
    chosen = [row for row in found if row["decoding"] == decoding]
    splits = list(dict.fromkeys(row["split"] for row in chosen))
    cells = {}                          # method -> {split: text}
    for row in chosen:
        cells.setdefault(row["method"], {})[row["split"]] = share_text(row)
    lines = [(method, [texts.get(split, "") for split in splits]) for method, texts in cells.items()]
    title = f"Numbers with a 3 or an 8 that are read with the other one, {decoding_title(decoding)}"
    return grid(f"{title} [95 % interval over prompts]", splits, lines)
