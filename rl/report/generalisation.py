"""What post-training on a part of the kinds of question did to the others: gain, forgetting, and what goes with them.

    found = rows(scores, measured, decoys, guesses, "cot", parts, seed)     # for generalisation.json
    print(generalisation_text([*results, *found], parts))
    png = picture(found, parts)                                             # None without matplotlib

parts: name of a part -> its kinds of question, which are names of splits, too. A method that was trained on a part ends
in the part's name, "filtered_walks"; behind it may stand the learning rate of a ladder, "filtered_walks@0.0005". Raw
scores and rows as in rl/report/statistics.py, whose `over_seeds` joins the rows of several runs.
"""
import io
import math

import numpy as np

from rl.report.curves import LOOK, OTHER, STYLE
from rl.report.statistics import (by_seed, decoding_title, decodings_of, grid, less, main_decoding, over_seeds,
                                  paired_grid, per_prompt)

NEW_RULE = "accuracy under the stated rule"
OLD_RULE = "accuracy under the old rule"
FORWARD = "KL(start || now)"
REVERSE = "KL(now || start)"
ENTROPY = "entropy"
RETAINED = "retention"
BEGUN = "accuracy, thought begun"
GUESS = "constant guess"                    # its rows' method, and their metric

# Colours and markers of arms, those of the same method elsewhere.
ARMS = {"rl_kl": ("#7A4B00", "X"), "replay": ("#777777", "*"), "continued": STYLE["cot_continued"],
        "gold": STYLE["sft_direct"], "rl": STYLE["grpo_token"]}


def trained_on(method, parts):
    """(the arm, the part that it was trained on, its rate or None) by a method's name; the part is "" for one that was
    trained on all kinds.

    >>> trained_on("filtered_walks@0.0005", ["walks"]), trained_on("cot", ["walks"])
    (('filtered', 'walks', 0.0005), ('cot', '', None))
    """
    name, _, rate = method.partition("@")
    rate = float(rate) if rate else None
    for part in parts:
        base, bracket, switches = name.partition("[")
        if base.endswith(f"_{part}"):
            return base.removesuffix(f"_{part}") + bracket + switches, part, rate
    return name, "", rate


# ---------------------------------------------------------------- rows

def rows(scores, measured, decoys, guesses, start, parts, seed):
    """Rows (method, split, decoding, metric, value, seed) of everything that is no plain accuracy.

    scores: method -> split -> raw scores; measured: method -> such rows without method and seed; decoys: split -> the
    normalised answers that its prompts would have without their rules; guesses: kind -> how often its commonest answer
    is right; start: the method that all were trained from.

    `gain`, with the part as split: mean over the part's kinds of accuracy minus the start's. `forgetting`: mean over
    the other kinds of the start's accuracy minus its own. `change`, with the kind as split: accuracy minus the start's.
    """
    out = []
    for kind, share in guesses.items():
        out.append(dict(method=GUESS, split=kind, decoding="always one answer", metric=GUESS, value=share))
    for method, of_method in scores.items():
        if method == "teacher":             # judged, not asked
            continue
        for decoding in of_method[next(iter(of_method))]:
            raws = {split: raw[decoding] for split, raw in of_method.items()}
            start_raws = {split: raw[decoding] for split, raw in scores[start].items()}
            label = dict(method=method, decoding=decoding)
            _, part, _ = trained_on(method, parts)
            if part:
                out += [label | row for row in changes(raws, start_raws, part, parts)]
            for split, wanted in decoys.items():
                out.append(dict(label, split=split, metric=NEW_RULE, value=accuracy(raws[split])))
                out.append(dict(label, split=split, metric=OLD_RULE, value=share_of(raws[split], wanted)))
        for row in measured[method]:
            out.append(dict(method=method, **row))
    return [dict(row, seed=seed) for row in out]


def changes(raws, start_raws, part, parts):
    """Rows (split, metric, value) of gain, forgetting and the change of each kind, by one decoding."""
    change = {}
    for kinds in parts.values():
        for kind in kinds:
            change[kind] = accuracy(raws[kind]) - accuracy(start_raws[kind])
    gained = [change[kind] for kind in parts[part]]
    forgotten = [-change[kind] for kind in change if kind not in parts[part]]
    out = [dict(split=part, metric="gain", value=float(np.mean(gained))),
           dict(split=part, metric="forgetting", value=float(np.mean(forgotten)))]
    for kind, value in change.items():
        out.append(dict(split=kind, metric="change", value=value))
    return out


def accuracy(raw):
    return float(np.mean(per_prompt(raw, "accuracy")))


def share_of(raw, wanted):
    """The share of the completions of each prompt whose answer is the wanted one."""
    hits = []
    for answers, one in zip(raw["answer"], wanted):
        hits.append(np.mean([answer == one for answer in answers]))
    return float(np.mean(hits))


# ---------------------------------------------------------------- as text

def generalisation_text(found, parts):
    """Tables of rows, those of results.json among them; of several seeds means with 95 % t-intervals, and how the arms
    of a part differ from RL on it."""
    kinds = [kind for of_part in parts.values() for kind in of_part]
    values = {}                                 # (method, split, decoding, metric) -> its row over the seeds
    for row in over_seeds(found):
        values[row["method"], row["split"], row["decoding"], row["metric"]] = row
    methods = [row["method"] for row in found if row["metric"] == NEW_RULE]
    methods = list(dict.fromkeys(methods))
    decodings = decodings_of([row for row in found if row["metric"] == NEW_RULE])

    def table(title, columns, chosen=methods):
        """columns: head -> (split, decoding, metric)."""
        lines = []
        for method in chosen:
            lines.append((method, [_cell(values.get((method, *column))) for column in columns.values()]))
        return grid(title, list(columns), lines)

    tables = []
    for decoding in decodings:
        said = decoding_title(decoding)
        for part in _trained_parts(found, parts):
            chosen = [method for method in methods if trained_on(method, parts)[1] in ("", part)]
            columns = {"gain": (part, decoding, "gain"), "forgetting": (part, decoding, "forgetting")}
            columns |= {kind: (kind, decoding, "accuracy") for kind in kinds}
            title = f"Trained on {part} ({', '.join(parts[part])}), {said}: gain, forgetting; accuracy by kind"
            tables.append(table(title, columns, chosen))
            tables[-1] += "\n" + _guesses(values, kinds)
        columns = {}
        for split in dict.fromkeys(row["split"] for row in found if row["metric"] == NEW_RULE):
            columns[f"{split}: new"] = (split, decoding, NEW_RULE)
            columns[f"{split}: old"] = (split, decoding, OLD_RULE)
        tables.append(table(f"A rule is stated, {said}: accuracy under the new rule and under the old one", columns))
        visual = _others(found, [*kinds, *(column[0] for column in columns.values())])
        columns = {split: (split, decoding, "accuracy") for split in visual}
        tables.append(table(f"Other pictures, {said}: accuracy", columns))
    columns = {"captions": ("captions", "log-prob", RETAINED), "looking": ("looking", "greedy", RETAINED)}
    for part in parts:
        columns |= {f"KL {part}: forward": (part, "t1", FORWARD), f"{part}: reverse": (part, "t1", REVERSE),
                    f"{part}: entropy": (part, "t1", ENTROPY)}
    tables.append(table("Retention: log-prob of a caption's token, nats; accuracy on looking questions. KL(start || "
                        "now) and KL(now || start), nats a completion; entropy, nats a token", columns))
    columns = {}
    for kind in kinds:
        columns |= {f"{kind}: free": (kind, "greedy", "accuracy"), f"{kind}: begun": (kind, "greedy", BEGUN)}
    tables.append(table("Skill and habit, greedy: accuracy as asked, and with the first words of the flawless thought "
                        "given", columns))
    if len({row["seed"] for row in found}) > 1:
        tables.append(against_rl(found, parts))
    return "\n\n".join(tables)


def against_rl(found, parts):
    """A table of the arms of each part less RL on that part, paired by seed; "" without RL on any."""
    decoding = main_decoding([row for row in found if row["metric"] == "gain"])
    of_seeds = by_seed(found, decoding)
    methods = list(dict.fromkeys(row["method"] for row in found))
    rules = list(dict.fromkeys(row["split"] for row in found if row["metric"] == NEW_RULE))
    cells = {}                                  # (method, column) -> Paired
    for part in _trained_parts(found, parts):
        columns = {"gain": (part, "gain"), "forgetting": (part, "forgetting")}
        columns |= {f"{split}: new": (split, NEW_RULE) for split in rules}
        base = f"rl_{part}"
        arms = [method for method in methods if trained_on(method, parts)[1] == part and method != base]
        for column, place in columns.items():
            of_base = of_seeds.get((base, *place), {})
            for arm in arms:
                cells[arm, column] = less(of_seeds.get((arm, *place), {}), of_base)
    return paired_grid(f"Arms less RL on the same part, points, {decoding_title(decoding)}", cells)


def _trained_parts(found, parts):
    """The parts that some method was trained on."""
    trained = {row["split"] for row in found if row["metric"] == "gain"}
    return [part for part in parts if part in trained]


def _cell(row):
    if row is None:
        return ""
    if row["n"] == 1:
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} [{row['low']:.2f}, {row['high']:.2f}]"


def _guesses(values, kinds):
    """A line: what the commonest answer of each kind is worth."""
    shares = []
    for kind in kinds:
        row = values.get((GUESS, kind, "always one answer", GUESS))
        if row is not None:
            shares.append(f"{kind} {row['value']:.3f}")
    return f"always the commonest answer: {', '.join(shares)}"


def _others(found, known):
    """The splits of accuracies beside those known, in their order."""
    splits = [row["split"] for row in found if row["metric"] == "accuracy"]
    return [split for split in dict.fromkeys(splits) if split not in known]


# ---------------------------------------------------------------- as a picture

def picture(found, parts):
    """Rows -> the bytes of a PNG: gain to the right, forgetting upwards, a panel a part, a marker an arm; points of one
    arm at several rates are joined in their order. Of several seeds means with 95 % t-intervals. None without
    matplotlib, and where nothing was trained on a part."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return None
    decoding = main_decoding([row for row in found if row["metric"] == "gain"])
    trained = _trained_parts(found, parts)
    if not trained:
        return None
    points = {}                                 # (part, arm) -> [(rate, gain, forgetting)], the latter two rows
    merged = over_seeds([row for row in found if row["metric"] in ("gain", "forgetting")])
    by_name = {(row["method"], row["decoding"], row["metric"]): row for row in merged}
    for row in merged:
        if row["metric"] != "gain" or row["decoding"] != decoding:
            continue
        arm, part, rate = trained_on(row["method"], parts)
        other = by_name[row["method"], decoding, "forgetting"]
        points.setdefault((part, arm), []).append((rate, row, other))
    with rc_context(LOOK | {"axes.grid.axis": "both"}):
        figure = Figure(figsize=(12.8, 5.4), dpi=125, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        axes = np.atleast_1d(figure.subplots(1, len(trained), sharex=True, sharey=True))
        for ax, part in zip(axes, trained):
            for (of, arm), some in points.items():
                if of == part:
                    _draw_arm(ax, arm, some)
            ax.axhline(0, color="#888888", linewidth=1)
            ax.axvline(0, color="#888888", linewidth=1)
            others = [kind for name, kinds in parts.items() if name != part for kind in kinds]
            ax.set(title=f"Trained on {', '.join(parts[part])}", xlabel="points gained there",
                   ylabel=f"points lost on {', '.join(others)}")
            ax.tick_params(labelleft=True)
        handles = {}
        for ax in axes:
            handles |= dict(zip(*reversed(ax.get_legend_handles_labels())))
        figure.legend(handles.values(), handles, loc="outside right center")
        file = io.BytesIO()
        figure.savefig(file, facecolor="white")
    return file.getvalue()


def arm_style(arm):
    """Colour and marker of an arm; RL goes by its algorithm's name."""
    name = arm.partition("[")[0]
    return ARMS.get(name, STYLE.get(name, OTHER))


def _draw_arm(ax, arm, points):
    """Its points, in the order of their rates; one without a rate, which stands for the arm, is drawn larger."""
    from matplotlib.patheffects import withStroke
    color, marker = arm_style(arm)
    ladder = sorted((point for point in points if point[0] is not None), key=lambda point: point[0])
    alone = [point for point in points if point[0] is None]
    if ladder:
        x = [100 * gain["value"] for _, gain, _ in ladder]
        y = [100 * lost["value"] for _, _, lost in ladder]
        ax.plot(x, y, color=color, marker=marker, markersize=6, linewidth=1.4, label=arm)
        for place in {0, len(ladder) - 1}:
            ax.annotate(shortly(ladder[place][0]), (x[place], y[place]), (4, 4), textcoords="offset points", fontsize=9,
                        color=color, path_effects=[withStroke(linewidth=3, foreground="white")])
    for _, gain, lost in alone:
        ax.errorbar(100 * gain["value"], 100 * lost["value"], xerr=_half(gain), yerr=_half(lost), color=color,
                    marker=marker, markersize=10, elinewidth=1.2, linestyle="", label=arm)


def shortly(rate):
    """A learning rate in few characters.

    >>> shortly(0.000125), shortly(0.002)
    ('1.25e-4', '2e-3')
    """
    digits, _, exponent = f"{rate:.6e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}"


def _half(row):
    """Half of an interval in points; None for that of a single seed."""
    half = 100 * (row["high"] - row["value"])
    return half if math.isfinite(half) else None
