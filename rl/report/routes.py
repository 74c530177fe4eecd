"""The three routes to reasoning side by side: what each one's answers are worth, what they cost, and how they fail.

    found = rows(scores, trained, leaks, procedure, seed)       # for routes.json
    print(routes_text(scores, found))

Raw scores as in rl/report/statistics.py. Besides, of each completion: cut (n, G), whether it hit its budget; and, where
a search chose it among others, spent (n, G), all tokens that were sampled and judged for it; before (n,), what a
prompting in stages said before its last reply.
"""
from collections import Counter

import numpy as np

from rl.report.inference import interval
from rl.report.statistics import decoding_title, decodings_of, grid, main_split, per_prompt, share_text

PROCEDURES = ("list", "walk", "none")
COSTS = "costs and failures"


def rows(scores, trained, leaks, procedure, seed):
    """Rows of two kinds, all of the split that is like training: one a column of `costs`, with the column as split; and
    shares of completions that follow a procedure, with the question kind as split.

    scores: method -> split -> raw scores; trained: method -> FLOPs of its training, those of the base left out;
    leaks(text) -> whether a chain speaks of an answer that it was given; procedure(text) -> one of PROCEDURES.
    """
    out = []
    for method, of_method in scores.items():
        raws = of_method[main_split(list(of_method))]
        for decoding, raw in raws.items():
            label = dict(method=method, decoding=decoding, seed=seed)
            for column, value in costs(raw, trained.get(method), leaks).items():
                out.append(dict(label, split=column, metric=COSTS, value=value))
            if decoding == "greedy":            # procedures of the sampled decoding: there are tables enough
                continue
            for kind, shares in procedures_by_kind(raw, procedure).items():
                for name, share in shares.items():
                    out.append(dict(label, split=kind, metric=f"procedure: {name}", value=share))
    return out


def costs(raw, flops, leaks):
    """{column: value}: mean tokens an answer took, TFLOP of the method's training; shares of completions that hold no
    answer to judge, that are not well-formed (a direct answer never is, nor the last of several replies), that were cut
    off, and, of the first ones, that leak. What was not counted is left out."""
    found = {}
    spent = raw.get("spent", raw.get("length"))
    if spent is not None:
        found["tokens"] = float(np.mean(spent))
    if flops is not None:
        found["TFLOP"] = flops / 1e12
    if "answer" in raw:
        answered = [[bool(answer) for answer in group] for group in raw["answer"]]
        found["no answer"] = 1 - float(np.mean(answered))
    if "format" in raw:
        found["malformed"] = 1 - float(np.mean(raw["format"]))
    if "cut" in raw:
        found["cut off"] = float(np.mean(raw["cut"]))
    found["leaked"] = float(np.mean([leaks(text) for text in whole_texts(raw)]))
    return found


def whole_texts(raw):
    """The first completion of each prompt; what was said before the last stage is its thought."""
    if "before" not in raw:
        return raw["text"]
    texts = []
    for before, text in zip(raw["before"], raw["text"]):
        texts.append(f"<think> {before}</think>{text}" if before else text)
    return texts


def procedures_by_kind(raw, procedure):
    """Raw scores of a decoding -> {question kind: {procedure: its share of the first completions}}."""
    counts = {}
    for kind, text in zip(raw["kind"], whole_texts(raw)):
        counts.setdefault(kind, Counter())[procedure(text)] += 1
    shares = {}
    for kind, count in counts.items():
        shares[kind] = {name: count[name] / count.total() for name in PROCEDURES}
    return shares


# ---------------------------------------------------------------- as text

def routes_text(scores, found):
    """A table a decoding: accuracy on every split, costs, failures; then the procedures of the last decoding."""
    tables = [routes_table(scores, found, decoding) for decoding in decodings_of(found)]
    tables.append(procedures_table(found, decodings_of(found)[-1]))
    return "\n\n".join(tables)


def routes_table(scores, found, decoding):
    """A line a method that was decoded so."""
    splits = []
    for of_method in scores.values():
        splits += of_method
    splits = list(dict.fromkeys(splits))
    columns = ["tokens", "TFLOP", "no answer", "malformed", "cut off", "leaked"]
    values = {}
    for row in found:
        if row["decoding"] == decoding and row["metric"] == COSTS:
            values[row["method"], row["split"]] = row["value"]
    lines = []
    for method, of_method in scores.items():
        accuracies = {split: _accuracy(raw[decoding]) for split, raw in of_method.items() if decoding in raw}
        if not accuracies:
            continue
        cells = [accuracies.get(split, "") for split in splits]
        for column in columns:
            cells.append(_number(values.get((method, column)), column))
        lines.append((method, cells))
    title = f"Routes, {decoding_title(decoding)}: accuracy, tokens an answer, TFLOP of training, failures"
    return grid(title, [*splits, *columns], lines)


def _accuracy(raw):
    value, low, high = interval(per_prompt(raw, "accuracy"))
    return share_text(dict(value=value, low=low, high=high))


def _number(value, column):
    if value is None:
        return ""
    if column == "tokens":
        return f"{value:.1f}"
    return f"{value:.2f}"


def procedures_table(found, decoding):
    """Which procedure the thoughts of each method follow, by question kind."""
    shares = {}                                 # method -> kind -> procedure -> share
    kinds = []
    for row in found:
        if row["decoding"] == decoding and row["metric"] != COSTS:
            name = row["metric"].removeprefix("procedure: ")
            shares.setdefault(row["method"], {}).setdefault(row["split"], {})[name] = row["value"]
            kinds.append(row["split"])
    kinds = sorted(set(kinds))
    lines = []
    for method, by_kind in shares.items():
        lines.append((method, [_shares(by_kind.get(kind)) for kind in kinds]))
    title = f"Procedure by question kind, {decoding_title(decoding)}: shares of {' / '.join(PROCEDURES)}"
    return grid(title, kinds, lines)


def _shares(of_kind):
    if of_kind is None:
        return ""
    return " / ".join(f"{of_kind[name]:.2f}" for name in PROCEDURES)
