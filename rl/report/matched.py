"""Arms side by side at equal accuracy in distribution: what each has out of distribution by the time it is as good as
the others where it was trained, and what that took.

    rows = json.loads((folder / "curve.json").read_text())      # of one seed, or of several
    print(matched_text(rows, "t1"))
    picture = frontier(rows, "t1")                              # the bytes of a PNG

A row is the accuracy of an arm at a point of its training, 0 for what it starts from: method, seed, point, flops,
split, decoding, value. Points are asked few questions, so a curve is noisy, and "first reaches" comes early: by about
that noise where a curve is flat, by less where it is steep.
"""
import io

import numpy as np

from rl.report.curves import LOOK, SPLITS, style
from rl.report.inference import paired_t
from rl.report.statistics import decoding_title, grid, main_split

LEVELS = (0.7, 0.8, 0.9)            # accuracies in distribution at which arms are compared
VALIDATION = "validation"           # the split that points are chosen on, which is not reported


def curves_of(rows, decoding):
    """Rows of curve.json -> (the split that is like training, {method: {seed: its points in order}}); a point is a dict
    with its FLOPs as "flops" and the accuracy on every split under the split's name."""
    found = {}
    splits = []
    for row in rows:
        if row["decoding"] != decoding or row["split"] == VALIDATION:
            continue
        points = found.setdefault(row["method"], {}).setdefault(row["seed"], {})
        point = points.setdefault(row["point"], dict(flops=row["flops"]))
        point[row["split"]] = row["value"]
        splits.append(row["split"])
    curves = {}
    for method, of_seeds in found.items():
        curves[method] = {seed: [points[place] for place in sorted(points)] for seed, points in of_seeds.items()}
    home = main_split(list(dict.fromkeys(splits))) if splits else ""
    return home, curves


def at_level(points, home, level):
    """Points of one curve -> what it has, {"flops", split: accuracy}, where its accuracy on `home` first reaches
    `level`, interpolated from the point before; None where it never does, or started above it."""
    before, *others = points
    if before[home] == level:
        return before
    if before[home] > level:
        return None
    for point in others:
        if point[home] >= level:
            return _between(before, point, home, level)
        before = point
    return None


def _between(before, after, home, level):
    share = (level - before[home]) / (after[home] - before[home])
    return {name: before[name] + share * (after[name] - before[name]) for name in after}


# ---------------------------------------------------------------- as text

def matched_text(rows, decoding):
    """A table for each of LEVELS that at least two arms reach with every seed: accuracies on the other splits, TFLOP up
    to there. Over several seeds means with 95 % t-intervals. "" without any such level."""
    home, curves = curves_of(rows, decoding)
    tables = []
    for level in LEVELS:
        reached = {}                            # method -> what it has there, a seed each
        for method, of_seeds in curves.items():
            there = [at_level(points, home, level) for points in of_seeds.values()]
            if all(there):
                reached[method] = there
        if len(reached) < 2:
            continue
        title = (f"Where arms first reach {level:.2f} on {home}, {decoding_title(decoding)}: accuracy on the other "
                 f"splits, TFLOP after sft")
        tables.append(_level_table(title, reached, home))
        never = [method for method in curves if method not in reached]
        if never:
            tables[-1] += f"\nNot with every seed, or from above it: {', '.join(never)}"
    return "\n\n".join(tables)


def _level_table(title, reached, home):
    splits = [name for name in next(iter(reached.values()))[0] if name not in ("flops", home)]
    lines = []
    for method, there in reached.items():
        cells = [_over([point[split] for point in there]) for split in splits]
        cells.append(f"{np.mean([point['flops'] for point in there]) / 1e12:.2f}")
        lines.append((method, cells))
    return grid(title, [*splits, "TFLOP"], lines)


def _over(values):
    found = paired_t(values)
    if found.n == 1:
        return f"{found.mean:.3f}"
    return f"{found.mean:.3f} [{max(0, found.low):.2f}, {min(1, found.high):.2f}]"


# ---------------------------------------------------------------- as a picture

def frontier(rows, decoding):
    """The curves as the bytes of a PNG, 1600 pixels wide: accuracy in distribution to the right, out of distribution
    upwards, a panel for each other split, an arm a line from what it starts from. Over several seeds points are means.
    None without matplotlib, or without rows."""
    if not rows:
        return None
    try:
        from matplotlib import rc_context
    except ImportError:
        return None
    with rc_context(LOOK | {"axes.grid.axis": "both"}):
        file = io.BytesIO()
        draw(rows, decoding).savefig(file, facecolor="white")
    return file.getvalue()


def draw(rows, decoding):
    """The picture of `frontier` as a matplotlib Figure."""
    from matplotlib.figure import Figure
    home, curves = curves_of(rows, decoding)
    splits = [name for name in next(iter(next(iter(curves.values())).values()))[0] if name not in ("flops", home)]
    figure = Figure(figsize=(12.8, 7.6), dpi=125, layout="constrained")
    axes = figure.subplots(2, -(-len(splits) // 2), squeeze=False).flatten()
    for ax, split in zip(axes, splits):
        for method, of_seeds in curves.items():
            x, y = _mean_curve(of_seeds, home, split)
            color, marker = style(method)
            ax.plot(x, y, color=color, linewidth=1.6, alpha=0.8)
            ax.plot(x[1:], y[1:], color=color, marker=marker, markersize=4.5, linestyle="", alpha=0.8)
            ax.plot(x[-1:], y[-1:], color=color, marker=marker or "o", markersize=10, markeredgecolor="white",
                    linestyle="", label=method, zorder=3)
        ax.set_title(f"{split}: {SPLITS[split]}" if split in SPLITS else split)
        ax.set_ylim(bottom=0)
    for ax in axes[len(splits):]:
        ax.remove()
    seeds = max(len(of_seeds) for of_seeds in curves.values())
    over = f", mean of {seeds} seeds" if seeds > 1 else ""
    figure.supxlabel(f"accuracy on {home}, {decoding_title(decoding)}{over}")
    figure.supylabel("accuracy on the split")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure


def _mean_curve(of_seeds, home, split):
    """{seed: points} -> (x, y), the means over seeds of the points that all of them have."""
    count = min(map(len, of_seeds.values()))
    x = np.mean([[point[home] for point in points[:count]] for points in of_seeds.values()], axis=0)
    y = np.mean([[point[split] for point in points[:count]] for points in of_seeds.values()], axis=0)
    return x, y
