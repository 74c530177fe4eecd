"""curves.png: what a run learned, from its log.jsonl and results.json, as one picture."""
import io
import math
from itertools import cycle

import numpy as np

MAIN = ("clip", "align", "sft", "cot")      # stages that follow each other; other supervised ones are comparison arms
# Okabe and Ito's palette, which colour-blind readers tell apart, darkened where it is faint on white; and a marker
# each, for print without colour.
STYLE = {"teacher": ("#000000", ""), "cot": ("#0072B2", "o"), "cot_continued": ("#3D9FDC", "s"),
         "filtered": ("#D99400", "^"), "grpo_token": ("#D55E00", "D"), "rejection": ("#009E73", "v"),
         "sft_direct": ("#CC79A7", "P"), "perfect": ("#777777", "*"), "grpo_token_zero": ("#7A4B00", "X"),
         "grpo": ("#9E2A2B", "<"),
         "dr_grpo": ("#D99400", "^"), "dapo": ("#009E73", "v"), "gspo": ("#CC79A7", "P"), "cispo": ("#7A4B00", "X"),
         "rloo": ("#3D9FDC", "s"), "ppo": ("#000000", "*"), "sapo": ("#0072B2", "o"), "luspo": ("#777777", "p"),
         "reinforce++": ("#8A2BE2", "d"), "right": ("#0072B2", "s"), "right_gated": ("#3D9FDC", "^"),
         "format": ("#D99400", "v"), "format_gated": ("#D55E00", "D")}
OTHER = ("#555555", "h")
REWARD_COLORS = {"reward": "#333333", "reward/format": "#3D9FDC", "reward/correctness": "#D55E00"}
OTHER_REWARDS = ("#009E73", "#CC79A7", "#D99400", "#0072B2", "#7A4B00", "#8A2BE2")     # in turn
SPLITS = {"id": "like training", "crowded": "more objects", "pairs": "unseen pairs", "walk3": "3 hops, unseen",
          "walk4": "4-5 hops, unseen"}
LOOK = {"font.size": 12, "axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888", "xtick.color": "#444444",
        "ytick.color": "#444444", "axes.labelcolor": "#444444", "axes.grid": True, "axes.grid.axis": "y",
        "grid.color": "#E6E6E6", "axes.axisbelow": True, "legend.frameon": False}


def style(label):
    """Colour and marker of a stage or method; those of its name where some switches differ, "grpo[kl_coef=0.0]"."""
    return STYLE.get(label.partition("[")[0], OTHER)


def in_lines(label):
    """A label with a line for its name and one for each switch, which would take the panel's room side by side."""
    return label.replace("[", "\n[").replace(",", ",\n")


def curves(log, results):
    """Lines of log.jsonl and rows of results.json (one run) -> a PNG 1600 pixels wide; parts without data are left out.

    Returns its bytes, or None without matplotlib.
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
    from matplotlib.figure import Figure          # not pyplot: no window, no figure that outlives the call
    learned, imitated = {}, {}                    # method or stage -> its lines
    for line in log:
        if "reward" in line:
            learned.setdefault(line["method"], []).append(line)
        elif "loss" in line:
            imitated.setdefault(line["stage"], []).append(line)
    rows = [row for row in results if row["metric"] == "accuracy" and row["decoding"] == "t1"]
    shown = [part for part in (imitated, learned) if part]
    with rc_context(LOOK):
        figure = Figure(figsize=(12.8, 7.6 if shown and rows else 4), dpi=125, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        upper, lower = figure.subfigures(2, 1, height_ratios=(1.15, 1)) if shown and rows else (figure, figure)
        if not shown and not rows:
            figure.text(0.5, 0.5, "nothing logged yet", ha="center", color="#888888")
        left, right = upper.subfigures(1, 2, width_ratios=(1, 1.5)) if len(shown) == 2 else (upper, upper)
        if imitated:
            _losses(left.subplots(), imitated)
        if learned:
            _learning(right, learned, [row["value"] for row in rows
                                       if row["method"] == "teacher" and row["split"] in ("id", "val")])
        if rows:
            _accuracies(lower.subplots(), rows)
    return figure


def _draw(ax, lines, name, color, width=2.2, place=lambda step: step):
    """Raw values thin, their centred moving average thick; -> [its last value], or [] when nobody logged the metric."""
    # A rollout whose groups are all flat has no update and no entropy; a step without usable records no loss.
    points = [(line["step"], line[name]) for line in lines
              if line.get(name) is not None and math.isfinite(line[name])]
    if not points:
        return []
    x, y = np.array(points, dtype=float).T
    window = np.ones(max(1, len(y) // 15))
    smooth = np.convolve(y, window, "same") / np.convolve(np.ones(len(y)), window, "same")
    ax.plot(place(x), y, color=color, alpha=0.3, linewidth=0.8)
    ax.plot(place(x), smooth, color=color, linewidth=width, marker="o" if len(y) == 1 else "", label=name)
    return [smooth[-1]]


def _label_ends(ax, ends, gap=0.075):
    """Names at the right of lines, [(y, text, color)], moved apart where they would overlap."""
    at = ax.transScale + ax.transLimits
    ends = sorted((at.transform((1, y))[1], text, color) for y, text, color in ends)
    halves = [gap * (1 + text.count("\n")) / 2 for _, text, _ in ends]
    heights = [height for height, _, _ in ends]
    for i in range(1, len(ends)):               # up from the lowest
        heights[i] = max(heights[i], heights[i - 1] + halves[i - 1] + halves[i])
    ceiling = 1.0
    for i in reversed(range(len(ends))):        # and those that left the axes down again, with what is in their way
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - halves[i] - halves[i - 1]
    for height, (_, text, color) in zip(heights, ends):
        ax.text(1.02, height, text, color=color, transform=ax.transAxes, va="center")


def _losses(ax, stages):
    """One column a supervised stage, in order; comparison arms lie over each other in the last one."""
    arms = [stage for stage in stages if stage not in MAIN]
    columns = [(stage, [stage]) for stage in MAIN if stage in stages] + ([("comparison", arms)] if arms else [])
    left, middles, names, ends = 0, [], [], []
    for name, mine in columns:
        width = 2 if mine is arms else 1
        steps = 1 + max(line["step"] for stage in mine for line in stages[stage])
        middles.append(left + width / 2)
        names.append(f"{name}\n{'up to ' if len(mine) > 1 else ''}{steps:,}")
        for stage in mine:
            color = style(stage)[0] if mine is arms else "#333333"
            end = _draw(ax, stages[stage], "loss", color,
                        place=lambda step: left + width * (0.04 + 0.92 * (step + 0.5) / steps))
            ends += [(y, stage, color) for y in end if mine is arms]
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


def _learning(figure, stages, teacher):
    """Rewards against step, the teacher's accuracy dashed; beside them length, entropy and flat groups.

    Of several runs the big panel shows correctness alone, and a small one the format.
    """
    several = len(stages) > 1
    small = {"reward/format": "Format"} if several else {}
    small |= {"length": "Tokens of a completion", "entropy": "Entropy, nats a token", "flat": "Share of flat groups"}
    names = "BCDE"[:len(small)]
    big, *axes = figure.subplot_mosaic(";".join(f"A{name}" for name in names), width_ratios=(1.25, 1)).values()
    colors = {stage: style(stage if several else "grpo_token")[0] for stage in stages}
    ends = [(y, f"teacher's\nanswers {y:.2f}", "black") for y in teacher[:1]]
    for y, *_ in ends:
        big.axhline(y, color="black", linestyle="--", linewidth=1.4)
    for stage, lines in stages.items():
        if several:
            found = _draw(big, lines, "reward/correctness", colors[stage])
            ends += [(y, in_lines(stage), colors[stage]) for y in found]
            continue
        others = [name for name in lines[0] if name.startswith("reward/") and name not in REWARD_COLORS]
        reward_colors = REWARD_COLORS | dict(zip(others, cycle(OTHER_REWARDS)))
        for name, color in reward_colors.items():
            width = 3 if name == "reward/correctness" else 1.8
            shown = "weighted sum" if name == "reward" else name.removeprefix("reward/")
            ends += [(y, shown, color) for y in _draw(big, lines, name, color, width)]
    big.set(title="RL: correctness" if several else "RL: rewards", xlabel="step", ylabel="mean over completions")
    big.set_ylim(min(0, big.get_ylim()[0]), max(1.05, big.get_ylim()[1]))
    _label_ends(big, ends)
    for ax, (name, words) in zip(axes, small.items()):
        for stage, lines in stages.items():
            _draw(ax, lines, name, colors[stage])
        ax.set_title(words, fontsize=12, fontweight="normal")
        least = 1.05 if name in ("flat", "reward/format") else 1e-3
        ax.set_ylim(0, max(least, 1.1 * ax.dataLim.y1 if ax.has_data() else 1))
        ax.locator_params(axis="y", nbins=3)
        ax.tick_params(labelbottom=name == "flat")
    axes[-1].set_xlabel("step")


def _accuracies(ax, rows):
    """Dots with intervals, grouped by split, in front of the teacher's level and its interval."""
    from matplotlib.patheffects import withStroke
    splits = list(dict.fromkeys(row["split"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "teacher"))
    slot = 0.84 / max(3, len(methods))
    for row in rows:
        x, value = splits.index(row["split"]), row["value"]
        low, high = max(0, min(row["low"], value)), min(1, max(row["high"], value))      # one prompt: infinite
        color, marker = style(row["method"])
        if row["method"] == "teacher":
            ax.fill_between((x - 0.46, x + 0.46), low, high, color="#E9E9E9", linewidth=0)
            ax.plot((x - 0.46, x + 0.46), (value, value), color=color, linestyle="--", linewidth=1.4, zorder=1.5,
                    label="teacher")
            continue
        x += slot * (methods.index(row["method"]) - (len(methods) - 1) / 2)
        ax.errorbar(x, value, [[value - low], [high - value]], color=color, marker=marker, markersize=9, elinewidth=2,
                    linestyle="", label=row["method"])
        ax.annotate(f"{100 * value:.0f}", (x, high), (0, 3), textcoords="offset points", ha="center", fontsize=11,
                    color="#333333", path_effects=[withStroke(linewidth=3, foreground="white")])
    side = max(0.5, 1.25 - len(splits) / 2)       # one split alone is not stretched over the whole width
    ax.set(title="Accuracy by split, T = 1, with 95 % intervals", ylabel="%", ylim=(0, 1.06),
           xlim=(-side, len(splits) - 1 + side))
    ax.set_yticks(np.arange(0, 1.1, 0.25), np.arange(0, 101, 25))
    ax.set_xticks(range(len(splits)), [f"{split}\n{SPLITS.get(split, '')}".strip() for split in splits])
    ax.tick_params(axis="x", length=0)
    named = dict(zip(*reversed(ax.get_legend_handles_labels())))
    ax.legend(named.values(), map(in_lines, named), loc="center left", bbox_to_anchor=(1, 0.5))
