"""Whether thinking grows: how long thoughts are, whether they walk as far as they are asked, and what a second look at
the start is worth.

    found = rows(scores, seed)                          # for growth.json
    print(growth_text(found))
    growth_picture(found)                               # the bytes of growth.png

Raw scores as in rl/report/statistics.py. Besides, of each completion (n, G), as data.long_walks.noted says: asked and
walked, hops of the question and of the thought; rechecks, how often it says "wait"; first and last, whether the first
and the last look found the start, -1 for a look at no cell; candidates, things that are called like the start.
"""
import io
import math

import numpy as np

from rl.report.curves import LOOK, style
from rl.report.statistics import (by_seed, decoding_title, decodings_of, grid, less, main_decoding, main_split,
                                  over_seeds, paired_grid, per_prompt, within)

GROWTH = "growth: "             # in front of a metric, so that no other table takes its rows for its own
PASS = "pass@8"
# A table each, a column a split.
BY_SPLIT = {
    "accuracy": "accuracy",
    PASS: "pass@8, unbiased",
    "tokens": "tokens of a completion",
    "hops": "hops walked in the thought",
    "as asked": "share that walks exactly as many hops as asked",
    "re-checks": "share that looks again at the start, or at a hop",
    "twice": "share that looks again twice or more",
}
# Answers are compared behind a wrong first look only: who looks again has mostly begun wrong, so that among all
# completions a second look would seem to do harm.
AGAIN = "wrong, again: right answer"
NOT_AGAIN = "wrong, not again: right answer"
# Columns of one table a split.
OF_LOOKS = ("look again", "first look right", "re-check after wrong", "re-check after right", "mended",
            "mended by chance", AGAIN, NOT_AGAIN)
SHOWN_LOOKS = ("crowded", "walk6")      # splits whose looks are shown beside those of the one that is like training
# What is compared with its start: (metric, split).
QUESTIONS = (("accuracy", "id"), (PASS, "id"), ("re-checks", "id"), ("re-check after wrong", "id"),
             ("re-check after right", "id"), ("accuracy", "walk4"), ("as asked", "walk4"), ("accuracy", "walk6"),
             ("as asked", "walk6"))


def rows(scores, seed):
    """method -> split -> raw scores -> rows: method, split, decoding, metric, value, seed.

    A share of no completion at all has no row. Methods whose completions were not noted have none.
    """
    out = []
    for method, splits in scores.items():
        for split, decodings in splits.items():
            for decoding, raw in decodings.items():
                label = dict(method=method, split=split, decoding=decoding)
                for metric, value in (by_length(raw) | of_looks(raw)).items():
                    out.append(dict(label, metric=GROWTH + metric, value=value, seed=seed))
    return out


def by_length(raw):
    """Raw scores of a decoding -> {name of BY_SPLIT: value}."""
    if "walked" not in raw:
        return {}
    asked, walked, rechecks = (np.array(raw[name]) for name in ("asked", "walked", "rechecks"))
    found = {"accuracy": np.mean(raw["right"]), "hops": walked.mean(), "as asked": (walked == asked).mean(),
             "re-checks": (rechecks > 0).mean(), "twice": (rechecks > 1).mean()}
    if "length" in raw:
        found["tokens"] = np.mean(raw["length"])
    passed = per_prompt(raw, PASS)
    if passed is not None:
        found[PASS] = passed.mean()
    return {name: float(found[name]) for name in BY_SPLIT if name in found}


def of_looks(raw):
    """Raw scores of a decoding -> {name of OF_LOOKS: value}.

    look again: how many completions do. first look right: of those that look at a cell at all. re-check after wrong,
    after right: of the completions whose first look was so, the share that looks again. mended: of those that look
    again after a wrong first look, the share whose last look is right; by chance: if they named another candidate
    blindly. wrong, again, and not again: accuracy behind a wrong first look. A look again is any "wait", of the start
    or of a hop.
    """
    if "walked" not in raw:
        return {}
    right, first, last = (np.array(raw[name]) for name in ("right", "first", "last"))
    again = np.array(raw["rechecks"]) > 0
    others = np.maximum(1, np.array(raw["candidates"]) - 1)
    found = {
        "look again": float(again.sum()),
        "first look right": _share(first == 1, first >= 0),
        "re-check after wrong": _share(again, first == 0),
        "re-check after right": _share(again, first == 1),
        "mended": _share(last == 1, again & (first == 0)),
        "mended by chance": _share(1 / others, again & (first == 0)),
        AGAIN: _share(right == 1, again & (first == 0)),
        NOT_AGAIN: _share(right == 1, ~again & (first == 0)),
    }
    return {name: value for name, value in found.items() if value is not None}


def _share(what, of):
    """The mean of `what`, bool or a chance, among `of`, bool of the same shape; None among none."""
    return float(what[of].mean()) if of.any() else None


def by_cell(found):
    """Rows of one seed or several -> {(method, split, decoding, metric without GROWTH): its row over the seeds}."""
    rows = {}
    for row in over_seeds(found):
        rows[row["method"], row["split"], row["decoding"], row["metric"].removeprefix(GROWTH)] = row
    return rows


def _names(found, field):
    return list(dict.fromkeys(row[field] for row in found))


# ---------------------------------------------------------------- as text

def growth_text(found):
    """A table a decoding and metric of BY_SPLIT; then, of the sampled decoding, who looks again and, over several
    seeds, answers with and without a second look, and arms compared with their start."""
    if not found:
        return ""
    values = by_cell(found)
    tables = []
    for decoding in decodings_of(found):
        for metric, title in BY_SPLIT.items():
            tables.append(length_table(found, values, decoding, metric, title))
    decoding = main_decoding(found)
    for split in shown_looks(found):
        tables.append(looks_table(found, values, decoding, split))
    if len(_names(found, "seed")) > 1:
        tables.append(worth_of_a_look(found, decoding))
        tables.append(against_start(found, decoding))
    return "\n\n".join(text for text in tables if text)


def shown_looks(found):
    """The splits whose looks are shown."""
    splits = _names(found, "split")
    return [split for split in dict.fromkeys((main_split(splits), *SHOWN_LOOKS)) if split in splits]


def worth_of_a_look(found, decoding):
    """A table a method: behind a wrong first look, right answers of those that look again less of those that do not,
    paired by seed. A second look was not drawn by lot: prompts on which a method looks again may be others."""
    of_seeds = by_seed(found, decoding)
    cells = {}                                  # (method, split) -> Paired
    for method in _arms(found):
        for split in shown_looks(found):
            again, not_again = (of_seeds.get((method, split, GROWTH + name), {}) for name in (AGAIN, NOT_AGAIN))
            cells[method, split] = less(again, not_again)
    title = "Behind a wrong first look, right answers with a second look less without, points, "
    return paired_grid(title + decoding_title(decoding), cells)


def against_start(found, decoding, start="cot"):
    """A table of the arms less what they start from, paired by seed; "" without it."""
    of_seeds = by_seed(found, decoding)
    arms = [method for method in _arms(found) if method != start]
    cells = {}                                  # (method, column) -> Paired
    for metric, split in QUESTIONS:
        place = split, GROWTH + metric
        before = of_seeds.get((start, *place), {})
        for method in arms:
            cells[method, f"{metric}, {split}"] = less(of_seeds.get((method, *place), {}), before)
    return paired_grid(f"Arms less {start}, points, {decoding_title(decoding)}", cells)


def _arms(found):
    """The methods but the teacher, whose few chains are the same with every seed."""
    return [method for method in _names(found, "method") if method != "teacher"]


def length_table(found, values, decoding, metric, title):
    """A line a method, a column a split; "" where no completion has the metric."""
    splits = _names(found, "split")
    lines = []
    for method in _names(found, "method"):
        cells = [_text(values.get((method, split, decoding, metric)), metric) for split in splits]
        if any(cells):
            lines.append((method, cells))
    if not lines:
        return ""
    return grid(f"Growth, {decoding_title(decoding)}: {title}", splits, lines)


def looks_table(found, values, decoding, split):
    """A line a method, a column of OF_LOOKS each."""
    lines = []
    for method in _names(found, "method"):
        cells = [_text(values.get((method, split, decoding, name)), name) for name in OF_LOOKS]
        if any(cells):
            lines.append((method, cells))
    title = f"Looks on {split}, {decoding_title(decoding)}: how many completions look again, mean of a seed; shares"
    return grid(title, OF_LOOKS, lines)


def _text(row, metric):
    if row is None:
        return ""
    if metric == "look again":
        return f"{row['value']:.0f}"
    is_share = metric not in ("tokens", "hops")
    digits = 3 if is_share else 1
    text = f"{row['value']:.{digits}f}"
    if row["n"] == 1 or row["sd"] == 0:         # one seed, or a teacher whose chains are the same with every seed
        return text
    rounded = max(1, digits - 1)
    low, high = within(row["low"], row["high"], 0.0, 1.0 if is_share else math.inf)
    return f"{text} [{low:.{rounded}f}, {high:.{rounded}f}]"


# ---------------------------------------------------------------- as a picture

def growth_picture(found, trained):
    """The rows of growth.json as the bytes of a PNG, 1600 pixels wide; over several seeds points are means. trained:
    hops of the longest walk that was trained. None without matplotlib, or without walks of two lengths."""
    if len(lengths_of(found)) < 2:
        return None
    try:
        from matplotlib import rc_context
    except ImportError:
        return None
    with rc_context(LOOK):
        file = io.BytesIO()
        draw(found, trained).savefig(file, facecolor="white")
    return file.getvalue()


def lengths_of(found):
    """{hops: split} of the splits that hold walks of one length, "walk3" for instance, in order of their hops."""
    lengths = {}
    for split in _names(found, "split"):
        hops = split.removeprefix("walk")
        if hops != split and hops.isdigit():
            lengths[int(hops)] = split
    return dict(sorted(lengths.items()))


WHOLE = ("accuracy", "as asked", PASS)          # drawn from 0 to 1
# Metrics that are drawn, and the titles of their panels.
PANELS = {
    "accuracy": "Accuracy",
    "hops": "Hops walked (dashed: asked)",
    "tokens": "Tokens of a completion",
    "as asked": "Walks as many hops as asked",
    "re-check after wrong": "Looks again after a wrong look\n(dotted: after a right one)",
    PASS: "pass@8",
}


def draw(found, trained):
    """The picture of `growth_picture` as a matplotlib Figure: a panel a metric, hops to the right, a method a line;
    longer walks than the trained ones lie in the grey."""
    from matplotlib.figure import Figure
    values = by_cell(found)
    decoding = main_decoding(found)
    lengths = lengths_of(found)
    hops = list(lengths)
    figure = Figure(figsize=(12.8, 7.6), dpi=125, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    axes = figure.subplots(2, 3).flatten()
    for ax, (metric, title) in zip(axes, PANELS.items()):
        if metric == "hops":
            ax.plot(hops, hops, color="#888888", linestyle="--", linewidth=1.4)
        for method in _names(found, "method"):
            _line(ax, values, method, decoding, lengths, metric)
            if metric == "re-check after wrong":
                _line(ax, values, method, decoding, lengths, "re-check after right", linestyle=":", label="")
        highest = max(ax.dataLim.y1, 1e-3)          # minus infinity of a panel without a line
        if max(hops) > trained:
            ax.axvspan(trained + 0.5, max(hops) + 0.3, color="#f0f0f0", zorder=0)
        ax.set_title(title, fontsize=11)
        ax.set_xticks(hops)
        ax.set_xlim(min(hops) - 0.3, max(hops) + 0.3)
        ax.set_ylim(0, 1.05 if metric in WHOLE else 1.1 * highest)
    seeds = len(_names(found, "seed"))
    over = f", mean of {seeds} seeds" if seeds > 1 else ""
    figure.supxlabel(f"hops asked (grey: more than trained), {decoding_title(decoding)}{over}", fontsize=12)
    handles = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside right center")
    return figure


def _line(ax, values, method, decoding, lengths, metric, linestyle="-", label=None):
    """A method's metric over the hops that it is known at."""
    points = []
    for hops, split in lengths.items():
        row = values.get((method, split, decoding, metric))
        if row is not None:
            points.append((hops, row["value"]))
    if not points:
        return
    color, marker = style(method)
    x, y = zip(*points)
    ax.plot(x, y, color=color, marker=marker, markersize=7, linewidth=1.8, linestyle=linestyle, alpha=0.9,
            label=method if label is None else label)
