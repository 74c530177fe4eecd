"""The report of an ablation grid: one table and one picture of paired differences, over the seeds that all cells share.

    rows = collect(folder, runs)                        # for results.json of the grid's folder
    print(grid_text(rows, cells, names))
    html = grid_page(name, folder, rows, cells, names)  # report.html

Every seed is trained in every cell, from the same start and on the same prompts, so that cells are compared seed by
seed. The first cell, of the first values, is what the others are held against.
"""
import json
import math

from rl.report.charts import Charts
from rl.report.inference import minimum_detectable, paired_t
from rl.report.log import mean_log, read_log
from rl.report.page import STYLE, definition, grid, points_text, series_of, what_was_run
from rl.report.statistics import (by_seed, decoding_title, less, main_decoding, main_split, over_seeds, paired_grid,
                                  share_grid, share_text, within)
from rl.report.web import document, escape

CURVES = ("reward/correctness", "reward", "length", "entropy", "flat", "grad_norm", "kl_ref")


def collect(folder, runs):
    """runs: {sub-folder: (name of its cell, seed, label of the row that counts)} -> rows of their results.json, their
    method the cell's name."""
    rows = []
    for name, (cell, _, label) in runs.items():
        for row in json.loads((folder / name / "results.json").read_text()):
            if row["method"] == label:
                rows.append(dict(row, method=cell))
    return rows


def differences_to_first(rows, names, decoding):
    """{(cell, split): inference.Paired} of accuracies less those of the first cell, seed by seed."""
    of_seeds = by_seed(rows, decoding)
    cells = {}
    for name in names[1:]:
        for split in splits_of(rows):
            place = split, "accuracy"
            found = less(of_seeds.get((name, *place), {}), of_seeds.get((names[0], *place), {}))
            if found is not None:
                cells[name, split] = found
    return cells


def effects(rows, cells, names, decoding):
    """{("option=value", split): inference.Paired}: accuracy with the value less that with the option's first value,
    seed by seed the mean over all cells that differ in nothing else; {} where only one option varies."""
    if sum(len(values_of(cells, option)) > 1 for option in cells[0]) < 2:
        return {}
    of_seeds = by_seed(rows, decoding)
    found = {}
    for option in cells[0]:
        first, *others = values_of(cells, option)
        for value in others:
            for split in splits_of(rows):
                pairs = []                      # (accuracies with the value, with the first one), by seed
                for name, cell in zip(names, cells):
                    if cell[option] == value:
                        partner = names[cells.index({**cell, option: first})]
                        pairs.append([of_seeds.get((one, split, "accuracy"), {}) for one in (name, partner)])
                seeds = [seed for seed in pairs[0][0] if all(seed in one for pair in pairs for one in pair)]
                means = [sum(one[seed] - base[seed] for one, base in pairs) / len(pairs) for seed in seeds]
                if means:
                    found[f"{option}={value}", split] = paired_t(means)
    return found


def values_of(cells, option):
    """The values of an option, in their order."""
    return list(dict.fromkeys(cell[option] for cell in cells))


def splits_of(rows):
    return list(dict.fromkeys(row["split"] for row in rows))


# ---------------------------------------------------------------- as text

def grid_text(rows, cells, names):
    """The result in a sentence each, the table of accuracies, of differences, of effects, and what they could show."""
    if not rows:
        return "Nothing was evaluated: no cell answers questions."
    decoding = main_decoding(rows)
    title = decoding_title(decoding)
    to_first = differences_to_first(rows, names, decoding)
    of_options = effects(rows, cells, names, decoding)
    accuracies = accuracies_of(rows, decoding)
    parts = ["\n".join(result_of(rows, names, decoding, to_first)),
             share_grid(f"Accuracy, {title}: mean [95 % t-interval over {seeds_of(rows)} seeds]", accuracies),
             paired_grid(f"Points more than {names[0]}, {title}", to_first),
             paired_grid(f"Points more than with the option's first value, over cells that differ in nothing else, "
                         f"{title}", of_options),
             comparisons(to_first, of_options)]
    return "\n\n".join(part for part in parts if part)


def accuracies_of(rows, decoding):
    """Rows over the seeds, their intervals cut to what a share can be; without one where there is one seed."""
    found = []
    for row in over_seeds(rows):
        if (row["metric"], row["decoding"]) == ("accuracy", decoding):
            low, high = within(row["low"], row["high"], 0.0, 1.0) if row["n"] > 1 else (None, None)
            found.append(dict(row, low=low, high=high))
    return found


def seeds_of(rows):
    return len({row["seed"] for row in rows})


def result_of(rows, names, decoding, to_first):
    """Two lines: the best cell beside the first, and how many differences are shown."""
    home = main_split(splits_of(rows))
    means = {row["method"]: row for row in accuracies_of(rows, decoding) if row["split"] == home}
    best = max((name for name in names if name in means), key=lambda name: means[name]["value"])
    first = (f"Result on {home}, {decoding_title(decoding)}: of {len(names)} cells the best is {best} with "
             f"{share_text(means[best])}")
    if best != names[0]:
        first += f", {names[0]} has {share_text(means[names[0]])}"
        found = to_first.get((best, home))
        if found is not None:
            first += f"; the difference is {points_of(found)} points"
            first += ", the largest of its kind" if is_shown(found) else ", not shown"
    shown = sum(is_shown(found) for found in to_first.values())
    second = f"{shown} of {len(to_first)} differences to {names[0]} have an interval without 0, before any correction"
    return [f"{first}.", f"{second}."]


def is_shown(found):
    """Whether the interval of an inference.Paired leaves 0 out; of differences that are equal with every seed there is
    no test."""
    return not math.isnan(found.p) and (found.low > 0 or found.high < 0)


def points_of(found):
    """An inference.Paired in points."""
    return points_text(dict(value=found.mean, low=found.low, high=found.high))


def comparisons(*tables):
    """A line on multiple comparisons; "" without a test."""
    lines = []
    for cells in tables:
        tested = [cell for cell in cells.values() if not math.isnan(cell.p)]
        if tested:
            reach = max(100 * minimum_detectable(cell.sd, cell.n, 0.05 / len(cells)) for cell in tested)
            lines.append(f"{len(cells)} comparisons, corrected together by Holm's method; a true difference of "
                         f"{reach:.1f} points would have been found in any of them four times of five")
    if not lines:
        return ""
    return f"Multiple comparisons: {'; then '.join(lines)}. Each table is corrected by itself."


# ---------------------------------------------------------------- as a page

def grid_page(name, folder, rows, cells, names, environment=()):
    """report.html of a grid, bytes. environment: entries of model/runs/environment.py."""
    charts = Charts()
    decoding = main_decoding(rows)
    to_first = differences_to_first(rows, names, decoding)
    of_options = effects(rows, cells, names, decoding)
    over = f"mean and 95 % t-interval over {seeds_of(rows)} seeds, paired by seed, {decoding_title(decoding)}"
    figures = [charts.differences(f"Points more than {names[0]}", over, as_rows(to_first)),
               charts.differences("Points more than with the option's first value", over, as_rows(of_options))]
    sections = {"Result": "", "Differences": f'<div class="charts big">{"".join(figures)}</div>'}
    if rows:
        lines = result_of(rows, names, decoding, to_first)
        paragraphs = "".join(f"<p>{escape(line)}</p>" for line in lines)
        sections["Result"] = f'<div class="card result">{paragraphs}</div>'
        sections["Differences"] += f"<p>{escape(comparisons(to_first, of_options))}</p>"
        sections["Accuracy"] = grid(f"Accuracy, {decoding_title(decoding)} [95 % t-interval over seeds]",
                                    accuracies_of(rows, decoding), share_text)
    sections["Curves"] = curves_of(charts, folder, names)
    sections["Tables"] = f'<pre>{escape(grid_text(rows, cells, names))}</pre>'
    sections["What was run"] = what_was_run(dict(environment=list(environment), log=[], probe={}))
    body = "\n".join(f"<section><h2>{title}</h2>{html}</section>" for title, html in sections.items() if html)
    return document(f"Grid {name}", body + charts.data(), STYLE, Charts.SCRIPT)


def as_rows(cells):
    """{(name, split): Paired} -> rows as charts take them."""
    return [dict(method=name, split=split, value=found.mean, low=found.low, high=found.high)
            for (name, split), found in cells.items()]


def curves_of(charts, folder, names):
    """Charts of what reinforcement learning logs, a series a cell: means over its seeds."""
    lines_of = {}                               # cell -> lines of reinforcement learning
    for number, name in enumerate(names):
        logs = [read_log(path) for path in sorted(folder.glob(f"cell-{number + 1}-seed-*/log.jsonl"))]
        lines_of[name] = [line for line in mean_log(logs) if "reward" in line]
    found = []
    for metric in CURVES:
        series = {name: series_of(lines, metric) for name, lines in lines_of.items()}
        found.append(charts.lines(metric, definition(metric), series))
    return f'<div class="charts">{"".join(found)}</div>' if any(found) else ""
