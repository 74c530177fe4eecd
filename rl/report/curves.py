"""curves.png: what a run learned, from its log.jsonl and results.json, as one picture."""
import io
import math
from itertools import cycle

import numpy as np

from rl.report.statistics import decoding_title, main_decoding, main_split

# Stages that follow each other; the other supervised ones are arms of the comparison.
MAIN = ("clip", "align", "sft", "cot")
# Okabe and Ito's palette, which colour-blind readers tell apart, darkened where it is faint on
# white; and a marker each, for print without colour.
STYLE = {
    "teacher": ("#000000", ""), "cot": ("#0072B2", "o"), "cot_continued": ("#3D9FDC", "s"),
    "filtered": ("#D99400", "^"), "grpo_token": ("#D55E00", "D"), "rejection": ("#009E73", "v"),
    "sft_direct": ("#CC79A7", "P"), "perfect": ("#777777", "*"),
    "grpo_token_zero": ("#7A4B00", "X"),
    "grpo": ("#9E2A2B", "<"), "dr_grpo": ("#D99400", "^"), "dapo": ("#009E73", "v"),
    "gspo": ("#CC79A7", "P"), "cispo": ("#7A4B00", "X"), "rloo": ("#3D9FDC", "s"),
    "ppo": ("#000000", "*"), "sapo": ("#0072B2", "o"), "luspo": ("#777777", "p"),
    "reinforce++": ("#8A2BE2", "d"), "grpo_token_kl": ("#9E2A2B", "<"),
    "reinforce": ("#8A2BE2", "d"), "negative": ("#7A4B00", "X"),
    "rejection_iterated": ("#00604A", ">"), "distilled": ("#6B6B00", "p"),
    "rl_slow": ("#9E2A2B", "<"), "rl_curriculum": ("#009E73", "v"), "rl_pass_at_k": ("#8A2BE2", "d"),
    "base": ("#0072B2", "o"), "llava_o1": ("#D99400", "^"), "llava_o1_blind": ("#CC79A7", "P"),
    "rl_from_base": ("#009E73", "v"), "rl_from_o1": ("#D55E00", "D"),
    "right": ("#0072B2", "s"), "right_gated": ("#3D9FDC", "^"),
    "format": ("#D99400", "v"), "format_gated": ("#D55E00", "D"),
}
OTHER = ("#555555", "h")
REWARD_COLORS = {"reward": "#333333", "reward/format": "#3D9FDC", "reward/correctness": "#D55E00"}
OTHER_REWARDS = ("#009E73", "#CC79A7", "#D99400", "#0072B2", "#7A4B00", "#8A2BE2")     # in turn
# What a split is about, in a few words; other splits have their name alone.
SPLITS = {"id": "like training", "crowded": "more objects", "pairs": "unseen pairs",
          "walk3": "3 hops, unseen", "walk4": "4-5 hops, unseen"}
LOOK = {"font.size": 12, "axes.titlesize": 13, "axes.titleweight": "bold",
        "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": "#888888", "xtick.color": "#444444", "ytick.color": "#444444",
        "axes.labelcolor": "#444444", "axes.grid": True, "axes.grid.axis": "y",
        "grid.color": "#E6E6E6", "axes.axisbelow": True, "legend.frameon": False}


def style(label):
    """Colour and marker of a stage or method; "grpo[kl_coef=0.0]" has those of "grpo", and RL by
    whatever algorithm, "grpo_token_from_o1", those of the stage "rl_from_o1"."""
    name = label.partition("[")[0]
    _, joint, start = name.rpartition("_from_")
    if joint:
        name = f"rl_from_{start}"
    return STYLE.get(name, OTHER)


def in_lines(label):
    """A label with a line for its name, one for where it starts from, and one for each switch: one
    line would be too wide."""
    return label.replace("_from_", "\nfrom ").replace("[", "\n[").replace(",", ",\n")


def curves(log, results):
    """Lines of log.jsonl and rows of results.json -> the bytes of a PNG, 1600 pixels wide.

    Panels without data are left out. None without matplotlib.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        return None
    with rc_context(LOOK):
        file = io.BytesIO()
        draw(log, results).savefig(file, facecolor="white")
    return file.getvalue()


def draw(log, results):
    """The picture of `curves` as a matplotlib Figure."""
    from matplotlib import rc_context
    # Not pyplot: no window, and no figure that outlives the call.
    from matplotlib.figure import Figure
    learned = {}                                  # method -> its lines, of RL
    imitated = {}                                 # stage -> its lines, supervised
    for line in log:
        if "reward" in line:
            learned.setdefault(line["method"], []).append(line)
        elif "loss" in line:
            imitated.setdefault(line["stage"], []).append(line)
    accuracies = [row for row in results if row["metric"] == "accuracy"]
    decoding = main_decoding(accuracies)
    rows = on_every_split([row for row in accuracies if row["decoding"] == decoding])

    trained = bool(learned or imitated)
    with rc_context(LOOK):
        height = 7.6 if trained and rows else 4
        figure = Figure(figsize=(12.8, height), dpi=125, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        upper = lower = figure
        if trained and rows:
            upper, lower = figure.subfigures(2, 1, height_ratios=(1.15, 1))
        left = right = upper
        if imitated and learned:
            left, right = upper.subfigures(1, 2, width_ratios=(1, 1.5))
        if imitated:
            _losses(left.subplots(), imitated)
        if learned:
            _learning(right, learned, _teacher(rows))
        if rows:
            _accuracies(lower.subplots(), rows, decoding_title(decoding))
        if not trained and not rows:
            figure.text(0.5, 0.5, "nothing logged yet", ha="center", color="#888888")
    return figure


def on_every_split(rows):
    """The rows of the teacher, and of methods that were asked on every split: the others, of which
    routes have a dozen, would leave no room, and the tables have them, and the best points of
    curves."""
    splits = {row["split"] for row in rows}
    asked = {}                                    # method -> its splits
    for row in rows:
        asked.setdefault(row["method"], set()).add(row["split"])
    asked["teacher"] = splits
    shown = [method for method in asked if asked[method] == splits and "@" not in method]
    return [row for row in rows if row["method"] in shown]


def _teacher(rows):
    """[the teacher's accuracy on the split that is like training]; [] without a teacher."""
    at = {row["split"]: row["value"] for row in rows if row["method"] == "teacher"}
    return [at[main_split(list(at))]] if at else []


def _draw(ax, lines, name, color, width=2.2, place=lambda step: step):
    """Raw values thin, their centred moving average thick.

    Returns [the average's last value], or [] where no line has the metric.
    """
    points = []
    for line in lines:
        # A rollout whose groups are all flat has no update and no entropy; a step without usable
        # records has no loss.
        value = line.get(name)
        if value is not None and math.isfinite(value):
            points.append((line["step"], value))
    if not points:
        return []
    x, y = np.array(points, dtype=float).T
    window = np.ones(max(1, len(y) // 15))
    smooth = np.convolve(y, window, "same") / np.convolve(np.ones(len(y)), window, "same")
    ax.plot(place(x), y, color=color, alpha=0.3, linewidth=0.8)
    marker = "o" if len(y) == 1 else ""
    ax.plot(place(x), smooth, color=color, linewidth=width, marker=marker, label=name)
    return [smooth[-1]]


def _label_ends(ax, ends, gap=0.075):
    """Names at the right of lines, [(y, text, color)], moved apart where they would overlap."""
    to_axes = ax.transScale + ax.transLimits
    labels = []                         # (height in the axes, 0 to 1; text; colour), from below
    for y, text, color in ends:
        labels.append((to_axes.transform((1, y))[1], text, color))
    labels.sort()
    heights = [height for height, _, _ in labels]
    halves = [gap * (1 + text.count("\n")) / 2 for _, text, _ in labels]
    # Up from the lowest; then those that left the axes down again, with what is in their way.
    for i in range(1, len(labels)):
        heights[i] = max(heights[i], heights[i - 1] + halves[i - 1] + halves[i])
    ceiling = 1.0
    for i in reversed(range(len(labels))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - halves[i] - halves[i - 1]
    for height, (_, text, color) in zip(heights, labels):
        ax.text(1.02, height, text, color=color, transform=ax.transAxes, va="center")


def _losses(ax, stages):
    """One column a supervised stage, in order; the arms of the comparison share the last one."""
    arms = [stage for stage in stages if stage not in MAIN]
    columns = [(stage, [stage]) for stage in MAIN if stage in stages]
    if arms:
        columns.append(("comparison", arms))
    left = 0
    middles = []
    names = []
    ends = []
    for name, members in columns:
        compared = members is arms
        width = 2 if compared else 1
        steps = 1
        for stage in members:
            steps = max(steps, *(1 + line["step"] for line in stages[stage]))
        middles.append(left + width / 2)
        up_to = "up to " if len(members) > 1 else ""
        names.append(f"{name}\n{up_to}{steps:,}")

        def place(step):
            return left + width * (0.04 + 0.92 * (step + 0.5) / steps)

        for stage in members:
            color = style(stage)[0] if compared else "#333333"
            end = _draw(ax, stages[stage], "loss", color, place=place)
            if compared:
                ends += [(y, stage, color) for y in end]
        left += width
        ax.axvline(left, color="#CCCCCC", linewidth=0.8)
    low, high = ax.dataLim.intervaly
    if 0 < 8 * low < high < math.inf:
        ax.set_yscale("log")
        ax.yaxis.get_major_locator().set_params(subs=(1, 2, 5) if high < 300 * low else (1,))
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        ax.minorticks_off()
    ax.set(title="Supervised stages: loss", xlim=(0, left), xlabel="optimizer steps", ylabel="nats")
    ax.set_xticks(middles, names)
    ax.tick_params(axis="x", length=0)
    _label_ends(ax, ends)


def _learning(figure, methods, teacher):
    """Rewards by step, the teacher's accuracy dashed; beside them length, entropy, flat groups.

    methods: method -> its lines; teacher: its accuracy, as a list of one value or of none. Of
    several methods the big panel shows correctness alone, and a small one the format.
    """
    several = len(methods) > 1
    small = {"reward/format": "Format"} if several else {}
    small |= {"length": "Tokens of a completion", "entropy": "Entropy, nats a token",
              "flat": "Share of flat groups"}
    mosaic = ";".join(f"A{name}" for name in "BCDE"[:len(small)])
    big, *axes = figure.subplot_mosaic(mosaic, width_ratios=(1.25, 1)).values()
    colors = {method: style("grpo_token")[0] for method in methods}
    if several:
        colors = {method: style(method)[0] for method in methods}

    ends = []
    for accuracy in teacher:
        big.axhline(accuracy, color="black", linestyle="--", linewidth=1.4)
        ends.append((accuracy, f"teacher's\nanswers {accuracy:.2f}", "black"))
    if several:
        for method, lines in methods.items():
            for y in _draw(big, lines, "reward/correctness", colors[method]):
                ends.append((y, in_lines(method), colors[method]))
    else:
        [lines] = methods.values()
        ends += _rewards(big, lines)
    title = "RL: correctness" if several else "RL: rewards"
    big.set(title=title, xlabel="step", ylabel="mean over completions")
    big.set_ylim(min(0, big.get_ylim()[0]), max(1.05, big.get_ylim()[1]))
    _label_ends(big, ends)

    for ax, (name, title) in zip(axes, small.items()):
        for method, lines in methods.items():
            _draw(ax, lines, name, colors[method])
        ax.set_title(title, fontsize=12, fontweight="normal")
        least = 1.05 if name in ("flat", "reward/format") else 1e-3
        highest = ax.dataLim.y1 if ax.has_data() else 0
        ax.set_ylim(0, max(least, 1.1 * highest))
        ax.locator_params(axis="y", nbins=3)
        ax.tick_params(labelbottom=name == "flat")
    axes[-1].set_xlabel("step")


def _rewards(ax, lines):
    """Every reward of one method and their weighted sum; -> the ends of lines for `_label_ends`."""
    others = [name for name in lines[0] if name.startswith("reward/") and name not in REWARD_COLORS]
    colors = REWARD_COLORS | dict(zip(others, cycle(OTHER_REWARDS)))
    ends = []
    for name, color in colors.items():
        width = 3 if name == "reward/correctness" else 1.8
        title = "weighted sum" if name == "reward" else name.removeprefix("reward/")
        for y in _draw(ax, lines, name, color, width):
            ends.append((y, title, color))
    return ends


MOST_LABELS = 40                # dots with a number each, before the numbers lie on each other


def _accuracies(ax, rows, decoding):
    """Dots with intervals, grouped by split, in front of the teacher's level and its interval."""
    from matplotlib.patheffects import withStroke
    splits = list(dict.fromkeys(row["split"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "teacher"))
    slot = 0.84 / max(3, len(methods))
    for row in rows:
        x = splits.index(row["split"])
        value = row["value"]
        low = max(0, min(row["low"], value))        # one seed: infinite
        high = min(1, max(row["high"], value))
        color, marker = style(row["method"])
        if row["method"] == "teacher":
            span = (x - 0.46, x + 0.46)
            ax.fill_between(span, low, high, color="#E9E9E9", linewidth=0)
            ax.plot(span, (value, value), color=color, linestyle="--", linewidth=1.4, zorder=1.5,
                    label="teacher")
            continue
        x += slot * (methods.index(row["method"]) - (len(methods) - 1) / 2)
        ax.errorbar(x, value, [[value - low], [high - value]], color=color, marker=marker,
                    markersize=9, elinewidth=2, linestyle="", label=row["method"])
        if len(methods) * len(splits) <= MOST_LABELS:
            ax.annotate(f"{100 * value:.0f}", (x, high), (0, 3), textcoords="offset points",
                        ha="center", fontsize=11, color="#333333",
                        path_effects=[withStroke(linewidth=3, foreground="white")])
    side = max(0.5, 1.25 - len(splits) / 2)     # one split alone is not as wide as the picture
    ax.set(title=f"Accuracy by split, {decoding}, with 95 % intervals", ylabel="%", ylim=(0, 1.06),
           xlim=(-side, len(splits) - 1 + side))
    ax.set_yticks(np.arange(0, 1.1, 0.25), np.arange(0, 101, 25))
    names = [f"{split}\n{SPLITS.get(split, '')}".strip() for split in splits]
    ax.set_xticks(range(len(splits)), names)
    ax.tick_params(axis="x", length=0)
    handles, labels = ax.get_legend_handles_labels()
    named = dict(zip(labels, handles))            # once a method, not once a split
    ax.legend(named.values(), map(in_lines, named), loc="center left", bbox_to_anchor=(1, 0.5))
